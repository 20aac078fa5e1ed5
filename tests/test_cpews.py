"""CPEWS and PAR: known answers of every equation, defects of the release, the script end to end."""
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from conftest import in_process, log_of
from data import Folder
from datasets import coco as coco_maker, voc as voc_maker
from extras.cpews import model as cpews_model, par, train as cpews
from extras.cpews.model import CPEWS, CPEWSConfig
from model import classification_loss, pool_patches
from support.files import UserError, write_lines
from support.masks import EXPORT, read_image, read_mask

VOC_DILATIONS = (1, 2, 4, 8, 12, 24)
SHORT = ("--warm-up 3 --iterations 6 --ism-from 1 --seg-from 2 --crop 48 --batch-size 4 "
         "--save-every 2 --val-images 2 --workers 0").split()
TOY = "--data x --run y --preset toy".split()
CPU = torch.device("cpu")


def approx(value, tolerance=1e-6):
    return pytest.approx(value, abs=tolerance)


def tokens(*vectors):
    """A (1, D, 1, n) map of these n token vectors."""
    return torch.tensor(vectors, dtype=torch.float).T[None, :, None].contiguous()


def pools(P=(), N=(), U=()):
    """The pools of a single class."""
    return {name: [torch.tensor(rows, dtype=torch.float).reshape(-1, 2)]
            for name, rows in (("P", P), ("N", N), ("U", U))}


# --- E13: PAR ----------------------------------------------------------------------------------

def test_par_moves_a_border_to_the_images_edge():
    image, maps = torch.zeros(1, 3, 32, 32), torch.zeros(1, 2, 32, 32)
    image[..., 16:] = 1
    maps[:, 0, :, :18] = maps[:, 1, :, 18:] = 1
    refined = par.refine(image, maps, VOC_DILATIONS) / 1.01 ** 10
    assert refined[0, 1, 16, 15].item() == approx(0.0069, 1e-4)
    assert refined[0, 1, 16, 16].item() == approx(0.9406, 1e-4)


def test_par_against_loops():
    rng, (H, W), dilations = np.random.default_rng(0), (5, 6), (1, 3)
    image, Q = rng.random((3, H, W)), rng.random((2, H, W))
    steps = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    distance = np.array([math.hypot(*step) for step in steps])
    place = np.exp(-(distance / (0.3 * (distance.std(ddof=1) + 1e-8))) ** 2)
    weights = np.empty((H, W, len(steps)))

    def at(maps, y, x):
        return maps[:, min(max(y, 0), H - 1), min(max(x, 0), W - 1)]
    for y in range(H):
        for x in range(W):
            near = np.array([at(image, y + dy, x + dx) for dy, dx in steps])
            std = near.std(axis=0, ddof=1)
            colour = np.exp(-(((near - image[:, y, x]) / (0.3 * (std + 1e-8))) ** 2).mean(1))
            weights[y, x] = colour / colour.sum() + 0.01 * place / place.sum()
    expected = Q
    for _ in range(3):
        expected = np.array([[sum(w * at(expected, y + dy, x + dx)
                                  for w, (dy, dx) in zip(weights[y, x], steps))
                              for x in range(W)] for y in range(H)]).transpose(2, 0, 1)
    ours = par.refine(torch.tensor(image)[None], torch.tensor(Q)[None], dilations, iterations=3)
    assert np.allclose(ours[0].numpy(), expected, atol=1e-5)
    sums = par.weights(torch.tensor(image)[None], dilations).sum(dim=1)
    assert torch.allclose(sums, torch.tensor(1.01, dtype=sums.dtype))


# --- E1 to E6: the network ---------------------------------------------------------------------

def network(aux_block=3, C=9, head="max"):
    torch.manual_seed(0)
    return CPEWS(CPEWSConfig(C, "vit_toy", aux_block, 2, head)).eval()


def pixel_network(W, aux_W=None, head="max"):
    """A CPEWS whose F is the image itself, and A its negative: tokens are pixels."""
    model = network(head=head)
    model.patch, model.encode = 1, lambda images: (images, -images)
    for name, weight in (("classifier", W), ("aux_classifier", W if aux_W is None else aux_W)):
        linear = torch.nn.Linear(3, len(weight), bias=False)
        linear.weight.data = torch.tensor(weight, dtype=torch.float)
        setattr(model, name, linear)
    return model


def test_features_are_timms_and_those_of_the_last_block_are_normed():
    model, images = network(), torch.rand(2, 3, 48, 96)
    with torch.no_grad():
        features, aux = model.encode(images)
        x = (images - 0.5) / 0.5  # vit_toy's mean and deviation, not ImageNet's
        whole = model.backbone.forward_features(x)[:, 1:]
        inner, = model.backbone.get_intermediate_layers(x, n=[2], reshape=True)
        assert features.shape == aux.shape == (2, 128, 6, 12)
        assert torch.allclose(features, whole.transpose(1, 2).unflatten(2, (6, 12)), atol=1e-5)
        assert torch.allclose(aux, inner, atol=1e-5)
        last, features = network(aux_block=4), model.encode(images)[0]
        assert torch.equal(last.encode(images)[1], features)


def cams(model, images, y, scales):
    return model.cams(model.encodings(images, scales).values(), y, images.shape[2:])


def test_scores_are_linear_in_the_maximum_of_each_channel():
    model = pixel_network([[1, 2, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 1]])
    image = torch.tensor([[[3.0, -1]], [[-2, 5]], [[0, 0.5]]])[None]  # channels x 1 x 2
    z, aux_z = model.scores(*model.encode(image))
    assert z.tolist() == [[3 + 2 * 5, 0.5]] and aux_z.tolist() == [[1, 0]]
    raw, aux_raw = model.maps(*model.encode(image))
    assert raw[0, :, 0].tolist() == [[3 - 4, -1 + 10], [0, 0.5]]
    assert aux_raw[0, :, 0].tolist() == [[-3, 1], [0, -0.5]]


