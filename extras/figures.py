"""Figures: Table 4's runs, one run, one image, and who sees which labels.

Run:    python extras/figures.py --data data/toy            (table4; after study.py table4)
        python extras/figures.py run --run runs/mine        (any run folder)
        python extras/figures.py crf --data data/toy --run runs/toy
        python extras/figures.py top-k --data data/toy      (after study.py top-k)
Writes: table4: RUNS/NAME_OF_DATA/fig6.png, image, truth, baseline, ours; fig7.png, IoU of each
        class; curves.png, loss and mAP; context.png, attention to class tokens and patch scores
        run: RUN/curves.png, RUN/classes.png, RUN/confusion.png, from log.jsonl and results.json
        shown: RUN/shown.png, photographs of scikit-image that anybody may show, stage by stage
        crf, top-k: OUT/crf.png, OUT/top-k.png, one image after 0, 1, 3, 10 iterations of the CRF,
        or with the K = 1, 6, 12 and all patches that Eq. (8) averages (Table 5)
        cpews: RUN/maps.png, class maps and masks of a run of the second method
        pipeline: OUT/pipeline.png, the steps, and which labels each of them sees
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
from study import STUDIES, folder_name
from support.crf import crf_settings, dense_crf
from support.files import UserError, atomic, read_text
from support.inference import load_model
from support.masks import IGNORE, read_image, read_mask, voc_palette
from support.processes import launch, map_in_workers

# photographs of scikit-image: CC0 or in the public domain, as its documentation says of each
SHOWN = {"chelsea": "cat", "astronaut": "person", "camera": "person"}
CPU = torch.device("cpu")
MAPS = dict(vmin=0, vmax=1, cmap="viridis")  # 0 dark, 1 yellow
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
    add("names", nargs="*", default=["table4"], metavar="NAME", help=", ".join(FIGURES))
    add("--data", type=Path, help="data set folder")
    add("--run", type=Path, help="run, shown, crf: run folder")
    add("--runs", type=Path, default=Path("runs/study"), help="what was --out of study.py")
    add("--seed", type=int, default=0, help="top-k: which of the study's seeds")
    add("--out", type=Path, help="folder of the pictures (default: where the runs are, or .)")
    add("--split", default="val", help="split that study.py scored, or of the image")
    add("--image", help="crf, top-k: id of the image (default: the first with two classes)")
    add("--workers", type=int, default=2, help="processes that score the images")
    add("--masks", choices=("bpm", "pseudo"), default="pseudo", help="before or after the CRF")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in FIGURES:
            parser.error(f"{name!r} is no figure: choose from {', '.join(FIGURES)}")
        for needed in FIGURES[name][1]:
            if getattr(args, needed) is None:
                parser.error(f"--{needed} is needed for {name}")
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
    """Write rows of (title, picture, options of imshow), as high as each row's first picture.

    The option frames=[(row, column), ...] draws a red frame around those pixels.
    """
    shapes = [row[0][1].shape[0] / row[0][1].shape[1] for row in rows]
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=(8, 0.5 + sum(
        8 / columns * shape + 0.2 for shape in shapes)), layout="constrained", squeeze=False,
        height_ratios=shapes)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, axes_of_row in zip(rows, axes):
        for (title, picture, options), axis in zip(row, axes_of_row):
            options = dict(interpolation="nearest") | options
            for y, x in options.pop("frames", ()):
                axis.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fc="none", ec="red"))
            axis.imshow(picture, **options)
            axis.set_title(title, fontsize=8)
    figure.suptitle(about, fontsize=8)
    save(figure, path)


def coloured(title, mask, truth=None, C=0):
    """A panel of a mask (H, W); with its truth the title ends with the image's mean IoU."""
    if truth is not None:
        title += f"IoU {100 * miou(confusion_matrix(mask, truth, C)):.0f} %"
    return title, voc_palette()[mask], {}


# --- scores and curves -------------------------------------------------------------------------
def of_stage(run, stage, step):
    """{epoch or iteration: line} of a stage in RUN/log.jsonl, of its last training alone."""
    path, lines = run / "log.jsonl", {}
    if not path.is_file():
        raise UserError(f"{path} not found: run train_cls.py first")
    for line in map(json.loads, read_text(path).splitlines()):
        # a training that starts anew replaces what came after its step
        if line["stage"] == stage and step in line:
            before = {number: old for number, old in lines.items() if number < line[step]}
            lines = before | {line[step]: line}
    return lines


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
    """{variant of Table 4: [(run folder, its scores file's content)]}, the same seeds for each."""
    name, home = f"scores-{args.split}.json", args.runs / args.data.resolve().name
    homes = {variant: home / folder_name(flags) for variant, _, flags, _ in STUDIES["table4"]}
    seeds = [{path.parent.name for path in home.glob(f"s*/{name}")} for home in homes.values()]
    common = sorted(set.intersection(*seeds), key=lambda seed: int(seed[1:]))
    if not common:
        raise UserError(f"no seed of all four variants in {home}: "
                        f"run `python extras/study.py table4 --data {args.data}` first")
    return {variant: [(home / seed, json.loads((home / seed / name).read_text()))
                      for seed in common] for variant, home in homes.items()}


