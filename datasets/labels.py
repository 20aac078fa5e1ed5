"""Image labels for one's own data, from what is there: `python data.py labels` calls make_labels.

Annotations/ID.xml (as VOC's), else annotations/*.json (as COCO's instances), else the masks of
SegmentationClass/. Boxes and polygons bring their classes' names; masks bring numbers, and
classes.txt must say what they mean.
"""
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import numpy as np

from data import IGNORE, Folder, mask_in, read_mask
from support.run import DataError, progress, read_text, write_lines

ENDINGS = (".jpg", ".jpeg", ".png")
SOURCES = {"Annotations": ".xml", "annotations": ".json", "SegmentationClass": ".png"}


def one_word(name):
    """A class's name without spaces, which classes.txt does not allow."""
    return "_".join(str(name).split())


def from_xml(root, ids):
    """({id: names}, all names in order) of the files of Annotations/."""
    labels = {}
    for image_id in progress(ids, desc="labels"):
        path = root / "Annotations" / f"{image_id}.xml"
        if path.is_file():
            try:
                objects = ElementTree.parse(path).iter("object")
                labels[image_id] = {one_word(thing.findtext("name") or "") for thing in objects}
            except (OSError, ElementTree.ParseError) as error:
                raise DataError(f"{path} cannot be read ({error}): mend it, or delete it")
            if "" in labels[image_id]:
                raise DataError(f"{path} has an object without a name: mend it, or delete it")
    return labels, sorted(set().union(*labels.values()) - {"background"})


def from_json(root, ids):
    """The same of all files of annotations/*.json that list images, annotations and categories."""
    labels, classes, known = {}, {}, {*ids}
    for path in sorted((root / "annotations").glob("*.json")):
        try:
            content = json.loads(read_text(path))
            if {"images", "annotations", "categories"} - {*content}:
                continue  # captions, keypoints of nothing, a list of licences
            names = {kind["id"]: one_word(kind["name"]) for kind in content["categories"]}
            images = {image["id"]: Path(image["file_name"]).stem for image in content["images"]}
            for image_id in {*images.values()} & known:
                labels.setdefault(image_id, set())
            for thing in content["annotations"]:
                image_id = images[thing["image_id"]]
                if image_id in known:
                    labels[image_id].add(names[thing["category_id"]])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no file of COCO instances ({type(error).__name__}: {error})"
                            ": mend it, or move it away")
        classes |= dict.fromkeys(names[number] for number in sorted(names))
    return labels, [name for name in classes if name != "background"]


def from_masks(root, ids, classes):
    """{id: numbers of the object classes} of the masks there are."""
    paths = {image_id: mask_in(root / "SegmentationClass", image_id) for image_id in ids}
    return {image_id: {*np.unique(read_mask(path, len(classes))).tolist()} - {0, IGNORE}
            for image_id, path in progress(paths.items(), desc="masks") if path.is_file()}


def image_ids(root):
    """The names of JPEGImages/, without their endings."""
    ids = sorted({path.stem for path in (root / "JPEGImages").glob("*")
                  if path.suffix.lower() in ENDINGS})
    if not ids:
        raise DataError(f"{root}/JPEGImages has no .jpg, .jpeg or .png: put the images there")
    spaced = [image_id for image_id in ids if len(image_id.split()) > 1]
    if spaced:
        raise DataError(f"{root}/JPEGImages: {spaced[0]!r} has a blank, as have "
                        f"{len(spaced) - 1} more: rename them")
    return ids


def make_labels(root):
    """Write ROOT/image_labels.txt, and classes.txt where annotations bring the names."""
    out, listed = root / "image_labels.txt", root / "classes.txt"
    if out.exists():
        raise DataError(f"{out} is there already: move it away to have it made anew")
    ids = image_ids(root)
    source = next((name for name, ending in SOURCES.items() if any(
        path.suffix.lower() == ending for path in (root / name).glob("*"))), None)
    if source is None:
        raise DataError(f"{root} has no Annotations/*.xml, annotations/*.json or "
                        "SegmentationClass/*.png: image labels come from one of them")
    named, names = {}, []
    if source != "SegmentationClass":
        named, names = {"Annotations": from_xml, "annotations": from_json}[source](root, ids)
        if not listed.exists():
            write_lines(listed, ["background", *names])
    elif not listed.exists():
        raise DataError(f"{listed} not found: masks are numbers; write one name a line, background "
                        "first, in the order of the numbers")
    classes = Folder(root).classes
    strange = sorted({*names} - {*classes})
    if strange:
        raise DataError(f"{listed} does not have {', '.join(strange[:5])}, which {source}/ names: "
                        "add it, or delete classes.txt to have it written")
    masks = from_masks(root, ids, classes)
    if source == "SegmentationClass":
        named = {image_id: {classes[k] for k in numbers} for image_id, numbers in masks.items()}
    if not named:
        raise DataError(f"{root}/{source} says nothing of the images of {root}/JPEGImages: are the "
                        "names the same?")
    named = {image_id: of - {"background"} for image_id, of in named.items()}
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
