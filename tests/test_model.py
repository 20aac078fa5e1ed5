"""Each equation of model.py against a computation that shares no code with it."""
import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

import model as M
from conftest import needs_compiler
from support import run
from support.run import DataError
from model import (CPFCTE, ClassifierConfig, ContextFusion, DeepLabv2, SegmenterConfig,
                   classification_loss, pool_patches)

B, C, h, w, D = 2, 5, 3, 4, 8


def tiny(**kwargs):
    torch.manual_seed(0)
    return CPFCTE(ClassifierConfig(C, "vit_toy", **kwargs)).eval()


# --- Eq. (1) -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, prefix", [("vit_tiny_patch16_224", 1),
                                          ("vit_small_patch14_reg4_dinov2", 5)])
def test_patch_tokens_are_timms_after_its_prefix_tokens(name, prefix):
    torch.manual_seed(0)
    ours = CPFCTE(ClassifierConfig(C, name)).eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(ours.backbone.state_dict())
    side = theirs.patch_embed.img_size[0]
    images = torch.rand(1, 3, side, side)
    config = timm.data.resolve_model_data_config(theirs)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = theirs.forward_features((images - mean) / std)[:, prefix:]
        tokens = ours.patch_tokens(images)
    assert tokens.shape[1] * tokens.shape[2] == expected.shape[1]
    torch.testing.assert_close(tokens.flatten(1, 2), expected, atol=1e-5, rtol=1e-4)


def test_position_embedding_is_resampled_for_other_sizes():
    ours = tiny(class_tokens="none", context="none")
    size = (128, 64)
    theirs = timm.create_model("vit_toy", num_classes=0, img_size=size).eval()
    state = dict(ours.backbone.state_dict())
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (16, 8), num_prefix_tokens=1)
    theirs.load_state_dict(state)
    images = torch.rand(1, 3, *size)
    with torch.no_grad():
        tokens = ours.patch_tokens(images)
        expected = theirs.forward_features((images - 0.5) / 0.5)[:, 1:]
    assert tokens.shape[1:3] == (16, 8)
    torch.testing.assert_close(tokens.flatten(1, 2), expected, atol=1e-5, rtol=1e-4)


# --- Eq. (2) -----------------------------------------------------------------------------------

def test_soft_tokens_by_loops():
    model = tiny(class_tokens="soft")
    width = model.class_tokens.shape[1]
    nn.init.normal_(model.enhance_proj.weight)
    P = torch.randn(B, h, w, width)
    T, W, b = (x.detach().numpy() for x in (model.class_tokens, model.enhance_proj.weight,
                                            model.enhance_proj.bias))
    with torch.no_grad():
        result = model.enhance(P).numpy()
    for index in np.ndindex(B, h, w):
        p = P[index].numpy()
        score = np.array([np.exp(p @ t / math.sqrt(width)) for t in T])
        t_i = sum(a * t for a, t in zip(score / score.sum(), T))
        np.testing.assert_allclose(result[index], W @ np.concatenate([p, t_i]) + b, atol=1e-3)


def test_all_tokens_are_only_a_constant_bias():
    model = tiny(class_tokens="all")
    width = model.class_tokens.shape[1]
    nn.init.normal_(model.enhance_proj.weight, std=0.1)
    P = torch.randn(B, h, w, width)
    with torch.no_grad():
        added = model.enhance(P) - P @ model.enhance_proj.weight[:, :width].T
    assert added[0, 0, 0].abs().max() > 0.1
    torch.testing.assert_close(added, added[:1, :1, :1].expand_as(added), atol=1e-4, rtol=0)


def test_append_needs_a_context():
    with pytest.raises(DataError, match="--context"):
        tiny(class_tokens="append", context="none")


# --- Eq. (3) to (6) ----------------------------------------------------------------------------

