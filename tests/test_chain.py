"""The scripts as a person runs them: the whole chain, interruptions, several ranks."""
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from conftest import ROOT, call, command, log_of, needs_compiler, refusal
from datasets import coco as coco_maker
from datasets.beetles import TOY_CLASSES
from support import backbones
from support.masks import read_mask
from support.pictures import PICTURE

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # with more, sums are in another order


def ids_of(split):
    return Path(f"data/ImageSets/Segmentation/{split}.txt").read_text().split()


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def masks(folder):
    found = {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}
    assert found
    return found


def losses(run):
    return [line["loss"] for line in log_of(run)]


# --- the chain ---------------------------------------------------------------------------------

def test_the_chain_writes_what_the_readme_says(place, capsys):
    call("eval")
    output = capsys.readouterr().out
    expected = {f"{image_id}.png" for image_id in ids_of("train")}
    assert set(masks("run/bpm")) == set(masks("run/pseudo")) == expected
    assert set(masks("run/pred")) == {f"{image_id}.png" for image_id in ids_of("test")}
    results = json.loads(Path("run/results.json").read_text())
    assert (results["split"], results["num_images"], results["seed"]) == ("test", 2, 0)
    assert results["crf"] is False and results["image_labels_used"] is False
    assert list(results["iou"]) == TOY_CLASSES and set(results["part_recall"]) == {"body", "head"}
    assert f"mIoU {100 * results['miou']:.2f} %" in output
    log = log_of("run")
    assert [line["stage"] for line in log] == [
        "train_cls", "make_pseudo", "make_pseudo", "train_seg"]
    assert [line["masks"] for line in log[1:3]] == [
        "BPM, CPF-CTE w/o CRF in Table 1", "CRF, CPF-CTE in Table 1"]
    with Image.open("run/figure.png") as figure:
        assert figure.width == 1100 and figure.height > 300
    cls = torch.load("run/cls.pt", weights_only=True)
    assert cls["config"]["class_tokens"] == "soft" and cls["epoch"] == 1
    assert cls["classes"] == TOY_CLASSES


def test_the_stages_need_the_users_packages_only(place, script):
    """requirements.txt has none of these three: they are of extras/, datasets/ and tests/."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules.update(dict.fromkeys(("matplotlib", "torchmetrics", "pycocotools")))
import evaluate, make_pseudo, train_cls, train_seg
from datasets import make
for stage, flags in ((train_cls, "--batch-size 4 --epochs 1"), (make_pseudo, ""),
                     (train_seg, "--batch-size 4 --iterations 2"), (evaluate, "")):
    stage.main(stage.parse_args(f"--data data --run new --workers 0 {{flags}}".split()))
make.main(make.parse_args("toy --root more --num 1 1 1".split()))"""
    script("-c", code, cwd=place)
    with Image.open("new/figure.png") as picture:
        assert picture.info["Title"] == PICTURE and picture.width == 1100


@pytest.mark.parametrize("made, split, refined", [
    ("pred", "test", False), ("bpm", "train", False), ("pseudo", "train", True)])
def test_scores_are_a_count_over_the_files_and_say_how_those_were_made(place, made, split, refined):
    call(f"masks --masks run/{made} --split {split} --workers {int(refined)}")
    results = json.loads(Path(f"run/{made}/results.json").read_text())
    ids = ids_of(split)
    assert (results["split"], results["num_images"]) == (split, len(ids))
    assert (results["crf"], results["image_labels_used"]) == (refined, made != "pred")
    truth, guess = (np.stack([np.array(Image.open(f"{folder}/{image_id}.png")) for image_id in ids])
                    for folder in ("data/SegmentationClass", f"run/{made}"))
    for label, (name, iou) in enumerate(results["iou"].items()):
        both = ((truth == label) & (guess == label)).sum()
        either = ((truth == label) | ((guess == label) & (truth != 255))).sum()
        assert iou is None if not (truth == label).any() else iou == pytest.approx(both / either)
    assert results["pixel_accuracy"] == pytest.approx((truth == guess)[truth != 255].mean())


def test_same_seed_same_numbers_and_training_sees_no_mask(place):
    shutil.move("data/SegmentationClass", "truth")
    shutil.move("data/Parts", "parts")
    call("cls --run second --workers 2")
    call("pseudo --run second --workers 2")
    shutil.move("truth", "data/SegmentationClass")
    shutil.move("parts", "data/Parts")
    call("seg --run second --workers 1")
    call("eval --run second --workers 2")
    for name in ("cls.pt", "seg.pt"):
        assert_same_weights(f"run/{name}", f"second/{name}")
    for out in ("bpm", "pseudo", "pred"):
        assert masks(f"run/{out}") == masks(f"second/{out}")
    first, second = (json.loads(Path(run, "results.json").read_text()) for run in ("run", "second"))
    for path in ("masks", "checkpoint"):
        assert first.pop(path) != second.pop(path)
    assert first == second


