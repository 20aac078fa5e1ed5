"""Figures of Table 4's runs (Fig. 6, Fig. 7, training curves, context), or of one run.

Run:    python extras/figures.py --data data/toy          (after study.py table4 --data data/toy)
        python extras/figures.py run --run runs/mine      (any run folder)
        python extras/figures.py shown --run runs/photo   (a run that knows cat and person)
Writes: OUT/fig6.png    image, truth, baseline, ours: the best, the median and the worst image
        OUT/fig7.png    IoU of each class, baseline against ours, over all seeds
        OUT/curves.png  loss and val mAP of Table 4's variants, over all seeds
        OUT/context.png one image inside the network: class-token attention, and the patch
                        probabilities before and after the CF-BiLSTM
        shown: RUN/shown.png, photographs of scikit-image that anybody may show, stage by stage
        run: RUN/curves.png, from log.jsonl; RUN/classes.png and RUN/confusion.png, the IoU and
        the confusion matrix of results.json
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import make_pseudo  # noqa: E402
from study import STUDIES, folder_name  # noqa: E402  the scripts are no package
from data import Folder, Images, read_image, read_mask, voc_palette  # noqa: E402
from evaluate import confusion_of, miou, predict, predict_logits  # noqa: E402
from model import classification_loss, pool_patches  # noqa: E402
from support.crf import crf_settings  # noqa: E402
from support.inference import load_model  # noqa: E402
from support.run import DataError, atomic, in_workers, launch, read_text  # noqa: E402

# photographs of scikit-image: CC0 or in the public domain, as its documentation says of each
SHOWN = {"chelsea": "cat", "astronaut": "person", "camera": "person"}
PROBE_IMAGES, PROBE_PASSES = 512, 20  # of the classifier that reads the tokens before the CF-BiLSTM


def parse_args(argv=None):
    """Which runs to draw."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", nargs="?", choices=("table4", "run", "shown"), default="table4",
        help="a study, one run, or its masks of photographs that may be shown")
    add("--run", type=Path, help="run, shown: its folder")
    add("--data", type=Path, help="table4: data set folder")
    add("--runs", type=Path, default=Path("runs/ablate"), help="what was --out of study.py")
    add("--out", type=Path, help="folder of the pictures (default: RUNS/NAME_OF_DATA)")
    add("--split", default="val", help="split that study.py scored")
    add("--workers", type=int, default=2, help="processes that score the images")
    add("--masks", choices=("bpm", "pseudo"), default="pseudo", help="before or after the CRF")
    args = parser.parse_args(argv)
    needed = "data" if args.what == "table4" else "run"
    if getattr(args, needed) is None:
        parser.error(f"--{needed} is needed")
    if needed == "run":
        return args
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
                        f"run `python extras/study.py table4 --data {args.data}` first")
    return {variant: [(home / seed, json.loads((home / seed / name).read_text()))
                      for seed in common] for variant, home in homes.items()}


