"""extras/figures.py: what the figures show is what the runs and the code hold."""
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import figures
from conftest import call, command, in_process
from data import Folder
from datasets.beetles import TOY_CLASSES
from extras.cpews import train as cpews
from support.files import UserError, write_lines
from support.masks import decode, read_mask, voc_palette
from test_extras import calls, run_study  # noqa: F401  a fixture


@pytest.fixture
def drawn(monkeypatch):
    """drawn("run", "--run", ...) draws; {file name: the figure}, all of which are pictures."""
    kept, save = {}, figures.save

    def keep(figure, path, dpi=80):
        kept[path.name] = figure
        save(figure, path, dpi)
        with Image.open(path) as picture:
            assert picture.mode == "P" and min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(10**6)) > 20

    def draw(*words):
        figures.main(figures.parse_args([str(word) for word in words]))
        return kept

    monkeypatch.setattr(figures, "save", keep)
    return draw


def texts(figure):
    """Every text and title of a figure."""
    return [text.get_text() for axis in figure.axes for text in [*axis.texts, axis.title]]


# --- who sees which labels ---------------------------------------------------------------------

def test_the_stages_open_the_images_and_masks_that_the_table_shows(place, monkeypatch, drawn):
    opened, original = set(), decode

    def noting(path):
        opened.add((path.parent.name, path.stem.split("_")[0]))
        return original(path)

    monkeypatch.setattr("support.masks.decode", noting)
    shutil.rmtree("run/pred")
    for line, (name, images, _, masks, files) in zip(
            ("cls --overwrite", "pseudo --overwrite", "seg --overwrite", "eval"), figures.SEES):
        opened.clear()
        call(line)
        assert command(line)[0].name in name
        seen = {folder: {split for where, split in opened if where == folder}
                for folder in ("JPEGImages", "SegmentationClass", "pseudo")}
        figure_too = {"train"} if line == "eval" else set()  # figure.png is of training images
        for folder, splits in (("JPEGImages", images), ("SegmentationClass", masks)):
            assert {split for split in ("train", "val", "test") if split in splits} == \
                seen[folder] - figure_too
        assert "seg" not in line or seen["pseudo"] == {"train"}
        assert all(Path("run", file).exists() for file in files.split())
    figure = drawn("pipeline", "--out", place)["pipeline.png"]
    shown = [cell.get_text().get_text() for cell in figure.axes[0].tables[0].get_celld().values()]
    assert {row[0] for row in figures.SEES} <= {*shown}
    assert "val: chooses\nby mIoU" in shown and "val: chooses\nby mAP" in shown


# --- one's own run -----------------------------------------------------------------------------

LOG = [dict(stage="train_cls", epoch=1, loss=0.9, val_map=0.1),
       dict(stage="train_cls", epoch=2, loss=0.8, val_map=0.2),
       dict(stage="make_pseudo", masks="BPM", miou=0.5),
       dict(stage="train_cls", epoch=1, loss=0.6, val_map=None),
       dict(stage="train_cls", epoch=2, loss=0.5, val_map=0.4)]


def test_ones_own_run_and_of_it_the_last_training(tmp_path, capsys, drawn):
    with pytest.raises(UserError, match="log.jsonl not found: run train_cls.py first"):
        drawn("run", "--run", tmp_path)
    write_lines(tmp_path / "log.jsonl", map(json.dumps, LOG[2:3]))
    with pytest.raises(UserError, match="log.jsonl has no line of a training"):
        drawn("run", "--run", tmp_path)
    for lines, expected in ((LOG[:3], {1: 0.9, 2: 0.8}), (LOG, {1: 0.6, 2: 0.5})):
        write_lines(tmp_path / "log.jsonl", map(json.dumps, lines))
        found = figures.of_stage(tmp_path, "train_cls", "epoch")
        assert {epoch: line["loss"] for epoch, line in found.items()} == expected
    assert list(drawn("run", "--run", tmp_path)) == ["curves.png"]
    assert "run evaluate.py" in capsys.readouterr().out
    confusion = np.array([[90, 10, 0, 0], [15, 45, 0, 0], [0, 0, 0, 0]])
    iou = evaluate.iou_per_class(confusion)
    results = dict(iou={"background": iou[0], "beetle": iou[1], "never": None}, split="test",
                   miou=evaluate.miou(confusion), num_images=7, confusion=confusion.tolist(),
                   checkpoint="a/seg.pt", crf=False)
    write_lines(tmp_path / "results.json", [json.dumps(results)])
    pictures = drawn("run", "--run", tmp_path)
    assert {"90", "10", "25", "75"} < set(texts(pictures["confusion.png"]))
    assert {"78.3", "64.3"} < set(texts(pictures["classes.png"]))  # 90 / 115 and 45 / 70
    assert "a/seg.pt on test, 7 images, CRF: no" in texts(pictures["classes.png"])


@pytest.mark.parametrize("words, told", [
    (["run"], "--run is needed for run"), ([], "--data is needed for table4"),
    (["fig8"], "invalid choice: 'fig8'"), (["crf", "--data", "x"], "--run is needed for crf")])
