"""Figures: Table 4's runs, one run, one image, and who sees which labels.

Run:    python extras/figures.py --data data/toy            (table4; after study.py table4)
        python extras/figures.py run --run runs/mine        (any run folder)
        python extras/figures.py top-k --data data/toy      (after study.py top-k)
Writes: table4: fig6.png, fig7.png, curves.png, context.png in RUNS/NAME_OF_DATA, or in OUT
        run: curves.png, classes.png, confusion.png in RUN, from log.jsonl and results.json
        shown: shown.png in RUN, photographs of scikit-image that anybody may show
        crf, top-k: crf.png, top-k.png in OUT, one image with more and more iterations or patches
        cpews: maps.png in RUN, a run of the second method; pipeline: pipeline.png in OUT
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import make_pseudo
from data import Folder, Images
from evaluate import confusion_matrix, confusion_of, miou, predict, predict_log_probs
from extras.cpews import train as cpews
from make_pseudo import class_maps, pseudo_masks
from model import upsample
from study import STUDIES, folder_name, of_stage
from support.crf import crf_settings, dense_crf
from support.files import UserError, atomic, read_text
from support.inference import load_model
from support.masks import IGNORE, read_image, read_mask, voc_palette
from support.processes import launch

# photographs of scikit-image: CC0 or in the public domain, as its documentation says of each
SHOWN = {"chelsea": "cat", "astronaut": "person", "camera": "person"}
CPU = torch.device("cpu")
FILLS = {"learns": "#cfe2f3", "chooses": "#f4c7c3", "scores": "#fff2cc", "reads": "#dff0d8",
         "none": "white"}
SEES = [  # the step; what it does with images, with image labels, with true masks; what it writes
    ("stage 1, train_cls.py:\npatch classifier", "train: learns from\nval: reads",
     "train: learns from\nval: scores (mAP)", "none", "cls.pt"),
    ("stage 2, make_pseudo.py:\npseudo masks", "train: reads", "train: reads",
     "train: scores (mIoU)", "bpm/\npseudo/"),
    ("stage 3, train_seg.py:\nDeepLabv2 from pseudo/", "train: learns from\nval: reads", "none",
     "val: scores (mIoU)", "seg.pt"),
    ("stage 4, evaluate.py:\nprediction and score", "test: reads", "none", "test: scores (mIoU)",
     "pred/\nresults.json"),
    ("settings of the presets\ntoy and photo", "train, val: reads", "train, val: reads",
     "val: chooses\nby mIoU", "defaults of\n--preset"),
    ("study.py choose: settings\nby image labels, five seeds", "train, val: reads",
     "val: chooses\nby mAP", "test: scores (mIoU)", "the table of\nchoose.py")]


def parse_args(argv=None):
    """What to draw, and from which data and runs."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", nargs="?", default="table4", choices=FIGURES, help="what to draw: table4, if none")
    add("--data", type=Path, help="data set folder")
    add("--run", type=Path, help="run, shown, crf: run folder")
    add("--runs", type=Path, default=Path("runs/study"), help="what was --out of study.py")
    add("--seed", type=int, default=0, help="top-k: which of the study's seeds")
    add("--out", type=Path, help="folder of the pictures (default: where the runs are, or .)")
    add("--split", default="val", help="split that study.py scored, or of the image")
    add("--image", help="crf, top-k: id of the image (default: the first with two classes)")
    add("--masks", choices=("bpm", "pseudo"), default="pseudo", help="before or after the CRF")
    args = parser.parse_args(argv)
    for needed in FIGURES[args.name][1]:
        if getattr(args, needed) is None:
            parser.error(f"--{needed} is needed for {args.name}")
    args.home = args.data and args.runs / args.data.resolve().name  # where study.py writes
    return args


# --- pens --------------------------------------------------------------------------------------
def save(figure, path, dpi=100):
    """Write a matplotlib figure as a PNG of at most 256 colours, atomically."""
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, bbox_inches="tight")
        with Image.open(temporary) as picture:
            picture = picture.convert("RGB").quantize(kmeans=2)
        picture.save(temporary, "PNG", optimize=True)
    plt.close(figure)
    print(f"written: {path}")


