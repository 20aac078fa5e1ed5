"""DeepLabv2: the network, its loss, its optimiser's groups, and the crops that it learns from."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import train_seg
from data import Folder
from model import DeepLabv2, SegmenterConfig
from support.masks import save_mask

C = 5


def tiny(**kwargs):
    torch.manual_seed(0)
    return DeepLabv2(SegmenterConfig(C, "resnet_toy", **kwargs)).eval()


# --- the network -------------------------------------------------------------------------------

def test_shapes_stride_and_rates():
    model = tiny()
    outputs = model(torch.rand(1, 3, 96, 64))
    assert [tuple(o.shape[1:]) for o in outputs] == [(C, 12, 8), (C, 9, 6), (C, 6, 4), (C, 12, 8)]
    assert [conv.dilation[0] for conv in model.aspp] == [6, 12, 18, 24]
    assert [conv.kernel_size for conv in model.aspp] == 4 * [(3, 3)]


def test_the_last_output_is_the_maximum_over_the_scales():
    *pyramid, maximum = tiny()(torch.rand(1, 3, 96, 64))
    first, second, third = (F.interpolate(o, (12, 8), mode="bilinear") for o in pyramid)
    torch.testing.assert_close(maximum, torch.maximum(torch.maximum(first, second), third))


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (1, 40)])
def test_every_scale_of_a_small_image_keeps_a_pixel(height, width):
    outputs = tiny()(torch.rand(1, 3, height, width))
    assert all(o.shape[-2] == 1 and o.isfinite().all() for o in outputs)


def test_aspp_sums_branches_that_reach_exactly_their_rates():
    model = DeepLabv2(SegmenterConfig(1, "resnet_toy")).eval()
    model.normalise = nn.Identity()
    model.backbone.forward = lambda images: [images]
    features = torch.zeros(1, 96, 61, 61, requires_grad=True)
    model.logits(features)[0, 0, 30, 30].backward()
    rows = features.grad.abs().sum((0, 1, 3)).nonzero().flatten() - 30
    assert rows.tolist() == [-24, -18, -12, -6, 0, 6, 12, 18, 24]
    weights = sum(conv.weight[0, :, 1, 1] for conv in model.aspp)  # summed, not averaged
    torch.testing.assert_close(features.grad[0, :, 30, 30], weights)


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_batch_norm_keeps_statistics_and_scales(freeze):
    model = tiny()
    if freeze:
        model.freeze_batch_norm()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(torch.rand(2, 3, 64, 64))[0].sum().backward()
    assert before
    assert all(torch.equal(v, model.state_dict()[k]) == freeze for k, v in before.items())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((p.grad is None) == freeze for m in norms for p in m.parameters())


# --- its optimiser and its loss ----------------------------------------------------------------

def test_parameter_groups_and_poly_decay():
    model = tiny()
    model.freeze_batch_norm()
    groups = train_seg.parameter_groups(model.train(), 2.5e-4, 10)
    assert [group["base_lr"] for group in groups] == pytest.approx([2.5e-4, 2.5e-3, 5e-3])
    assert [g.get("weight_decay", 5e-4) for g in groups] == [5e-4, 5e-4, 0]
    assert [len(group["params"]) for group in groups[1:]] == [4, 4]
    assert all(p.ndim == 4 for p in groups[0]["params"])  # convolutions alone: batch norm is frozen
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert [train_seg.poly(step, 100) for step in (0, 50, 100)] == [1, 0.5 ** 0.9, 0]


@pytest.mark.deeplabv2
def test_the_loss_is_the_sum_of_cross_entropies_without_ignored_pixels():
    torch.manual_seed(0)
    masks = torch.randint(0, 3, (2, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    masks[:, :8] = 255
    outputs = [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)]
    expected = F.cross_entropy(outputs[0], masks[:, 2::4, 2::4], ignore_index=255)
    expected = expected + F.cross_entropy(outputs[1], masks[:, 4::8, 4::8], ignore_index=255)
    loss = train_seg.multi_scale_loss(outputs, masks)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    nothing = train_seg.multi_scale_loss(outputs, torch.full_like(masks, 255))
    assert nothing.item() == 0


# --- what it learns from -----------------------------------------------------------------------

@pytest.fixture
def two_colours(tmp_path):
    """A data set of one image, 60 x 40: its left 23 columns are dark and class 1."""
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "classes.txt").write_text("background\nleft\n")
    pixels = np.full((40, 60, 3), 250, np.uint8)
    pixels[:, :23] = 10
    Image.fromarray(pixels).save(tmp_path / "JPEGImages/a.png")
    save_mask(tmp_path / "masks/a.png", (pixels[..., 0] < 100).astype(np.uint8))
    return Folder(tmp_path)


def crops(folder, draws, **recipe):
    recipe = dict(crop=48, rescale=(0.5, 1.5), seed=0, fill=(128, 128, 128)) | recipe
    dataset = data.MaskedImages(folder, ["a"], folder.root / "masks", **recipe)
    return [dataset[(0, draw)] for draw in range(draws)]


def test_crops_keep_image_and_mask_together_and_fill_with_ignore(two_colours):
    sides, flipped, items = set(), 0, crops(two_colours, 30)
    for image, mask in items:
        assert image.shape == (3, 48, 48) and image.dtype == torch.uint8
        assert mask.shape == (48, 48) and mask.dtype == torch.int64
        assert ((image[0] == 128) == (mask == 255)).float().mean() > 0.98
        inside = mask != 255
        assert (((image[0] < 130) == (mask == 1))[inside]).float().mean() > 0.95
        sides.add((inside.any(0).sum().item(), inside.any(1).sum().item()))
        one, zero = ((mask == label).nonzero()[:, 1].float().mean() for label in (1, 0))
        flipped += (one > zero).item()
    assert len(sides) > 5 and (48, 48) in sides
    assert 5 < flipped < 25
    again = crops(two_colours, 30)
    assert all(torch.equal(a, b) for pair, other in zip(items, again) for a, b in zip(pair, other))


def test_the_rescaled_mask_is_not_shifted_against_the_image(two_colours):
    shifts = []
    for image, mask in crops(two_colours, 60, crop=96):  # every crop holds the whole image
        inside = mask != 255
        rows = inside.any(1).sum()
        dark = (250 - image[0][inside].float()).sum() / 240  # the blurred border counts in part
        shifts.append((((mask == 1).sum() - dark) / rows).item())
    assert abs(np.mean(shifts)) < 0.15  # pixels of the crop
