"""Bad input, row by row: a refusal is one line that names the file, and what is written stays.

A row is what is done to a finished run, the call, and what its line must say. Every row works on
its own copy of that run, in the same place, and is told through launch(), as a person is.
"""
import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import evaluate
import make_pseudo
import train_cls
import train_seg
from datasets import beetles
from support import run
from support.run import DataError, launch

ROOT = Path(__file__).resolve().parent.parent
TRAINS = "--data data --run run --workers 0 --batch-size 4 "
CALLS = {  # the beginning of a row's call; later flags win
    "data": (data, ""),
    "cls": (train_cls, TRAINS + "--epochs 1 --size 48"),
    "pseudo": (make_pseudo, "--data data --run run --workers 0 --crf torch --crf-iterations 1"),
    "seg": (train_seg, TRAINS + "--iterations 2 --save-every 2 --crop 48"),
    "eval": (evaluate, "--data data --run run --workers 0"),
    "masks": (evaluate, "--data data --workers 0 --masks run/pseudo --split train"),
    "photo": (evaluate, "--run run --image photo.png --out out.png --workers 0")}
FIRST = "train_00000"  # the image that rows damage; with test_00000 for stage 4


def call(line):
    """One of CALLS with more flags, as `python SCRIPT.py ...` runs it."""
    name, *flags = line.split()
    stage, usual = CALLS[name]
    launch(stage.main, stage.parse_args([*usual.split(), *flags]))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(where rows work, the copy that is kept): all four stages at the smallest size."""
    place = tmp_path_factory.mktemp("hostile") / "place"
    beetles.make_toy(place / "data", (8, 2, 2))
    Image.new("RGB", (40, 30), (90, 160, 30)).save(place / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for line in ("cls", "pseudo", "seg", "eval"):
            call(line)
    return place, Path(shutil.copytree(place, place.parent / "kept"))


@pytest.fixture
def place(finished, monkeypatch):
    """The working directory: data/, run/ and photo.png, as the stages left them."""
    place, kept = finished
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(kept, place)  # the same path again: masks know the folder of their data
    monkeypatch.chdir(place)
    return place


def contents():
    """{path: bytes} of every file here, but the log, which each stage adds to, and the lock."""
    return {str(path): path.read_bytes() for path in Path().rglob("*")
            if path.is_file() and path.name not in ("log.jsonl", ".lock")}


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


# --- what rows do ------------------------------------------------------------------------------

def text(path, *content, lines=None, encoding="utf-8"):
    content = content if lines is None else [lines] * bool(lines)
    Path(path).write_text("".join(f"{line}\n" for line in content), encoding)


def add_line(path, line):
    text(path, *Path(path).read_text().splitlines(), line)


def replace(path, old, new):
    content = Path(path).read_text()
    assert old in content
    Path(path).write_text(content.replace(old, new))


def split_with(image_id):
    """Every split begins with this id."""
    for path in Path("data/ImageSets/Segmentation").iterdir():
        text(path, image_id, *path.read_text().split())


def picture(path, size=(96, 96), mode="RGB", color=0, **options):
    Image.new(mode, size, color).save(path, **options)


def become_folder(path):
    Path(path).unlink()
    Path(path).mkdir()


def cut(path, share=0.5):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:int(len(content) * share)])


def edit(path, change):
    """Change a checkpoint's dictionary, or put something else in its place."""
    checkpoint = torch.load(path, weights_only=True)
    other = change(checkpoint)
    torch.save(checkpoint if other is None else other, path)


def drop(path, *keys):
    """Take checkpoint[keys[0]][keys[1]]... out of a checkpoint."""
    def _drop(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]
    edit(path, _drop)


def fill(path, value):
    """Every weight of a checkpoint becomes this number."""
    def _fill(checkpoint):
        for weight in checkpoint["model"].values():
            weight.fill_(value) if weight.is_floating_point() else None
    edit(path, _fill)


def rewind(path, name):
    """A checkpoint from before the first epoch or step."""
    edit(path, lambda checkpoint: checkpoint.update({name: 0}))


def correct_a_label():
    """What a person does who finds a mistake in image_labels.txt after training."""
    path = Path("data/image_labels.txt")
    lines = path.read_text().splitlines()
    name = next(name for name in beetles.TOY_CLASSES[1:] if name not in lines[0])
    text(path, f"{lines[0]} {name}", *lines[1:])


class Payload:
    """Whoever unpickles this runs code of the file's author: it makes a file called marker."""

    def __reduce__(self):
        return open, ("marker", "w")


