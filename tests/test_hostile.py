"""Bad input, row by row: a refusal is one line that names the file, and what is written stays.

A row is what it is, what is done to a finished run, the call, and what its line must say. Every row
works on its own copy of that run, in the same place, and is told through launch(), as a person is.
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
from conftest import ROOT, call, command, contents, refusal
from datasets import beetles
from support import run
from support.run import DataError

FIRST = "train_00000"  # the image that rows damage; with test_00000 for stage 4


def image_of(image_id):
    return f"data/JPEGImages/{image_id}.jpg"


def truth_of(image_id):
    return f"data/SegmentationClass/{image_id}.png"


def split_of(name):
    return f"data/ImageSets/Segmentation/{name}.txt"


CLASSES, LABELS = "data/classes.txt", "data/image_labels.txt"
TRAIN, VAL, TEST = map(split_of, ("train", "val", "test"))
IMAGE, TEST_IMAGE, TRUTH = image_of(FIRST), image_of("test_00000"), truth_of("test_00000")
BPM, PSEUDO, PRED = f"run/bpm/{FIRST}.png", f"run/pseudo/{FIRST}.png", "run/pred/test_00000.png"
CLS, SEG = "run/cls.pt", "run/seg.pt"


# --- what rows do ------------------------------------------------------------------------------

def nothing():
    """The flags of the row are what is wrong."""


def text(path, *content, encoding="utf-8"):
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


def write(content, path):
    Path(path).write_bytes(content)


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

NO_UTF8 = "is no UTF-8 text: save it as UTF-8"
BLANK = "has a blank: a line is one ID, and no ID has blanks"
NO_FILE = split_of(r"\w+") + ", line 1: %s is no name of a file"

FOLDER = [
    ("256 classes", lambda: text(CLASSES, "background", *range(255)), "cls",
     f"{CLASSES} has 256 classes: a mask can hold 255"),
    ("a class twice", lambda: add_line(CLASSES, "checks_red"), "cls",
     f"{CLASSES}: 'checks_red' has a space, or is there twice"),
    ("a space in a class", lambda: add_line(CLASSES, "traffic light"), "cls",
     f"{CLASSES}: 'traffic light' has a space"),
    ("background last", lambda: text(CLASSES, *beetles.TOY_CLASSES[1:], "background"), "cls",
     f"{CLASSES} begins with 'vertical_red': class 0 is 'background'"),
    *((f"an empty {path}", partial(text, path), "cls", f"{path} is empty")
      for path in (CLASSES, LABELS, TRAIN)),
    *((f"Latin-1 in {path}", partial(text, path, "käfer", encoding="latin-1"), line,
       f"{path} {NO_UTF8}") for path, line in (
          (CLASSES, "cls"), (LABELS, "cls"), (TEST, "eval"), ("data/preset.txt", "cls"),
          ("data/Parts/names.txt", "eval"), ("run/pseudo/settings.json", "pseudo"))),
    ("classes in UTF-16", lambda: text(CLASSES, "background", encoding="utf-16"), "eval",
     f"{CLASSES} {NO_UTF8}"),
    ("an unknown preset", lambda: text("data/preset.txt", "imagenet"), "cls",
     "data/preset.txt.*'imagenet'.*voc, coco, toy, voc-small, photo"),
    *(("other classes", partial(add_line, CLASSES, "more"), line,
       f"(?=.*{CLASSES}).*has other classes") for line in ("pseudo", "eval")),
    *(("an id twice", partial(split_with, image_id), line, f"{path} lists {image_id} twice")
      for image_id, line, path in (("train_00003", "cls", TRAIN), ("test_00001", "eval", TEST))),
    ("two lines of labels", lambda: add_line(LABELS, f"{FIRST} checks_red"), "cls",
     f"{LABELS} has two lines for {FIRST}"),
    *(("no line of labels", partial(split_with, "stranger"), line,
       f"{LABELS}: no label for stranger: add 'stranger NAME ...'") for line in ("cls", "pseudo")),
    ("a line without a label", lambda: (add_line(LABELS, "stranger"), split_with("stranger")),
     "cls", f"{LABELS}: no label for stranger"),
    ("an unknown label", lambda: replace(LABELS, f"{FIRST} ", f"{FIRST} unicorn "), "cls",
     f"{LABELS}: {FIRST} has 'unicorn', which is not in classes.txt"),
    *(("corrected labels", correct_a_label, line, words) for line, words in (
        ("cls --resume", "run/cls.pt was made with other labels: choose another --run, or --over"),
        ("pseudo", "run/bpm holds masks of other data, labels, .*--overwrite"),
        ("seg --resume", "run/seg.pt was made with other labels: choose another --run, or --o"))),
    ("other images", lambda: text(TRAIN, *(f"train_{i:05d}" for i in range(7))),
     "cls --resume", "run/cls.pt was made with other ids: "),
    ("fewer images than a batch", lambda: text(TRAIN, FIRST), "cls --run new",
     "1 images cannot fill --batch-size 4: lower it"),
    *(("no such folder", nothing, f"cls --data {name}", f"{name} not found: make it with data.py")
      for name in ("nowhere", "photo.png")),
    ("no such split", nothing, "eval --split holdout", "holdout.txt not found: run data.py"),
    ("an id with a blank", lambda: add_line(TRAIN, "img (1)"), "cls",
     rf"{TRAIN}, line 9: 'img \(1\)' {BLANK}"),
    ("only ids with blanks", lambda: text(TEST, "img (1)", "img (2)"), "eval",
     rf"{TEST}, line 1: 'img \(1\)' has a blank"),
    ("two ids in a line", lambda: add_line(TEST, "test_00000 test_00001"), "eval",
     f"{TEST}, line 3: 'test_00000 test_00001' {BLANK}"),
    *((f"a list of ImageSets/Main, {sign}", partial(add_line, TRAIN, f"{FIRST}  {sign}"), "cls",
       f"{TRAIN}, line 9: '{FIRST}  {sign}' has a blank. A list of ImageSets/Main")
      for sign in ("1", "-1", "0")),
    *((f"the id {bad}", partial(split_with, bad), "cls --run new", NO_FILE % re.escape(repr(bad)))
      for bad in ("../../outside", "/abs/x", "a\\b", ".hidden", "..", "a/b")),
    *(("the id ../x", partial(split_with, "../x"), line, NO_FILE % r"'\.\./x'")
      for line in ("pseudo", "seg --run new", "eval", "masks", "eval --export")),
    ("the folder above", lambda: (os.mkdir("VOCdevkit"), shutil.move("data", "VOCdevkit/VOC2012")),
     "cls --data VOCdevkit", "VOCdevkit/classes.txt not found: pass --data VOCdevkit/VOC2012"),
]


# --- files that are damaged, missing or of another kind ----------------------------------------

UNREADABLE = "cannot be read .*: mend it, or take it out of the split"
UNKNOWN = "holds masks of other data, labels, weights or flags, or has no settings.json: "


def blocked(path):
    """What a line says where a folder stands for a file, or a file for a folder."""
    return rf"(?=.*{path}).*(Is a directory|File exists|Not a directory|no folder|cannot be writ)"


FILES = [
    *(("half an image", partial(cut, IMAGE), line, f"{IMAGE} {UNREADABLE}")
      for line in ("cls --run new", "pseudo --overwrite", "seg --overwrite")),
    ("half an image", lambda: (cut(TEST_IMAGE), shutil.rmtree("run/pred")), "eval",
     f"{TEST_IMAGE} {UNREADABLE}"),
    ("half a photo", lambda: cut("photo.png"), "photo", "photo.png cannot be read"),
    ("an empty image", lambda: cut(IMAGE, 0), "cls --run new", f"{IMAGE} cannot be read"),
    ("text for an image", lambda: text(IMAGE, "no image"), "cls --run new", "cannot be read"),
    ("no photo", lambda: os.remove("photo.png"), "photo", "photo.png not found"),
    *(("no image", partial(os.remove, image_of(image_id)), line,
       f"{image_of(image_id)} not found: add it, or take it out") for image_id, line in (
          (FIRST, "cls --run new"), ("val_00001", "cls --run new"),
          ("val_00001", "seg --overwrite"))),
    ("a bomb", lambda: write(png(60_000, 60_000), IMAGE), "cls --run new",
     f"{IMAGE} cannot be read .*DecompressionBomb"),
    ("a floating-point photo", lambda: picture("photo.tif", mode="F"), "photo --image photo.tif",
     "photo.tif holds floating-point numbers: save it with 8 bits"),
    *((f"{what} truth", partial(how, path), line, f"{path} {words}")
      for path, line in ((TRUTH, "eval"), (truth_of("val_00001"), "seg --overwrite"))
      for what, how, words in (
          ("half a", cut, "cannot be read"), ("an empty", partial(cut, share=0), "cannot be read"),
          ("a colour", picture, "is a RGB image: a mask is"))),
    ("a 16-bit truth", lambda: picture(TRUTH, mode="I;16"), "eval",
     f"{TRUTH} is a I;16 image: a mask is"),
    *(("an unknown number", partial(picture, path, mode="L", color=9), line,
       f"{path} has the value 9: allowed are 0 to 8")
      for path, line in ((TRUTH, "eval"), (PSEUDO, "masks"), (PSEUDO, "seg --overwrite"))),
    *((f"another size of {path}", partial(picture, path, (90, 96), "L"), line,
       f"{path} is 90x96, its image 96x96") for path, line in (
          (TRUTH, "eval"), (truth_of(FIRST), "masks"), (PSEUDO, "masks"),
          (PSEUDO, "seg --overwrite"), ("data/Parts/test_00000.png", "eval"))),
    ("no parts of an image", lambda: os.remove("data/Parts/test_00000.png"), "eval",
     "data/Parts/test_00000.png not found"),
    *(("no truth at all", partial(shutil.rmtree, "data/SegmentationClass"), line,
       "no ground truth to score: data/SegmentationClass has none") for line in ("eval", "masks")),
    ("no mask to learn", lambda: os.remove(PSEUDO), "seg --overwrite",
     f"{PSEUDO} not found: run make_pseudo.py first"),
    ("half a mask to learn", lambda: cut(PSEUDO), "seg --overwrite", f"{PSEUDO} cannot be read"),
    ("masks that nobody knows", lambda: os.remove("run/pseudo/settings.json"), "pseudo",
     f"run/pseudo {UNKNOWN}--overwrite replaces them, --run writes elsewhere"),
    ("masks that nobody knows", lambda: os.remove("run/pred/settings.json"), "eval",
     f"run/pred {UNKNOWN}(?!.*--overwrite).*(--run|delete)"),  # stage 4 has no such flag
    *(("masks of other flags", nothing, f"pseudo {flags}", rf"run/\w+ {UNKNOWN}--overwrite")
      for flags in ("--crf-iterations 2", "--window 24", "--size 97")),
    ("masks of another data set", lambda: shutil.copytree("data", "copy"), "pseudo --data copy",
     "run/bpm holds masks of other data"),
    *((f"settings.json is {content}", partial(text, f"{folder}/settings.json", content), line,
       f"{folder}/settings.json is damaged: delete it and the masks beside it(?!.*--overwrite)")
      for folder, line, contents in (
          ("run/pseudo", "pseudo", ("", "{", "null", "[1]", '"masks"', "5")),
          ("run/pseudo", "seg --overwrite", "{"), ("run/pseudo", "masks", "{"),
          ("run/pred", "eval", "{")) for content in contents),
    *(("the run is a file", partial(text, "file"), line, words) for line, words in (
        ("cls --run file", "--run file is no folder that can be written to: choose another"),
        ("pseudo --run file", "file/cls.pt not found: run train_cls.py first"),
        ("seg --run file --masks run/pseudo", "--run file is no folder"),
        ("eval --run file", "file.* (no|not) f"), ("cls --run file/run", blocked("file")))),
    *((f"a folder for {path}", partial(become_folder, path), line, f"{path} not found")
      for path, line in ((IMAGE, "cls --run new"), (CLASSES, "eval"), (LABELS, "cls"),
                         (TRAIN, "cls"), (CLS, "pseudo"), (CLS, "cls --resume"))),
    ("a folder for each truth", lambda: (become_folder(TRUTH),
                                         become_folder(truth_of("test_00001"))), "eval",
     "no ground truth to score"),
    *((f"a folder for {path}", partial(become_folder, path), line, blocked(path))
      for path, line in ((PSEUDO, "pseudo"), (SEG, "seg --overwrite"))),
    ("a folder for --image", nothing, "photo --image data", "data is a folder"),
    ("a folder for --out", lambda: os.mkdir("out.png"), "photo", blocked("out.png")),
    ("a folder for the overlay", lambda: os.mkdir("out_overlay.png"), "photo", "out_overlay.png"),
    ("--masks is a file", nothing, "seg --masks photo.png --overwrite",
     f"photo.png/{FIRST}.png not found: run make_pseudo.py first"),
    ("--masks is nowhere", nothing, "masks --masks nowhere", f"nowhere/{FIRST}.png not found"),
    ("a data set for a file", nothing, "data toy --root photo.png --num 1 1 1",
     blocked("photo.png")),
    ("the overlay is the photo", lambda: shutil.copy("photo.png", "me_overlay.png"),
     "photo --image me_overlay.png --out me.png", "me_overlay.png is in the way, and not ours"),
    ("the overlay is another photo", lambda: shutil.copy("photo.png", "out_overlay.png"), "photo",
     "out_overlay.png is in the way, and not ours to replace: choose another --out"),
]


# --- checkpoints -------------------------------------------------------------------------------

FIELDS = "kind config args model optimizer classes ids labels".split()
CLS_AGAIN = "run/cls.pt .*(run train_cls.py|train anew|--overwrite)"
SEG_AGAIN = "run/seg.pt .*(run train_seg.py|train anew|--overwrite)"


def reshape(checkpoint):
    name, weight = next(iter(checkpoint["model"].items()))
    checkpoint["model"][name] = weight.flatten()[:1]


CHECKPOINTS = [
    *((f"cls.pt without {field}", partial(drop, CLS, *field.split()), "pseudo", CLS_AGAIN)
      for field in [*FIELDS, "epoch", "args size", "args epochs", "args seed"]),
    *((f"seg.pt without {field}", partial(drop, SEG, field), "seg --resume", SEG_AGAIN)
      for field in [*FIELDS, "step", "masks"]),
    ("cls.pt without epoch", lambda: drop(CLS, "epoch"), "cls --resume", CLS_AGAIN),
    ("seg.pt without its seed", lambda: drop(SEG, "args", "seed"), "eval", SEG_AGAIN),
    ("cls.pt without a weight", lambda: drop(CLS, "model", "classifier.weight"), "pseudo",
     "run/cls.pt does not fit .*: train anew"),
    *(("weights of other shapes", partial(edit, path, reshape), line,
       f"{path} does not fit .*: train anew") for path, line in ((CLS, "pseudo"), (SEG, "eval"))),
    *(("another version", partial(edit, path, lambda c: c["config"].update(heads=3)), line,
       f"{path} is of another version .*: train anew")
      for path, line in ((CLS, "pseudo"), (SEG, "eval"))),
    ("an unknown backbone", lambda: edit(CLS, lambda c: c["config"].update(backbone="vit_gone")),
     "pseudo", "vit_gone"),
    *((f"{field} is None", partial(edit, path, lambda c, field=field: c.update({field: None})),
       line, words) for field, path, line, words in (
          ("model", CLS, "pseudo", CLS_AGAIN), ("optimizer", CLS, "cls --resume", CLS_AGAIN),
          ("args", SEG, "seg --resume", SEG_AGAIN))),
    ("seg.pt as cls.pt", lambda: shutil.copy(SEG, CLS), "pseudo",
     "run/cls.pt is no cls checkpoint but seg.*: run train_cls.py"),
    ("cls.pt as seg.pt", lambda: shutil.copy(CLS, SEG), "eval",
     "run/seg.pt is no seg checkpoint but cls.*: run train_seg.py"),
    *((f"{path} is {what}", partial(how, path), line,
       f"{path} is not a readable checkpoint .*: run train_{path[4:7]}.py")
      for path, line, what, how in (
          (CLS, "pseudo", "cut", cut), (CLS, "cls --resume", "cut", cut), (SEG, "eval", "cut", cut),
          (SEG, "photo", "cut", cut), (CLS, "pseudo", "empty", partial(cut, share=0)),
          (CLS, "pseudo", "text", partial(write, b"weights")),
          (CLS, "pseudo", "a list", partial(torch.save, [1, 2])),
          (CLS, "pseudo", "a tensor", partial(torch.save, torch.ones(2))),
          (CLS, "pseudo", "code", partial(torch.save, {"kind": Payload()})))),
    *((f"no {path}", partial(os.remove, path), line, f"{path} not found: run {script} first")
      for path, line, script in ((CLS, "pseudo", "train_cls.py"), (SEG, "eval", "train_seg.py"))),
    *(("NaN weights", lambda path=path, counter=counter: (fill(path, math.nan),
                                                          rewind(path, counter)), line,
       f"loss nan or weights .*not finite .*: lower --lr; {path} stays")
      for path, counter, line in ((CLS, "epoch", "cls --resume"), (SEG, "step", "seg --resume"))),
    ("NaN weights", lambda: fill(CLS, math.nan), "pseudo --overwrite",
     "run/cls.pt gives numbers that are not finite: train it again"),
    ("NaN weights", lambda: fill(SEG, math.nan), "eval", "DeepLabv2 gives numbers that"),
    ("infinite weights", lambda: fill(SEG, math.inf), "photo", "DeepLabv2 gives numbers that"),
    *(("a finished run", nothing, line, f"{path} exists: --resume goes on, --overwrite starts anew")
      for line, path in (("cls", CLS), ("seg", SEG))),
    ("other flags", nothing, "cls --resume --pool max",
     "run/cls.pt was made with --pool topk, now it is max: choose another --run"),
    ("other flags", nothing, "seg --resume --scales 1 0.75",
     r"run/seg.pt was made with --scales \[1.0\], now it is \[1.0, 0.75\]: "),
    ("other masks", lambda: call("pseudo --overwrite --crf-sxy 5"), "seg --resume",
     "run/seg.pt was made with other masks: "),
]


# --- backbones, their weights and tokens; flags that do not fit each other ---------------------

WEIGHTS = "cls --run new --weights"
LINEAR = f"{WEIGHTS} a.pth --backbone vit_toy_linear"
TOKENS = "cls --augment --train-blocks 0 --tokens tokens --run"


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


BACKBONES = [
    ("no such weights", nothing, f"{WEIGHTS} none", "none not found: --weights takes a local copy"),
    ("a folder of weights", nothing, f"{WEIGHTS} data",
     "data is a folder: --weights takes a local copy"),
    *((f"weights that are {what}", partial(how, "a.bin"), f"{WEIGHTS} a.bin",
       f"no weights for vit_toy from a.bin: it is {words}") for what, how, words in (
          ("a web page", partial(write, b"<!DOCTYPE html>"), "a web page: download the file"),
          ("a pointer", partial(write, b"version https://git-lfs.github.com/spec/v1"),
           "a pointer of Git LFS"),
          ("empty", partial(write, b""), "empty: copy it again"),
          ("JSON", partial(write, b'{"error": 404}'), "text .JSON., not weights"),
          ("packed", partial(write, b"\x1f\x8b" + bytes(99)), "an archive: unpack it"),
          ("without their ending", partial(save_file, {"a": torch.ones(1)}),
           "a safetensors file: give its name the ending .safetensors"),
          ("cls.pt", partial(shutil.copy, CLS), "a checkpoint of train_cls.py"),
          ("seg.pt", partial(shutil.copy, SEG), "a checkpoint of train_seg.py"))),
    ("weights that are noise", lambda: write(b"not weights", "a.pth"), f"{WEIGHTS} a.pth",
     "no weights for vit_toy from a.pth .*: --weights takes the file of"),
    *((f"weights {how}", partial(save_vit, **options), LINEAR,
       f"no weights for vit_toy_linear from a.pth .*{words}.*: --weights takes the file of vit_t")
      for how, options, words in (
          ("of less blocks", dict(depth=3), "another depth or kind: it has no blocks.3"),
          ("of more blocks", dict(depth=5), "another depth or kind: it has blocks.4"),
          ("without one block", dict(without="blocks.1."), "depth or kind: it has no blocks.1"),
          ("of another kind", dict(init_values=1.0), "kind: it has blocks.0.ls1.gamma, which"),
          ("of another width", dict(embed_dim=64), r"cls_token is \[1, 1, 64\], here it is"))),
    ("weights without the statistics of batch norms", lambda: save_resnet(9, "running_var"),
     "seg --overwrite --weights a.pth", "resnet_toy from a.pth .*kind: it has no .*running_var"),
    ("weights of a shallower CNN", lambda: save_resnet(3), "seg --overwrite --weights a.pth",
     "no weights for resnet_toy from a.pth .*another depth or kind: it has no layer4"),
    *(("weights of another network", lambda: torch.save({"a": torch.ones(1)}, "a.pth"),
       f"{WEIGHTS} a.pth {more}", f"no weights for {words}") for more, words in (
          ("", "vit_toy from a.pth .*: --weights takes the file of"),
          ("--backbone vit_tiny_patch16_224 --size 64",  # timm lets it pass
           "vit_tiny_patch16_224 from a.pth .*150 of its weights.*of timm/vit_tiny_patch16_224"))),
    *(("a backbone of another kind", nothing, line, f"{name} does not fit this stage, .* a {kind}")
      for line, name, kind in (
          ("cls --run new --backbone resnet_toy", "--backbone resnet_toy", "plain ViT"),
          ("cls --run new --backbone swin_tiny_patch4_window7_224", "swin_.*", "plain ViT"),
          ("seg --overwrite --backbone vit_toy", "--backbone vit_toy", "CNN"),
          ("seg --overwrite --backbone vgg11", "--backbone vgg11", "CNN .*output stride 8"))),
    ("a backbone that is none", nothing, "cls --run new --backbone vit_huge_toy",
     "timm has no model 'vit_huge_toy'"),
    *(("tokens of another kind", lambda: call(f"{TOKENS} first"), f"{TOKENS} new {flags}", words)
      for flags, words in (
          ("--size 64", "tokens is of size 48, now it is 64: choose another --tokens"),
          ("--backbone vit_toy_linear", "is of backbone vit_toy, now it is vit_toy_linear"),
          ("--seed 1", "is of weights "),  # of a random start
          ("--train-blocks 2 --frozen-epochs 0", "is of blocks_after 0, now it is 2"),
          ("--train-blocks 5 --frozen-epochs 0", "lower --train-blocks to at most 4"))),
    ("a file that holds no tokens", lambda: text("tokens", "mine"), f"{TOKENS} new",
     "tokens is no file of tokens"),
    *[("no Apple GPU", nothing, "cls --run new --device mps",
       "--device mps: this machine or this torch has no Apple GPU")
      for _ in range(not torch.backends.mps.is_available())],
    *(("windows of broken cells", nothing, f"{line} --window {window} --stride {stride}",
       f"--window {window} and --stride {stride}: take multiples of 8 .* stride of at most the win")
      for line, window, stride in (("pseudo --overwrite", 20, 8), ("eval", 24, 12),
                                   ("eval", 32, 40))),
    *(("a size that patches do not divide", how, line, "is no multiple of the 8 pixels of a patch")
      for line, how in (("cls --run new --size 50", nothing),
                        ("pseudo --overwrite --size 97", nothing),
                        ("pseudo --size 97", lambda: (shutil.rmtree("run/bpm"),
                                                      shutil.rmtree("run/pseudo"))))),
    ("a lattice too fine", nothing, "pseudo --overwrite --crf-sxy 0.001 --crf-srgb 0.001",
     "--crf-s.* too small"),
]
ROWS = FOLDER + FILES + CHECKPOINTS + BACKBONES


@pytest.mark.parametrize("spoil, line, words", [
    pytest.param(*row, id=f"{name}: {row[1]}") for name, *row in ROWS])
def test_a_mistake_is_told_in_one_line_and_changes_nothing(place, capsys, spoil, line, words):
    spoil()
    told = refusal(line, capsys)
    assert re.search(words, told), told
    assert not Path("marker").exists() and not [*Path().rglob("*.tmp")]


FLAGS = {
    "cls": ["--lr -1", "--lr nan", "--lr inf", "--lr 0", "--late-lr -1", "--late-lr nan",
            "--dropout 1.0", "--dropout -0.1", "--dropout nan", "--seed -1", f"--seed {2**63}",
            "--workers -1", "--train-blocks -1", "--frozen-epochs -1", "--epochs 0",
            "--batch-size 0", "--size 0", "--size 48.5", "--top-k 0", "--pool median",
            "--augment mirror", "--preset imagenet", "--class-tokens append --context none",
            "--class-tokens append --context conv", "--class-tokens append --context pool",
            "--tokens t --augment flip"],
    "pseudo": ["--size 0", "--size -8", "--size-ratio 0", "--size-ratio nan", "--size-ratio inf",
               "--workers -2", "--crf-iterations nan", "--crf-iterations -1", "--crf-sxy nan",
               "--crf-sxy 0", "--crf-srgb -3", "--crf-srgb=-inf", "--crf-srgb x",
               "--crf-compat nan", "--crf-compat -1", "--crf magic", "--tokens t --window 48"],
    "seg": ["--lr nan", "--lr=-inf", "--aspp-lr -1", "--aspp-lr nan", "--rescale 1.5 0.5",
            "--rescale 0 1", "--rescale nan 1", "--rescale 1", "--scales 0", "--scales 1 -0.5",
            "--scales nan", "--val-images -1", "--iterations 0", "--save-every 0", "--crop 0",
            "--seed -1", f"--seed {2**63}", "--workers -1"],
    "eval": ["--workers -1", "--crf-iterations nan", "--crf-compat inf", "--crf-sxy -1",
             "--export --masks run/bpm", "--image photo.png"],
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

@pytest.mark.parametrize("line, path", [("cls --overwrite", CLS), ("seg --overwrite", SEG)])
def test_a_checkpoint_that_may_not_grow_leaves_the_old_one(place, capsys, line, path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # torch's own writer fails
    try:
        told = refusal(line, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{path} cannot be written (is the disk full?)" in told, told
    assert not [*Path().rglob("*.tmp")]


@pytest.mark.parametrize("line, path, saved", [
    ("pseudo", BPM, ()), ("eval", PRED, ()), ("photo", "out.png", ()),
    ("cls --epochs 2 --overwrite", "run/log.jsonl", (CLS,)),
    ("seg --lr 0.01 --overwrite", "run/log.jsonl", (SEG,)), ("pseudo", "run/log.jsonl", ())])
def test_a_full_disk_names_the_file_and_leaves_the_others(place, monkeypatch, line, path, saved):
    write_text, save, log = Path.write_text, Image.Image.save, Path("run/log.jsonl").read_text()

    def writer(function):
        def fail(content, target, *rest, **options):
            where = content if function is write_text else target
            if Path(path).name not in Path(where).name:
                return function(content, target, *rest, **options)
            Path(where).write_bytes(b"the first bytes")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fail
    monkeypatch.setattr(Path, "write_text", writer(write_text))
    monkeypatch.setattr(Image.Image, "save", writer(save))
    if path in (BPM, PRED):
        os.remove(path)
    before = contents()
    with pytest.raises(SystemExit, match=f"{path} cannot be written.*No space left on device"):
        call(line)
    after = contents()
    assert {name for name in after if before.get(name) != after[name]} == {*saved}
    assert Path("run/log.jsonl").read_text() == log


# --- masks and saves that a killed run left ----------------------------------------------------

@pytest.mark.parametrize("damage", [cut, partial(cut, share=0), os.remove, partial(write, b"none")],
                         ids=["half", "empty", "gone", "text"])
def test_a_damaged_mask_is_made_anew(place, damage):
    before = contents()
    for path in (BPM, PSEUDO, PRED):
        damage(path)
    call("pseudo")
    call("eval")
    after = contents()
    assert all(after[path] == before[path] for path in (BPM, PSEUDO, PRED))


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

TEXTS = {  # what an editor does to every text file
    "a byte-order mark": lambda content: b"\xef\xbb\xbf" + content,
    "lines of Windows": lambda content: content.replace(b"\n", b"\r\n"),
    "blank lines": lambda content: b"\n" + content.replace(b"\n", b" \n\n")}


@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS)
def test_text_as_windows_writes_it_means_the_same(place, monkeypatch, change):
    monkeypatch.setattr(evaluate, "draw", lambda *_, **__: None)
    before = contents()
    texts = {CLASSES, LABELS, TRAIN, VAL, TEST, "data/preset.txt", "data/Parts/names.txt",
             "run/pseudo/settings.json", "run/bpm/settings.json", "run/pred/settings.json"}
    for path in texts:
        write(change(before[path]), path)
    text(LABELS, *Path(LABELS).read_text("utf-8-sig").splitlines()[::-1])
    write(change(Path(LABELS).read_bytes()), LABELS)
    for line in ("cls --resume", "pseudo", "seg --resume", "eval"):
        call(line)
    after = contents()
    assert {name for name in before if after[name] != before[name]} <= texts
    assert after.keys() == before.keys()


@pytest.mark.parametrize("width, height", [(1, 1), (1, 9), (9, 1)])
def test_an_image_of_one_pixel_a_side_goes_through_all_stages(place, width, height):
    for image_id in (FIRST, "val_00000", "test_00000"):
        for path in (image_of(image_id), truth_of(image_id), f"data/Parts/{image_id}.png"):
            with Image.open(path) as image:
                small = image.crop((40, 40, 40 + width, 40 + height))
            small.save(path)
    for line in ("cls --overwrite", "pseudo --overwrite", "seg --overwrite", "eval"):
        call(line)
    for path in (BPM, PSEUDO, PRED):
        assert data.read_mask(path, 9).shape == (height, width)
    picture("photo.png", (width, height))
    call("photo --crf torch")
    assert data.read_mask("out.png", 9).shape == (height, width)


def test_255_classes_are_not_too_many(place):
    text(CLASSES, "background", *range(254))
    assert len(data.Folder("data").classes) == 255


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


@pytest.mark.parametrize("turned", [False, True])
def test_sixteen_bits_are_scaled_not_white(tmp_path, turned):
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    grey = np.tile(np.array([0, 257 * 100, 257 * 200, 65535], np.uint16), (2, 1))
    Image.fromarray(grey).save(tmp_path / "a.png", exif=exif)
    read = np.array(data.read_image(tmp_path / "a.png"))
    assert np.array_equal(read[..., 1].T if turned else read[..., 1], [[0, 100, 200, 255]] * 2)


@pytest.mark.parametrize("ending", [".jpeg", ".png"])
def test_images_of_other_endings_go_through_all_stages(place, ending):
    for path in sorted(Path("data/JPEGImages").iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(ending))
        path.unlink()
    for line in ("cls --overwrite", "pseudo --overwrite", "seg --overwrite", "eval"):
        call(line)
    assert len([*Path("run/pred").glob("*.png")]) == 2


def test_an_image_whose_name_ends_like_a_file_is_itself(place):
    os.rename(IMAGE, "data/JPEGImages/a.png.jpg")
    replace(LABELS, f"{FIRST} ", "a.png ")
    replace(TRAIN, f"{FIRST}\n", "a.png\n")
    folder = data.Folder("data")
    assert folder.ids("train")[0] == "a.png" and folder.image_labels("a.png").sum() > 1


def test_lists_in_two_columns_and_endings_in_capitals_mean_the_same(place):
    before = contents()
    for path in map(Path, (TRAIN, VAL, TEST)):
        first, *ids = path.read_text().split()
        text(path, f"/JPEGImages/{first}.jpg /SegmentationClassAug/{first}.png",
             *(f"{image_id}.jpg" for image_id in ids))
    for path in [*Path("data/JPEGImages").iterdir(), *Path("data/SegmentationClass").iterdir()]:
        path.rename(path.with_suffix(path.suffix.upper()))
    for line in ("cls --resume", "pseudo", "seg --resume", "eval"):
        call(line)
    after = contents()
    assert all(after[path] == before[path] for path in before if path.startswith("run"))


def test_names_with_dollars_and_names_that_a_console_cannot_show(place, script):
    for path in (CLASSES, LABELS):
        replace(path, "checks_red", "$k\u00e4fer_$\\frac{")
    shutil.rmtree("run")
    for line in ("cls", "pseudo", "seg"):
        call(line)
    _, output = script(*command("eval"), cwd=place, env={"PYTHONIOENCODING": "ascii"})
    assert "$k\\xe4fer_$" in output
    assert "$k\u00e4fer_$\\frac{" in json.loads(Path("run/results.json").read_text())["iou"]
    assert Path("run/figure.png").is_file()


# --- scores that are not what they seem ---------------------------------------------------------

def renumber(change, split="train"):
    """Every truth of a split, changed as an array."""
    for image_id in Path(split_of(split)).read_text().split():
        data.save_mask(Path(truth_of(image_id)), change(data.read_mask(truth_of(image_id), 9)))


def objects(change):
    """The change of a mask that changes the numbers of its objects alone."""
    return lambda mask: np.where((mask > 0) & (mask < 255), change(mask.astype(int)), mask)


def restarted(mask):
    """Numbers that begin at 1 in every image, as instances have them."""
    return np.searchsorted([v for v in np.unique(mask) if v not in (0, 255)], mask) + 1


TRUTHS = {"restarted": (objects(restarted), "a class that their line .* does not name"),
          "less by one": (objects(lambda mask: mask - 1), "does not name"),
          "turned": (objects(lambda mask: 9 - mask), "numbered as in classes.txt"),
          "0 and 1": (objects(np.ones_like), "lack one that it names"),
          "0 and 255": (objects(lambda mask: 255), "no class but background occurs"),
          "background": (objects(np.zeros_like), "no class but background occurs in data/Seg")}


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
    missed, other = ((data.read_mask(truth_of(i), 9) == 0).sum()
                     for i in ("test_00000", "test_00001"))
    told = capsys.readouterr().out
    assert "(2 images, 1 of 9 classes)" in told
    share = f"{100 * missed / (missed + other):.1f} % of pixels"
    assert f"truth 255 left out, predicted 255 a miss ({share})" in told
    results = json.loads(Path("run/pred/results.json").read_text())
    assert (results["num_images"], results["classes_scored"]) == (2, 1)
    assert (results["compared"], results["unnamed"], results["lacking"]) == (2, 0, 2)


def test_truth_that_is_ignored_everywhere_scores_null_and_not_zero(place, capsys):
    renumber(lambda mask: np.full_like(mask, 255), "test")
    for line, home in (("eval", "run"), ("masks --masks run/pred --split test", "run/pred")):
        call(line)
        assert "mIoU nan %" in capsys.readouterr().out
        results = json.loads(Path(home, "results.json").read_text(), parse_constant=pytest.fail)
        assert results["miou"] is None and results["pixel_accuracy"] is None
        assert set(results["iou"].values()) == {None} and not np.any(results["confusion"])


def test_scoring_the_truth_is_perfect_and_writes_nothing_there(place, capsys):
    before = contents()
    call("masks --masks data/SegmentationClass --split val")
    assert "mIoU 100.00 %" in capsys.readouterr().out
    assert contents() == before


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
        assert words in capsys.readouterr().out


@pytest.mark.parametrize("line, split, words", [
    ("masks", "train", ""), ("eval", "test", "(1 images"), ("pseudo", "train", "num_images 7 "),
    ("seg --overwrite", "val", "val_images 1 ")])
def test_a_score_over_part_of_a_split_says_what_is_missing(place, capsys, line, split, words):
    path = Path(truth_of(f"{split}_00001"))
    path.rename(path.with_suffix(".tif"))
    call(line)
    told = capsys.readouterr().out
    assert re.search(rf"note: 1 of \d images are not scored: .*has no {split}_00001.png", told)
    assert words in told


def test_images_of_train_and_val_are_counted(place, capsys):
    add_line(VAL, FIRST)
    for line in ("cls --overwrite", "seg --overwrite"):
        call(line)
        assert "note: 1 of 3 images of val are trained on as well" in capsys.readouterr().out


# --- two runs, torchrun's variables, memory ------------------------------------------------------

WRITES = ["cls --resume", "pseudo", "seg --resume", "eval"]


def test_the_second_run_in_a_folder_waits(place, capsys):
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
        for line in WRITES:
            assert re.search(rf"--run run is in use by process {first.pid} on .*: wait for it",
                             refusal(line, capsys))
        first.kill()
    for line in WRITES:
        call(line)  # the lock of the dead is taken over
        assert str(os.getpid()) in Path("run/.lock").read_text()


HALF = [{"RANK": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        *(dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK="0", MASTER_ADDR=home, MASTER_PORT=port)
          for rank, world, home, port in (
              ("2", "2", "localhost", "1"), ("0", "2", "localhost", "abc"), ("0", "2", "", "29500"),
              ("-1", "1", "localhost", "1")))]


@pytest.mark.parametrize("line, variables", [*((line, HALF[0]) for line in WRITES),
                                             *(("cls", variables) for variables in HALF[1:])],
                         ids=str)
def test_torchruns_variables_are_read_as_a_set(place, capsys, monkeypatch, line, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = refusal(line, capsys)
    assert re.search(r"the environment has .*which is not what torchrun sets .*: unset it", told)


@pytest.mark.parametrize("line, where, lower", [
    ("cls --overwrite", "train_cls.batches", "--batch-size, --size, --workers"),
    ("pseudo --overwrite", "make_pseudo.present_probs",
     "--batch-size, --size, --window, --workers"),
    ("seg --overwrite", "train_seg.batches", "--batch-size, --crop, --workers"),
    ("eval --crf torch", "evaluate.predict_logits", "--window, --workers")])
def test_too_little_memory_names_the_flags_to_lower(place, capsys, monkeypatch, line, where, lower):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(where, fail)
    assert refusal(line, capsys) == f"error: out of memory: lower {lower}"


@pytest.mark.parametrize("where, line", [("data.Image.open", "cls --overwrite"),
                                         ("support.run.torch.load", "pseudo")])
def test_too_many_open_files_are_not_told_as_a_damaged_file(place, capsys, monkeypatch, where,
                                                            line):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(where, fail)
    assert "too many open files: lower --workers" in refusal(line, capsys)


# --- saved first, scored later; going on --------------------------------------------------------

def test_an_epoch_is_saved_before_val_is_read(place, capsys):
    whole = Path(image_of("val_00001")).read_bytes()
    cut(image_of("val_00001"))
    with pytest.raises(SystemExit, match="val_00001.jpg cannot be read"):
        call("cls --run new --epochs 2")
    assert torch.load("new/cls.pt", weights_only=True)["epoch"] == 1
    assert json.loads(Path("new/log.jsonl").read_text())["loss"] > 0  # what is known is logged
    write(whole, image_of("val_00001"))
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
def test_a_finished_run_says_so_on_another_machine_too(place, capsys, line, path):
    before = contents()
    call(f"{line} --workers 1 --no-amp --device cpu --data {place}/data")
    assert f"{path} is finished: nothing to do" in capsys.readouterr().out
    assert contents() == before


def test_the_stages_go_on_where_the_data_moved(place, capsys):
    before = Path(PSEUDO).read_bytes()
    os.remove(PSEUDO)
    os.rename("data", "moved")
    call("pseudo --data moved")
    assert "1 of 8 images were still to do" in capsys.readouterr().out
    assert Path(PSEUDO).read_bytes() == before
    call("seg --data moved --resume")


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
