"""support/run.py: errors, flags, files, checkpoints, worker processes."""
import argparse
import errno
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch

import evaluate
import make_pseudo
import train_cls
import train_seg
from model import CPFCTE, ClassifierConfig
from support import run
from support.inference import load_model
from support.run import DataError, Flags, in_workers

STAGES = [train_cls, make_pseudo, train_seg, evaluate]


# --- errors ------------------------------------------------------------------------------------

def raiser(error):
    def main(args):
        raise error
    return main


MEMORY = "out of memory: lower --batch-size, --workers"
DISK = ("no space left: on the disk, or in shared memory (/dev/shm), which takes less with fewer "
        "--workers, and in a container more with --shm-size")
OPEN_FILES = "too many open files: lower --workers, or raise the limit, as with ulimit -n 4096"


@pytest.mark.parametrize("error, message", [  # as Python, torch and a DataLoader's worker tell it
    (DataError("a.jpg cannot be read"), "a.jpg cannot be read"),
    (OSError(errno.ENOSPC, "No space left on device", "a.txt"),
     "[Errno 28] No space left on device: 'a.txt'"),
    (OSError(errno.ENOSPC, "No space left on device"), DISK),
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space"), DISK),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
     "a worker process died (no memory?): call again, with fewer --workers"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MEMORY),
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
    with pytest.raises(SystemExit) as caught:
        run.launch(raiser(error), argparse.Namespace(batch_size=1, workers=1))
    assert caught.value.code == f"error: {message}"  # Python prints it and exits with code 1


def test_an_error_of_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run.launch(raiser(RuntimeError("shapes do not match")), None)


# --- flags -------------------------------------------------------------------------------------

@pytest.fixture
def flags():
    flags = Flags("What it does.")
    flags.add("--data", None, "the data", type=Path)
    flags.add("--preset", None, "the preset", choices=run.PRESETS)
    flags.add("--lr", 0.1, "the rate", toy=0.7, high=1)
    flags.add("--epochs", 50, "the passes", coco=30, toy=6, low=1)
    flags.add("--flip", True, "turn over", toy=False)
    flags.add("--scales", [1.0, 0.5], "the scales", nargs="+", low=0.1)
    return flags


@pytest.mark.parametrize("preset, lr, epochs, flip", [
    ("voc", 0.1, 50, True), ("coco", 0.1, 30, True), ("toy", 0.7, 6, False)])
def test_each_preset_has_its_defaults_and_flags_win(flags, preset, lr, epochs, flip):
    args = flags.parse(["--preset", preset], needed=())
    assert (args.preset, args.lr, args.epochs, args.flip) == (preset, lr, epochs, flip)
    args = flags.parse(["--preset", preset, "--epochs", "9", "--flip", "--scales", "2"], needed=())
    assert (args.lr, args.epochs, args.flip, args.scales) == (lr, 9, True, [2.0])
    assert not flags.parse(["--preset", preset, "--no-flip"], needed=()).flip


def test_the_preset_is_what_the_data_set_names_unless_it_is_given(flags, tmp_path):
    where = ["--data", str(tmp_path)]
    assert flags.parse(where, needed=()).preset == "voc"
    (tmp_path / "preset.txt").write_text("coco\n")
    assert flags.parse(where, needed=()).epochs == 30
    assert flags.parse([*where, "--preset", "toy"], needed=()).epochs == 6


@pytest.mark.parametrize("stage, words", [
    (train_cls, "SIZE x SIZE (default 384, toy 96, voc-small 224, photo 448)"),
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
    assert stage.__doc__.splitlines()[0] in shown


@pytest.mark.parametrize("preset, values", [
    ("voc", ("trainaug", 384, 50, 16, 1e-3, 6)), ("coco", ("train", 384, 50, 16, 1e-3, 6)),
    ("toy", ("train", 96, 6, 16, 1e-3, 12)), ("voc-small", ("train", 224, 12, 16, 1e-3, 6)),
    ("photo", ("train", 448, 1, 16, 1e-3, 50))])
def test_the_recipe_of_stage_1(tmp_path, preset, values):
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").touch()
    args = train_cls.parse_args(["--data", str(tmp_path), "--run", "r", "--preset", preset])
    assert values == (args.train_split, args.size, args.epochs, args.batch_size, args.lr,
                      args.top_k)


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

def test_atomic_replaces_a_file_only_when_its_block_succeeds(tmp_path):
    path = tmp_path / "new/a.txt"
    run.write_lines(path, ["old"])
    with pytest.raises(ZeroDivisionError), run.atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old\n"
        1 / 0
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"] and path.read_text() == "old\n"
    with run.atomic(path) as temporary:
        temporary.write_text("whole")
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"] and path.read_text() == "whole"


def test_a_line_on_the_screen_is_a_line_in_the_log(tmp_path, capsys):
    run.log(tmp_path, "stage", epoch=1, loss=0.123456, val_map=None)
    run.log(tmp_path, "stage", epoch=2, loss=1e-9, val_map=0.5)
    assert capsys.readouterr().out.splitlines() == [
        "stage  epoch 1  loss 0.1235  val_map None", "stage  epoch 2  loss 1e-09  val_map 0.5"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0] == dict(stage="stage", epoch=1, loss=0.123456, val_map=None)
    assert lines[1]["loss"] == 1e-9


def test_progress_is_silent_without_a_terminal(capsys):
    assert list(run.progress(range(5), "five", 5)) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err.strip("\r\n ") == ""


# --- checkpoints -------------------------------------------------------------------------------

def test_a_checkpoint_rebuilds_its_model(tmp_path):
    torch.manual_seed(0)
    model = CPFCTE(ClassifierConfig(5, "vit_toy", class_tokens="append")).eval()
    args = train_cls.parse_args(["--data", "x", "--run", str(tmp_path)])
    run.save_checkpoint(tmp_path / "cls.pt", "cls", model, args, classes=["background", "a"],
                        ids=["1"], labels="f00", epoch=1, optimizer={})
    again, checkpoint = load_model(tmp_path / "cls.pt", "cls")
    images = torch.rand(1, 3, 96, 96)
    assert again.config == model.config and torch.equal(again(images), model(images))
    assert checkpoint["args"]["run"] == str(tmp_path)
    assert checkpoint["classes"] == ["background", "a"] and not again.training


def test_the_mean_loss_ends_a_run_whose_numbers_are_not_finite(tmp_path):
    model = torch.nn.Linear(2, 1)
    told = dict(model=model, where="in epoch 3", path=tmp_path / "cls.pt")
    assert run.mean_loss(torch.tensor(6.0), 4, 1, **told) == 1.5
    with pytest.raises(DataError, match="loss inf .*in epoch 3: lower --lr; .*cls.pt"):
        run.mean_loss(torch.tensor(math.inf), 4, 1, **told)
    model.weight.data[0, 0] = math.nan
    with pytest.raises(DataError, match="weights .*not finite in epoch 3"):
        run.mean_loss(torch.tensor(6.0), 4, 1, **told)


# --- worker processes --------------------------------------------------------------------------

@pytest.fixture
def time_limit():
    """A test that hangs fails after a minute."""
    def expire(*_):
        raise TimeoutError("no result within a minute")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_come_in_the_order_of_their_jobs(workers, time_limit):
    jobs = ((number, 2) for number in range(40))
    assert list(in_workers(pow, jobs, workers)) == [number ** 2 for number in range(40)]
    assert list(in_workers(pow, [], workers)) == []


def test_few_jobs_are_drawn_ahead_of_their_results(time_limit):
    drawn = []
    results = in_workers(abs, ((drawn.append(n) or n,) for n in range(1000)), 2)
    assert next(results) == 0 and len(drawn) < 20


def killed(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_worker_is_an_error_and_no_hang(time_limit):
    with pytest.raises(RuntimeError, match="DataLoader worker .*(exited|killed)"):
        list(in_workers(killed, ((number,) for number in range(20)), 2))


def broken(name):
    raise DataError(f"{name} cannot be read: replace it")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_a_worker_is_told_in_its_one_line(workers, time_limit):
    with pytest.raises(DataError) as caught:
        list(in_workers(broken, [("a.jpg",)], workers))
    assert str(caught.value) == "a.jpg cannot be read: replace it"


def test_a_mistake_in_the_making_of_jobs_is_told_too(time_limit):
    def jobs():
        yield 1,
        broken("b.jpg")

    with pytest.raises(DataError, match="b.jpg cannot be read"):
        list(in_workers(abs, jobs(), 1))


# --- compiled networks -------------------------------------------------------------------------

def test_compile_without_a_compiler_names_the_way_out(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DataError, match="leave the flag out"):
        run.prepare(torch.nn.Linear(1, 1), argparse.Namespace(compile=True), 1)
