"""The pieces of the training scripts: schedules, parameter groups, losses, augmentation."""
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional

import data
import train_cls
import train_seg
from data import Folder
from support.run import DataError
from model import CPFCTE, ClassifierConfig, DeepLabv2, SegmenterConfig


# --- stage 1 -----------------------------------------------------------------------------------

def test_two_stage_rate_drops_after_two_epochs(toy, tmp_path):
    args = train_cls.parse_args(["--data", str(toy), "--run", str(tmp_path), "--preset", "voc"])
    rates = [train_cls.learning_rate(args, step, 10) for step in range(50 * 10)]
    assert rates == 20 * [1e-3] + 480 * [1e-4]
    assert (args.frozen_epochs, args.train_blocks, args.epochs, args.batch_size) == (2, 5, 50, 16)


def test_cosine_rate_warms_up_for_one_epoch_and_ends_at_nothing(toy, tmp_path):
    args = train_cls.parse_args(["--data", str(toy), "--run", str(tmp_path), "--epochs", "4"])
    rates = [train_cls.learning_rate(args, step, 100) for step in range(400)]
    assert rates[0] == pytest.approx(args.lr / 100) and max(rates) < args.lr
    assert rates[200] == pytest.approx(args.lr / 2) and rates[-1] < args.lr / 1000
    assert rates[:90] == sorted(rates[:90]) and rates[100:] == sorted(rates[100:], reverse=True)


def test_multi_label_scores_by_hand():
    scores = np.array([[1, 0.9, 0.6], [1, 0.8, 0.2], [1, 0.3, 0.1], [1, 0.2, 0.3]])
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    # class 1: predicted {0, 1}, true {0, 2}: F1 = 2 / 4, true ranks 1 and 3; class 2 never occurs
    f1, mean_ap = train_cls.multi_label_scores(scores, labels)
    assert f1 == pytest.approx(1 / 2) and mean_ap == pytest.approx((1 / 1 + 2 / 3) / 2)


def test_augmentation_is_a_function_of_the_draw_alone():
    images, draws = torch.rand(1, 3, 9, 9).expand(8, -1, -1, -1), torch.arange(8)
    names = ["flip", "vflip", "transpose", "jitter"]
    together = data.augment(images, 5, draws, names)
    torch.rand(3)
    for row, draw in enumerate(draws):
        torch.testing.assert_close(data.augment(images[:1], 5, draw[None], names)[0],
                                   together[row])
    assert len({image.numpy().tobytes() for image in together}) == 8
    assert not torch.equal(data.augment(images, 6, draws, names), together)
    assert torch.equal(data.augment(images, 5, draws, []), images)


def test_each_augmentation_does_what_its_name_says():
    image = torch.arange(27.0).view(3, 3, 3) / 27
    images, draws = image.expand(20, -1, -1, -1), torch.arange(20)
    for name, changed in (("flip", image.flip(2)), ("vflip", image.flip(1)),
                          ("transpose", image.transpose(1, 2))):
        results = data.augment(images, 0, draws, [name])
        assert all(torch.equal(r, image) or torch.equal(r, changed) for r in results)
        assert 0 < sum(torch.equal(r, changed) for r in results) < 20


def test_jitter_is_torchvisions_with_a_factor_for_each_image():
    torch.manual_seed(0)
    images, factors = torch.rand(6, 3, 12, 10), 1 + 0.6 * (torch.rand(3, 6) - 0.5)
    results = data.jitter(images, *factors.view(3, 6, 1, 1, 1))
    for image, result, (brightness, contrast, saturation) in zip(images, results, factors.T):
        expected = functional.adjust_brightness(image, brightness.item())
        expected = functional.adjust_contrast(expected, contrast.item())
        expected = functional.adjust_saturation(expected, saturation.item())
        torch.testing.assert_close(result, expected)
    changed = data.augment(images, 0, torch.arange(6), ["jitter"])
    assert 0.02 < (changed - images).abs().mean() < 0.2


# --- stage 1, faster: the same numbers ----------------------------------------------------------