def test_scores_of_the_softmax_head_by_hand():
    """Two of 20 tokens have M of ln 2 and ln 6 for the first class: the best tenth is both."""
    model = pixel_network([[1, 0, 0], [0, 1, 0]], head="softmax")
    image = torch.zeros(1, 3, 4, 5)
    image[0, 0, 1, 1], image[0, 0, 0, 0] = math.log(2), math.log(6)  # Y: 1 2 1 / 4, 1 6 1 / 8
    z, aux_z = (scores.sigmoid()[0].tolist() for scores in model.scores(*model.encode(image)))
    assert z == approx([1 / 3, (1 / 2 + 3 / 4) / 2, 1 / 3])
    assert aux_z == approx([(2 / 5 + 6 / 13) / 2, 1 / 3, (2 / 5 + 6 / 13) / 2])  # 2 1 2, 6 1 6
    z, _ = model.scores(*model.encode(image), start=True)  # a border of 14, a centre of 6 tokens
    assert z.sigmoid()[0].tolist() == approx([(13 / 3 + 1 / 8) / 14, (5 / 3 + 1 / 2) / 6,
                                              (5 / 3 + 1 / 4) / 6])
    start = network(head="softmax")
    assert not start.classifier.weight.any() and not start.aux_classifier.weight.any()


def test_the_loss_of_the_softmax_head_is_cpf_ctes(batch):
    """E4 with --head softmax is Eq. (9): background is in every image, from the tenth step on."""
    args, (images, inside, y) = batch
    model = network(head="softmax")
    model.classifier.weight.data.normal_(generator=torch.Generator().manual_seed(0))

    def loss(t):
        return cpews.batch_losses(model, model.encode, (images, inside, y), None, args, t)

    layers = model.encode(images)
    raw, _ = model.maps(*layers)
    Y = torch.cat([torch.zeros_like(raw[:, :1]), raw], dim=1).softmax(1).permute(0, 2, 3, 1)
    expected = classification_loss(pool_patches(Y, top_k=14), F.pad(y, (1, 0), value=1.0))
    assert loss(10 - args.warm_up)[0]["cls"].item() == approx(expected.item())
    assert abs(loss(9 - args.warm_up)[0]["cls"].item() - expected.item()) > 0.01
    assert torch.equal(loss(0)[1]["z"], model.scores(*layers)[0][:, 1:])


def test_cam_by_hand():
    image = torch.zeros(1, 3, 2, 2)
    image[0, 0], y = torch.tensor([[-1.0, 0], [1, 3]]), torch.tensor([[1.0, 0]])
    model = pixel_network([[1, 0, 0], [1, 0, 0]])
    cam, aux_cam = cams(model, image, y, [1.0])
    assert torch.allclose(cam[0, 0], torch.tensor([[0, 0], [1 / 3, 1]]), atol=1e-5)
    assert not cam[0, 1].any() and aux_cam[0, 0, 0, 0].item() == approx(1, 1e-4)  # absent; -map
    cam, _ = cams(model, -image.abs(), y, [1.0])
    assert torch.equal(cam, torch.zeros(1, 2, 2, 2))  # no NaN
    image[0, 0] = torch.tensor([[1.0, 2], [2, 3]])
    cam, _ = cams(model, image, y, [1.0])
    assert torch.allclose(cam[0, 0], torch.tensor([[0, 0.5], [0.5, 1]]), atol=1e-5)


def test_cams_turn_the_flipped_run_back_and_sum_over_scales():
    model, y = pixel_network([[1, 0, 0]]), torch.ones(1, 1)
    left = torch.zeros(1, 3, 4, 8)
    left[0, 0, :, :2] = 1  # an encoder that sees only the left half: the flip finds the right one
    model.encode = lambda images: (images * (torch.arange(images.shape[-1]) < 4), images)
    both = torch.maximum(left, left.flip(-1))
    cam, _ = cams(model, both, y, [1.0])
    assert torch.allclose(cam[0, 0], both[0, 0], atol=1e-4)
    model = pixel_network([[1, 0, 0]])
    half = F.interpolate(left, (2, 4), mode="bilinear", align_corners=False)
    expected = left + F.interpolate(half, (4, 8), mode="bilinear", align_corners=False)
    cam, _ = cams(model, left, y, [1.0, 0.5])
    assert torch.allclose(cam[0, 0], expected[0, 0] / expected.max(), atol=1e-4)


def test_the_prediction_sums_flips_and_takes_the_best_scale():
    model, image = network(), torch.rand(1, 3, 50, 70)  # no multiple of the patch
    model.scales = [1.0, 0.5]
    expected = []
    with torch.no_grad():
        for size in ((48, 72), (24, 32)):
            x = F.interpolate(image, size, mode="bilinear", align_corners=False)
            runs = [F.interpolate(model.decoder(model.encode(each)[0]), (50, 70), mode="bilinear",
                                  align_corners=False) for each in (x, x.flip(-1))]
            expected.append(runs[0] + runs[1].flip(-1))
        assert torch.allclose(model(image)[0], torch.maximum(*expected), atol=1e-5)


def test_the_decoder_reaches_its_two_dilations():
    model = CPEWS(CPEWSConfig(3, "vit_toy", 3, 5))
    features = torch.zeros(1, 128, 31, 31, requires_grad=True)
    features.data.normal_()
    model.segment(features)[0, :, 15, 15].sum().backward()
    rows = features.grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    assert rows == [5, 10, 15, 20, 25]
    convs = [module for module in model.decoder if isinstance(module, torch.nn.Conv2d)]
    assert [tuple(conv.weight.shape[:2]) for conv in convs] == [(128, 128), (128, 128), (3, 128)]
    assert all(conv.bias is None for conv in convs)


# --- E7, E8: ISM -------------------------------------------------------------------------------

