"""Bad input, row by row: a refusal is one line that names the file, and what is written stays.

A row is what is done to a finished run, the call, and what its line must say. Every row works on
its own copy of that run, in the same place, and is told through launch(), as a person is.
"""
import errno
import json
import math
import os
import pickle
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
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import data
from conftest import ROOT, call, command, contents, refusal
from datasets import beetles
from support.files import UserError
from support.masks import read_image, read_mask, save_mask

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
PARTS, CLS, SEG = "data/Parts/test_00000.png", "run/cls.pt", "run/seg.pt"
NOT_FINITE = "loss nan or weights .*not finite .*: lower --lr"


# --- what rows do ------------------------------------------------------------------------------

def nothing():
    """The flags of the row are what is wrong."""


def text(path, *content, encoding="utf-8"):
    Path(path).write_text("".join(f"{line}\n" for line in content), encoding)


def made(folder, name):
    Path(folder).mkdir()
    text(f"{folder}/{name}", "mine")


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
    """Change a checkpoint's dictionary."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def drop(path, name, part=None):
    """Take checkpoint[name], or checkpoint[part][name], out of a checkpoint."""
    edit(path, lambda checkpoint: (checkpoint[part] if part else checkpoint).pop(name))


def fill(path, value, **content):
    """Every weight of a checkpoint becomes this number; with epoch=0 training begins with them."""
    def _fill(checkpoint):
        checkpoint.update(content)
        for weight in checkpoint["model"].values():
            weight.fill_(value) if weight.is_floating_point() else None
    edit(path, _fill)


def relabel(label):
    """Every image of train has this label and no other; with "" no line in image_labels.txt."""
    others = [line for line in Path(LABELS).read_text().splitlines() if "train" not in line]
    ids = Path(TRAIN).read_text().split()
    text(LABELS, *others, *(f"{image_id} {label}" for image_id in ids if label))


class Payload:
    """Whoever unpickles this runs code of the file's author: it makes a file called marker."""

    def __reduce__(self):
        return open, ("marker", "w")


CODE = {"kind": Payload()}


def png(width, height):
    """A PNG whose header promises this size, and no more than that."""
    content = bytearray(Path("photo.png").read_bytes())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


# --- the folder --------------------------------------------------------------------------------

NO_UTF8 = "is no UTF-8 text: save it as UTF-8"
BLANK = "has a blank: a line is one ID, and no ID has blanks"
MAIN = "has a blank. A list of ImageSets/Main, which says where one class shows?"
NO_FILE = split_of(r"\w+") + ", line 1: %s is no name of a file"

FOLDER = [  # what is done, the call, what its line must say
    (lambda: text(CLASSES, "background", *range(255)), "cls",
     f"{CLASSES} has 256 classes: a mask can hold 255"),
    (lambda: add_line(CLASSES, "a a"), "cls", f"{CLASSES}: 'a a' has a space, or is there twice"),
    (lambda: add_line(CLASSES, "checks_red"), "cls", f"{CLASSES}: 'checks_red' has a space, or is"),
    (lambda: text(CLASSES, *beetles.TOY_CLASSES[1:], "background"), "cls",
     f"{CLASSES} begins with 'vertical_red': class 0 is 'background'"),
    *((partial(text, path), "cls", f"{path} is empty") for path in (CLASSES, LABELS, TRAIN)),
    *((partial(text, path, "käfer", encoding="latin-1"), line, f"{path} {NO_UTF8}")
      for path, line in ((CLASSES, "cls"), (LABELS, "cls"), (TEST, "eval"),
                         ("data/preset.txt", "cls"), ("data/Parts/names.txt", "eval"),
                         ("run/pseudo/settings.json", "pseudo"))),
    (lambda: text(CLASSES, "background", encoding="utf-16"), "eval", f"{CLASSES} {NO_UTF8}"),
    (lambda: text("data/preset.txt", "imagenet"), "cls",
     "data/preset.txt.*'imagenet'.*voc, coco, toy, voc-small, photo"),
    *((partial(add_line, CLASSES, "more"), line, f"(?=.*{CLASSES}).*has other classes")
      for line in ("pseudo", "eval")),
    (lambda: split_with("train_00003"), "cls", f"{TRAIN} lists train_00003 twice"),
    (lambda: add_line(LABELS, f"{FIRST} checks_red"), "cls", f"{LABELS} has two lines for {FIRST}"),
    *((partial(split_with, "stranger"), line, f"{LABELS}: no label for stranger: add 'stranger NAM")
      for line in ("cls", "pseudo")),
    (lambda: (split_with("odd"), add_line(LABELS, "odd")), "cls", "no label for odd: add"),
    (lambda: replace(LABELS, f"{FIRST} ", f"{FIRST} unicorn "), "cls",
     f"{LABELS}: {FIRST} has 'unicorn', which is not in classes.txt"),
    *((partial(relabel, "checks_red"), line, words) for line, words in (
        ("cls --resume", f"{CLS} was made with other labels: choose another --run, or --overwrite"),
        ("seg --resume", f"{SEG} was made with other labels: choose another --run, or --overwrite"),
        ("pseudo", "run/bpm holds masks of other data, labels, .*--overwrite"))),
    (lambda: text(TRAIN, *(f"train_{i:05d}" for i in range(7))), "cls --resume",
     "run/cls.pt was made with other ids: "),
    (lambda: text(TRAIN, FIRST), "cls --run new", "1 images cannot fill --batch-size 4: lower it"),
    (nothing, "cls --data nowhere", "nowhere not found: make it with data.py"),
    (nothing, "cls --data photo.png", "photo.png not found: make it with data.py"),
    (nothing, "eval --split holdout", "holdout.txt not found: run data.py"),
    (lambda: (os.mkdir("kit"), shutil.move("data", "kit/VOC2012")), "cls --data kit",
     "kit/classes.txt not found: pass --data kit/VOC2012"),
    (lambda: add_line(TRAIN, "img (1)"), "cls", rf"{TRAIN}, line 9: 'img \(1\)' {BLANK}"),
    (lambda: add_line(TEST, "test_00000 test_00001"), "eval",
     f"{TEST}, line 3: 'test_00000 test_00001' {BLANK}"),
    *((partial(add_line, TRAIN, f"{FIRST}  {sign}"), "cls", f"line 9: '{FIRST}  {sign}' {MAIN}")
      for sign in ("1", "-1", "0")),
    *((partial(split_with, bad), "cls --run new", NO_FILE % re.escape(repr(bad)))
      for bad in ("../../outside", "/abs/x", "a\\b", ".hidden", "..", "a/b")),
    *((partial(split_with, "../x"), line, NO_FILE % r"'\.\./x'")
      for line in ("pseudo", "seg --run new", "eval", "masks", "eval --export")),
]