def png(width, height):
    """A PNG whose header promises this size, and no more than that."""
    content = bytearray(Path("photo.png").read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


# --- the folder --------------------------------------------------------------------------------

CLASSES, LABELS = "data/classes.txt", "data/image_labels.txt"
TRAIN, TEST = (f"data/ImageSets/Segmentation/{split}.txt" for split in ("train", "test"))
NO_UTF8 = "is no UTF-8 text: save it as UTF-8"
OTHER_CLASSES = f"(?=.*{CLASSES}).*has other classes"

FOLDER = [
    ("256 classes", lambda: text(CLASSES, "background", *range(255)), "cls",
     f"{CLASSES} has 256 classes: a mask can hold 255"),
    ("a class twice", lambda: add_line(CLASSES, "checks_red"), "cls",
     f"{CLASSES}: 'checks_red' has a space, or is there twice"),
    ("no background", lambda: replace(CLASSES, "background\n", ""), "cls",
     f"{CLASSES} begins with 'vertical_red': class 0 is 'background'"),
    ("background last", lambda: text(CLASSES, *beetles.TOY_CLASSES[1:], "background"), "cls",
     f"{CLASSES} begins with 'vertical_red': class 0 is 'background'"),
    ("a space in a class", lambda: add_line(CLASSES, "traffic light"), "cls",
     f"{CLASSES}: 'traffic light' has a space"),
    ("no classes", lambda: text(CLASSES), "cls", f"{CLASSES} is empty"),
    ("classes in Latin-1", lambda: text(CLASSES, "background", "käfer", encoding="latin-1"), "cls",
     f"{CLASSES} {NO_UTF8}"),
    ("classes in UTF-16", lambda: text(CLASSES, "background", encoding="utf-16"), "eval",
     f"{CLASSES} {NO_UTF8}"),
    ("labels in Latin-1", lambda: text(LABELS, "a käfer", encoding="latin-1"), "cls",
     f"{LABELS} {NO_UTF8}"),
    ("a split in Latin-1", lambda: text(TEST, "käfer", encoding="latin-1"), "eval",
     f"{TEST} {NO_UTF8}"),
    ("a preset in Latin-1", lambda: text("data/preset.txt", "käfer", encoding="latin-1"), "cls",
     f"data/preset.txt {NO_UTF8}"),
    ("names of parts in Latin-1", lambda: text("data/Parts/names.txt", "körper", "kopf",
                                               encoding="latin-1"), "eval",
     f"data/Parts/names.txt {NO_UTF8}"),
    ("settings in Latin-1", lambda: text("run/pseudo/settings.json", '{"ä": 1}',
                                         encoding="latin-1"), "pseudo",
     f"run/pseudo/settings.json {NO_UTF8}"),
    ("an unknown preset", lambda: text("data/preset.txt", "imagenet"), "cls",
     "data/preset.txt.*'imagenet'.*voc, coco, toy, voc-small, photo"),
    ("other classes, stage 2", lambda: add_line(CLASSES, "more"), "pseudo",
     OTHER_CLASSES),
    ("other classes, stage 4", lambda: add_line(CLASSES, "more"), "eval",
     OTHER_CLASSES),
    ("an id twice", lambda: split_with("train_00003"), "cls", f"{TRAIN} lists train_00003 twice"),
    ("an id twice, stage 4", lambda: split_with("test_00001"), "eval",
     f"{TEST} lists test_00001 twice"),
    ("two lines of labels", lambda: add_line(LABELS, f"{FIRST} checks_red"), "cls",
     f"{LABELS} has two lines for {FIRST}"),
    ("no label", lambda: split_with("stranger"), "cls",
     f"{LABELS}: no label for stranger: add 'stranger NAME ...'"),
    ("no label, stage 2", lambda: split_with("stranger"), "pseudo", "no label for stranger"),
    ("an unknown label", lambda: replace(LABELS, f"{FIRST} ", f"{FIRST} unicorn "), "cls",
     f"{LABELS}: {FIRST} has 'unicorn', which is not in classes.txt"),
    ("corrected labels, stage 1", correct_a_label, "cls --resume",
     "run/cls.pt was made with other labels: choose another --run, or --overwrite"),
    ("corrected labels, stage 2", correct_a_label, "pseudo",
     "run/bpm holds masks of other data, labels, .*--overwrite"),
    ("corrected labels, stage 3", correct_a_label, "seg --resume",
     "run/seg.pt was made with other labels: choose another --run, or --overwrite"),
    ("other images, stage 1", lambda: text(TRAIN, *(f"train_{i:05d}" for i in range(7))),
     "cls --resume", "run/cls.pt was made with other ids: "),
    ("fewer images than a batch", lambda: text(TRAIN, FIRST), "cls --run new",
     "1 images cannot fill --batch-size 4: lower it"),
    ("no such folder", lambda: None, "cls --data nowhere",
     "nowhere not found: make it with data.py"),
    ("a file for a folder", lambda: None, "cls --data photo.png",
     "photo.png not found: make it with data.py"),
    ("no such split", lambda: None, "eval --split holdout",
     "Segmentation/holdout.txt not found: run data.py"),
]
FOLDER += [
    ("an id with a blank", lambda: add_line(TRAIN, "img (1)"), "cls",
     f"{TRAIN}, line 9: 'img \\(1\\)' has a blank: a line is one ID, and no ID has blanks"),
    ("two ids with blanks, stage 4", lambda: text(TEST, "img (1)", "img (2)"), "eval",
     f"{TEST}, line 1: 'img \\(1\\)' has a blank"),
    ("an id and another", lambda: add_line(TEST, "test_00000 test_00001"), "eval",
     f"{TEST}, line 3: 'test_00000 test_00001' has a blank: a line is one ID"),
    *((f"a list of ImageSets/Main, {sign}", partial(add_line, TRAIN, f"{FIRST}  {sign}"), "cls",
       f"{TRAIN}, line 9: '{FIRST}  {sign}' has a blank. A list of ImageSets/Main")
      for sign in ("1", "-1", "0")),
    ("the folder above", lambda: (os.mkdir("VOCdevkit"), shutil.move("data", "VOCdevkit/VOC2012")),
     "cls --data VOCdevkit", "VOCdevkit/classes.txt not found: pass --data VOCdevkit/VOC2012"),
]
BAD_IDS = ("../../outside", "/abs/x", "a\\b", ".hidden", "..", "a/b")
FOLDER += [(f"id {bad}, {line}", partial(split_with, bad), line,
            rf"Segmentation/\w+.txt, line 1: {re.escape(repr(bad))} is no name of a file")
           for bad in BAD_IDS for line in ("cls --run new", "pseudo", "seg --run new", "eval",
                                           "masks", "eval --export")]


# --- files that are damaged, missing or of another kind ----------------------------------------

def image_of(image_id):
    return f"data/JPEGImages/{image_id}.jpg"


def truth_of(image_id):
    return f"data/SegmentationClass/{image_id}.png"


IMAGE, TEST_IMAGE, TRUTH = image_of(FIRST), image_of("test_00000"), truth_of("test_00000")
BPM, PSEUDO, PRED = f"run/bpm/{FIRST}.png", f"run/pseudo/{FIRST}.png", "run/pred/test_00000.png"
NOTE = "settings.json is damaged: delete it and the masks beside it"


def blocked(path):
    """What a line says where a folder stands for a file, or a file for a folder."""
    return rf"(?=.*{path}).*(Is a directory|File exists|Not a directory|no folder|cannot be writ)"


FILES = [
    ("half an image, stage 1", lambda: cut(IMAGE), "cls --run new",
     f"{IMAGE} cannot be read .*: mend it, or take it out of the split"),
    ("half an image, stage 2", lambda: cut(IMAGE), "pseudo --overwrite",
     f"{IMAGE} cannot be read .*: mend it, or take it out of the split"),
    ("half an image, stage 3", lambda: cut(IMAGE), "seg --overwrite", f"{IMAGE} cannot be read"),
    ("half an image, stage 4", lambda: (cut(TEST_IMAGE), shutil.rmtree("run/pred")), "eval",
     f"{TEST_IMAGE} cannot be read .*: mend it, or take it out of the split"),
    ("half a photo", lambda: cut("photo.png"), "photo", "photo.png cannot be read"),
    ("an empty image", lambda: cut(IMAGE, 0), "cls --run new", f"{IMAGE} cannot be read"),
    ("no image", lambda: os.remove(IMAGE), "cls --run new", f"{IMAGE} not found"),
    ("no photo", lambda: os.remove("photo.png"), "photo", "photo.png not found"),
    *((f"no image of val, {line}", partial(os.remove, "data/JPEGImages/val_00001.jpg"), line,
       "data/JPEGImages/val_00001.jpg not found: add it, or take it out")
      for line in ("cls --run new", "seg --overwrite")),
    *((f"{what} truth of val", partial(how, "data/SegmentationClass/val_00001.png"),
       "seg --overwrite", f"data/SegmentationClass/val_00001.png {words}")
      for what, how, words in (("half a", cut, "cannot be read"), ("an empty", partial(
          cut, share=0), "cannot be read"), ("a colour", picture, "is a RGB image"))),
    ("a bomb", lambda: Path(IMAGE).write_bytes(png(60_000, 60_000)), "cls --run new",
     f"{IMAGE} cannot be read .*DecompressionBomb"),
    ("a floating-point photo", lambda: picture("photo.tif", mode="F"), "photo --image photo.tif",
     "photo.tif holds floating-point numbers: save it with 8 bits"),
    ("half a truth", lambda: cut(TRUTH), "eval", f"{TRUTH} cannot be read"),
    ("a colour truth", lambda: picture(TRUTH), "eval", f"{TRUTH} is a RGB image: a mask is"),
    ("a 16-bit truth", lambda: picture(TRUTH, mode="I;16"), "eval",
     f"{TRUTH} is a I;16 image: a mask is"),
    ("a class too many in a truth", lambda: picture(TRUTH, mode="L", color=9), "eval",
     f"{TRUTH} has the value 9: allowed are 0 to 8"),
    ("a truth of another size", lambda: picture(TRUTH, (90, 96), "L"), "eval",
     f"{TRUTH} is 90x96, its image 96x96"),
    ("a truth of another size, --masks", lambda: picture(truth_of(FIRST), (90, 96), "L"), "masks",
     f"{truth_of(FIRST)} is 90x96, its image 96x96"),
    ("a mask of another size, --masks", lambda: picture(PSEUDO, (90, 96), "L"), "masks",
     f"{PSEUDO} is 90x96, its image 96x96"),
    ("parts of another size", lambda: picture("data/Parts/test_00000.png", (90, 96), "L"), "eval",
     "data/Parts/test_00000.png is 90x96, its image 96x96"),
    ("no parts of an image", lambda: os.remove("data/Parts/test_00000.png"), "eval",
     "data/Parts/test_00000.png not found"),
    ("no truth at all", lambda: shutil.rmtree("data/SegmentationClass"), "eval",
     "no ground truth to score: data/SegmentationClass has none"),
    ("no mask to learn", lambda: os.remove(PSEUDO), "seg --overwrite",
     f"{PSEUDO} not found: run make_pseudo.py first"),
    ("half a mask to learn", lambda: cut(PSEUDO), "seg --overwrite", f"{PSEUDO} cannot be read"),
    ("a mask to learn of another size", lambda: picture(PSEUDO, (90, 96), "L"), "seg --overwrite",
     f"{PSEUDO} is 90x96, its image 96x96"),
    ("masks that nobody knows, stage 2", lambda: os.remove("run/pseudo/settings.json"), "pseudo",
     "run/pseudo holds masks .*no settings.json: --overwrite replaces them, --run writes elsewh"),
    ("masks that nobody knows, stage 4", lambda: os.remove("run/pred/settings.json"), "eval",
     "run/pred holds masks .*no settings.json(?!.*--overwrite).*(--run|delete)"),  # no such flag
    ("masks of other flags", lambda: None, "pseudo --crf-iterations 2",
     "run/pseudo holds masks of other data, labels, weights or flags"),
    *((f"settings.json is {content}", partial(text, "run/pseudo/settings.json", content), line,
       f"run/pseudo/{NOTE}") for content in ("", "{", "null", "[1]", '"masks"', "5")
      for line in ("pseudo", "seg --overwrite", "masks")),
    ("broken settings, stage 4", lambda: text("run/pred/settings.json", "{"), "eval",
     f"run/pred/{NOTE}(?!.*--overwrite)"),
    ("the run is a file", lambda: text("file"), "cls --run file",
     "--run file is no folder that can be written to: choose another"),
    ("the run is a file, stage 2", lambda: text("file"), "pseudo --run file",
     "file/cls.pt not found: run train_cls.py first"),
    ("the run is a file, stage 3", lambda: text("file"), "seg --run file --masks run/pseudo",
     "--run file is no folder"),
    ("the run is a file, stage 4", lambda: text("file"), "eval --run file", "file.* (no|not) f"),
    ("the run lies in a file", lambda: text("file"), "cls --run file/run",
     blocked("file")),
    ("an image is a folder", lambda: become_folder(IMAGE), "cls --run new", f"{IMAGE} not found"),
    ("classes.txt is a folder", lambda: become_folder(CLASSES), "eval", f"{CLASSES} not found"),
    ("a truth is a folder", lambda: (os.remove(TRUTH), os.mkdir(TRUTH),
                                     os.remove(truth_of("test_00001"))), "eval",
     "no ground truth to score"),
    ("labels are a folder", lambda: become_folder(LABELS), "cls", f"{LABELS} not found"),
    ("a split is a folder", lambda: become_folder(TRAIN), "cls", f"{TRAIN} not found"),
    ("a mask is a folder", lambda: become_folder(PSEUDO), "pseudo", blocked(FIRST)),
    ("cls.pt is a folder", lambda: become_folder("run/cls.pt"), "pseudo", "run/cls.pt not found"),
    ("cls.pt is a folder, stage 1", lambda: become_folder("run/cls.pt"), "cls --resume",
     "run/cls.pt not found|run/cls.pt.*folder"),
    ("seg.pt is a folder, stage 3", lambda: become_folder("run/seg.pt"), "seg --overwrite",
     blocked("run/seg.pt")),
    ("the photo is a folder", lambda: None, "photo --image data", "data is a folder"),
    ("--out is a folder", lambda: os.mkdir("out.png"), "photo", blocked("out.png")),
    ("--masks is a file", lambda: None, "seg --masks photo.png --overwrite",
     f"photo.png/{FIRST}.png not found: run make_pseudo.py first"),
    ("--masks is nowhere", lambda: None, "masks --masks nowhere",
     f"nowhere/{FIRST}.png not found"),
    ("a data set for a file", lambda: None, "data toy --root photo.png --num 1 1 1",
     blocked("photo.png")),
    ("the overlay is the photo", lambda: shutil.copy("photo.png", "me_overlay.png"),
     "photo --image me_overlay.png --out me.png", "me_overlay.png is in the way, and not ours"),
    ("the overlay is a folder", lambda: os.mkdir("out_overlay.png"), "photo", "out_overlay.png"),
    ("the overlay is another photo", lambda: shutil.copy("photo.png", "out_overlay.png"), "photo",
     "out_overlay.png is in the way, and not ours to replace: choose another --out"),
]


# --- checkpoints -------------------------------------------------------------------------------

CLS, SEG = "run/cls.pt", "run/seg.pt"
FIELDS = "kind config args model optimizer classes ids labels".split()


def reshape(checkpoint):
    name, weight = next(iter(checkpoint["model"].items()))
    checkpoint["model"][name] = weight.flatten()[:1]


def save_vit(without=None, **options):
    """a.pth: weights of a vit_toy_linear of other sizes."""
    state = timm.create_model("vit_toy_linear", **options).state_dict()
    torch.save({name: weight for name, weight in state.items()
                if not (without and name.startswith(without))}, "a.pth")


def save_resnet(stages, without="nothing"):
    """a.pth: the first stages of resnet_toy."""
    state = timm.create_model("resnet_toy").state_dict()
    torch.save({name: weight for name, weight in state.items() if without not in name
                and int("0" + name[5:6] * name.startswith("layer")) <= stages}, "a.pth")


CHECKPOINTS = [
    *((f"cls.pt without {field}", partial(drop, CLS, field), "pseudo",
       "run/cls.pt .*(run train_cls.py|train anew)") for field in [*FIELDS, "epoch"]),
    *((f"seg.pt without {field}", partial(drop, SEG, field), "seg --resume",
       "run/seg.pt .*(run train_seg.py|train anew|--overwrite)")
      for field in [*FIELDS, "step", "masks"]),
    ("cls.pt without epoch, stage 1", lambda: drop(CLS, "epoch"), "cls --resume",
     "run/cls.pt .*(run train_cls.py|train anew|--overwrite)"),
    *((f"cls.pt without the argument {name}", partial(drop, CLS, "args", name), "pseudo",
       "run/cls.pt .*(run train_cls.py|train anew)") for name in ("size", "epochs", "seed")),
    ("seg.pt without its seed", lambda: drop(SEG, "args", "seed"), "eval",
     "run/seg.pt .*(run train_seg.py|train anew)"),
    ("cls.pt without a weight", lambda: drop(CLS, "model", "classifier.weight"), "pseudo",
     "run/cls.pt does not fit .*: train anew"),
    ("cls.pt of other shapes", lambda: edit(CLS, reshape), "pseudo",
     "run/cls.pt does not fit .*: train anew"),
    ("seg.pt of other shapes", lambda: edit(SEG, reshape), "eval",
     "run/seg.pt does not fit .*: train anew"),
    ("cls.pt of another version", lambda: edit(CLS, lambda c: c["config"].update(heads=3)),
     "pseudo", "run/cls.pt is of another version .*: train anew"),
    ("cls.pt of an unknown backbone", lambda: edit(CLS, lambda c: c["config"].update(
        backbone="vit_gone")), "pseudo", "vit_gone"),
    ("weights that are none", lambda: edit(CLS, lambda c: c.update(model=None)), "pseudo",
     "run/cls.pt .*train"),
    ("an optimiser that is none", lambda: edit(CLS, lambda c: c.update(optimizer=None)),
     "cls --resume", "run/cls.pt .*train"),
    ("arguments that are none", lambda: edit(SEG, lambda c: c.update(args=None)), "seg --resume",
     "run/seg.pt .*train"),
    ("seg.pt as cls.pt", lambda: shutil.copy(SEG, CLS), "pseudo",
     "run/cls.pt is no cls checkpoint but seg.*: run train_cls.py"),
    ("cls.pt as seg.pt", lambda: shutil.copy(CLS, SEG), "eval",
     "run/seg.pt is no seg checkpoint but cls.*: run train_seg.py"),
    ("half of cls.pt", lambda: cut(CLS), "pseudo", "run/cls.pt is not a readable checkpoint"),
    ("half of cls.pt, stage 1", lambda: cut(CLS), "cls --resume", "run/cls.pt is not a readable"),
    ("half of seg.pt", lambda: cut(SEG), "eval", "run/seg.pt is not a readable .*train_seg.py"),
    ("half of seg.pt, a photo", lambda: cut(SEG), "photo", "run/seg.pt is not a readable"),
    ("an empty cls.pt", lambda: cut(CLS, 0), "pseudo", "run/cls.pt is not a readable"),
    ("text as cls.pt", lambda: text(CLS, "weights"), "pseudo", "run/cls.pt is not a readable"),
    ("a list as cls.pt", lambda: edit(CLS, lambda _: [1, 2]), "pseudo", "run/cls.pt is not a read"),
    ("a tensor as cls.pt", lambda: edit(CLS, lambda _: torch.ones(2)), "pseudo", "run/cls.pt is n"),
    ("code in cls.pt", lambda: torch.save({"kind": Payload()}, CLS), "pseudo",
     "run/cls.pt is not a readable checkpoint .*: run train_cls.py"),
    ("no cls.pt", lambda: os.remove(CLS), "pseudo", "run/cls.pt not found: run train_cls.py first"),
    ("no seg.pt", lambda: os.remove(SEG), "eval", "run/seg.pt not found: run train_seg.py first"),
    ("NaN weights, stage 1", lambda: (fill(CLS, math.nan), rewind(CLS, "epoch")), "cls --resume",
     "loss nan or weights .*not finite in epoch 1: lower --lr; run/cls.pt (is left|stays)"),
    ("NaN weights, stage 3", lambda: (fill(SEG, math.nan), rewind(SEG, "step")), "seg --resume",
     "loss nan or weights .*not finite .*: lower --lr; run/seg.pt (is left|stays)"),
    ("NaN weights, stage 2", lambda: fill(CLS, math.nan), "pseudo --overwrite",
     "run/cls.pt gives numbers that are not finite: train it again"),
    ("NaN weights, stage 4", lambda: fill(SEG, math.nan), "eval", "DeepLabv2 gives numbers that"),
    ("infinite weights, a photo", lambda: fill(SEG, math.inf), "photo", "DeepLabv2 gives numbers"),
    ("a finished cls.pt", lambda: None, "cls", "run/cls.pt exists: --resume goes on, --overwrite"),
    ("a finished seg.pt", lambda: None, "seg", "run/seg.pt exists: --resume goes on, --overwrite"),
    ("other flags, stage 1", lambda: None, "cls --resume --pool max",
     "run/cls.pt was made with --pool topk, now it is max: "),
    ("other flags, stage 3", lambda: None, "seg --resume --scales 1 0.75",
     r"run/seg.pt was made with --scales \[1.0\], now it is \[1.0, 0.75\]: "),
    ("other masks, stage 3", lambda: replace("run/pseudo/settings.json", '"size": 48', '"size": 9'),
     "seg --resume", "run/seg.pt was made with other masks: "),
    ("no such weights", lambda: None, "cls --run new --weights none",
     "none not found: --weights takes a local copy"),
    ("weights that are a folder", lambda: None, "cls --run new --weights data",
     "data is a folder: --weights takes a local copy"),
    *((f"weights that are {what}", partial(write, "a.bin"), "cls --run new --weights a.bin",
       f"no weights for vit_toy from a.bin: it is {words}") for what, write, words in (
          ("a web page", partial(text, lines="<!DOCTYPE html>"), "a web page: download the file"),
          ("a pointer", partial(text, lines="version https://git-lfs.github.com/spec/v1"),
           "a pointer of Git LFS"),
          ("empty", partial(text, lines=""), "empty: copy it again"),
          ("JSON", partial(text, lines='{"error": 404}'), "text .JSON., not weights"),
          ("packed", lambda path: Path(path).write_bytes(b"\x1f\x8b" + bytes(99)), "an archive"),
          ("without their ending", lambda path: save_file({"a": torch.ones(1)}, path),
           "a safetensors file: give its name the ending .safetensors"),
          ("cls.pt", partial(shutil.copy, CLS), "a checkpoint of train_cls.py"),
          ("seg.pt", partial(shutil.copy, SEG), "a checkpoint of train_seg.py"))),
    *((f"weights {how}", partial(save_vit, **options),
       "cls --run new --backbone vit_toy_linear --weights a.pth",
       f"no weights for vit_toy_linear from a.pth .*{words}.*: --weights takes the file of vit_t")
      for how, options, words in (
          ("of less blocks", dict(depth=3), "another depth or kind: it has no blocks.3"),
          ("of more blocks", dict(depth=5), "another depth or kind: it has blocks.4"),
          ("without one block", dict(without="blocks.1."), "depth or kind: it has no blocks.1"),
          ("of another width", dict(embed_dim=64), r"cls_token is \[1, 1, 64\], here it is"))),
    ("weights of another kind of ViT", partial(save_vit, init_values=1.0),
     "cls --run new --backbone vit_toy_linear --weights a.pth",
     "no weights for vit_toy_linear from a.pth .*depth or kind: it has blocks.0.ls1.gamma, which"),
    ("weights without the statistics of batch norms", lambda: save_resnet(9, "running_var"),
     "seg --overwrite --weights a.pth", "resnet_toy from a.pth .*kind: it has no .*running_var"),
    ("weights of a shallower CNN", lambda: save_resnet(3), "seg --overwrite --weights a.pth",
     "no weights for resnet_toy from a.pth .*another depth or kind: it has no layer4"),
    ("weights of another network", lambda: torch.save({"a": torch.ones(1)}, "a.pth"),
     "cls --run new --weights a.pth", "no weights for vit_toy from a.pth .*: --weights tak"),
    ("weights of nothing, which timm lets pass", lambda: torch.save({"a": torch.ones(1)}, "a.pth"),
     "cls --run new --backbone vit_tiny_patch16_224 --size 64 --weights a.pth",
     "no weights for vit_tiny_patch16_224 from a.pth .*150 of its weights.*: --weights takes the "
     "file of timm/vit_tiny_patch16_224"),
    ("a CNN for a ViT", lambda: None, "cls --run new --backbone resnet_toy",
     "--backbone resnet_toy does not fit this stage, which needs a plain ViT"),
    ("a transformer of windows", lambda: None,
     "cls --run new --backbone swin_tiny_patch4_window7_224", "swin_.* does not fit this stage"),
    ("a ViT for a CNN", lambda: None, "seg --overwrite --backbone vit_toy",
     "--backbone vit_toy does not fit this stage, which needs a CNN"),
    *[("no Apple GPU", lambda: None, "cls --run new --device mps",
       "--device mps: this machine or this torch has no Apple GPU")
      for _ in range(not torch.backends.mps.is_available())],
    ("windows of broken patches", lambda: None, "pseudo --overwrite --window 20",
     "--window 20 and --stride 8: take multiples of 8"),
    ("windows with gaps between them", lambda: None, "eval --window 32 --stride 40",
     "--window 32 and --stride 40: .* a stride of at most the window"),
    ("a backbone that is none", lambda: None, "cls --run new --backbone vit_huge_toy",
     "timm has no model 'vit_huge_toy'"),
    ("tokens that nothing reads", lambda: None,
     "cls --run new --class-tokens append --context none", "--class-tokens append needs --cont"),
    ("a size that patches do not divide, stage 1", lambda: None, "cls --run new --size 50",
     "--size 50 is no multiple of the 8 pixels of a patch"),
    ("a lattice too fine", lambda: None,
     "pseudo --overwrite --crf torch --crf-sxy 0.001 --crf-srgb 0.001", "--crf-s.* too small"),
]
ROWS = FOLDER + FILES + CHECKPOINTS


@pytest.mark.parametrize("spoil, line, words", [pytest.param(*row, id=name) for name, *row in ROWS])
def test_a_mistake_is_told_in_one_line_and_changes_nothing(place, capsys, spoil, line, words):
    spoil()
    told = refusal(line, capsys)
    assert re.search(words, told), told
    assert not Path("marker").exists() and not [*Path().rglob("*.tmp")]


FLAGS = {
    "cls": ["--lr -1", "--lr nan", "--lr inf", "--lr 0", "--late-lr -1", "--late-lr nan",
            "--dropout 1.0", "--dropout 1.5", "--dropout -0.1", "--dropout nan", "--seed -1",
            f"--seed {2**63}", "--workers -1", "--train-blocks -1", "--frozen-epochs -1",
            "--epochs 0", "--batch-size 0", "--size 0", "--size 48.5", "--top-k 0", "--pool median",
            "--augment mirror", "--preset imagenet"],
    "pseudo": ["--size 0", "--size -8", "--size-ratio 0", "--size-ratio nan", "--workers -2",
               "--crf-iterations nan", "--crf-iterations -1", "--crf-sxy nan", "--crf-sxy 0",
               "--crf-srgb -3", "--crf-srgb=-inf", "--crf-compat nan", "--crf-compat -1",
               "--crf magic"],
    "seg": ["--lr nan", "--lr=-inf", "--aspp-lr -1", "--aspp-lr nan", "--rescale 1.5 0.5",
            "--rescale 0 1", "--rescale nan 1", "--rescale 1", "--scales 0", "--scales 1 -0.5",
            "--scales nan", "--val-images -1", "--iterations 0", "--save-every 0", "--crop 0",
            "--seed -1", f"--seed {2**63}", "--workers -1"],
    "eval": ["--workers -1", "--crf-iterations nan", "--crf-compat inf", "--crf-sxy -1",
             "--export --masks run/bpm"],
    "photo": ["--out out.jpg", "--out photo.png", "--export"]}


@pytest.mark.parametrize("line", [f"{name} {flag}" for name in FLAGS for flag in FLAGS[name]])
def test_a_flag_that_cannot_be_is_named_and_nothing_starts(place, capsys, line):
    told = refusal(line, capsys)
    assert line.split()[1].split("=")[0] in told and "error: " in told


def test_pydensecrf_that_is_not_installed(place, capsys, monkeypatch):
    monkeypatch.setattr("support.crf.densecrf", None)
    told = refusal("pseudo --crf pydensecrf --overwrite", capsys)
    assert "pydensecrf is not installed: --crf torch gives the same labels" in told


# --- files with code in them -------------------------------------------------------------------

def raw_pickle(path):
    import pickle
    Path(path).write_bytes(pickle.dumps({"weight": Payload()}))


SAVERS = {"zip.pth": lambda path: torch.save({"weight": Payload()}, path),
          "old.bin": lambda path: torch.save({"weight": Payload()}, path,
                                             _use_new_zipfile_serialization=False),
          "raw.pkl": raw_pickle, "raw.safetensors": raw_pickle,
          "array.npz": lambda path: np.savez(path, weight=np.array([Payload()], object))}


@pytest.mark.parametrize("line", ["cls --run new", "seg --overwrite"])
@pytest.mark.parametrize("name", SAVERS)
def test_weights_with_code_in_them_do_not_run_it(place, capsys, name, line):
    SAVERS[name](name)
    told = refusal(f"{line} --weights {name}", capsys)
    assert re.search(f"no weights for .*_toy from {name} .*: --weights takes the file", told), told
    assert not Path("marker").exists()


# --- a full disk -------------------------------------------------------------------------------

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["cls", "seg"])
@pytest.mark.parametrize("error", [NO_SPACE, RuntimeError(  # as torch tells it, from C++
    "[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0\nframe #0: c10::Throw")],
    ids=["OSError", "RuntimeError"])
