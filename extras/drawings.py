"""Drawings of the method, made by the code that they show: its shapes, gradients and masks.

Run:    python extras/drawings.py architecture pipeline beetle cross --out docs
        python extras/drawings.py epochs crf --data data/toy --run runs/drawings --out docs
        python extras/drawings.py top-k --data data/toy      (after extras/study.py top-k)
Writes: OUT/architecture.png  CPF-CTE from the image to the loss and to the masks, with shapes
        OUT/pipeline.png      the four stages and the files between them
        OUT/beetle.png        the classes of the generated data, and why one patch is not enough
        OUT/epochs.png        one mask after every epoch; trains in RUN what is not trained yet
        OUT/cross.png         the patches that one output of the CF-BiLSTM depends on
        OUT/top-k.png         one image with K = 1, 6, 12 and all patches (Table 5)
        OUT/crf.png           masks of RUN/cls.pt after 0, 1, 3 and 10 iterations of the CRF
"""
import argparse
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyBboxPatch, Rectangle
from PIL import Image
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import make_pseudo  # noqa: E402  the scripts are no package
import train_cls  # noqa: E402
from study import STUDIES, folder_name  # noqa: E402
from data import IGNORE, Folder, Images, read_image, read_mask, voc_palette  # noqa: E402
from evaluate import confusion_matrix, miou  # noqa: E402
from figures import of_stage, save, show  # noqa: E402
from make_pseudo import present_probs, pseudo_masks  # noqa: E402
from datasets.beetles import HEADS, PATTERNS, TOY_CLASSES, TOY_SIZE, toy_scene  # noqa: E402
from datasets.voc import VOC_CLASSES  # noqa: E402
from model import CPFCTE, ClassifierConfig, classification_loss  # noqa: E402
from model import pool_patches, upsample  # noqa: E402
from support.crf import crf_settings, dense_crf  # noqa: E402
from support.inference import load_model  # noqa: E402
from support.run import DataError, atomic, launch, load_checkpoint, save_checkpoint  # noqa: E402

FILLS = {"train_cls": "#d9e8f6", "make_pseudo": "#dff0d8", "train_seg": "#fdebd0",
         "evaluate": "#ebdff5"}  # a stage's colour in all drawings
TOY, VOC, RED = "#1f5f99", "#b3541e", "#8c1d18"
DPI = 160  # of 8 inches: twice the width at which GitHub shows a page
FLOW = {  # stage: what it does, what of the data set it learns from or predicts, what it writes
    "train_cls": ("patch classifier\nCPF-CTE", ("JPEGImages", "image_labels.txt"), "cls.pt"),
    "make_pseudo": ("pseudo masks\nof train", ("JPEGImages", "image_labels.txt"), "pseudo/"),
    "train_seg": ("DeepLabv2 on\npseudo masks", ("JPEGImages",), "seg.pt"),
    "evaluate": ("prediction\nand score", ("JPEGImages",), "pred/\nresults.json\nfigure.png")}
SCORING = ("make_pseudo", "train_seg", "evaluate")  # they open the ground truth, to score


def parse_args(argv=None):
    """What to draw, and from which data and runs."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="+", choices=[*DRAWINGS, "all"], metavar="NAME",
        help=f"{', '.join(DRAWINGS)}, all")
    add("--out", type=Path, default=Path("docs"), help="folder of the pictures")
    add("--data", type=Path, default=Path("data/toy"), help="epochs, top-k, crf: data set folder")
    add("--run", type=Path, default=Path("runs/drawings"), help="epochs, crf: run folder")
    add("--cls-flags", default="", help='epochs: flags of train_cls.py, --cls-flags="--epochs 12"')
    add("--runs", type=Path, default=Path("runs/ablate"), help="top-k: what was --out of study.py")
    add("--seed", type=int, default=0, help="top-k: which of its seeds")
    add("--split", default="val", help="split of the image")
    add("--image", help="id of the image (default: the first one with two classes of objects)")
    args = parser.parse_args(argv)
    args.names = list(DRAWINGS) if "all" in args.names else args.names
    return args


# --- pens --------------------------------------------------------------------------------------
def canvas(width, height):
    """A figure and its only axis, in inches from the lower left corner, without ticks."""
    figure = Figure((width, height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    return figure, axis


def inset(figure, x, y, width, height, picture, title="", **options):
    """A picture on a canvas, in the canvas's inches."""
    W, H = figure.get_size_inches()
    axis = figure.add_axes((x / W, y / H, width / W, height / H))
    show(axis, picture, title, interpolation="nearest", **options)
    return axis