# --- files that are damaged, missing or of another kind ----------------------------------------

UNREADABLE = "cannot be read .*: mend it, or take it out of the split"
UNKNOWN = "holds masks of other data, labels, weights or flags, or has no settings.json: "
BEETLES = "toy --root x --num 1 1 1"
NOT_OURS = "_overlay.png is in the way, and not ours to replace: choose another --out"


def blocked(path):
    """What a line says where a folder stands for a file, or a file for a folder."""
    return rf"(?=.*{path}).*(Is a directory|File exists|Not a directory|no folder|cannot be writ)"


FILES = [
    *((partial(cut, IMAGE), line, f"^error: {IMAGE} {UNREADABLE}")
      for line in ("cls --run new", "pseudo --overwrite", "seg --overwrite",
                   "pseudo --overwrite --workers 1")),
    (lambda: (cut(TEST_IMAGE), shutil.rmtree("run/pred")), "eval", f"{TEST_IMAGE} {UNREADABLE}"),
    (lambda: cut("photo.png"), "photo", "photo.png cannot be read"),
    (lambda: cut(IMAGE, 0), "cls --run new", f"{IMAGE} cannot be read"),
    (lambda: text(IMAGE, "no image"), "cls --run new", f"{IMAGE} cannot be read"),
    (lambda: write(png(60_000, 60_000), IMAGE), "cls --run new",
     f"{IMAGE} cannot be read .*DecompressionBomb"),
    *((partial(os.remove, path), line, f"{path} not found: add it, or take it out of the split")
      for path, line in ((IMAGE, "cls --run new"), (image_of("val_00001"), "cls --run new"),
                         (image_of("val_00001"), "seg --overwrite"))),
    (lambda: os.remove("photo.png"), "photo", "photo.png not found"),
    (lambda: picture("photo.tif", mode="F"), "photo --image photo.tif",
     "photo.tif holds floating-point numbers: save it with 8 bits"),
    *((partial(how, path), line, f"{path} {words}")
      for path, line in ((TRUTH, "eval"), (truth_of("val_00001"), "seg --overwrite"))
      for how, words in ((cut, "cannot be read"), (partial(cut, share=0), "cannot be read"),
                         (picture, "is a RGB image: a mask is"))),
    (lambda: picture(TRUTH, mode="I;16"), "eval", f"{TRUTH} is a I;16 image: a mask is"),
    *((partial(picture, path, mode="L", color=9), line,
       f"{path} has the value 9: allowed are 0 to 8")
      for path, line in ((TRUTH, "eval"), (PSEUDO, "masks"), (PSEUDO, "seg --overwrite"))),
    *((partial(picture, path, (90, 96), "L"), line, f"{path} is 90x96, its image 96x96")
      for path, line in ((TRUTH, "eval"), (truth_of(FIRST), "masks"), (PSEUDO, "masks"),
                         (PSEUDO, "seg --overwrite"), (PARTS, "eval"))),
    (lambda: os.remove(PARTS), "eval", f"{PARTS} not found"),
    *((partial(shutil.rmtree, "data/SegmentationClass"), line,
       "no ground truth to score: data/SegmentationClass has none") for line in ("eval", "masks")),
    (lambda: os.remove(PSEUDO), "seg --overwrite", f"{PSEUDO} not found: run make_pseudo.py first"),
    *((partial(cut, PSEUDO), line, f"^error: {PSEUDO} cannot be read")
      for line in ("seg --overwrite", "masks", "masks --workers 1")),
    (lambda: os.remove("run/pseudo/settings.json"), "pseudo",
     f"run/pseudo {UNKNOWN}--overwrite replaces them, --run writes elsewhere"),
    (lambda: os.remove("run/pred/settings.json"), "eval",  # stage 4 has no --overwrite
     f"run/pred {UNKNOWN}(?!.*--overwrite).*(--run|delete)"),
    *((nothing, f"pseudo {flags}", rf"run/\w+ {UNKNOWN}--overwrite")
      for flags in ("--crf-iterations 2", "--window 24", "--size 97")),
    (lambda: shutil.copytree("data", "copy"), "pseudo --data copy", "run/bpm holds masks of other"),
    *((partial(text, f"{folder}/settings.json", content), line, f"{folder}/settings.json is "
       "damaged: delete it and the masks beside it(?!.*--overwrite)")
      for folder, line, contents in (
          ("run/pseudo", "pseudo", ("", "{", "null", "[1]", '"masks"', "5")),
          ("run/pseudo", "seg --overwrite", "{"), ("run/pseudo", "masks", "{"),
          ("run/pred", "eval", "{")) for content in contents),
    *((partial(text, "file"), line, words) for line, words in (
        ("cls --run file", "--run file is no folder that can be written to: choose another"),
        ("pseudo --run file", "file/cls.pt not found: run train_cls.py first"),
        ("seg --run file --masks run/pseudo", "--run file is no folder"),
        ("eval --run file", "file.* (no|not) f"), ("cls --run file/run", blocked("file")))),
    *((partial(become_folder, path), line, f"{path} not found")
      for path, line in ((IMAGE, "cls --run new"), (CLASSES, "eval"), (LABELS, "cls"),
                         (TRAIN, "cls"), (CLS, "pseudo"), (CLS, "cls --resume"))),
    (lambda: (become_folder(TRUTH), become_folder(truth_of("test_00001"))), "eval",
     "no ground truth to score"),
    (lambda: become_folder(PSEUDO), "pseudo", blocked(PSEUDO)),
    (lambda: become_folder(SEG), "seg --overwrite", blocked(SEG)),
    (nothing, "photo --image data", "data is a folder"),
    (lambda: os.mkdir("out.png"), "photo", blocked("out.png")),
    (lambda: os.mkdir("out_overlay.png"), "photo", "out_overlay.png"),
    (lambda: shutil.copy("photo.png", "out_overlay.png"), "photo", f"out{NOT_OURS}"),
    (lambda: shutil.copy("photo.png", "me_overlay.png"),
     "photo --image me_overlay.png --out me.png", f"me{NOT_OURS}"),
    (nothing, "seg --masks photo.png --overwrite", f"photo.png/{FIRST}.png not found: run make_ps"),
    (nothing, "masks --masks nowhere", f"nowhere/{FIRST}.png not found"),
    (nothing, "data toy --root photo.png --num 1 1 1", blocked("photo.png")),
    *((partial(call, f"data {first}"), f"data {other}",
       "x holds beetles of another --cooccur: choose another --root") for first, other in (
          (BEETLES, f"{BEETLES} --cooccur 0.5"), (f"{BEETLES} --cooccur 0.9", BEETLES))),
    (nothing, "data voc --root new", "new/ImageSets/Segmentation/train.txt not found: unpack VOC"),
    (nothing, "data coco --root new", "new/annotations/instances_train2014.json not found"),
]


