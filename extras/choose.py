"""What does choosing settings on pixel labels buy? Reads a grid's scores, chooses by three of them.

Run:    python extras/study.py choose --data DATA --split val     # and once more: --split test
        python extras/choose.py runs/study/DATA/choose-val.csv runs/study/DATA/choose-test.csv
        python extras/choose.py docs/results.csv --method "vit_lite0, grid"
Prints: a table: for every way to choose a setting, the BPM of test that the chosen ones have
A weakly supervised method that is tuned by masks has seen masks: Choe et al. (arXiv 2001.07437)
and arXiv 2404.10034 ask for localisation what this asks for segmentation.
"""
import argparse
import csv
import statistics
from collections import Counter
from pathlib import Path

from study import UserError, cells, gain, launch, markdown

CRITERIA = (("BPM of val", "masks of val", "val", "BPM", max),
            ("mAP of val", "image labels of val", "val", "val mAP", max),
            ("training loss", "image labels of train", "val", "loss x100", min),
            ("best on test", "masks of test: the bound", "test", "BPM", max))


def parse_args(argv=None):
    """Where the scores are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path, nargs="+", help="files of study.py's scores")
    parser.add_argument("--method", default="", help="rows with this in the column `method`")
    return parser.parse_args(argv)


def grid(rows, method=""):
    """{seed: {setting: {(split, metric): %}}} of the rows (dictionaries) of one method."""
    seeds = {}
    for row in rows:
        if row.get("method") == method:
            setting = seeds.setdefault(int(row["seed"]), {}).setdefault(row["variant"], {})
            setting[row["split"], row["metric"]] = float(row["value"])
    return seeds


def choices(seeds):
    """Markdown. Every seed chooses for itself, among its own runs, and is scored on test.

    The gain is over the choice by masks of val, with its 95 % interval (Student's t over seeds).
    """
    every, bpm, lines, by_masks = [*seeds.values()], ("test", "BPM"), [], None
    for name, labels, split, metric, best in CRITERIA:
        settings = [best(runs, key=lambda setting: runs[setting][split, metric]) for runs in every]
        chosen = [runs[setting] for runs, setting in zip(every, settings)]
        by_masks = by_masks or chosen
        counts = Counter(settings).most_common()
        lines.append([name, labels, *cells(chosen, [bpm]), *gain(chosen, by_masks, [bpm]),
                      "; ".join(f"{setting} ({times})" for setting, times in counts)])
    mean = [{bpm: statistics.mean(run[bpm] for run in runs.values())} for runs in every]
    lines.append(["any setting", "none: the mean", *cells(mean, [bpm]),
                  *gain(mean, by_masks, [bpm]), ""])
    return markdown(["chosen by", "labels", "BPM of test", "sd", "gain", "95 % interval",
                     "settings (seeds)"], lines)


def main(args):
    rows = [row for path in args.csv for row in csv.DictReader(path.open())]
    seeds = grid(rows, args.method)
    whole = {(split, metric) for _, _, split, metric, _ in CRITERIA}
    if not seeds or any(whole - {*scores} for runs in seeds.values() for scores in runs.values()):
        raise UserError(f"{' and '.join(map(str, args.csv))}: needs "
                        f"{', '.join(map(' '.join, whole))} of every run of method {args.method!r}")
    print(*choices(seeds), sep="\n")


if __name__ == "__main__":
    launch(main, parse_args())
