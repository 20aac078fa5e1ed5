"""Sliding windows: averaged probabilities against a loop over cells, and the whole image."""
import numpy as np
import pytest
import torch

import evaluate
from model import CPFCTE, ClassifierConfig, DeepLabv2, SegmenterConfig
from support.inference import slide

CELL, C = 8, 3


def local(images):
    """(B, 3, H, W) -> (B, h, w, C): each cell's own probabilities, whatever is around it."""
    cells = torch.nn.functional.avg_pool2d(images, CELL, ceil_mode=True)
    return cells.permute(0, 2, 3, 1).softmax(dim=-1)


class Tagged:
    """A network whose probabilities tell which window was seen: the window's mean colour."""

    def __init__(self):
        self.windows = []

    def __call__(self, images):
        self.windows.append(tuple(images.shape[-2:]))
        h, w = (-(-side // CELL) for side in images.shape[-2:])
        mean = images.mean(dim=(2, 3)).softmax(dim=-1)
        return mean[:, None, None].expand(-1, h, w, -1)


@pytest.mark.parametrize("height, width", [(40, 64), (43, 61), (24, 100), (32, 32)])
def test_windows_of_a_network_that_looks_at_one_cell_are_the_whole_image(height, width):
    images = torch.rand(2, C, height, width)
    for window, stride in ((32, 16), (32, 8), (32, 32), (16, None), (24, None)):
        torch.testing.assert_close(slide(local, images, CELL, window, stride), local(images))


def test_a_cell_is_the_mean_over_the_windows_that_hold_it():
    height, width, window, stride = 45, 70, 24, 16
    images, network = torch.rand(1, C, height, width), Tagged()
    result = slide(network, images, CELL, window, stride)[0]
    assert result.shape == (6, 9, C) and max(map(max, network.windows)) == window
    for y in range(6):
        for x in range(9):  # windows begin every 2 cells, the last one where it ends with the image
            seen = [Tagged()(images[..., 8 * top:8 * top + window, 8 * left:8 * left + window])
                    for top in (0, 2, 3) for left in (0, 2, 4, 6)
                    if top <= y < top + 3 and left <= x < left + 3]
            torch.testing.assert_close(result[y, x], torch.cat(seen)[:, 0, 0].mean(dim=0))


@pytest.mark.parametrize("window", [None, 64, 640])
def test_one_window_that_covers_the_image_is_the_whole_image(window):
    images, network = torch.rand(1, C, 64, 48), Tagged()
    assert torch.equal(slide(network, images, CELL, window, 8), Tagged()(images))
    assert network.windows == [(64, 48)]


def test_the_classifiers_windows_see_a_window_each():
    torch.manual_seed(0)
    model = CPFCTE(ClassifierConfig(C, "vit_toy")).eval()
    images = torch.rand(1, 3, 96, 128)
    whole = slide(model, images, 8, 96, 32)
    halves = model(images[..., :96]), model(images[..., 32:])
    assert whole.shape == (1, 12, 16, C)
    torch.testing.assert_close(whole[:, :, :4], halves[0][:, :, :4])
    torch.testing.assert_close(whole[:, :, 12:], halves[1][:, :, 8:])
    torch.testing.assert_close(whole[:, :, 8], (halves[0][:, :, 8] + halves[1][:, :, 4]) / 2)


def test_deeplabv2_predicts_the_same_from_windows_that_cover_the_image_and_draws_a_bar():
    torch.manual_seed(0)
    model = DeepLabv2(SegmenterConfig(C, "resnet_toy", (1, 2), (1.0,)))
    image = np.random.default_rng(0).integers(0, 256, (75, 130, 3), np.uint8)
    cpu = torch.device("cpu")
    whole = evaluate.predict_logits(model, image, cpu, False)
    again = evaluate.predict_logits(model, image, cpu, False, window=136)
    assert torch.equal(whole, again) and whole.shape == (C, 10, 17)
    bars = []
    parts = evaluate.predict_logits(model, image, cpu, False, 64, 32, lambda w: bars.append(w) or w)
    assert len(bars[0]) == 2 * 4 and parts.shape == whole.shape
    torch.testing.assert_close(parts.exp().sum(dim=0), torch.ones(10, 17))
    assert not torch.allclose(parts, whole)
