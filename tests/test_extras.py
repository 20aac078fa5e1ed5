"""The studies and figures of extras/: known answers, and a tiny study as a person runs it."""
import csv
import json
import math
import os
import shlex
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import data
import evaluate
import figures
import gpu
import make_pseudo
import patch_grid
import study
import train_cls
import train_seg
from conftest import in_process
from extras.cpews import train as cpews
from model import CPFCTE, ClassifierConfig, DeepLabv2, SegmenterConfig
from support import run
from support.run import DataError

MODULES = {"train_cls.py": train_cls, "make_pseudo.py": make_pseudo, "train_seg.py": train_seg,
           "evaluate.py": evaluate, "extras/cpews/train.py": cpews}


@pytest.fixture
def calls(monkeypatch):
    """Run the driver's commands in this process, and note which."""
    made = []

    def call(args, run, script, *flags):
        made.append((script, run.name))
        in_process(MODULES[script], "--data", args.data, "--run", run, "--workers", "0", *flags,
                   *shlex.split(args.flags))

    monkeypatch.setattr(study, "call", call)
    return made


def run_study(toy, out, *words):
    args = study.parse_args([*words, "--data", str(toy), "--out", str(out),
                              "--cls-flags", "--epochs 1 --batch-size 4"])
    study.main(args)
    return out / toy.name


# --- the driver --------------------------------------------------------------------------------

def test_table_by_hand():
    rows = [("first", 65.2, "", ""), ("second", "-", "--x", "")]
    scores = [[{"BPM": 10.0, "CRF": 20.0}, {"BPM": 14.0, "CRF": 20.0}, {"BPM": 12.0, "CRF": 20.0}],
              [{"BPM": 15.0, "CRF": 21.0}, {"BPM": 17.0, "CRF": 23.0}, {"BPM": 19.0, "CRF": 22.0}]]
    lines = study.tables(rows, [[seed | {"body found": 7.0} for seed in row] for row in scores])
    assert [cell.strip() for cell in lines[0].split("|")[4:-1]] == [
        "BPM", "sd", "CRF", "sd", "gain in BPM", "95 % interval"]
    assert lines[2] == "| first | 65.2 | 3 | 12.0 | 2.0 | 20.0 | 0.0 |  |  |"
    # differences 5, 3, 7: mean 5, deviation 2, Student's t of 2 degrees of freedom 4.303
    half = 4.303 * 2 / math.sqrt(3)
    interval = f"{5 - half:+.1f} to {5 + half:+.1f}"
    assert lines[3] == f"| second | - | 3 | 17.0 | 2.0 | 22.0 | 1.0 | +5.0 | {interval} |"
    assert {line.count("|") for line in lines[:4]} == {10}
    assert lines[4:9] == ["", "| variant | body found | sd |", "|---|---|---|",
                          "| first | 7.0 | 0.0 |", "| second | 7.0 | 0.0 |"]
    # differences 1, 3, 2: mean 2, deviation 1
    crf = f"{2 - half / 2:+.1f} to {2 + half / 2:+.1f}"
    assert lines[9:] == [
        "", "| difference | " + " | 95 % interval | ".join(["BPM", "CRF", "body found", ""])[:-1],
        "|---|---|---|---|---|---|---|",
        f"| second against first | +5.0 | {interval} | +2.0 | {crf} |  |  |"]
    one = study.tables(rows, [scores[0][:1], scores[1][:1]])
    assert one[3:5] == ["| second | - | 1 | 15.0 |  | 21.0 |  | +5.0 |  |", ""]
    assert one[7:] == ["| second against first | +5.0 |  | +1.0 |  |"]
    third = study.pairs([*rows, ("third",)], [*scores, scores[0]], ["BPM"])
    assert [line.split(" | ")[:2] for line in third[2:]] == [
        ["| second against first", "+5.0"], ["| third against first", ""],
        ["| third against second", "-5.0"]]
    full = [[seed | {"DeepLabv2": 3 * seed["CRF"]} for seed in row] for row in scores]
    assert study.tables(rows, full)[3].endswith("66.0 | 3.0 | +6.0 | -1.4 to +13.4 |")


def test_what_masks_find_where_a_data_set_has_no_parts():
    """Found: 6 of 8 and 1 of 2 pixels of the two classes; of background's 10, 3 are not 0."""
    confusion = [[7, 2, 0, 1], [1, 6, 0, 1], [0, 1, 1, 0]]
    assert study.columns_of({"confusion": confusion}, "x: ") == pytest.approx(
        {"x: object found": 70, "x: background called object": 30})
    with_parts = study.columns_of({"confusion": confusion, "part_recall": {"head": 0.5}}, "")
    assert with_parts == pytest.approx({"head found": 50, "background called object": 30})


