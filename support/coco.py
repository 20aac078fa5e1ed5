"""MS COCO 2014 as a data set folder: `python data.py coco` calls make_coco."""
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import IGNORE, save_mask
from support.run import DataError, write_folder_files, write_lines

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