def test_export_for_vocs_server_needs_no_ground_truth(place):
    shutil.rmtree("data/SegmentationClass")
    shutil.rmtree("run/pred")
    victim = Path("data/JPEGImages/test_00000.jpg")
    Image.open(victim).resize((70, 55)).save(victim)
    for split in ("test", "val", "test"):
        call(f"eval --export --split {split}")
    exported = Path("run/results/VOC2012/Segmentation/comp6_test_cls")
    files = sorted(path.name for path in Path("run/results").rglob("*.*"))
    assert files == [f"{image_id}.png" for image_id in ids_of("test")]  # those of val are gone
    written = masks("run/pred")
    assert all(written[name] == content for name, content in masks(exported).items())
    with Image.open(exported / "test_00000.png") as mask:
        assert mask.mode == "P" and mask.size == (70, 55)


def test_coco_goes_through_all_four_stages(coco, tmp_path, monkeypatch):
    coco_maker.make_coco(coco, train_masks=True, counts={"train": (5, 4), "val": (3, 2)})
    monkeypatch.chdir(tmp_path)
    tiny = "--no-pretrained --batch-size 2 --backbone"
    for line in (f"cls {tiny} vit_toy --size 32", "pseudo --size 64",
                 f"seg {tiny} resnet_toy --crop 64", "eval --crf"):
        call(f"{line} --data coco")
    assert len(masks("run/pseudo")) == 4
    results = json.loads(Path("run/results.json").read_text())
    assert (results["split"], results["num_images"], len(results["iou"])) == ("val", 2, 81)
    seg = torch.load("run/seg.pt", weights_only=True)
    assert seg["args"]["preset"] == "coco" and seg["config"]["num_classes"] == 81


def test_a_photo_is_segmented_with_the_preset_of_its_run(place):
    Image.new("CMYK", (130, 75), (20, 90, 10, 0)).save("photo.jpg")
    words = "--run run --image photo.jpg --out out.png --crf --window 64"
    assert evaluate.parse_args(words.split()).crf_sxy == 30  # toy's
    call(f"photo {words}")
    assert read_mask("out.png", 9).shape == (75, 130)
    with Image.open("out_overlay.png") as overlay:
        assert overlay.width > 1000 and overlay.info["Title"] == PICTURE


@pytest.mark.parametrize("line, folder, size", [
    ("pseudo --overwrite", "run/bpm", 48), ("eval", "run/pred", 96)])
