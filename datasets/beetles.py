"""The generated data set "beetles".

A beetle's class is the pair (pattern of its body, colour of its head): neither a body patch nor a
head patch alone tells the class, so context has to carry it from one to the other (Sec. 0.3.3).
"""
import math

import numpy as np
from PIL import Image

from datasets import write_folder
from support.files import UserError, atomic, progress, read_text, write_lines
from support.masks import IGNORE, mask_in, read_mask, save_mask

TOY_SIZE = 96  # pixels a side
Y, X = np.mgrid[:TOY_SIZE, :TOY_SIZE]
TOY_SEED = 2601_14718
PATTERNS = ("vertical", "horizontal", "checks", "diagonal")
HEADS = {"red": (200, 45, 40), "green": (45, 165, 60)}
TOY_CLASSES = ["background", *(f"{pattern}_{head}" for pattern in PATTERNS for head in HEADS)]
MIN_VISIBLE = 30  # pixels; a beetle that shows fewer is not labelled, and 255 in the mask
TEXTURES = ("dots", "rings", "bricks", "zigzag")  # of backgrounds, with --cooccur


def toy_background(rng):
    """(96, 96, 3) float64 in [0, 255]: random colours on a random coarse grid, smoothed."""
    cells = rng.integers(3, 25)
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
    return np.array(grid.resize((TOY_SIZE, TOY_SIZE), Image.Resampling.BICUBIC), dtype=float)


def toy_pattern(pattern, rng):
    """(96, 96) bool: stripes or checks of a period of 6 to 8 pixels at a random phase."""
    period, phase_x, phase_y = rng.uniform(6, 8), rng.uniform(0, 8), rng.uniform(0, 8)
    vertical = (X + phase_x) / period % 1 < 0.5
    horizontal = (Y + phase_y) / period % 1 < 0.5
    diagonal = ((X + Y) / math.sqrt(2) + phase_x) / period % 1 < 0.5
    return {"vertical": vertical, "horizontal": horizontal, "checks": vertical ^ horizontal,
            "diagonal": diagonal}[pattern]


def toy_texture(texture, rng):
    """(96, 96) bool: one of TEXTURES at a random phase, period about 12 pixels; no body has it."""
    y, x = [Y, X] + rng.uniform(0, 12, (2, 1, 1))
    return {"dots": (x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 14,
            "rings": np.hypot(x % 48 - 24, y % 48 - 24) % 12 < 4,
            "bricks": (y % 6 < 1.5) | ((x + y // 6 % 2 * 6) % 12 < 1.5),
            "zigzag": (y + abs(x % 12 - 6)) % 12 < 4}[texture]


def toy_shape(rng):
    """Two (96, 96) bool: an elliptic body and a disc head that overlaps one end of it."""
    centre_x, centre_y = rng.uniform(16, TOY_SIZE - 16, 2)
    long = rng.uniform(14, 24)  # half axes in pixels
    short, tilt = long * rng.uniform(0.5, 0.8), rng.uniform(0, 2 * math.pi)
    along = (X - centre_x) * math.cos(tilt) + (Y - centre_y) * math.sin(tilt)
    across = (Y - centre_y) * math.cos(tilt) - (X - centre_x) * math.sin(tilt)
    body = (along / long) ** 2 + (across / short) ** 2 <= 1
    head = (along - long) ** 2 + across ** 2 <= (short * rng.uniform(0.55, 0.75)) ** 2
    return body, head


def toy_scene(split, index, cooccur=None):
    """Scene `index` of split 0, 1 or 2: image (96, 96, 3), mask and parts (96, 96), all uint8.

    cooccur None: plain backgrounds. Else the probability of the texture that the first beetle's
    class prefers, otherwise any of the four. The beetles are the same for every value.
    """
    shapes, colours, places = (np.random.default_rng([TOY_SEED, split, index, use])
                               for use in range(3))
    image = toy_background(colours)
    mask, parts, owner = (np.zeros((TOY_SIZE, TOY_SIZE), np.uint8) for _ in range(3))
    labels = shapes.choice(len(TOY_CLASSES) - 1, size=shapes.integers(1, 4), replace=False) + 1
    if cooccur is not None:
        favoured, texture = places.random() < cooccur, places.integers(len(TEXTURES))
        if favoured:  # as rails tell a train: the background tells the pattern, never the head
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
    note, label_lines = root / "cooccur.txt", []
    made = read_text(note).strip() if note.is_file() else "None"
    if (root / "JPEGImages").is_dir() and made != str(cooccur):
        raise UserError(f"{root} holds beetles of another --cooccur: choose another --root")
    write_lines(note, [cooccur])
    for split, (name, count) in enumerate(zip(("train", "val", "test"), num)):
        ids = [f"{name}_{index:05d}" for index in range(count)]
        for index, image_id in enumerate(progress(ids, desc=name)):
            image, mask, parts = toy_scene(split, index, cooccur)
            with atomic(root / "JPEGImages" / f"{image_id}.jpg") as temporary:
                Image.fromarray(image).save(temporary, format="JPEG", quality=95)
            save_mask(root / "SegmentationClass" / f"{image_id}.png", mask)
            save_mask(root / "Parts" / f"{image_id}.png", parts)
            present = np.setdiff1d(mask, [0, IGNORE])
            label_lines.append(" ".join([image_id, *(TOY_CLASSES[label] for label in present)]))
        write_lines(root / "ImageSets/Segmentation" / f"{name}.txt", ids)
    write_lines(root / "Parts/names.txt", ["body", "head"])
    write_lines(root / "superclasses.txt", [
        " ".join([pattern, *(name for name in TOY_CLASSES if name.startswith(pattern))])
        for pattern in PATTERNS])
    write_folder(root, "toy", TOY_CLASSES, label_lines)


def part_recall(folder, ids, directory):
    """{part name: share of its pixels whose prediction is the true class}, from Parts/."""
    names = read_text(folder.root / "Parts/names.txt").split()
    found, total = np.zeros(len(names) + 1), np.zeros(len(names) + 1)
    for image_id in (i for i in ids if folder.mask_path(i).is_file()):
        truth = read_mask(folder.mask_path(image_id), len(folder.classes))
        mask = read_mask(mask_in(directory, image_id), len(folder.classes))
        parts = read_mask(folder.root / "Parts" / f"{image_id}.png", len(names) + 1,
                          truth.shape[::-1])
        total += np.bincount(parts.ravel(), minlength=len(total))
        found += np.bincount(parts[mask == truth], minlength=len(total))
    return {name: found[i] / max(total[i], 1) for i, name in enumerate(names, 1)}