def test_token_labels_by_hand():
    cam = torch.zeros(1, 4, 2, 3)
    cam[0, 2] = torch.tensor([[0.25, 0.26, 0.7], [0.71, 0.9, 0.9]])
    inside = torch.ones(1, 2, 3, dtype=torch.bool)
    inside[0, 1, 2] = False
    labels = cpews_model.token_labels(cam, inside, (2, 3), 0.7, 0.25)
    assert labels.tolist() == [[[0, 255, 255], [3, 3, 255]]]
    inside = torch.ones(1, 16, 16, dtype=torch.bool)
    inside[:, :, 10:] = False  # a token is inside where its middle is
    labels = cpews_model.token_labels(torch.zeros(1, 1, 16, 16), inside, (2, 2), 0.7, 0.25)
    assert labels.tolist() == [[[0, 255], [0, 255]]]


@pytest.mark.parametrize("labels, expected", [
    ([[1, 1], [0, 0]], 0.1), ([[1, 0], [1, 0]], 13 / 18), ([[1, 1], [0, 255]], 1 / 6),
    ([[255, 255], [255, 255]], 0.5)])
def test_ism_by_hand(labels, expected):
    features = torch.tensor([[1.0, 0], [-2, 0], [0, 1], [0, -3]])  # cosines -1, 0, -1
    features = features.T.reshape(1, 2, 2, 2).clone().requires_grad_()
    loss = cpews_model.ism_loss(features, torch.tensor([labels]))
    loss.backward()
    assert loss.item() == approx(expected)
    assert expected != 0.5 or not features.grad.any()


# --- E9, E10: regions and pools ----------------------------------------------------------------

def test_masked_average_pooling_by_hand():
    features = tokens((1, 0), (3, 0), (0, 2), (0, 4))
    raw = torch.tensor([[[[1.0, 1, 0, -1]], [[-3, -2, -1, -1]], [[0, 0.09, 0.11, 1]]]])
    f, regions = cpews_model.region_features(raw, features, 0.1)
    assert torch.allclose(f[0], torch.tensor([[2.0, 0], [0, 0], [0, 3]]), atol=1e-4)
    assert regions[0, :, 0].tolist() == [[True, True, False, False], [False] * 4,
                                         [False, False, True, True]]


def test_k_means_by_hand_and_by_loops():
    points = torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 1]])
    for seed in range(5):
        centres = cpews_model.k_means(points, cpews_model.first_centres(points, 2, seed))
        assert sorted(centres.tolist()) == [[0, 0.5], [10, 0.5]]
    rng = np.random.default_rng(0)
    points = rng.normal(size=(40, 3)).astype(np.float32)
    start = cpews_model.first_centres(torch.tensor(points), 6, 0)
    assert {tuple(row) for row in start.tolist()} <= {tuple(row) for row in points.tolist()}
    assert len(start.unique(dim=0)) == 6
    expected = start.numpy().astype(float)
    for _ in range(10):
        nearest = [min(range(6), key=lambda k: sum((p - expected[k]) ** 2)) for p in points]
        expected = [np.mean([p for p, k in zip(points, nearest) if k == mine], axis=0)
                    if mine in nearest else expected[mine] for mine in range(6)]
    centres = cpews_model.k_means(torch.tensor(points), start).numpy()
    assert np.allclose(centres, expected, atol=1e-5)
    same = torch.ones(12, 2)  # centres without points stay
    centres = cpews_model.k_means(same, cpews_model.first_centres(same, 3, 0))
    assert torch.equal(centres, torch.ones(3, 2))


def regions_of(*images):
    """What make_pools takes: images as (f of every class, z, labels), where None is no region."""
    for f, z, labels in images:
        yield (torch.tensor([[0.0, 0.0] if row is None else row for row in f]),
               torch.tensor([row is not None for row in f]), torch.tensor(z), torch.tensor(labels))


def test_pools_by_hand():
    images = [([[1.0, 1], [5, 5]], [9.0, 0.1], [1.0, 0]),
              ([[2.0, 2], [6, 6]], [9.0, 0.3], [1.0, 0]),
              ([None, [7.0, 7]], [9.0, 0.2], [1.0, 0]), ([[3.0, 3], [8, 8]], [0.5, 9.0], [0.0, 1])]
    made = cpews_model.make_pools(regions_of(*images), None, 2, 0)
    assert made["P"][0].tolist() == [[1, 1], [2, 2]] and made["P"][1].tolist() == [[8, 8]]
    assert made["N"][0].tolist() == [[3, 3]]
    assert made["N"][1].tolist() == [[6, 6], [7, 7]]  # the two with the highest z
    assert all(torch.equal(N, U) for N, U in zip(made["N"], made["U"]))  # no superclasses
    many = [([[float(n % 7), 0], None], [0.0, 0], [1.0, 0]) for n in range(30)]
    first, again = (cpews_model.make_pools(regions_of(*many), None, 3, 5) for _ in range(2))
    assert first["P"][0].shape == (3, 2) and torch.equal(first["P"][0], again["P"][0])
    assert first["N"][0].shape == first["P"][1].shape == (0, 2)


def test_negatives_with_a_relative_are_not_in_u():
    """Superclasses {a, b}, {c}: an image of b is no negative of a for E12, one of c is."""
    images = [([[n, 0.0]] * 3, [1 - n / 9] * 3, y) for n, y in enumerate(
        ([0.0, 1, 0], [0.0, 0, 1], [0.0, 1, 1], [1.0, 0, 0]))]
    made = cpews_model.make_pools(regions_of(*images), [0, 0, 1], 10, 0)
    assert made["N"][0][:, 0].tolist() == [0, 1, 2] and made["U"][0][:, 0].tolist() == [1]
    assert made["N"][2][:, 0].tolist() == [0, 3] and made["U"][2].shape == (0, 2)


