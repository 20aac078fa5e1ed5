"""Figures from the runs of `extras/ablate.py table4`: Fig. 6, Fig. 7, training curves, context.

Run:    python extras/figures.py --data data/toy          (after ablate.py table4 --data data/toy)
Writes: OUT/fig6.png    image, truth, baseline, ours: the best, the median and the worst image
        OUT/fig7.png    IoU of each class, baseline against ours, over all seeds
        OUT/curves.png  loss and val mAP of Table 4's variants, over all seeds
        OUT/context.png one image inside the network: class-token attention, and the patch
                        probabilities before and after the CF-BiLSTM
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from ablate import STUDIES, folder_name  # noqa: E402  the scripts are no package
from data import Folder, Images, read_image, read_mask, voc_palette  # noqa: E402
from evaluate import confusion_of, miou  # noqa: E402
from model import classification_loss, load_model, pool_patches  # noqa: E402
from support.run import DataError, atomic, in_workers, launch  # noqa: E402

PROBE_IMAGES, PROBE_PASSES = 512, 20  # of the classifier that reads the tokens before the CF-BiLSTM


def parse_args(argv=None):
    """Which runs to draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="data set folder")
    add("--runs", type=Path, default=Path("runs/ablate"), help="what was --out of ablate.py")
    add("--out", type=Path, help="folder of the pictures (default: RUNS/NAME_OF_DATA)")
    add("--split", default="val", help="split that ablate.py scored")
    add("--workers", type=int, default=2, help="processes that score the images")
    add("--masks", choices=("bpm", "pseudo"), default="pseudo", help="before or after the CRF")
    args = parser.parse_args(argv)
    args.runs = args.runs / args.data.resolve().name
    args.out = args.out or args.runs
    return args


def scored_runs(args):
    """{variant of Table 4: [(run folder, its scores file's content)]}, the same seeds for each."""
    name = f"scores-{args.split}.json"
    homes = {variant: args.runs / folder_name(flags) for variant, _, flags, _ in STUDIES["table4"]}
    seeds = [{path.parent.name for path in home.glob(f"s*/{name}")} for home in homes.values()]
    common = sorted(set.intersection(*seeds), key=lambda seed: int(seed[1:]))
    if not common:
        raise DataError(f"no seed of all four variants in {args.runs}: "
                        f"run `python extras/ablate.py table4 --data {args.data}` first")
    return {variant: [(home / seed, json.loads((home / seed / name).read_text()))
                      for seed in common] for variant, home in homes.items()}


def save(figure, path):
    """Write a matplotlib figure as a PNG, atomically."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80, bbox_inches="tight")
    plt.close(figure)
    print(f"written: {path}")


def show(axis, picture, title, **kwargs):
    """One picture without ticks."""
    axis.imshow(picture, **kwargs)
    axis.set_title(title, fontsize=9)
    axis.set_axis_off()


def ranked(args, folder, run, ids):
    """{id: mean IoU of the image's classes} of one run's masks, from the worst to the best."""
    jobs = [(folder, i, run / args.masks) for i in ids if folder.mask_path(i).is_file()]
    means = {job[1]: miou(confusion)
             for confusion, job in zip(in_workers(confusion_of, jobs, args.workers), jobs)
             if confusion.any()}  # else all of its ground truth is 255
    return dict(sorted(means.items(), key=lambda item: item[1]))


def draw_fig6(args, folder, baseline, ours, means):
    """The best, the median and the worst image of ours: not chosen by anybody."""
    order = list(means)
    picks = {"best": order[-1], "median": order[len(order) // 2], "worst": order[0]}
    others = ranked(args, folder, baseline, picks.values())
    figure, axes = plt.subplots(len(picks), 4, figsize=(7.6, 6.6), layout="constrained")
    for row, (rank, image_id) in zip(axes, picks.items()):
        masks = [folder.mask_path(image_id), *(run / args.masks / f"{image_id}.png"
                                               for run in (baseline, ours))]
        titles = ["ground truth", f"baseline, IoU {100 * others[image_id]:.0f}",
                  f"ours, IoU {100 * means[image_id]:.0f}"]
        show(row[0], read_image(folder.image_path(image_id)), f"{rank}: {image_id}")
        for axis, path, title in zip(row[1:], masks, titles):
            mask = read_mask(path, len(folder.classes))
            show(axis, voc_palette()[mask], title, interpolation="nearest")
    figure.suptitle(f"{args.masks} masks of {args.split}, {ours.name}. Of {len(order)} images the "
                    "best, the median and the worst by ours' mean IoU over the image's classes",
                    fontsize=9)
    save(figure, args.out / "fig6.png")


def draw_fig7(args, folder, runs):
    """Bars: IoU of each class; whiskers: the standard deviation over the seeds."""
    figure, axis = plt.subplots(figsize=(max(7, 0.45 * len(folder.classes)), 3.2))
    for number, (name, notes) in enumerate(runs.items()):
        results = [note["results"][args.masks] for _, note in notes]
        iou = np.array([list(result["iou"].values()) for result in results], dtype=float) * 100
        miou = 100 * np.mean([result["miou"] for result in results])
        axis.bar(np.arange(iou.shape[1]) + 0.4 * number - 0.2, iou.mean(0), 0.4, capsize=2,
                 yerr=iou.std(0, ddof=1) if len(iou) > 1 else None,
                 label=f"{name}, mIoU {miou:.1f} (n = {len(iou)})")
    axis.set_xticks(range(len(folder.classes)), folder.classes, rotation=40, ha="right")
    axis.set_ylabel(f"IoU %, {args.split}, {args.masks}")
    axis.legend(fontsize=8)
    save(figure, args.out / "fig7.png")


def draw_curves(args, runs):
    """Loss and mAP against epochs: the mean over the seeds, and the range as a band."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for name, notes in runs.items():
        logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
                for run, _ in notes]
        logs = [{line["epoch"]: line for line in log if line["stage"] == "train_cls"}
                for log in logs]
        epochs = sorted(set.intersection(*map(set, logs)))
        for axis, key in zip(axes, ("loss", "val_map")):
            curves = np.array([[log[epoch][key] for epoch in epochs] for log in logs], dtype=float)
            axis.plot(epochs, curves.mean(0), label=f"{name} (n = {len(curves)})")
            axis.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.2)
            axis.set_xlabel("epoch")
            axis.set_ylabel("training loss, Eq. (9)" if key == "loss" else "val mAP of the labels")
    axes[0].legend(fontsize=8)
    save(figure, args.out / "curves.png")