def box(axis, x, y, width, height, text, fill):
    """A rounded box, x, y its lower left corner, with the text in its middle."""
    axis.add_patch(FancyBboxPatch((x + 0.05, y + 0.05), width - 0.1, height - 0.1, fc=fill, lw=0.8,
                                  ec="#555555", boxstyle="round,pad=0.05", zorder=3))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", linespacing=1.3,
              fontsize=8, zorder=4)


def arrow(axis, *points, **options):
    """A line from point to point; the last one gets the head."""
    style = dict(color="#333333", lw=1.1) | options
    axis.plot(*zip(*points[:-1]), **style)
    axis.annotate("", points[-1], points[-2],
                  arrowprops=dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, **style))


def lock(axis, x, y, size=0.17):
    """A closed padlock around x, y."""
    axis.add_patch(Arc((x, y + size / 2), size * 0.62, size, theta2=180, lw=2, color=RED,
                       zorder=4))
    axis.add_patch(Rectangle((x - size / 2, y - size / 2), size, size, color=RED, zorder=4))


# --- 1: the architecture -----------------------------------------------------------------------
def watch(model, shapes):
    """Let the parts of a CPFCTE note in shapes, when they run, the shape of what they give."""
    def _noted(name, method):
        def _noting(*inputs):
            result = method(*inputs)
            shapes[name] = tuple(result.shape)
            return result
        return _noting

    def _hook(name):
        def _note(module, inputs, output):
            states = output[0] if isinstance(module, nn.LSTM) else output
            shapes[name], shapes[f"into {name}"] = tuple(states.shape), tuple(inputs[0].shape)
        return _note

    for name in ("patch_tokens", "class_attention", "enhance", "fuse"):
        setattr(model, name, _noted(name, getattr(model, name)))
    for name, module in {"enhance_proj": model.enhance_proj, "proj": model.context.proj,
                         "rows": model.context.lstms[0],
                         "columns": model.context.lstms[1]}.items():
        module.register_forward_hook(_hook(name))


@torch.no_grad()
def shapes_of(preset, num_classes, image):
    """{step: shape} of stages 1 and 2 for one image (H, W, 3) uint8, noted while they run."""
    flags, shapes = ["--data", ".", "--run", ".", "--preset", preset], {}
    trained, inference = train_cls.parse_args(flags), make_pseudo.parse_args(flags)
    model = CPFCTE(ClassifierConfig(num_classes, trained.backbone, trained.class_tokens,
                                    trained.context, trained.dropout)).eval()
    patch_size = model.backbone.patch_embed.feat_ratio()
    large = round(inference.size_ratio * trained.size / patch_size) * patch_size
    image_labels = (torch.arange(num_classes) < 3).float()  # background and two classes
    pixels = torch.tensor(image).permute(2, 0, 1) / 255

    # --- stage 2 ---
    shapes["large image"] = (3, large, large)
    Y = model(upsample(pixels, large, large)[None])
    present, maps = present_probs(Y[0], image_labels, inference.max_norm)
    probs, crf = upsample(maps, *image.shape[:2]), crf_settings(inference, maps.device)
    bpm, pseudo = pseudo_masks(image, present, maps, crf)

    # --- stage 1, whose inner shapes are kept ---
    watch(model, shapes)
    small = upsample(pixels, trained.size, trained.size)
    patch_probs = model(small[None])
    scores = pool_patches(patch_probs, trained.pool, trained.top_k)
    results = dict(image=small, Y=patch_probs, scores=scores, maps=maps, probs=probs, bpm=bpm,
                   loss=classification_loss(scores, image_labels[None]), pseudo=pseudo)
    results["large Y"] = Y
    return shapes | {name: tuple(result.shape) for name, result in results.items()}


def by(shape):
    """(1, 12, 12, 128) -> '12 × 12 × 128': without the batch of one image."""
    return " × ".join(map(str, shape[shape[:1] == (1,):])) or "1 number"


