"""The patch-grid bound: the mIoU that perfect patch labels reach, so how much error is the grid's.

Run:    python extras/patch_grid.py --data data/toy --split val --sides 12 24 60
        python extras/patch_grid.py --data data/VOC2012 --split val --crf --crf-sxy 121 --crf-srgb 5
Prints: for each grid the mIoU of the ground truth, reduced to the grid and upsampled again as in
        Eq. (10): once as labels (each patch the class that covers most of it), once as shares (each
        patch the share of every class, what perfect and perfectly calibrated Y would be); with
        --crf also after the CRF, and the classes that gained and lost most by it; with --boxes the
        floor: what a box in the middle reaches, which knows the image labels and no network
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import IGNORE, Folder, read_image, read_mask  # noqa: E402  the scripts are no package
from evaluate import confusion_matrix, iou_per_class, miou  # noqa: E402
from make_pseudo import pseudo_masks  # noqa: E402
from support.crf import add_crf_flags, crf_settings  # noqa: E402
from support.run import DataError, Flags, in_workers, launch, number, progress  # noqa: E402

KINDS = ("labels", "shares")


def parse_args(argv=None):
    """Which masks, which grids, which CRF."""
    flags = Flags(__doc__)
    flags.add("--data", None, "data set folder", type=Path)
    flags.add("--split", "val", "split whose ground truth is reduced")
    flags.add("--sides", [12, 24, 60], "patches along each side: 24 is training at 384, 60 "
              "inference at 960", nargs="+", low=1, high=10**4)
    flags.add("--boxes", None, "shares of width and height that a centred box covers, split from "
              "left to right among the image's classes", nargs="+", type=number(float, 0, 1))
    flags.add("--workers", 2, "processes", high=1024)
    add_crf_flags(flags.add, "none")
    return flags.parse(argv, needed=["data"])


def on_grid(mask, side, shares):
    """(H, W) uint8 -> its classes (P,) and what side x side patches show of them, (P, side, side).

    shares False: a patch has the one class that covers most of it; True: the area share of each.
    """
    classes = np.setdiff1d(mask, [IGNORE])
    if not len(classes):
        return np.zeros(1, np.uint8), torch.ones(1, side, side)
    planes = torch.from_numpy(mask[None] == classes[:, None, None]).float()
    patches = F.adaptive_avg_pool2d(planes, side)
    if not shares:
        patches = F.one_hot(patches.argmax(0), len(classes)).permute(2, 0, 1).float()
    return classes, patches


def reduced(folder, image_id, sides, boxes, crf):
    """One image's confusion matrices (sides, 2 kinds + boxes, before and after the CRF, C, C + 1).
    """
    C = len(folder.classes)
    truth = read_mask(folder.mask_path(image_id), C)
    image = truth if crf is None else np.array(read_image(folder.image_path(image_id)))
    known = [(truth, kind == "shares") for kind in KINDS]
    known += [(boxed(truth, folder.image_labels(image_id), share), False) for share in boxes]
    return np.stack([[[confusion_matrix(result, truth, C) for result in
                       pseudo_masks(image, *on_grid(mask, side, shares), crf)]
                      for mask, shares in known] for side in sides])


def boxed(truth, labels, share):
    """A mask like truth (H, W) from image labels (C,): see --boxes."""
    mask, classes = np.zeros_like(truth), labels.nonzero().flatten().tolist()
    edges = [round(side * (1 - share) / 2) for side in truth.shape]
    rows, columns = (np.arange(edge, side - edge) for edge, side in zip(edges, truth.shape))
    for c, strip in zip(classes[1:], np.array_split(columns, max(1, len(classes) - 1))):
        mask[rows[:, None], strip] = c
    return mask


def main(args):
    folder = Folder(args.data)
    ids = [i for i in folder.ids(args.split) if folder.mask_path(i).is_file()]
    if not ids:
        raise DataError(f"{args.data}/SegmentationClass has no mask of {args.split}")
    crf, boxes, counts = crf_settings(args, torch.device("cpu")), args.boxes or [], 0
    one = partial(reduced, folder, sides=args.sides, boxes=boxes, crf=crf)
    for of_image in progress(in_workers(one, [(i,) for i in ids], args.workers), args.split,
                             len(ids)):
        counts = counts + of_image
    print(f"patch-grid bound on {args.split} of {args.data}, {len(ids):,} images, mIoU %")
    for side, of_side in zip(args.sides, counts):
        bound = [f"{kind} {100 * miou(plain):5.1f}" for kind, (plain, *_) in zip(KINDS, of_side)]
        print("   ".join([f"{side:3d} x {side:<3d} patches", *bound]))
        for kind, (plain, *refined) in zip(KINDS, of_side):
            for after in refined:
                iou, new = 100 * iou_per_class(plain), 100 * iou_per_class(after)
                best, worst = (f"{folder.classes[c]} {iou[c]:.1f} to {new[c]:.1f}" for c in
                               (np.nanargmax(new - iou), np.nanargmin(new - iou)))
                print(f"    {kind} after the CRF {100 * miou(after):5.1f}   {best}   {worst}")
        for share, (plain, *refined) in zip(boxes, of_side[len(KINDS):]):
            after = "".join(f"   after the CRF {100 * miou(count):5.1f}" for count in refined)
            print(f"    a centred box of {share:g} of the sides {100 * miou(plain):5.1f}{after}")


if __name__ == "__main__":
    launch(main, parse_args())
