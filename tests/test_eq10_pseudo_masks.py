"""Eq. (10): from patch probabilities to pseudo masks, against hand calculations and Pillow."""
import numpy as np
import pytest
import torch
from PIL import Image

from make_pseudo import class_maps, pseudo_masks
from model import upsample
from support.crf import dense_crf

pytestmark = pytest.mark.eq10


def test_absent_classes_go_and_each_class_is_divided_by_its_maximum():
    Y = torch.tensor([[[0.6, 0.3, 0.1], [0.1, 0.5, 0.4]]])  # one row of two patches, three classes
    present, maps = class_maps(Y, torch.tensor([1.0, 0.0, 1.0]))
    assert present.tolist() == [0, 2]
    scaled = np.array([[0.6 / 0.6, 0.1 / 0.6], [0.1 / 0.4, 0.4 / 0.4]])
    np.testing.assert_allclose(maps[:, 0], scaled / scaled.sum(0), rtol=1e-5)
    _, plain = class_maps(Y, torch.tensor([1.0, 0.0, 1.0]), max_norm=False)
    expected = [[0.6 / 0.7, 0.1 / 0.5], [0.1 / 0.7, 0.4 / 0.5]]
    np.testing.assert_allclose(plain[:, 0], expected, rtol=1e-5)


def test_a_class_that_no_patch_has_gives_no_division_by_zero():
    Y = torch.zeros(2, 2, 3)
    Y[..., 0] = 1
    _, maps = class_maps(Y, torch.tensor([1.0, 1.0, 0.0]))
    assert maps.tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]]]


def test_upsampling_is_bilinear_as_pillow_does_it():
    maps = torch.rand(2, 5, 7)
    for result, plane in zip(upsample(maps, 20, 35), maps):
        expected = Image.fromarray(plane.numpy()).resize((35, 20), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(result, np.array(expected), atol=1e-5)


def test_the_bpm_is_the_class_of_the_largest_upsampled_map():
    maps = torch.tensor([[[0.9, 0.2]], [[0.1, 0.8]]])  # left background, right class 7
    bpm, = pseudo_masks(np.zeros((2, 8, 3), np.uint8), torch.tensor([0, 7]), maps, None)
    # at column x the second map is 0.1 + 0.7 * (x - 1.5) / 4: over one half from column 4 on
    assert bpm.tolist() == 2 * [[0, 0, 0, 0, 7, 7, 7, 7]] and bpm.dtype == np.uint8


def test_masks_are_the_argmax_before_and_after_the_crf_for_tensors_and_arrays():
    torch.manual_seed(0)
    image = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8).numpy()
    present, maps = class_maps(torch.rand(5, 6, 4), torch.tensor([1.0, 0, 1, 1]))
    crf = dict(backend="torch", iterations=3)
    probs = upsample(maps, 20, 30)
    expected = present[probs.argmax(0)], present[dense_crf(image, probs, **crf).argmax(0)]
    assert (expected[0] != expected[1]).any()  # the CRF does something here
    for given in ((present, maps), (present.numpy(), maps.numpy())):
        for mask, labels in zip(pseudo_masks(image, *given, crf), expected, strict=True):
            assert np.array_equal(mask, labels)