def test_u_looks_further_where_it_is_told_to():
    """The best negatives of a show its relative b: with K = 2 nothing is left of them for U."""
    images = [([[n, 0.0]] * 3, [1 - n / 9] * 3, y) for n, y in enumerate(
        ([0.0, 1, 0], [0.0, 1, 1], [0.0, 0, 1], [0.0, 0, 0], [0.0, 0, 1], [1.0, 0, 0]))]
    filtered, further = (cpews_model.make_pools(regions_of(*images), [0, 0, 1], 2, 0, look_further)
                         for look_further in (False, True))
    assert filtered["U"][0].shape == (0, 2) and further["U"][0][:, 0].tolist() == [2, 3]
    for name in "PN":
        assert all(map(torch.equal, filtered[name], further[name]))


def test_regions_come_from_the_trained_pairs_and_scores_from_the_maximum(toy):
    """M = W F, or M' = W' A with --pool-cam aux; the feature is F's; z is E3's, no mean of M."""
    W, aux_W = [[1, 0, 0]] * 8, [[0, -1, 0]] * 8  # A is -F: M' is the second channel
    model, folder = pixel_network(W, aux_W), Folder(toy)
    image_id = folder.ids("train")[0]
    image = np.array(read_image(folder.image_path(image_id))) / 255
    for cam, map_, best in (("main", image[..., 0], image[..., 0].max()),
                            ("aux", image[..., 1], image[..., 1].min())):
        args = cpews.parse_args(["--data", str(toy), "--run", "r", "--pool-cam", cam,
                                 "--mask-threshold", "0.9", "--workers", "0"])
        (f, exists, z, y), = cpews.image_regions(model, folder, [image_id], args, CPU)
        region = map_ / map_.max() > 0.9
        assert exists.all() and np.allclose(f[0].numpy(), image[region].mean(0), atol=1e-3)
        assert z[0].item() == approx(best)
        assert torch.equal(y, folder.image_labels(image_id)[1:])
    model = pixel_network(W, aux_W, head="softmax")
    (*_, z, y), = cpews.image_regions(model, folder, [image_id], args, CPU)
    assert len(z) == len(y) == 8 and len(z.unique()) == 1  # background's score is not among them


def test_the_losses_of_the_prototypes_use_w_on_f():
    """W and W' that peak at different tokens: f_c is F at W's, and no loss knows W'."""
    model = pixel_network([[1, 0, 0]], [[0, 9, 0]])
    image = torch.zeros(1, 3, 1, 2)
    image[0, 0, 0, 0] = image[0, 1, 0, 1] = 1
    args = cpews.parse_args([*TOY, "--seg-weight", "0"])
    batch = image, torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(1, 1)
    near = dict(P=[torch.tensor([[1.0, 0, 0]])], N=[torch.tensor([[0.0, 1, 0]])],
                U=[torch.tensor([[1.0, 0, 0.1]])])
    losses, seen = cpews.batch_losses(model, model.encode, batch, near, args, 0)
    assert seen["false"] == losses["ssl"] == 0  # W's token is the positive one, W''s is not asked
    assert seen["near"].item() == approx(0.01, 1e-5)
    assert seen["far"].item() == approx(math.sqrt(2 / 3 + 1e-4), 1e-4)


# --- E11, E12: the losses of the prototypes ----------------------------------------------------

W_F = torch.tensor([[2.0, 1]])  # of both known answers; F_1 = (1, 0), F_2 = (0, 1): M = (2, 1)


def activated():
    features, W = tokens((1, 0), (0, 1)).requires_grad_(), W_F.clone().requires_grad_()
    raw = torch.einsum("od,bdhw->bohw", W, features)
    return features, W, raw, *cpews_model.region_features(raw, features, 0.1)


def test_pdl_by_hand():
    features, W, raw, f, regions = activated()
    assert regions.all() and torch.allclose(f[0, 0], torch.tensor([0.5, 0.5]), atol=1e-4)
    distances = cpews_model.prototype_distances(
        f, regions.any(3).any(2), pools(P=[(0, 1), (1, 0)], N=[(1.5, 0.5), (9, 9)]))
    near, far = (distances / 13 + 0.1)[0].tolist()
    assert near == approx(0.100769, 1e-5)
    assert -math.log(1 - math.exp(-far)) == approx(1.944426, 1e-4)
    loss = cpews_model.pdl_loss(distances, 13)
    assert loss.item() == approx(0.100769 + 1.944426, 1e-4)
    loss.backward()
    assert features.grad.any() and W.grad is None
    worst = cpews_model.pdl_loss(torch.tensor([[0.01, 0.01]]), 13).item()
    assert math.exp(-(0.01 / 13 + 0.1)) == approx(0.904142)
    assert worst == approx(0.100769 + 2.344884)


@pytest.mark.parametrize("P, U, wrong", [([(1, 0)], [(0, 1)], 1), ([(0, 1)], [(1, 0)], 0)])
def test_ssl_by_hand_and_its_gradient(P, U, wrong):
    features, W, raw, _, regions = activated()
    scores = cpews_model.false_scores(raw, features, regions, torch.ones(1, 1), pools(P=P, U=U))
    loss = cpews_model.ssl_loss(scores)
    loss.backward()
    assert loss.item() == (2, 1)[wrong]
    assert W.grad.tolist() == [features[0, :, 0, wrong].tolist()]  # the mean of F over the wrong
    assert features.grad[0, :, 0, wrong].tolist() == W_F[0].tolist()
    assert not features.grad[0, :, 0, 1 - wrong].any()


@pytest.mark.parametrize("own, others, y, wrong", [
    ([(1, 0)], [], 1.0, 0), ([], [(0, 1)], 1.0, 0), ([(1, 0)], [(0, 1)], 0.0, 0),
    ([(1, 0)], [(0, 1)], 1.0, 1)])
