"""The scripts as a person runs them: the whole chain, interruptions, several ranks, mistakes."""
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import make_pseudo
import train_cls
import train_seg
from conftest import ROOT, in_process, needs_compiler
from datasets import coco as coco_maker
from datasets.beetles import TOY_CLASSES
from support import backbones
from support.pictures import PICTURE
from support.run import DataError

CLS = ("--epochs", "2", "--batch-size", "4")
SEG = ("--iterations", "6", "--save-every", "3", "--batch-size", "4", "--val-images", "4")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def masks(folder):
    found = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert found
    return found


@pytest.fixture(scope="session")
def run(toy, tmp_path_factory, script):
    """The four stages on the tiny toy data set: (RUN, what stage 4 prints as a command)."""
    run = tmp_path_factory.mktemp("runs") / "first"
    where = ("--data", toy, "--run", run)
    in_process(train_cls, *where, *CLS)
    in_process(make_pseudo, *where)
    in_process(train_seg, *where, *SEG)
    return run, script("evaluate.py", *where)[1]


def test_the_chain_writes_what_the_readme_says(run, toy):
    run, output = run
    ids = (toy / "ImageSets/Segmentation/train.txt").read_text().split()
    assert set(masks(run / "bpm")) == set(masks(run / "pseudo")) == {f"{i}.png" for i in ids}
    assert len(masks(run / "pred")) == 8
    results = json.loads((run / "results.json").read_text())
    assert (results["split"], results["num_images"]) == ("test", 8)
    assert results["crf"] is False and results["image_labels_used"] is False
    assert results["seed"] == 0 and list(results["iou"]) == TOY_CLASSES
    assert set(results["part_recall"]) == {"body", "head"}
    assert f"mIoU {100 * results['miou']:.2f} %" in output
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines]
    assert stages == [s for s in ("train_cls", "make_pseudo", "train_seg") for _ in range(2)]
    assert [line["masks"] for line in lines if "masks" in line] == [
        "BPM, CPF-CTE w/o CRF in Table 1", "CRF, CPF-CTE in Table 1"]
    with Image.open(run / "figure.png") as figure:
        assert figure.width == 1100 and figure.height > 300
    cls = torch.load(run / "cls.pt", weights_only=True)
    assert cls["config"]["class_tokens"] == "soft" and cls["epoch"] == 2 and cls["classes"]