# --- checkpoints -------------------------------------------------------------------------------

FIELDS = "kind config args model optimizer classes ids labels".split()
AGAIN = {path: f"{path} .*(run train_{path[4:7]}.py|train anew|--overwrite)" for path in (CLS, SEG)}


def reshape(checkpoint):
    name, weight = next(iter(checkpoint["model"].items()))
    checkpoint["model"][name] = weight.flatten()[:1]


CHECKPOINTS = [
    *((partial(drop, path, field), line, AGAIN[path]) for path, line, fields in (
        (CLS, "pseudo", [*FIELDS, "epoch"]), (CLS, "cls --resume", ["epoch"]),
        (SEG, "seg --resume", [*FIELDS, "step", "masks"])) for field in fields),
    *((partial(drop, path, name, "args"), line, AGAIN[path]) for path, name, line in (
        (CLS, "size", "pseudo"), (CLS, "epochs", "pseudo"), (CLS, "seed", "pseudo"),
        (SEG, "seed", "eval"))),
    (lambda: drop(CLS, "classifier.weight", "model"), "pseudo", f"{CLS} does not fit .*: train an"),
    *((partial(edit, path, change), line, f"{path} {words} .*: train anew")
      for path, line in ((CLS, "pseudo"), (SEG, "eval"))
      for change, words in ((reshape, "does not fit"),
                            (lambda c: c["config"].update(heads=3), "is of another version"))),
    (lambda: edit(CLS, lambda c: c["config"].update(backbone="vit_gone")), "pseudo", "vit_gone"),
    (lambda: edit(CLS, lambda c: c.update(model=None)), "pseudo", AGAIN[CLS]),
    (lambda: edit(CLS, lambda c: c.update(optimizer=None)), "cls --resume", AGAIN[CLS]),
    (lambda: edit(SEG, lambda c: c.update(args=None)), "seg --resume", AGAIN[SEG]),
    (lambda: shutil.copy(SEG, CLS), "pseudo", f"{CLS} is no cls checkpoint but seg.*: run train_c"),
    (lambda: shutil.copy(CLS, SEG), "eval", f"{SEG} is no seg checkpoint but cls.*: run train_seg"),
    *((partial(how, path), line, f"{path} is not a readable checkpoint .*: run train_{path[4:7]}")
      for path, line, how in (
          (CLS, "pseudo", cut), (CLS, "cls --resume", cut), (SEG, "eval", cut), (SEG, "photo", cut),
          *((CLS, "pseudo", how) for how in (
              partial(cut, share=0), partial(write, b"weights"), partial(torch.save, [1, 2]),
              partial(torch.save, torch.ones(2)), partial(torch.save, CODE))))),
    (lambda: os.remove(CLS), "pseudo", f"{CLS} not found: run train_cls.py first"),
    (lambda: os.remove(SEG), "eval", f"{SEG} not found: run train_seg.py first"),
    (lambda: fill(CLS, math.nan, epoch=0), "cls --resume", f"{NOT_FINITE}; {CLS} stays"),
    (lambda: fill(SEG, math.nan, step=0), "seg --resume", f"{NOT_FINITE}; {SEG} stays"),
    (lambda: fill(CLS, math.nan), "pseudo --overwrite",
     "CPFCTE gives numbers that are not finite: train it again with a lower --lr"),
    (lambda: fill(SEG, math.nan), "eval", "DeepLabv2 gives numbers that are not finite"),
    (lambda: fill(SEG, math.inf), "photo", "DeepLabv2 gives numbers that are not finite"),
    *((nothing, line, f"{path} exists: --resume goes on, --overwrite starts anew")
      for line, path in (("cls", CLS), ("seg", SEG))),
    (nothing, "cls --resume --pool max",
     f"{CLS} was made with --pool topk, now it is max: choose another --run, or --overwrite"),
    (nothing, "seg --resume --scales 1 0.75",
     rf"{SEG} was made with --scales \[1.0\], now it is \[1.0, 0.75\]: "),
    (lambda: call("pseudo --overwrite --crf-sxy 5"), "seg --resume",
     f"{SEG} was made with other masks: "),
]