def test_classes_without_prototypes_or_label_and_tokens_outside_are_left_alone(own, others, y,
                                                                               wrong):
    features, made, y = tokens((1, 0), (-1, 2)), pools(own, others, others), torch.full((1, 1), y)
    raw = torch.einsum("od,bdhw->bohw", W_F, features)  # M = (2, 0), and F_2 is nearer to U_c
    f, regions = cpews_model.region_features(raw, features, 0.1)
    distances = cpews_model.prototype_distances(f, regions.any(3).any(2) & (y > 0), made)
    scores = cpews_model.false_scores(raw, features, regions, y, made)
    assert len(scores) == 0 and len(distances) == wrong
    assert wrong or cpews_model.pdl_loss(distances, 13) == cpews_model.ssl_loss(scores) == 0
    everywhere = torch.ones_like(regions)
    assert len(cpews_model.false_scores(raw, features, everywhere, y, made)) == wrong


# --- E14, E15: the decoder's labels and its loss -----------------------------------------------

def test_pixel_labels_by_hand():
    """Maps of one value: above both betas, between them, below both, and of an absent class."""
    cam = torch.zeros(4, 4, 6, 8)
    cam[:3, 2] = torch.tensor([0.8, 0.5, 0.1])[:, None, None]
    cam[3, 0] = 1
    y, inside = torch.zeros(4, 4), torch.ones(4, 6, 8, dtype=torch.bool)
    y[:3, 2] = y[0, 3] = 1
    inside[..., 7] = False
    labels = cpews_model.pixel_labels(cam, torch.rand(4, 3, 6, 8), y, inside, 0.7, 0.25, (1, 2))
    for image, value in zip(labels, (3, 255, 0, 0)):
        assert (image[:, :7] == value).all() and (image[:, 7] == 255).all()
    # PAR refines them: the border of the map is 4 pixels off the edge of the image
    image, cam = torch.zeros(1, 3, 64, 64), torch.zeros(1, 5, 64, 64)
    image[..., 32:] = cam[0, 4, :, 36:] = 1
    labels = cpews_model.pixel_labels(cam, image, torch.tensor([[0.0, 1, 0, 0, 1]]),
                                      torch.ones(1, 64, 64, dtype=torch.bool), 0.6, 0.5, (1, 2, 4))
    assert (labels[0, :, :31] == 0).all() and (labels[0, :, 33:] == 5).all()


def test_seg_loss_by_hand():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    uniform = torch.zeros(1, 5, 2, 2)
    assert cpews_model.seg_loss(uniform, labels).item() == approx(math.log(5) / 2)
    labels[0, 0, 0], labels[0, 3] = 2, 255
    assert cpews_model.seg_loss(uniform, labels).item() == approx(math.log(5))
    logits = torch.randn(1, 5, 4, 4)
    kinds = [F.cross_entropy(logits[:, :, labels[0] == k].transpose(1, 2).flatten(0, 1),
                             torch.full(((labels == k).sum(),), k)) for k in (0, 2)]
    assert cpews_model.seg_loss(logits, labels).item() == approx(sum(kinds).item() / 2, 1e-5)


@pytest.mark.parametrize("value", [0, 3, 255])
def test_one_kind_of_pixel_alone_is_finite(value):
    logits = torch.randn(2, 5, 3, 3, requires_grad=True)
    loss = cpews_model.seg_loss(logits, torch.full((2, 6, 6), value))
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and (value != 255) == logits.grad.any()


# --- training ----------------------------------------------------------------------------------

def test_the_rate_is_that_of_the_release():
    expected = {0: 1e-6, 199: 0.132668, 750: 0.500001, 1500: 0.932240, 2399: 0.891367,
                10000: 0.535887}
    for step, factor in expected.items():
        assert cpews.rate(step, 20000, 1500) == approx(factor)


def test_what_learns_later_warms_up_from_then_on():
    model = SimpleNamespace(backbone=torch.nn.Linear(2, 2), named_parameters=lambda: [])
    for flag, first in (([], 2000), (["--no-freeze-warm-up"], 0)):  # the first 2,000 steps
        args = cpews.parse_args([*TOY[:4], "--preset", "voc", *flag])
        vit, others = cpews.parameter_groups(model, args)
        assert (vit["first"], others["first"]) == (first, 0)
    assert cpews.rate(2000, 22000, 1500, 2000) == approx(1e-6)
    assert cpews.rate(2750, 22000, 1500, 2000) == approx(0.5)
    assert cpews.rate(3500, 22000, 1500, 2000) == cpews.rate(3500, 22000, 1500)  # risen: one decay
    assert cpews.rate(0, 22000, 0) == 1


def test_inside_is_where_the_photo_is(toy_copy):
    """A white photo on a fill of another colour, over many crops, half of them flipped."""
    folder = Folder(toy_copy)
    image_id = folder.ids("train")[0]
    Image.new("RGB", (40, 25), "white").save(folder.image_path(image_id), quality=100)
    args = cpews.parse_args(["--data", str(toy_copy), "--run", "r", "--rescale", "0.5", "3"])
    crops, columns = cpews.Crops(folder, [image_id], args, (10, 20, 30)), []
    for draw in range(24):
        image, inside, labels = crops[0, draw]
        assert torch.equal(inside, (image == 255).all(0)) and 0 < inside.sum() < inside.numel()
        assert set(image.flatten(1)[:, ~inside.flatten()].unique(dim=1).T.flatten().tolist()) == {
            10, 20, 30}
        columns.append(inside.any(0).float().argmax().item())
    assert len(set(columns)) > 10 and torch.equal(labels, folder.image_labels(image_id)[1:])
    assert torch.equal(crops[0, 3][0], crops[0, 3][0]) and not torch.equal(crops[0, 3][0],
                                                                           crops[0, 4][0])


@pytest.fixture(scope="module")
def batch(toy):
    folder = Folder(toy)
    args = cpews.parse_args([*TOY, "--ism-from", "0", "--seg-from", "0"])
    crops = cpews.Crops(folder, folder.ids("train")[:4], args, (128, 128, 128))
    images, inside, y = (torch.stack(part) for part in zip(*(crops[i, i] for i in range(4))))
    return args, (images / 255, inside, y)


