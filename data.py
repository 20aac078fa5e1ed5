"""Data: one folder layout for every data set, the presets, and the makers of such folders.

Run:    python data.py toy --root data/toy                            (12 s, nothing is downloaded)
        python data.py voc --root data/VOC2012 [--sbd DIR] [--download]
        python data.py coco --root data/COCO2014 [--train-masks] [--download]
Writes: ROOT/JPEGImages/ID.jpg                    the images, RGB
        ROOT/SegmentationClass/ID.png             palette masks to score: 0 background, 255 ignore
        ROOT/ImageSets/Segmentation/SPLIT.txt     one id a line
        ROOT/classes.txt                          one class name a line, background first
        ROOT/image_labels.txt                     "ID name name ...": all that training is told
        ROOT/preset.txt                           which row of PRESETS below the stages start from
        ROOT/Parts/ID.png, Parts/names.txt        toy only: 1 body, 2 head
Any folder like that is a data set; nothing downstream knows which one it is.
"""
import argparse
import json
import math
import os
import secrets
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

IGNORE = 255  # the mask value that is never trained on and never scored

# What a data set changes; each value is the default of the flag of that name, and the flag wins.
# Where a row names no value, the stage's own default stands: the paper's, or ViT-PCM's (README).
VIT_B = "vit_base_patch16_384.augreg_in21k_ft_in1k"
PRESETS = {
    "voc": {
        "train_cls": dict(train_split="trainaug", val_split="val", backbone=VIT_B, size=384,
                          epochs=50, batch_size=16, frozen_epochs=2, train_blocks=5,
                          schedule="two-stage", lr=1e-3, late_lr=1e-4),
        "make_pseudo": dict(split="trainaug", size=960),
        "train_seg": dict(train_split="trainaug", val_split="val", backbone="resnet101.tv_in1k",
                          crop=321, batch_size=10, iterations=20000, save_every=1000, lr=2.5e-4,
                          aspp_lr=10, scales=[1.0, 0.75, 0.5], rescale=[0.5, 1.5],
                          freeze_bn=True),
        "evaluate": dict(split="val"),
    },
    "toy": {
        "train_cls": dict(train_split="train", val_split="val", backbone="vit_toy", size=96,
                          pretrained=False, epochs=6, batch_size=8, frozen_epochs=0,
                          train_blocks=4, schedule="cosine", lr=7e-4, late_lr=0.0, dropout=0.0,
                          augment=["flip"]),
        "make_pseudo": dict(split="train", size=96, crf_sxy=10, crf_srgb=13),  # found on val
        "train_seg": dict(train_split="train", val_split="val", backbone="resnet_toy",
                          pretrained=False, crop=96, batch_size=10, iterations=300, save_every=100,
                          lr=0.02, aspp_lr=1, scales=[1.0, 0.75], rescale=[0.75, 1.25],
                          freeze_bn=False),
        "evaluate": dict(split="test", crf_sxy=10, crf_srgb=13),
    },
}
PRESETS["coco"] = {  # as voc; 100,000 iterations: the public PyTorch DeepLabv2's COCO-Stuff setting
    **PRESETS["voc"],
    "train_cls": PRESETS["voc"]["train_cls"] | dict(train_split="train"),
    "make_pseudo": PRESETS["voc"]["make_pseudo"] | dict(split="train"),
    "train_seg": PRESETS["voc"]["train_seg"] | dict(train_split="train", iterations=100000,
                                                    save_every=5000),
}


# --- command lines, errors, the run folder ---------------------------------------------------

class DataError(Exception):
    """A user's mistake, told in one line that names the file and the way out."""

    def __init__(self, message):
        # a DataLoader worker hands over its whole traceback as the message: the last line is ours
        super().__init__(str(message).strip().splitlines()[-1].removeprefix("data.DataError: "))


def run(main, args):
    """Call main(args); a DataError, or a full disk, ends in one line and exit code 1."""
    try:
        main(args)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


