"""support/run.py: errors, flags, files, checkpoints, folders of masks, worker processes."""
import argparse
import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

import evaluate
import make_pseudo
import train_cls
import train_seg
from conftest import needs_compiler
from model import CPFCTE, ClassifierConfig, DeepLabv2, SegmenterConfig
from support import run
from support.inference import load_model
from support.run import DataError, Flags, in_workers

STAGES = [train_cls, make_pseudo, train_seg, evaluate]


# --- errors ------------------------------------------------------------------------------------

def raiser(error):
    def main(args):
        raise error
    return main


@pytest.mark.parametrize("error, message", [
    (DataError("a.jpg cannot be read"), "error: a.jpg cannot be read"),
    (OSError(28, "No space left on device", "a.txt"),
     "error: [Errno 28] No space left on device: 'a.txt'"),
    (OSError(28, "No space left on device"),
     "error: no space left: on the disk, or in shared memory (/dev/shm), which takes less "
     "with fewer --workers, and in a container more with --shm-size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
     "error: a worker process died (no memory?): call again, with fewer --workers")])
def test_a_mistake_ends_in_one_line_and_code_1(error, message):
    with pytest.raises(SystemExit) as caught:
        run.launch(raiser(error), None)
    assert caught.value.code == message  # Python prints it and exits with code 1


def test_an_error_of_the_code_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        run.launch(raiser(RuntimeError("shapes do not match")), None)


