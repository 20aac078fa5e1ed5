"""The patch-grid bound: the mIoU that perfect patch labels reach, so how much error is the grid's.

Run:    python extras/patch_grid.py --data data/toy --split val --sides 12 24 60
Prints: for each grid the mIoU of the ground truth, reduced to the grid and upsampled again as in
        Eq. (10): once as labels (each patch the class that covers most of it), once as shares (each
        patch the share of every class, what perfect and perfectly calibrated Y would be)
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import IGNORE, Folder, read_mask  # noqa: E402  the scripts are no package
from evaluate import confusion_matrix, miou  # noqa: E402
from model import upsample  # noqa: E402
from support.run import DataError, launch, number, progress  # noqa: E402


def parse_args(argv=None):
    """Which masks, which grids."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="data set folder")
    parser.add_argument("--split", default="val", help="split whose ground truth is reduced")
    parser.add_argument("--sides", type=number(int, 1, 10**4), nargs="+", default=[12, 24, 60],
                        help="patches along each side: 24 is training at 384, 60 inference at 960")
    return parser.parse_args(argv)


def through_grid(mask, side, shares):
    """(H, W) uint8 -> what is left of it after side x side patches, (H, W) uint8, never 255.

    shares False: a patch has the one class that covers most of it; True: the area share of each.
    """
    classes = np.setdiff1d(mask, [IGNORE])
    if not len(classes):
        return np.zeros_like(mask)
    planes = torch.from_numpy(mask[None] == classes[:, None, None]).float()
    patches = F.adaptive_avg_pool2d(planes, side)  # (classes, side, side)
    if not shares:
        patches = F.one_hot(patches.argmax(0), len(classes)).permute(2, 0, 1).float()
    return classes[upsample(patches, *mask.shape).argmax(0).numpy()]


def main(args):
    folder = Folder(args.data)
    C = len(folder.classes)
    ids = [i for i in folder.ids(args.split) if folder.mask_path(i).is_file()]
    if not ids:
        raise DataError(f"{args.data}/SegmentationClass has no mask of {args.split}")
    confusion = np.zeros((len(args.sides), 2, C, C + 1), np.int64)
    for image_id in progress(ids, args.split):
        truth = read_mask(folder.mask_path(image_id), C)
        for counts, side in zip(confusion, args.sides):
            for shares in (False, True):
                guess = through_grid(truth, side, shares)
                counts[int(shares)] += confusion_matrix(guess, truth, C)
    print(f"patch-grid bound on {args.split} of {args.data}, {len(ids):,} images, mIoU %")
    for side, counts in zip(args.sides, confusion):
        labels, shares = (100 * miou(c) for c in counts)
        print(f"{side:3d} x {side:<3d} patches   labels {labels:5.1f}   shares {shares:5.1f}")


if __name__ == "__main__":
    launch(main, parse_args())
