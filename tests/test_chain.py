"""The scripts as a person runs them: the whole chain, interruptions, several ranks, bad input."""
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import make_pseudo
import train_cls
import train_seg
from conftest import BACKENDS, needs_compiler
from model import upsample
from support import coco as coco_maker, crf
from support.beetles import TOY_CLASSES
from support.run import DataError

ROOT = Path(__file__).parent.parent
CLS = ("--epochs", "2", "--batch-size", "4")
SEG = ("--iterations", "6", "--save-every", "3", "--batch-size", "4", "--val-images", "4")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--")


def in_process(module, *arguments):
    module.main(module.parse_args([str(a) for a in arguments]))


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
    """The four stages, each in a process of its own, on the tiny toy data set."""
    run = tmp_path_factory.mktemp("runs") / "first"
    where = ("--data", toy, "--run", run)
    script("train_cls.py", *where, *CLS)
    outputs = [script("make_pseudo.py", *where)[1]]
    script("train_seg.py", *where, *SEG)
    outputs.append(script("evaluate.py", *where)[1])
    return run, "".join(outputs)


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
    assert "BPM, CPF-CTE w/o CRF in Table 1" in output and "CRF, CPF-CTE in Table 1" in output
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    stages = [line["stage"] for line in lines]
    assert stages == [s for s in ("train_cls", "make_pseudo", "train_seg") for _ in range(2)]
    with Image.open(run / "figure.png") as figure:
        assert figure.width > 700 and figure.height > 700
    cls = torch.load(run / "cls.pt", weights_only=True)
    assert cls["config"]["class_tokens"] == "soft" and cls["epoch"] == 2 and cls["classes"]


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


def test_same_seed_same_numbers_and_training_sees_no_mask(run, toy, toy_copy, tmp_path, script):
    first, second = run[0], tmp_path / "second"
    shutil.rmtree(toy_copy / "SegmentationClass")
    shutil.rmtree(toy_copy / "Parts")
    script("train_cls.py", "--data", toy_copy, "--run", second, *CLS, "--workers", "0")
    script("make_pseudo.py", "--data", toy_copy, "--run", second, "--workers", "0")
    assert_same_weights(first / "cls.pt", second / "cls.pt")
    for out in ("bpm", "pseudo"):
        assert masks(first / out) == masks(second / out)
    script("train_seg.py", "--data", toy, "--run", second, *SEG, "--workers", "1")
    script("evaluate.py", "--data", toy, "--run", second, "--workers", "0")
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
    with pytest.raises(SystemExit):
        in_process(evaluate, "--data", toy_copy, "--masks", here / "pred", "--export")


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