def panels(path, rows, about=""):
    """Write rows of (title, picture), as high as each row's first picture.

    picture: RGB (H, W, 3), or a map (H, W) of 0 (dark) to 1 (yellow), to which [(row, column), ...]
    may be added: those of its pixels that get a red frame.
    """
    shapes = [row[0][1].shape[0] / row[0][1].shape[1] for row in rows]
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(8, 0.5 + sum(
        8 / columns * shape + 0.2 for shape in shapes)), layout="constrained", squeeze=False,
        height_ratios=shapes)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, axes_of_row in zip(rows, axes):
        for (title, picture, *frames), axis in zip(row, axes_of_row):
            axis.imshow(picture, "viridis", vmin=0, vmax=1, interpolation="nearest")
            for y, x in sum(frames, []):
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fc="none", ec="red"))
            axis.set_title(title, fontsize=8)
    figure.suptitle(about, fontsize=8)
    save(figure, path)


def photo_panels(folder, image_id, masks, rank=""):
    """Panels: an image, its ground truth, each of masks [(name, (H, W))] with its mean IoU."""
    image, C = np.array(read_image(folder.image_path(image_id))), len(folder.classes)
    truth = read_mask(folder.mask_path(image_id), C, image.shape[1::-1])
    return [(f"{rank}{image_id}", image), ("ground truth", voc_palette()[truth]), *(
        (f"{name}, IoU {100 * miou(confusion_matrix(mask, truth, C)):.0f} %", voc_palette()[mask])
        for name, mask in masks)]


def classifier_and_input(run, folder, image_id):
    """RUN/cls.pt: (network, arguments of its training, the image (1, 3, S, S) at its size)."""
    model, checkpoint = load_model(run / "cls.pt", "cls")
    Folder(folder.root, checkpoint)  # it has the same classes
    pixels = Images(folder, [image_id], checkpoint["args"]["size"])[0][2]
    return model, checkpoint["args"], pixels[None] / 255


# --- scores and curves -------------------------------------------------------------------------
def draw_curves(path, runs):
    """Loss and score of each training; runs {name: run folders}: mean of the seeds, range."""
    rows = []
    for stage, step, score in (("train_cls", "epoch", "val_map"),
                               ("train_seg", "iteration", "val_miou"),
                               ("cpews", "step", "val_pred")):
        logs = {name: [of_stage(run, stage, step) for run in seeds] for name, seeds in runs.items()}
        if any(map(any, logs.values())):
            rows.append((stage, step, score, logs))
    if not rows:
        raise UserError(f"{', '.join(runs)}: log.jsonl has no line of a training")
    figure, axes = plt.subplots(len(rows), 2, figsize=(9, 3 * len(rows)), layout="constrained",
                                squeeze=False)
    for row, (stage, step, score, logs) in zip(axes, rows):
        for axis, key in zip(row, ("loss", score)):
            for name, seeds in logs.items():
                steps = sorted(set.intersection(*map(set, seeds)))
                curves = np.array([[seed[x].get(key) for x in steps] for seed in seeds], float)
                axis.plot(steps, curves.mean(0), marker=".", label=f"{name} (n = {len(curves)})")
                axis.fill_between(steps, curves.min(0), curves.max(0), alpha=0.2)
            axis.set(title=f"{stage}: {key}", xlabel=step, ylim=(0, None if key == "loss" else 1))
            axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].legend(fontsize=8)
    save(figure, path)


def draw_classes(path, results, about):
    """Bars: IoU of each class; results {name: results.json of each seed}; whiskers: sd."""
    classes = list(next(iter(results.values()))[0]["iou"])
    figure, axis = plt.subplots(figsize=(max(7, 0.45 * len(classes)), 3.4))
    width = 0.8 / len(results)
    for number, (name, seeds) in enumerate(results.items()):
        iou = 100 * np.array([list(seed["iou"].values()) for seed in seeds], dtype=float)
        mean = 100 * np.mean([seed["miou"] for seed in seeds])
        bars = axis.bar(np.arange(len(classes)) + width * (number - len(results) / 2 + 0.5),
                        iou.mean(0), width, capsize=2, label=f"{name}, mIoU {mean:.1f} "
                        f"(n = {len(iou)})", yerr=iou.std(0, ddof=1) if len(iou) > 1 else None)
        if len(results) == 1:
            axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=7)
    axis.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axis.set(ylabel="IoU %", ylim=(0, 105))
    axis.set_title(about, fontsize=9)
    axis.legend(fontsize=8)
    save(figure, path)


