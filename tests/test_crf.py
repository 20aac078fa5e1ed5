"""The dense CRF against the direct O(N^2) mean field, pydensecrf and what defines a lattice."""
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import make_pseudo
from conftest import BACKENDS, HAS_PYDENSECRF
from support import crf
from support.crf import dense_crf
from support.files import UserError

FIELD = [(67, 3, 4), (50, 5, 10), (80, 13, 10), (121, 5, 4)]  # bilateral sxy, srgb, compat
needs_pydensecrf = pytest.mark.skipif(not HAS_PYDENSECRF, reason="the oracle is not installed")


def photograph(name):
    """One of scikit-image's own, (240, 320, 3) uint8."""
    photographs = pytest.importorskip("skimage.data")
    return np.array(Image.fromarray(getattr(photographs, name)()).resize((320, 240)))


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def soft_regions(C, H, W, seed=0):
    """(C, H, W) float32: smooth random class probabilities, as an upsampled map has them."""
    coarse = 2 * torch.randn(C, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse[None], (H, W), mode="bicubic")[0].softmax(0)


def refined(image, probs, backend, constants):
    """dense_crf with one of FIELD's constants."""
    names = ("bilateral_sxy", "bilateral_srgb", "bilateral_compat")
    return dense_crf(image, probs, backend=backend, **dict(zip(names, constants)))


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

PICTURES = {  # classes, and an image of them: photographs of scikit-image, noise of odd sizes
    "coffee": (4, partial(photograph, "coffee")), "chelsea": (2, partial(photograph, "chelsea")),
    "astronaut": (21, partial(photograph, "astronaut")), "1 x 600": (2, partial(noise, 1, 600)),
    "67 x 40": (3, partial(noise, 67, 40)), "45 x 90": (21, partial(noise, 45, 90))}


@needs_pydensecrf
@pytest.mark.parametrize("constants", FIELD, ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_labels_are_those_of_pydensecrf(name, constants):
    labels, picture = PICTURES[name]
    image = picture()
    probs = soft_regions(labels, *image.shape[:2])
    ours, theirs = (refined(image, probs, backend, constants)
                    for backend in ("torch", "pydensecrf"))
    assert (ours.argmax(0) == theirs.argmax(0)).float().mean() >= 0.9999
    assert (ours - theirs).abs().mean() < 1e-4
    assert (theirs.argmax(0) != probs.argmax(0)).any()  # there was something to agree on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("constants", FIELD)
def test_labels_on_a_gpu_are_those_on_a_cpu(constants):
    image, probs = photograph("coffee"), soft_regions(4, 240, 320)
    here, there = (refined(image, probs.to(device), "torch", constants).argmax(0).cpu()
                   for device in ("cpu", "cuda"))
    assert (here == there).float().mean() >= 0.9999


@pytest.mark.parametrize("spread", [0, 2])
def test_sums_in_pieces_as_on_a_gpu_change_no_label(monkeypatch, spread):
    random = torch.Generator().manual_seed(0)  # even images: thousands of pixels share a vertex
    image = 120 + torch.randint(-spread, spread + 1, (120, 160, 3), generator=random).byte()
    probs = soft_regions(3, 120, 160)
    whole = dense_crf(image, probs, backend="torch").argmax(0)
    monkeypatch.setitem(crf.MAX_TERMS, "cpu", 100)
    labels = dense_crf(image, probs, backend="torch").argmax(0)
    assert (labels == whole).float().mean() >= 0.9999 and (whole != probs.argmax(0)).any()


# --- which backend -------------------------------------------------------------------------------

def test_without_pydensecrf_auto_is_torch_and_its_name_is_refused(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert crf.crf_backend("auto", cuda) == "torch"
    assert crf.crf_backend("auto", cpu) == ("pydensecrf" if HAS_PYDENSECRF else "torch")
    monkeypatch.setattr(crf, "densecrf", None)
    assert crf.crf_backend("auto", cpu) == "torch"
    image, probs = np.zeros((9, 8, 3), np.uint8), soft_regions(3, 9, 8)
    assert torch.equal(dense_crf(image, probs), dense_crf(image, probs, backend="torch"))
    with pytest.raises(UserError, match="is not installed: --crf torch gives the same labels"):
        dense_crf(image, probs, backend="pydensecrf")


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