def test_an_interrupt_ends_at_once_with_code_130(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    run.launch(raiser(KeyboardInterrupt()), None)
    assert codes == [130] and capsys.readouterr().err == "interrupted: what is written stays\n"


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
    (tmp_path / "preset.txt").write_text("imagenet\n")
    with pytest.raises(SystemExit) as caught:
        flags.parse(where, needed=())
    assert caught.value.code == 2


def test_help_shows_the_default_of_every_preset(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        flags.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for words in ("the rate (default 0.1, toy 0.7)", "the passes (default 50, coco 30, toy 6)",
                  "turn over (default True, toy False)",
                  "the scales (default [1.0, 0.5])"):
        assert words in shown


@pytest.mark.parametrize("stage, words", [
    (train_cls, "SIZE x SIZE (default 384, toy 96, voc-small 224, photo 448)"),
    (make_pseudo, "960 for 384 (default 2.5, toy 1.0, photo 1.0)"),
    (make_pseudo, "deviation in pixels (default 67.0, toy 30.0, photo 80.0)"),
    (train_seg, "ends there (default 20000, coco 100000, toy 1500, voc-small 1500, photo 1200)"),
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
def test_voc_without_sbd_trains_on_train(tmp_path, stage, name):
    where = ["--data", str(tmp_path), "--run", str(tmp_path)]
    assert getattr(stage.parse_args(where), name) == "train"
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").touch()
    assert getattr(stage.parse_args(where), name) == "trainaug"
    given = [*where, f"--{name.replace('_', '-')}", "val"]
    assert getattr(stage.parse_args(given), name) == "val"


@pytest.mark.parametrize("stage, words, told", [
    (train_cls, "--epochs 0", "whole number from 1 to"), (train_cls, "--epochs 2.5", "--epochs"),
    (train_cls, "--lr nan", "number from 1e-09 to 10"), (train_cls, "--dropout 1", "--dropout"),
    (train_cls, "--seed -1", "--seed"), (train_cls, "--augment blur", "blur"),
    (train_cls, "--preset imagenet", "imagenet"),
    (make_pseudo, "--size-ratio inf", "--size-ratio"), (make_pseudo, "--size 0", "--size"),
    (make_pseudo, "--crf-sxy 0", "--crf-sxy"), (make_pseudo, "--crf-srgb -3", "--crf-srgb"),
    (make_pseudo, "--crf-srgb x", "--crf-srgb"), (make_pseudo, "--crf cuda", "--crf"),
    (train_seg, "--rescale 1.5 0.5", "the smaller number comes first"),
    (train_seg, "--scales 0", "--scales"), (train_seg, "--workers -1", "--workers"),
    (evaluate, "--export --masks m", "leave --masks and --image out"),
    (evaluate, "--image a.png --out a.png", "not the photo's own"),
    (evaluate, "--image a.jpg", "--image needs --run, and --out")])
def test_a_flag_out_of_its_range_is_refused_by_argparse(stage, words, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        stage.parse_args(["--data", str(tmp_path), "--run", str(tmp_path), *words.split()])
    assert caught.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


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


def test_text_is_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "a.txt"
    for content in ("käfer\n".encode(), b"\xef\xbb\xbf" + "käfer\n".encode()):
        path.write_bytes(content)
        assert run.read_text(path) == "käfer\n"
    path.write_bytes("käfer\n".encode("latin-1"))
    with pytest.raises(DataError, match="a.txt is no UTF-8 text"):
        run.read_text(path)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    run.open_run(tmp_path / "a/b")
    assert (tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="--run .*file is no folder"):
        run.open_run(tmp_path / "file")


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

def tiny(**kwargs):
    torch.manual_seed(0)
    return CPFCTE(ClassifierConfig(5, "vit_toy", **kwargs)).eval()


@pytest.fixture
def saved(tmp_path):
    """The arguments of a run of stage 1 with its cls.pt, and the facts that are noted there."""
    args = train_cls.parse_args(["--data", "x", "--run", str(tmp_path), "--resume"])
    facts = dict(classes=["background", "a"], ids=["1"], labels="f00")
    run.save_checkpoint(tmp_path / "cls.pt", "cls", tiny(class_tokens="append"), args, **facts,
                        epoch=1, optimizer={})
    return args, facts


def test_a_checkpoint_rebuilds_its_model(saved, tmp_path):
    again, checkpoint = load_model(tmp_path / "cls.pt", "cls")
    model, images = tiny(class_tokens="append"), torch.rand(1, 3, 96, 96)
    assert again.config == model.config and torch.equal(again(images), model(images))
    assert checkpoint["args"]["run"] == str(tmp_path)
    assert checkpoint["classes"] == saved[1]["classes"] and not again.training


def test_what_is_wrong_with_a_checkpoint_is_named(saved, tmp_path):
    path = tmp_path / "cls.pt"
    with pytest.raises(DataError, match="seg.pt not found: run train_seg.py first"):
        run.load_checkpoint(tmp_path / "seg.pt", "seg")
    with pytest.raises(DataError, match="no seg checkpoint but cls"):
        run.load_checkpoint(path, "seg")
    content = torch.load(path, weights_only=True)
    content.pop("optimizer")
    torch.save(content, path)
    with pytest.raises(DataError, match="cls.pt is without .'optimizer'.: run train_cls.py"):
        run.load_checkpoint(path, "cls")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="not a readable checkpoint"):
        run.load_checkpoint(path, "cls")


def test_a_checkpoint_goes_on_only_as_it_began(saved, tmp_path):
    args, facts = saved

    def opened(facts=facts, **changed):
        now = argparse.Namespace(**vars(args) | changed)
        return run.open_checkpoint(now, "cls", 9, **facts)

    path, checkpoint = opened()
    assert path == tmp_path / "cls.pt" and checkpoint["epoch"] == 1
    assert opened(workers=7, amp=True, data=Path("elsewhere"))[1]["epoch"] == 1
    with pytest.raises(DataError, match="made with --top-k 6, now it is 7: choose another --run"):
        opened(top_k=7)
    with pytest.raises(DataError, match="made with other labels"):
        opened(facts | dict(labels="f01"))
    with pytest.raises(DataError, match="exists: --resume goes on, --overwrite starts anew"):
        opened(resume=False)
    assert opened(overwrite=True, top_k=7) == (path, None)
    assert opened(run=tmp_path / "new") == (tmp_path / "new/cls.pt", None)


def test_a_state_that_does_not_fit_is_named(tmp_path):
    other = dict(model=tiny(context="raster").state_dict())
    with pytest.raises(DataError, match="cls.pt does not fit .*: train anew") as caught:
        run.restore(tmp_path / "cls.pt", other, model=tiny())
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(saved, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("unexpected pos 64 vs 0")

    before = (tmp_path / "cls.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DataError, match="cls.pt cannot be written .is the disk full"):
        run.save_checkpoint(tmp_path / "cls.pt", "cls", tiny(), saved[0])
    assert (tmp_path / "cls.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cls.pt"]


def test_the_mean_loss_ends_a_run_whose_numbers_are_not_finite(tmp_path):
    model = torch.nn.Linear(2, 1)
    told = dict(model=model, where="in epoch 3", path=tmp_path / "cls.pt")
    assert run.mean_loss(torch.tensor(6.0), 4, 1, **told) == 1.5
    with pytest.raises(DataError, match="loss inf .*in epoch 3: lower --lr; .*cls.pt"):
        run.mean_loss(torch.tensor(math.inf), 4, 1, **told)
    model.weight.data[0, 0] = math.nan
    with pytest.raises(DataError, match="weights .*not finite in epoch 3"):
        run.mean_loss(torch.tensor(6.0), 4, 1, **told)


# --- folders of masks --------------------------------------------------------------------------

def test_a_folder_of_masks_is_claimed_with_the_first_result(tmp_path):
    old, new = dict(crf=False), dict(crf=True)
    run.check_masks(tmp_path / "none", new)  # nothing is there, nothing is mixed
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="--overwrite"):
        run.check_masks(tmp_path, new)  # nobody knows how a.png was made
    assert list(run.claimed(iter("xyz"), {tmp_path: old}, False)) == ["x", "y", "z"]
    assert run.read_settings(tmp_path) == old and (tmp_path / "a.png").exists()
    run.check_masks(tmp_path, old)
    with pytest.raises(DataError, match="other data, labels, weights or flags"):
        run.check_masks(tmp_path, new)

    def broken():
        raise DataError("the first image is damaged")
        yield

    with pytest.raises(DataError, match="damaged"):
        list(run.claimed(broken(), {tmp_path: new}, True))
    assert (tmp_path / "a.png").exists() and run.read_settings(tmp_path) == old
    results = run.claimed(iter("xyz"), {tmp_path: new}, True)
    assert next(results) == "x"
    assert not (tmp_path / "a.png").exists() and run.read_settings(tmp_path) == new


def test_a_folder_is_claimed_where_nothing_is_left_to_do(tmp_path):
    assert list(run.claimed(iter(()), {tmp_path / "m": dict(a=1)}, False)) == []
    assert run.read_settings(tmp_path / "m") == dict(a=1)


@pytest.mark.parametrize("content", ["{", "3", "[1]"])
def test_a_damaged_note_is_named(tmp_path, content):
    assert run.read_settings(tmp_path) == {}
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(DataError, match="settings.json is damaged"):
        run.read_settings(tmp_path)


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

COMPILED = argparse.Namespace(compile=True)


@needs_compiler
def test_a_compiled_cnn_gives_the_same_logits_and_gradients(monkeypatch):
    # without inductor's C++, which takes a minute; test_chain.py trains with --compile as it is
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.manual_seed(0)
    model = DeepLabv2(SegmenterConfig(4, "resnet_toy", scales=(1.0,)))
    images = torch.rand(2, 3, 64, 64)

    def results(network):
        model.zero_grad()
        logits = network(images)[-1]
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = results(model)
    counters = pytest.importorskip("torch._dynamo").utils.counters
    counters.clear()
    names = list(model.state_dict())
    compiled = results(run.prepare(model, COMPILED, 1))
    assert counters["stats"]["unique_graphs"] > 0  # it was compiled
    assert list(model.state_dict()) == names  # a checkpoint does not depend on it
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item())


def test_compile_without_a_compiler_names_the_way_out(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DataError, match="leave the flag out"):
        run.prepare(torch.nn.Linear(1, 1), COMPILED, 1)


def test_one_plain_process_trains_the_model_itself():
    model = torch.nn.Linear(1, 1)
    assert run.prepare(model, argparse.Namespace(compile=False), 1) is model