@torch.no_grad()
def tokens_before_context(model, images):
    """(P, p') of Eq. (1) and (2) for images (B, 3, S, S) uint8."""
    tokens = model.patch_tokens(images / 255)
    return tokens, model.enhance(tokens)


def probe(model, folder, ids, settings):
    """A classifier of the patches *before* the CF-BiLSTM: D -> C, trained on image labels.

    W_c has only ever seen what comes out of the CF-BiLSTM; to ask what a patch knows before it, p'
    needs a classifier of its own: the same loss, on the frozen network.
    """
    torch.manual_seed(0)
    dataset = Images(folder, ids[:PROBE_IMAGES], settings["size"])
    tokens = torch.cat([tokens_before_context(model, dataset[index][2][None])[1]
                        for index in range(len(dataset))])
    labels = torch.stack([folder.image_labels(i) for i in dataset.ids])
    classifier = torch.nn.Linear(tokens.shape[-1], len(folder.classes), bias=False)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-2)
    for _ in range(PROBE_PASSES):
        for batch in torch.randperm(len(tokens)).split(32):
            scores = pool_patches(classifier(tokens[batch]).softmax(-1), settings["pool"],
                                  settings["top_k"])
            loss = classification_loss(scores, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier


@torch.no_grad()
def draw_context(args, folder, run, image_id, model, settings, classifier):
    """The median image: which token its patches get, and what they say before and after."""
    picture = Images(folder, [image_id], settings["size"])[0][2]
    tokens, enhanced = tokens_before_context(model, picture[None])
    maps = {"class-token attention": model.class_attention(tokens),
            "before CF-BiLSTM (probe)": classifier(enhanced).softmax(-1),
            "after it, Eq. (7)": model(picture[None] / 255)}
    present = folder.image_labels(image_id).nonzero().flatten().tolist()
    figure, axes = plt.subplots(3, 1 + len(present), figsize=(2.1 * (1 + len(present)), 7),
                                layout="constrained")
    truth = read_mask(folder.mask_path(image_id), len(folder.classes))
    bpm = read_mask(run / "bpm" / f"{image_id}.png", len(folder.classes))
    for axis, shown, title in zip(axes[:, 0], (picture.permute(1, 2, 0), voc_palette()[truth],
                                               voc_palette()[bpm]),
                                  (image_id, "ground truth", "BPM, Eq. (10)")):
        show(axis, shown, title)
    for row, (name, values) in zip(axes, maps.items()):
        for axis, label in zip(row[1:], present):
            show(axis, values[0, ..., label], f"{name}\n{folder.classes[label]}", vmin=0, vmax=1)
    figure.suptitle(f"The median image of {args.split}, {run.name}. Maps: 0 dark, 1 yellow",
                    fontsize=9)
    save(figure, args.out / "context.png")


def main(args):
    matplotlib.use("Agg")
    torch.set_flush_denormal(True)
    folder, runs = Folder(args.data), scored_runs(args)
    baseline, ours = runs["baseline"][0][0], runs["both"][0][0]  # of the first seed
    means = ranked(args, folder, ours, folder.ids(args.split))
    draw_fig6(args, folder, baseline, ours, means)
    draw_fig7(args, folder, {"baseline": runs["baseline"], "ours": runs["both"]})
    draw_curves(args, runs)
    model, checkpoint = load_model(ours / "cls.pt", "cls")
    settings = checkpoint["args"]
    classifier = probe(model, folder, checkpoint["ids"], settings)
    median = list(means)[len(means) // 2]
    draw_context(args, folder, ours, median, model, settings, classifier)


if __name__ == "__main__":
    launch(main, parse_args())
