"""Eq. (1), P = ViT(x): the patch tokens are timm's, and the backbone's weights come from timm."""
import urllib.error

import huggingface_hub.constants as hub
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from model import CPFCTE, ClassifierConfig
from support.backbones import ask_hub
from support.files import UserError

C = 5


# --- the tokens --------------------------------------------------------------------------------

@pytest.mark.eq1
@pytest.mark.parametrize("name, prefix, size", [
    ("vit_tiny_patch16_224", 1, (224, 224)), ("vit_small_patch14_reg4_dinov2", 5, (518, 518)),
    ("vit_toy", 1, (128, 64))])  # another size than its own: position embeddings are resampled
def test_patch_tokens_are_timms_after_its_prefix_tokens(name, prefix, size):
    torch.manual_seed(0)
    ours = CPFCTE(ClassifierConfig(C, name)).eval()
    theirs = timm.create_model(name, num_classes=0, img_size=size).eval()
    state = ours.backbone.state_dict()
    if name == "vit_toy":
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], (16, 8), num_prefix_tokens=prefix)
    theirs.load_state_dict(state)
    images = torch.rand(1, 3, *size)
    config = timm.data.resolve_model_data_config(theirs)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = theirs.forward_features((images - mean) / std)[:, prefix:]
        tokens = ours.patch_tokens(images)
    assert tokens.shape[1] / tokens.shape[2] == size[0] / size[1]
    torch.testing.assert_close(tokens.flatten(1, 2), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.eq1
def test_average_pooled_vits_are_normed_too():
    model = CPFCTE(ClassifierConfig(C, "vit_tiny_patch16_224"))
    model.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg")
    tokens = model.patch_tokens(torch.rand(1, 3, 224, 224))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 14, 14), atol=1e-4, rtol=0)


# --- the weights -------------------------------------------------------------------------------

def test_local_weights_of_another_grid_and_with_a_head(tmp_path):
    torch.manual_seed(1)
    saved = timm.create_model("vit_tiny_patch16_224", img_size=160)  # a head of 1000, a grid of 10
    torch.save(saved.state_dict(), tmp_path / "vit.pth")
    model = CPFCTE(ClassifierConfig(C, "vit_tiny_patch16_224"), weights=tmp_path / "vit.pth")
    assert torch.equal(model.backbone.blocks[3].attn.qkv.weight, saved.blocks[3].attn.qkv.weight)
    assert model.backbone.pos_embed.shape[1] == 1 + 14 * 14


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    asked = []

    def refuse(url, timeout):
        asked.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="--weights FILE.*--no-pretrained") as caught:
        CPFCTE(ClassifierConfig(C, "vit_tiny_patch16_224.augreg_in21k"), pretrained=True)
    assert "\n" not in str(caught.value)
    assert len(asked) == 1 and hub.HF_HUB_OFFLINE  # timm then looks in its cache alone


def test_a_hub_that_answers_with_an_error_is_not_taken_for_offline(monkeypatch):
    def answer(url, timeout):
        raise urllib.error.HTTPError(url, 503, "busy", {}, None)

    monkeypatch.setattr("urllib.request.urlopen", answer)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    ask_hub("vit_toy")
    assert not hub.HF_HUB_OFFLINE