def lstm_by_hand(lstm, line, suffix):
    """(steps, D) -> (steps, H): the LSTM's textbook equations, one step at a time."""
    W, U, b, c = (getattr(lstm, f"{name}_l0{suffix}").detach().numpy()
                  for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    hidden = cell = np.zeros(U.shape[1])
    outputs = []
    for x in line if not suffix else line[::-1]:
        i, f, g, o = np.split(W @ x + b + U @ hidden + c, 4)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        cell = f * cell + i * np.tanh(g)
        hidden = o * np.tanh(cell)
        outputs.append(hidden)
    return np.array(outputs if not suffix else outputs[::-1])


def both_ways(lstm, line):
    return np.concatenate([lstm_by_hand(lstm, line, ""), lstm_by_hand(lstm, line, "_reverse")], 1)


def fusion(context):
    torch.manual_seed(0)
    return ContextFusion(D, context, dropout=0.2).eval()


def test_hv_is_one_bilstm_per_row_and_one_per_column():
    fuse, tokens = fusion("hv"), torch.randn(B, h, w, D)
    hidden = np.zeros((B, h, w, D))
    for b in range(B):
        for row in range(h):
            hidden[b, row, :, :D // 2] = both_ways(fuse.lstms[0], tokens[b, row].numpy())
        for column in range(w):
            hidden[b, :, column, D // 2:] = both_ways(fuse.lstms[1], tokens[b, :, column].numpy())
    W, b_o = fuse.proj.weight.detach().numpy(), fuse.proj.bias.detach().numpy()
    np.testing.assert_allclose(fuse(tokens).detach().numpy(), hidden @ W.T + b_o, atol=1e-5)


def test_hv_output_depends_on_exactly_its_row_and_its_column():
    fuse, tokens = fusion("hv"), torch.randn(1, h, w, D, requires_grad=True)
    fuse(tokens)[0, 1, 2].sum().backward()
    reached = tokens.grad[0].abs().sum(-1) > 0
    expected = torch.zeros(h, w, dtype=torch.bool)
    expected[1, :] = expected[:, 2] = True
    assert torch.equal(reached, expected)


def test_raster_is_one_bilstm_over_the_row_major_sequence():
    fuse, tokens = fusion("raster"), torch.randn(B, h, w, D)
    W, b_o = fuse.proj.weight.detach().numpy(), fuse.proj.bias.detach().numpy()
    for b in range(B):
        hidden = both_ways(fuse.lstms[0], tokens[b].reshape(h * w, D).numpy())
        np.testing.assert_allclose(fuse(tokens)[b].detach().numpy().reshape(h * w, D),
                                   hidden @ W.T + b_o, atol=1e-5)


def test_appended_tokens_lead_every_line_and_are_dropped():
    fuse, tokens, class_tokens = fusion("hv"), torch.randn(1, h, w, D), torch.randn(C, D)
    W, b_o = fuse.proj.weight.detach().numpy(), fuse.proj.bias.detach().numpy()
    row = both_ways(fuse.lstms[0], torch.cat([class_tokens, tokens[0, 1]]).numpy())[C:][2]
    column = both_ways(fuse.lstms[1], torch.cat([class_tokens, tokens[0, :, 2]]).numpy())[C:][1]
    result = fuse(tokens, class_tokens)[0, 1, 2].detach().numpy()
    np.testing.assert_allclose(result, W @ np.concatenate([row, column]) + b_o, atol=1e-5)


# --- Eq. (7) to (9) ----------------------------------------------------------------------------

@pytest.mark.parametrize("class_tokens, context", [
    ("none", "none"), ("soft", "none"), ("all", "raster"), ("append", "hv"), ("soft", "hv")])
def test_forward_gives_a_distribution_over_classes_for_each_patch(class_tokens, context):
    Y = tiny(class_tokens=class_tokens, context=context)(torch.rand(B, 3, 96, 64))
    assert Y.shape == (B, 12, 8, C) and Y.dtype == torch.float32
    torch.testing.assert_close(Y.sum(-1), torch.ones(B, 12, 8))


def test_every_parameter_of_the_default_model_learns():
    model = tiny()
    nn.init.normal_(model.enhance_proj.weight, std=0.1)
    loss = classification_loss(pool_patches(model(torch.rand(B, 3, 96, 96))), torch.eye(C)[:B])
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("K", [1, 3, h * w])
def test_top_k_pooling_by_sorting(K):
    Y = torch.rand(B, h, w, C)
    expected = np.sort(Y.numpy().reshape(B, h * w, C), axis=1)[:, -K:].mean(1)
    np.testing.assert_allclose(pool_patches(Y, "topk", K), expected, rtol=1e-5)


def test_top_k_pooling_has_max_and_average_as_its_limits():
    Y = torch.rand(B, h, w, C)
    assert torch.equal(pool_patches(Y, "topk", 1), Y.amax((1, 2)))
    assert torch.equal(pool_patches(Y, "max"), Y.amax((1, 2)))
    torch.testing.assert_close(pool_patches(Y, "topk", h * w), Y.mean((1, 2)))
    torch.testing.assert_close(pool_patches(Y, "avg"), Y.mean((1, 2)))


def test_classification_loss_by_loops_and_finite_at_the_ends():
    s, y = torch.tensor([[0.9, 0.2, 0.4]]), torch.tensor([[1.0, 0.0, 1.0]])
    by_hand = -(math.log(0.9) + math.log(1 - 0.2) + math.log(0.4)) / 3
    assert classification_loss(s, y).item() == pytest.approx(by_hand, rel=1e-5)
    assert classification_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).item() == (
        pytest.approx(-math.log(1e-6), rel=0.02))


def test_frozen_and_trained_parts_of_the_backbone():
    model = tiny()
    def learning():
        return {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    model.train_last(0)
    assert not learning()
    assert model.classifier.weight.requires_grad and model.class_tokens.requires_grad
    model.train_last(1)
    assert learning() and all(n.startswith(("blocks.3.", "norm.")) for n in learning())
    model.train_last(4)
    assert learning() == {name for name, _ in model.backbone.named_parameters()}


# --- DeepLabv2 ---------------------------------------------------------------------------------

def test_deeplab_shapes_stride_and_rates():
    model = DeepLabv2(SegmenterConfig(C, "resnet_toy")).eval()
    outputs = model(torch.rand(1, 3, 96, 64))
    assert [tuple(o.shape[1:]) for o in outputs] == [(C, 12, 8), (C, 9, 6), (C, 6, 4), (C, 12, 8)]
    assert [conv.dilation[0] for conv in model.aspp] == [6, 12, 18, 24]
    assert [conv.kernel_size for conv in model.aspp] == 4 * [(3, 3)]
    upsampled = [nn.functional.interpolate(o, (12, 8), mode="bilinear") for o in outputs[:3]]
    expected = torch.maximum(torch.maximum(*upsampled[:2]), upsampled[2])
    torch.testing.assert_close(outputs[3], expected)


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


def test_resnet101_keeps_stride_8_by_dilation():
    with torch.device("meta"):
        backbone = DeepLabv2(SegmenterConfig(21, "resnet101")).backbone
    assert backbone.feature_info.reduction() == [8]
    dilations = {n: m.dilation[0] for n, m in backbone.named_modules()
                 if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}
    assert dilations["layer3.5.conv2"] == 2 and dilations["layer4.2.conv2"] == 4


def test_frozen_batch_norm_keeps_statistics_and_scales():
    model = DeepLabv2(SegmenterConfig(C, "resnet_toy")).train()
    model.freeze_batch_norm()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model(torch.rand(2, 3, 64, 64))[0].sum().backward()
    assert before and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(p.grad is None for m in norms for p in m.parameters())


# --- weights and checkpoints -------------------------------------------------------------------

def test_local_weights_of_another_grid_and_with_a_head(tmp_path):
    torch.manual_seed(1)
    saved = timm.create_model("vit_tiny_patch16_224", img_size=160)  # a head of 1000, a grid of 10
    torch.save(saved.state_dict(), tmp_path / "vit.pth")
    model = CPFCTE(ClassifierConfig(C, "vit_tiny_patch16_224"), weights=tmp_path / "vit.pth")
    assert torch.equal(model.backbone.blocks[3].attn.qkv.weight, saved.blocks[3].attn.qkv.weight)
    assert model.backbone.pos_embed.shape[1] == 1 + 14 * 14


@pytest.mark.parametrize("write, words", [(None, "not found"), (b"not weights", "--no-pretrained")])
def test_bad_weights_are_one_line(tmp_path, write, words):
    if write:
        (tmp_path / "bad.pth").write_bytes(write)
    with pytest.raises(DataError, match=words) as caught:
        CPFCTE(ClassifierConfig(C, "vit_tiny_patch16_224"), weights=tmp_path / "bad.pth")
    assert "\n" not in str(caught.value) and "bad.pth" in str(caught.value)


def test_unreachable_hub_and_unfit_models_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="--weights") as caught:
        CPFCTE(ClassifierConfig(C, "vit_tiny_patch16_224.augreg_in21k"), pretrained=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="vit_huge_unknown"):
        CPFCTE(ClassifierConfig(C, "vit_huge_unknown"))
    with pytest.raises(DataError, match="resnet18 does not fit here"):
        CPFCTE(ClassifierConfig(C, "resnet18"))
    with pytest.raises(DataError, match="--size 100 is no multiple of the 8 pixels"):
        tiny()(torch.rand(1, 3, 100, 100))


def test_average_pooled_vits_are_normed_too():
    model = CPFCTE(ClassifierConfig(C, "vit_tiny_patch16_224"))
    model.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg")
    tokens = model.patch_tokens(torch.rand(1, 3, 224, 224))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 14, 14), atol=1e-4, rtol=0)