def both(axis, x, y, shapes, name, **options):
    """The shape of a step with the toy and with the voc preset, one below the other."""
    for place, colour, of_preset in zip((y, y - 0.15), (TOY, VOC), shapes):
        axis.text(x, place, by(of_preset[name]), color=colour,
                  **dict(ha="center", va="center", fontsize=7.5) | options)


def draw_training(axis, y, shapes):
    """Stage 1, from the image to the loss, in the order of CPFCTE.forward."""
    steps = [("ViT\npatch tokens P", "Eq. (1)", "patch_tokens"),
             ("class tokens\nP' = [P ; t] W", "Eq. (2)", "enhance"),
             ("CF-BiLSTM\ncontext", "Eq. (3) to (6)", "fuse"),
             ("classifier\nsoftmax: Y", "Eq. (7)", "Y"),
             ("K largest,\ntheir mean: s", "Eq. (8)", "scores"),
             ("loss of s\nand labels y", "Eq. (9)", "loss")]
    both(axis, 0.6, y - 0.13, shapes, "image")
    for place, (text, equation, name) in enumerate(steps):
        x = 1.24 + 1.14 * place
        arrow(axis, (x - 0.2, y + 0.4), (x, y + 0.4))
        box(axis, x, y, 0.94, 0.8, text, FILLS["train_cls"])
        axis.text(x + 0.47, y + 0.9, equation, ha="center", fontsize=8, weight="bold")
        both(axis, x + 0.47, y - 0.13, shapes, name)


def draw_inside(figure, axis, y, shapes):
    """What Eq. (2) and Eq. (3) to (6) do inside, beside a picture of each."""
    for x, title, rows in (
            (0.1, "inside Eq. (2): a class token for each patch",
             [("attention a of P to T", "class_attention"),
              ("[P ; t], t = a T", "into enhance_proj"), ("linear map W", "enhance_proj")]),
            (4.1, "inside Eq. (3) to (6): row and column of each patch",
             [("rows, both ways", "rows"), ("columns, both ways", "columns"),
              ("linear map W_o", "proj")])):
        axis.add_patch(Rectangle((x, y), 3.8, 1.5, fc="#f7f7f7", ec="#bbbbbb", lw=0.8))
        axis.text(x + 0.1, y + 1.3, title, fontsize=8, weight="bold")
        for row, (text, name) in enumerate(rows):
            place = y + 1.1 - 0.4 * row
            axis.text(x + 1.2, place - 0.07, text, fontsize=8, va="center")
            both(axis, x + 3.7, place, shapes, name, ha="right")
    for number, colour in enumerate(voc_palette()[:len(TOY_CLASSES)] / 255):
        axis.add_patch(Rectangle((0.95, y + 0.13 + 0.12 * number), 0.1, 0.1, color=colour))
        arrow(axis, (0.42, y + 0.66), (0.92, y + 0.18 + 0.12 * number), lw=0.4)
    axis.add_patch(Rectangle((0.3, y + 0.6), 0.12, 0.12, fc="white", ec="black"))
    axis.text(0.36, y + 0.42, "patch", ha="center", fontsize=7)
    axis.text(1.1, y + 0.58, "T", fontsize=8)
    draw_reach(inset(figure, 4.2, y + 0.15, 1, 1, reach("hv", 9) > 0, cmap="Blues", vmax=2), 9)


def draw_masks(axis, y, shapes):
    """Stage 2, from the large image to the BPM and to the pseudo mask."""
    both(axis, 0.6, y + 0.42, shapes, "large image")
    axis.text(0.6, y + 0.62, "image, resized", ha="center", fontsize=8)
    steps = [("the same\nnetwork: Y", "large Y"),
             ("say 3 are present:\neach map / its max", "maps"),
             ("bilinear\nupsampling", "probs")]
    for place, (text, name) in enumerate(steps):
        x = 1.24 + 1.5 * place
        arrow(axis, (x - 0.22, y + 0.4), (x, y + 0.4))
        box(axis, x, y + 0.05, 1.28, 0.7, text, FILLS["make_pseudo"])
        both(axis, x + 0.64, y - 0.13, shapes, name)
    for up, text, name, width in ((0.72, "argmax, Eq. (10): BPM", "bpm", 1.5),
                                  (0, "CRF with the image,\nargmax: pseudo mask", "pseudo", 1.5)):
        arrow(axis, (5.52, y + 0.4), (5.68, y + 0.4), (5.68, y + 0.24 + up), (5.8, y + 0.24 + up))
        box(axis, 5.8, y + up, width, 0.48, text, FILLS["make_pseudo"])
        both(axis, 7.38, y + 0.31 + up, shapes, name, ha="left")


