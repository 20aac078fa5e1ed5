"""support/crf.py against pydensecrf on photographs, and its lattice against what defines one."""
import argparse
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image


from conftest import HAS_PYDENSECRF
from support.run import DataError
from support import crf, run
from support.crf import dense_crf

FIELD = [(67, 3, 4), (50, 5, 10), (80, 13, 10), (121, 5, 4)]  # bilateral sxy, srgb, compat
needs_pydensecrf = pytest.mark.skipif(not HAS_PYDENSECRF, reason="the oracle is not installed")


def photograph(name, size=None):
    """One of scikit-image's own, (H, W, 3) uint8."""
    photographs = pytest.importorskip("skimage.data")
    image = Image.fromarray(getattr(photographs, name)())
    return np.array(image.resize(size) if size else image)


def soft_regions(C, H, W, seed=0):
    """(C, H, W) float32: smooth random class probabilities, as an upsampled map has them."""
    coarse = 2 * torch.randn(C, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse[None], (H, W), mode="bicubic")[0].softmax(0).numpy()


def agreement(image, probs, sxy, srgb, compat):
    """(share of equal labels, mean difference in Q, share of labels that the CRF changed)."""
    constants = dict(bilateral_sxy=sxy, bilateral_srgb=srgb, bilateral_compat=compat)
    ours = dense_crf(image, probs, backend="torch", **constants)
    theirs = dense_crf(image, probs, backend="pydensecrf", **constants)
    labels = theirs.argmax(0)
    return ((ours.argmax(0) == labels).mean(), np.abs(ours - theirs).mean(),
            (labels != probs.argmax(0)).mean())


@needs_pydensecrf
@pytest.mark.parametrize("name, labels, constants", [
    (name, labels, constants)
    for constants, (name, labels) in itertools.product(FIELD, [("coffee", 4), ("chelsea", 2)])
] + [("astronaut", 21, FIELD[0]), ("astronaut", 8, FIELD[2])])
def test_labels_of_pydensecrf_on_photographs(name, labels, constants):
    image = photograph(name, (500, 375))
    same, difference, changed = agreement(image, soft_regions(labels, 375, 500), *constants)
    assert same >= 0.9999 and difference < 1e-4, (same, difference)
    assert changed > 0.005  # there was something to agree on


@needs_pydensecrf
@pytest.mark.parametrize("constants", FIELD)
@pytest.mark.parametrize("labels, height, width", [(2, 1, 60), (3, 67, 40), (21, 45, 90)])
def test_labels_of_pydensecrf_on_noise_and_odd_sizes(labels, height, width, constants):
    image = np.random.default_rng(labels).integers(0, 256, (height, width, 3), dtype=np.uint8)
    same, difference, _ = agreement(image, soft_regions(labels, height, width), *constants)
    assert same >= 0.9999 and difference < 1e-4, (same, difference)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("constants", FIELD)
def test_labels_on_a_gpu_are_those_on_a_cpu(constants):
    image, probs = photograph("coffee", (500, 375)), torch.from_numpy(soft_regions(4, 375, 500))
    names = ("bilateral_sxy", "bilateral_srgb", "bilateral_compat")
    here, there = (dense_crf(image, probs.to(device), backend="torch",
                             **dict(zip(names, constants))).cpu() for device in ("cpu", "cuda"))
    assert (here.argmax(0) == there.argmax(0)).float().mean() >= 0.9999


@pytest.mark.parametrize("d", [2, 5])
def test_simplices_enclose_their_points(d):
    points = 4 * torch.randn(d, 500, generator=torch.Generator().manual_seed(d))
    corner, rank, weights = crf.enclosing_simplex(points)
    assert (corner.remainder(d + 1) == 0).all() and (corner.sum(0) == 0).all()
    assert (rank.sort(0).values == torch.arange(d + 1)[:, None]).all()
    assert weights.min() > -1e-5
    torch.testing.assert_close(weights.sum(0), torch.ones(500))
    # the corners, so weighted, are the point itself: its elevation by Adams et al.'s matrix
    corners = torch.stack([corner + k - (d + 1) * (rank > d - k) for k in range(d + 1)])
    basis = torch.ones(d + 1, d).triu()
    basis[1:].diagonal().copy_(-torch.arange(1, d + 1))
    scale = (d + 1) * (2 / 3) ** 0.5 / basis.norm(dim=0)  # orthonormal columns, then the deviation
    torch.testing.assert_close((weights[:, None] * corners).sum(0), (basis * scale) @ points,
                               atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("d", [2, 5])
def test_vertices_and_neighbours_are_those_of_their_coordinates(d):
    points = 2 * torch.randn(d, 40, generator=torch.Generator().manual_seed(d))
    gaussian = crf.GaussianFilter(points)
    corner, rank, _ = crf.enclosing_simplex(points)
    number = {}  # coordinates of a vertex -> its row
    for k in range(d + 1):
        for vertex, row in zip((corner + k - (d + 1) * (rank > d - k)).T.tolist(),
                               gaussian.corners[:, k].tolist()):
            assert number.setdefault(tuple(vertex), row) == row
    missing = len(gaussian.starts)
    assert sorted(number.values()) == list(range(missing))
    for axis, (ahead, behind) in enumerate(gaussian.neighbours):
        for vertex, row in number.items():
            for sign, neighbour in ((1, ahead[row]), (-1, behind[row])):
                step = [sign * (d * (i == axis) - (i != axis)) for i in range(d + 1)]
                expected = tuple(a + b for a, b in zip(vertex, step))
                assert neighbour == number.get(expected, missing)


def test_the_filter_is_close_to_a_gaussian_sum():
    points = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    kernel = crf.GaussianFilter(points)(torch.eye(400))
    exact = (-torch.cdist(points.T, points.T) ** 2 / 2).exp()
    scale = exact.sum(1).rsqrt()
    exact = scale[:, None] * exact * scale
    assert (kernel - exact).abs().sum() < 0.12 * exact.sum()


def test_a_lattice_too_fine_for_its_keys_is_refused():
    image = np.array(Image.linear_gradient("L").convert("RGB").resize((64, 64)))
    with pytest.raises(DataError, match="--crf-srgb is too small"):
        dense_crf(image, soft_regions(2, 64, 64), backend="torch", bilateral_srgb=0.001)
    for text in ("0", "-3", "1e-6", "nan", "inf", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="no number from 0.001 up"):
            run.deviation(text)
    assert run.deviation("67") == 67


def test_without_pydensecrf_auto_is_torch_and_asking_for_it_names_the_way_out(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert crf.crf_backend("auto", cuda) == "torch"
    assert crf.crf_backend("auto", cpu) == ("pydensecrf" if HAS_PYDENSECRF else "torch")
    monkeypatch.setattr(crf, "densecrf", None)
    assert crf.crf_backend("auto", cpu) == "torch"
    image, probs = np.zeros((9, 8, 3), np.uint8), soft_regions(3, 9, 8)
    assert np.array_equal(dense_crf(image, probs), dense_crf(image, probs, backend="torch"))
    with pytest.raises(DataError, match="--crf torch gives the same labels"):
        dense_crf(image, probs, backend="pydensecrf")


def test_the_scripts_start_where_pydensecrf_is_missing(script, tmp_path):
    (tmp_path / "pydensecrf.py").write_text("raise ImportError('as if it were not installed')")
    code = "import evaluate, make_pseudo, support.crf; print(support.crf.densecrf)"
    assert script("-c", code, env={"PYTHONPATH": str(tmp_path)})[1].strip() == "None"