def test_prediction_in_chunks_is_the_argmax_of_the_whole():
    torch.manual_seed(0)
    image = np.zeros((64, 97, 3), np.uint8)
    for C in (1, 9, 16, 17, 81):
        logits = torch.randn(C, 9, 13)
        logits[C // 2] = logits[0]  # a tie: the first wins
        whole = upsample(logits, 64, 97).argmax(0).numpy()
        assert np.array_equal(evaluate.predict(logits, image), whole)


def test_crf_over_the_classes_that_are_best_somewhere_is_that_over_all():
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((160, 120))
    image = np.array(image)
    logits = torch.randn(21, 6, 8, generator=torch_rng) * 2
    logits[6:] -= 9  # six classes compete, as they do after training, ...
    logits[20] = logits[:6].mean(dim=0)  # ... and one is never best, but never far
    kept = evaluate.predict(logits, image, {})
    probs = upsample(logits, 120, 160).softmax(0).numpy()
    every = crf.dense_crf(image, probs).argmax(0)
    assert 20 not in np.unique(probs.argmax(0))
    assert (kept == every).mean() > 0.98
    assert (kept != probs.argmax(0)).mean() > 0.01  # the CRF does something here


@pytest.mark.parametrize("backend", BACKENDS)
def test_81_classes_at_960_pixels_stay_below_two_gib(backend, script):
    code = """
import resource, sys, numpy as np, torch, evaluate
torch.manual_seed(0)
logits = torch.nn.functional.interpolate(torch.randn(1, 81, 8, 8) * 5, (120, 120))[0]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
before = peak()
assert len(np.unique(evaluate.upsampled_argmax(logits, 960, 960))) > 30
mask = evaluate.predict(logits, np.full((960, 960, 3), 9, np.uint8),
                        {"iterations": 1, "backend": sys.argv[1]})
print("classes", len(np.unique(mask)), "GiB", peak() - before)"""
    _, output = script("-c", code, backend)
    words = output.split()
    assert 1 < int(words[-3]) <= 21 and float(words[-1]) < 2, output


def test_anybodys_photo(run, tmp_path):
    Image.new("CMYK", (130, 75), (20, 90, 10, 0)).save(tmp_path / "photo.jpg")
    out = tmp_path / "photo.png"
    in_process(evaluate, "--run", run[0], "--image", tmp_path / "photo.jpg", "--out", out, "--crf")
    assert data.read_mask(out, 9).shape == (75, 130)
    with Image.open(tmp_path / "photo_overlay.png") as overlay:
        assert overlay.width == 4 * 130 and overlay.height > 4 * 75  # enlarged, and a legend
    with pytest.raises(SystemExit):
        in_process(evaluate, "--run", run[0], "--image", out, "--out", out)


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
    before = torch.load(tmp_path / "killed/cls.pt", weights_only=True)["epoch"]
    assert before == 2
    with pytest.raises(DataError, match="--resume"):
        in_process(train_cls, *settings, "--run", tmp_path / "killed")
    with pytest.raises(DataError, match="--pool topk, now it is max"):
        in_process(train_cls, *settings, "--run", tmp_path / "killed", "--resume", "--pool", "max")
    in_process(train_cls, *settings, "--run", tmp_path / "killed", "--resume")
    assert_same_weights(tmp_path / "whole/cls.pt", tmp_path / "killed/cls.pt")


def test_a_killed_segmenter_goes_on_to_the_same_weights(run, toy, tmp_path):
    settings = ("--data", toy, "--masks", run[0] / "pseudo", *SEG)
    in_process(train_seg, *settings, "--run", tmp_path / "whole")
    kill_after("iteration 3", "train_seg.py", *settings, "--run", tmp_path / "killed")
    in_process(train_seg, *settings, "--run", tmp_path / "killed", "--resume")
    assert_same_weights(tmp_path / "whole/seg.pt", tmp_path / "killed/seg.pt")


def test_masks_are_skipped_not_mixed_and_overwritten_on_request(run, toy, tmp_path):
    here = shutil.copytree(run[0], tmp_path / "run")
    command = (make_pseudo, "--data", toy, "--run", here, "--workers", "0")
    written = masks(here / "pseudo")
    removed, kept = sorted(written)[:2]
    (here / "pseudo" / removed).unlink()
    Image.new("L", (96, 96)).save(here / "pseudo" / kept)
    in_process(*command)
    again = masks(here / "pseudo")
    assert again[removed] == written[removed] and again[kept] != written[kept]
    with pytest.raises(DataError, match="--overwrite"):
        in_process(*command, "--size", "128")
    in_process(*command, "--crf", "torch")  # who computes does not matter: nothing is refused
    in_process(*command, "--overwrite", "--crf", "none")
    assert masks(here / "bpm") == masks(run[0] / "bpm") and masks(here / "pseudo") == again
    in_process(*command, "--overwrite")
    assert masks(here / "pseudo") == written


# --- faster, and the same numbers ---------------------------------------------------------------

def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_cached_run_learns_the_same_weights(run, toy_copy, tmp_path):
    for name in ("first", "second"):  # the second one finds the cache
        in_process(train_cls, "--data", toy_copy, "--run", tmp_path / name, *CLS, "--cache")
        assert_same_weights(tmp_path / name / "cls.pt", run[0] / "cls.pt")
    assert len(list((toy_copy / "cache").glob("*.npy"))) == 2  # of train and of val


@pytest.mark.parametrize("flag, tolerance", [
    pytest.param("--compile", 1e-4, marks=needs_compiler), ("--amp", 2e-2)])
def test_compiled_and_bfloat16_runs_have_the_same_losses(flag, tolerance, toy, tmp_path):
    settings = ("--data", toy, "--batch-size", "4", "--epochs", "1", "--frozen-epochs", "0")
    in_process(train_cls, *settings, "--run", tmp_path / "plain", "--no-amp")
    in_process(train_cls, *settings, "--run", tmp_path / "fast", "--no-amp", flag)
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)
    fast, plain = (weights(tmp_path / name / "cls.pt") for name in ("fast", "plain"))
    assert not all(torch.equal(fast[key], value) for key, value in plain.items())  # it was used