def positive(text):
    """argparse type: a whole number above zero."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    return int(text)


def probability(text):
    """argparse type: a number from 0 to 1."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")


def deviation(text):
    """argparse type: a number from 0.001 up; what is smaller leaves nobody anything to hear."""
    try:
        if 0.001 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0.001 up")


def stage_parser(doc):
    """The flags that all four stages share; parse() fills the defaults that a preset gives."""
    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """The docstring as it stands, and each flag's default."""

    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    parser.add_argument("--data", type=Path, help="data set folder, laid out as data.py says")
    parser.add_argument("--run", type=Path, help="folder that this and the other stages write to")
    parser.add_argument("--preset", choices=PRESETS, help="row of PRESETS in data.py that gives "
                        "the defaults; without this flag DATA/preset.txt names it, else it is voc")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                        help="worker processes: they load images, write masks and, on a CPU, run "
                        "the CRF; 0: none. Results do not depend on it")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction,
                        default=torch.cuda.is_available(),
                        help="run the network in bfloat16 autocast (the losses stay in float32)")
    return parser


def training_parser(doc):
    """stage_parser, and the flags that the two stages which train share."""
    parser = stage_parser(doc)
    add = parser.add_argument
    add("--weights", help="local copy of the backbone's timm weights, instead of the hub's")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True,
        help="start from the backbone's ImageNet weights, not from random ones")
    add("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    add("--compile", action="store_true", help="torch.compile the backbone in training: meant for "
        "GPUs and long runs (it needs a C compiler, on a CPU one of C++, and time to begin with)")
    add("--resume", action="store_true",
        help="go on from RUN's checkpoint exactly as if never interrupted")
    add("--overwrite", action="store_true", help="replace RUN's checkpoint if there is one")
    return parser


