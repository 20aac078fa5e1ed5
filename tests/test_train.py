"""The pieces of the training scripts: schedules, parameter groups, losses, augmentation."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import train_cls
import train_seg
from data import DataError, Folder
from model import DeepLabv2, SegmenterConfig


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


def test_augmentation_is_a_function_of_the_draw_alone(toy):
    folder = Folder(toy)
    dataset = train_cls.LabelledImages(folder, folder.ids("train"), 96, 0, ["flip", "jitter"])
    first = [dataset[(0, draw)][0] for draw in range(8)]
    torch.rand(3)
    assert all(torch.equal(a, dataset[(0, draw)][0]) for draw, a in enumerate(first))
    assert len({a.numpy().tobytes() for a in first}) == 8
    plain = data.to_tensor(data.read_image(folder.image_path(dataset.ids[0])))
    assert torch.equal(dataset[(0, None)][0], plain)


def test_each_augmentation_does_what_its_name_says():
    torch.manual_seed(0)
    image = torch.arange(27, dtype=torch.uint8).view(3, 3, 3)
    for name, changed in (("flip", image.flip(2)), ("vflip", image.flip(1)),
                          ("transpose", image.transpose(1, 2))):
        results = [train_cls.augmented(image, [name]) for _ in range(20)]
        assert all(torch.equal(r, image) or torch.equal(r, changed) for r in results)
        assert 0 < sum(torch.equal(r, changed) for r in results) < 20
    assert torch.equal(train_cls.augmented(image, []), image)


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
    dataset = train_seg.MaskedImages(Folder(tmp_path), ["a"], tmp_path / "masks", **recipe)
    sides = set()
    for draw in range(30):
        image, mask = dataset[(0, draw)]
        assert image.shape == (3, 48, 48) and mask.shape == (48, 48)
        assert ((image[0] == 128) == (mask == 255)).float().mean() > 0.98
        inside = mask != 255
        assert (((image[0] < 128) == (mask == 1))[inside]).float().mean() > 0.95
        sides.add((inside.any(0).sum().item(), inside.any(1).sum().item()))
        assert torch.equal(image, dataset[(0, draw)][0])
    assert len(sides) > 5 and (48, 48) in sides
    with pytest.raises(DataError, match="run make_pseudo.py first"):
        train_seg.MaskedImages(Folder(tmp_path), ["b"], tmp_path / "masks", **recipe)


def test_a_loss_that_is_not_finite_names_the_epoch_and_the_images(toy, tmp_path, monkeypatch):
    args = train_cls.parse_args(["--data", str(toy), "--run", str(tmp_path), "--workers", "0"])
    class Broken(train_cls.CPFCTE):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.classifier.weight.data[0, 0] = math.nan
    monkeypatch.setattr(train_cls, "CPFCTE", Broken)
    with pytest.raises(DataError, match="nan in epoch 1, images train_000"):
        train_cls.main(args)
