"""The studies and figures of extras/: known answers, and a tiny study as a person runs it."""
import csv
import json
import math
import os
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import make_pseudo
import patch_grid
import study
import train_cls
import train_seg
from conftest import contents, in_process
from extras.cpews import train as cpews
from support.files import UserError, write_lines
from support.masks import save_mask

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
    # of the CRF: differences 1, 3, 2: mean 2, deviation 1
    crf = f"{2 - half / 2:+.1f} to {2 + half / 2:+.1f}"
    assert lines[-1] == f"| second against first | +5.0 | {interval} | +2.0 | {crf} |  |  |"
    one = study.tables(rows, [scores[0][:1], scores[1][:1]])
    assert one[3:5] == ["| second | - | 1 | 15.0 |  | 21.0 |  | +5.0 |  |", ""]
    third = study.tables([*rows, ("third", "-")], [*scores, scores[0]])
    assert [line.split(" | ")[:2] for line in third[-3:]] == [
        ["| second against first", "+5.0"], ["| third against first", ""],
        ["| third against second", "-5.0"]]
    full = [[seed | {"DeepLabv2": 3 * seed["CRF"]} for seed in row] for row in scores]
    assert study.tables(rows, full)[3].endswith("66.0 | 3.0 | +6.0 | -1.4 to +13.4 |")


def test_what_masks_find_where_a_data_set_has_no_parts():
    """Found: 6 of 8 and 1 of 2 pixels of the two classes; of background's 10, 3 are not 0."""
    confusion = [[7, 2, 0, 1], [1, 6, 0, 1], [0, 1, 1, 0]]
    results = {"confusion": confusion, "boundary_miou": 0.2}
    assert study.columns_of(results, "x: ") == pytest.approx(
        {"x: object found": 70, "x: background called object": 30, "x: boundary IoU": 20})
    with_parts = study.columns_of(results | {"part_recall": {"head": 0.5}}, "")
    assert with_parts == pytest.approx(
        {"head found": 50, "background called object": 30, "boundary IoU": 20})


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
    zero = ("max-norm", "--seeds", "0")
    home = run_study(toy, tmp_path, *zero)
    assert [script for script, _ in calls].count("train_cls.py") == 2  # the second finds it done
    lines = (home / "max-norm-val.md").read_text().splitlines()
    assert len(lines) == 13 and lines[2].startswith("| with | - | 1 |")
    scores = json.loads((home / "default/s0/scores-val.json").read_text())["scores"]
    results = json.loads((home / "default/s0/bpm/results.json").read_text())
    assert scores["BPM"] == pytest.approx(100 * results["miou"])
    assert scores["head found"] == pytest.approx(100 * results["part_recall"]["head"])
    assert (home / "default/s0/no-max-norm/cls.pt").resolve() == home / "default/s0/cls.pt"
    calls.clear()
    run_study(toy, tmp_path, *zero)
    assert not calls and "| without | - | 1 |" in capsys.readouterr().out
    run_study(toy, tmp_path, *zero, "1")
    assert {run for _, run in calls} == {"s1", "no-max-norm"}
    assert "| without | - | 2 |" in (home / "max-norm-val.md").read_text()
    for other in (), ("--cls-flags", "--epochs 1 --batch-size 4", "--flags=--no-amp"):
        with pytest.raises(UserError, match="other data or flags: choose another --out"):
            study.main(study.parse_args(["max-norm", "--data", str(toy), "--out", str(tmp_path),
                                         *other]))

    # --full: DeepLabv2 beside masks that asked for no --seg-flags
    seg, full = "--iterations 2 --batch-size 4 --val-images 2", [*zero, "--full", "--seg-flags"]
    calls.clear()
    run_study(toy, tmp_path, *full, seg)
    assert [name for name, _ in calls].count("train_seg.py") == 2
    assert (home / "max-norm-val-full.md").is_file()
    scores = json.loads((home / "default/s0/scores-val.json").read_text())["scores"]
    results = json.loads((home / "default/s0/results.json").read_text())
    assert results["split"] == "val" and scores["DeepLabv2"] == 100 * results["miou"]
    assert scores["DeepLabv2: head found"] == 100 * results["part_recall"]["head"]
    calls.clear()
    run_study(toy, tmp_path, *zero, "--seg-flags", seg)  # the same runs
    assert not calls
    with pytest.raises(UserError, match="other data or flags"):
        run_study(toy, tmp_path, *full, "--iterations 3")


