"""The dense CRF against the direct O(N^2) mean field, pydensecrf and what defines a lattice."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import make_pseudo
from conftest import BACKENDS, HAS_PYDENSECRF
from support import crf
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
    return F.interpolate(coarse[None], (H, W), mode="bicubic")[0].softmax(0)


def agreement(image, probs, sxy, srgb, compat):
    """(share of equal labels, mean difference in Q, share of labels that the CRF changed)."""
    constants = dict(bilateral_sxy=sxy, bilateral_srgb=srgb, bilateral_compat=compat)
    ours = dense_crf(image, probs, backend="torch", **constants)
    theirs = dense_crf(image, probs, backend="pydensecrf", **constants)
    labels = theirs.argmax(0)
    return ((ours.argmax(0) == labels).float().mean(), (ours - theirs).abs().mean(),
            (labels != probs.argmax(0)).float().mean())


# --- the direct mean field ----------------------------------------------------------------------

def exact_mean_field(image, probs, iterations, kernels):
    """Krähenbühl & Koltun's mean field over every pair of pixels, float64.

    kernels: (weight, spatial deviation, colour deviation or None). Each kernel matrix is normalised
    symmetrically. A pixel's message to itself is in the sum, as in pydensecrf.
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
@pytest.mark.parametrize("sxy, srgb, compat, share, difference", [
    (67, 3, 4, 0.92, 0.055), (10, 13, 10, 0.96, 0.03), (30, 20, 10, 0.98, 0.01)])
def test_crf_against_the_direct_mean_field(sxy, srgb, compat, share, difference, backend):
    rng = np.random.default_rng(0)
    image = np.zeros((24, 30, 3))  # ramps, so that every colour distance occurs
    image[..., 0] = np.linspace(20, 235, 30)
    image[..., 2] = np.linspace(200, 40, 24)[:, None]
    image[6:18, 8:24, 1] = 60
    image = (image + rng.integers(-3, 4, image.shape)).clip(0, 255).astype(np.uint8)
    probs = rng.dirichlet((2, 2, 2), (24, 30)).transpose(2, 0, 1).astype(np.float32)
    probs[1, 6:18, 8:24] += 0.5
    probs /= probs.sum(0)
    result = dense_crf(image, torch.from_numpy(probs), bilateral_sxy=sxy, bilateral_srgb=srgb,
                       bilateral_compat=compat, backend=backend).numpy()
    exact = exact_mean_field(image, probs, 10, [(3, 1, None), (compat, sxy, srgb)])
    assert result.shape == probs.shape and result.dtype == np.float32
    np.testing.assert_allclose(result.sum(0), 1, atol=1e-4)
    assert (result.argmax(0) != probs.argmax(0)).mean() > 0.1  # there was something to refine
    # the permutohedral lattice approximates the Gaussians, the worse the narrower they are; a
    # deviation that is wrong by half misses each of these bounds
    assert (result.argmax(0) == exact.argmax(0)).mean() > share
    assert np.abs(result - exact).mean() < difference