def test_the_stages_need_the_users_packages_only(toy, tmp_path):
    """requirements.txt has none of these three: they are of extras/, datasets/ and tests/."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "torchmetrics", "pycocotools")))
import data, evaluate, make_pseudo, train_cls, train_seg
words = ["--data", {str(toy)!r}, "--run", {str(tmp_path)!r}, "--workers", "0"]
for stage, flags in ((train_cls, {CLS}), (make_pseudo, ()), (train_seg, {SEG}), (evaluate, ())):
    stage.main(stage.parse_args([*words, *flags]))
data.main(data.parse_args(["toy", "--root", {str(tmp_path / "more")!r}, "--num", "1", "1", "1"]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.info["Title"] == PICTURE and picture.width == 1100


def test_scores_agree_with_a_count_over_the_written_files(run, toy):
    run, _ = run
    results = json.loads((run / "results.json").read_text())
    truth, guess = [], []
    for path in (run / "pred").glob("*.png"):
        truth.append(np.array(Image.open(toy / "SegmentationClass" / path.name)).ravel())
        guess.append(np.array(Image.open(path)).ravel())
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    for label, (name, iou) in enumerate(results["iou"].items()):
        both = ((truth == label) & (guess == label)).sum()
        either = ((truth == label) | ((guess == label) & (truth != 255))).sum()
        assert iou is None if not (truth == label).any() else iou == pytest.approx(both / either)
    assert results["pixel_accuracy"] == pytest.approx((truth == guess)[truth != 255].mean())


def test_same_seed_same_numbers_and_training_sees_no_mask(run, toy, toy_copy, tmp_path):
    first, second = run[0], tmp_path / "second"
    shutil.rmtree(toy_copy / "SegmentationClass")
    shutil.rmtree(toy_copy / "Parts")
    in_process(train_cls, "--data", toy_copy, "--run", second, *CLS, "--workers", "0")
    in_process(make_pseudo, "--data", toy_copy, "--run", second, "--workers", "0")
    assert_same_weights(first / "cls.pt", second / "cls.pt")
    for out in ("bpm", "pseudo"):
        assert masks(first / out) == masks(second / out)
    in_process(train_seg, "--data", toy, "--run", second, *SEG, "--workers", "1")
    in_process(evaluate, "--data", toy, "--run", second, "--workers", "0")
    a, b = (json.loads((r / "results.json").read_text()) for r in (first, second))
    for path in ("masks", "checkpoint"):
        assert a.pop(path) != b.pop(path)
    assert a == b


def test_folders_of_masks_know_how_they_were_made(run, toy, toy_copy, capsys):
    run, _ = run
    for out, refined in (("bpm", False), ("pseudo", True)):
        in_process(evaluate, "--data", toy, "--masks", run / out, "--split", "train")
        results = json.loads((run / out / "results.json").read_text())
        assert results["crf"] is refined and results["image_labels_used"] is True
        assert results["split"] == "train" and results["num_images"] == 24
    truth = toy_copy / "SegmentationClass"
    in_process(evaluate, "--data", toy_copy, "--masks", truth, "--split", "val")
    assert "mIoU 100.00 %" in capsys.readouterr().out


def test_predictions_of_another_data_set_with_the_same_ids_are_not_reused(run, toy_copy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    for path in (toy_copy / "JPEGImages").glob("test_*.jpg"):
        Image.new("RGB", (96, 96), (9, 99, 199)).save(path)
    in_process(evaluate, "--data", toy_copy, "--run", here, "--workers", "0")
    assert len(set(masks(here / "pred").values())) == 1  # one picture, one mask
    with pytest.raises(DataError, match="other data"):
        in_process(make_pseudo, "--data", toy_copy, "--run", here, "--workers", "0")


def test_export_for_vocs_server_needs_no_ground_truth(run, toy_copy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(toy_copy / "SegmentationClass")
    victim = sorted((toy_copy / "JPEGImages").glob("test_*.jpg"))[0]
    Image.open(victim).resize((70, 55)).save(victim)
    in_process(evaluate, "--data", toy_copy, "--run", here, "--export", "--split", "test")
    exported = here / "results/VOC2012/Segmentation/comp6_test_cls"
    ids = (toy_copy / "ImageSets/Segmentation/test.txt").read_text().split()
    in_process(evaluate, "--data", toy_copy, "--run", here, "--export", "--split", "val")
    in_process(evaluate, "--data", toy_copy, "--run", here, "--export", "--split", "test")
    files = sorted(path.name for path in (here / "results").rglob("*.*"))
    assert files == [f"{i}.png" for i in ids]  # those of val are gone
    written = masks(here / "pred")
    assert all(written[name] == content for name, content in masks(exported).items())
    with Image.open(exported / f"{victim.stem}.png") as mask:
        assert mask.mode == "P" and mask.size == (70, 55)


def test_coco_goes_through_all_four_stages(coco, tmp_path):
    coco_maker.make_coco(coco, train_masks=True, counts={"train": (5, 4), "val": (3, 2)})
    where = ("--data", coco, "--run", tmp_path, "--workers", "0")
    tiny = ("--no-pretrained", "--batch-size", "2")
    in_process(train_cls, *where, *tiny, "--backbone", "vit_toy", "--size", "32", "--epochs", "1")
    in_process(make_pseudo, *where, "--size", "64")
    assert len(masks(tmp_path / "pseudo")) == 4
    in_process(train_seg, *where, *tiny, "--backbone", "resnet_toy", "--iterations", "2",
               "--crop", "64")
    in_process(evaluate, *where, "--crf")
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["split"], results["num_images"], len(results["iou"])) == ("val", 2, 81)
    seg = torch.load(tmp_path / "seg.pt", weights_only=True)
    assert seg["args"]["preset"] == "coco" and seg["config"]["num_classes"] == 81


def test_a_photo_is_segmented_with_the_preset_of_its_run(run, tmp_path):
    Image.new("CMYK", (130, 75), (20, 90, 10, 0)).save(tmp_path / "photo.jpg")
    out = tmp_path / "photo.png"
    words = ["--run", run[0], "--image", tmp_path / "photo.jpg", "--out", out, "--crf"]
    assert evaluate.parse_args([str(word) for word in words]).crf_sxy == 30  # toy's
    in_process(evaluate, *words)
    assert data.read_mask(out, 9).shape == (75, 130)
    with Image.open(tmp_path / "photo_overlay.png") as overlay:
        assert overlay.width > 1000 and overlay.info["Title"] == PICTURE
    data.save_mask(tmp_path / "photo_overlay.png", np.zeros((4, 4)))  # not drawn by evaluate.py
    with pytest.raises(DataError, match="photo_overlay.png is in the way"):
        in_process(evaluate, *words)


def test_stages_2_and_4_predict_in_windows(run, toy, tmp_path):
    here = tmp_path / "run"
    here.mkdir()
    for name in ("cls.pt", "seg.pt"):
        shutil.copy(run[0] / name, here)
    words = ("--data", toy, "--run", here, "--workers", "0")
    in_process(make_pseudo, *words, "--window", "96")  # covers the image
    whole = masks(here / "bpm")
    assert whole == masks(run[0] / "bpm")
    with pytest.raises(DataError, match="--overwrite replaces them"):
        in_process(make_pseudo, *words, "--window", "48")
    in_process(make_pseudo, *words, "--window", "48", "--overwrite")
    assert masks(here / "bpm") != whole
    in_process(evaluate, *words, "--window", "64", "--stride", "16")
    made = json.loads((here / "pred/settings.json").read_text())
    assert (made["window"], made["stride"]) == (64, 16)
    Image.new("RGB", (130, 75)).save(tmp_path / "photo.jpg")
    in_process(evaluate, "--run", here, "--image", tmp_path / "photo.jpg", "--out",
               tmp_path / "photo.png", "--window", "64")
    assert data.read_mask(tmp_path / "photo.png", 9).shape == (75, 130)


# --- interruptions -----------------------------------------------------------------------------

def kill_after(line, *arguments):
    """Run a script and kill it, without a chance to clean up, once it has printed a line."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    for output in process.stdout:
        if line in output:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_a_killed_classifier_goes_on_to_the_same_weights(toy, tmp_path):
    settings = ("--data", toy, "--epochs", "3", "--batch-size", "4", "--dropout", "0.2",
                "--frozen-epochs", "1", "--train-blocks", "2", "--augment", "flip", "jitter")
    in_process(train_cls, *settings, "--run", tmp_path / "whole")
    kill_after("epoch 2", "train_cls.py", *settings, "--run", tmp_path / "killed")
    assert torch.load(tmp_path / "killed/cls.pt", weights_only=True)["epoch"] in (1, 2)
    with pytest.raises(DataError, match="--resume"):
        in_process(train_cls, *settings, "--run", tmp_path / "killed")
    with pytest.raises(DataError, match="--pool topk, now it is max"):
        in_process(train_cls, *settings, "--run", tmp_path / "killed", "--resume", "--pool", "max")
    in_process(train_cls, *settings, "--run", tmp_path / "killed", "--resume")
    assert_same_weights(tmp_path / "whole/cls.pt", tmp_path / "killed/cls.pt")


