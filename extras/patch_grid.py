"""The patch-grid bound: the mIoU that perfect patch labels reach, so how much error is the grid's.

Run:    python extras/patch_grid.py --data data/toy --split val --sides 12 24 60
        python extras/patch_grid.py --data data/VOC2012 --split val --crf --crf-sxy 121 --crf-srgb 5
Prints: for each grid the mIoU of the ground truth, reduced to the grid and upsampled again as in
        Eq. (10): once as labels (each patch the class that covers most of it), once as shares (each
        patch the share of every class, what perfect and perfectly calibrated Y would be); with
        --crf also after the CRF
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Folder
from evaluate import confusion_matrix, miou
from make_pseudo import pseudo_masks
from support.crf import add_crf_flags, crf_settings
from support.files import UserError, progress
from support.flags import Flags
from support.masks import IGNORE, read_image, read_mask
from support.processes import launch, map_in_workers

KINDS = ("labels", "shares")


def parse_args(argv=None):
    """Which masks, which grids, which CRF."""
    flags = Flags(__doc__)
    flags.add("--data", None, "data set folder", type=Path)
    flags.add("--split", "val", "split whose ground truth is reduced")
    flags.add("--sides", [12, 24, 60], "patches along each side: 24 is training at 384, 60 "
              "inference at 960", nargs="+", low=1, high=10**4)
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


def reduced(folder, image_id, sides, crf):
    """One image's confusion matrices (sides, KINDS, before and after the CRF, C, C + 1)."""
    C = len(folder.classes)
    truth = read_mask(folder.mask_path(image_id), C)
    image = truth if crf is None else np.array(read_image(folder.image_path(image_id)))
    return np.stack([[[confusion_matrix(mask, truth, C) for mask in
                       pseudo_masks(image, *on_grid(truth, side, kind == "shares"), crf)]
                      for kind in KINDS] for side in sides])


def main(args):
    folder = Folder(args.data)
    ids = [i for i in folder.ids(args.split) if folder.mask_path(i).is_file()]
    if not ids:
        raise UserError(f"{args.data}/SegmentationClass has no mask of {args.split}")
    crf = crf_settings(args, torch.device("cpu"))
    jobs = [(folder, image_id, args.sides, crf) for image_id in ids]
    counts = sum(progress(map_in_workers(reduced, jobs, args.workers), args.split, len(ids)))
    print(f"patch-grid bound on {args.split} of {args.data}, {len(ids):,} images, mIoU %")
    for side, of_side in zip(args.sides, counts):
        for kind, of_kind in zip(KINDS, of_side):
            bound, *refined = (f"{100 * miou(confusion):5.1f}" for confusion in of_kind)
            print(f"{side:3d} x {side:<3d} patches   {kind} {bound}"
                  + "".join(f"   after the CRF {after}" for after in refined))


if __name__ == "__main__":
    launch(main, parse_args())
