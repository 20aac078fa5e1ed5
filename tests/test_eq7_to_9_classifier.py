"""Eq. (7) to (9): the classifier, its pooling, its loss, and how stage 1 trains it."""
import math

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.functional.classification import binary_average_precision

import train_cls
from conftest import call, classifier
from data import Folder, LabelledImages
from model import (CPFCTE, ClassifierConfig, border_and_centre, classification_loss,
                   pool_by_place, pool_patches)
from support.scores import mean_average_precision

B, C, h, w = 2, 5, 3, 4


# --- Eq. (7) -----------------------------------------------------------------------------------

@pytest.mark.eq7
@pytest.mark.parametrize("class_tokens, context", [
    ("none", "none"), ("soft", "conv"), ("soft", "pool"), ("all", "raster"), ("append", "hv"),
    ("soft", "hv")])
def test_forward_gives_a_distribution_over_classes_for_each_patch(class_tokens, context):
    Y = classifier(class_tokens=class_tokens, context=context)(torch.rand(B, 3, 96, 64))
    assert Y.shape == (B, 12, 8, C) and Y.dtype == torch.float32
    torch.testing.assert_close(Y.sum(-1), torch.ones(B, 12, 8))


@pytest.mark.eq7
def test_forward_is_the_softmax_of_w_c_times_the_fused_tokens():
    model, images = classifier(), torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        fused = model.fuse(model.enhance(model.patch_tokens(images)))[0, 3, 7].numpy()
        result = model(images)[0, 3, 7].numpy()
    score = np.exp([fused @ W_c for W_c in model.classifier.weight.detach().numpy()])
    np.testing.assert_allclose(result, score / score.sum(), rtol=1e-4)


def test_beside_pretrained_weights_every_class_starts_equal(tmp_path):
    torch.save(classifier().backbone.state_dict(), tmp_path / "vit.pth")
    images = torch.rand(B, 3, 96, 96)
    beside = CPFCTE(ClassifierConfig(C, "vit_toy"), weights=tmp_path / "vit.pth")(images)
    torch.testing.assert_close(beside, torch.full((B, 12, 12, C), 1 / C))
    assert classifier()(images).std() > 0.01  # from scratch at random


def test_every_parameter_of_the_default_model_learns():
    model = classifier()
    nn.init.normal_(model.enhance_proj.weight, std=0.1)
    loss = classification_loss(pool_patches(model(torch.rand(B, 3, 96, 96))), torch.eye(C)[:B])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# --- Eq. (8) -----------------------------------------------------------------------------------

@pytest.mark.eq8
@pytest.mark.parametrize("pool, K, largest", [
    ("topk", 1, 1), ("topk", 3, 3), ("topk", h * w, h * w), ("topk", 10 ** 6, h * w),
    ("max", 6, 1), ("avg", 1, h * w)])
def test_top_k_pooling_by_sorting(pool, K, largest):
    Y = torch.rand(B, h, w, C)
    expected = np.sort(Y.numpy().reshape(B, h * w, C), axis=1)[:, -largest:].mean(1)
    np.testing.assert_allclose(pool_patches(Y, pool, K), expected, rtol=1e-5)


@pytest.mark.parametrize("K", [1, 5, h * w])
def test_patches_that_tie_count_alike_whatever_their_order(K):
    Y = torch.randint(0, 3, (B, h, w, C), device="cuda" if torch.cuda.is_available() else "cpu") / 2
    Y[0] = 0.25  # all tie, as at a start at zero
    gradients = []
    for order in (torch.arange(h * w), torch.randperm(h * w)):
        shuffled = Y.flatten(1, 2)[:, order].view(B, h, w, C).clone().requires_grad_()
        scores = pool_patches(shuffled, "topk", K)
        torch.testing.assert_close(scores, Y.flatten(1, 2).topk(K, dim=1).values.mean(1))
        scores.square().sum().backward()
        gradients.append(shuffled.grad.flatten(1, 2)[:, order.argsort()])
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(gradients[0][0].cpu(), torch.full((h * w, C), 0.5 / (h * w)))


def test_first_steps_pool_background_from_the_border_and_classes_from_the_centre():
    Y = torch.rand(B, 16, 16, C)
    s = pool_by_place(Y)
    border = [Y[:, i, j, 0] for i in range(16) for j in range(16)
              if min(i, j) < 2 or max(i, j) > 13]
    torch.testing.assert_close(s[:, 0], torch.stack(border).mean(0))
    torch.testing.assert_close(s[:, 1:], Y[:, 3:13, 3:13, 1:].mean((1, 2)))
    for size in ((1, 1), (2, 3), (3, 40)):  # tiny grids have a border and a centre, too
        assert all(place.any() for place in border_and_centre(*size))


# --- Eq. (9) -----------------------------------------------------------------------------------