def draw_architecture(args):
    """CPF-CTE with the shapes of both presets, for one image each."""
    scene = toy_scene(0, 0)[0]
    photo = np.array(Image.fromarray(scene).resize((500, 375)))  # of VOC's usual size
    shapes = [shapes_of("toy", len(TOY_CLASSES), scene), shapes_of("voc", len(VOC_CLASSES), photo)]
    figure, axis = canvas(8, 5.5)
    heading = partial(axis.text, fontsize=9, weight="bold")
    for x, name, colour, about, of_preset in ((0.1, "toy", TOY, "vit_toy", shapes[0]),
                                              (4.1, "voc", VOC, "ViT-B/16", shapes[1])):
        heading(x, 5.3, f"{name}: {about}, training at {of_preset['image'][-1]} pixels, "
                f"masks at {of_preset['large image'][-1]}", color=colour)
    heading(0.1, 5.02, "stage 1: training from image labels (shapes of one image)")
    draw_training(axis, 3.85, shapes)
    inset(figure, 0.22, 3.87, 0.76, 0.76, scene)
    draw_inside(figure, axis, 1.85, shapes)
    heading(0.1, 1.5, "stage 2: masks of the training images")
    draw_masks(axis, 0.2, shapes)
    return figure


# --- 2: the pipeline ---------------------------------------------------------------------------
def draw_pipeline(args):
    """The stages as boxes, the data set above and below them, the files of RUN between them."""
    figure, axis = canvas(8, 3.2)
    starts = {stage: 0.1 + 1.95 * place for place, stage in enumerate(FLOW)}
    sources = {"JPEGImages": ("JPEGImages/: the images", 2.78, 0.4),
               "image_labels.txt": ("image_labels.txt: the classes in each image", 2.33, 0.8)}
    for place, (stage, (text, reads, writes)) in enumerate(FLOW.items()):
        x = starts[stage]
        box(axis, x, 0.95, 1.2, 1.05, f"\n{text}\n{stage}.py", FILLS[stage])
        axis.text(x + 0.6, 1.78, f"stage {place + 1}", ha="center", fontsize=9, weight="bold",
                  zorder=4)
        arrow(axis, (x + 1.2, 1.45), (x + 1.95, 1.45))
        axis.text(x + 1.56, 1.52, writes, ha="center", va="bottom", fontsize=7.5)
        for name in reads:
            _, y, share = sources[name]
            arrow(axis, (x + 1.2 * share, y), (x + 1.2 * share, 2), color="#777777")
    for name, (text, y, _) in sources.items():
        last = max(x for stage, x in starts.items() if name in FLOW[stage][1]) + 1.2
        box(axis, 0.1, y, last - 0.1, 0.32, text, "white")
    first = min(starts[stage] for stage in SCORING)
    box(axis, first, 0.08, 7.15 - first, 0.42,
        "SegmentationClass/: the true masks, opened to score, never to train", "#fbe9e7")
    for stage in SCORING:
        arrow(axis, (starts[stage] + 0.6, 0.5), (starts[stage] + 0.6, 0.95), color=RED)
    lock(axis, first + 0.25, 0.26)
    axis.text(0.7, 0.29, "stage 1 opens\nno mask", ha="center", va="center", fontsize=8)
    return figure


# --- 3: a beetle -------------------------------------------------------------------------------
def lone_beetles():
    """{class: (image, mask, parts)}: the first of train that shows it alone and nowhere cut off."""
    scenes, index = {}, 0
    while len(scenes) < len(TOY_CLASSES) - 1:
        image, mask, parts = toy_scene(0, index)
        labels, inner = np.unique(mask[mask > 0]), mask[1:-1, 1:-1]
        if len(labels) == 1 and labels[0] != IGNORE and (inner > 0).sum() == (mask > 0).sum():
            scenes.setdefault(TOY_CLASSES[labels[0]], (image, mask, parts))
        index += 1
    return scenes