@pytest.mark.parametrize("backend", BACKENDS)
def test_crf_with_one_class_and_without_iterations(backend):
    image = torch.zeros(4, 5, 3, dtype=torch.uint8)
    assert dense_crf(image, torch.ones(1, 4, 5), backend=backend).min() == 1
    probs = torch.rand(2, 4, 5).softmax(0)
    same = dense_crf(image, probs, iterations=0, backend=backend)
    torch.testing.assert_close(same, probs, atol=1e-4, rtol=0)
    assert torch.equal(same, dense_crf(image.numpy(), probs, iterations=0, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_probability_floor_lets_a_class_of_probability_zero_win(backend):
    probs = torch.zeros(2, 8, 9)
    probs[0] = 1
    probs[:, 4, 4] = torch.tensor([0.0, 1.0])  # one pixel against all others, all of one colour
    image = np.zeros((8, 9, 3), np.uint8)
    assert dense_crf(image, probs, backend=backend).argmax(0).sum() == 1
    refined = dense_crf(image, probs, bilateral_compat=30, backend=backend)
    assert refined.isfinite().all() and not refined.argmax(0).any()


# --- pydensecrf ---------------------------------------------------------------------------------

@needs_pydensecrf
@pytest.mark.parametrize("name, labels, constants", [
    (name, labels, constants)
    for constants, (name, labels) in itertools.product(FIELD, [("coffee", 4), ("chelsea", 2)])
] + [("astronaut", 21, FIELD[0]), ("astronaut", 8, FIELD[2])])
def test_labels_of_pydensecrf_on_photographs(name, labels, constants):
    image = photograph(name, (500, 375))
    same, difference, changed = agreement(image, soft_regions(labels, 375, 500), *constants)
    assert same >= 0.9999 and difference < 1e-4
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
    image, probs = photograph("coffee", (500, 375)), soft_regions(4, 375, 500)
    names = ("bilateral_sxy", "bilateral_srgb", "bilateral_compat")
    here, there = (dense_crf(image, probs.to(device), backend="torch",
                             **dict(zip(names, constants))).cpu() for device in ("cpu", "cuda"))
    assert (here.argmax(0) == there.argmax(0)).float().mean() >= 0.9999


# --- the lattice --------------------------------------------------------------------------------

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
    missing = len(gaussian.pieces) - 1
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


def test_long_rows_are_summed_in_pieces_and_rightly(monkeypatch):
    """Thousands of points share a vertex here; the oracle adds them in float64, one by one."""
    points = 0.3 * torch.randn(2, 20000, generator=torch.Generator().manual_seed(0))
    values = torch.rand(20000, 3, generator=torch.Generator().manual_seed(1))
    monkeypatch.setitem(crf.PIECE, "cpu", 100)
    gaussian = crf.GaussianFilter(points)
    longest = gaussian.pieces[gaussian.rows].diff().max()
    assert gaussian.pieces.diff().max() == 100 and longest > 1000
    scale, lattice = gaussian.scale.double().numpy(), np.zeros((len(gaussian.rows), 3))
    corners, weights = gaussian.corners.T.numpy(), gaussian.slice_weights.T[..., None].numpy()
    for corner, weight in zip(corners, weights):
        np.add.at(lattice, corner, weight * scale * values.numpy())
    for ahead, behind in gaussian.neighbours:
        lattice[:-1] += (lattice[ahead] + lattice[behind]) / 2
    expected = scale * sum(weight * lattice[corner] for corner, weight in zip(corners, weights))
    np.testing.assert_allclose(gaussian(values).numpy(), expected, rtol=2e-5)


# --- which backend -------------------------------------------------------------------------------

def test_without_pydensecrf_auto_is_torch(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert crf.crf_backend("auto", cuda) == "torch"
    assert crf.crf_backend("auto", cpu) == ("pydensecrf" if HAS_PYDENSECRF else "torch")
    monkeypatch.setattr(crf, "densecrf", None)
    assert crf.crf_backend("auto", cpu) == "torch"
    image, probs = np.zeros((9, 8, 3), np.uint8), soft_regions(3, 9, 8)
    assert torch.equal(dense_crf(image, probs), dense_crf(image, probs, backend="torch"))


def test_flags_become_the_keyword_arguments_of_the_crf(tmp_path):
    cpu, where = torch.device("cpu"), ["--data", "x", "--run", str(tmp_path), "--preset", "toy"]
    args = make_pseudo.parse_args([*where, "--crf", "torch", "--crf-sxy", "5"])
    assert crf.crf_settings(args, cpu) == dict(backend="torch", iterations=10, bilateral_sxy=5.0,
                                               bilateral_srgb=20.0, bilateral_compat=10.0)
    assert crf.crf_settings(make_pseudo.parse_args([*where, "--crf", "none"]), cpu) is None


def test_the_scripts_start_where_pydensecrf_is_missing(script, tmp_path):
    (tmp_path / "pydensecrf.py").write_text("raise ImportError('as if it were not installed')")
    code = "import evaluate, make_pseudo, support.crf; print(support.crf.densecrf)"
    assert script("-c", code, env={"PYTHONPATH": str(tmp_path)})[1].strip() == "None"
