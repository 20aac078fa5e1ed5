"""Shared by the tests: the path, a tiny toy data set, a way to run a script."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy data set of 24 + 8 + 8 images; tests read it and never write to it."""
    import data
    root = tmp_path_factory.mktemp("data") / "toy"
    data.make_toy(root, (24, 8, 8))
    return root


@pytest.fixture
def toy_copy(toy, tmp_path):
    """The same data set, copied into a folder that a test may damage."""
    import shutil
    return Path(shutil.copytree(toy, tmp_path / "toy"))


@pytest.fixture(scope="session")
def script():
    """script("train_cls.py", "--data", ...) runs it in a process of its own: (code, output)."""
    def run(*arguments, env=(), check=True, timeout=240):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, timeout=timeout,
                              stderr=subprocess.STDOUT, env={**os.environ, **dict(env)})
        if check:
            assert done.returncode == 0, done.stdout
        return done.returncode, done.stdout
    return run