def test_tables_4_and_5_are_the_papers():
    paper = {row[0]: row[1] for row in study.STUDIES["table4"] + study.STUDIES["table5"]}
    assert list(paper.values()) == [65.2, 67.1, 67.8, 69.5, 67.7, 68.1, 69.5]
    where = ["--data", "x", "--run", "y", "--preset", "toy"]
    for name, rows in study.STUDIES.items():
        for _, _, flags, mask_flags in rows:  # every variant is made of flags that exist
            if flags.startswith("cpews"):
                cpews.parse_args(where + flags.split()[1:])
                cpews.parse_args([*where, "--predict", "val", *mask_flags.split()])
            else:
                train_cls.parse_args(where + flags.split())
                make_pseudo.parse_args(where + mask_flags.split())
        assert len({row[2:] for row in rows}) == len(rows), f"{name} has a row twice"


def test_a_study_runs_what_is_missing_and_nothing_twice(toy, tmp_path, calls, capsys):
    home = run_study(toy, tmp_path, "max-norm", "--seeds", "0")
    assert [script for script, _ in calls].count("train_cls.py") == 2  # the second finds it done
    lines = (home / "max-norm-val.md").read_text().splitlines()
    assert len(lines) == 13 and lines[2].startswith("| with | - | 1 |")
    scores = json.loads((home / "default/s0/scores-val.json").read_text())["scores"]
    results = json.loads((home / "default/s0/bpm/results.json").read_text())
    assert scores["BPM"] == pytest.approx(100 * results["miou"])
    assert scores["head found"] == pytest.approx(100 * results["part_recall"]["head"])
    confusion = np.array(results["confusion"])
    assert scores["background called object"] == pytest.approx(
        100 * confusion[0, 1:].sum() / confusion[0].sum())
    assert (home / "default/s0/no-max-norm/cls.pt").resolve() == home / "default/s0/cls.pt"
    calls.clear()
    run_study(toy, tmp_path, "max-norm", "--seeds", "0")
    assert not calls and "| without | - | 1 |" in capsys.readouterr().out
    run_study(toy, tmp_path, "max-norm", "--seeds", "0", "1")
    assert {run for _, run in calls} == {"s1", "no-max-norm"}
    assert "| without | - | 2 |" in (home / "max-norm-val.md").read_text()
    with pytest.raises(DataError, match="other data or flags: choose another --out"):
        study.main(study.parse_args(["max-norm", "--data", str(toy), "--out", str(tmp_path)]))


def test_full_trains_and_scores_deeplab(toy, tmp_path, calls):
    seg = "--iterations 2 --batch-size 4 --val-images 2"
    run_study(toy, tmp_path, "max-norm", "--seeds", "0")  # masks first: they ask for no --seg-flags
    home = run_study(toy, tmp_path, "max-norm", "--seeds", "0", "--full", "--seg-flags", seg)
    assert [name for name, _ in calls].count("train_seg.py") == 2
    assert (home / "max-norm-val-full.md").is_file()
    scores = json.loads((home / "default/s0/scores-val.json").read_text())["scores"]
    results = json.loads((home / "default/s0/results.json").read_text())
    assert results["split"] == "val" and scores["DeepLabv2"] == 100 * results["miou"]
    assert scores["DeepLabv2: head found"] == 100 * results["part_recall"]["head"]
    calls.clear()
    run_study(toy, tmp_path, "max-norm", "--seeds", "0", "--seg-flags", seg)  # the same runs
    assert not calls
    with pytest.raises(DataError, match="other data or flags"):
        run_study(toy, tmp_path, "max-norm", "--seeds", "0", "--full", "--seg-flags", "--iterations 3")


