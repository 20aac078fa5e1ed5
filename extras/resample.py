"""Is a gain more than luck of the images? A bootstrap over the images and seeds of two variants.

Run:    python extras/resample.py A B --data data/toy --split test --masks pseudo
        with A and B folders of study.py: runs/study/toy/context_none, runs/study/toy/default
Prints: the mean mIoU of both over the seeds that both have, B's gain, its 95 % interval over
        images (the same for A and B) and over images and seeds: percentiles of 2,000 resamples
An interval over seeds alone says what another run gives on these images; of other images it says
nothing (B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993).
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Folder
from evaluate import confusion_of, miou
from support.files import UserError
from support.processes import launch


def parse_args(argv=None):
    """Which masks to compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", type=Path, nargs=2, help="two folders with a run of each seed, sSEED, in them")
    add("--data", type=Path, required=True, help="data set folder")
    add("--split", default="val", help="whose masks these are")
    add("--masks", default="bpm", help="the folder in each run: bpm, pseudo or pred")
    return parser.parse_args(argv)


def intervals(first, second, draws=2000):
    """((low, high) over images, (low, high) over images and seeds) of the gain in mIoU, in %.

    first, second: confusion matrices (seeds, images, C, C + 1) of the same seeds and images.
    """
    seeds, n = first.shape[:2]
    random, gains = np.random.default_rng(0), np.empty((draws, seeds))
    for draw in range(draws):
        times = np.bincount(random.integers(n, size=n), minlength=n)  # how often each image is in
        gains[draw] = [100 * (miou(np.tensordot(times, b, 1)) - miou(np.tensordot(times, a, 1)))
                       for a, b in zip(first, second)]
    of_seeds = np.take_along_axis(gains, random.integers(seeds, size=gains.shape), axis=1)
    return [np.percentile(values.mean(axis=1), (2.5, 97.5)) for values in (gains, of_seeds)]


def main(args):
    folder = Folder(args.data)
    ids = [i for i in folder.ids(args.split) if folder.mask_path(i).is_file()]
    seeds = sorted(path.name for path in args.runs[0].glob("s[0-9]*")
                   if (args.runs[1] / path.name / args.masks).is_dir())
    if not seeds or not ids:
        raise UserError(f"{args.runs[0]} and {args.runs[1]} share no sSEED/{args.masks}, or "
                        f"{args.split} has no ground truth")
    first, second = (np.array([[confusion_of(folder, i, run / seed / args.masks) for i in ids]
                               for seed in seeds]) for run in args.runs)
    means = [np.mean([100 * miou(seed.sum(axis=0)) for seed in part]) for part in (first, second)]
    images, both = (f"{low:+.1f} to {high:+.1f}" for low, high in intervals(first, second))
    print(f"{args.masks} on {args.split} ({len(ids):,} images), {len(seeds)} seeds: "
          f"{means[0]:.1f} and {means[1]:.1f}, gain {means[1] - means[0]:+.1f}; 95 % over "
          f"images {images}, over images and seeds {both}")


if __name__ == "__main__":
    launch(main, parse_args())
