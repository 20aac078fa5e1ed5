"""Images and masks as files, and folders of masks that a killed run goes on with."""
import json
import shutil
import time
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageOps

from support.files import (UserError, atomic, first_file, lack, progress, read_text,
                           write_lines)
from support.processes import map_in_workers

IGNORE = 255  # the mask value that is never trained on and never scored


def mask_in(directory, image_id):
    """The path of an image's mask in a folder: ID.png, or ID.PNG if that is there."""
    return first_file(directory / f"{image_id}{end}" for end in (".png", ".PNG"))


def decode(path):
    """A PIL image as the file has it; one that cannot be read is named."""
    if not Path(path).is_file():
        raise UserError(f"{path} {'is a folder' if Path(path).is_dir() else 'not found'}")
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # on damaged files Pillow's decoders raise a dozen types
        if lack(error):
            raise
        reason = " ".join(f"{type(error).__name__} {error}".split())[:90]
        raise UserError(f"{path} cannot be read ({reason}): mend it, or take it out of the split")


def read_image(path):
    """A PIL image in RGB, upright; grey, CMYK and 16-bit files are converted."""
    image = decode(path)
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: the pixels are all right
        pass
    if image.mode == "F":
        raise UserError(f"{path} holds floating-point numbers: save it with 8 bits a channel")
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.array(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def read_mask(path, num_classes, size=None):
    """(H, W) uint8 from a palette or grey PNG; size: the (width, height) that it must have."""
    image = decode(path)
    if image.mode not in ("P", "L"):
        raise UserError(f"{path} is a {image.mode} image: a mask is a palette or grey PNG")
    if size is not None and image.size != tuple(size):
        turned = ": is the photo turned by its EXIF orientation?" * (image.size == size[::-1])
        raise UserError(f"{path} is %dx%d, its image %dx%d{turned}" % (*image.size, *size))
    mask = np.array(image)
    unknown = set(np.unique(mask).tolist()) - {*range(num_classes), IGNORE}
    if unknown:
        raise UserError(f"{path} has the value {min(unknown)}: allowed are 0 to {num_classes - 1} "
                        f"(the lines of classes.txt) and {IGNORE} (ignore)")
    return mask


@cache
def voc_palette():
    """(256, 3) uint8, VOC's: bits 0, 1, 2 of a number are the top bits of R, G, B, and so on."""
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


# --- folders of masks ------------------------------------------------------------------------
def read_settings(folder):
    """How the masks in a folder were made, as claim_folders() noted it; {} if it did not."""
    note = folder / "settings.json"
    try:
        return dict(json.loads(read_text(note))) if note.is_file() else {}
    except (ValueError, TypeError):
        raise UserError(f"{note} is damaged: delete it and the masks beside it")


def is_whole(*masks):
    """Whether each of an image's masks is there and can be read."""
    try:
        return all(decode(path) for path in masks)
    except UserError:
        return False


def unfinished(ids, outputs, workers=0,
               way_out="--overwrite replaces them, --run writes elsewhere"):
    """The ids without a whole mask in each directory of outputs {directory: settings of its masks}.

    Refuses to add to masks that were made with other settings, or nobody knows how; but the data
    may have moved since, if the labels are known.
    """
    for home, settings in outputs.items():
        old = read_settings(home)
        if "data" in old and "labels" in settings and not Path(old["data"]).exists():
            old["data"] = settings["data"]
        if any(home.glob("*.png")) and old != settings:
            raise UserError(f"{home} holds masks of other data, labels, weights or flags, or has "
                            f"no settings.json: {way_out}")
    jobs = ([home / f"{i}.png" for home in outputs] for i in ids)
    return [i for i, whole in zip(ids, map_in_workers(is_whole, jobs, workers)) if not whole]


def claim_folders(results, outputs, overwrite):
    """The same results; once the first exists, each folder of outputs notes its settings.

    With overwrite the masks there are deleted then, not before a mistake in the flags can show.
    """
    first = next(results, None)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for folder, settings in outputs.items():
            for path in folder.glob("*.png") if overwrite else ():
                path.unlink()
            write_lines(folder / "settings.json", [json.dumps(settings)])
    if dist.is_initialized():
        dist.barrier()
    yield from chain([] if first is None else [first], results)


def write_masks(results, ids, outputs, overwrite, crf, total):
    """Write results, the masks of each of ids, to the folders of outputs; say how many of total."""
    began, rank = time.time(), dist.get_rank() if dist.is_initialized() else 0
    results = progress(claim_folders(results, outputs, overwrite), "masks", len(ids), rank > 0)
    for masks, image_id in zip(results, ids):
        for folder, mask in zip(outputs, masks):
            save_mask(folder / f"{image_id}.png", mask)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        print(f"{len(ids):,} of {total:,} images{' of rank 0' * dist.is_initialized()} done now, "
              f"{time.time() - began:.0f} s, CRF: {crf['backend'] if crf else 'none'}, masks in "
              f"{' and '.join(map(str, outputs))}")


EXPORT = "results/VOC2012/Segmentation/comp6_test_cls"  # where VOC's server looks for ID.png


def export(run, split, ids, crf):
    """Copy RUN/pred to the layout that VOC's test server takes."""
    for path in (run / EXPORT).glob("*.png"):
        path.unlink()  # of another split
    for image_id in ids:
        with atomic(run / EXPORT / f"{image_id}.png") as temporary:
            shutil.copyfile(run / "pred" / f"{image_id}.png", temporary)
    print(f"written: {len(ids):,} masks of {split}, CRF: {'yes' if crf else 'no'}; upload the "
          f"archive of `tar czf results.tgz -C {run} results`")