def prototypes_of(D=128, classes=8):
    generator = torch.Generator().manual_seed(1)
    return {name: [torch.randn(3, D, generator=generator) for _ in range(classes)]
            for name in ("P", "N", "U")}


LEARN = {  # loss -> parts of the network that get a gradient; the ViT: all, or what leads to A
    "cls": {"vit", "top", "classifier"}, "aux": {"vit", "aux_classifier"}, "ism": {"vit", "top"},
    "pdl": {"vit", "top"}, "ssl": {"vit", "top", "classifier"}, "seg": {"vit", "top", "decoder"}}


@pytest.mark.parametrize("name", LEARN)
def test_each_loss_reaches_its_parameters_and_no_others(batch, name):
    args, batch = batch
    model = network(aux_block=2)
    model.train_encoder(True)
    losses, _ = cpews.batch_losses(model, model.encode, batch, prototypes_of(), args, 5)
    assert set(losses) == set(LEARN)
    losses[name].backward()
    for parameter, weight in model.named_parameters():
        part, _, rest = parameter.partition(".")
        if part == "backbone":
            top = rest.startswith(("blocks.2", "blocks.3", "norm."))
            part = "top" if top else "fixed" if rest == "pos_embed" else "vit"
        learns = weight.grad is not None and bool(weight.grad.any())
        assert learns == (part in LEARN[name]), parameter


def test_phases_weights_and_the_source_of_the_labels(batch, monkeypatch):
    args, batch = batch
    model, used = network(), []
    model.train_encoder(True)
    model.cams = lambda images, y, scales: [torch.full((4, 8, 96, 96), value) for value in (1., 2.)]
    monkeypatch.setattr(cpews, "pixel_labels", lambda cam, *rest: used.append(cam[0, 0, 0, 0]) or
                        torch.zeros(4, 96, 96, dtype=torch.long))

    def losses(t, pools=None, **changed):
        now = type(args)(**vars(args) | dict(ism_from=7, seg_from=4) | changed)
        return set(cpews.batch_losses(model, model.encode, batch, pools, now, t)[0])

    assert losses(-1) == losses(-1, ism_from=0, seg_from=0) == {"cls", "aux"}
    assert losses(0, prototypes_of()) == {"cls", "aux", "pdl", "ssl"}
    assert losses(4) == {"cls", "aux", "seg"} and losses(7) == {"cls", "aux", "seg", "ism"}
    assert losses(7, seg_weight=0.0) == {"cls", "aux", "ism"}
    assert losses(7, ism_weight=0.0) == {"cls", "aux", "seg"}
    assert used == [2, 1, 1]  # cam' until ISM begins, then cam
    full = cpews.batch_losses(model, model.encode, batch, prototypes_of(), args, 9)[0]
    args = type(args)(**vars(args) | dict(ism_weight=2.0, seg_weight=0.3))
    half = cpews.batch_losses(model, model.encode, batch, prototypes_of(), args, 9)[0]
    assert half["ism"].item() == pytest.approx(10 * full["ism"].item(), rel=1e-3)
    assert half["seg"].item() == pytest.approx(3 * full["seg"].item(), rel=1e-3)


def trained(toy, home, *flags):
    in_process(cpews, "--data", toy, "--run", home, *SHORT, *flags)
    return torch.load(home / "cpews.pt", weights_only=True)


def flat(checkpoint):
    """Every tensor that a run leaves behind: weights, moments, prototypes."""
    moments = {f"{k} {name}": value for k, state in checkpoint["optimizer"]["state"].items()
               for name, value in state.items()}
    prototypes = {f"{name} {c}": each for name, pool in checkpoint["pools"].items()
                  for c, each in enumerate(pool)}
    return checkpoint["model"] | moments | prototypes


def test_a_killed_run_goes_on_to_the_same_weights_and_prototypes(toy, tmp_path, monkeypatch):
    flags = ("--pool-updates", "1", "--freeze-warm-up", "--rescale", "0.7", "1.5", "--jitter")
    whole = trained(toy, tmp_path / "whole", *flags)
    steps, real = [], cpews.batch_losses

    def killed(model, encode, batch, pools, args, t):
        steps.append(t)
        if len(steps) in (4, 8):  # within the round of the first pools, and after the second ones
            raise KeyboardInterrupt
        return real(model, encode, batch, pools, args, t)

    monkeypatch.setattr(cpews, "batch_losses", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trained(toy, tmp_path / "killed", *flags, "--resume")
    again = trained(toy, tmp_path / "killed", *flags, "--resume")
    assert steps == [-3, -2, -1, 0, -1, 0, 1, 2, 1, 2, 3, 4, 5]
    whole, again = flat(whole), flat(again)
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)
    with pytest.raises(UserError, match="made with --temperature 13.0, now it is 9.0"):
        trained(toy, tmp_path / "killed", *flags, "--resume", "--temperature", "9")
    with pytest.raises(UserError, match="cpews.pt exists: --resume goes on"):
        trained(toy, tmp_path / "killed", *flags)


def test_pools_come_from_the_trained_classifier_once_and_stay(toy, tmp_path, monkeypatch):
    regions, pools, made = cpews.image_regions, cpews.make_pools, []
    monkeypatch.setattr(cpews, "image_regions", lambda model, *rest: made.append(
        [model.classifier.weight.clone(), model.backbone.norm.weight.clone()]) or
        regions(model, *rest))
    monkeypatch.setattr(cpews, "make_pools", lambda *rest: made[-1].append(pools(*rest)) or
                        made[-1][-1])
    checkpoint = trained(toy, tmp_path / "once", "--no-freeze-warm-up")
    (W, _, pools_of_once), = made
    torch.manual_seed(0)
    start = CPEWS(CPEWSConfig(9, "vit_toy", 3, 2))
    end = checkpoint["model"]["classifier.weight"]
    assert not torch.equal(W, start.classifier.weight) and not torch.equal(W, end)
    for name in "PNU":
        assert all(map(torch.equal, pools_of_once[name], checkpoint["pools"][name]))
    trained(toy, tmp_path / "thrice", "--pool-updates", "2", "--freeze-warm-up")
    first, last = (torch.cat(made[k][-1]["N"]) for k in (1, 3))
    assert len(made) == 4 and not (first.shape == last.shape and torch.allclose(first, last))
    stayed = [torch.equal(norm, start.backbone.norm.weight) for _, norm, _ in made]
    assert stayed[:2] == [False, True]  # the encoder is frozen until the first pools, or not
    trained(toy, tmp_path / "never", "--pdl-weight", "0", "--ssl-weight", "0", "--head", "softmax")
    checkpoint = torch.load(tmp_path / "never/cpews.pt", weights_only=True)
    assert len(made) == 4 and checkpoint["config"]["head"] == "softmax"