def fullest_patch(where, side=8):
    """(row, column) of the patch of side x side pixels that holds most of where (H, W) bool."""
    counts = where.reshape(len(where) // side, side, -1, side).sum((1, 3))
    return np.unravel_index(counts.argmax(), counts.shape)


def draw_beetle(args):
    """The eight classes; one image's parts; what a patch of its body and one of its head tell."""
    scenes = lone_beetles()
    figure, axis = canvas(8, 6.3)
    for column, pattern in enumerate(PATTERNS):
        axis.text(1.6 + 1.75 * column, 6.08, pattern, ha="center", fontsize=9, weight="bold")
        for row, head in enumerate(HEADS):
            inset(figure, 0.82 + 1.75 * column, 4.35 - 1.75 * row, 1.6, 1.6,
                  scenes[f"{pattern}_{head}"][0])
    for row, head in enumerate(HEADS):
        axis.text(0.7, 5.15 - 1.75 * row, f"{head} head", ha="right", va="center", fontsize=9,
                  weight="bold")
    name, (image, _, parts) = max(scenes.items(), key=lambda scene: (scene[1][2] == 2).sum())
    its_pattern, its_head = name.split("_")
    whole = inset(figure, 0.1, 0.25, 1.95, 1.95, image, "12 × 12 patches of 8 pixels")
    for line in range(8, TOY_SIZE, 8):
        whole.axhline(line - 0.5, color="white", lw=0.4)
        whole.axvline(line - 0.5, color="white", lw=0.4)
    colours = np.array([[238, 238, 238], [120, 160, 200], [240, 170, 60]], np.uint8)
    drawn = inset(figure, 2.2, 0.25, 1.95, 1.95, colours[parts], "its two parts")
    for y, part, name, tells in (
            (1.3, 1, "body", [f"{its_pattern}_{head}?" for head in HEADS]),
            (0.25, 2, "head", [f"{pattern}_{its_head}?" for pattern in PATTERNS])):
        row, column = fullest_patch(parts == part)
        whole.add_patch(Rectangle((8 * column - 0.5, 8 * row - 0.5), 8, 8, fc="none",
                                  ec="yellow", lw=1.5))
        drawn.text(*np.argwhere(parts == part).mean(0)[::-1], name, ha="center", va="center",
                   fontsize=8)
        inset(figure, 4.4, y, 0.9, 0.9, image[8 * row:8 * row + 8, 8 * column:8 * column + 8])
        axis.text(5.4, y + 0.77, f"a {name} patch alone:", fontsize=8.5, weight="bold")
        axis.text(5.4, y + 0.68, "\n".join(tells), fontsize=8.5, va="top")
    return figure


# --- 5: the cross ------------------------------------------------------------------------------
def reach(context, side, row=None, column=None):
    """(side, side) float64: the norm of the derivative of one patch's output by each patch.

    Of a context module with random weights, fed with noise; exactly zero: no influence.
    """
    torch.manual_seed(0)
    model = CPFCTE(ClassifierConfig(len(TOY_CLASSES), "vit_toy", context=context)).eval()
    if context == "conv":  # training starts it with each patch as it is
        nn.init.normal_(model.context.mix.weight)
    tokens = torch.randn(1, side, side, model.backbone.embed_dim)
    row, column = side // 3 if row is None else row, side // 2 if column is None else column
    derivative = torch.autograd.functional.jacobian(
        lambda tokens: model.context(tokens)[0, row, column], tokens)  # (D, 1, h, w, D)
    return derivative.double().square().sum((0, 1, 4)).sqrt().numpy()


def draw_reach(axis, side):
    """Lines between side x side patches, and a frame around the one whose output is asked for."""
    for line in range(side + 1):
        axis.axhline(line - 0.5, color="#999999", lw=0.4)
        axis.axvline(line - 0.5, color="#999999", lw=0.4)
    axis.set(xlim=(-0.55, side - 0.45), ylim=(side - 0.45, -0.55))
    axis.add_patch(Rectangle((side // 2 - 0.5, side // 3 - 0.5), 1, 1, fc="none", ec="red", lw=2,
                             zorder=3))


def draw_cross(args, side=12):
    """Where the output of one patch gets its context from: hv, raster and conv."""
    figure, axis = canvas(8, 3.2)
    for place, (context, about) in enumerate((("hv", "its row and its column"),
                                              ("raster", "the whole sequence"),
                                              ("conv", "7 × 7 patches"))):
        strength = reach(context, side)
        axis.text(1.33 + 2.67 * place, 3.05, f"--context {context}", ha="center", fontsize=9,
                  weight="bold")
        panel = inset(figure, 0.13 + 2.67 * place, 0.4, 2.4, 2.4, np.ma.masked_equal(strength, 0),
                      f"{about}: {(strength > 0).sum()} of {side * side}", cmap="viridis",
                      norm=LogNorm(1e-6 * strength.max(), strength.max()))
        draw_reach(panel, side)
    axis.text(4, 0.17, "Derivative of the output at the red frame by each patch; random weights. "
              "White: exactly 0.\nYellow: the largest; dark blue: a millionth of it, or less.",
              ha="center", va="center", fontsize=8)
    return figure


# --- 4, 6, 7: one image ------------------------------------------------------------------------
class Scene:
    """The image of --image, or the first with two classes of objects: picture, truth, a class."""

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
        return checkpoint["args"], Y, *present_probs(Y, self.folder.image_labels(self.id))

    def draw(self, figure, axis, x, side, y_image, y_truth):
        """The image, the ground truth, and the names of its classes at the lower edge."""
        inset(figure, x, y_image, side, side, self.image, self.id)
        inset(figure, x, y_truth, side, side, voc_palette()[self.truth], "ground truth")
        for place, label in enumerate(np.setdiff1d(self.truth, [IGNORE])):
            axis.add_patch(Rectangle((0.1 + 1.6 * place, 0.08), 0.13, 0.13, ec="black", lw=0.5,
                                     fc=voc_palette()[label] / 255))
            axis.text(0.3 + 1.6 * place, 0.14, self.folder.classes[label], va="center", fontsize=8)

    def draw_mask(self, figure, x, y, side, mask, title):
        """A mask; its title ends with the mean IoU over the image's classes."""
        iou = miou(confusion_matrix(mask, self.truth, len(self.folder.classes)))
        inset(figure, x, y, side, side, voc_palette()[mask], f"{title}IoU {100 * iou:.0f} %")

    def draw_columns(self, about, columns):
        """Image and truth; for each (title, map, mask, patches) the map, with frames, and mask."""
        figure, axis = canvas(8, 3.95)
        self.draw(figure, axis, 0.1, 1.45, 2.05, 0.35)
        axis.text(0.1, 3.8, f"{self.folder.classes[self.label]}: {about}", fontsize=8.5)
        for place, (title, values, mask, patches) in enumerate(columns):
            x = 1.7 + 1.57 * place
            panel = inset(figure, x, 2.05, 1.45, 1.45, values, title, vmin=0, vmax=1)
            for row, column in patches:
                panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fc="none", ec="red"))
            self.draw_mask(figure, x, 0.35, 1.45, mask, "")
        return figure


