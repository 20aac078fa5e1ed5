"""The score against hand counts and torchmetrics; the prediction, whole and in windows."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import multiclass_jaccard_index

import evaluate
from conftest import BACKENDS
from data import Folder
from datasets.beetles import part_recall
from model import upsample
from support.crf import dense_crf
from support.files import UserError, write_lines
from support.inference import slide
from support.masks import save_mask


# --- the score ---------------------------------------------------------------------------------

@pytest.mark.confusion
def test_confusion_by_hand_with_255_on_either_side():
    truth = np.array([[0, 0, 1, 1, 255, 1, 1]], np.uint8)
    guess = np.array([[0, 1, 1, 255, 1, 1, 2]], np.uint8)
    confusion = evaluate.confusion_matrix(guess, truth, 3)
    # background: TP 1, FN 1; class 1: TP 2, FP 1; its FN are the 2 and the predicted 255
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 1, 1], [0, 0, 0, 0]]


@pytest.mark.iou
def test_iou_by_hand():
    confusion = np.array([[1, 1, 0, 0], [0, 2, 1, 1], [0, 0, 0, 0]])
    iou = evaluate.iou_per_class(confusion)
    assert iou[:2].tolist() == [1 / 2, 2 / 5] and np.isnan(iou[2])  # class 2 does not occur
    assert evaluate.miou(confusion) == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert evaluate.miou(np.zeros((3, 4), int)) is None


def test_iou_is_that_of_torchmetrics():
    truth, guess = torch.randint(0, 5, (2, 40, 50), generator=torch.Generator().manual_seed(0))
    truth[:4] = 255
    ours = evaluate.iou_per_class(evaluate.confusion_matrix(guess.numpy(), truth.numpy(), 5))
    theirs = multiclass_jaccard_index(guess, truth, 5, average="none", ignore_index=255)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_part_recall_by_hand(tmp_path):
    write_lines(tmp_path / "classes.txt", ["background", "a"])
    write_lines(tmp_path / "Parts/names.txt", ["body", "head"])
    truth, parts = np.array([[0, 1, 1, 1, 1, 255]]), np.array([[0, 1, 1, 1, 2, 0]])
    for where, mask in (("SegmentationClass", truth), ("Parts", parts),
                        ("pred", np.array([[1, 1, 1, 0, 0, 0]]))):
        save_mask(tmp_path / where / "x.png", mask)
    recall = part_recall(Folder(tmp_path), ["x"], tmp_path / "pred")
    assert recall == {"body": pytest.approx(2 / 3), "head": 0}


# --- prediction --------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [1, 9, 21, 81])
def test_prediction_is_the_argmax_of_the_upsampled_logits(classes):
    torch.manual_seed(0)
    logits = torch.randn(classes, 9, 13)
    logits[classes // 2] = logits[0]  # a tie: the first wins
    mask = evaluate.predict(logits, np.zeros((64, 97, 3), np.uint8))
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, upsample(logits, 64, 97).argmax(0).numpy())


def test_logits_are_those_of_the_networks_maximum_in_evaluation_mode():
    class Network(nn.Module):
        cell = 8

        def forward(self, images):
            assert not self.training and images.shape == (1, 3, 4, 6) and images.max() <= 1
            return [images[:, :2], images[:, 1:]]

    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    logits = evaluate.predict_log_probs(Network().train(), image, torch.device("cpu"), False)
    odds = np.exp(image[..., 1:].transpose(2, 0, 1) / 255)
    np.testing.assert_allclose(logits.exp(), odds / odds.sum(0), rtol=1e-5)
    Network.forward = lambda self, images: [images / 0]
    with pytest.raises(UserError, match="not finite"):
        evaluate.predict_log_probs(Network(), image, torch.device("cpu"), False)


def test_crf_over_the_classes_that_are_best_somewhere_is_that_over_all():
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((160, 120))
    image = np.array(image)
    logits = torch.randn(21, 6, 8, generator=torch_rng) * 2
    logits[6:] -= 9  # six classes compete, as they do after training, ...
    logits[20] = logits[:6].mean(dim=0)  # ... and one is never best, but never far
    kept = evaluate.predict(logits, image, {})
    probs = upsample(logits, 120, 160).softmax(0)
    every = dense_crf(image, probs).argmax(0).numpy()
    best = probs.argmax(0).numpy()
    assert 20 not in np.unique(best)
    assert (kept == every).mean() > 0.98
    assert (kept != best).mean() > 0.01  # the CRF does something here


@pytest.mark.parametrize("backend", BACKENDS)
def test_81_classes_at_960_pixels_stay_below_two_gib(backend, script):
    code = """
import resource, sys, numpy as np, torch, evaluate
torch.manual_seed(0)
logits = torch.nn.functional.interpolate(torch.randn(1, 81, 8, 8) * 5, (120, 120))[0]
image = np.full((960, 960, 3), 9, np.uint8)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
before = peak()
plain = evaluate.predict(logits, image)
refined = evaluate.predict(logits, image, {"iterations": 1, "backend": sys.argv[1]})
print(len(np.unique(plain)), len(np.unique(refined)), peak() - before)"""
    _, output = script("-c", code, backend)
    plain, refined, gib = map(float, output.split())
    assert plain > 30 and 1 < refined <= 21 and gib < 2


# --- sliding windows ---------------------------------------------------------------------------

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