# --- backbones, their weights and tokens; flags that do not fit each other ---------------------

WEIGHTS, SEG_WEIGHTS = "cls --run new --weights", "seg --overwrite --weights"
LINEAR = f"{WEIGHTS} a.pth --backbone vit_toy_linear"
TOKENS = "cls --augment --train-blocks 0 --tokens tokens --run"
KIND = "does not fit this stage, which needs a"


def save_vit(without=None, **options):
    """a.pth: weights of a vit_toy_linear of other sizes."""
    state = timm.create_model("vit_toy_linear", **options).state_dict()
    torch.save({name: weight for name, weight in state.items()
                if not (without and name.startswith(without))}, "a.pth")


def save_resnet(without):
    """a.pth: weights of resnet_toy, but for these."""
    state = timm.create_model("resnet_toy").state_dict()
    torch.save({name: weight for name, weight in state.items() if without not in name}, "a.pth")


BACKBONES = [
    (nothing, f"{WEIGHTS} none", "none not found: --weights takes a local copy"),
    (nothing, f"{WEIGHTS} data", "data is a folder: --weights takes a local copy"),
    *((partial(how, "a.bin"), f"{WEIGHTS} a.bin", f"no weights for vit_toy from a.bin: it is {it}")
      for how, it in (
          (partial(write, b"<!DOCTYPE html>"), "a web page: download the file itself"),
          (partial(write, b"version https://git-lfs.github.com/spec/v1"), "a pointer of Git LFS"),
          (partial(write, b""), "empty: copy it again"),
          (partial(write, b'{"error": 404}'), "text .JSON., not weights"),
          (partial(write, b"\x1f\x8b" + bytes(99)), "an archive: unpack it"),
          (partial(save_file, {"a": torch.ones(1)}), "a safetensors file: give its name the endi"),
          (partial(shutil.copy, CLS), "a checkpoint of train_cls.py"),
          (partial(shutil.copy, SEG), "a checkpoint of train_seg.py"))),
    *((partial(save_vit, **options), LINEAR, "no weights for vit_toy_linear from a.pth "
       f".*{words}.*: --weights takes the file of vit_toy_linear") for options, words in (
          (dict(depth=3), "another depth or kind: it has no blocks.3"),
          (dict(depth=5), "another depth or kind: it has blocks.4"),
          (dict(without="blocks.1."), "another depth or kind: it has no blocks.1"),
          (dict(init_values=1.0), "another depth or kind: it has blocks.0.ls1.gamma, which"),
          (dict(embed_dim=64), r"cls_token is \[1, 1, 64\], here it is"))),
    *((partial(save_resnet, name), f"{SEG_WEIGHTS} a.pth",
       f"no weights for resnet_toy from a.pth .*another depth or kind: it has no .*{name}")
      for name in ("running_var", "layer4")),
    *((partial(write, b"not weights", "a.pth"), f"{WEIGHTS} a.pth",
       "no weights for vit_toy from a.pth .*: --weights takes the file of"),
      (partial(torch.save, {"a": torch.ones(1)}, "a.pth"), f"{WEIGHTS} a.pth",
       "no weights for vit_toy from a.pth .*: --weights takes the file of"),
      (partial(torch.save, {"a": torch.ones(1)}, "a.pth"),  # timm lets it pass
       f"{WEIGHTS} a.pth --backbone vit_tiny_patch16_224 --size 64",
       "from a.pth .*150 of its weights.*: --weights takes the file of timm/vit_tiny_patch16_224")),
    *((partial(how, name), f"{line} {name}",
       f"no weights for .*_toy from {name} .*: --weights takes the file of")
      for line in (WEIGHTS, SEG_WEIGHTS) for name, how in (
          ("zip.pth", partial(torch.save, CODE)), ("raw.pkl", partial(write, pickle.dumps(CODE))),
          ("old.bin", partial(torch.save, CODE, _use_new_zipfile_serialization=False)),
          ("raw.safetensors", partial(write, pickle.dumps(CODE))),
          ("array.npz", lambda path: np.savez(path, weight=np.array([*CODE.values()], object))))),
    (nothing, "cls --run new --backbone vit_huge_toy", "timm has no model 'vit_huge_toy'"),
    (nothing, "cls --run new --backbone resnet_toy", f"--backbone resnet_toy {KIND} plain ViT"),
    (nothing, "cls --run new --backbone swin_tiny_patch4_window7_224", f"{KIND} plain ViT"),
    (nothing, "seg --overwrite --backbone vit_toy", f"--backbone vit_toy {KIND} CNN"),
    (nothing, "seg --overwrite --backbone vgg11", f"{KIND} CNN of timm that keeps output stride 8"),
    *((partial(call, f"{TOKENS} first"), f"{TOKENS} new {flags}", words) for flags, words in (
        ("--size 64", "tokens is of size 48, now it is 64: choose another --tokens"),
        ("--backbone vit_toy_linear", "is of backbone vit_toy, now it is vit_toy_linear"),
        ("--seed 1", "is of weights "),  # of a random start
        ("--train-blocks 2 --frozen-epochs 0", "is of blocks_after 0, now it is 2"),
        ("--train-blocks 5 --frozen-epochs 0", "lower --train-blocks to at most 4"))),
    (lambda: text("tokens", "mine"), f"{TOKENS} new", "tokens is a file: --tokens takes a folder"),
    (lambda: made("tokens", "notes"), f"{TOKENS} new", "tokens holds something else"),
    (lambda: made("tokens", "made_with.json"), f"{TOKENS} new", "made_with.json is damaged"),
    *[(nothing, "cls --run new --device mps",
       "--device mps: this machine or this torch has no Apple GPU")
      for _ in range(not torch.backends.mps.is_available())],
    *((nothing, f"{line} --window {window} --stride {stride}", f"--window {window} and --stride "
       f"{stride}: take multiples of 8 pixels, and a stride of at most the window")
      for line, window, stride in (("pseudo --overwrite", 20, 8), ("eval", 24, 12),
                                   ("eval", 32, 40))),
    *((how, line, "is no multiple of the 8 pixels of a patch") for how, line in (
        (nothing, "cls --run new --size 50"), (nothing, "pseudo --overwrite --size 97"),
        (lambda: (shutil.rmtree("run/bpm"), shutil.rmtree("run/pseudo")), "pseudo --size 97"))),
    (nothing, "pseudo --overwrite --crf-sxy 0.001 --crf-srgb 0.001", "--crf-s.* is too small"),
]
ROWS = FOLDER + FILES + CHECKPOINTS + BACKBONES