def test_a_full_disk_leaves_the_old_checkpoint(place, capsys, monkeypatch, name, error):
    def save(_, path):
        Path(path).write_bytes(b"the first bytes")
        raise error
    monkeypatch.setattr(torch, "save", save)
    told = refusal(f"{name} --overwrite", capsys)
    assert f"run/{name}.pt cannot be written (is the disk full?)" in told, told
    assert not [*Path().rglob("*.tmp")]


@pytest.mark.parametrize("name", ["cls", "seg"])
def test_a_file_that_may_not_grow_leaves_the_old_checkpoint(place, capsys, name):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # torch's own writer fails
    try:
        told = refusal(f"{name} --overwrite", capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"run/{name}.pt cannot be written (is the disk full?)" in told, told
    assert not [*Path().rglob("*.tmp")]


@pytest.mark.parametrize("line, path", [("pseudo", BPM), ("eval", PRED), ("photo", "out.png")])
def test_a_full_disk_while_masks_are_written_names_one(place, capsys, monkeypatch, line, path):
    def save(_, path, **__):
        Path(path).write_bytes(b"the first bytes")
        raise NO_SPACE
    for mask in (BPM, PRED):
        os.remove(mask)
    monkeypatch.setattr(Image.Image, "save", save)
    told = refusal(line, capsys)
    assert "No space left on device" in told and path in told, told
    assert not [*Path().rglob("*.tmp")]


@pytest.mark.parametrize("line", ["cls --epochs 2 --overwrite", "seg --lr 0.01 --overwrite",
                                  "pseudo"])
def test_a_full_disk_while_the_log_is_written_names_it(place, capsys, monkeypatch, line):
    before, write_text = Path("run/log.jsonl").read_text(), Path.write_text
    kept = contents()

    def write(path, text, **options):
        if "log.jsonl" in path.name:
            raise NO_SPACE
        return write_text(path, text, **options)
    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(SystemExit, match="log.jsonl.*No space left on device"):
        call(line)
    assert Path("run/log.jsonl").read_text() == before
    changed = {path for path, content in contents().items() if kept.get(path) != content}
    assert changed == {"cls": {CLS}, "seg": {SEG}, "pseudo": set()}[line.split()[0]]  # was saved


# --- stage 2 and the masks that are there ------------------------------------------------------

@pytest.mark.parametrize("overwrite", ["", " --overwrite"])
@pytest.mark.parametrize("masks", ["no masks", "masks"])
def test_a_size_that_patches_do_not_divide_claims_nothing(place, capsys, masks, overwrite):
    expected = {path: Path(path).read_bytes() for path in (BPM, PSEUDO)}
    if masks == "no masks":
        shutil.rmtree("run/bpm")
        shutil.rmtree("run/pseudo")
    told = refusal(f"pseudo --size 97{overwrite}", capsys)
    if masks == "masks" and not overwrite:
        assert "run/bpm holds masks of other" in told
    else:
        assert "--size 97 is no multiple of the 8 pixels of a patch" in told
    call("pseudo")
    assert {path: Path(path).read_bytes() for path in expected} == expected


@pytest.mark.parametrize("path", [BPM, PSEUDO, "run/pred/test_00000.png"])
@pytest.mark.parametrize("damage", [cut, partial(cut, share=0), os.remove,
                                    lambda path: text(path, "no image")],
                         ids=["half", "empty", "gone", "text"])
def test_a_damaged_mask_is_made_anew(place, path, damage):
    before = contents()
    damage(path)
    call("eval" if "pred" in path else "pseudo")
    after = contents()
    assert all(after[path] == before[path] for path in before if path.endswith(".png")
               and "figure" not in path)


@pytest.mark.parametrize("line, leftover", [
    ("cls --overwrite", "run/.cls.pt.tmp"), ("seg --overwrite", "run/.seg.pt.tmp"),
    ("seg --overwrite", "run/.preset.txt.tmp"), ("pseudo", f"run/bpm/.{FIRST}.png.tmp"),
    ("pseudo", "run/pseudo/.settings.json.tmp"), ("eval", "run/pred/.test_00000.png.tmp"),
    ("eval", "run/.results.json.tmp"), ("eval", "run/.figure.png.tmp"), ("photo", ".out.png.tmp"),
    ("photo", ".out_overlay.png.tmp")])
def test_what_a_killed_save_left_disappears_with_the_next_run(place, line, leftover):
    leftover = Path(leftover)
    leftover.write_bytes(b"half a file")
    whole = leftover.with_name(leftover.name[1:].removesuffix(".tmp"))
    if whole.suffix == ".png":  # no mask there: the kill came before it was whole
        whole.unlink(missing_ok=True)
    call(line)
    assert whole.is_file() and not [*Path().rglob("*.tmp")]


# --- Ctrl-C and SIGKILL ------------------------------------------------------------------------

@pytest.mark.parametrize("line, where", [
    ("cls --overwrite", "train_cls.batches"), ("pseudo --overwrite", "make_pseudo.present_probs"),
    ("seg --overwrite", "train_seg.batches"), ("eval --crf torch", "evaluate.predict_logits")])
def test_ctrl_c_is_one_line_and_exit_130(place, capsys, monkeypatch, line, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)
    before = contents()
    monkeypatch.setattr(where, interrupt)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        call(line)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: what is written stays\n"
    assert contents() == before


def still_runs(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize("late", [0, 2])  # seconds that a worker needs to start
def test_workers_end_with_the_process_that_is_killed(late):
    code = f"""
import multiprocessing, os, signal, time, numpy
from support import run
start = run.ignore_interrupts
run.ignore_interrupts = lambda worker: (time.sleep({late}), start(worker))
results = run.in_workers(numpy.zeros, [(10**5,)] * 99, 2)  # arrays fill the pipe nobody reads
{late} or next(results)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as killed:
        workers = [int(pid) for pid in killed.stdout.readline().split()]
    deadline = time.time() + 60  # a DataLoader's workers look for their parent every five seconds
    while any(map(still_runs, workers)) and time.time() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if still_runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left


# --- odd, but right ----------------------------------------------------------------------------

def add_mark(path):
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())


def windows_lines(path):
    Path(path).write_bytes(Path(path).read_bytes().replace(b"\n", b"\r\n"))


def blank_lines(path):
    Path(path).write_bytes(b"\n" + Path(path).read_bytes().replace(b"\n", b" \n\n"))


@pytest.mark.parametrize("change", [add_mark, windows_lines, blank_lines])
@pytest.mark.parametrize("path", [CLASSES, LABELS, TRAIN, TEST, "data/preset.txt",
                                  "data/Parts/names.txt", "run/pseudo/settings.json",
                                  "run/pred/settings.json"])
def test_text_as_windows_writes_it_means_the_same(place, monkeypatch, path, change):
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: None)
    before = contents()
    change(path)
    for line in ("cls --resume", "pseudo", "seg --resume", "eval"):
        call(line)
    after = contents()
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {path} and after.keys() == before.keys()


def become_size(image_id, width, height):
    """The image, its truth and its parts, cut to a few pixels."""
    for path in (image_of(image_id), truth_of(image_id), f"data/Parts/{image_id}.png"):
        with Image.open(path) as image:
            small = image.crop((40, 40, 40 + width, 40 + height))
        small.save(path)


@pytest.mark.parametrize("width, height", [(1, 1), (1, 9), (9, 1)])
def test_an_image_of_one_pixel_a_side_goes_through_all_stages(place, width, height):
    for image_id in (FIRST, "val_00000", "test_00000"):
        become_size(image_id, width, height)
    for line in ("cls --overwrite", "pseudo --overwrite", "seg --overwrite", "eval"):
        call(line)
    for path in (BPM, PSEUDO, "run/pred/test_00000.png"):
        assert data.read_mask(path, 9).shape == (height, width)
    picture("photo.png", (width, height))
    call("photo --crf torch")
    assert data.read_mask("out.png", 9).shape == (height, width)


def test_truth_that_is_ignored_everywhere_scores_null(place):
    for image_id in ("test_00000", "test_00001"):
        picture(truth_of(image_id), mode="L", color=255)
    call("eval")
    results = json.loads(Path("run/results.json").read_text(), parse_constant=pytest.fail)
    assert results["miou"] is None and set(results["iou"].values()) == {None}
    assert results["num_images"] == 2 and not np.any(results["confusion"])


def test_what_is_not_scored_is_not_told_as_zero(place, capsys):
    for image_id in ("test_00000", "test_00001"):
        picture(truth_of(image_id), mode="L", color=255)
    call("masks --masks run/pred --split test")
    assert "mIoU 0.00" not in capsys.readouterr().out
    assert json.loads(Path("run/pred/results.json").read_text())["pixel_accuracy"] is None


def test_truth_of_some_images_scores_those(place):
    os.remove(TRUTH)
    call("eval")
    assert json.loads(Path("run/results.json").read_text())["num_images"] == 1


def test_255_classes_are_not_too_many(place):
    text(CLASSES, "background", *range(254))
    assert len(data.Folder("data").classes) == 255


def test_scoring_the_truth_writes_nothing_there(place, capsys):
    before = contents()
    for split in ("train", "val"):
        call(f"masks --masks data/SegmentationClass --split {split}")
    assert "mIoU 100.00 %" in capsys.readouterr().out
    assert contents() == before


def test_photos_are_read_upright_everywhere(place, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright the picture is 40 wide and 60 high
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20] = 250  # stored at the left, seen at the top
    for path in (IMAGE, "photo.jpg"):
        Image.fromarray(pixels).save(path, exif=exif, quality=100)
    read = data.Images(data.Folder("data"), [FIRST], 48)[0][1]
    assert read.shape == (60, 40, 3) and read[:15].min() > 200 and read[25:].max() < 50
    assert np.array_equal(read, np.array(data.read_image("photo.jpg")))
    call("photo --image photo.jpg")
    assert data.read_mask("out.png", 9).shape == (60, 40)
    for path, line in ((PSEUDO, "seg --overwrite"), (truth_of(FIRST), "masks")):
        if path != PSEUDO:
            picture(PSEUDO, (40, 60), "L")
        picture(path, (60, 40), "L")  # drawn on the picture as it is stored
        told = refusal(line, capsys)
        assert f"{path} is 60x40, its image 40x60: is the photo turned by its EXIF" in told, told


@pytest.mark.parametrize("ending", [".jpeg", ".png"])
def test_images_of_other_endings_go_through_all_stages(place, ending):
    for path in sorted(Path("data/JPEGImages").iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(ending))
        path.unlink()
    for line in ("cls --overwrite", "pseudo --overwrite", "seg --overwrite", "eval"):
        call(line)
    assert len([*Path("run/pred").glob("*.png")]) == 2


@pytest.mark.parametrize("turned", [False, True])
def test_sixteen_bits_are_scaled_not_white(tmp_path, turned):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    grey = np.tile(np.array([0, 257 * 100, 257 * 200, 65535], np.uint16), (2, 1))
    Image.fromarray(grey).save(tmp_path / "a.png", exif=exif)
    read = np.array(data.read_image(tmp_path / "a.png"))
    assert np.array_equal(read[..., 1].T if turned else read[..., 1], [[0, 100, 200, 255]] * 2)


# --- scores that are not what they seem ---------------------------------------------------------

def renumber(change, split="train"):
    """Every truth of a split, changed as an array."""
    for image_id in Path(f"data/ImageSets/Segmentation/{split}.txt").read_text().split():
        data.save_mask(Path(truth_of(image_id)), change(data.read_mask(truth_of(image_id), 9)))


def restarted(mask):
    """Numbers that begin at 1 in every image, as instances have them."""
    values = [v for v in np.unique(mask) if v not in (0, 255)]
    return np.select([mask == v for v in values], range(1, len(values) + 1), mask.astype(int))


TRUTHS = {"restarted": (restarted, "a class that their line in image_labels.txt does not name"),
          "less by one": (lambda m: np.where((m > 0) & (m < 255), m - 1, m), "does not name"),
          "turned": (lambda m: np.where((m > 0) & (m < 255), 9 - m, m), "numbered as in class"),
          "0 and 1": (lambda m: np.where((m > 0) & (m < 255), 1, m), "lack one that it names"),
          "0 and 255": (lambda m: np.where(m > 0, 255, 0), "no class but background occurs"),
          "background": (lambda m: 0 * m, "no class but background occurs in data/Seg")}


@pytest.mark.parametrize("line, split, kind", [
    *(("masks", "train", kind) for kind in TRUTHS), ("pseudo", "train", "restarted"),
    ("eval", "test", "0 and 255"), ("seg --overwrite", "val", "less by one")])
def test_truth_that_is_numbered_otherwise_is_told(place, capsys, line, split, kind):
    change, words = TRUTHS[kind]
    call(line)
    assert "note:" not in capsys.readouterr().out
    renumber(change, split)
    call(line)
    assert re.search(f"note: .*{words}", capsys.readouterr().out)


def test_what_a_score_is_over_is_said_and_noted(place, capsys):
    renumber(lambda mask: np.where(mask > 0, 255, 0), "test")
    data.save_mask(Path(PRED), np.full((96, 96), 255))
    call("masks --masks run/pred --split test")
    scored = int((data.read_mask(TRUTH, 9) == 0).sum())
    both = scored + int((data.read_mask(truth_of("test_00001"), 9) == 0).sum())
    assert f"(2 images, 1 of 9 classes)" in (told := capsys.readouterr().out)
    share = f"{100 * scored / both:.1f} % of pixels"
    assert f"truth 255 left out, predicted 255 a miss ({share})" in told
    results = json.loads(Path("run/pred/results.json").read_text())
    assert (results["num_images"], results["classes_scored"]) == (2, 1)
    assert (results["compared"], results["unnamed"], results["lacking"]) == (2, 0, 2)


def test_honest_background_has_no_note_and_unknown_labels_have_one(place, capsys):
    renumber(lambda mask: 0 * mask, "test")
    lines = [line for line in Path(LABELS).read_text().splitlines() if not line.startswith("test")]
    text(LABELS, *lines, "test_00000 background", "test_00001 background")
    call("masks --masks run/pred --split test")
    assert "note:" not in capsys.readouterr().out
    text(LABELS, *lines)
    for change, words in ((lambda m: 0 * m + 1, "has none of the 2 images: truth and labels"),
                          (lambda m: 0 * m, "no class but background occurs")):
        renumber(change, "test")
        call("masks --masks run/pred --split test")
        assert f"{words}" in capsys.readouterr().out


@pytest.mark.parametrize("line, split", [("masks", "train"), ("eval", "test"), ("pseudo", "train")])
def test_a_score_over_part_of_a_split_says_what_is_missing(place, capsys, line, split):
    path = Path(truth_of(f"{split}_00001"))
    path.rename(path.with_suffix(".tif"))
    call(line)
    told = capsys.readouterr().out
    assert re.search(rf"note: 1 of \d images are not scored: .*has no {split}_00001.png", told)


def test_val_without_some_truth_counts_what_it_scores(place, capsys):
    os.remove("data/SegmentationClass/val_00001.png")
    call("seg --overwrite")
    told = capsys.readouterr().out
    assert "val_images 1 " in told and "note: 1 of 2 images are not scored" in told


def test_an_image_whose_name_ends_like_a_file_is_itself(place):
    os.rename(IMAGE, "data/JPEGImages/a.png.jpg")
    replace(LABELS, f"{FIRST} ", "a.png ")
    replace(TRAIN, f"{FIRST}\n", "a.png\n")
    folder = data.Folder("data")
    assert folder.ids("train")[0] == "a.png" and folder.image_labels("a.png").sum() > 1


def test_images_of_train_and_val_are_counted(place, capsys):
    add_line("data/ImageSets/Segmentation/val.txt", FIRST)
    for line in ("cls --overwrite", "seg --overwrite"):
        call(line)
        assert "note: 1 of 3 images of val are trained on as well" in capsys.readouterr().out


# --- the field's own ways -----------------------------------------------------------------------

def test_lists_in_two_columns_and_endings_in_capitals_mean_the_same(place):
    before = contents()
    for split in ("train", "val", "test"):
        path = Path(f"data/ImageSets/Segmentation/{split}.txt")
        first, *ids = path.read_text().split()
        text(path, f"/JPEGImages/{first}.jpg /SegmentationClassAug/{first}.png",
             *(f"{image_id}.jpg" for image_id in ids))
    for path in [*Path("data/JPEGImages").iterdir(), *Path("data/SegmentationClass").iterdir()]:
        path.rename(path.with_suffix(path.suffix.upper()))
    for line in ("cls --resume", "pseudo", "seg --resume", "eval"):
        call(line)
    after = contents()
    assert all(after[path] == before[path] for path in before if path.startswith("run"))


def test_the_fields_name_of_trainaug_is_taken(place, capsys):
    text("data/preset.txt", "voc")
    os.rename(TRAIN, "data/ImageSets/Segmentation/train_aug.txt")
    assert train_cls.parse_args(["--data", "data", "--run", "x"]).train_split == "train_aug"
    assert make_pseudo.parse_args(["--data", "data", "--run", "x"]).split == "train_aug"
    text(TRAIN, FIRST)
    text("data/ImageSets/Segmentation/trainaug.txt", FIRST)
    assert train_cls.parse_args(["--data", "data", "--run", "x"]).train_split == "trainaug"


# --- two runs, torchrun's variables, memory, files ----------------------------------------------

WRITES = ["cls --resume", "pseudo", "seg --resume", "eval"]


@pytest.mark.parametrize("line", WRITES)
def test_the_second_run_in_a_folder_waits(place, capsys, line):
    Path("run/.lock").unlink(missing_ok=True)
    run.HELD.clear()  # what this process holds from the rows before
    code = """
import sys, time
from pathlib import Path
from support.run import open_run
open_run(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-c", code, str(place / "run")], cwd=ROOT,
                          stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        told = refusal(line, capsys)
        assert re.search(rf"--run run is in use by process {first.pid} on .*: wait for it", told)
        first.kill()
    call(line)  # the lock of the dead is taken over
    assert str(os.getpid()) in Path("run/.lock").read_text()


HALF = [{"RANK": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1"),
        dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="abc"),
        dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="", MASTER_PORT="29500"),
        dict(RANK="-1", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")]


@pytest.mark.parametrize("line, variables", [*((line, HALF[0]) for line in WRITES),
                                             *(("cls", variables) for variables in HALF[1:])],
                         ids=str)
def test_torchruns_variables_are_read_as_a_set(place, capsys, monkeypatch, line, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = refusal(line, capsys)
    assert re.search(r"the environment has .*which is not what torchrun sets .*: unset it", told)


LACKS = {  # as Python, torch and a DataLoader's worker tell it
    "GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
    "CPU": (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                         "allocate memory: you tried to allocate 1 bytes."), "memory"),
    "Python": (MemoryError(), "memory"),
    "fork": (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory"),
    "worker": (MemoryError("Caught MemoryError in DataLoader worker process 0.\nTrace"), "memory"),
    "array": (RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0."), "memory"),
    "files": (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "files"),
    "shared": (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space"),
               "shared"),
    "handles": (RuntimeError("received 0 items of ancdata: Too many open files"), "files")}


@pytest.mark.parametrize("line, where, kind", [
    *(("cls --overwrite", "train_cls.batches", kind) for kind in LACKS),
    ("pseudo --overwrite", "make_pseudo.present_probs", "worker"),
    ("seg --overwrite", "train_seg.batches", "GPU"),
    ("eval --crf torch", "evaluate.predict_logits", "CPU")])
def test_too_little_of_something_is_one_line(place, capsys, monkeypatch, line, where, kind):
    error, lack = LACKS[kind]

    def fail(*_, **__):
        raise error
    monkeypatch.setattr(where, fail)
    told = refusal(line, capsys)
    lower = {"cls": "--batch-size, --size, --workers", "seg": "--batch-size, --crop, --workers",
             "pseudo": "--batch-size, --size, --window, --workers", "eval": "--window, --workers"}
    assert told == "error: " + {
        "memory": f"out of memory: lower {lower[line.split()[0]]}",
        "files": "too many open files: lower --workers, or raise the limit, as with ulimit -n 4096",
        "shared": "no space left: on the disk, or in shared memory (/dev/shm), which takes less "
                  "with fewer --workers, and in a container more with --shm-size"}[lack]


@pytest.mark.parametrize("where, line", [("data.Image.open", "cls --overwrite"),
                                         ("support.run.torch.load", "pseudo")])
def test_too_little_memory_is_not_told_as_a_damaged_file(place, capsys, monkeypatch, where, line):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(where, fail)
    assert "too many open files: lower --workers" in refusal(line, capsys)


def test_an_error_that_is_ours_keeps_its_traceback(place, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr("train_cls.batches", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        call("cls --overwrite")


# --- saved first, scored later ------------------------------------------------------------------

def test_an_epoch_is_saved_before_val_is_read(place, capsys):
    whole = Path("data/JPEGImages/val_00001.jpg").read_bytes()
    cut("data/JPEGImages/val_00001.jpg")
    with pytest.raises(SystemExit, match="val_00001.jpg cannot be read"):
        call("cls --run new --epochs 2")
    assert torch.load("new/cls.pt", weights_only=True)["epoch"] == 1
    assert json.loads(Path("new/log.jsonl").read_text())["loss"] > 0  # what is known is logged
    Path("data/JPEGImages/val_00001.jpg").write_bytes(whole)
    capsys.readouterr()
    call("cls --run new --epochs 2 --resume")
    assert "going on from new/cls.pt (1 of 2)" in capsys.readouterr().out
    assert torch.load("new/cls.pt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize("line, path, name", [("cls", CLS, "epoch"), ("seg", SEG, "step")])
def test_a_loss_that_is_not_finite_does_not_wait_for_a_save(place, capsys, monkeypatch, line, path,
                                                            name):
    fill(path, math.nan)
    rewind(path, name)
    monkeypatch.setattr(run, "LOOK", 1)
    assert f"loss not finite by step 1: lower --lr; {path} stays" in refusal(
        f"{line} --resume", capsys)


@pytest.mark.parametrize("line, path", [("cls --resume", CLS), ("seg --resume", SEG)])
def test_a_finished_run_says_so(place, capsys, line, path):
    before = contents()
    call(line)
    assert f"{path} is finished: nothing to do" in capsys.readouterr().out
    assert contents() == before


def test_stage_2_goes_on_where_the_data_moved(place, capsys):
    before = Path(PSEUDO).read_bytes()
    os.remove(f"run/pseudo/{FIRST}.png")
    os.rename("data", "moved")
    call("pseudo --data moved")
    assert "1 of 8 images were still to do" in capsys.readouterr().out
    assert Path(PSEUDO).read_bytes() == before
    shutil.copytree("moved", "copy")  # where both are there, nobody knows which was meant
    assert "run/bpm holds masks of other data" in refusal("pseudo --data copy", capsys)
    call("seg --data moved --resume")


# --- names -------------------------------------------------------------------------------------

def test_names_with_dollars_and_names_that_a_console_cannot_show(place):
    for path in (CLASSES, LABELS):
        replace(path, "checks_red", "$k\u00e4fer_$\\frac{")
    shutil.rmtree("run")
    for line in ("cls", "pseudo", "seg"):
        call(line)
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *CALLS["eval"][1].split()], cwd=place,
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "$k\\xe4fer_$" in done.stdout
    assert "$k\u00e4fer_$\\frac{" in json.loads(Path("run/results.json").read_text())["iou"]
    assert Path("run/figure.png").is_file()


# --- a thousand damaged files ------------------------------------------------------------------

def specimens():
    """{name: (image, options of save)} of small files: photos turned and not, masks, 16 bits."""
    pixels = np.array(Image.fromarray(beetles.toy_scene(0, 0)[0]).resize((40, 30)))
    mask = beetles.toy_scene(0, 0)[1][30:60, 30:70]
    exif = Image.Exif()  # orientation, maker, date, resolution, latitude: every kind of number
    exif.update({0x0112: 6, 0x010F: "maker", 0x0132: "2024:01:01 00:00:00", 0x011A: 72.0})
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    palette = Image.fromarray(mask)
    palette.putpalette(data.voc_palette().tobytes())
    return {"a.jpg": (Image.fromarray(pixels), dict(exif=exif)),
            "b.jpg": (Image.fromarray(pixels).convert("L"), dict(progressive=True)),
            "c.png": (Image.fromarray(pixels), dict(exif=exif)), "d.png": (palette, {}),
            "e.png": (Image.fromarray(mask), {}),
            "f.png": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {})}


def damaged(content, rng):
    """A file's bytes after one to three accidents: flipped, cut, inserted, doubled."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(max(1, len(content)))
        kind = rng.choice(("flip", "head", "cut", "insert", "double"))
        if kind == "cut":
            del content[place:]
        elif kind == "insert":
            content[place:place] = rng.randbytes(rng.randint(1, 9))
        elif kind == "double":  # a PNG's chunk, or as many bytes of a JPEG
            starts = [m.start() - 4 for m in re.finditer(b"IHDR|PLTE|IDAT|eXIf|IEND", content)]
            start = max(0, rng.choice(starts or [place]))
            length = 12 + int.from_bytes(content[start:start + 4], "big") % 4096
            content[start:start] = content[start:start + length]
        elif kind == "head":  # where the formats keep their facts, EXIF among them
            for _ in range(4 * bool(content)):
                content[rng.randrange(min(256, len(content)))] ^= 1 << rng.randrange(8)
        elif content:
            content[place] ^= 1 << rng.randrange(8)
    return bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of EXIF
def test_a_thousand_damaged_files_are_refused_or_read_right(tmp_path):
    whole = {}
    for name, (image, options) in specimens().items():
        image.save(tmp_path / name, **options)
        whole[name] = (tmp_path / name).read_bytes()
    outcomes = {"read": 0, "refused": 0}
    for seed in range(1000):
        rng = random.Random(seed)
        name = rng.choice(sorted(whole))
        path = tmp_path / f"{seed}{name}"
        path.write_bytes(damaged(whole[name], rng))
        try:
            image = data.read_image(path)
            assert image.mode == "RGB" and np.array(image).shape == (image.height, image.width, 3)
            outcomes["read"] += 1
        except DataError as error:
            assert path.name in str(error) and len(str(error).splitlines()) == 1
            outcomes["refused"] += 1
        for size in (None, (40, 30)):
            try:
                mask = data.read_mask(path, 9, size)
                assert mask.dtype == np.uint8 and mask.ndim == 2
                assert size in (None, mask.shape[::-1])
                assert set(np.unique(mask).tolist()) <= {*range(9), 255}
            except DataError as error:
                assert path.name in str(error) and len(str(error).splitlines()) == 1
        path.unlink()
    assert min(outcomes.values()) > 100, outcomes  # the damage is neither nothing nor everything