def ranked(args, folder, run, ids):
    """{id: mean IoU of the image's classes} of one run's masks, from the worst to the best."""
    jobs = [(folder, i, run / args.masks) for i in ids if folder.mask_path(i).is_file()]
    means = {job[1]: miou(confusion)
             for confusion, job in zip(map_in_workers(confusion_of, jobs, args.workers), jobs)
             if confusion.any()}  # else all of its ground truth is 255
    return dict(sorted(means.items(), key=lambda item: item[1]))


def draw_fig6(args, path, folder, baseline, ours, order):
    """The best, the median and the worst image of ours: not chosen by anybody."""
    rows, C = [], len(folder.classes)
    for rank, image_id in (("best", order[-1]), ("median", order[len(order) // 2]),
                           ("worst", order[0])):
        truth, *masks = (read_mask(file, C) for file in (folder.mask_path(image_id), *(
            run / args.masks / f"{image_id}.png" for run in (baseline, ours))))
        image = np.array(read_image(folder.image_path(image_id)))
        rows.append([(f"{rank}: {image_id}", image, {}), coloured("ground truth", truth),
                     *(coloured(f"{name}, ", mask, truth, C)
                       for name, mask in zip(("baseline", "ours"), masks))])
    panels(path, rows, f"{args.masks} masks of {args.split}, {ours.name}. Of {len(order)} images "
           "the best, the median and the worst by ours' mean IoU over the image's classes")


@torch.no_grad()
def draw_context(path, folder, run, image_id):
    """One image inside the network: which class token its patches get, and their scores Y."""
    model, checkpoint = load_model(run / "cls.pt", "cls")
    picture = Images(folder, [image_id], checkpoint["args"]["size"])[0][2]
    attention = model.class_attention(model.patch_tokens(picture[None] / 255))[0]
    Y, C = model(picture[None] / 255)[0], len(folder.classes)
    present = folder.image_labels(image_id).nonzero().flatten().tolist()
    rows = [[(image_id, picture.permute(1, 2, 0), {}),
             *((f"attention to the token of\n{folder.classes[c]}", attention[..., c], MAPS)
               for c in present)],
            [coloured("BPM, Eq. (10)", read_mask(run / "bpm" / f"{image_id}.png", C)),
             *((f"Y, Eq. (7)\n{folder.classes[c]}", Y[..., c], MAPS) for c in present)]]
    panels(path, rows, f"The median image, {run.name}. Maps: 0 dark, 1 yellow")


def draw_table4(args):
    """All figures of the runs of `study.py table4`."""
    folder, runs = Folder(args.data), scored_runs(args)
    out = args.out or args.runs / args.data.resolve().name
    baseline, ours = runs["baseline"][0][0], runs["both"][0][0]  # of the first seed
    order = list(ranked(args, folder, ours, folder.ids(args.split)))
    draw_fig6(args, out / "fig6.png", folder, baseline, ours, order)
    draw_classes(out / "fig7.png", {
        name: [scores["results"][args.masks] for _, scores in runs[variant]]
        for name, variant in (("baseline", "baseline"), ("ours", "both"))},
        f"{args.masks} masks of {args.split}")
    draw_curves(out / "curves.png", {name: [run for run, _ in seeds]
                                     for name, seeds in runs.items()})
    draw_context(out / "context.png", folder, ours, order[len(order) // 2])


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
        Y = classifier(torch.tensor(np.array(pixels)).permute(2, 0, 1)[None] / 255)[0]
        masks = *pseudo_masks(image, *class_maps(Y, y), crf), predict(
            predict_log_probs(segmenter, image, CPU, False), image, crf)
        rows.append([(f"{name}, label: {label}", image, {})])
        for mask, title in zip(masks, ("BPM (Eq. 10)", "pseudo mask (CRF)", "DeepLabv2 + CRF")):
            found = ", ".join(classes[k] for k in np.unique(mask) if k) or "nothing"
            strength = 0.6 * (mask > 0)[..., None]
            overlay = (1 - strength) * image + strength * voc_palette()[mask]
            rows[-1].append((f"{title}: {found}", overlay.astype(np.uint8), {}))
    panels(args.run / "shown.png", rows)


class Scene:
    """--image of --split, or the first with two classes of objects: image, truth, a class."""

    def __init__(self, args):
        self.folder = folder = Folder(args.data)
        ids = folder.ids(args.split)
        two = (i for i in ids if folder.image_labels(i).sum() == 3)
        self.id = args.image or next(two, ids[0])
        self.image = np.array(read_image(folder.image_path(self.id)))
        self.truth = read_mask(folder.mask_path(self.id), len(folder.classes))
        pixels = np.bincount(self.truth[self.truth != IGNORE], minlength=2)
        self.label = 1 + int(pixels[1:].argmax())  # the object class with most pixels

    @torch.no_grad()
    def maps(self, path):
        """(arguments of the training, Y (h, w, C), present, maps) of a cls.pt, at its own size."""
        model, checkpoint = load_model(path, "cls")
        Folder(self.folder.root, checkpoint)  # it has the same classes
        pixels = Images(self.folder, [self.id], checkpoint["args"]["size"])[0][2]
        Y = model(pixels[None] / 255)[0]
        return checkpoint["args"], Y, *class_maps(Y, self.folder.image_labels(self.id))

    def draw(self, path, about, columns):
        """Above image and maps (title, map, frames), below truth and masks; columns of both."""
        C, name = len(self.folder.classes), self.folder.classes[self.label]
        panels(path, [[(self.id, self.image, {}), *((title, values, MAPS | dict(frames=frames))
                                                    for title, values, frames, _ in columns)],
                      [coloured("ground truth", self.truth),
                       *(coloured("", mask, self.truth, C) for *_, mask in columns)]],
               f"{name}: {about}")


def draw_top_k(args):
    """Table 5 on one image: patch scores with the K that Eq. (8) averages, and the BPM."""
    scene, columns, home = Scene(args), [], args.runs / args.data.resolve().name
    flags = {name: flags for name, _, flags, _ in STUDIES["top-k"]}
    for K in (1, 6, 12, "N"):
        path = home / folder_name(flags[f"K = {K}"]) / f"s{args.seed}/cls.pt"
        if not path.is_file():
            raise UserError(f"{path} not found: run `python extras/study.py top-k --data "
                            f"{args.data}` with --seeds {args.seed} first")
        _, Y, present, maps = scene.maps(path)
        values = Y[..., scene.label]
        most = values.flatten().topk(values.numel() if K == "N" else K).indices.tolist()
        columns.append((f"K = {len(most)}" + " (all)" * (K == "N"), values,
                        [divmod(index, values.shape[1]) for index in most],
                        *pseudo_masks(scene.image, present, maps, None)))
    scene.draw((args.out or Path()) / "top-k.png",
               "probability of each patch, red: the K largest. Below: BPM", columns)


def draw_crf(args):
    """Probabilities and masks of one image after 0, 1, 3 and 10 iterations of the dense CRF."""
    scene, columns = Scene(args), []
    trained, _, present, maps = scene.maps(args.run / "cls.pt")
    settings = settings_of_crf(args.run, trained["preset"])
    probs = upsample(maps, *scene.image.shape[:2])
    for iterations in (0, 1, 3, 10):
        refined = dense_crf(scene.image, probs, **settings | dict(iterations=iterations))
        columns.append((f"{iterations} iteration{'s' * (iterations != 1)}",
                        refined[present == scene.label][0], (),
                        present[refined.argmax(0)].byte().numpy()))
    about = "probability of each pixel. CRF: {bilateral_sxy:g} pixels, {bilateral_srgb:g} RGB " \
            "levels, weight {bilateral_compat:g}. Below: the mask"
    scene.draw((args.out or Path()) / "crf.png", about.format(**settings), columns)


@torch.no_grad()
def draw_cpews(args):
    """CPEWS's Fig. 4 to 7: maps of both layers, and all masks, of evenly spaced images."""
    model, checkpoint = load_model(args.run / "cpews.pt", "cpews", cpews.CPEWSConfig, cpews.CPEWS)
    settings = argparse.Namespace(**checkpoint["args"] | dict(workers=0))
    folder, rows = Folder(args.data, checkpoint), []
    ids, C = folder.ids(args.split), len(folder.classes)
    for image_id in (ids[k * len(ids) // 4] for k in range(4)) if len(ids) > 4 else ids:
        image = np.array(read_image(folder.image_path(image_id)))
        truth = read_mask(folder.mask_path(image_id), C, image.shape[1::-1])
        whole, y = cpews.photo(image, CPU), folder.image_labels(image_id)[None, 1:]
        maps = model.cams(model.encodings(whole, settings.cam_scales).values(), y, image.shape[:2])
        job, = cpews.run_network(model, folder, [image_id], settings, CPU, None)
        masks, c = cpews.image_masks(*job), int(y.argmax())
        rows.append([(image_id, image, {}),
                     *((f"{name}:\n{folder.classes[c + 1]}", both[0, c], MAPS)
                       for name, both in zip(("last layer", f"block {settings.aux_block}"), maps)),
                     *(coloured(f"{name}, ", masks[name], truth, C)
                       for name in ("cam", "pseudo", "pred")), coloured("ground truth", truth)])
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
    for name in args.names:
        FIGURES[name][0](args)


if __name__ == "__main__":
    launch(main, parse_args())