# --- the script, as a person runs it -----------------------------------------------------------

@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory, script):
    """(RUN, output): the real command trains and writes the masks of train."""
    home = tmp_path_factory.mktemp("cpews") / "run"
    where = ("extras/cpews/train.py", "--data", toy, "--run", home)
    _, first = script(*where, *SHORT)
    _, second = script(*where, "--predict", "train", "--workers", "0")
    return home, first + second


def test_the_chain_on_24_beetles(finished, toy):
    home, output = finished
    ids = set(Folder(toy).ids("train"))
    for name in ("cam", "pseudo", "pred"):
        assert {path.stem for path in (home / name).glob("*.png")} == ids
        assert f"masks {name}  split train  num_images 24  classes" in output
        in_process(evaluate, "--data", toy, "--masks", home / name, "--split", "train",
                   "--workers", "0")
        results = json.loads((home / name / "results.json").read_text())
        assert results["image_labels_used"] is (name != "pred") and results["crf"] is False
        assert f"{results['miou']:.4g}" in output and results["seed"] == 0
    last = [line for line in log_of(home) if "step" in line][-1]
    assert {"loss", "train_map", "cls", "aux", "ism", "pdl", "ssl", "seg", "near", "far", "false",
            "labelled", "val_cam", "val_aux", "val_pred"} <= set(last)


@pytest.mark.parametrize("ism_from", [5, 6])  # of 6: from then on labels come from M, or never
def test_the_masks_are_those_of_the_equations(finished, toy, tmp_path, ism_from):
    home = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    folder, image_id = Folder(toy), Folder(toy).ids("val")[0]
    checkpoint = torch.load(home / "cpews.pt", weights_only=True)
    for seed, name in enumerate(("classifier.weight", "aux_classifier.weight")):
        generator = torch.Generator().manual_seed(seed)  # after nine steps the maps are empty
        checkpoint["model"][name].normal_(generator=generator)
    checkpoint["args"] |= dict(par_dilations=[1], seed=7, ism_from=ism_from)  # hold for the masks
    torch.save(checkpoint, home / "cpews.pt")
    in_process(cpews, "--data", toy, "--run", home, "--workers", "0", "--predict", "val",
               "--cam-low", "0.2")
    model, checkpoint = cpews.load_model(home / "cpews.pt", "cpews", CPEWSConfig, CPEWS)
    image = np.array(read_image(folder.image_path(image_id)))
    x, y = torch.tensor(image).permute(2, 0, 1)[None] / 255, folder.image_labels(image_id)[None, 1:]
    with torch.no_grad():
        cam, aux = cams(model, x, y, [1.0])
        best = model(x)[0][0].argmax(0)
    args = checkpoint["args"]
    expected = torch.where(cam[0].amax(0) > args["cam_threshold"], cam[0].argmax(0) + 1, 0)
    labels = cpews_model.pixel_labels(cam if ism_from == 5 else aux, x, y, x[:, 0] >= 0,
                                      args["cam_high"], 0.2, [1])
    assert expected.any() and {0, 255} < {*labels.flatten().tolist()}
    masks = {name: read_mask(home / name / f"{image_id}.png", 9)
             for name in ("cam", "pseudo", "pred")}
    assert (masks["cam"] == expected.numpy()).mean() > 0.999
    assert (masks["pred"] == best.numpy()).mean() > 0.999
    assert (masks["pseudo"] == labels[0].numpy()).mean() > 0.999
    made = json.loads((home / "pseudo/settings.json").read_text())
    assert (made["cam_low"], made["par_dilations"], made["seed"]) == (0.2, [1], 7)


def test_a_split_without_image_labels_gets_predictions_and_an_archive(
        finished, toy, tmp_path, capsys):
    """VOC's test: no labels and no truth, only what its server scores."""
    home = shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("*.png"))
    data = shutil.copytree(toy, tmp_path / "data")
    ids = Folder(data).ids("val")
    edit(data / "image_labels.txt", lambda text: re.sub(r"val_.*\n", "", text))
    in_process(cpews, "--data", data, "--run", home, "--workers", "0", "--predict", "val",
               "--export")
    archive = home / EXPORT
    assert sorted(path.stem for path in archive.glob("*.png")) == sorted(ids)
    assert not [*home.glob("cam/*.png"), *home.glob("pseudo/*.png")]
    for path in archive.glob("*.png"):
        assert path.read_bytes() == (home / "pred" / path.name).read_bytes()
    told = capsys.readouterr().out
    assert f"no line for {len(ids)} of {len(ids)} images, as {ids[0]}" in told
    assert "miou" not in told


