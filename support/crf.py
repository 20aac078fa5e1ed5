"""The dense CRF (Kraehenbuehl & Koltun 2011): pydensecrf, or the same in plain PyTorch.

Mean field sends a message from every pixel to every other one in each iteration. Those sums are
Gaussian filters over the pixels' features, and the permutohedral lattice (Adams, Baek & Davis 2010)
computes them in linear time: splat every pixel onto the d + 1 corners of the simplex around it,
blur along the lattice's d + 1 axes, slice back.
"""
import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from support.files import UserError

try:
    import pydensecrf.densecrf as densecrf
except ImportError:  # it has no binary wheels and needs a C++ compiler
    densecrf = None

PROB_FLOOR = 1e-5  # the unary energy is -log(p): keeps it finite
MAX_TERMS = {"cuda": 128}  # most terms of a sum that one thread adds up, on devices of many threads


def add_crf_flags(add, default, sxy=67.0, srgb=3.0):
    """--crf and the CRF's constants, as flags; crf_settings(args, device) reads them."""
    add("--crf", default, "who computes the dense CRF: torch is support/crf.py, equal up to "
        "rounding; auto, or no word: pydensecrf, if installed, on a CPU, else torch", nargs="?",
        const="auto", choices=("auto", "torch", "pydensecrf", "none"))
    add("--crf-iterations", 10, "mean-field iterations", high=1000)
    add("--crf-sxy", sxy, "bilateral kernel: deviation in pixels", toy=30.0, photo=80.0, low=0.001)
    add("--crf-srgb", srgb, "bilateral kernel: deviation in RGB levels", toy=20.0, photo=13.0,
        low=0.001)
    add("--crf-compat", 4.0, "bilateral kernel: weight of its Potts term", toy=10.0, photo=10.0,
        high=1000)


def crf_backend(name, device):
    """The backend that `--crf name` means on a device: "torch" or "pydensecrf"."""
    if name == "pydensecrf" and densecrf is None:
        raise UserError("pydensecrf is not installed: --crf torch gives the same labels")
    if name == "auto":
        return "pydensecrf" if device.type != "cuda" and densecrf else "torch"
    return name


def crf_settings(args, device):
    """The keyword arguments of dense_crf that the flags set, or None for --crf none."""
    return None if args.crf == "none" else dict(
        backend=crf_backend(args.crf, device), iterations=args.crf_iterations,
        bilateral_sxy=args.crf_sxy, bilateral_srgb=args.crf_srgb, bilateral_compat=args.crf_compat)


def dense_crf(image, probs, *, backend="auto", iterations=10, gaussian_sxy=1, gaussian_compat=3,
              bilateral_sxy=67, bilateral_srgb=3, bilateral_compat=4):
    """Mean field in a fully connected CRF: refined probabilities (C, H, W) float32.

    image (H, W, 3) uint8 RGB, as it was decoded, array or tensor; probs (C, H, W) float32 tensor,
    summing to one over C. sxy are in pixels, srgb in levels of 0 to 255; defaults are ViT-PCM's.
    """
    C, H, W = probs.shape
    if C == 1:
        return probs
    unary = -probs.clamp(min=PROB_FLOOR).log()
    image = torch.as_tensor(image, device=probs.device)
    if crf_backend(backend, probs.device) == "torch":
        return mean_field(image, unary, iterations, gaussian_sxy, gaussian_compat, bilateral_sxy,
                          bilateral_srgb, bilateral_compat)
    crf = densecrf.DenseCRF2D(W, H, C)
    crf.setUnaryEnergy(unary.flatten(1).cpu().contiguous().numpy())
    crf.addPairwiseGaussian(sxy=gaussian_sxy, compat=gaussian_compat)
    crf.addPairwiseBilateral(sxy=bilateral_sxy, srgb=bilateral_srgb, compat=bilateral_compat,
                             rgbim=image.cpu().contiguous().numpy())
    Q = np.asarray(crf.inference(iterations))
    return torch.tensor(Q, device=probs.device).view(C, H, W)


@torch.no_grad()
def mean_field(image, unary, iterations, gaussian_sxy, gaussian_compat, bilateral_sxy,
               bilateral_srgb, bilateral_compat):
    """image (H, W, 3) uint8, unary (C, H, W) float32 = -log p -> Q (C, H, W), all on one device."""
    C, H, W = unary.shape
    colours = image.permute(2, 0, 1).flatten(1).float()
    places = positions(H, W, unary.device)
    bilateral = GaussianFilter(torch.cat([places / bilateral_sxy, colours / bilateral_srgb]))
    gaussian = spatial_filter(H, W, gaussian_sxy, unary.device)
    log_p = -unary.flatten(1).T.contiguous()  # (N, C)
    Q = log_p.softmax(dim=1)
    for _ in range(iterations):  # Potts model: a class gains where similar pixels have it
        messages = gaussian_compat * gaussian(Q) + bilateral_compat * bilateral(Q)
        Q = (log_p + messages).softmax(dim=1)
    return Q.T.reshape(C, H, W)


