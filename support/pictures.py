"""Pictures of masks: rows of them beside their images, and the overlay on a photo."""
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch.nn.functional import max_pool2d

from data import voc_palette
from support.run import atomic

PICTURE = "drawn by evaluate.py"  # noted in the file


@matplotlib.rc_context({"text.parse_math": False})  # a $ in a name is a $
def draw(path, rows, titles, names, about, width):
    """Write rows of pictures (H, W, 3) and a legend; names {class number: name}."""
    shapes = [min(row[0].shape[0] / row[0].shape[1], 3) for row in rows]  # a row's are alike
    figure = Figure((width, sum(shapes) * width / len(titles) + 1.2), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False, height_ratios=shapes)
    for axis, picture in zip(axes.flat, sum(rows, [])):
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    figure.suptitle(about, fontsize=9)
    figure.legend(handles=[Patch(facecolor=voc_palette()[k] / 255, edgecolor="black", label=name)
                           for k, name in names.items()],
                  loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, metadata={"Title": PICTURE})


def draw_overlay(path, image, mask, names, titles):
    """Write a photo (H, W, 3) beside itself under its mask: colours at 45 % with outlines."""
    thin = max(1, max(mask.shape) // 1500)  # a large photo's picture needs no more pixels
    image, mask = image[::thin, ::thin], mask[::thin, ::thin]
    grown = max_pool2d(torch.tensor(mask)[None].float(), 3, 1, 1)[0].numpy()  # 1 pixel wider
    alpha = np.where(grown != mask, 1, 0.45)[..., None] * (grown > 0)[..., None]
    overlay = (1 - alpha) * image + alpha * voc_palette()[grown.astype(np.uint8)]
    draw(path, [[image, overlay.astype(np.uint8)]], titles, names, "", width=11)
