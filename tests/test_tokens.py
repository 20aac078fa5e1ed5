"""--tokens: a folder of what a frozen backbone makes of each image, shared by runs."""
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import call, classifier
from model import CPFCTE, ClassifierConfig
from support import tokens as kept_tokens
from support.masks import read_mask

SHORT = "cls --epochs 2 --augment --no-amp --train-blocks"
KEEP = f"{SHORT} 0 --tokens tokens --run"
MASKS = "pseudo --crf none --no-amp --split test --tokens tokens --run"


@pytest.fixture
def images_seen(monkeypatch):
    """A list of how many images each call of the ViT got."""
    seen, forward = [], kept_tokens.frozen_tokens

    def counted(model, images):
        seen.append(len(images))
        return forward(model, images)
    monkeypatch.setattr(kept_tokens, "frozen_tokens", counted)
    return seen


@pytest.mark.parametrize("blocks", [0, 2])
def test_training_from_kept_tokens_is_training_from_images(place, blocks):
    lists = Path("data/ImageSets/Segmentation")
    every_id = " ".join(path.read_text() for path in lists.iterdir()).split()
    (lists / "train.txt").write_text("\n".join(every_id))  # more than are computed at a time
    torch.save(classifier(9).backbone.state_dict(), "vit.pth")  # both start with equal weights
    flags = f"{SHORT} {blocks} --weights vit.pth --run"
    call(f"{flags} plain")
    call(f"{flags} kept --tokens tokens")
    plain, kept = (torch.load(f"{run}/cls.pt", weights_only=True)["model"]
                   for run in ("plain", "kept"))
    for name, weight in plain.items():  # but for float16
        torch.testing.assert_close(kept[name], weight, atol=2e-3, rtol=0.02)
    shutil.copy("kept/cls.pt", "plain")
    call("pseudo --crf none --no-amp --run plain")
    call("pseudo --crf none --no-amp --run kept --tokens tokens")
    plain, kept = (np.stack([read_mask(path, 9) for path in sorted(Path(run).glob("bpm/*.png"))])
                   for run in ("plain", "kept"))
    assert (plain == kept).mean() > 0.999


def test_what_is_there_is_not_computed_again(place, images_seen):
    call(f"{KEEP} first")
    assert sum(images_seen) == 8 + 2  # train and val
    images_seen.clear()
    call(f"{KEEP} second --context none")
    assert not images_seen
    call(f"{MASKS} first")
    assert sum(images_seen) == 2  # the test split is added
    next(Path("tokens").glob("*.npy")).unlink()  # as if killed before the last image
    images_seen.clear()
    call(f"{KEEP} first --overwrite")
    call(f"{MASKS} first --overwrite")
    assert sum(images_seen) == 1
    assert len([*Path("tokens").glob("*.npy")]) == 12


def test_a_damaged_file_is_named(place):
    call(f"{KEEP} first")
    path = next(Path("tokens").glob("*.npy"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit, match=f"{path} is damaged: delete it"):
        call(f"{KEEP} first --overwrite")


def test_tokens_may_lie_in_the_run_folder(place):
    call(f"{SHORT} 0 --tokens both --run both")  # each has a lock of its own
    assert Path("both/cls.pt").is_file() and [*Path("both").glob("*.npy")]


def test_an_image_that_changed_is_computed_again(place, images_seen):
    call(f"{KEEP} first")
    Image.new("RGB", (96, 96), "red").save("data/JPEGImages/val_00001.jpg")
    images_seen.clear()
    call(f"{KEEP} second")
    assert sum(images_seen) == 1


def test_tokens_too_large_for_float16_are_named(place, monkeypatch):
    monkeypatch.setattr(kept_tokens, "frozen_tokens", lambda model, images: torch.full(
        (len(images), 37, 128), 1e6))
    with pytest.raises(SystemExit, match="do not fit into float16: train without --tokens"):
        call(f"{KEEP} new")


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