def test_checkpoints_describe_themselves_and_name_what_is_wrong(tmp_path):
    model = tiny(class_tokens="append")
    path = tmp_path / "cls.pt"
    with pytest.raises(DataError, match="run train_cls.py first"):
        run.load_checkpoint(path, "cls")
    run.save_checkpoint(path, "cls", model, classes=["a"], epoch=1, args={"seed": 0})
    again = M.build(run.load_checkpoint(path, "cls"))
    images = torch.rand(1, 3, 96, 96)
    assert again.config == model.config and torch.equal(again(images), model(images))
    with pytest.raises(DataError, match="no seg checkpoint but cls"):
        run.load_checkpoint(path, "seg")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="not a readable checkpoint"):
        run.load_checkpoint(path, "cls")


@needs_compiler
def test_a_compiled_cnn_gives_the_same_logits_and_gradients():
    torch.manual_seed(0)
    model = DeepLabv2(SegmenterConfig(4, "resnet_toy", scales=(1.0,)))
    images = torch.rand(2, 3, 64, 64)
    def results():
        model.zero_grad()
        logits = model(images)[-1]
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]
    plain = results()
    dynamo = pytest.importorskip("torch._dynamo")
    names = list(model.state_dict())
    model.compile_backbone()
    dynamo.utils.counters.clear()
    compiled = results()
    assert dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled
    assert list(model.state_dict()) == names
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())
    with torch.no_grad():  # other sizes run as they are
        assert model(torch.rand(1, 3, 40, 56))[-1].shape == (1, 4, 5, 7)


def test_channels_last_changes_nothing_but_the_layout():
    torch.manual_seed(0)
    model = DeepLabv2(SegmenterConfig(4, "resnet_toy")).eval()
    weight = model.aspp[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 64, 80)
    with torch.no_grad():
        fast = model(images)[-1]
        slow = model.to(memory_format=torch.contiguous_format)(images)[-1]
    assert model.aspp[0].weight.is_contiguous()
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_compile_without_a_compiler_names_the_way_out(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DataError, match="leave the flag out"):
        CPFCTE(ClassifierConfig(4, "vit_toy")).compile_backbone()
