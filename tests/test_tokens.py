"""--tokens: a file of what the frozen part of the backbone makes of each image, shared by runs."""
import shutil

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import make_pseudo
import train_cls
from conftest import in_process
from data import Folder, Images, read_mask
from model import CPFCTE, ClassifierConfig
from support.run import DataError
from support.tokens import HEADER, keep_tokens, record_size

CPU = torch.device("cpu")
SHORT = ("--epochs", "2", "--workers", "0", "--batch-size", "8", "--augment", "--no-amp")


@pytest.fixture
def images_seen(monkeypatch):
    """A list of how many images each call of the ViT got."""
    seen, forward = [], CPFCTE.frozen_tokens
    monkeypatch.setattr(CPFCTE, "frozen_tokens", lambda model, images: (
        seen.append(len(images)), forward(model, images))[1])
    return seen


def train(toy, run, *flags):
    """cls.pt of a short run."""
    in_process(train_cls, "--data", toy, "--run", run, *SHORT, *flags)
    return torch.load(run / "cls.pt", weights_only=True)


@pytest.mark.parametrize("blocks", ["0", "2"])
def test_training_from_kept_tokens_is_training_from_images(toy, tmp_path, blocks):
    flags = "--train-blocks", blocks, "--weights", tmp_path / "vit.pth"  # of equal weights
    torch.manual_seed(0)
    torch.save(CPFCTE(ClassifierConfig(9, "vit_toy")).backbone.state_dict(), tmp_path / "vit.pth")
    plain = train(toy, tmp_path / "plain", *flags)
    kept = train(toy, tmp_path / "kept", *flags, "--tokens", tmp_path / "tokens")
    for name, weight in plain["model"].items():  # but for float16
        torch.testing.assert_close(kept["model"][name], weight, atol=2e-3, rtol=0.02)
    shutil.copy(tmp_path / "kept/cls.pt", tmp_path / "plain")
    masks = {}
    for run, more in (("plain", ()), ("kept", ("--tokens", tmp_path / "tokens"))):
        in_process(make_pseudo, "--data", toy, "--run", tmp_path / run, "--split", "val",
                   "--crf", "none", "--workers", "0", "--no-amp", *more)
        masks[run] = np.stack([read_mask(path, 9) for path in
                               sorted((tmp_path / run / "bpm").glob("*.png"))])
    assert (masks["plain"] == masks["kept"]).mean() > 0.999


def test_what_is_there_is_not_computed_again(toy, tmp_path, images_seen):
    tokens = tmp_path / "tokens"
    train(toy, tmp_path / "first", "--train-blocks", "0", "--tokens", tokens)
    assert sum(images_seen) == 24 + 8 + 2  # train, val, and one of zeros for the shape each time
    images_seen.clear()
    train(toy, tmp_path / "second", "--train-blocks", "0", "--tokens", tokens, "--context", "none")
    assert images_seen == [1, 1]
    in_process(make_pseudo, "--data", toy, "--run", tmp_path / "first", "--split", "test",
               "--crf", "none", "--workers", "0", "--no-amp", "--tokens", tokens)
    assert sum(images_seen) == 2 + 1 + 8  # the test split is added
    with open(tokens, "r+b") as file:  # as if killed in the middle of the last image
        file.truncate(tokens.stat().st_size - 100)
    images_seen.clear()
    in_process(make_pseudo, "--data", toy, "--run", tmp_path / "first", "--split", "test",
               "--crf", "none", "--workers", "0", "--no-amp", "--tokens", tokens, "--overwrite")
    assert sum(images_seen) == 1 + 1
    assert (tokens.stat().st_size - HEADER) % record_size((145, 128)) == 0


def test_an_image_that_changed_is_computed_again(toy_copy, tmp_path, images_seen):
    torch.manual_seed(0)
    model, folder = CPFCTE(ClassifierConfig(9, "vit_toy")), Folder(toy_copy)
    args = train_cls.parse_args(["--data", str(toy_copy), "--run", "run", *SHORT,
                                 "--tokens", str(tmp_path / "tokens")])
    ids = folder.ids("val")
    before, after = (Images(folder, ids, 96) for _ in range(2))
    keep_tokens(before, model, 0, args, CPU)
    Image.new("RGB", (96, 96), "red").save(folder.image_path(ids[3]))
    images_seen.clear()
    keep_tokens(after, model, 0, args, CPU)
    assert sum(images_seen) == 1 + 1
    same = [torch.equal(before[k][2], after[k][2]) for k in range(len(ids))]
    assert same == [k != 3 for k in range(len(ids))]


def test_tokens_too_large_for_float16_are_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(CPFCTE, "frozen_tokens", lambda model, images: torch.full(
        (len(images), 145, 128), 1e6))
    with pytest.raises(DataError, match="do not fit into float16: train without --tokens"):
        train(toy, tmp_path / "run", "--train-blocks", "0", "--tokens", tmp_path / "tokens")


# --- the hybrid of preset photo ----------------------------------------------------------------

def test_the_hybrids_patches_are_those_of_the_cnn(tmp_path):
    torch.manual_seed(0)
    cnn = timm.create_model("tf_efficientnet_lite0").eval()
    torch.save(cnn.state_dict(), tmp_path / "lite0.pth")
    model = CPFCTE(ClassifierConfig(7, "vit_lite0"), weights=tmp_path / "lite0.pth").eval()
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        x = cnn.bn1(cnn.conv_stem((images - 0.5) / 0.5))
        expected = F.layer_norm(cnn.blocks(x).permute(0, 2, 3, 1), (320,), eps=1e-6)
        tokens = model.patch_tokens(images)
    assert tokens.shape == (2, 3, 2, 320)  # the blocks of the ViT start as the identity
    torch.testing.assert_close(tokens, expected, atol=1e-3, rtol=1e-3)