def test_stages_2_and_4_predict_in_windows(place, line, folder, size):
    whole = masks(folder)
    call(f"{line} --window {size}")  # covers the image
    assert masks(folder) == whole
    call(f"{line} --window {size // 2} --stride 16")
    made = json.loads(Path(folder, "settings.json").read_text())
    assert (made["window"], made["stride"]) == (size // 2, 16)
    assert folder == "run/pred" or masks(folder) != whole


# --- interruptions -----------------------------------------------------------------------------

def kill_after(printed, line):
    """Run a command and kill it, without a chance to clean up, once it has printed this."""
    process = subprocess.Popen(
        [sys.executable, *command(line)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    for output in process.stdout:
        if printed in output:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("line, printed, file, counter", [
    ("cls --epochs 8 --dropout 0.2 --frozen-epochs 1 --train-blocks 2 --augment flip jitter",
     "epoch 2  of 8", "cls.pt", "epoch"),
    ("seg --iterations 24 --save-every 3 --masks run/pseudo", "iteration 6  of 24", "seg.pt",
     "step")], ids=["classifier", "segmenter"])
def test_a_killed_training_goes_on_to_the_same_weights(place, line, printed, file, counter):
    call(f"{line} --run whole")
    kill_after(printed, f"{line} --run killed --workers 1")
    _, least, _, end = printed.split()
    assert int(least) <= torch.load(f"killed/{file}", weights_only=True)[counter] < int(end)
    call(f"{line} --run killed --resume")
    assert_same_weights(f"whole/{file}", f"killed/{file}")


def test_masks_are_skipped_not_mixed_and_overwritten_on_request(place, capsys):
    written = masks("run/pseudo")
    removed, cut, empty, other, kept = sorted(written)[:5]
    Path("run/pseudo", removed).unlink()
    for name, content in ((cut, written[cut][:60]), (empty, b""), (other, b"no image")):
        Path("run/pseudo", name).write_bytes(content)
    Image.new("L", (96, 96)).save(f"run/pseudo/{kept}")
    call("pseudo")
    again = masks("run/pseudo")
    assert {name for name in written if again[name] != written[name]} == {kept}
    assert "--overwrite" in refusal("pseudo --size 96", capsys)
    call("pseudo --crf auto")  # who computes it is no setting of the masks
    bpm = masks("run/bpm")
    call("pseudo --overwrite --crf none")
    assert masks("run/bpm") == bpm and masks("run/pseudo") == again
    call("pseudo --overwrite")
    assert masks("run/pseudo") == written
    call("pseudo --split val")  # two splits share a folder
    assert len(masks("run/pseudo")) == 8 + 2 and written.items() <= masks("run/pseudo").items()


@pytest.mark.parametrize("victim, line, again, told, done", [
    ("val_00001", "cls --run new --epochs 2", "cls --run new --epochs 2 --resume",
     "going on from new/cls.pt (1 of 2)", lambda: log_of("new")[0]["loss"] > 0),
    ("train_00005", "pseudo --overwrite --batch-size 1", "pseudo", "3 of 8 images done now",
     lambda: len(masks("run/pseudo")) == 5)], ids=["epochs", "masks"])
def test_what_was_done_before_a_mistake_stays(place, capsys, victim, line, again, told, done):
    path = Path(f"data/JPEGImages/{victim}.jpg")
    whole = path.read_bytes()
    path.write_bytes(b"no image")
    with pytest.raises(SystemExit, match=f"{victim}.jpg cannot be read"):
        call(line)
    assert done()
    path.write_bytes(whole)
    capsys.readouterr()
    call(again)
    assert told in capsys.readouterr().out


def test_predictions_are_skipped_and_made_anew_with_other_settings_or_data(place, capsys):
    written = masks("run/pred")
    removed, kept = sorted(written)
    Path("run/pred", removed).unlink()
    Image.new("L", (96, 96), 3).save(f"run/pred/{kept}")
    call("eval")
    again = masks("run/pred")
    assert again[removed] == written[removed] and again[kept] != written[kept]
    call("eval --crf")
    assert json.loads(Path("run/results.json").read_text())["crf"] is True
    call("eval")
    assert masks("run/pred") == written
    shutil.copytree("data", "other")  # the same ids
    for path in Path("other/JPEGImages").glob("test_*.jpg"):
        Image.new("RGB", (96, 96), (9, 99, 199)).save(path)
    call("eval --data other")
    assert len(set(masks("run/pred").values())) == 1  # one picture, one mask
    assert "other data" in refusal("pseudo --data other", capsys)


# --- faster, and the same numbers ---------------------------------------------------------------

@pytest.mark.parametrize("name, flag, tolerance", [
    pytest.param("cls", "--compile", 1e-4, marks=needs_compiler),
    pytest.param("seg", "--compile", 1e-4, marks=needs_compiler), ("cls", "--amp", 2e-2)])
def test_compiled_and_bfloat16_runs_have_the_same_losses(place, monkeypatch, name, flag, tolerance):
    from torch._dynamo.utils import counters
    counters.clear()
    create = backbones._vit  # of one block: four take inductor another half a minute
    monkeypatch.setattr(backbones, "_vit", lambda *of, **size: create(*of, **size | {"depth": 1}))
    if name == "seg":  # without inductor's C++, which takes a minute
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    more = "--backbone vit_toy_linear" if name == "cls" else "--masks run/pseudo"
    usual = f"{name} {more} --val-split none --no-amp"
    call(f"{usual} --run plain")
    call(f"{usual} --run fast {flag}")
    assert losses("fast") == pytest.approx(losses("plain"), rel=tolerance)
    fast, plain = (weights(f"{run}/{name}.pt") for run in ("fast", "plain"))
    assert fast.keys() == plain.keys()  # a checkpoint does not depend on it
    assert counters["stats"]["unique_graphs"] or not all(  # it was used
        torch.equal(fast[key], value) for key, value in plain.items())


# --- several ranks -----------------------------------------------------------------------------

@pytest.mark.parametrize("line, file", [
    # the norms of vit_toy_linear are of each image alone
    ("cls --epochs 2 --frozen-epochs 1 --backbone vit_toy_linear", "cls.pt"),
    ("seg --iterations 4 --freeze-bn --lr 1e-3 --masks run/pseudo", "seg.pt")],
    ids=["classifier", "segmenter"])
def test_two_ranks_train_as_one_process_does(place, script, line, file):
    script(*TORCHRUN, *command(f"{line} --run two --workers 1"), env=ONE_THREAD, cwd=place)
    call(f"{line} --run one")
    assert losses("two") == pytest.approx(losses("one"), rel=1e-4)
    two = weights(f"two/{file}")
    for key, value in weights(f"one/{file}").items():
        torch.testing.assert_close(two[key], value, atol=1e-3, rtol=1e-2)


def test_two_ranks_write_the_masks_of_one_process(place, script):
    for run, launcher in (("one", ()), ("two", TORCHRUN)):
        Path(run).mkdir()
        shutil.copy("run/cls.pt", run)
        script(*launcher, *command(f"pseudo --batch-size 1 --run {run}"),  # else other batches
               env=ONE_THREAD, cwd=place)
    for out in ("bpm", "pseudo"):
        assert masks(f"two/{out}") == masks(f"one/{out}")


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two ranks"])
def test_a_damaged_image_ends_the_job_in_one_line(place, script, launcher):
    victim = Path("data/JPEGImages/train_00005.jpg")
    victim.write_bytes(victim.read_bytes()[:1500])
    code, output = script(*launcher, *command("cls --run new --workers 1"), cwd=place, check=False,
                          env=ONE_THREAD, timeout=90)
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(told) == 1, output
    assert "train_00005.jpg cannot be read" in told[0]
    assert launcher or len(output.splitlines()) == 1  # torchrun adds a report of its own