def test_a_study_of_cpews_scores_maps_labels_and_decoder(toy, tmp_path, calls):
    flags = "--warm-up 1 --iterations 1 --batch-size 2 --val-split none --seg-from 0"
    seg = "--iterations 1 --batch-size 2 --val-split none"
    study.main(study.parse_args([
        "cpews2", "--data", str(toy), "--out", str(tmp_path), "--seeds", "0", "--full",
        "--cpews-flags", flags, "--seg-flags", seg]))
    home = tmp_path / toy.name
    assert [name for name, _ in calls].count("extras/cpews/train.py") == 6  # train, val, train; twice
    with_crf, without = home / "cpews/s0/crf", home / "cpews/s0"
    assert (with_crf / "cpews.pt").resolve() == without / "cpews.pt"
    for run_folder, crf in ((without, False), (with_crf, True)):
        scores = json.loads((run_folder / "scores-val.json").read_text())["scores"]
        for name in ("cam", "pseudo", "pred"):
            results = json.loads((run_folder / name / "results.json").read_text())
            assert scores[name] == 100 * results["miou"] and results["split"] == "val"
        assert results["crf"] is crf and scores["pred: head found"] == pytest.approx(
            100 * results["part_recall"]["head"])
        results = json.loads((run_folder / "deeplab/results.json").read_text())
        assert scores["DeepLabv2"] == 100 * results["miou"]
        assert "cam: background called object" in scores
    lines = (home / "cpews2-val-full.md").read_text().splitlines()
    assert lines[0].startswith("| variant | paper (decoder, VOC) | seeds | cam | sd | pseudo |")
    assert lines[3].startswith("| decoder, CRF | 72.6 test | 1 |")