def test_a_study_of_cpews_scores_maps_labels_and_decoder(toy, tmp_path, calls):
    flags = "--warm-up 1 --iterations 1 --batch-size 2 --val-split none --seg-from 0"
    seg = "--iterations 1 --batch-size 2 --val-split none"
    study.main(study.parse_args([
        "cpews2", "--data", str(toy), "--out", str(tmp_path), "--seeds", "0", "--full",
        "--cpews-flags", flags, "--seg-flags", seg]))
    home = tmp_path / toy.name
    scripts = [name for name, _ in calls]
    assert scripts.count("extras/cpews/train.py") == 6  # train, val, train; twice
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
    assert len([*(tmp_path / "kept").glob("*.npy")]) == 32  # of train and val
    assert [script for script, _ in calls] == ["train_cls.py", "make_pseudo.py",
                                               "evaluate.py", "evaluate.py"]
    checkpoint = torch.load(tmp_path / "runs/study/toy/pool_max/s3/cls.pt", weights_only=True)
    args = checkpoint["args"]
    assert (args["pool"], args["seed"], args["epochs"], args["amp"]) == ("max", 3, 1, False)
    assert "| max pooling | 68.1 | 1 |" in (tmp_path / "runs/study/toy/one-val.md").read_text()
    raw = list(csv.DictReader((tmp_path / "runs/study/toy/one-val.csv").open()))
    bpm = json.loads((tmp_path / "runs/study/toy/pool_max/s3/scores-val.json").read_text())
    assert {row["metric"] for row in raw} >= {"BPM", "CRF", "val mAP", "body found"}
    assert raw[0] == dict(data="toy", method="ours", variant="max pooling", split="val", seed="3",
                          metric="BPM", value=f"{bpm['scores']['BPM']:.2f}")


def test_a_command_keeps_its_output_and_a_failing_one_is_named(toy, tmp_path):
    args = study.parse_args(["table4", "--data", str(toy), "--flags=--workers 0"])
    truth = ("--masks", toy / "SegmentationClass", "--split")
    before = contents(toy)
    study.call(args, tmp_path, "evaluate.py", *truth, "val")
    assert contents(toy) == before
    output = (tmp_path / "out.txt").read_text()
    assert "--split val --workers 0" in output and "mIoU 100.00 %" in output
    with pytest.raises(UserError, match="evaluate.py ended with code 1 .*none.txt not found"):
        study.call(args, tmp_path, "evaluate.py", *truth, "none")


# --- the patch-grid bound ----------------------------------------------------------------------

def one_image(root, mask, flags=()):
    """patch_grid.py on a data set of one image, which is grey where the mask is 1, else blue."""
    save_mask(root / "SegmentationClass/a.png", mask)
    (root / "JPEGImages").mkdir(exist_ok=True)
    colours = np.where(mask[..., None], 200, np.uint8([[[20, 40, 60]]]))
    Image.fromarray(colours).save(root / "JPEGImages/a.png")
    write_lines(root / "classes.txt", ["background", "thing"])
    write_lines(root / "ImageSets/Segmentation/val.txt", ["a"])
    patch_grid.main(patch_grid.parse_args(["--data", str(root), "--workers", "0", *flags]))


def test_bound_by_hand_and_the_crf_gives_the_border_back(tmp_path, capsys):
    """Class 1 covers 5 of 6 columns: the grid of 2 moves the border, by labels and by shares."""
    mask = np.ones((6, 6), np.uint8)
    mask[:, 0] = 0
    mask[0, 5] = 255  # not scored, and covers no patch
    one_image(tmp_path, mask, ("--sides", "2", "6"))
    # at 2 both patches are class 1, as labels and as shares (2/3 and 17/18): background is lost
    coarse, output = 100 * (0 + 29 / 35) / 2, capsys.readouterr().out
    for kind in ("labels", "shares"):
        assert f"  2 x 2   patches   {kind} {coarse:5.1f}\n" in output
        assert f"  6 x 6   patches   {kind} 100.0\n" in output
    mask[:, 1] = 0  # now the left patch is 2/3 background, and a label calls all of it that
    one_image(tmp_path, mask, ("--sides", "2"))
    labels, output = 100 * (12 / 18 + 17 / 23) / 2, capsys.readouterr().out
    # background in the six columns: 1 1 2/3 1/3 0 0 by labels, 2/3 2/3 4/9 2/9 0 0 by shares
    assert f"labels {labels:5.1f}\n" in output and "shares 100.0\n" in output
    nothing = np.full((4, 4), 255, np.uint8)
    assert patch_grid.on_grid(nothing, 2, True)[0].tolist() == [0]
    # of 16 columns 5 are background, a grid of 2 makes that 8; colours tell the CRF where it ends
    mask = np.ones((16, 16), np.uint8)
    mask[:, :5] = 0
    one_image(tmp_path, mask, ("--sides", "2", "--crf", "torch", "--crf-srgb", "10"))
    for line in capsys.readouterr().out.splitlines()[-2:]:
        assert line.endswith("after the CRF 100.0")