# --- several ranks -----------------------------------------------------------------------------

def test_two_ranks_train_the_classifier_as_one_process_does(toy, tmp_path, script):
    settings = ("--data", toy, *CLS, "--dropout", "0", "--frozen-epochs", "1")
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


def test_two_ranks_write_the_masks_of_one_process(run, toy, tmp_path, script):
    flags = ("make_pseudo.py", "--data", toy, "--batch-size", "1")  # else other batches, other sums
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        (tmp_path / name).mkdir()
        shutil.copy(run[0] / "cls.pt", tmp_path / name)
        script(*launcher, *flags, "--run", tmp_path / name, env={"OMP_NUM_THREADS": "1"})
    for out in ("bpm", "pseudo"):
        assert masks(tmp_path / "two" / out) == masks(tmp_path / "one" / out)


def test_a_rank_that_dies_ends_the_job_with_its_message(toy_copy, tmp_path, script):
    ids = (toy_copy / "ImageSets/Segmentation/train.txt").read_text().split()
    (toy_copy / "JPEGImages" / f"{ids[7]}.jpg").write_bytes(b"no image")
    code, output = script(*TORCHRUN, "train_cls.py", "--data", toy_copy, "--run", tmp_path / "run",
                          *CLS, env={"OMP_NUM_THREADS": "1"}, check=False, timeout=90)
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(told) == 1 and f"{ids[7]}.jpg cannot be read" in told[0], output


# --- bad input ---------------------------------------------------------------------------------

def test_a_mistake_ends_with_one_line_and_no_traceback(toy_copy, tmp_path, script):
    victim = sorted((toy_copy / "JPEGImages").glob("train_*.jpg"))[5]
    victim.write_bytes(victim.read_bytes()[:1500])
    for arguments, words in (
            (("train_cls.py", "--data", tmp_path / "none", "--run", tmp_path), "none not found"),
            (("make_pseudo.py", "--data", toy_copy, "--run", tmp_path), "run train_cls.py first"),
            (("train_cls.py", "--data", toy_copy, "--run", tmp_path / "r", *CLS), victim.name)):
        code, output = script(*arguments, check=False)
        assert code == 1 and "Traceback" not in output, output
        assert len(output.strip().splitlines()) == 1 and words in output, output


def test_each_mistake_of_the_later_stages_is_named(run, toy, toy_copy, tmp_path):
    run = shutil.copytree(run[0], tmp_path / "run")
    where = ("--run", run, "--workers", "0", "--data")
    with pytest.raises(DataError, match="missing.txt not found"):
        in_process(evaluate, *where, toy, "--split", "missing")
    with pytest.raises(DataError, match="seg.pt not found: run train_seg.py first"):
        in_process(evaluate, "--data", toy, "--run", tmp_path / "empty")
    shutil.copy(run / "seg.pt", run / "cls.pt")
    with pytest.raises(DataError, match="no cls checkpoint but seg"):
        in_process(make_pseudo, *where, toy)
    name = "test_00000.png"
    for pixels, words in ((np.full((96, 96), 77), "value 77"), (np.zeros((90, 96)), "96x90")):
        Image.fromarray(pixels.astype(np.uint8)).save(run / "pred" / name)
        with pytest.raises(DataError, match=f"{name}.*{words}"):
            in_process(evaluate, "--data", toy, "--masks", run / "pred", "--split", "test")
    (toy_copy / "classes.txt").write_text("background\nbeetle\n")
    with pytest.raises(DataError, match="other classes"):
        in_process(evaluate, *where, toy_copy)
    shutil.rmtree(toy_copy / "SegmentationClass")
    (toy_copy / "classes.txt").write_text("\n".join(TOY_CLASSES))
    with pytest.raises(DataError, match="no ground truth"):
        in_process(evaluate, "--data", toy_copy, "--masks", run / "pred", "--split", "test")


def test_an_image_whose_training_mask_has_another_size(run, toy, tmp_path):
    bad = shutil.copytree(run[0] / "pseudo", tmp_path / "masks")
    for path in bad.glob("*.png"):
        Image.new("L", (90, 96)).save(path)
    with pytest.raises(DataError, match="is 90x96, its image 96x96"):
        in_process(train_seg, "--data", toy, "--run", tmp_path, "--masks", bad, *SEG)
