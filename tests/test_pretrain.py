"""extras/pretrain.py: the whole way from folders of images to --weights, and its known answers."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import model
import pretrain
from conftest import in_process
from support.run import DataError

SMALL = "--size 32 --batch-size 8 --lr 0.002 --workers 0 --mixup 0 --label-smoothing 0 --crop 1"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """32 images to train on, 8 for val, of two classes: stripes one way and the other."""
    root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for split, number in (("train", 16), ("val", 4)):
        for name in ("across", "down"):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                stripes = np.arange(48) // rng.integers(3, 6) % 2 * np.ones((40, 1))
                stripes = stripes if name == "down" else stripes[:, :40].T
                image = Image.fromarray((40 + 160 * stripes).astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def pretrained(images, home, *flags):
    in_process(pretrain, "--data", images, "--run", home, *SMALL.split(), *flags)
    return [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_stage_3_starts_from_what_it_learnt(images, tmp_path):
    log = pretrained(images, tmp_path, "--backbone", "resnet_small_photo", "--epochs", "8")
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["top1"] == log[-1]["top5"] == 1
    saved = torch.load(tmp_path / "weights.pth", weights_only=True)
    config = model.SegmenterConfig(3, "resnet_small_photo")
    net = model.DeepLabv2(config, weights=tmp_path / "weights.pth")
    state = net.backbone.state_dict()
    assert saved.keys() - state.keys() == {"fc.weight", "fc.bias"}  # as in a file of the hub
    assert all(torch.equal(state[name], saved[name]) for name in state)


def test_a_vit_of_another_size_lends_stage_1_everything_but_its_grid(images, tmp_path):
    pretrained(images, tmp_path, "--backbone", "vit_toy", "--epochs", "1")
    saved = torch.load(tmp_path / "weights.pth", weights_only=True)
    net = model.CPFCTE(model.ClassifierConfig(3, "vit_toy"), weights=tmp_path / "weights.pth")
    state = net.backbone.state_dict()
    assert saved["pos_embed"].shape[1] == 1 + 4 * 4 and state["pos_embed"].shape[1] == 1 + 12 * 12
    assert all(torch.equal(state[n], saved[n]) for n in state.keys() - {"pos_embed"})


def test_a_resumed_run_ends_with_the_same_weights(images, tmp_path, monkeypatch):
    flags = ["--backbone", "resnet_toy", "--epochs", "2", "--mixup", "0.2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pretrained(images, whole, *flags)
    loss, calls = torch.nn.functional.cross_entropy, []

    def _dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", _dies)
    with pytest.raises(KeyboardInterrupt):
        pretrained(images, killed, *flags)
    assert torch.load(killed / "pretrain.pt", weights_only=True)["epoch"] == 1
    pretrained(images, killed, *flags, "--resume")
    a, b = (torch.load(home / "weights.pth", weights_only=True) for home in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_top_1_and_top_5_by_hand():
    class Scores(torch.nn.Module):
        def forward(self, images):
            return torch.arange(8, 0, -1).expand(len(images), 8)

    class Val(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, item):
            return torch.zeros(3, 4, 4), item[0]

    args = pretrain.parse_args(["--data", "a", "--run", "b", "--batch-size", "3", "--workers", "0",
                                "--no-amp"])
    # classes 0 to 4 score best: of the labels 0 to 7 one is first, five are among five
    assert pretrain.validate(Scores(), Val(), args, torch.device("cpu")) == dict(
        top1=1 / 8, top5=5 / 8)


@pytest.mark.parametrize("spoil, words", [
    (lambda root: None, "train needs a folder of images for each class"),
    (lambda root: [(root / split / "a").mkdir(parents=True) for split in ("train", "val")],
     "train needs a folder of images for each class"),
    (lambda root: [save(root / "train/a/1.png"), save(root / "val/b/1.png")],
     "train and .*val have different classes"),
    (lambda root: [save(root / "train/a/1.png"), save(root / "val/a/1.png")],
     "1 images cannot fill --batch-size 8: lower it"),
], ids=["no folder", "no image", "other classes", "too few"])
def test_bad_folders_get_one_line(tmp_path, spoil, words):
    spoil(tmp_path)
    with pytest.raises(DataError, match=words):
        pretrained(tmp_path, tmp_path / "run", "--backbone", "resnet_toy")


def save(path):
    path.parent.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(path)
