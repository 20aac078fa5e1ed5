"""support/: errors, flags, files, checkpoints, worker processes."""
import argparse
import errno
import json
import math
import os
import signal

import pytest
import torch

import evaluate
import make_pseudo
import train_cls
import train_seg
from conftest import classifier
from support.checkpoints import finite_mean_loss, save_checkpoint
from support.files import UserError, log
from support.inference import load_model
from support.processes import map_in_workers, launch

STAGES = [train_cls, make_pseudo, train_seg, evaluate]


# --- errors ------------------------------------------------------------------------------------

MEMORY = "out of memory: lower --batch-size, --workers"
DISK = ("no space left: on the disk, or in shared memory (/dev/shm), which takes less with fewer "
        "--workers, and in a container more with --shm-size")
OPEN_FILES = "too many open files: lower --workers, or raise the limit, as with ulimit -n 4096"


@pytest.mark.parametrize("error, message", [  # as Python, torch and a DataLoader's worker tell it
    (UserError("a.jpg cannot be read"), "a.jpg cannot be read"),
    (OSError(errno.ENOSPC, "No space left on device", "a.txt"),
     "[Errno 28] No space left on device: 'a.txt'"),
    (OSError(errno.ENOSPC, "No space left on device"), DISK),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space"), DISK),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
     "a worker process died (no memory?): call again, with fewer --workers"),
    (RuntimeError("CUDA error: out of memory"), MEMORY),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                  "allocate memory: you tried to allocate 1 bytes."), MEMORY),
    (MemoryError(), MEMORY),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), MEMORY),
    (MemoryError("Caught MemoryError in DataLoader worker process 0.\nTrace"), MEMORY),
    (RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0."), MEMORY),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), OPEN_FILES),
    (RuntimeError("received 0 items of ancdata: Too many open files"), OPEN_FILES)],
    ids=lambda value: str(value)[:40])
def test_a_mistake_or_a_lack_ends_in_one_line_and_code_1(error, message):
    def main(args):
        raise error
    with pytest.raises(SystemExit) as caught:
        launch(main, argparse.Namespace(batch_size=1, workers=1))
    assert caught.value.code == f"error: {message}"  # Python prints it and exits with code 1


def test_an_error_of_the_code_keeps_its_traceback():
    def main(args):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):
        launch(main, None)


# --- flags -------------------------------------------------------------------------------------

def test_a_preset_is_named_by_the_data_set_or_given_and_flags_win(tmp_path):
    where = ["--data", str(tmp_path), "--run", str(tmp_path)]
    assert train_cls.parse_args(where).preset == "voc"
    (tmp_path / "preset.txt").write_text("toy\n")
    args = train_cls.parse_args([*where, "--epochs", "9", "--pretrained", "--augment", "vflip"])
    assert (args.preset, args.size, args.epochs) == ("toy", 96, 9)
    assert args.pretrained and args.augment == ["vflip"]
    args = train_cls.parse_args([*where, "--preset", "coco", "--no-pretrained"])
    assert (args.preset, args.size, args.pretrained) == ("coco", 384, False)


@pytest.mark.parametrize("stage, words", [
    (train_cls, "SIZE x SIZE (default 384, toy 96, voc-small 224, photo 448)"),
    (train_cls, "DATA has no trainaug (default trainaug, voc-small train, photo train)"),
    (train_cls, "passes over the training images (default 50, toy 6, voc-small 12, photo 1)"),
    (train_cls, "all patches is average pooling (default 6, toy 12, photo 50)"),
    (make_pseudo, "960 for 384 (default 2.5, toy 1.0, photo 1.0)"),
    (make_pseudo, "deviation in pixels (default 67.0, toy 30.0, photo 80.0)"),
    (train_seg, "ends there (default 20000, coco 100000, toy 1500, voc-small 1500, photo 1200)"),
    (train_seg, "keep the batch norms of the ImageNet weights (default True, toy False)"),
    (train_seg, "is the reference (default [1.0, 0.75, 0.5], toy [1.0]"),
    (evaluate, "split to predict and score (default val, toy test)")])
