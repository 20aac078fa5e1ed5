"""The drawings of extras/: what they show is what the code does; figures of one's own run."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import drawings
import evaluate
import figures
import make_pseudo
import train_cls
import train_seg
from conftest import in_process
from data import Folder
from datasets import beetles
from support import run
from support.run import DataError

TINY = ("--workers", "0", "--batch-size", "4")


def texts(figure):
    """Every text and title of a figure."""
    return [text.get_text() for axis in figure.axes for text in [*axis.texts, axis.title]]


def drawn(*words):
    return drawings.parse_args([str(word) for word in words])


# --- 1: the architecture -----------------------------------------------------------------------

def test_shapes_of_the_toy_by_hand():
    shapes = drawings.shapes_of("toy", 9, beetles.toy_scene(0, 0)[0])
    grid = (1, 12, 12)  # 96 pixels in patches of 8; width 128, so D/4 is 32 for each direction
    assert shapes == {
        "image": (3, 96, 96), "patch_tokens": (*grid, 128), "class_attention": (*grid, 9),
        "enhance": (*grid, 128), "into enhance_proj": (*grid, 256), "enhance_proj": (*grid, 128),
        "rows": (12, 12, 64), "into rows": (12, 12, 128), "columns": (12, 12, 64),
        "into columns": (12, 12, 128), "proj": (*grid, 128), "into proj": (*grid, 128),
        "fuse": (*grid, 128), "Y": (*grid, 9), "scores": (1, 9), "loss": (),
        "large image": (3, 96, 96), "large Y": (*grid, 9), "maps": (3, 12, 12),
        "probs": (3, 96, 96), "bpm": (96, 96), "pseudo": (96, 96)}


def test_the_architecture_shows_the_shapes_of_both_presets(monkeypatch):
    shapes = drawings.shapes_of("toy", 9, beetles.toy_scene(0, 0)[0])
    other = {name: tuple(side if side == 1 else side + 1000 for side in shape)
             for name, shape in shapes.items()}
    asked = []

    def shapes_of(preset, num_classes, image):
        asked.append((preset, num_classes, image.shape))
        return {"toy": shapes, "voc": other}[preset]

    monkeypatch.setattr(drawings, "shapes_of", shapes_of)
    shown = texts(drawings.draw_architecture(drawn("architecture")))
    assert asked == [("toy", 9, (96, 96, 3)), ("voc", 21, (375, 500, 3))]
    for words in ("12 × 12 × 128", "12 × 12 × 64", "12 × 12 × 256", "3 × 96 × 96", "96 × 96", "9",
                  "1012 × 1012 × 1128", "1003 × 1096 × 1096", "1009", "1 number"):
        assert words in shown
    assert any("training at 1096 pixels, masks at 1096" in text for text in shown)


# --- 2: the pipeline ---------------------------------------------------------------------------

def test_the_stages_open_the_images_and_masks_that_the_arrows_show(toy, tmp_path, monkeypatch):
    opened, decode = set(), data.decode

    def noting(path):
        opened.add((path.parent.name, path.stem.split("_")[0]))
        return decode(path)

    monkeypatch.setattr(data, "decode", noting)
    for stage, words in (
            (train_cls, ("--epochs", "1", *TINY)), (make_pseudo, TINY),
            (train_seg, ("--iterations", "2", "--val-images", "2", *TINY)),
            (evaluate, ("--workers", "0"))):
        opened.clear()
        in_process(stage, "--data", toy, "--run", tmp_path, *words)
        name = stage.__name__
        assert any(folder == "JPEGImages" for folder, _ in opened)
        assert "JPEGImages" in drawings.FLOW[name][1]
        truth = {split for folder, split in opened if folder == "SegmentationClass"}
        assert bool(truth) == (name in drawings.SCORING)
        assert name != "train_seg" or truth == {"val"}  # its training masks are those of pseudo/
        assert (("pseudo", "train") in opened) == (name in ("make_pseudo", "train_seg", "evaluate"))
        for file in drawings.FLOW[name][2].split():
            assert (tmp_path / file).exists()
    shown = "\n".join(texts(drawings.draw_pipeline(drawn("pipeline"))))
    assert all(f"{stage}.py" in shown and files in shown
               for stage, (_, _, files) in drawings.FLOW.items())


# --- 3: a beetle -------------------------------------------------------------------------------

def test_the_beetles_are_of_their_class_alone_and_whole():
    scenes = drawings.lone_beetles()
    assert set(scenes) == set(beetles.TOY_CLASSES[1:])
    for name, (image, mask, parts) in scenes.items():
        assert set(np.unique(mask)) == {0, beetles.TOY_CLASSES.index(name)}
        assert not np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()
        colour = image[parts == 2].mean(0)
        assert np.abs(colour - beetles.HEADS[name.split("_")[1]]).max() < 31


def test_the_fullest_patch_by_loops():
    where = np.random.default_rng(0).random((24, 32)) < 0.5
    counts = {(y, x): where[8 * y:8 * y + 8, 8 * x:8 * x + 8].sum()
              for y in range(3) for x in range(4)}
    row, column = drawings.fullest_patch(where)
    assert counts[row, column] == max(counts.values())


# --- 5: the cross ------------------------------------------------------------------------------

def test_reach_is_the_cross_the_sequence_and_a_window():
    rows, columns = np.mgrid[:9, :9]
    row, column = 3, 4
    assert np.array_equal(drawings.reach("hv", 9) > 0, (rows == row) | (columns == column))
    assert (drawings.reach("raster", 9) > 0).all()
    window = (abs(rows - row) <= 3) & (abs(columns - column) <= 3)
    assert np.array_equal(drawings.reach("conv", 9) > 0, window)


# --- 4, 6, 7: one image ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """The run folder of two epochs, and the files that were kept of them."""
    home = tmp_path_factory.mktemp("drawn")
    flags = ("--data", toy, "--run", home, "--cls-flags", f"--epochs 2 {' '.join(TINY)}")
    return home, drawings.kept_epochs(drawn("epochs", *flags)), flags


def test_a_copy_of_every_epoch_is_kept(toy, trained, tmp_path):
    home, files, flags = trained
    assert [run.load_checkpoint(path, "cls")["epoch"] for path in files.values()] == [1, 2]
    assert files[2].read_bytes() == (home / "cls.pt").read_bytes()
    assert drawings.kept_epochs(drawn("epochs", *flags)) == files  # nothing is trained again
    shutil.copy(home / "cls.pt", tmp_path)
    with pytest.raises(DataError, match="without keeping its epochs: choose another --run"):
        drawings.kept_epochs(drawn("epochs", *flags, "--run", tmp_path))


def test_the_epochs_are_scored_as_stage_4_scores(toy, trained, tmp_path):
    home, files, flags = trained
    scene = drawings.Scene(drawn("epochs", *flags))
    shutil.copy(files[1], tmp_path / "cls.pt")
    in_process(make_pseudo, "--data", toy, "--run", tmp_path, "--split", "val", *TINY)
    confusion = evaluate.confusion_of(scene.folder, scene.id, tmp_path / "bpm")
    shown = texts(drawings.draw_epochs(drawn("epochs", *flags)))
    assert f"epoch 1\nIoU {100 * evaluate.miou(confusion):.0f} %" in shown
    assert sum(text.startswith("epoch") for text in shown) == 2


def test_the_image_is_the_first_with_two_classes_or_the_one_asked_for(toy):
    folder = Folder(toy)
    words = ["crf", "--data", toy, "--split", "train"]
    first = next(i for i in folder.ids("train") if folder.image_labels(i)[1:].sum() == 2)
    scene = drawings.Scene(drawn(*words))
    assert scene.id == first and (scene.truth == scene.label).any()
    assert drawings.Scene(drawn(*words, "--image", "train_00003")).id == "train_00003"


def test_the_largest_k_patches_are_framed(toy, trained, tmp_path):
    home, _, flags = trained
    words = ["top-k", *flags, "--runs", tmp_path]
    with pytest.raises(DataError, match="extras/ablate.py top-k --data .* --seeds 0"):
        drawings.draw_top_k(drawn(*words))
    checkpoint = torch.load(home / "cls.pt", weights_only=True)
    for folder, pool, top_k in (("pool_max", "max", 12), ("top-k_6", "topk", 6),
                                ("default", "topk", 12), ("pool_avg", "avg", 12)):
        path = tmp_path / toy.name / folder / "s0/cls.pt"
        path.parent.mkdir(parents=True)
        torch.save(checkpoint | dict(args=checkpoint["args"] | dict(pool=pool, top_k=top_k)), path)
    figure = drawings.draw_top_k(drawn(*words))
    panels = {axis.title.get_text(): axis for axis in figure.axes}
    for K, title in ((1, "K = 1"), (6, "K = 6"), (12, "K = 12"), (144, "K = 144 (all)")):
        values = panels[title].images[0].get_array()
        inside = [values[int(frame.get_y() + 0.5), int(frame.get_x() + 0.5)]
                  for frame in panels[title].patches]
        np.testing.assert_allclose(sorted(inside), np.sort(values.ravel())[-K:])


def test_without_iterations_the_crf_leaves_the_bpm(toy, trained, tmp_path):
    home, _, flags = trained
    shutil.copy(home / "cls.pt", tmp_path)
    in_process(make_pseudo, "--data", toy, "--run", tmp_path, "--split", "val", *TINY)
    scene = drawings.Scene(drawn("crf", *flags))
    figure = drawings.draw_crf(drawn("crf", *flags))
    masks = [axis.images[0].get_array() for axis in figure.axes
             if axis.get_title().startswith("IoU")]
    for mask, folder in ((masks[0], "bpm"), (masks[3], "pseudo")):
        expected = data.read_mask(tmp_path / folder / f"{scene.id}.png", 9)
        assert (mask == data.voc_palette()[expected]).all(-1).mean() > 0.999


def test_every_drawing_is_a_picture(toy, trained, tmp_path, monkeypatch):
    shapes = drawings.shapes_of("toy", 9, beetles.toy_scene(0, 0)[0])
    monkeypatch.setattr(drawings, "shapes_of", lambda *_: shapes)
    monkeypatch.setattr(drawings, "DPI", 50)
    monkeypatch.setattr(drawings, "run_of_top_k", lambda *_: trained[0] / "cls.pt")
    drawings.main(drawn("all", *trained[2], "--out", tmp_path))
    assert {path.stem for path in tmp_path.iterdir()} == set(drawings.DRAWINGS)
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert picture.mode == "P" and picture.width > 350
            assert len(picture.convert("RGB").getcolors()) > 20


# --- extras/figures.py run ---------------------------------------------------------------------

LOG = [dict(stage="train_cls", epoch=1, loss=0.9, val_map=0.1),
       dict(stage="train_cls", epoch=2, loss=0.8, val_map=0.2),
       dict(stage="train_cls", epoch=3, loss=0.7, val_map=0.3),
       dict(stage="make_pseudo", masks="BPM", miou=0.5),
       dict(stage="train_cls", epoch=1, loss=0.6, val_map=None),
       dict(stage="train_cls", epoch=2, loss=0.5, val_map=0.4)]


def test_only_the_last_training_is_drawn(tmp_path):
    with pytest.raises(DataError, match="log.jsonl not found: run train_cls.py first"):
        figures.of_stage(tmp_path, "train_cls", "epoch")
    run.write_lines(tmp_path / "log.jsonl", map(json.dumps, LOG[:4]))
    assert [line["loss"] for line in figures.of_stage(tmp_path, "train_cls", "epoch").values()] == [
        0.9, 0.8, 0.7]
    run.write_lines(tmp_path / "log.jsonl", map(json.dumps, LOG))
    found = figures.of_stage(tmp_path, "train_cls", "epoch")
    assert {epoch: line["loss"] for epoch, line in found.items()} == {1: 0.6, 2: 0.5}
    run.write_lines(tmp_path / "log.jsonl", map(json.dumps, LOG[3:4]))
    with pytest.raises(DataError, match="log.jsonl has no line of a training"):
        figures.draw_run(tmp_path)


def test_ones_own_run(tmp_path, monkeypatch, capsys):
    pictures, save = {}, figures.save

    def keep(figure, path):
        pictures[path.name] = texts(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
    run.write_lines(tmp_path / "log.jsonl", map(json.dumps, LOG))
    arguments = figures.parse_args(["run", "--run", str(tmp_path)])
    figures.main(arguments)
    assert list(pictures) == ["curves.png"] and "run evaluate.py" in capsys.readouterr().out
    confusion = np.array([[90, 10, 0, 0], [15, 45, 0, 0], [0, 0, 0, 0]])
    iou = evaluate.iou_per_class(confusion)
    results = dict(iou={"background": iou[0], "beetle": iou[1], "never": None}, split="test",
                   miou=evaluate.miou(confusion), num_images=7, confusion=confusion.tolist(),
                   checkpoint="a/seg.pt", crf=False)
    run.write_lines(tmp_path / "results.json", [json.dumps(results)])
    figures.main(arguments)
    assert {"90", "10", "25", "75"} < set(pictures["confusion.png"])
    assert {"78.3", "64.3"} < set(pictures["classes.png"])  # 90 / 115 and 45 / 70
    assert any("a/seg.pt on test, 7 images, CRF: no" in text for text in pictures["classes.png"])
    for name in ("curves.png", "classes.png", "confusion.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("RGB").getcolors()) > 20
    for words in (["run"], []):
        with pytest.raises(SystemExit):
            figures.parse_args(words)