def test_a_killed_segmenter_goes_on_to_the_same_weights(run, toy, tmp_path):
    settings = ("--data", toy, "--masks", run[0] / "pseudo", *SEG, "--iterations", "9")
    in_process(train_seg, *settings, "--run", tmp_path / "whole")
    kill_after("iteration 6", "train_seg.py", *settings, "--run", tmp_path / "killed")
    assert torch.load(tmp_path / "killed/seg.pt", weights_only=True)["step"] in (3, 6)
    in_process(train_seg, *settings, "--run", tmp_path / "killed", "--resume")
    assert_same_weights(tmp_path / "whole/seg.pt", tmp_path / "killed/seg.pt")


def test_a_complete_run_is_left_as_it_is(run, toy, tmp_path, capsys):
    here = shutil.copytree(run[0], tmp_path / "run")
    for stage, flags, file in ((train_cls, CLS, "cls.pt"), (train_seg, SEG, "seg.pt")):
        before = (here / file).read_bytes()
        in_process(stage, "--data", toy, "--run", here, *flags, "--resume")
        assert f"{file} is finished: nothing to do" in capsys.readouterr().out
        assert (here / file).read_bytes() == before


def test_a_segmenter_does_not_go_on_with_other_masks(run, toy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    in_process(make_pseudo, "--data", toy, "--run", here, "--overwrite", "--crf-sxy", "5",
               "--workers", "0")
    with pytest.raises(DataError, match="seg.pt was made with other masks"):
        in_process(train_seg, "--data", toy, "--run", here, *SEG, "--resume")


def test_masks_are_skipped_not_mixed_and_overwritten_on_request(run, toy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    command = (make_pseudo, "--data", toy, "--run", here, "--workers", "0")
    written = masks(here / "pseudo")
    removed, cut, kept = sorted(written)[:3]
    (here / "pseudo" / removed).unlink()
    (here / "pseudo" / cut).write_bytes(written[cut][:60])
    Image.new("L", (96, 96)).save(here / "pseudo" / kept)
    in_process(*command)
    again = masks(here / "pseudo")
    assert again[removed] == written[removed] and again[cut] == written[cut]
    assert again[kept] != written[kept]
    with pytest.raises(DataError, match="--overwrite"):
        in_process(*command, "--size", "128")
    in_process(*command, "--crf", "torch")  # the backend is no setting of the masks
    in_process(*command, "--overwrite", "--crf", "none")
    assert masks(here / "bpm") == masks(run[0] / "bpm") and masks(here / "pseudo") == again
    in_process(*command, "--overwrite")
    assert masks(here / "pseudo") == written


def test_masks_of_two_splits_share_a_folder(run, toy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    in_process(make_pseudo, "--data", toy, "--run", here, "--split", "val", "--workers", "0")
    written = masks(here / "pseudo")
    assert len(written) == 24 + 8 and masks(run[0] / "pseudo").items() <= written.items()


def test_predictions_are_skipped_and_made_anew_with_other_settings(run, toy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    command = (evaluate, "--data", toy, "--run", here, "--workers", "0")
    in_process(*command)
    written = masks(here / "pred")
    removed, kept = sorted(written)[:2]
    (here / "pred" / removed).unlink()
    Image.new("L", (96, 96), 3).save(here / "pred" / kept)
    in_process(*command)
    again = masks(here / "pred")
    assert again[removed] == written[removed] and again[kept] != written[kept]
    in_process(*command, "--crf")
    assert json.loads((here / "results.json").read_text())["crf"] is True
    in_process(*command)
    assert masks(here / "pred") == written


# --- faster, and the same numbers ---------------------------------------------------------------

def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flag, tolerance", [
    pytest.param("--compile", 1e-4, marks=needs_compiler), ("--amp", 2e-2)])
def test_compiled_and_bfloat16_runs_have_the_same_losses(flag, tolerance, toy, tmp_path,
                                                         monkeypatch):
    create = backbones._vit  # of one block: four take inductor another half a minute
    monkeypatch.setattr(backbones, "_vit", lambda *of, **size: create(*of, **size | {"depth": 1}))
    settings = ("--data", toy, "--batch-size", "4", "--epochs", "1", "--val-split", "none",
                "--backbone", "vit_toy_linear")
    in_process(train_cls, *settings, "--run", tmp_path / "plain", "--no-amp")
    in_process(train_cls, *settings, "--run", tmp_path / "fast", "--no-amp", flag)
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)
    fast, plain = (weights(tmp_path / name / "cls.pt") for name in ("fast", "plain"))
    assert not all(torch.equal(fast[key], value) for key, value in plain.items())  # it was used


# --- several ranks -----------------------------------------------------------------------------

@pytest.fixture
def one_thread():
    """As each rank has: with more, sums are in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_ranks_train_the_classifier_as_one_process_does(toy, tmp_path, script):
    settings = ("--data", toy, *CLS, "--dropout", "0", "--frozen-epochs", "1",
                "--backbone", "vit_toy_linear")  # its norms are of each image alone
    script(*TORCHRUN, "train_cls.py", *settings, "--run", tmp_path / "two", "--workers", "1",
           env={"OMP_NUM_THREADS": "1"})
    in_process(train_cls, *settings, "--run", tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    two = weights(tmp_path / "two/cls.pt")
    for key, value in weights(tmp_path / "one/cls.pt").items():
        torch.testing.assert_close(two[key], value, atol=1e-3, rtol=1e-2)


def test_two_ranks_train_the_segmenter_as_one_process_does(run, toy, tmp_path, script):
    settings = ("--data", toy, "--masks", run[0] / "pseudo", *SEG, "--freeze-bn", "--lr", "1e-3")
    script(*TORCHRUN, "train_seg.py", *settings, "--run", tmp_path / "two", "--workers", "1",
           env={"OMP_NUM_THREADS": "1"})
    in_process(train_seg, *settings, "--run", tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_two_ranks_write_the_masks_of_one_process(run, toy, tmp_path, script, one_thread):
    flags = ("--data", toy, "--batch-size", "1")  # else other batches, other sums
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(run[0] / "cls.pt", tmp_path / name)
    in_process(make_pseudo, *flags, "--run", tmp_path / "one", "--workers", "0")
    script(*TORCHRUN, "make_pseudo.py", *flags, "--run", tmp_path / "two",
           env={"OMP_NUM_THREADS": "1"})
    for out in ("bpm", "pseudo"):
        assert masks(tmp_path / "two" / out) == masks(tmp_path / "one" / out)


def test_a_rank_that_dies_ends_the_job_with_its_message(toy_copy, tmp_path, script):
    ids = (toy_copy / "ImageSets/Segmentation/train.txt").read_text().split()
    (toy_copy / "JPEGImages" / f"{ids[7]}.jpg").write_bytes(b"no image")
    code, output = script(*TORCHRUN, "train_cls.py", "--data", toy_copy, "--run", tmp_path / "run",
                          *CLS, env={"OMP_NUM_THREADS": "1"}, check=False, timeout=90)
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(told) == 1 and f"{ids[7]}.jpg cannot be read" in told[0], output


# --- mistakes ----------------------------------------------------------------------------------

def test_a_mistake_ends_with_one_line_and_no_traceback(toy_copy, tmp_path, script):
    victim = sorted((toy_copy / "JPEGImages").glob("train_*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[:1500])
    code, output = script("train_cls.py", "--data", toy_copy, "--run", tmp_path / "run", *CLS,
                          check=False)
    assert code == 1 and "Traceback" not in output
    assert len(output.strip().splitlines()) == 1 and victim.name in output


ALONE = ("--workers", "0")  # an error in a worker keeps a test waiting for it to end


def test_each_checkpoint_names_the_stage_that_writes_it(run, toy, tmp_path):
    where = ("--data", toy, "--run", tmp_path, *ALONE)
    with pytest.raises(DataError, match="cls.pt not found: run train_cls.py first"):
        in_process(make_pseudo, *where)
    with pytest.raises(DataError, match="seg.pt not found: run train_seg.py first"):
        in_process(evaluate, *where)
    shutil.copy(run[0] / "seg.pt", tmp_path / "cls.pt")
    with pytest.raises(DataError, match="no cls checkpoint but seg"):
        in_process(make_pseudo, *where)


@pytest.mark.parametrize("stage", [make_pseudo, evaluate])
def test_a_data_set_of_other_classes_is_refused(stage, run, toy_copy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    (toy_copy / "classes.txt").write_text("background\nbeetle\n")
    with pytest.raises(DataError, match="other classes"):
        in_process(stage, "--data", toy_copy, "--run", here, *ALONE)


@pytest.mark.parametrize("pixels, words", [
    (np.full((96, 96), 77), "has the value 77"), (np.zeros((90, 96)), "is 96x90, its image 96x96")])
def test_a_mask_that_cannot_be_scored_is_named(pixels, words, run, toy, tmp_path):
    pred = shutil.copytree(run[0] / "pred", tmp_path / "pred")
    Image.fromarray(pixels.astype(np.uint8)).save(pred / "test_00000.png")
    with pytest.raises(DataError, match=f"test_00000.png {words}"):
        in_process(evaluate, "--data", toy, "--masks", pred, "--split", "test", *ALONE)


def test_a_split_without_ground_truth_or_without_a_list_is_named(run, toy_copy):
    where = ("--data", toy_copy, "--masks", run[0] / "pred", *ALONE, "--split")
    with pytest.raises(DataError, match="missing.txt not found"):
        in_process(evaluate, *where, "missing")
    shutil.rmtree(toy_copy / "SegmentationClass")
    with pytest.raises(DataError, match="no ground truth"):
        in_process(evaluate, *where, "test")


def test_an_image_whose_training_mask_has_another_size(run, toy, tmp_path):
    bad = shutil.copytree(run[0] / "pseudo", tmp_path / "masks")
    for path in bad.glob("*.png"):
        Image.new("L", (90, 96)).save(path)
    with pytest.raises(DataError, match="is 90x96, its image 96x96"):
        in_process(train_seg, "--data", toy, "--run", tmp_path, "--masks", bad, *SEG, *ALONE)
