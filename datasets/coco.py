"""MS COCO 2014 as a data set folder: `python data.py coco` calls make_coco."""
import os
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from datasets import write_folder
from support.files import UserError, atomic, progress, write_lines
from support.masks import IGNORE, save_mask

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
            raise UserError(f"the download failed ({error}): unpack {url} in {root} by hand")
        done.touch()


def read_coco(path):
    """pycocotools' index of an instances file."""
    if not path.is_file():
        raise UserError(f"{path} not found: unpack annotations_trainval2014.zip, or --download")
    try:
        coco = COCO(path)
        for thing in coco.anns.values():
            coco.imgs[thing["image_id"]], coco.cats[thing["category_id"]]["supercategory"]
            thing["segmentation"], thing["area"], thing["iscrowd"]
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no COCO instances file ({type(error).__name__}: {error})")
    return coco


def coco_mask(coco, image_id, numbers):
    """(H, W) uint8 of an image's objects; numbers {class id: number}.

    Crowds are 255, at the bottom; then come the instances, the largest first: the small are seen.
    """
    image = coco.imgs[image_id]
    mask = np.zeros((image["height"], image["width"]), np.uint8)
    for thing in sorted(coco.imgToAnns[image_id], key=lambda t: (not t["iscrowd"], -t["area"])):
        shape = thing["segmentation"]
        if isinstance(shape, list):  # pycocotools takes four numbers for a box, less for an error
            shape = [polygon for polygon in shape if len(polygon) >= 6]
            if not shape:
                continue
        drawn = coco.annToMask(thing | {"segmentation": shape})
        if drawn.shape != mask.shape:
            raise UserError(f"image {image_id} is {mask.shape}, the size of its RLE {drawn.shape}")
        mask[drawn > 0] = IGNORE if thing["iscrowd"] else numbers[thing["category_id"]]
    return mask


def link_image(source, link):
    """Make link a relative symbolic link to source, which must exist."""
    if not source.is_file():
        raise UserError(f"{source} not found: unpack {source.parent.name}.zip again")
    with atomic(link) as temporary:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(source.resolve(), link.parent.resolve()))


def make_coco(root, train_masks=False, download=False, counts=COCO_COUNTS):
    """Turn COCO 2014's official layout into a data set folder, with masks of val (and of train).

    Image labels are the classes of all annotations, crowds too; images without any are left out.
    """
    label_lines = []
    if download:
        download_coco(root)
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}2014.json"
        coco = read_coco(path)
        with_object = sorted({thing["image_id"] for thing in coco.anns.values()})
        found = len(coco.imgs), len(with_object)
        if found != counts[split]:
            raise UserError(f"{path} has %d images, %d with an object; expected %d and %d: is it "
                            "COCO 2014's? Other data: python data.py labels --root %s"
                            % (*found, *counts[split], root))
        names = {i: coco.cats[i]["name"].replace(" ", "_") for i in sorted(coco.cats)}
        numbers, ids = {class_id: number for number, class_id in enumerate(names, 1)}, []
        for image_id in progress(with_object, desc=split):
            name = coco.imgs[image_id]["file_name"]
            ids.append(Path(name).stem)
            link_image(root / f"{split}2014" / name, root / "JPEGImages" / f"{ids[-1]}.jpg")
            present = sorted({thing["category_id"] for thing in coco.imgToAnns[image_id]})
            label_lines.append(" ".join([ids[-1], *(names[i] for i in present)]))
            if train_masks or split == "val":
                mask = coco_mask(coco, image_id, numbers)
                save_mask(root / "SegmentationClass" / f"{ids[-1]}.png", mask)
        write_lines(root / f"ImageSets/Segmentation/{split}.txt", ids)
        print(f"{split}: {found[0]:,} images, {found[1]:,} with an object")
    kinds = {}
    for class_id, name in names.items():
        kinds.setdefault(coco.cats[class_id]["supercategory"], []).append(name)
    write_lines(root / "superclasses.txt", [" ".join([kind, *kinds[kind]]) for kind in kinds])
    write_folder(root, "coco", ["background", *names.values()], label_lines)