def test_the_cache_holds_what_is_decoded_and_notices_other_images(toy_copy):
    folder = Folder(toy_copy)
    ids = folder.ids("val")
    def cached(ids, size=48):
        dataset = data.LabelledImages(folder, ids, size)
        dataset.use_cache("val", 0, 0, 1)
        return dataset
    plain, fast = data.LabelledImages(folder, ids, 48), cached(ids)
    for index in range(len(ids)):
        for a, b in zip(plain[(index, 7)], fast[(index, 7)]):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    path = fast.cache
    written = path.stat().st_mtime_ns
    cached(ids)
    assert path.stat().st_mtime_ns == written  # once
    cached(ids, 32)
    assert len(list(path.parent.glob("*.npy"))) == 2
    assert cached(ids[::-1]).cache != path and not path.exists()
    victim = folder.image_path(ids[0])
    assert cached(ids)[(0, 0)][0].max() > 0
    Image.new("RGB", (96, 96)).save(victim)
    assert cached(ids)[(0, 0)][0].max() == 0
    victim.write_bytes(b"no image")
    before = sorted(path.parent.iterdir())
    killed, running = (path.parent / f".val-64-{name}.tmp" for name in ("killed", "running"))
    killed.touch(), running.touch()
    os.utime(killed, (0, 0))
    with pytest.raises(DataError, match=victim.name):
        cached(ids, 64)
    assert sorted(path.parent.iterdir()) == [running, *before]  # nothing half written


def test_nothing_is_kept_for_a_frozen_backbone():
    torch.manual_seed(0)
    model = CPFCTE(ClassifierConfig(4, "vit_toy"))
    def kept(blocks):
        model.train_last(blocks)
        sizes = []
        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = model.patch_tokens(torch.rand(2, 3, 96, 96))
        return sum(sizes), tokens.requires_grad
    activations = {blocks: kept(blocks) for blocks in (0, 1, 2, 4)}
    assert activations[0] == (0, False)
    assert 0 < activations[1][0] < activations[2][0] < activations[4][0]


@pytest.mark.parametrize("kind, options", [
    (torch.optim.Adam, {}), (torch.optim.SGD, dict(momentum=0.9, weight_decay=5e-4))])
def test_fused_optimisers_are_the_plain_ones(kind, options):
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = torch.nn.Linear(7, 5)
        optimizer = kind(layer.parameters(), lr=0.1, fused=fused, **options)
        for _ in range(5):
            optimizer.zero_grad()
            layer(torch.randn(4, 7)).square().sum().backward()
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights)


# --- stage 3 -----------------------------------------------------------------------------------

def test_parameter_groups_and_poly_decay():
    model = DeepLabv2(SegmenterConfig(4, "resnet_toy"))
    model.freeze_batch_norm()
    groups = train_seg.parameter_groups(model, 2.5e-4, 10)
    assert [group["base_lr"] for group in groups] == pytest.approx([2.5e-4, 2.5e-3, 5e-3])
    assert [g.get("weight_decay", 5e-4) for g in groups] == [5e-4, 5e-4, 0]
    assert [len(group["params"]) for group in groups[1:]] == [4, 4]
    assert all(p.ndim == 4 for p in groups[0]["params"])  # convolutions alone: batch norm is frozen
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    assert [train_seg.poly(step, 100) for step in (0, 50, 100)] == [1, 0.5 ** 0.9, 0]


def test_multi_scale_loss_is_the_sum_of_cross_entropies_without_ignored_pixels():
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


def test_crops_keep_image_and_mask_together_and_fill_with_ignore(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "classes.txt").write_text("background\nleft\n")
    pixels = np.full((40, 60, 3), 250, np.uint8)
    pixels[:, :30] = 10  # dark is class 1
    Image.fromarray(pixels).save(tmp_path / "JPEGImages/a.jpg", quality=100, subsampling=0)
    data.save_mask(tmp_path / "masks/a.png", (pixels[..., 0] < 100).astype(np.uint8))
    recipe = dict(crop=48, rescale=(0.5, 1.5), seed=0, fill=(128, 128, 128))
    dataset = data.MaskedImages(Folder(tmp_path), ["a"], tmp_path / "masks", **recipe)
    sides = set()
    for draw in range(30):
        image, mask, _ = dataset[(0, draw)]
        assert image.shape == (3, 48, 48) and mask.shape == (48, 48)
        assert ((image[0] == 128) == (mask == 255)).float().mean() > 0.98
        inside = mask != 255
        assert (((image[0] < 128) == (mask == 1))[inside]).float().mean() > 0.95
        sides.add((inside.any(0).sum().item(), inside.any(1).sum().item()))
        assert torch.equal(image, dataset[(0, draw)][0])
    assert len(sides) > 5 and (48, 48) in sides
    with pytest.raises(DataError, match="run make_pseudo.py first"):
        data.MaskedImages(Folder(tmp_path), ["b"], tmp_path / "masks", **recipe)


def test_a_loss_that_is_not_finite_names_the_epoch_and_the_images(toy, tmp_path, monkeypatch):
    args = train_cls.parse_args(["--data", str(toy), "--run", str(tmp_path), "--workers", "0"])
    class Broken(CPFCTE):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.classifier.weight.data[0, 0] = math.nan
    monkeypatch.setattr(train_cls, "CPFCTE", Broken)
    with pytest.raises(DataError, match="nan in epoch 1, images train_000"):
        train_cls.main(args)
