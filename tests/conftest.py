"""Shared by the tests: the path, tiny data sets, a finished run, three ways to run a script."""
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # CUDA_VISIBLE_DEVICES=0 make test: on a GPU
import torch
from PIL import Image
from support.files import HELD

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
HAS_PYDENSECRF = importlib.util.find_spec("pydensecrf") is not None
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))),
                                    reason="torch.compile needs a C++ compiler")
BACKENDS = ["torch"] + ["pydensecrf"] * HAS_PYDENSECRF  # of the CRF, those that are installed


def pytest_configure(config):
    """The markers of `make check EQ=8`, `make check EQ=iou`, and so on."""
    for name in [*(f"eq{number}" for number in range(1, 11)), "confusion", "iou", "deeplabv2"]:
        config.addinivalue_line("markers", f"{name}: checked by make check")


@contextmanager
def own_process():
    """What a process gives back at its end: the locks of its run folders."""
    try:
        yield
    finally:
        while HELD:
            HELD.popitem()[1].close()


def in_process(stage, *arguments):
    """Run a stage in this process: in_process(train_cls, "--data", ...)."""
    with own_process():
        stage.main(stage.parse_args([str(a) for a in arguments]))


def classifier(num_classes=5, **config):
    """A small CPFCTE of random weights, ready to use."""
    from model import CPFCTE, ClassifierConfig
    torch.manual_seed(0)
    return CPFCTE(ClassifierConfig(num_classes, "vit_toy", **config)).eval()


# --- data sets ---------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy data set of 24 + 8 + 8 images; tests read it and never write to it."""
    from datasets import beetles
    root = tmp_path_factory.mktemp("data") / "toy"
    beetles.make_toy(root, (24, 8, 8))
    return root


@pytest.fixture
def toy_copy(toy, tmp_path):
    """The same data set, copied into a folder that a test may damage."""
    return Path(shutil.copytree(toy, tmp_path / "toy"))


@pytest.fixture
def coco(tmp_path):
    """COCO 2014's layout: 5 + 3 images of 48x32, of which 1 + 1 have no object."""
    from pycocotools import mask as coder
    root, rng = tmp_path / "coco", np.random.default_rng(0)
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    names = {1: "person", 10: "traffic light", 90: "toothbrush"}
    categories = [dict(id=i, name=names.get(i, f"thing {i}"), supercategory="x") for i in ids]

    def box(x, y, right, bottom):
        return [[x, y, right, y, right, bottom, x, bottom]]

    def rle(rows, columns):
        mask = np.zeros((32, 48), np.uint8, order="F")
        mask[rows, columns] = 1
        return dict(size=[32, 48], counts=coder.encode(mask)["counts"].decode())

    crowd = dict(size=[32, 48], counts=[84, *19 * [10, 22], 10, 834])  # rows 20-29, columns 2-21
    objects = {  # image: class id, area, is a crowd, shape
        "train": {i: [(1, 100, 0, box(4, 4, 20, 28)), (90, 20, 0, box(30, 2, 40, 6))]
                  for i in (1, 2, 3, 4)},
        "val": {101: [(10, 64, 0, box(8, 8, 16, 16)), (1, 384, 0, box(4, 4, 20, 28)),
                      (90, 40, 0, rle(slice(2, 6), slice(30, 40))), (1, 200, 1, crowd)],
                102: [(1, 1536, 1, rle(slice(0, 32), slice(0, 48)))]}}
    for split, numbers in (("train", range(1, 6)), ("val", range(101, 104))):
        images = [dict(id=i, file_name=f"COCO_{split}2014_{i:012d}.jpg", height=32, width=48)
                  for i in numbers]
        annotations = [dict(id=100 * i + k, image_id=i, category_id=category, area=area,
                            iscrowd=is_crowd, segmentation=shape, bbox=[0, 0, 1, 1])
                       for i, things in objects[split].items()
                       for k, (category, area, is_crowd, shape) in enumerate(things)]
        (root / f"{split}2014").mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(
            dict(info={}, images=images, annotations=annotations, categories=categories)))
        for image in images:
            pixels = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2014" / image["file_name"])
    return root


# --- a finished run ----------------------------------------------------------------------------

TRAINS = "--data data --run run --workers 0 --batch-size 4 "
CALLS = {  # name: script, its usual flags; later flags win
    "data": ("data", ""),
    "cls": ("train_cls", TRAINS + "--epochs 1 --size 48"),
    "pseudo": ("make_pseudo", "--data data --run run --workers 0 --crf torch --crf-iterations 1"),
    "seg": ("train_seg", TRAINS + "--iterations 2 --save-every 2 --crop 48"),
    "eval": ("evaluate", "--data data --run run --workers 0"),
    "masks": ("evaluate", "--data data --workers 0 --masks run/pseudo --split train"),
    "photo": ("evaluate", "--run run --image photo.png --out out.png --workers 0")}


def command(line):
    """command("cls --epochs 2"): the words of one of CALLS with more flags, after `python`."""
    name, *flags = line.split()
    script, usual = CALLS[name]
    return [ROOT / f"{script}.py", *usual.split(), *flags]


def call(line):
    """Run a command in this process; a mistake ends in SystemExit."""
    from support.processes import launch
    script, *flags = command(line)
    stage = importlib.import_module("datasets.make" if script.stem == "data" else script.stem)
    with own_process():
        launch(stage.main, stage.parse_args(flags))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(where tests work, the copy that is kept): all four stages at the smallest size."""
    from datasets import beetles
    place = tmp_path_factory.mktemp("finished") / "place"
    beetles.make_toy(place / "data", (8, 2, 2))
    Image.new("RGB", (40, 30), (90, 160, 30)).save(place / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in ("cls", "pseudo", "seg", "eval"):
            call(line)
    return place, Path(shutil.copytree(place, place.parent / "kept"))


@pytest.fixture
def place(finished_run, monkeypatch):
    """The working directory: data/, run/ and photo.png, as the stages left them."""
    place, kept = finished_run
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kept, place)  # the same path again: masks know the folder of their data
    monkeypatch.chdir(place)
    return place


def contents(folder="."):
    """{path: bytes} of every file, but the log, which each stage adds to, and the lock."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*")
            if path.is_file() and not path.name.endswith(("log.jsonl", ".lock"))}


def log_of(run):
    """The lines of a run's log."""
    return [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]


def refusal(line, capsys):
    """The one line that a call ends with; nothing that was written may have changed."""
    before = contents()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call(line)
    assert contents() == before
    told = ended.value.code
    if told == 2:  # argparse: the usage, then the line
        told = capsys.readouterr().err.strip().splitlines()[-1]
    assert isinstance(told, str) and len(told.splitlines()) == 1, told
    return told


@pytest.fixture(scope="session")
def script():
    """script("train_cls.py", "--data", ...) runs it in a process of its own: (code, output)."""
    def run(*arguments, env=(), check=True, timeout=240, cwd=ROOT):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, timeout=timeout,
                              stderr=subprocess.STDOUT, env={**os.environ, **dict(env)})
        if check:
            assert done.returncode == 0, done.stdout
        return done.returncode, done.stdout
    return run