def kept_epochs(args):
    """{epoch: file}: cls.pt after each epoch of one training in RUN, which goes on where it was."""
    def _save_and_keep(path, kind, model, settings, **content):
        save_checkpoint(path, kind, model, settings, **content)
        with atomic(args.run / f"epochs/{content['epoch']}.pt") as temporary:
            shutil.copyfile(path, temporary)

    with patch.object(train_cls, "save_checkpoint", _save_and_keep):
        train_cls.main(train_cls.parse_args(["--data", str(args.data), "--run", str(args.run),
                                             "--resume", *shlex.split(args.cls_flags)]))
    files = {int(path.stem): path for path in args.run.glob("epochs/*.pt")}
    if not files:
        raise DataError(f"{args.run} was trained without keeping its epochs: choose another --run")
    return dict(sorted(files.items()))


def draw_epochs(args):
    """The BPM of one image after up to six epochs, above the loss and the mAP of all."""
    scene, files, log = Scene(args), kept_epochs(args), of_stage(args.run, "train_cls", "epoch")
    figure, axis = canvas(8, 3.95)
    scene.draw(figure, axis, 0.1, 1.2, 2.3, 0.5)
    shown = [list(files)[k] for k in np.linspace(0, len(files) - 1, min(len(files), 6)).astype(int)]
    for place, epoch in enumerate(shown):
        _, _, present, maps = scene.maps(files[epoch])
        bpm, = pseudo_masks(scene.image, present, maps, None)
        scene.draw_mask(figure, 1.5 + 1.08 * place, 2.3, 1, bpm, f"epoch {epoch}\n")
    chart = figure.add_axes((2.1 / 8, 0.62 / 3.95, 4.9 / 8, 1.35 / 3.95))
    axis.text(1.5, 3.8, f"BPM (Eq. 10) of one image of {args.split} in one training", fontsize=8.5)
    for side, key, colour, name in ((chart, "loss", TOY, "training loss, Eq. (9)"),
                                    (chart.twinx(), "val_map", VOC, "mAP of val's labels")):
        values = np.array([line[key] for line in log.values()], dtype=float)
        side.plot(list(log), values, marker="o", ms=3, color=colour)
        side.set_ylabel(name, color=colour, fontsize=8)
        side.tick_params(labelsize=8)
        side.set_ylim(0, 1.1 * np.nanmax(values) if key == "loss" else 1.05)
    chart.set_xticks(list(log))
    chart.set_xlabel("epoch", fontsize=8)
    return figure


