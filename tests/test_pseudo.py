"""Pseudo masks and the dense CRF, against hand calculations and a direct O(N^2) mean field."""
import numpy as np
import pytest
import torch
from PIL import Image

from conftest import BACKENDS
from evaluate import write_all
from make_pseudo import masks_of, present_probs
from model import upsample
from support import crf
from support.crf import dense_crf
from support.run import in_parallel


def test_absent_classes_go_and_each_class_is_divided_by_its_maximum():
    Y = torch.tensor([[[0.6, 0.3, 0.1], [0.1, 0.5, 0.4]]])  # one row of two patches, three classes
    present, maps = present_probs(Y, torch.tensor([1.0, 0.0, 1.0]))
    assert present.tolist() == [0, 2]
    scaled = np.array([[0.6 / 0.6, 0.1 / 0.6], [0.1 / 0.4, 0.4 / 0.4]])
    np.testing.assert_allclose(maps[:, 0], scaled / scaled.sum(0), rtol=1e-5)
    _, plain = present_probs(Y, torch.tensor([1.0, 0.0, 1.0]), max_norm=False)
    expected = [[0.6 / 0.7, 0.1 / 0.5], [0.1 / 0.7, 0.4 / 0.5]]
    np.testing.assert_allclose(plain[:, 0], expected, rtol=1e-5)


def test_upsampling_is_bilinear_as_pillow_does_it():
    maps = torch.rand(2, 5, 7)
    for result, plane in zip(upsample(maps, 20, 35), maps):
        expected = Image.fromarray(plane.numpy()).resize((35, 20), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(result, np.array(expected), atol=1e-5)


def exact_mean_field(image, probs, iterations, kernels):
    """Krähenbühl & Koltun's mean field with every pair of pixels visited; float64.

    kernels: (weight, spatial deviation, colour deviation or None); each kernel matrix is normalised
    symmetrically, and a pixel sends no message to itself only through the Potts term's constant.
    """
    C, H, W = probs.shape
    y, x = np.mgrid[:H, :W]
    place = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    colour = image.reshape(-1, 3).astype(float)
    message_matrix = 0
    for weight, sxy, srgb in kernels:
        feature = place / sxy if srgb is None else np.hstack([place / sxy, colour / srgb])
        distance = ((feature[:, None] - feature[None]) ** 2).sum(-1)
        K = np.exp(-distance / 2)
        scale = 1 / np.sqrt(K.sum(1))
        message_matrix = message_matrix + weight * scale[:, None] * K * scale[None]
    unary = -np.log(np.maximum(probs.reshape(C, -1), crf.PROB_FLOOR)).astype(float)
    def softmax(energy):
        e = np.exp(-(energy - energy.min(0)))
        return e / e.sum(0)
    Q = softmax(unary)
    for _ in range(iterations):
        Q = softmax(unary - Q @ message_matrix)
    return Q.reshape(C, H, W)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sxy, srgb, compat, agreement, difference", [
    (67, 3, 4, 0.92, 0.055), (10, 13, 10, 0.96, 0.03), (30, 20, 10, 0.98, 0.01)])
def test_crf_against_the_direct_mean_field(sxy, srgb, compat, agreement, difference, backend):
    rng = np.random.default_rng(0)
    image = np.zeros((24, 30, 3))  # ramps, so that every colour distance occurs
    image[..., 0] = np.linspace(20, 235, 30)
    image[..., 2] = np.linspace(200, 40, 24)[:, None]
    image[6:18, 8:24, 1] = 60
    image = (image + rng.integers(-3, 4, image.shape)).clip(0, 255).astype(np.uint8)
    probs = rng.dirichlet((2, 2, 2), (24, 30)).transpose(2, 0, 1).astype(np.float32)
    probs[1, 6:18, 8:24] += 0.5
    probs /= probs.sum(0)
    result = dense_crf(image, probs, bilateral_sxy=sxy, bilateral_srgb=srgb,
                       bilateral_compat=compat, backend=backend)
    exact = exact_mean_field(image, probs, 10, [(3, 1, None), (compat, sxy, srgb)])
    assert result.shape == probs.shape and result.dtype == np.float32
    np.testing.assert_allclose(result.sum(0), 1, atol=1e-4)
    assert (result.argmax(0) != probs.argmax(0)).mean() > 0.1  # there was something to refine
    # the permutohedral lattice approximates the Gaussians, the worse the narrower they are; a
    # deviation that is wrong by half misses each of these bounds
    assert (result.argmax(0) == exact.argmax(0)).mean() > agreement
    assert np.abs(result - exact).mean() < difference


@pytest.mark.parametrize("backend", BACKENDS)
def test_crf_with_one_class_and_without_iterations(backend):
    image = np.zeros((4, 5, 3), np.uint8)
    assert dense_crf(image, np.ones((1, 4, 5), np.float32), backend=backend).min() == 1
    probs = np.random.default_rng(0).dirichlet((1, 1), (4, 5)).transpose(2, 0, 1).astype(np.float32)
    same = dense_crf(image, probs, iterations=0, backend=backend)
    np.testing.assert_allclose(same, probs, atol=1e-4)
    kept = dense_crf(torch.from_numpy(image), torch.from_numpy(probs), backend=backend)
    assert torch.is_tensor(kept)  # of the kind that probs are
    np.testing.assert_array_equal(kept, dense_crf(image, probs, backend=backend))


@pytest.mark.parametrize("workers", [0, 2])
def test_jobs_in_parallel_keep_their_order(workers):
    jobs = ((number,) for number in range(-40, 0))
    assert list(in_parallel(abs, jobs, workers)) == list(range(40, 0, -1))


def test_masks_are_the_same_wherever_they_are_computed(tmp_path):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8)
    present, maps = present_probs(torch.rand(5, 6, 4), torch.tensor([1.0, 0, 1, 1]))
    crf = dict(backend="torch", iterations=3)
    for device in ("cpu", "cuda"):  # the tensors stay on the CPU: it is who computes that differs
        jobs = [((image, present, maps, crf), [tmp_path / f"{device}-{kind}.png"
                                               for kind in ("bpm", "pseudo")])]
        assert len(list(write_all(masks_of, jobs, 2, torch.device(device), crf))) == 1
    probs = upsample(maps, 20, 30)
    expected = {"bpm": probs, "pseudo": dense_crf(image, probs, **crf)}
    for kind, scores in expected.items():
        masks = [np.array(Image.open(path)) for path in sorted(tmp_path.glob(f"*-{kind}.png"))]
        assert len(masks) == 2 and all(np.array_equal(m, present[scores.argmax(0)]) for m in masks)
    assert (expected["bpm"].argmax(0) != expected["pseudo"].argmax(0)).any()