@pytest.mark.parametrize("spoil, line, words", [
    pytest.param(*row, id=f"{row[1]}: {row[2]}") for row in ROWS])
def test_a_mistake_is_told_in_one_line_and_changes_nothing(place, capsys, spoil, line, words):
    spoil()
    told = refusal(line, capsys)
    assert re.search(words, told), told
    assert not Path("marker").exists() and not [*Path().rglob("*.tmp")]


FLAGS = {
    "data": ["--cooccur 1.5 toy --root x", "--num 0 1 1 toy --root x"],
    "cls": ["--lr -1", "--lr nan", "--lr inf", "--lr 0", "--late-lr -1", "--dropout 1.0",
            "--dropout -0.1", "--seed -1", f"--seed {2**63}", "--workers -1", "--train-blocks -1",
            "--frozen-epochs -1", "--epochs 0", "--batch-size 0", "--size 0", "--size 48.5",
            "--top-k 0", "--pool median", "--augment mirror", "--preset imagenet",
            "--class-tokens append --context none", "--class-tokens append --context conv",
            "--class-tokens append --context pool", "--tokens t --augment flip"],
    "pseudo": ["--size 0", "--size -8", "--size-ratio 0", "--size-ratio inf", "--workers -2",
               "--crf-iterations nan", "--crf-iterations -1", "--crf-sxy nan", "--crf-sxy 0",
               "--crf-srgb -3", "--crf-srgb=-inf", "--crf-srgb x", "--crf-compat -1",
               "--crf magic", "--tokens t --window 48"],
    "seg": ["--lr nan", "--lr=-inf", "--aspp-lr -1", "--rescale 1.5 0.5", "--rescale 0 1",
            "--rescale nan 1", "--rescale 1", "--scales 0", "--scales 1 -0.5", "--scales nan",
            "--val-images -1", "--iterations 0", "--save-every 0", "--crop 0", "--seed -1"],
    "eval": ["--workers -1", "--crf-iterations nan", "--crf-compat inf", "--crf-sxy -1",
             "--export --masks run/bpm", "--image photo.png"],
    "photo": ["--out out.jpg", "--out photo.png", "--export"]}


@pytest.mark.parametrize("line", [f"{name} {flag}" for name in FLAGS for flag in FLAGS[name]])
def test_a_flag_that_cannot_be_is_named_and_nothing_starts(place, capsys, line):
    told = refusal(line, capsys)
    assert line.split()[1].split("=")[0] in told and "error: " in told


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
    rename, log = os.replace, Path("run/log.jsonl").read_text()

    def replace_but_one(source, target):
        if Path(target) == Path(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)
    monkeypatch.setattr(os, "replace", replace_but_one)
    if path in (BPM, PRED):
        os.remove(path)
    before = contents()
    with pytest.raises(SystemExit, match=f"{path} cannot be written.*No space left on device"):
        call(line)
    after = contents()
    assert {name for name in after if before.get(name) != after[name]} == {*saved}
    assert Path("run/log.jsonl").read_text() == log