def test_a_study_from_another_folder_passes_its_flags_on(toy, tmp_path, calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(study.STUDIES, "one", [("max pooling", 68.1, "--pool max", "")])
    study.main(study.parse_args([
        "one", "--seeds", "3", "--data", os.path.relpath(toy), "--method", "ours", "--tokens",
        "kept", "--cls-flags=--epochs 1 --augment --train-blocks 0",
        "--flags=--preset toy --no-amp"]))
    assert (tmp_path / "kept").stat().st_size > 2 * 32 * 145 * 128  # of train and val
    assert [script for script, _ in calls] == ["train_cls.py", "make_pseudo.py",
                                               "evaluate.py", "evaluate.py"]
    checkpoint = torch.load(tmp_path / "runs/ablate/toy/pool_max/s3/cls.pt", weights_only=True)
    args = checkpoint["args"]
    assert (args["pool"], args["seed"], args["epochs"], args["amp"]) == ("max", 3, 1, False)
    assert "| max pooling | 68.1 | 1 |" in (tmp_path / "runs/ablate/toy/one-val.md").read_text()
    raw = list(csv.DictReader((tmp_path / "runs/ablate/toy/one-val.csv").open()))
    bpm = json.loads((tmp_path / "runs/ablate/toy/pool_max/s3/scores-val.json").read_text())
    assert {row["metric"] for row in raw} >= {"BPM", "CRF", "val mAP", "body found"}
    assert raw[0] == dict(data="toy", method="ours", variant="max pooling", split="val", seed="3",
                          metric="BPM", value=f"{bpm['scores']['BPM']:.2f}")


def test_a_command_keeps_its_output_and_a_failing_one_is_named(toy, tmp_path):
    args = study.parse_args(["table4", "--data", str(toy), "--flags=--workers 0"])
    truth = ("--masks", toy / "SegmentationClass", "--split")
    study.call(args, tmp_path, "evaluate.py", *truth, "val")
    output = (tmp_path / "out.txt").read_text()
    assert "--split val --workers 0" in output and "mIoU 100.00 %" in output
    with pytest.raises(DataError, match="evaluate.py ended with code 1 .*none.txt not found"):
        study.call(args, tmp_path, "evaluate.py", *truth, "none")


# --- figures -----------------------------------------------------------------------------------

def test_figures_of_a_tiny_table_4(toy, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(figures, "PROBE_IMAGES", 8)
    where = ["--data", str(toy), "--runs", str(tmp_path), "--workers", "0"]
    with pytest.raises(DataError, match="study.py table4"):
        figures.main(figures.parse_args(where))
    home = run_study(toy, tmp_path, "table4", "--seeds", "0", "1")
    run_study(toy, tmp_path, "table4", "--seeds", "0", "--split", "test")  # val's figures stay val's
    figures.main(figures.parse_args(where))
    for name in ("fig6", "fig7", "curves", "context"):
        with Image.open(home / f"{name}.png") as picture:
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 20
    args = figures.parse_args([*where, "--masks", "bpm"])
    folder = data.Folder(toy)
    means = figures.ranked(args, folder, home / "default/s0", folder.ids("val"))
    assert len(means) == 8 and list(means.values()) == sorted(means.values())
    image_id, iou = list(means.items())[-1]
    truth = np.array(Image.open(toy / "SegmentationClass" / f"{image_id}.png"))
    guess = np.array(Image.open(home / "default/s0/bpm" / f"{image_id}.png"))
    by_hand = [((truth == c) & (guess == c)).sum() /
               ((truth == c) | ((guess == c) & (truth != 255))).sum()
               for c in set(truth.ravel().tolist()) - {255}]
    assert iou == pytest.approx(np.mean(by_hand))


def test_photographs_that_may_be_shown_are_drawn_stage_by_stage(toy, tmp_path, monkeypatch):
    folder = data.Folder(toy)
    content = dict(classes=folder.classes, ids=[], labels=[], optimizer={}, epoch=1, step=1)
    words = ["--data", str(toy), "--run", str(tmp_path)]
    for kind, stage, network in (
            ("cls", train_cls, CPFCTE(ClassifierConfig(9, "vit_toy"))),
            ("seg", train_seg, DeepLabv2(SegmenterConfig(9, "resnet_toy", (1,), (1.0,))))):
        run.save_checkpoint(tmp_path / f"{kind}.pt", kind, network, stage.parse_args(words),
                            **content)
    draw = figures.parse_args(["shown", "--run", str(tmp_path)])
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(DataError, match="pip install scikit-image"):
        figures.main(draw)
    random = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    photographs = types.SimpleNamespace(chelsea=lambda: random, camera=lambda: random[..., 0])
    monkeypatch.setitem(sys.modules, "skimage", types.SimpleNamespace(data=photographs))
    with pytest.raises(DataError, match="knows none of"):
        figures.main(draw)
    monkeypatch.setattr(figures, "SHOWN", dict(zip(("chelsea", "camera"), folder.classes[1:])))
    figures.main(draw)
    with Image.open(tmp_path / "shown.png") as picture:
        assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(10**6)) > 20


# --- the patch-grid bound ----------------------------------------------------------------------

def through_grid(mask, side, shares):
    return make_pseudo.pseudo_masks(mask, *patch_grid.on_grid(mask, side, shares), None)[0]


def test_a_grid_as_fine_as_the_image_loses_nothing_and_one_patch_almost_all():
    mask = np.random.default_rng(0).choice([0, 1, 5], (8, 8)).astype(np.uint8)
    for shares in (False, True):
        assert np.array_equal(through_grid(mask, 8, shares), mask)
    mask[:] = 0
    mask[:, :3] = 5
    mask[0, 0] = 255
    assert (through_grid(mask, 1, False) == 0).all()  # background covers most of it
    assert (through_grid(np.full((4, 4), 255, np.uint8), 2, True) == 0).all()


def test_bound_by_hand(tmp_path, capsys):
    """Class 1 covers 5 of 6 columns: the grid of 2 moves the border, by labels and by shares."""
    mask = np.ones((6, 6), np.uint8)
    mask[:, 0] = 0
    folder = tmp_path / "one"
    data.save_mask(folder / "SegmentationClass/a.png", mask)
    run.write_lines(folder / "classes.txt", ["background", "thing"])
    run.write_lines(folder / "ImageSets/Segmentation/val.txt", ["a"])
    patch_grid.main(patch_grid.parse_args(["--data", str(folder), "--sides", "2", "6"]))
    # at 2 both patches are class 1, as labels and as shares (2/3 and 1): background is lost
    coarse, output = 100 * (0 + 30 / 36) / 2, capsys.readouterr().out
    assert f"  2 x 2   patches   labels {coarse:5.1f}   shares {coarse:5.1f}" in output
    assert "  6 x 6   patches   labels 100.0   shares 100.0" in output
    mask[:, 1] = 0  # now the left patch is 2/3 background, and a label calls all of it that
    data.save_mask(folder / "SegmentationClass/a.png", mask)
    patch_grid.main(patch_grid.parse_args(["--data", str(folder), "--sides", "2"]))
    labels = 100 * (12 / 18 + 18 / 24) / 2
    # background in the six columns: 1 1 2/3 1/3 0 0 by labels, 2/3 2/3 4/9 2/9 0 0 by shares
    assert f"labels {labels:5.1f}   shares 100.0" in capsys.readouterr().out


def test_a_box_is_split_among_the_classes_of_the_image(tmp_path, capsys):
    truth = np.zeros((10, 20), np.uint8)
    truth[2:8, 4:10] = 1
    truth[2:8, 10:16] = 3
    labels = torch.tensor([1, 1, 0, 1])
    assert np.array_equal(patch_grid.boxed(truth, labels, 0.6), truth)
    assert not patch_grid.boxed(truth, torch.tensor([1, 0, 0, 0]), 0.6).any()
    folder = tmp_path / "one"
    data.save_mask(folder / "SegmentationClass/a.png", truth)
    run.write_lines(folder / "classes.txt", ["background", "a", "b", "c"])
    run.write_lines(folder / "ImageSets/Segmentation/val.txt", ["a"])
    run.write_lines(folder / "image_labels.txt", ["a a c"])
    patch_grid.main(patch_grid.parse_args(["--data", str(folder), "--sides", "10", "--boxes", "0.6",
                                           "0", "--workers", "0"]))
    output = capsys.readouterr().out  # without a box: background's 128 of 200 pixels, nothing else
    assert "box of 0.6 of the sides 100.0" in output
    assert f"box of 0 of the sides {100 * 128 / 200 / 3:5.1f}" in output


def test_the_crf_gives_back_a_border_that_the_grid_moved(tmp_path, capsys):
    """Colours tell the two classes; 5 of 16 columns are background, a grid of 2 makes that 8."""
    mask = np.ones((16, 16), np.uint8)
    mask[:, :5] = 0
    folder = tmp_path / "one"
    data.save_mask(folder / "SegmentationClass/a.png", mask)
    (folder / "JPEGImages").mkdir()
    Image.fromarray(np.where(mask[..., None], 200, np.uint8([[[20, 40, 60]]]))).save(
        folder / "JPEGImages/a.png")
    run.write_lines(folder / "classes.txt", ["background", "thing"])
    run.write_lines(folder / "ImageSets/Segmentation/val.txt", ["a"])
    run.write_lines(folder / "image_labels.txt", ["a thing"])
    flags = ["--data", str(folder), "--workers", "0", "--crf", "torch", "--crf-srgb", "10"]
    patch_grid.main(patch_grid.parse_args([*flags, "--sides", "2"]))
    lines = capsys.readouterr().out.splitlines()[-2:]
    for kind, line in zip(("labels", "shares"), lines):
        assert f"{kind} after the CRF 100.0" in line and "background" in line and "100.0" in line
    # the box of 0.7, 12 x 12, has 36 pixels of background; the colours tell those at its rim
    patch_grid.main(patch_grid.parse_args([*flags, "--sides", "8", "--boxes", "0.7"]))
    line = capsys.readouterr().out.splitlines()[-1]
    box = 100 * (108 / (176 + 36) + 44 / (112 + 36)) / 2
    assert f"a centred box of 0.7 of the sides {box:5.1f}   after the CRF" in line
    assert float(line.split()[-1]) > box + 1


# --- extras/bench.py ---------------------------------------------------------------------------

def test_the_median_leaves_the_first_call_out(monkeypatch):
    clock = iter([0, 0.2, 1, 1.001, 2, 2.003, 3, 3.2])  # 200, 1, 3 and 200 ms: 300 are over
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.milliseconds(torch.device("cpu"), lambda: None) == pytest.approx(3)


def test_a_quick_benchmark_fills_its_table(capsys, monkeypatch):
    monkeypatch.setattr(bench, "milliseconds", lambda device, function: [function(), 1][1])  # once
    bench.main(bench.parse_args(["--quick"]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert all(len(cells) == 5 and float(cells[2]) > 0 for cells in rows)
    notes = {}
    for part, setting, _, unit, note in rows:
        notes.setdefault(part, []).append((setting, unit, note))
    assert {"matrix product", "load, flip", "load, flip, jitter", "load, rescale, crop, flip",
            "stage 3 step", "CPEWS step", "- maps, E6", "- pixel labels, E13, E14", "CRF, torch",
            "stage 4, no CRF", "stage 4, score",
            "peak memory"} <= set(notes)
    for context in ("hv", "raster", "conv", "pool"):
        assert "of the ceiling" in notes[f"stage 1 step, {context}"][0][2]
        assert len(notes[f"inference, {context}"]) == 4
    for part in ("- backbone", "- tokens", "- context", "- head"):
        assert len(notes[part]) == 4 and {unit for _, unit, _ in notes[part]} == {"% of the step"}
    measured = {key for key in gpu.GOALS if key[0] in ("- context", "CRF, torch")}
    assert len(measured) == 2 and measured <= {(part, setting) for part, setting, *_ in rows}
