"""Image labels for one's own data, from what is there: `python data.py labels` calls make_labels.

Annotations/ID.xml (as VOC's), else annotations/*.json (as COCO's instances), else the masks of
SegmentationClass/. Boxes and instances bring the names of the classes; masks bring numbers, and
classes.txt must say what they mean.
"""
import json
from collections import Counter
from pathlib import PurePosixPath

import numpy as np

from data import Folder
from datasets.voc import object_names
from support.files import UserError, progress, read_text, write_lines
from support.masks import IGNORE, read_mask
from support.names import ENDINGS, check_classes, without_ending

SOURCES = {"Annotations": ".xml", "annotations": ".json", "SegmentationClass": ".png"}


def one_word(name):
    """A class's name without spaces, which classes.txt does not allow."""
    return "_".join(str(name or "").split())


def files_of(root, source):
    """{name without its ending: path} of a source's files, whatever case their ending has."""
    return {path.stem: path for path in sorted((root / source).glob("*"))
            if path.suffix.lower() == SOURCES[source]}


def from_xml(root, ids):
    """({id: names}, all names in order) of the files of Annotations/."""
    labels, paths = {}, files_of(root, "Annotations")
    for image_id in progress([i for i in ids if i in paths], desc="labels"):
        labels[image_id] = {one_word(name) for name in object_names(paths[image_id])}
        if "" in labels[image_id]:
            raise UserError(f"{paths[image_id]} has an object without a name: mend or delete it")
    return labels, sorted(set().union(*labels.values()) - {"background"})


def from_json(root, ids):
    """The same of all files of annotations/ that hold instances as COCO's do."""
    labels, classes, known, file_of = {}, {}, {*ids}, {}
    for path in files_of(root, "annotations").values():
        try:
            content = json.loads(read_text(path))
            if {"images", "annotations", "categories"} - {*content} or any(
                    "category_id" not in thing for thing in content["annotations"]):
                continue  # captions, panoptic segments, a list of licences
            names = {kind["id"]: one_word(kind["name"]) for kind in content["categories"]}
            images = {image["id"]: image["file_name"].replace("\\", "/")
                      for image in content["images"]}
            for name in images.values():
                image_id = PurePosixPath(name).stem
                if image_id in known and file_of.setdefault(image_id, name) != name:
                    raise UserError(f"{path} names {name} and {file_of[image_id]}: two images "
                                    "cannot share a name in JPEGImages/")
                if image_id in known:
                    labels.setdefault(image_id, set())
            for thing in content["annotations"]:  # of an image that is not listed: left out
                image_id = PurePosixPath(images.get(thing["image_id"], "")).stem
                if image_id in known:
                    labels[image_id].add(names[thing["category_id"]])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no file of COCO instances ({type(error).__name__}: {error})"
                            ": mend it, or move it away")
        classes |= dict.fromkeys(names[number] for number in sorted(names))
    return labels, [name for name in classes if name != "background"]


def from_masks(root, ids, classes):
    """{id: numbers of the object classes} of the masks there are."""
    paths = files_of(root, "SegmentationClass")
    return {image_id: {*np.unique(read_mask(paths[image_id], len(classes))).tolist()} - {0, IGNORE}
            for image_id in progress([i for i in ids if i in paths], desc="masks")}


def image_ids(root):
    """The names of JPEGImages/, without their endings."""
    ids = sorted({without_ending(path.name) for path in (root / "JPEGImages").glob("*")
                  if path.name.endswith(ENDINGS)})
    if not ids:
        raise UserError(f"{root}/JPEGImages has no .jpg, .jpeg or .png: put the images there")
    spaced = [image_id for image_id in ids if len(image_id.split()) > 1]
    if spaced:
        raise UserError(f"{root}/JPEGImages: {spaced[0]!r} has a blank, as have "
                        f"{len(spaced) - 1} more: rename them")
    return ids


def make_labels(root):
    """Write ROOT/image_labels.txt, and classes.txt where annotations bring the names."""
    out, listed = root / "image_labels.txt", root / "classes.txt"
    if out.exists():
        raise UserError(f"{out} is there already: move it away to have it made anew")
    ids = image_ids(root)
    source = next((name for name in SOURCES if files_of(root, name)), None)
    if source is None:
        raise UserError(f"{root} has no Annotations/*.xml, annotations/*.json or "
                        "SegmentationClass/*.png: image labels come from one of them")
    named, names = {}, []
    if source != "SegmentationClass":
        named, names = {"Annotations": from_xml, "annotations": from_json}[source](root, ids)
    elif not listed.exists():
        raise UserError(f"{listed} not found: masks are numbers; write one name a line, background "
                        "first, in the order of the numbers")
    classes = Folder(root).classes if listed.exists() else ["background", *names]
    check_classes(classes, f"{root}/{source}")
    strange = sorted({*names} - {*classes})
    if strange:
        raise UserError(f"{listed} does not have {', '.join(strange[:5])}, which {source}/ names: "
                        "add it, or delete classes.txt to have it written")
    masks = from_masks(root, ids, classes)
    if source == "SegmentationClass":
        named = {image_id: {classes[k] for k in numbers} for image_id, numbers in masks.items()}
    named = {image_id: of - {"background"} for image_id, of in named.items()}
    if not any(named.values()):
        raise UserError(f"{root}/{source} names no object on any image of {root}/JPEGImages: are "
                        "the files' names the same, and is it laid out as VOC's or COCO's are?")
    if not listed.exists():
        write_lines(listed, classes)
    write_lines(out, [" ".join([image_id, *(sorted(of, key=classes.index) or ["background"])])
                      for image_id, of in sorted(named.items())])
    tell(root, source, classes, ids, named, masks)


def tell(root, source, classes, ids, named, masks):
    """Print how often each class was found; whether masks and names agree on the numbers."""
    by_name = Counter(name for of in named.values() for name in of)
    by_mask = Counter(k for numbers in masks.values() for k in numbers)
    both = bool(masks) and source != "SegmentationClass"
    print("number  class                     images" + "  with it in their mask" * both)
    for k, name in enumerate(classes[1:], 1):
        print(f"{k:6d}  {name:24s}  {by_name[name]:6,}" + f"  {by_mask[k]:6,}" * both)
    print(f"{root}/image_labels.txt, from {source}/: {len(named):,} of {len(ids):,} images, "
          f"{sum(not of for of in named.values()):,} of them show no object")
    if len(named) < len(ids):
        print(f"note: {min({*ids} - {*named})} and {len(ids) - len(named) - 1:,} more have nothing "
              f"in {source}/, and so no label: leave them out of the splits")
    odd = [image_id for image_id in masks if image_id in named
           and not {classes[k] for k in masks[image_id]} <= named[image_id]]
    if odd:
        print(f"note: the masks of {len(odd):,} of {len(masks):,} images, as {odd[0]}, hold a "
              f"class that {source}/ does not name: are they numbered as in classes.txt?")