# --- the lattice: skip on a first reading -------------------------------------------------------
def enclosing_simplex(features):
    """The lattice simplex around each point of features (d, N) (Adams et al., Sec. 3.1).

    Its corner 0, a multiple of d + 1 in every coordinate; the rank of every coordinate, which tells
    the other corners; the corners' weights; (d + 1, N) each.
    """
    d, N = features.shape
    elevated = features.new_zeros(d + 1, N)  # onto the plane of d + 1 coordinates that sum to 0
    for j in range(d, 0, -1):  # in pydensecrf's order: another would break pixels' ties differently
        scaled = features[j - 1] * ((d + 1) * math.sqrt(2 / 3) / math.sqrt(j * (j + 1)))
        elevated[j] = elevated[0] - j * scaled
        elevated[0] += scaled
    corner = (elevated / (d + 1)).round() * (d + 1)
    offset = elevated - corner
    rank = (-offset).argsort(dim=0, stable=True).argsort(dim=0)  # 0 for the largest offset
    rank += (corner.sum(0) / (d + 1)).round().long()  # rounded off the plane: step back, by rank
    wrapped = (rank < 0).long() - (rank > d).long()
    rank += (d + 1) * wrapped
    corner += (d + 1) * wrapped
    offset = (elevated - corner) / (d + 1)
    rising = torch.empty_like(offset).scatter_(0, rank, offset).flip(0)  # from rank d to rank 0
    weights = rising - rising.roll(1, dims=0)
    weights[0] += 1
    return corner.long(), rank, weights


class GaussianFilter:
    """Approximate sums over N points, weights exp(-|f_i - f_j|^2 / 2), normalised symmetrically.

    features (d, N) are in units of their standard deviations. Called with values (N, C) float32.
    """

    def __init__(self, features):
        d, N = features.shape
        device = features.device
        corner, rank, weights = enclosing_simplex(features)
        # corner k is corner 0 plus k, less d + 1 in the k coordinates of highest rank; its first d
        # coordinates (all sum to zero) are the digits of one int64 key
        corner, rank = corner[:d], rank[:d]
        low = corner.amin(1, keepdim=True) - 2 * (d + 1)  # the margin is for the neighbours
        extent = (corner.amax(1, keepdim=True) + 2 * (d + 1) - low).flatten().tolist()
        strides = [math.prod(extent[:i]) for i in range(d + 1)]
        if strides.pop() >= 2 ** 63:
            raise UserError("--crf-sxy or --crf-srgb is too small: its lattice is too fine")
        digits = torch.tensor(strides, device=device)[:, None]
        corner_0 = ((corner - low) * digits).sum(0)
        keys = torch.stack([corner_0 + k * sum(strides)
                            - (d + 1) * ((rank > d - k) * digits).sum(0) for k in range(d + 1)])
        # splat: every vertex is a weighted sum of pixels; slice: every pixel one of d + 1 vertices
        ordered, order = keys.flatten().sort(stable=True)
        vertices, vertex_of, counts = torch.unique_consecutive(ordered, True, True)
        M = len(vertices)
        self.pixels, self.splat_weights = (order % N).int(), weights.flatten()[order]
        ends = F.pad(counts.cumsum(0), (1, 0)).int()  # one row more, of no pixel: of zeros
        self.pieces, self.rows = ends, None
        if device.type in MAX_TERMS:  # thousands of pixels share a vertex where the image is even
            cuts = torch.arange(0, len(order), MAX_TERMS[device.type], device=device)
            self.pieces = torch.cat([ends, cuts.int()]).unique()
            self.rows = torch.searchsorted(self.pieces, ends, out_int32=True)
        self.corners = torch.empty_like(vertex_of, dtype=torch.int32)
        self.corners[order] = vertex_of.int()
        self.corners = self.corners.view(d + 1, N).T.contiguous()
        self.slice_weights = weights.T.contiguous()
        # blur: a vertex's neighbours along each axis are d away in its own coordinate and -1 in all
        # others, and the reverse; M where there is none
        self.neighbours = []
        for axis in range(d + 1):
            wanted = vertices - sum(strides) + ((d + 1) * strides[axis] if axis < d else 0)
            found = torch.searchsorted(vertices, wanted).clamp(max=M - 1)
            ahead = torch.where(vertices[found] == wanted, found, M)
            behind = torch.full((M + 1,), M, device=device)
            behind[ahead] = torch.arange(M, device=device)
            self.neighbours.append((ahead.int(), behind[:M].int()))
        self.scale = 1.0  # to filter ones; then that to the power -1/2 on either side, (N, 1)
        self.scale = (self(torch.ones(N, 1, device=device)) + 1e-20).rsqrt()

    def __call__(self, values):
        # sums of sorted rows: index_add is 2 to 5 times slower on a CPU, of random order on CUDA
        lattice = F.embedding_bag(self.pixels, self.scale * values, self.pieces, mode="sum",
                                  per_sample_weights=self.splat_weights)  # (M + 1, C)
        if self.rows is not None:  # those were sums of pieces
            every = torch.arange(len(lattice), dtype=torch.int32, device=values.device)
            lattice = F.embedding_bag(every, lattice, self.rows, mode="sum")
        for ahead, behind in self.neighbours:
            both = lattice.index_select(0, ahead).add_(lattice.index_select(0, behind))
            lattice[:-1] += both.mul_(0.5)  # [1/2, 1, 1/2]; the factor goes in the scale
        return self.scale * F.embedding_bag(self.corners, lattice, mode="sum",
                                            per_sample_weights=self.slice_weights)


def positions(height, width, device):
    """(2, height * width) float32: x and y of every pixel, row by row."""
    sides = (torch.arange(side, device=device) for side in (height, width))
    return torch.cartesian_prod(*sides).T.flip(0).float().contiguous()


@lru_cache(maxsize=4)
def spatial_filter(height, width, sxy, device):
    """The filter over positions alone, which images of one size share."""
    return GaussianFilter(positions(height, width, device) / sxy)
