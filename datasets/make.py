"""The command of data.py: `python data.py toy|voc|coco|labels --root DIR`."""
import argparse
from importlib import import_module
from pathlib import Path

import data
from support.files import UserError
from support.flags import number


def parse_args(argv=None):
    """`toy`, `voc`, `coco` or `labels`, and where to."""
    parser = argparse.ArgumentParser(description=data.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("dataset", choices=("toy", "voc", "coco", "labels"))
    add("--root", type=Path, required=True, help="the data set folder")
    add("--num", type=number(int, 1, 99999), nargs=3, default=(1500, 200, 200), metavar="N",
        help="toy: images of train, val and test (default: 1500 200 200)")
    add("--cooccur", type=number(float, 0, 1), metavar="P",
        help="toy: probability that the background suits the first beetle's pattern")
    add("--sbd", type=Path, help="voc: SBD's folder; its train.txt and val.txt make trainaug")
    add("--train-masks", action="store_true", help="coco: masks of train, too, to score")
    add("--download", action="store_true", help="voc, coco: fetch the archives first")
    return parser.parse_args(argv)


def main(args):
    maker, make, *options = {
        "toy": ("beetles", "make_toy", args.num, args.cooccur),
        "voc": ("voc", "make_voc", args.sbd, args.download),
        "coco": ("coco", "make_coco", args.train_masks, args.download),
        "labels": ("labels", "make_labels")}[args.dataset]
    try:
        make = getattr(import_module(f"datasets.{maker}"), make)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install -r datasets/requirements.txt")
    make(args.root, *options)
    folder = data.Folder(args.root)
    splits = sorted((args.root / "ImageSets/Segmentation").glob("*.txt"))
    print(f"{args.root}: {len(folder.classes)} classes with background; "
          + (", ".join(f"{path.stem} {len(folder.ids(path.stem)):,}" for path in splits)
             or f"no split yet: write {args.root}/ImageSets/Segmentation/train.txt, one ID a line"))