def test_splits_share_folders_and_nothing_is_mixed_or_lost(finished, toy, tmp_path, capsys):
    home, folder = shutil.copytree(finished[0], tmp_path / "run"), Folder(toy)
    where = (cpews, "--data", toy, "--run", home, "--workers", "0", "--predict")
    before = {path: path.read_bytes() for path in home.glob("*/train*.png")}
    victim = min(before)
    victim.unlink()
    in_process(*where, "train")
    in_process(*where, "val")
    assert {path: path.read_bytes() for path in before} == before
    assert len([*home.glob("pred/*.png")]) == 24 + 8
    last = [line for line in log_of(home) if "step" in line][-1]
    for name in ("cam", "pseudo", "pred"):
        confusion, _ = evaluate.score_masks(folder, folder.ids("val")[:2], home / name)
        assert evaluate.miou(confusion) == approx(last[f"val_{name}"])
    for flags, words in (("--cam-high 0.7", "cam holds masks .*--overwrite replaces them"),
                         ("--crf", "pred holds masks .*--overwrite replaces them"),
                         ("--cam-high 0.3 --overwrite", "--cam-low is to lie below --cam-high")):
        with pytest.raises(UserError, match=words):
            in_process(*where, "val", *flags.split())
    in_process(*where, "val", "--crf", "--overwrite")
    assert all(path.is_file() for path in before if path.parent.name != "pred")
    made = json.loads((home / "pred/settings.json").read_text())
    assert made["crf"] and made["constants"]["gaussian_compat"] == 1
    assert not [*home.glob("pred/train*.png")]


# --- superclasses.txt --------------------------------------------------------------------------

def edit(path, change):
    path.write_text(change(path.read_text()))


def test_the_makers_write_superclasses(toy, coco, tmp_path):
    assert cpews_model.superclasses(Folder(toy)) == [0, 0, 1, 1, 2, 2, 3, 3]
    for path in coco.glob("annotations/*.json"):
        edit(path, lambda text: re.sub(r'("id": (\d+), "name": "[^"]*", "supercategory": )"x"',
                                       r'\1"kind\2"', text))
    coco_maker.make_coco(coco, counts={"train": (5, 4), "val": (3, 2)})
    assert cpews_model.superclasses(Folder(coco)) == [*range(80)]
    write_lines(tmp_path / "superclasses.txt", voc_maker.VOC_SUPERCLASSES)
    write_lines(tmp_path / "classes.txt", voc_maker.VOC_CLASSES)
    groups = dict(zip(voc_maker.VOC_CLASSES[1:], cpews_model.superclasses(Folder(tmp_path))))
    alike = [{name for name in groups if groups[name] == k} for k in range(4)]
    assert [len(names) for names in alike] == [1, 6, 7, 6] and alike[0] == {"person"}
    assert {"bird", "sheep"} < alike[1] and {"bus", "train"} < alike[2] and "sofa" in alike[3]


# --- bad input ---------------------------------------------------------------------------------

def test_without_superclasses_all_negatives_count(toy, tmp_path, capsys):
    folder = shutil.copytree(toy, tmp_path / "data")
    (folder / "superclasses.txt").unlink()
    pools = trained(folder, tmp_path / "run", "--iterations", "1")["pools"]
    assert "has no superclasses.txt: SSL takes all negative" in capsys.readouterr().out
    assert any(len(U) for U in pools["U"])
    assert all(torch.equal(N, U) for N, U in zip(pools["N"], pools["U"]))
    flag = trained(toy, tmp_path / "flag", "--iterations", "1", "--ssl-pool", "all")["pools"]
    assert all(torch.equal(N, U) for N, U in zip(pools["N"], flag["U"]))
    shutil.copy(toy / "superclasses.txt", folder)
    with pytest.raises(UserError, match="cpews.pt was made with other superclasses"):
        trained(folder, tmp_path / "run", "--iterations", "1", "--resume")
    edit(folder / "superclasses.txt", lambda text: "all " + " ".join(Folder(toy).classes[1:]))
    for weight, told in (("1", True), ("0", False)):  # every negative has a relative
        trained(folder, tmp_path / weight, "--iterations", "1", "--ssl-weight", weight)
        assert ("SSL does nothing" in capsys.readouterr().out) == told


FITS = "superclasses.txt: a line is 'SUPERCLASS CLASS CLASS ...'"


@pytest.mark.parametrize("flags, file, change, words", [
    ("--cam-high 0.1", "", None, "--cam-low is to lie below --cam-high"),
    ("--crop 50", "", None, "--crop 50 is no multiple of a patch's 8 pixels"),
    ("--aux-block 5", "", None, "--aux-block 5: vit_toy has 4 blocks"),
    ("--backbone resnet_toy", "", None, "--backbone resnet_toy does not fit"),
    ("--batch-size 25", "", None, "24 images cannot fill --batch-size 25"),
    ("", "superclasses.txt", ("checks_red", ""), FITS),
    ("", "superclasses.txt", ("checks_red", "unicorn"), FITS),
    ("", "superclasses.txt", ("checks_red", "checks_red checks_red"), FITS),
    ("--ssl-pool all", "classes.txt", (r"\n(.|\n)*", "\n"), "no class but background"),
    ("", "image_labels.txt", ("val_00000 ", "nobody "), "no label for val_00000"),
    ("--predict val", "", None, "cpews.pt not found: run extras/cpews/train.py first"),
    ("--predict val --aux-block 2", "", None, "--aux-block is for training: cpews.pt has its own"),
    ("--rescale 2 1", "", None, "--rescale: the smaller number comes first"),
    ("--pool-cam both", "", None, "pool-cam"), ("--export", "", None, "--predict names their spl")])
def test_what_cannot_be_is_told_in_one_line_before_training(
        toy, tmp_path, monkeypatch, capsys, flags, file, change, words):
    monkeypatch.setattr(cpews, "batch_losses", None)  # no step is made
    folder = shutil.copytree(toy, tmp_path / "data")
    if file:
        edit(folder / file, lambda text: re.sub(*change, text))
    short = ("--workers", "0") if "--predict" in flags else SHORT
    with pytest.raises((UserError, SystemExit)) as ended:  # argparse tells, and exits
        in_process(cpews, "--data", folder, "--run", tmp_path / "run", *short, *flags.split())
    assert re.search(words, f"{ended.value} {capsys.readouterr().err}")
