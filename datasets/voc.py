"""VOC 2012 and SBD as a data set folder: `python data.py voc` calls make_voc."""
import xml.etree.ElementTree as ElementTree

from datasets import write_folder
from support.files import UserError, first_file, progress, read_text, write_lines
from support.names import line_id, without_ending

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable "
               "dog horse motorbike person pottedplant sheep sofa train tvmonitor").split()
VOC_SUPERCLASSES = ["person person", "animal bird cat cow dog horse sheep",
                    "vehicle aeroplane bicycle boat bus car motorbike train",
                    "indoor bottle chair diningtable pottedplant sofa tvmonitor"]
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
        raise UserError(f"the download failed ({error}): unpack VOCtrainval_11-May-2012.tar so "
                        f"that {root}/Annotations exists, and SBD's benchmark.tgz in {sbd}")


def object_names(path):
    """{names of the objects} of an XML file as VOC's, "difficult" included; {*}: any namespace."""
    try:
        objects = ElementTree.parse(path).getroot().findall(".//{*}object")
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise UserError(f"{path} cannot be read ({error}): save it as UTF-8, or delete it")
    return {thing.findtext("{*}name") for thing in objects}


def read_ids(path):
    """The ids of a split list that an archive brings."""
    if not path.is_file():
        raise UserError(f"{path} not found: unpack VOC (and SBD) there, or pass --download")
    lines = enumerate(read_text(path).splitlines(), 1)
    return [without_ending(line_id(line, f"{path}, line {k}")) for k, line in lines if line.strip()]


def make_voc(root, sbd=None, download=False, counts=VOC_COUNTS):
    """Turn an unpacked VOC 2012 (and SBD's two lists, if sbd is given) into a data set folder."""
    if download:
        sbd = sbd or root / "sbd"
        download_voc(root, sbd)
    home = lists = root / "ImageSets/Segmentation"
    splits = {name: read_ids(lists / f"{name}.txt") for name in ("train", "val")}
    aug = first_file([lists / "trainaug.txt", lists / "train_aug.txt"])
    if sbd is None and aug.is_file():
        splits["trainaug"] = read_ids(aug)
    elif sbd is not None:
        home = next((p.parent for p in sorted(sbd.rglob("val.txt"))), sbd)
        extra = read_ids(home / "train.txt") + read_ids(home / "val.txt")
        splits["trainaug"] = sorted({*splits["train"], *extra} - {*splits["val"]})
    for name, ids in splits.items():
        if len(ids) != counts[name]:
            raise UserError(f"{name} has {len(ids)} images, expected {counts[name]}: are {root} "
                            f"and {home} complete? Other data: python data.py labels --root {root}")
    label_lines = []
    for image_id in progress(sorted(set().union(*splits.values())), desc="labels"):
        path = root / "Annotations" / f"{image_id}.xml"
        names = object_names(path)
        if not names or names - {*VOC_CLASSES}:
            raise UserError(f"{path} names {names - {*VOC_CLASSES} or 'no object'}: not VOC's")
        label_lines.append(" ".join([image_id, *sorted(names, key=VOC_CLASSES.index)]))
    if "trainaug" in splits:
        write_lines(lists / "trainaug.txt", splits["trainaug"])
    else:
        print(f"without --sbd: training will use the {len(splits['train']):,} images of train")
    write_lines(root / "superclasses.txt", VOC_SUPERCLASSES)
    write_folder(root, "voc", VOC_CLASSES, label_lines)