@pytest.mark.parametrize("line, files", [
    ("cls --overwrite", CLS), ("seg --overwrite", f"{SEG} run/preset.txt"),
    ("pseudo", f"{BPM} run/pseudo/settings.json"), ("photo", "out.png out_overlay.png"),
    ("eval", f"{PRED} run/results.json run/figure.png")])
def test_what_a_killed_save_left_disappears_with_the_next_run(place, line, files):
    files = [*map(Path, files.split())]
    for file in files:
        file.with_name(f".{file.name}.tmp").write_bytes(b"half a file")
        if file.suffix == ".png":  # no mask there: the kill came before it was whole
            file.unlink(missing_ok=True)
    call(line)
    assert all(file.is_file() for file in files) and not [*Path().rglob("*.tmp")]


# --- Ctrl-C, too little memory, SIGKILL ---------------------------------------------------------

STOPS = {  # line: where it is in its work, what to lower where memory ends
    "cls --overwrite": ("data.batches", "--batch-size, --size, --workers"),
    "seg --overwrite": ("data.batches", "--batch-size, --crop, --workers"),
    "pseudo --overwrite": ("make_pseudo.class_maps", "--batch-size, --size, --window, --workers"),
    "eval --crf torch": ("evaluate.predict_log_probs", "--window, --workers")}
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
MANY_FILES = OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # and no damaged file


@pytest.mark.parametrize("line", STOPS)
def test_ctrl_c_is_one_line_and_exit_130(place, capsys, monkeypatch, line):
    before = contents()
    monkeypatch.setattr(STOPS[line][0], Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        call(line)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: what is written stays\n"
    assert contents() == before


@pytest.mark.parametrize("line, where, error, told", [
    *((line, where, NO_MEMORY, f"out of memory: lower {lower}")
      for line, (where, lower) in STOPS.items()),
    *((line, where, MANY_FILES, "too many open files: lower --workers") for line, where in (
        ("cls --overwrite", "support.masks.Image.open"),
        ("pseudo", "support.checkpoints.torch.load")))])
def test_what_the_machine_lacks_names_the_flags_to_lower(place, capsys, monkeypatch, line, where,
                                                         error, told):
    monkeypatch.setattr(where, Mock(side_effect=error))
    assert told in refusal(line, capsys)


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
from support import processes
start = processes.ignore_interrupts
processes.ignore_interrupts = lambda worker: (time.sleep({late}), start(worker))
results = processes.map_in_workers(numpy.zeros, [(10**5,)] * 99, 2)  # they fill the pipe
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

ANEW = ["cls --overwrite", "pseudo --overwrite", "seg --overwrite", "eval"]
GO_ON = ["cls --resume", "pseudo", "seg --resume", "eval"]
TEXTS = [CLASSES, LABELS, TRAIN, VAL, TEST, "data/preset.txt", "data/Parts/names.txt",
         "run/pseudo/settings.json", "run/bpm/settings.json", "run/pred/settings.json"]


def rewrite(change):
    """Every text file as an editor may leave it; the order of labels means nothing."""
    text(LABELS, *Path(LABELS).read_text().splitlines()[::-1])
    for path in TEXTS:
        write(change(Path(path).read_bytes()), path)


def two_columns_and_capitals():
    """Lists as the field has them, and endings as cameras write them."""
    for path in map(Path, (TRAIN, VAL, TEST)):
        first, *ids = path.read_text().split()
        text(path, f"/JPEGImages/{first}.jpg /SegmentationClassAug/{first}.png",
             *(f"{image_id}.jpg" for image_id in ids))
    for path in [*Path("data/JPEGImages").iterdir(), *Path("data/SegmentationClass").iterdir()]:
        path.rename(path.with_suffix(path.suffix.upper()))


@pytest.mark.parametrize("change", [
    partial(rewrite, lambda content: b"\xef\xbb\xbf" + content),
    partial(rewrite, lambda content: content.replace(b"\n", b"\r\n")),
    partial(rewrite, lambda content: b"\n" + content.replace(b"\n", b" \n\n")),
    two_columns_and_capitals],
    ids=["byte-order mark", "lines of Windows", "blank lines", "two columns and capitals"])
def test_other_spellings_of_the_same_folder_change_nothing(place, change):
    before = contents("run")
    change()
    for line in GO_ON:
        call(line)
    after = contents("run")
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} <= {*TEXTS}


def other_ending(ending):
    """JPEGImages/ of another format."""
    for path in sorted(Path("data/JPEGImages").iterdir()):
        with Image.open(path) as image:
            image.save(path.with_suffix(ending))
        path.unlink()


def few_pixels(width, height):
    """An image of each split, its truth and its parts become this small, and the photo, too."""
    for image_id in (FIRST, "val_00000", "test_00000"):
        picture(image_of(image_id), (width, height), color=(90, 160, 30))
        for path in (truth_of(image_id), f"data/Parts/{image_id}.png"):
            picture(path, (width, height), "L", 1)
    picture("photo.png", (width, height))


@pytest.mark.parametrize("change, size", [
    (partial(other_ending, ".jpeg"), (96, 96)), (partial(other_ending, ".png"), (96, 96)),
    *((partial(few_pixels, *size), size) for size in ((1, 1), (1, 9), (9, 1)))],
    ids=["jpeg", "png", "1x1", "1x9", "9x1"])
