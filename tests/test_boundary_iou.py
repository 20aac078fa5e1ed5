"""support/scores.py: boundary IoU by hand, and its regions by scikit-image's erosion."""
import numpy as np
import pytest
from skimage.morphology import erosion, footprint_rectangle

from data import Folder
from support.files import write_lines
from support.masks import IGNORE, save_mask
from support.scores import boundary_iou, boundary_region


@pytest.mark.parametrize("height, width, reach", [(40, 30, 1), (120, 160, 4), (375, 500, 12)])
def test_a_region_is_what_erosion_takes_away(height, width, reach):
    rng = np.random.default_rng(height)
    mask = np.kron(rng.integers(0, 3, (5, 5)), np.ones((height // 5, width // 5))).astype(np.uint8)
    square = footprint_rectangle((2 * reach + 1, 2 * reach + 1))
    for label in range(3):
        inside = np.pad(mask == label, reach).astype(np.uint8)  # nothing lies outside the image
        left = erosion(inside, square)[reach:-reach, reach:-reach] > 0
        expected = (mask == label) & ~left
        assert 0 < expected.sum() < (mask == label).sum()
        assert np.array_equal(boundary_region(mask, label), expected)


@pytest.fixture
def folder(tmp_path):
    """A data set of one image of 30 x 40 pixels, whose regions are one pixel wide; no masks."""
    write_lines(tmp_path / "classes.txt", ["background", "a", "b"])
    (tmp_path / "pred").mkdir()
    return Folder(tmp_path)


def score(folder, truth, prediction):
    save_mask(folder.mask_path("x"), truth)
    save_mask(folder.root / "pred/x.png", prediction)
    return boundary_iou(folder, ["x"], folder.root / "pred")


def test_boundary_iou_by_hand(folder):
    truth = np.zeros((30, 40), np.uint8)
    truth[10:20, 10:20] = 1  # its region: a ring of 36 pixels
    moved = np.roll(truth, 1, axis=1)  # the rings share 9 pixels above and 9 below
    background, a, b = score(folder, truth, moved)
    assert a == pytest.approx(18 / (36 + 36 - 18))
    assert np.isnan(b) and 0 < background < 1
    assert score(folder, truth, truth)[:2] == pytest.approx(1)


def test_a_large_object_cannot_hide_its_contour(folder):
    truth, loose = np.zeros((2, 30, 40), np.uint8)
    truth[1:29, 1:39], loose[3:27, 3:37] = 1, 1
    iou = (loose & truth).sum() / (loose | truth).sum()
    assert iou > 0.75 and score(folder, truth, loose)[1] == 0


def test_pixels_that_are_not_scored_belong_to_no_class(folder):
    truth = np.zeros((30, 40), np.uint8)
    truth[10:20, 10:20] = 1
    prediction = truth.copy()
    truth[9:21, 20:23] = IGNORE  # VOC's band around an object, here on one side of it
    prediction[10:20, 20:23] = 1  # reaches into the band: nobody knows whether that is wrong
    assert score(folder, truth, prediction)[1] == 1
