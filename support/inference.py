"""A trained network from its checkpoint, and its probabilities over images of any size."""
import math

import torch
import torch.nn.functional as F

from model import CPFCTE, ClassifierConfig, DeepLabv2, SegmenterConfig
from support.checkpoints import load_checkpoint, restore
from support.files import UserError


def load_model(path, kind, config=None, model=None):
    """(network, checkpoint) of RUN/cls.pt, RUN/seg.pt or another kind of network, ready to use."""
    checkpoint = load_checkpoint(path, kind)
    config, model = {"cls": (ClassifierConfig, CPFCTE),
                     "seg": (SegmenterConfig, DeepLabv2)}.get(kind, (config, model))
    try:
        network = model(config(**checkpoint["config"]))
    except TypeError as error:
        raise UserError(f"{path} is of another version ({error}): train anew")
    restore(path, checkpoint, model=network)
    return network.eval(), checkpoint


def slide(network, images, cell, window=None, stride=None, bar=iter):
    """The mean of network's probabilities (B, h, w, C) over overlapping windows of the images.

    images (B, 3, H, W); network gives probabilities for cells of `cell` pixels a side, of which
    window and stride (default: half a window) are multiples. Without a window, or where one covers
    the images: network(images). bar shows progress along a list.
    """
    H, W = images.shape[-2:]
    if not window or window >= max(H, W):
        return network(images)
    stride = stride or max(cell, window // 2 // cell * cell)
    if window % cell or stride % cell or stride > window:
        raise UserError(f"--window {window} and --stride {stride}: take multiples of {cell} "
                        "pixels, and a stride of at most the window")
    tops, lefts = ([*range(0, last, stride), last] for last in (
        max(0, math.ceil((side - window) / cell)) * cell for side in (H, W)))
    total = torch.zeros(())
    for top, left in bar([(top, left) for top in tops for left in lefts]):
        probs = network(images[..., top:top + window, left:left + window])
        before = left // cell, top // cell
        after = (math.ceil(W / cell) - before[0] - probs.shape[2],
                 math.ceil(H / cell) - before[1] - probs.shape[1])
        total = total + F.pad(probs, (0, 0, before[0], after[0], before[1], after[1]))
    return total / total.sum(dim=-1, keepdim=True)  # each window adds one: the sum counts them