def test_images_of_other_kinds_and_sizes_go_through_all_stages(place, change, size):
    change()
    for line in (*ANEW, "photo --crf torch"):
        call(line)
    for path in (BPM, PSEUDO, PRED):
        assert read_mask(path, 9).shape == size[::-1]
    with Image.open("photo.png") as photo:
        assert read_mask("out.png", 9).shape == photo.size[::-1]


def test_255_classes_and_a_name_that_ends_like_a_file_are_read(place):
    text(CLASSES, *beetles.TOY_CLASSES, *range(246))
    os.rename(IMAGE, "data/JPEGImages/a.png.jpg")
    replace(LABELS, f"{FIRST} ", "a.png ")
    replace(TRAIN, f"{FIRST}\n", "a.png\n")
    folder = data.Folder("data")
    assert len(folder.classes) == 255 and folder.ids("train")[0] == "a.png"
    assert folder.image_labels("a.png").sum() > 1


def test_photos_are_read_upright_everywhere(place, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown upright the picture is 40 wide and 60 high
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20] = 250  # stored at the left, seen at the top
    for path in (IMAGE, "photo.jpg"):
        Image.fromarray(pixels).save(path, exif=exif, quality=100)
    read = data.Images(data.Folder("data"), [FIRST], 48)[0][1]
    assert read.shape == (60, 40, 3) and read[:15].min() > 200 and read[25:].max() < 50
    assert np.array_equal(read, np.array(read_image("photo.jpg")))
    call("photo --image photo.jpg")
    assert read_mask("out.png", 9).shape == (60, 40)
    for path, line in ((PSEUDO, "seg --overwrite"), (truth_of(FIRST), "masks")):
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
    read = np.array(read_image(tmp_path / "a.png"))
    assert np.array_equal(read[..., 1].T if turned else read[..., 1], [[0, 100, 200, 255]] * 2)


def test_names_with_dollars_and_names_that_a_console_cannot_show(place, script):
    for path in (CLASSES, LABELS):
        replace(path, "checks_red", "$k\u00e4fer_$\\frac{")
    os.remove("run/figure.png")
    for line in ANEW[:3]:
        call(line)
    _, output = script(*command("eval"), cwd=place, env={"PYTHONIOENCODING": "ascii"})
    assert "$k\\xe4fer_$" in output
    assert "$k\u00e4fer_$\\frac{" in json.loads(Path("run/results.json").read_text())["iou"]
    assert Path("run/figure.png").is_file()


# --- scores that are not what they seem ---------------------------------------------------------

def renumber(change, split="train"):
    """Every truth of a split, changed as an array."""
    for image_id in Path(split_of(split)).read_text().split():
        save_mask(Path(truth_of(image_id)), change(read_mask(truth_of(image_id), 9)))


def objects(change):
    """The change of a mask that changes the numbers of its objects alone."""
    return lambda mask: np.where((mask > 0) & (mask < 255), change(mask.astype(int)), mask)


def restarted(mask):
    """Numbers that begin at 1 in every image, as instances have them."""
    return np.searchsorted([v for v in np.unique(mask) if v not in (0, 255)], mask) + 1


ONES, BACKGROUND = objects(np.ones_like), objects(np.zeros_like)
NO_OBJECT = "no class but background occurs"
NOTES = [  # what is done, the call, what its note must say; None: there is no note
    *((partial(renumber, objects(restarted)), line, "a class that their line .* does not name")
      for line in ("masks", "pseudo")),
    *((partial(renumber, objects(lambda mask: 255), split), line, NO_OBJECT)
      for line, split in (("eval", "test"), ("masks", "train"))),
    (partial(renumber, BACKGROUND), "masks", f"{NO_OBJECT} in data/Seg"),
    (partial(renumber, objects(lambda mask: 9 - mask)), "masks", "numbered as in classes.txt"),
    (partial(renumber, ONES), "masks", "lack one that it names"),
    (partial(renumber, objects(lambda mask: mask - 1), "val"), "seg --overwrite", "does not name"),
    (lambda: (relabel("background"), renumber(BACKGROUND)), "masks", None),
    (lambda: (relabel(""), renumber(ONES)), "masks", "has none of the 8 images: truth and labels"),
    (lambda: (relabel(""), renumber(BACKGROUND)), "masks", NO_OBJECT),
    *((partial(os.rename, truth_of(name), f"{truth_of(name)}.tif"), line,
       rf"1 of {count} images are not scored: .*has no {name}.png(.|\n)*{words}")
      for line, name, count, words in (
          ("masks", "train_00001", 8, ""), ("eval", "test_00001", 2, r"\(1 images"),
          ("pseudo", "train_00001", 8, "num_images 7 "),
          ("seg --overwrite", "val_00001", 2, "val_images 1 "))),
    *((partial(add_line, VAL, FIRST), f"{line} --overwrite",
       "1 of 3 images of val are trained on as well") for line in ("cls", "seg"))]


@pytest.mark.parametrize("spoil, line, words", NOTES)
def test_what_makes_a_score_mean_something_else_is_noted(place, capsys, spoil, line, words):
    call(line)
    assert "note:" not in capsys.readouterr().out
    spoil()
    call(line)
    told = capsys.readouterr().out
    assert re.search(f"note: .*{words}", told) if words else "note:" not in told, told