def run_of_top_k(args, K):
    """cls.pt of a K: of the study top-k of extras/study.py, or of its default, if that has it."""
    flags = {name: flags for name, _, flags, _ in STUDIES["top-k"]}[f"K = {K}"]
    home = args.runs / args.data.resolve().name
    paths = [home / folder_name(words) / f"s{args.seed}/cls.pt" for words in (flags, "")]
    for path in filter(Path.is_file, paths):
        trained = load_checkpoint(path, "cls")["args"]
        if {"max": 1, "avg": "N"}.get(trained["pool"], trained["top_k"]) == K:
            return path
    raise DataError(f"{paths[0]} not found: run `python extras/study.py top-k --data {args.data}` "
                    f"with --seeds {args.seed} first")


def draw_top_k(args):
    """Table 5 on one image: patch probabilities with the K that Eq. (8) averages, and the BPM."""
    scene, columns = Scene(args), []
    for K in (1, 6, 12, "N"):
        _, Y, present, maps = scene.maps(run_of_top_k(args, K))
        values = Y[..., scene.label]
        most = values.flatten().topk(values.numel() if K == "N" else K).indices
        columns.append((f"K = {len(most)}" + " (all)" * (K == "N"), values,
                        *pseudo_masks(scene.image, present, maps, None),
                        [divmod(index, values.shape[1]) for index in most.tolist()]))
    return scene.draw_columns("probability of each patch, red: the K largest. Below: BPM", columns)


def draw_crf(args):
    """Probabilities and masks of one image after 0, 1, 3 and 10 iterations of the dense CRF."""
    scene, columns = Scene(args), []
    trained, _, present, maps = scene.maps(args.run / "cls.pt")
    flags = ["--data", str(args.data), "--run", str(args.run), "--preset", trained["preset"]]
    settings = crf_settings(make_pseudo.parse_args(flags), maps.device)
    probs = upsample(maps, *scene.image.shape[:2])
    for iterations in (0, 1, 3, 10):
        refined = dense_crf(scene.image, probs, **settings | dict(iterations=iterations))
        columns.append((f"{iterations} iteration{'s' * (iterations != 1)}",
                        refined[present == scene.label][0],
                        present[refined.argmax(0)].byte().numpy(), ()))
    about = "probability of each pixel. CRF: {bilateral_sxy:g} pixels, {bilateral_srgb:g} RGB " \
            "levels, weight {bilateral_compat:g}. Below: the mask"
    return scene.draw_columns(about.format(**settings), columns)


DRAWINGS = {"architecture": draw_architecture, "pipeline": draw_pipeline, "beetle": draw_beetle,
            "epochs": draw_epochs, "cross": draw_cross, "top-k": draw_top_k, "crf": draw_crf}


def main(args):
    for name in args.names:
        save(DRAWINGS[name](args), args.out / f"{name}.png", DPI)


if __name__ == "__main__":
    launch(main, parse_args())