def test_help_of_every_stage_shows_its_presets(stage, words, capsys):
    with pytest.raises(SystemExit) as caught:
        stage.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0 and words in shown


@pytest.mark.parametrize("stage, name", [
    (train_cls, "train_split"), (make_pseudo, "split"), (train_seg, "train_split")])
def test_voc_trains_on_trainaug_by_either_name_and_without_sbd_on_train(tmp_path, stage, name):
    where = ["--data", str(tmp_path), "--run", str(tmp_path)]
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    assert getattr(stage.parse_args(where), name) == "train"
    for split in ("train_aug", "trainaug"):  # the field's name, and ours
        (lists / f"{split}.txt").touch()
        assert getattr(stage.parse_args(where), name) == split
    given = [*where, f"--{name.replace('_', '-')}", "val"]
    assert getattr(stage.parse_args(given), name) == "val"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_its_folders_says_which(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        stage.parse_args(["--data", "x"])
    assert caught.value.code == 2 and "--run" in capsys.readouterr().err.splitlines()[-1]


# --- files -------------------------------------------------------------------------------------

def test_a_line_on_the_screen_is_a_line_in_the_log(tmp_path, capsys):
    log(tmp_path, "stage", epoch=1, loss=0.123456, val_map=None)
    log(tmp_path, "stage", epoch=2, loss=1e-9, val_map=0.5)
    assert capsys.readouterr().out.splitlines() == [
        "stage  epoch 1  loss 0.1235  val_map None", "stage  epoch 2  loss 1e-09  val_map 0.5"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0] == dict(stage="stage", epoch=1, loss=0.123456, val_map=None)


# --- checkpoints -------------------------------------------------------------------------------

def test_a_checkpoint_rebuilds_its_model(tmp_path):
    model = classifier(class_tokens="append")
    args = train_cls.parse_args(["--data", "x", "--run", str(tmp_path)])
    save_checkpoint(tmp_path / "cls.pt", "cls", model, args, classes=["background", "a"],
                        ids=["1"], labels="f00", epoch=1, optimizer={})
    again, checkpoint = load_model(tmp_path / "cls.pt", "cls")
    images = torch.rand(1, 3, 96, 96)
    assert again.config == model.config and torch.equal(again(images), model(images))
    assert checkpoint["args"]["run"] == str(tmp_path)
    assert checkpoint["classes"] == ["background", "a"] and not again.training


def test_weights_that_are_not_finite_end_a_run_though_its_loss_is(tmp_path):
    model = torch.nn.Linear(2, 1)
    told = dict(model=model, where="in epoch 3", path=tmp_path / "cls.pt")
    assert finite_mean_loss(torch.tensor(6.0), 4, 1, **told) == 1.5
    model.weight.data[0, 0] = math.nan
    with pytest.raises(UserError, match="weights .*not finite in epoch 3"):
        finite_mean_loss(torch.tensor(6.0), 4, 1, **told)


# --- worker processes; test_hostile.py has mistakes in them ------------------------------------

@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_the_order_of_their_jobs(workers):
    jobs = ((number, 2) for number in range(40))
    assert list(map_in_workers(pow, jobs, workers)) == [number ** 2 for number in range(40)]
    assert list(map_in_workers(pow, [], workers)) == []


def test_few_jobs_are_drawn_ahead_of_their_results():
    drawn = []
    results = map_in_workers(abs, ((drawn.append(n) or n,) for n in range(1000)), 2)
    assert next(results) == 0 and len(drawn) < 20


def killed(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_an_error_and_no_hang():
    with pytest.raises(RuntimeError, match="DataLoader worker .*(exited|killed)"):
        list(map_in_workers(killed, ((number,) for number in range(20)), 2))