def test_what_a_score_is_over_is_said_and_noted(place, capsys):
    renumber(lambda mask: np.where(mask > 0, 255, 0), "test")
    save_mask(Path(PRED), np.full((96, 96), 255))
    call("masks --masks run/pred --split test")
    missed, other = ((read_mask(truth_of(i), 9) == 0).sum()
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


# --- two runs, torchrun's variables -------------------------------------------------------------

def test_the_second_run_in_a_folder_waits(place, capsys):
    code = """
import sys
from pathlib import Path
from support.files import open_run
open_run(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()"""
    with subprocess.Popen([sys.executable, "-c", code, str(place / "run")], cwd=ROOT,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        for line in GO_ON:
            assert re.search(rf"--run run is in use by process {first.pid} on .*: wait for it",
                             refusal(line, capsys))
        first.kill()
    for line in GO_ON:
        call(line)  # the lock of the dead is taken over
        assert str(os.getpid()) in Path("run/.lock").read_text()


HALF = [{"RANK": "1"}, {"RANK": "0"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        *(dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK="0", MASTER_ADDR=home, MASTER_PORT=port)
          for rank, world, home, port in (
              ("2", "2", "localhost", "1"), ("0", "2", "localhost", "abc"), ("0", "2", "", "29500"),
              ("-1", "1", "localhost", "1")))]


@pytest.mark.parametrize("line, variables", [*((line, HALF[0]) for line in GO_ON),
                                             *(("cls", variables) for variables in HALF[1:])],
                         ids=str)
def test_torchruns_variables_are_read_as_a_set(place, capsys, monkeypatch, line, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = refusal(line, capsys)
    assert re.search(r"the environment has .*which is not what torchrun sets .*: unset it", told)


# --- going on ------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, path, name", [("cls", CLS, "epoch"), ("seg", SEG, "step")])
def test_a_loss_that_is_not_finite_does_not_wait_for_a_save(place, capsys, monkeypatch, line, path,
                                                            name):
    fill(path, math.nan, **{name: 0})
    monkeypatch.setattr("support.checkpoints.LOOK", 1)
    assert f"loss not finite by step 1: lower --lr; {path} stays" in refusal(
        f"{line} --resume", capsys)


def test_a_finished_run_says_so_and_masks_go_on_where_the_data_moved(place, capsys):
    whole = Path(PSEUDO).read_bytes()
    os.remove(PSEUDO)
    os.rename("data", "moved")
    for image in Path("moved/JPEGImages").iterdir():
        image.touch()  # a copy on another disk has new times
    call("pseudo --data moved")
    assert "1 of 8 images done now" in capsys.readouterr().out
    before = contents()
    assert before[PSEUDO] == whole
    for line, path in (("cls", CLS), ("seg", SEG)):
        call(f"{line} --resume --workers 1 --no-amp --device cpu --data moved")
        assert f"{path} is finished: nothing to do" in capsys.readouterr().out
    assert contents() == before


# --- a thousand damaged files ------------------------------------------------------------------

def specimens(folder):
    """{name: bytes} of small files: photos turned and not, masks, 16 bits."""
    image, mask, _ = beetles.toy_scene(0, 0)
    pixels, mask = image[30:60, 30:70], mask[30:60, 30:70]
    exif = Image.Exif()  # orientation, maker, date, resolution, latitude: every kind of number
    exif.update({0x0112: 6, 0x010F: "maker", 0x0132: "2024:01:01 00:00:00", 0x011A: 72.0})
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    for name, array, options in (
            ("a.jpg", pixels, dict(exif=exif)), ("b.jpg", pixels[..., 0], dict(progressive=True)),
            ("c.png", pixels, dict(exif=exif)), ("d.png", mask, {}),
            ("e.png", pixels[..., 0].astype(np.uint16) * 257, {})):
        Image.fromarray(array).save(folder / name, **options)
    save_mask(folder / "f.png", mask)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def damaged(content):
    """A file's bytes with one bit changed, cut, and doubled in part, mostly in its head."""
    places = [k for k in range(len(content)) if k < 256 or k % (len(content) // 30 + 1) == 0]
    for place in places:
        byte = content[place] ^ 1 << place % 7
        yield content[:place] + bytes([byte]) + content[place + 1:]
    for place in places[::8]:
        yield content[:place]
        yield content[:place] + content[max(0, place - 20):]


def read_or_refused(read, path):
    """What read() gives, or None where it refuses the file in one line that names it."""
    try:
        return read()
    except UserError as error:
        assert path.name in str(error) and len(str(error).splitlines()) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of EXIF
def test_a_thousand_damaged_files_are_refused_or_read_right(tmp_path):
    files = [(f"{k}{name}", content) for name, whole in specimens(tmp_path).items()
             for k, content in enumerate(damaged(whole))]
    images_read = 0
    for name, content in files:
        path = tmp_path / name
        path.write_bytes(content)
        image = read_or_refused(partial(read_image, path), path)
        if image:
            images_read += 1
            assert image.mode == "RGB" and np.array(image).shape == (image.height, image.width, 3)
        for size in (None, (40, 30)):
            mask = read_or_refused(partial(read_mask, path, 9, size), path)
            if mask is not None:
                assert mask.dtype == np.uint8 and size in (None, mask.shape[::-1])
                assert set(np.unique(mask).tolist()) <= {*range(9), 255}
    assert len(files) > 1000 and 0.1 < images_read / len(files) < 0.9