@pytest.mark.eq9
def test_classification_loss_by_loops_and_finite_at_the_ends():
    s, y = torch.tensor([[0.9, 0.2, 0.4]]), torch.tensor([[1.0, 0.0, 1.0]])
    by_hand = -(math.log(0.9) + math.log(1 - 0.2) + math.log(0.4)) / 3
    assert classification_loss(s, y).item() == pytest.approx(by_hand, rel=1e-5)
    assert classification_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).item() == (
        pytest.approx(-math.log(1e-6), rel=0.02))


# --- what learns, and how fast -----------------------------------------------------------------

@pytest.mark.parametrize("flags, learned", [
    ("--frozen-epochs 1", ()), ("--train-blocks 0", ()),
    ("--train-blocks 1", ("blocks.3.", "norm.")), ("--train-blocks 4", ("blocks.", "norm.")),
    ("--train-blocks 5", ("",))])
def test_the_last_blocks_of_the_backbone_learn_after_its_frozen_epochs(place, flags, learned):
    before = classifier(9).backbone.state_dict()
    torch.save(before, "vit.pth")
    call(f"cls --run new --weights vit.pth {flags}")
    after = torch.load("new/cls.pt", weights_only=True)["model"]
    changed = {name for name, weight in before.items()
               if not torch.equal(weight, after[f"backbone.{name}"])}
    assert changed == {name for name in before if name.startswith(learned)}
    assert after["classifier.weight"].any()  # it starts at zero


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


# --- its score: mAP ----------------------------------------------------------------------------

@pytest.mark.parametrize("values", [10, 10_000], ids=["ties", "few ties"])
def test_map_is_the_mean_of_torchmetrics_average_precisions(values):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(values, (300, 9), generator=generator) / values
    labels = (torch.rand(300, 9, generator=generator) < 0.3).float()
    labels[:, 4] = 0  # a class that never occurs; background, the first, is not counted either
    theirs = [binary_average_precision(scores[:, c], labels[:, c].long())
              for c in (1, 2, 3, 5, 6, 7, 8)]
    ours = mean_average_precision(scores, labels)
    assert ours == pytest.approx(torch.stack(theirs).mean().item(), rel=1e-5)
    assert mean_average_precision(scores[:, :1], labels[:, :1]) is None


@pytest.fixture
def val(toy, tmp_path):
    """The images of val, the arguments that validate() reads, and a CPU."""
    args = train_cls.parse_args(["--data", str(toy), "--run", str(tmp_path), "--workers", "0",
                                 "--batch-size", "3", "--top-k", "4", "--no-amp"])
    folder = Folder(toy)
    return LabelledImages(folder, folder.ids("val"), 96), args, torch.device("cpu")


def test_validation_pools_the_scores_of_every_image_in_order(val):
    dataset, model = val[0], classifier(9, dropout=0.5).train()
    found = train_cls.validate(model, *val)
    assert model.training  # and yet without dropout
    with torch.no_grad():
        scores = torch.stack([pool_patches(model.eval()(dataset[i, 0][0][None] / 255), "topk", 4)[0]
                              for i in range(len(dataset))])
    expected = mean_average_precision(scores, dataset.labels)
    assert found["val_map"] == pytest.approx(expected, rel=1e-3)


# --- which side is the object ------------------------------------------------------------------

@pytest.mark.parametrize("exchanged", [False, True])
def test_exchanged_sides_are_told_at_the_validation_in_one_line(val, capsys, exchanged):
    class Known(nn.Module):
        """Says object in the centre and background around it, or the other way round."""

        def forward(self, images):
            _, centre = border_and_centre(12, 12)
            Y = torch.full((len(images), 12, 12, 9), 0.1)
            Y[..., 0] = 0.2 * (centre == exchanged)
            return Y

    found = train_cls.validate(Known(), *val)
    sides = found["border_background"], found["centre_background"]
    assert sides == ((0, 1) if exchanged else (1, 0))
    notes = capsys.readouterr().out.splitlines()
    assert len(notes) == exchanged
    assert all("look exchanged" in note and "--centre-steps" in note for note in notes)


def test_only_the_first_steps_pool_by_place(place, monkeypatch):
    pooled = []

    def noted(name):
        function = getattr(train_cls, name)

        def pool(*arguments):
            pooled.append(name)
            return function(*arguments)
        monkeypatch.setattr(train_cls, name, pool)
    noted("pool_by_place")
    noted("pool_patches")
    call("cls --run new --epochs 3 --val-split none --centre-steps 4")
    assert pooled == 4 * ["pool_by_place"] + 2 * ["pool_patches"]  # 8 images, 2 steps an epoch


def test_modules_learn_at_their_own_rate():
    model = classifier()
    groups = train_cls.parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    slow = {names[id(p)].split(".")[0] for p in groups[1]["params"]}
    assert slow == {"class_tokens", "enhance_proj", "context"} and groups[1]["factor"] == 0.1
    fast = {names[id(p)].split(".")[0] for p in groups[0]["params"]}
    assert fast == {"backbone", "classifier"} and groups[0]["factor"] == 1