def draw_confusion(path, results, about):
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
    axis.set_title(f"% of the true class's pixels\n{about}", fontsize=9)
    save(figure, path)


def draw_run(args):
    """The pictures of one run folder, as far as its stages have come."""
    run = args.run
    draw_curves(run / "curves.png", {str(run): [run]})
    path = run / "results.json"
    if not path.is_file():
        return print(f"{path} not found: run evaluate.py for the classes and the confusion")
    results = json.loads(read_text(path))
    about = (f"{results['checkpoint'] or results['masks']} on {results['split']}, "
             f"{results['num_images']:,} images, CRF: {'yes' if results['crf'] else 'no'}")
    draw_classes(run / "classes.png", {run.name: [results]}, about)
    draw_confusion(run / "confusion.png", results, about)


# --- Table 4: Fig. 6 and Fig. 7 of the paper, curves, the median image -------------------------
def scored_runs(args):
    """{variant of Table 4: its run folders}, the same seeds for each."""
    name = f"scores-{args.split}.json"
    homes = {variant: args.home / folder_name(flags) for variant, _, flags, _ in STUDIES["table4"]}
    seeds = sorted(set.intersection(*({path.parent.name for path in of.glob(f"s*/{name}")}
                                      for of in homes.values())))
    if not seeds:
        raise UserError(f"no seed of all four variants in {args.home}: "
                        f"run `python extras/study.py table4 --data {args.data}` first")
    return {variant: [of / seed for seed in seeds] for variant, of in homes.items()}


def ranked(folder, ids, masks):
    """{id: mean IoU of the image's classes} of a folder of masks, from the worst to the best."""
    counts = {i: confusion_of(folder, i, masks) for i in ids if folder.mask_path(i).is_file()}
    means = {i: miou(confusion) for i, confusion in counts.items() if confusion.any()}
    return dict(sorted(means.items(), key=lambda item: item[1]))


@torch.no_grad()
def draw_context(path, folder, run, image_id):
    """One image inside the network: which class token its patches get, and their scores Y."""
    model, _, picture = classifier_and_input(run, folder, image_id)
    attention, Y = model.class_attention(model.patch_tokens(picture))[0], model(picture)[0]
    mask = read_mask(run / "bpm" / f"{image_id}.png", len(folder.classes))
    present = folder.image_labels(image_id).nonzero().flatten().tolist()
    rows = [[(image_id, picture[0].permute(1, 2, 0)),
             *((f"attention to the token of\n{folder.classes[c]}", attention[..., c])
               for c in present)],
            [("BPM, Eq. (10)", voc_palette()[mask]),
             *((f"Y, Eq. (7)\n{folder.classes[c]}", Y[..., c]) for c in present)]]
    panels(path, rows, f"The median image, {run.name}. Maps: 0 dark, 1 yellow")