def test_what_a_figure_needs_is_named(words, told, capsys):
    with pytest.raises(SystemExit):
        figures.parse_args(words)
    assert told in capsys.readouterr().err


# --- Table 4 -----------------------------------------------------------------------------------

def test_figures_of_a_tiny_table_4(toy, tmp_path, calls, drawn):  # noqa: F811
    where = ["--data", str(toy), "--runs", str(tmp_path)]
    with pytest.raises(UserError, match="study.py table4"):
        drawn(*where)
    home = run_study(toy, tmp_path, "table4", "--seeds", "0", "1")
    run_study(toy, tmp_path, "table4", "--seeds", "0", "--split", "test")  # val's stay val's
    pictures = drawn(*where)
    assert set(pictures) == {"fig6.png", "fig7.png", "curves.png", "context.png"}
    legend = pictures["fig7.png"].axes[0].get_legend().get_texts()
    scores = [json.loads((home / f"default/s{k}/scores-val.json").read_text()) for k in (0, 1)]
    mean = np.mean([seed["results"]["pseudo"]["miou"] for seed in scores])
    assert legend[1].get_text() == f"ours, mIoU {100 * mean:.1f} (n = 2)"
    folder = Folder(toy)
    means = figures.ranked(folder, folder.ids("val"), home / "default/s0/bpm")
    assert len(means) == 8 and list(means.values()) == sorted(means.values())
    image_id, iou = list(means.items())[-1]
    confusion, _ = evaluate.score_masks(folder, [image_id], home / "default/s0/bpm")
    assert iou == evaluate.miou(confusion)  # the mean over the classes of that image


# --- photographs, one image --------------------------------------------------------------------

def test_photographs_that_may_be_shown_are_drawn_stage_by_stage(place, monkeypatch, drawn):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="pip install scikit-image"):
        drawn("shown", "--run", "run")
    random = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    photographs = types.SimpleNamespace(chelsea=lambda: random, camera=lambda: random[..., 0])
    monkeypatch.setitem(sys.modules, "skimage", types.SimpleNamespace(data=photographs))
    with pytest.raises(UserError, match="knows none of"):
        drawn("shown", "--run", "run")
    monkeypatch.setattr(figures, "SHOWN", dict(zip(("chelsea", "camera"), TOY_CLASSES[1:])))
    assert len(drawn("shown", "--run", "run")["shown.png"].axes) == 2 * 4


def test_the_largest_k_patches_are_framed(place, drawn):
    words = ["top-k", "--data", "data", "--runs", ".", "--out", "."]
    with pytest.raises(UserError, match="extras/study.py top-k --data .* --seeds 0"):
        drawn(*words)
    for folder in ("pool_max", "top-k_6", "top-k_12", "pool_avg"):
        Path("data", folder, "s0").mkdir(parents=True)
        shutil.copy("run/cls.pt", f"data/{folder}/s0")
    axes = {axis.title.get_text(): axis for axis in drawn(*words)["top-k.png"].axes}
    for K, title in ((1, "K = 1"), (6, "K = 6"), (12, "K = 12"), (36, "K = 36 (all)")):
        values = axes[title].images[0].get_array()
        inside = [values[int(frame.get_y() + 0.5), int(frame.get_x() + 0.5)]
                  for frame in axes[title].patches]
        np.testing.assert_allclose(sorted(inside), np.sort(values.ravel())[-K:])


def test_the_crf_begins_with_the_bpm_and_ends_with_the_pseudo_mask(place, drawn):
    call("pseudo --overwrite --crf-iterations 10")
    words = "crf --data data --run run --out . --split train".split()
    _, image_id, _ = figures.chosen_image(figures.parse_args(words))
    masks = [axis.images[0].get_array() for axis in drawn(*words)["crf.png"].axes
             if "IoU" in axis.get_title()]
    for mask, folder in ((masks[0], "bpm"), (masks[3], "pseudo")):
        expected = read_mask(f"run/{folder}/{image_id}.png", 9)
        assert (mask == voc_palette()[expected]).all(-1).mean() > 0.999


def test_the_masks_of_cpews_are_those_that_it_writes(toy, tmp_path, drawn):
    words = ["--data", toy, "--run", tmp_path, "--workers", "0"]
    in_process(cpews, *words, "--warm-up", "2", "--iterations", "2", "--batch-size", "4",
               "--val-split", "none")
    in_process(cpews, *words, "--predict", "val")
    figure = drawn("cpews", *words[:4])["maps.png"]
    columns = [axis.title.get_text() for axis in figure.axes[:7]]
    assert columns[1].startswith("last layer:") and columns[2].startswith("block 3:")
    assert [title.split(",")[0] for title in columns[3:]] == ["cam", "pseudo", "pred",
                                                             "ground truth"]
    for number, folder in enumerate(("cam", "pseudo", "pred"), start=3):
        mask = read_mask(tmp_path / folder / f"{columns[0]}.png", 9)
        assert np.array_equal(figure.axes[number].images[0].get_array(), voc_palette()[mask])
    assert drawn("run", "--run", tmp_path)["curves.png"].axes[0].get_title() == "cpews: loss"
