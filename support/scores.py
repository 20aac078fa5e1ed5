"""Average precision, boundary IoU, and notes on what may be wrong about a score."""
import math

import numpy as np
import torch

from support.masks import IGNORE, mask_in, read_mask
from support.processes import map_in_workers

BOUNDARY = 0.02  # of the image's diagonal: how far from a contour its region reaches


def mean_average_precision(scores, labels):
    """Mean over the object classes that occur of their average precision; (n, C) each."""
    occurs = [c for c in range(1, labels.shape[1]) if labels[:, c].any()]
    found = [average_precision(scores[:, c], labels[:, c]) for c in occurs]
    return sum(found) / len(found) if found else None


def average_precision(scores, labels):
    """Area under precision over recall: the mean, over the images that show the class, of the
    precision among all that score as high as it does; scores (n,), labels (n,).
    """
    every, positive = scores.sort().values, scores[labels > 0].sort().values
    hits, kept = (len(of) - torch.searchsorted(of, positive) for of in (positive, every))
    return (hits / kept).double().mean().item()


def boundary_region(mask, label):
    """(H, W) bool: the pixels of a class no further than BOUNDARY from where the class ends."""
    inside, reach = mask == label, max(1, round(BOUNDARY * math.hypot(*mask.shape)))
    near = np.pad(~inside, reach, constant_values=True)  # the class ends at the image's border
    for _ in range(2):  # along columns, then along rows: is any of 2 reach + 1 pixels outside?
        count = np.pad(near.cumsum(axis=0, dtype=np.int32), ((1, 0), (0, 0)))
        near = (count[2 * reach + 1:] > count[:-2 * reach - 1]).T
    return inside & near


def boundary_counts(folder, image_id, directory):
    """(3, C) int64 of an image: pixels of the regions of prediction and truth that lie in both, in
    either, and in the truth's.
    """
    C = len(folder.classes)
    truth = read_mask(folder.mask_path(image_id), C)
    mask = read_mask(mask_in(directory, image_id), C, truth.shape[::-1])
    mask = np.where(truth == IGNORE, IGNORE, mask)
    counts = np.zeros((3, C), np.int64)
    for label in {*np.unique([mask, truth]).tolist()} - {IGNORE}:
        ours, true = boundary_region(mask, label), boundary_region(truth, label)
        counts[:, label] = (ours & true).sum(), (ours | true).sum(), true.sum()
    return counts


def boundary_iou(folder, ids, directory, workers=0):
    """(C,) float64: each class's IoU of boundary regions (Cheng et al., CVPR 2021) over all images.

    It judges contours, which large objects hide in mIoU. Pixels whose truth is 255 belong to no
    class on either side; NaN for a class that the truth does not hold.
    """
    jobs = [(folder, i, directory) for i in ids if folder.mask_path(i).is_file()]
    none = np.zeros((3, len(folder.classes)), np.int64)
    both, either, true = sum(map_in_workers(boundary_counts, jobs, workers), none)
    return np.where(true > 0, both / np.maximum(either, 1), np.nan)


def note_shared(ids, val_ids):
    """Say how many images a score would be over that were trained on."""
    shared = len({*ids} & {*val_ids})
    if shared:
        print(f"note: {shared:,} of {len(val_ids):,} images of val are trained on as well: its "
              "score is too good")


def note_truth(folder, missing, confusion, about):
    """Say in a line each what about a score may be other than it seems."""
    where, n, known = folder.root / "SegmentationClass", about["num_images"], about["compared"]
    if missing:
        print(f"note: {len(missing):,} of {len(missing) + n:,} images are not scored: {where} has "
              f"no {min(missing)}.png")
    if not confusion[1:].any() and (about["lacking"] or not known):
        print(f"note: no class but background occurs in {where}: are its objects 255, or is it of "
              "other images?")
    elif not known:
        print(f"note: image_labels.txt has none of the {n:,} images: truth and labels are not "
              "compared")
    elif about["unnamed"] or about["lacking"]:
        print(f"note: the truth of {about['unnamed']:,} of {known:,} images holds a class that "
              f"their line in image_labels.txt does not name, {about['lacking']:,} lack one that "
              "it names: are the masks numbered as in classes.txt?")