def draw_table4(args):
    """All figures of the runs of `study.py table4`; nobody has chosen the images."""
    folder, runs, rows = Folder(args.data), scored_runs(args), []
    out, about = args.out or args.home, f"{args.masks} masks of {args.split}"
    shown = {"baseline": runs["baseline"], "ours": runs["both"]}
    first = {name: of[0] for name, of in shown.items()}
    order = list(ranked(folder, folder.ids(args.split), first["ours"] / args.masks))
    median = order[len(order) // 2]
    for rank, image_id in (("best", order[-1]), ("median", median), ("worst", order[0])):
        masks = [(name, read_mask(run / args.masks / f"{image_id}.png", len(folder.classes)))
                 for name, run in first.items()]
        rows.append(photo_panels(folder, image_id, masks, f"{rank}: "))
    panels(out / "fig6.png", rows, f"{about}, {first['ours'].name}. Of {len(order)} images the "
           "best, the median and the worst by ours' mean IoU over the image's classes")
    draw_classes(out / "fig7.png", {
        name: [json.loads((run / f"scores-{args.split}.json").read_text())["results"][args.masks]
               for run in of] for name, of in shown.items()}, about)
    draw_curves(out / "curves.png", runs)
    draw_context(out / "context.png", folder, first["ours"], median)


# --- photographs, one image --------------------------------------------------------------------
def settings_of_crf(run, preset):
    """What stage 2 passes to dense_crf by default."""
    words = ["--data", ".", "--run", str(run), "--preset", preset]
    return crf_settings(make_pseudo.parse_args(words), CPU)


@torch.no_grad()
def draw_shown(args):
    """Photographs that may be shown: BPM and pseudo mask, which know the label, and DeepLabv2."""
    try:
        from skimage import data as photographs
    except ImportError:
        raise UserError("scikit-image has the photographs: pip install scikit-image")
    classifier, checkpoint = load_model(args.run / "cls.pt", "cls")
    segmenter, _ = load_model(args.run / "seg.pt", "seg")
    classes, settings = checkpoint["classes"], checkpoint["args"]
    shown = {name: label for name, label in SHOWN.items() if label in classes}
    if not shown:
        raise UserError(f"{args.run} knows none of {', '.join({*SHOWN.values()})}")
    crf, rows = settings_of_crf(args.run, settings["preset"]), []
    for name, label in shown.items():
        photo = Image.fromarray(getattr(photographs, name)()).convert("RGB")
        photo.thumbnail((384, 384))
        image, y = np.array(photo), torch.zeros(len(classes))
        y[[0, classes.index(label)]] = 1
        pixels = photo.resize((settings["size"],) * 2, Image.Resampling.BICUBIC)
        Y = classifier(cpews.photo(np.array(pixels), CPU))[0]
        masks = *pseudo_masks(image, *class_maps(Y, y), crf), predict(
            predict_log_probs(segmenter, image, CPU, False), image, crf)
        rows.append([(f"{name}, label: {label}", image)])
        for mask, title in zip(masks, ("BPM (Eq. 10)", "pseudo mask (CRF)", "DeepLabv2 + CRF")):
            found = ", ".join(classes[k] for k in np.unique(mask) if k) or "nothing"
            overlay = np.where(mask[..., None], 0.4 * image + 0.6 * voc_palette()[mask], image)
            rows[-1].append((f"{title}: {found}", overlay.astype(np.uint8)))
    panels(args.run / "shown.png", rows)


def chosen_image(args):
    """(Folder, id, its largest class): --image of --split, or the first with two object classes."""
    folder = Folder(args.data)
    ids = folder.ids(args.split)
    two = (i for i in ids if folder.image_labels(i).sum() == 3)
    image_id = args.image or next(two, ids[0])
    truth = read_mask(folder.mask_path(image_id), len(folder.classes))
    pixels = np.bincount(truth[truth != IGNORE], minlength=2)
    return folder, image_id, 1 + int(pixels[1:].argmax())


def draw_maps(path, folder, image_id, columns, about):
    """Above the image and maps, below truth and masks; columns: (panel of the map, mask)."""
    image, *below = photo_panels(folder, image_id, [("mask", mask) for _, mask in columns])
    panels(path, [[image, *(panel for panel, _ in columns)], below], about)


@torch.no_grad()
def draw_top_k(args):
    """Table 5 on one image: patch scores with the K that Eq. (8) averages, and the BPM."""
    (folder, image_id, label), columns = chosen_image(args), []
    image = np.array(read_image(folder.image_path(image_id)))
    for K, flags in ((1, "--pool max"), (6, "--top-k 6"), (12, "--top-k 12"), (None, "--pool avg")):
        run = args.home / folder_name(flags) / f"s{args.seed}"
        if not (run / "cls.pt").is_file():
            raise UserError(f"{run}/cls.pt not found: run `python extras/study.py top-k --data "
                            f"{args.data}` with --seeds {args.seed} first")
        model, _, picture = classifier_and_input(run, folder, image_id)
        Y = model(picture)[0]  # (h, w, C)
        values = Y[..., label]
        most = values.flatten().topk(K or values.numel()).indices.tolist()
        frames = [divmod(index, values.shape[1]) for index in most]
        panel = f"K = {K}" if K else f"K = {len(most)} (all)", values, frames
        bpm, = pseudo_masks(image, *class_maps(Y, folder.image_labels(image_id)), None)
        columns.append((panel, bpm))
    draw_maps((args.out or Path()) / "top-k.png", folder, image_id, columns, folder.classes[label]
              + ": probability of each patch, red: the K largest. Below: BPM")


@torch.no_grad()
def draw_crf(args):
    """Probabilities and masks of one image after 0, 1, 3 and 10 iterations of the dense CRF."""
    (folder, image_id, label), columns = chosen_image(args), []
    image = np.array(read_image(folder.image_path(image_id)))
    model, trained, picture = classifier_and_input(args.run, folder, image_id)
    present, maps = class_maps(model(picture)[0], folder.image_labels(image_id))
    settings = settings_of_crf(args.run, trained["preset"])
    probs = upsample(maps, *image.shape[:2])
    for n in (0, 1, 3, 10):
        refined = dense_crf(image, probs, **settings | dict(iterations=n))
        panel = f"{n} iteration{'s' * (n != 1)}", refined[present == label][0]
        columns.append((panel, present[refined.argmax(0)].byte().numpy()))
    about = "{bilateral_sxy:g} pixels, {bilateral_srgb:g} RGB levels, weight {bilateral_compat:g}"
    draw_maps((args.out or Path()) / "crf.png", folder, image_id, columns, folder.classes[label]
              + f": probability of each pixel. CRF: {about.format(**settings)}. Below: the mask")


@torch.no_grad()
def draw_cpews(args):
    """CPEWS's Fig. 4 to 7: maps of both layers, and all masks, of evenly spaced images."""
    model, checkpoint = load_model(args.run / "cpews.pt", "cpews", cpews.CPEWSConfig, cpews.CPEWS)
    settings = argparse.Namespace(**checkpoint["args"] | dict(workers=0))
    folder, rows = Folder(args.data, checkpoint), []
    ids = folder.ids(args.split)
    ids = [ids[k * len(ids) // 4] for k in range(4)] if len(ids) > 4 else ids
    for job, image_id in zip(cpews.run_network(model, folder, ids, settings, CPU, None), ids):
        masks, y = cpews.image_masks(*job), folder.image_labels(image_id)[None, 1:]
        photo, truth, *below = photo_panels(folder, image_id, [
            (name, masks[name]) for name in ("cam", "pseudo", "pred")])
        whole, name = cpews.photo(photo[1], CPU), folder.classes[1 + int(y.argmax())]
        encodings = model.encodings(whole, settings.cam_scales).values()
        maps = model.cams(encodings, y, whole.shape[2:])
        layers = zip(("last layer", f"block {settings.aux_block}"), maps)
        rows.append([photo, *((f"{layer}:\n{name}", both[0, y.argmax()])
                              for layer, both in layers), *below, truth])
    panels(args.run / "maps.png", rows, f"{args.run.name}, {args.split}, evenly spaced. Maps: 0 "
           "dark, 1 yellow. cam and pseudo know the image labels, pred does not")


# --- who sees which labels ---------------------------------------------------------------------
def draw_pipeline(args):
    """A table of SEES: a row for each stage and for the two ways in which settings are chosen."""
    heads = "step", "images", "image labels", "pixel masks (truth)", "writes"
    cells = [[text.replace("none", "\N{EN DASH}") for text in row] for row in SEES]
    colours = [["#f3f3f3", *(FILLS[next(use for use in FILLS if use in text)]
                             for text in row[1:4]), "white"] for row in SEES]
    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.set_axis_off()
    table = axis.table(cells, colours, colLabels=heads, colColours=5 * ["#dddddd"],
                       cellLoc="center", colWidths=(0.28, 0.18, 0.19, 0.21, 0.14),
                       bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for cell in table.get_celld().values():
        cell.set(edgecolor="#888888", linewidth=0.8)
    axis.set_title("No stage learns from pixel masks: they score. Settings chosen by the mIoU of "
                   "val have seen them.", fontsize=8.5)
    save(figure, (args.out or Path()) / "pipeline.png", 160)


FIGURES = {  # name: what draws it, the flags that it needs
    "table4": (draw_table4, ["data"]), "run": (draw_run, ["run"]), "shown": (draw_shown, ["run"]),
    "crf": (draw_crf, ["data", "run"]), "top-k": (draw_top_k, ["data"]),
    "cpews": (draw_cpews, ["data", "run"]), "pipeline": (draw_pipeline, [])}


def main(args):
    matplotlib.use("Agg")
    torch.set_flush_denormal(True)
    FIGURES[args.name][0](args)


if __name__ == "__main__":
    launch(main, parse_args())