def save(figure, path, dpi=80):
    """Write a matplotlib figure as a PNG of at most 256 colours, atomically."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight")
        with Image.open(temporary) as picture:
            picture = picture.convert("RGB").quantize(kmeans=2)
        picture.save(temporary, "PNG", optimize=True)
    plt.close(figure)
    print(f"written: {path}")


def of_stage(run, stage, step):
    """{epoch or iteration: line} of a stage in RUN/log.jsonl, of its last training alone."""
    path, lines = run / "log.jsonl", {}
    if not path.is_file():
        raise DataError(f"{path} not found: run train_cls.py first")
    for line in map(json.loads, read_text(path).splitlines()):
        if line["stage"] == stage:  # a training that starts anew replaces what came after its step
            before = {number: old for number, old in lines.items() if number < line[step]}
            lines = before | {line[step]: line}
    return lines


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
    photos = [read_image(folder.image_path(image_id)) for image_id in picks.values()]
    shapes = [photo.height / photo.width for photo in photos]
    figure, axes = plt.subplots(len(picks), 4, figsize=(7.6, 0.9 + 1.9 * sum(shapes)),
                                layout="constrained", height_ratios=shapes)
    for row, photo, (rank, image_id) in zip(axes, photos, picks.items()):
        masks = [folder.mask_path(image_id), *(run / args.masks / f"{image_id}.png"
                                               for run in (baseline, ours))]
        titles = ["ground truth", f"baseline, IoU {100 * others[image_id]:.0f}",
                  f"ours, IoU {100 * means[image_id]:.0f}"]
        show(row[0], photo, f"{rank}: {image_id}")
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
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, notes in runs.items():
        logs = [of_stage(run, "train_cls", "epoch") for run, _ in notes]
        epochs = sorted(set.intersection(*map(set, logs)))
        for axis, key in zip(axes, ("loss", "val_map")):
            curves = np.array([[log[epoch][key] for epoch in epochs] for log in logs], dtype=float)
            axis.plot(epochs, curves.mean(0), label=f"{name} (n = {len(curves)})")
            axis.fill_between(epochs, curves.min(0), curves.max(0), alpha=0.2)
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
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


# --- one run -----------------------------------------------------------------------------------
def draw_training(run):
    """Loss and score of both trainings, as far as they are in RUN/log.jsonl."""
    curves = {}
    for stage, step, score in (("train_cls", "epoch", "val_map"),
                               ("train_seg", "iteration", "val_miou")):
        log = of_stage(run, stage, step)
        curves |= {f"{stage}: {key}": (step, {x: line[key] for x, line in log.items()})
                   for key in ("loss", score) if log}
    if not curves:
        raise DataError(f"{run}/log.jsonl has no line of a training: choose another --run")
    figure, axes = plt.subplots(len(curves) // 2, 2, figsize=(9, 1.4 * len(curves)),
                                layout="constrained")
    for axis, (title, (step, curve)) in zip(axes.flat, curves.items()):
        axis.plot(list(curve), np.array([*curve.values()], dtype=float), marker="o", ms=3)
        axis.set(title=title, xlabel=step, ylim=(0, None if title.endswith("loss") else 1))
    save(figure, run / "curves.png")


def caption(results):
    """What the score in results.json is of."""
    return (f"{results['checkpoint'] or results['masks']} on {results['split']}, "
            f"{results['num_images']:,} images, CRF: {'yes' if results['crf'] else 'no'}")


def draw_classes(run, results):
    """Bars: IoU of each class, sorted."""
    iou = sorted((100 * iou, name) for name, iou in results["iou"].items() if iou is not None)
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.24 * len(iou)), layout="constrained")
    bars = axis.barh([name for _, name in iou], [value for value, _ in iou])
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.axvline(100 * results["miou"], color="black", lw=1)
    axis.set(xlim=(0, 105), ylim=(-0.6, len(iou) - 0.4),
             xlabel=f"IoU %; the line is their mean, mIoU {100 * results['miou']:.1f} %")
    axis.set_title(caption(results), fontsize=9)
    save(figure, run / "classes.png")


def draw_confusion(run, results):
    """Where the pixels of each true class went, in % of its pixels."""
    names, counts = list(results["iou"]), np.array(results["confusion"], dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    columns = [*names, "ignore"] if counts[:, -1].any() else names
    side = max(4.5, 1.8 + 0.42 * len(names)) if len(names) <= 30 else 14
    figure, axis = plt.subplots(figsize=(side + 0.6, side), layout="constrained")
    axis.imshow(shares[:, :len(columns)], cmap="Blues", vmin=0, vmax=100)
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true")
    for row, column in np.argwhere(shares[:, :len(columns)] >= 0.5) if len(names) <= 30 else ():
        axis.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if shares[row, column] > 55 else "black")
    axis.set_title(f"% of the true class's pixels\n{caption(results)}", fontsize=9)
    save(figure, run / "confusion.png")


def draw_run(run):
    """The pictures of one run folder, as far as its stages have come."""
    draw_training(run)
    results = run / "results.json"
    if not results.is_file():
        return print(f"{results} not found: run evaluate.py for the classes and the confusion")
    results = json.loads(read_text(results))
    draw_classes(run, results)
    draw_confusion(run, results)


@torch.no_grad()
def draw_shown(run):
    """Photographs that may be shown: BPM and pseudo mask, which know the label, and DeepLabv2."""
    try:
        from skimage import data as photographs
    except ImportError:
        raise DataError("scikit-image has the photographs: pip install scikit-image")
    classifier, checkpoint = load_model(run / "cls.pt", "cls")
    segmenter, _ = load_model(run / "seg.pt", "seg")
    classes, settings = checkpoint["classes"], checkpoint["args"]
    shown = {name: label for name, label in SHOWN.items() if label in classes}
    if not shown:
        raise DataError(f"{run} knows none of {', '.join({*SHOWN.values()})}")
    crf = crf_settings(make_pseudo.parse_args(["--data", ".", "--run", str(run), "--preset",
                                               settings["preset"]]), torch.device("cpu"))
    photos = [Image.fromarray(getattr(photographs, name)()).convert("RGB") for name in shown]
    shapes = [photo.height / photo.width for photo in photos]
    figure, axes = plt.subplots(len(shown), 4, figsize=(8, 0.3 + 2.1 * sum(shapes)), squeeze=False,
                                layout="constrained", height_ratios=shapes)
    for row, photo, (name, label) in zip(axes, photos, shown.items()):
        photo.thumbnail((384, 384))
        image, y = np.array(photo), torch.zeros(len(classes))
        y[[0, classes.index(label)]] = 1
        pixels = photo.resize((settings["size"],) * 2, Image.Resampling.BICUBIC)
        Y = classifier(torch.tensor(np.array(pixels)).permute(2, 0, 1)[None] / 255)[0]
        masks = make_pseudo.pseudo_masks(image, *make_pseudo.present_probs(Y, y), crf)
        masks = [*masks, predict(predict_logits(segmenter, image, torch.device("cpu"), False),
                                 image, crf)]
        titles = f"{name}, label: {label}", "BPM (Eq. 10)", "pseudo mask (CRF)", "DeepLabv2 + CRF"
        show(row[0], image, titles[0])
        for axis, mask, title in zip(row[1:], masks, titles[1:]):
            found = ", ".join(classes[k] for k in np.unique(mask) if k)
            strength = 0.6 * (mask > 0)[..., None]
            overlay = (1 - strength) * image + strength * voc_palette()[mask]
            show(axis, overlay.astype(np.uint8), f"{title}: {found or 'nothing'}")
    save(figure, run / "shown.png")


def main(args):
    matplotlib.use("Agg")
    if args.what != "table4":
        return {"run": draw_run, "shown": draw_shown}[args.what](args.run)
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
