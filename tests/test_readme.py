"""The README's commands parse, and its map from equations to code points at what exists."""
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.S)
COMMANDS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()]
MAP = re.findall(r"^\|.*\| `([\w/]+\.py):([\w.]+)` \|$", README, re.M)


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_commands_parse(command):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    module = importlib.import_module(Path(words[script]).stem)
    module.parse_args(words[script + 1:])


def test_make_targets_exist():
    rules = re.findall(r"^([\w ./]+):", (ROOT / "Makefile").read_text(), re.M)
    targets = set(" ".join(rules).split())
    named = {word for command in COMMANDS if command.startswith("make ")
             for word in shlex.split(command)[1:] if "=" not in word}
    assert named and named <= targets


@pytest.mark.parametrize("file, name", MAP)
def test_map_points_at_what_exists(file, name):
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        assert found, f"{file} has no {name}"
        body = found[0].body


def test_map_names_every_equation_and_the_code_names_it_too():
    code = (ROOT / "model.py").read_text() + (ROOT / "make_pseudo.py").read_text()
    rows = [line for line in README.splitlines() if line.startswith("| Eq.")]
    for number in range(1, 11):
        assert any(f"({number})" in row for row in rows), f"Eq. ({number}) is not in the map"
        if number not in (4, 5):  # those stand as Eq. (3), (4) and (5) on one line
            assert f"Eq. ({number})" in code