def parse(parser, stage, argv=None, needed=("data", "run")):
    """Parse argv with the defaults that --preset, or DATA/preset.txt, gives to this stage."""
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    notes = [home / "preset.txt" for home in (known.data, known.run) if home]
    named = [note.read_text().strip() for note in notes if note.is_file()]
    preset = known.preset or (named or ["voc"])[0]
    if preset not in PRESETS:
        parser.error(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    defaults = dict(PRESETS[preset][stage])
    for flag in ("train_split", "split"):  # VOC without SBD has no trainaug.txt: its own train then
        if defaults.get(flag) == "trainaug" and known.data:
            if not (known.data / "ImageSets/Segmentation/trainaug.txt").exists():
                defaults[flag] = "train"
    parser.set_defaults(preset=preset, **defaults)
    args = parser.parse_args(argv)
    for name in needed:
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed")
    return args


@contextmanager
def atomic(path):
    """Yield a temporary name beside path and rename it to path once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(path, lines):
    """Write a text file, one line an entry, atomically."""
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def log(run, stage, **values):
    """Print one line of results and append the same values to RUN/log.jsonl."""
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{stage}  " + "  ".join(shown), flush=True)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"stage": stage, **values}) + "\n")


# --- the folder -------------------------------------------------------------------------------

class Folder:
    """A data set folder: its class names, splits, image labels, images and masks."""

    def __init__(self, root):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(f"{root} not found: `python data.py toy --root {root}` makes one")
        self.classes = self._lines("classes.txt")
        for name in self.classes:
            if len(name.split()) != 1:
                raise DataError(f"{root}/classes.txt: {name!r} has a space: use an underscore")
        self._labels = None

    def _lines(self, name):
        path = self.root / name
        if not path.is_file():
            raise DataError(f"{path} not found: run data.py, or write it (README, 'Your own data')")
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{path} is empty")
        return lines

    def ids(self, split):
        """The ids of ImageSets/Segmentation/SPLIT.txt, in its order."""
        return [line.split()[0] for line in self._lines(f"ImageSets/Segmentation/{split}.txt")]

    def image_labels(self, image_id):
        """(C,) float32, 1 for each class that image_labels.txt names; background is always 1."""
        if self._labels is None:
            lines = map(str.split, self._lines("image_labels.txt"))
            self._labels = {image_id: names for image_id, *names in lines}
        names, where = self._labels.get(image_id), self.root / "image_labels.txt"
        if not names:
            raise DataError(f"{where}: no label for {image_id}: add '{image_id} NAME ...' "
                            f"('{image_id} {self.classes[0]}' where it shows no object)")
        labels = torch.zeros(len(self.classes))
        labels[0] = 1
        for name in names:
            if name not in self.classes:
                raise DataError(f"{where}: {image_id} has {name!r}, which is not in classes.txt")
            labels[self.classes.index(name)] = 1
        return labels

    def image_path(self, image_id):
        """JPEGImages/ID.jpg."""
        return self.root / "JPEGImages" / f"{image_id}.jpg"

    def mask_path(self, image_id):
        """SegmentationClass/ID.png, the ground truth: for scoring, never for training."""
        return self.root / "SegmentationClass" / f"{image_id}.png"


def read_image(path):
    """A PIL image in RGB; grey and CMYK files are converted, unreadable ones are named."""
    if not Path(path).is_file():
        raise DataError(f"{path} not found")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({error}): replace it, or take it out of the split")


def read_mask(path, num_classes, size=None):
    """(H, W) uint8 from a palette or grey PNG; size: the (width, height) that it must have."""
    if not Path(path).is_file():
        raise DataError(f"{path} not found")
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.array(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read ({error})")
    if mode not in ("P", "L"):
        raise DataError(f"{path} is a {mode} image: a mask is a palette or grey PNG")
    if size is not None and mask.shape != (size[1], size[0]):
        raise DataError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {size[0]}x{size[1]}")
    unknown = set(np.unique(mask).tolist()) - {*range(num_classes), IGNORE}
    if unknown:
        raise DataError(f"{path} has the value {min(unknown)}: allowed are 0 to {num_classes - 1} "
                        f"(the lines of classes.txt) and {IGNORE} (ignore)")
    return mask


@cache
def voc_palette():
    """(256, 3) uint8, VOC's colours: the bits of the class number dealt to R, G, B from the top."""
    palette = np.zeros((256, 3), np.uint8)
    for label in range(256):
        for bit in range(8):
            palette[label, bit % 3] |= (label >> bit & 1) << (7 - bit // 3)
    return palette


def save_mask(path, mask):
    """Write (H, W) class numbers as a palette PNG with VOC's colours, atomically."""
    image = Image.fromarray(mask.astype(np.uint8))
    image.putpalette(voc_palette().tobytes())
    with atomic(path) as temporary:
        image.save(temporary, format="PNG")


def to_tensor(image):
    """PIL RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def batches(num_images, batch_size, seed, start, stop, rank=0, world=1):
    """The (index, draw) pairs of this rank's share of each training step from start to stop.

    Every pass over the images is one seeded shuffle; its incomplete last batch is dropped. `draw`
    numbers all samples ever drawn and seeds their augmentation, so what a step sees depends on
    seed and step alone: not on the number of workers or ranks, nor on where a run was interrupted.
    """
    if num_images < batch_size:
        raise DataError(f"{num_images} images cannot fill --batch-size {batch_size}: lower it")
    if batch_size % world:
        raise DataError(f"--batch-size {batch_size} is not a multiple of {world} ranks")
    a_pass = num_images // batch_size
    for step in range(start, stop):
        if step == start or step % a_pass == 0:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step // a_pass)
            order = torch.randperm(num_images, generator=generator).tolist()
        first = step % a_pass * batch_size
        rows = range(first + rank, first + batch_size, world)
        yield [(order[row], step * batch_size + row - first) for row in rows]


# --- the score --------------------------------------------------------------------------------

def confusion_matrix(prediction, truth, num_classes):
    """(C, C + 1) int64 pixel counts: row true class, column predicted class, last column ignore.

    Pixels whose truth is 255 are left out; a predicted 255 counts as a miss of the true class.
    """
    scored = truth != IGNORE
    column = np.minimum(prediction[scored].astype(np.int64), num_classes)
    cell = truth[scored].astype(np.int64) * (num_classes + 1) + column
    counts = np.bincount(cell, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def iou_per_class(confusion):
    """(C,) float64 TP / (TP + FP + FN); NaN for classes that the ground truth does not hold."""
    true_positive = np.diagonal(confusion).astype(float)
    union = confusion.sum(1) + confusion[:, :-1].sum(0) - true_positive
    occurs = confusion.sum(1) > 0
    return np.where(occurs, true_positive / np.maximum(union, 1), np.nan)


# --- the makers of data sets ------------------------------------------------------------------

def write_folder_files(root, preset, classes, label_lines):
    """Write a folder's three readable files; image_labels.txt, the last one, completes it."""
    write_lines(root / "classes.txt", classes)
    write_lines(root / "preset.txt", [preset])
    write_lines(root / "image_labels.txt", label_lines)


# --- toy: the embedded data set, "beetles" -----------------------------------------------------
# A beetle's class is the pair (pattern of its body, colour of its head): neither a body patch nor a
# head patch alone tells the class, so context has to carry it from one to the other (Sec. 0.3.3).

TOY_SIZE = 96  # pixels a side
TOY_SEED = 2601_14718
PATTERNS = ("vertical", "horizontal", "checks", "diagonal")
HEADS = {"red": (200, 45, 40), "green": (45, 165, 60)}
TOY_CLASSES = ["background", *(f"{pattern}_{head}" for pattern in PATTERNS for head in HEADS)]
PARTS = ["body", "head"]  # 1 and 2 in Parts/ID.png
MIN_VISIBLE = 30  # pixels; a beetle that shows fewer is not labelled, and 255 in the mask
TEXTURES = ("dots", "rings", "bricks", "zigzag")  # of backgrounds, with --cooccur


def toy_background(rng):
    """(96, 96, 3) float64 in [0, 255]: random colours on a random coarse grid, smoothed."""
    cells = rng.integers(3, 25)
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.array(grid.resize((TOY_SIZE, TOY_SIZE), Image.Resampling.BICUBIC), dtype=float)


def toy_pattern(pattern, rng):
    """(96, 96) bool: stripes or checks of a period of 6 to 8 pixels at a random phase."""
    y, x = np.mgrid[:TOY_SIZE, :TOY_SIZE]
    period, phase_x, phase_y = rng.uniform(6, 8), rng.uniform(0, 8), rng.uniform(0, 8)
    vertical = (x + phase_x) / period % 1 < 0.5
    horizontal = (y + phase_y) / period % 1 < 0.5
    diagonal = ((x + y) / math.sqrt(2) + phase_x) / period % 1 < 0.5
    return {"vertical": vertical, "horizontal": horizontal, "checks": vertical ^ horizontal,
            "diagonal": diagonal}[pattern]


def toy_texture(texture, rng):
    """(96, 96) bool: one of TEXTURES at a random phase, period about 12 pixels; no body has it."""
    y, x = np.mgrid[:TOY_SIZE, :TOY_SIZE] + rng.uniform(0, 12, (2, 1, 1))
    row = y // 6
    dots = (x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 14
    rings = np.hypot(x % 48 - 24, y % 48 - 24) % 12 < 4
    bricks = (y % 6 < 1.5) | ((x + row % 2 * 6) % 12 < 1.5)
    zigzag = (y + abs(x % 12 - 6)) % 12 < 4
    return {"dots": dots, "rings": rings, "bricks": bricks, "zigzag": zigzag}[texture]


def toy_shape(rng):
    """Two (96, 96) bool: an elliptic body and a disc head that overlaps one end of it."""
    y, x = np.mgrid[:TOY_SIZE, :TOY_SIZE]
    centre_x, centre_y = rng.uniform(16, TOY_SIZE - 16, 2)
    long = rng.uniform(14, 24)  # half axes in pixels
    short = long * rng.uniform(0.5, 0.8)
    tilt = rng.uniform(0, 2 * math.pi)
    along = (x - centre_x) * math.cos(tilt) + (y - centre_y) * math.sin(tilt)
    across = (y - centre_y) * math.cos(tilt) - (x - centre_x) * math.sin(tilt)
    body = (along / long) ** 2 + (across / short) ** 2 <= 1
    head = (along - long) ** 2 + across ** 2 <= (short * rng.uniform(0.55, 0.75)) ** 2
    return body, head


def toy_scene(split, index, cooccur=None):
    """Scene `index` of split 0, 1 or 2: image (96, 96, 3), mask and parts (96, 96), all uint8.

    cooccur None: plain backgrounds. Else a probability: so often the background has the texture
    that the class of the scene's first beetle prefers, otherwise any of the four. The beetles, and
    with them mask and parts, are the same for every value.
    """
    shapes, colours, places = (np.random.default_rng([TOY_SEED, split, index, use])
                               for use in range(3))
    image = toy_background(colours)
    mask, parts, owner = (np.zeros((TOY_SIZE, TOY_SIZE), np.uint8) for _ in range(3))
    labels = shapes.choice(len(TOY_CLASSES) - 1, size=shapes.integers(1, 4), replace=False) + 1
    if cooccur is not None:
        favoured, texture = places.random() < cooccur, places.integers(len(TEXTURES))
        if favoured:  # a train and its rails: the background tells the pattern, never the head
            texture = (labels[0] - 1) // len(HEADS)
        image[toy_texture(TEXTURES[texture], places)] *= 0.5
    for number, label in enumerate(labels, 1):
        pattern, head_colour = TOY_CLASSES[label].split("_")
        body, head = toy_shape(shapes)
        base = colours.uniform(60, 230, 3)
        image[body] = np.where(toy_pattern(pattern, colours)[..., None], base, 0.4 * base)[body]
        image[head] = np.array(HEADS[head_colour]) + colours.uniform(-30, 30, 3)
        parts[body], parts[head] = 1, 2  # the head lies on the body
        mask[body | head], owner[body | head] = label, number
    for number in range(1, len(labels) + 1):
        if (owner == number).sum() < MIN_VISIBLE:
            mask[owner == number], parts[owner == number] = IGNORE, 0
    return image.clip(0, 255).astype(np.uint8), mask, parts


def make_toy(root, num, cooccur=None):
    """Write the beetles to root; num = images of (train, val, test). Fewer images are a prefix."""
    note, made_with = root / "cooccur.txt", f"{cooccur}\n"
    if root.is_dir() and (note.read_text() if note.is_file() else "None\n") != made_with:
        raise DataError(f"{root} holds beetles of another --cooccur: choose another --root")
    if cooccur is not None:
        write_lines(note, [cooccur])
    label_lines = []
    for split, (name, count) in enumerate(zip(("train", "val", "test"), num)):
        ids = [f"{name}_{index:05d}" for index in range(count)]
        for index, image_id in enumerate(tqdm(ids, desc=name, disable=None)):
            image, mask, parts = toy_scene(split, index, cooccur)
            with atomic(root / "JPEGImages" / f"{image_id}.jpg") as temporary:
                Image.fromarray(image).save(temporary, format="JPEG", quality=95)
            save_mask(root / "SegmentationClass" / f"{image_id}.png", mask)
            save_mask(root / "Parts" / f"{image_id}.png", parts)
            present = np.setdiff1d(mask, [0, IGNORE])
            label_lines.append(" ".join([image_id, *(TOY_CLASSES[label] for label in present)]))
        write_lines(root / "ImageSets/Segmentation" / f"{name}.txt", ids)
    write_lines(root / "Parts/names.txt", PARTS)
    write_folder_files(root, "toy", TOY_CLASSES, label_lines)


# --- VOC 2012 ----------------------------------------------------------------------------------

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
               "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()
VOC_COUNTS = {"train": 1464, "val": 1449, "trainaug": 10582}


def download_voc(root, sbd):
    """Fetch and unpack VOC 2012 trainval into root and SBD into sbd (2.0 and 1.4 GB)."""
    from torchvision.datasets import SBDataset, VOCSegmentation
    from torchvision.datasets.utils import download_and_extract_archive
    try:
        if not (root / "Annotations").is_dir():
            VOCSegmentation(root, year="2012", image_set="trainval", download=True)
            parts = (root / "VOCdevkit/VOC2012").iterdir()
            for path in sorted(parts, key=lambda path: path.name == "Annotations"):  # it comes last
                path.rename(root / path.name)
        if not list(sbd.rglob("train.txt")):
            download_and_extract_archive(SBDataset.url, sbd, filename=SBDataset.filename,
                                         md5=SBDataset.md5)
    except (OSError, RuntimeError) as error:
        raise DataError(f"the download failed ({error}): fetch VOCtrainval_11-May-2012.tar and "
                        f"SBD's benchmark.tgz by hand, and unpack them so that "
                        f"{root}/Annotations and {sbd} hold them")


def voc_label_line(root, image_id):
    """'ID name name ...' from Annotations/ID.xml: each object's name once, "difficult" included."""
    path = root / "Annotations" / f"{image_id}.xml"
    try:
        names = {node.findtext("name") for node in ElementTree.parse(path).iter("object")}
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path} cannot be read ({error})")
    unknown = names - set(VOC_CLASSES)
    if not names:
        raise DataError(f"{path} names no object")
    if unknown:
        raise DataError(f"{path} names {unknown.pop()!r}, which is no class of VOC")
    return " ".join([image_id, *sorted(names, key=VOC_CLASSES.index)])


def read_ids(path):
    """The ids of a split list that an archive brings."""
    if not path.is_file():
        raise DataError(f"{path} not found: unpack VOC so that ROOT/Annotations exists (and SBD so "
                        "that --sbd holds train.txt and val.txt), or pass --download")
    return path.read_text().split()


def make_voc(root, sbd=None, counts=VOC_COUNTS):
    """Turn an unpacked VOC 2012 (and SBD's two lists, if sbd is given) into a data set folder."""
    lists = root / "ImageSets/Segmentation"
    splits = {name: read_ids(lists / f"{name}.txt") for name in ("train", "val")}
    home = lists
    if sbd is None and (lists / "trainaug.txt").is_file():
        splits["trainaug"] = read_ids(lists / "trainaug.txt")
    elif sbd is not None:
        homes = [path.parent for path in sorted(sbd.rglob("train.txt"))
                 if (path.parent / "val.txt").is_file()]
        home = homes[0] if homes else sbd
        extra = read_ids(home / "train.txt") + read_ids(home / "val.txt")
        splits["trainaug"] = sorted({*splits["train"], *extra} - {*splits["val"]})
    for name, ids in splits.items():
        if len(ids) != counts[name]:
            raise DataError(f"{name} has {len(ids)} images, expected {counts[name]}: "
                            f"is {root if name != 'trainaug' else home} complete?")
    every_id = sorted(set().union(*splits.values()))
    label_lines = [voc_label_line(root, i) for i in tqdm(every_id, desc="labels", disable=None)]
    if "trainaug" in splits:
        write_lines(lists / "trainaug.txt", splits["trainaug"])
    else:
        print(f"without --sbd: training will use the {len(splits['train']):,} images of train")
    write_folder_files(root, "voc", VOC_CLASSES, label_lines)


# --- MS COCO 2014 ------------------------------------------------------------------------------

COCO_COUNTS = {"train": (82783, 82081), "val": (40504, 40137)}  # images, and those with an object
COCO_ARCHIVES = {  # what of the official site is unpacked to ROOT, with its MD5
    "zips/train2014.zip": "0da8c0bd3d6becc4dcb32757491aca88",
    "zips/val2014.zip": "a3d79f5ed8d289b7a7554ce06a5782b3",
    "annotations/annotations_trainval2014.zip": "0a379cfc70b0e71301e0f377548639bd"}


def download_coco(root):
    """Fetch and unpack COCO 2014's images and annotations into root (13.5, 6.6 and 0.25 GB)."""
    from torchvision.datasets.utils import download_and_extract_archive
    for name, md5 in COCO_ARCHIVES.items():
        done = root / f".{Path(name).stem}.unpacked"  # a folder alone could be half unpacked
        if done.exists():
            continue
        url = f"http://images.cocodataset.org/{name}"
        try:
            download_and_extract_archive(url, root, md5=md5, remove_finished=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"the download failed ({error}): fetch {url} by hand and unpack it so "
                            f"that {root} holds train2014/, val2014/ and annotations/")
        done.touch()


def read_coco(path, with_shapes):
    """(images {id: (file name, height, width)}, classes {id: name}, objects by image) of a json.

    objects {image id: [(class id, area, is a crowd, shape)]}; shape None without with_shapes, else
    a list of polygons or an RLE. Each entry is cut down as it is parsed: as Python lists the
    polygons of the 330 MB of train2014 alone would fill gigabytes.
    """
    def compact(entry):
        """What is kept of a dictionary of the json."""
        if "segmentation" in entry:
            shape = entry["segmentation"] if with_shapes else None
            if isinstance(shape, list):
                shape = [np.array(polygon) for polygon in shape]
            return (entry["image_id"], (entry["category_id"], entry["area"],
                                        bool(entry["iscrowd"]), shape))
        if "file_name" in entry:
            return entry["id"], (entry["file_name"], entry["height"], entry["width"])
        return entry

    print(f"reading {path}", flush=True)
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=compact)
        classes = {entry["id"]: entry["name"].replace(" ", "_") for entry in content["categories"]}
        images, objects = dict(content["images"]), {}
        for image_id, thing in content["annotations"]:
            if image_id not in images or thing[0] not in classes:
                raise ValueError(f"an object of image {image_id}, class {thing[0]}, of which the "
                                 "file does not tell")
            objects.setdefault(image_id, []).append(thing)
    except FileNotFoundError:
        raise DataError(f"{path} not found: unpack annotations_trainval2014.zip so that "
                        "ROOT/annotations exists, or pass --download")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no COCO instances file ({type(error).__name__}: {error})")
    return images, classes, objects


def coco_mask(objects, numbers, height, width):
    """(height, width) uint8 from objects as read_coco gives them; numbers {class id: number}.

    Crowds are 255 and lie at the bottom; then come the instances, the largest first, so that what
    is small, and mostly lies on or before something larger, stays visible.
    """
    from pycocotools import mask as coco
    mask = np.zeros((height, width), np.uint8)
    for class_id, _, crowd, shape in sorted(objects, key=lambda thing: (not thing[2], -thing[1])):
        if isinstance(shape, list):  # pycocotools takes four numbers for a box, less for an error
            shape = [polygon.tolist() for polygon in shape if len(polygon) >= 6]
            if not shape:
                continue
            shape = coco.merge(coco.frPyObjects(shape, height, width))
        elif isinstance(shape["counts"], list):
            shape = coco.frPyObjects(shape, height, width)
        if list(shape["size"]) != [height, width]:
            raise DataError(f"an RLE has the size {shape['size']}, its image {[height, width]}")
        mask[coco.decode(shape) > 0] = IGNORE if crowd else numbers[class_id]
    return mask


def link_image(source, link):
    """Make link a relative symbolic link to source, which must exist."""
    if not source.is_file():
        raise DataError(f"{source} not found: unpack {source.parent.name}.zip again")
    if not link.is_file():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # one that leads nowhere
        link.symlink_to(os.path.relpath(source.resolve(), link.parent.resolve()))


def make_coco(root, train_masks=False, counts=COCO_COUNTS):
    """Turn COCO 2014's official layout into a data set folder, with masks of val (and of train).

    Image labels are the classes of all annotations, crowds included; images without any are left
    out. Class numbers are 1 to 80 in the official order.
    """
    label_lines, lists = [], root / "ImageSets/Segmentation"
    for split in ("train", "val"):
        path, with_masks = root / f"annotations/instances_{split}2014.json", split == "val"
        with_masks |= train_masks
        images, classes, objects = read_coco(path, with_masks)
        found = len(images), len(objects)
        if found != counts[split]:
            raise DataError(f"{path} has %d images, %d with an object; expected %d and %d: is it "
                            "COCO 2014's?" % (found + counts[split]))
        numbers = {class_id: number for number, class_id in enumerate(sorted(classes), 1)}
        ids = []
        for image_id in tqdm(sorted(objects), desc=split, disable=None):
            name, height, width = images[image_id]
            ids.append(Path(name).stem)
            link_image(root / f"{split}2014" / name, root / "JPEGImages" / f"{ids[-1]}.jpg")
            present = sorted({thing[0] for thing in objects[image_id]})
            label_lines.append(" ".join([ids[-1], *(classes[i] for i in present)]))
            if with_masks:
                mask = coco_mask(objects[image_id], numbers, height, width)
                save_mask(root / "SegmentationClass" / f"{ids[-1]}.png", mask)
        write_lines(lists / f"{split}.txt", ids)
        print(f"{split}: {found[0]:,} images, {found[1]:,} with an object")
    names = ["background", *(classes[class_id] for class_id in sorted(classes))]
    write_folder_files(root, "coco", names, label_lines)


def parse_args(argv=None):
    """`toy`, `voc` or `coco`, and where to."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=("toy", "voc", "coco"))
    parser.add_argument("--root", type=Path, required=True, help="the data set folder")
    parser.add_argument("--num", type=int, nargs=3, default=(1500, 200, 200), metavar="N",
                        help="toy: images of train, val and test (default: 1500 200 200)")
    parser.add_argument("--cooccur", type=probability, metavar="P",
                        help="toy: textured backgrounds; with probability P the texture is the one "
                        "that the first beetle's class prefers, a temptation to call it a beetle")
    parser.add_argument("--sbd", type=Path, help="voc: SBD's folder; its train.txt and val.txt "
                        "make the 10,582 images of trainaug")
    parser.add_argument("--train-masks", action="store_true", help="coco: masks of train as well "
                        "as of val; only to score pseudo masks")
    parser.add_argument("--download", action="store_true", help="voc, coco: fetch the archives of "
                        "VOC 2012 and SBD, or of COCO 2014, first")
    return parser.parse_args(argv)


def main(args):
    if args.dataset == "toy":
        make_toy(args.root, args.num, args.cooccur)
    elif args.dataset == "coco":
        if args.download:
            download_coco(args.root)
        make_coco(args.root, args.train_masks)
    else:
        if args.download:
            args.sbd = args.sbd or args.root / "sbd"
            download_voc(args.root, args.sbd)
        make_voc(args.root, args.sbd)
    folder = Folder(args.root)
    splits = sorted((args.root / "ImageSets/Segmentation").glob("*.txt"))
    print(f"{args.root}: {len(folder.classes)} classes with background; "
          + ", ".join(f"{path.stem} {len(folder.ids(path.stem)):,}" for path in splits))


if __name__ == "__main__":
    run(main, parse_args())
