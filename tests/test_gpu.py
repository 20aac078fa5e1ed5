"""extras/gpu.py and its parts on the CPU at toy sizes: what they do, not how fast it is."""
import re
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import agree
import bench
import data
import gpu
import meter
import model
import train_seg
from support import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu runs the parts there")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the parts work: textures of three files under 48 names."""
    folder = tmp_path_factory.mktemp("gpu")
    args = bench.parse_args(["--quick"])
    args.photo = (80, 60)
    bench.make_textures(args, folder / "data", "toy", 3, {"train": 48, "few": 16, "val": 8})
    return folder


@pytest.fixture
def args(folder, tmp_path, monkeypatch):
    """What a part is given: one step to warm up, two to time, one to profile."""
    monkeypatch.setattr(meter, "STEPS", {True: (1, 2, 1)})
    args = bench.parse_args(["--quick", "--out", str(tmp_path / "rows.md")])
    vars(args).update(folder=folder, device=torch.device("cpu"), ceiling=1.0)
    return args


def rows(path):
    """The cells of a table's rows."""
    return [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in path.read_text().splitlines() if line.startswith("| ")]


# --- the images --------------------------------------------------------------------------------

def test_textures_are_a_data_set_of_few_files_under_many_names(folder):
    found = data.Folder(folder / "data")
    assert len(found.ids("train")) == 48 and found.ids("few") == [str(i) for i in range(16)]
    for index in (0, 2, 47):
        image = data.read_image(found.image_path(str(index)))
        mask = data.read_mask(found.mask_path(str(index)), len(found.classes), image.size)
        assert found.image_labels(str(index)).nonzero().flatten().tolist() == sorted(
            {0, *np.unique(mask).tolist()})
        assert Image.open(found.image_path(str(index % 3))).tobytes() == image.tobytes()
    files = [path for path in (folder / "data/JPEGImages").iterdir() if not path.is_symlink()]
    assert len(files) == 3 and len({path.read_bytes() for path in files}) == 3


# --- the meter ---------------------------------------------------------------------------------

def test_intervals_that_overlap_count_once():
    assert meter.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4 and meter.covered([]) == 0


def test_the_meter_counts_times_profiles_and_ends_a_loop(args):
    seen, steps, matrix = {}, [], torch.rand(64, 32)
    clock = mock.Mock(side_effect=[0, 10, 100, 1100])  # around two steps, around the profiled one
    with mock.patch("time.perf_counter", clock), pytest.raises(meter.Enough):
        for step in meter.meter(args, seen, 3, range(99), "a name", total=99):
            steps.append(step)
            matrix.T @ matrix
    assert steps == list(range(1 + 3 + 2 + 1))
    assert args.flops == 2 * 32 * 64 * 32  # of one step
    assert seen["seconds"] == 5 and 0.999 < seen["idle"] < 1


def test_a_stage_that_fails_is_a_row_that_says_so(args):
    meter.measure(args, "stage 3", "", train_seg, "--train-split nobody --overwrite")
    assert rows(args.out)[0][2] == "nan" and "nobody.txt not found" in rows(args.out)[0][4]


@pytest.mark.parametrize("context", ["hv", "raster"])
def test_lstms_in_bfloat16_are_those_in_float32_up_to_rounding(context):
    torch.manual_seed(0)
    fusion, tokens = model.CONTEXTS[context](16, 0.0), torch.randn(2, 3, 4, 16)
    exact = fusion(tokens)
    with meter.lstms_in_bfloat16():
        rounded = fusion(tokens)
    rounded.sum().backward()
    assert {p.grad.dtype for lstm in fusion.lstms for p in lstm.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0)
    assert (rounded - exact).abs().max() > 1e-4


# --- the parts ---------------------------------------------------------------------------------

def test_the_cpu_agrees_with_itself_in_float32_and_roughly_in_bfloat16(args):
    with mock.patch("torch.nn.functional.dropout", wraps=torch.nn.functional.dropout) as dropout:
        agree.equal(args)
    assert {call.args[1] for call in dropout.call_args_list} == {0.0}  # devices draw differently
    found = {(part, setting): (float(value), note)
             for part, setting, value, _, note in rows(args.out)}
    for part in ("stage 1, CPU and GPU", "stage 3, CPU and GPU"):
        assert found[part, "float32"][0] == 0 and found[part, "float32"][1].endswith("by 0 %")
        assert 0 < found[part, "bfloat16"][0] < 0.05
    assert found["CRF, CPU and GPU", "9 labels"][0] == 100


def test_equal_runs_and_an_interrupted_one_are_compared(args, monkeypatch):
    agree.repeat(args)
    assert [row[:3] for row in rows(args.out)] == [
        [stage, what, "0"] for stage in ("stage 1", "stage 3")
        for what in ("two equal runs", "interrupted, resumed")]
    saved = iter(2 * [[0, 0, 0, 0], [0, 0, 0, 0.5], [-2, 0, 0.5, 1]])
    monkeypatch.setattr(agree, "call", lambda *_: None)
    monkeypatch.setattr(run, "load_checkpoint",
                        lambda *_: dict(model=dict(w=torch.tensor(next(saved), dtype=float))))
    args.rows.clear()
    agree.repeat(args)
    assert [row[2::2] for row in rows(args.out)] == 2 * [
        ["0.5", "25 % of the weights differ"], ["2", "75 % of the weights differ"]]


def test_the_tests_are_run_with_cuda_visible(args, monkeypatch):
    def call(words, *, cwd, env, stdout, stderr):
        assert words[1:4] == ["-m", "pytest", "-v"] and (cwd / words[4] / "test_gpu.py").is_file()
        stdout.write(f"...\n=== 3 failed on {env['CUDA_VISIBLE_DEVICES']} ===\n")
        return 1
    monkeypatch.setattr("subprocess.call", call)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    agree.tests(args)
    assert rows(args.out) == [["tests", "CUDA visible", "1", "exit code", "3 failed on 0"]]


def test_every_stage_is_measured_as_it_is(args, monkeypatch):
    settings = ("hv", "hv, LSTM in bfloat16")
    monkeypatch.setattr(gpu, "STAGE_1", {name: gpu.STAGE_1[name] + " --batch-size 4"
                                         for name in settings})
    for part in ("stage1", "stage2", "stage3", "stage4"):
        gpu.PARTS[part](args)
    found = rows(args.out)
    assert [row[:2] for row in found] == [["stage 1", name] for name in settings] + [
        ["stage 2", "CRF"], ["stage 3", "96x96"], ["stage 4", "CRF"], ["stage 4", "no CRF"]]
    assert [row[3] for row in found] == [
        "images/s", "images/s", "ms/image", "ms/step", "ms/image", "ms/image"]
    flops = [float(re.search(r"workers, (\S+) TFLOP/s", row[4])[1]) for row in found]
    assert all(float(row[2]) > 0 for row in found) and min(flops) > 0


# --- the whole ---------------------------------------------------------------------------------

def test_the_report_by_hand(tmp_path):
    head = ["torch, a GPU", "", "| part | setting | median | unit | |", "|---|---|---|---|---|"]
    run.write_lines(tmp_path / "stage1.md", [*head, "| stage 1 | hv | 1600 | images/s | |",
                                             "| stage 1 | hv, frozen | 3200 | images/s | |"])
    run.write_lines(tmp_path / "stage2.md", [*head, "| stage 2 | CRF | 30 | ms/image | |"])
    run.write_lines(tmp_path / "stage3.md", [*head, "| stage 3 | 321x321 | 33 | ms/step | |"])
    gpu.report(tmp_path, True)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    minutes = {"stage 1": 10582 * (2 / 3200 + 48 / 1600) / 60, "stage 2": 10582 * 0.030 / 60,
               "stage 3": 20000 * 0.033 / 60, "stage 4": np.nan, "all stages": np.nan}
    table = [f"| {stage} | {value:.3g} |" for stage, value in minutes.items()]
    assert lines[lines.index("| stage | minutes |") + 2:][:5] == table
    missed = [line for line in lines if line.startswith("- ")]
    assert "- missed: stage 2, CRF: 30, the goal is <= 25" in missed
    assert "- missed: stage 4, the paper: nan, the goal is <= 2" in missed
    assert not any("stage 1" in line or "stage 3" in line for line in missed)
    gpu.report(tmp_path, False)
    assert (tmp_path / "gpu.md").read_text().splitlines() == lines[:lines.index(table[0]) - 4]


def test_a_part_makes_its_data_and_leaves_its_rows_and_the_report(tmp_path, monkeypatch):
    def part(args):
        found = data.Folder(args.folder / "data")
        bench.row(args, "images", args.folder.name, len(found.ids("few")), "", "of the split")
    monkeypatch.setattr(gpu, "PARTS", {"one": part})
    gpu.main(gpu.parse_args(["--only", "one", "--out", str(tmp_path)]))
    assert [row[:3] for row in rows(tmp_path / "toy/one.md")[1:]] == [
        ["matrix product", "2048x2048", mock.ANY], ["images", "toy", "32"]]
    assert "| images | toy | 32 |" in (tmp_path / "toy/gpu.md").read_text()


def test_a_part_that_takes_too_long_is_ended_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PARTS", {"bench": None, "stage3": None, "tests": None})
    monkeypatch.setattr(gpu, "LIMIT", 0.2)
    gpu.main(gpu.parse_args(["--out", str(tmp_path)]))
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("bench was ended after 0.2 s") and second.startswith("stage3 was ended")
    assert last.startswith("no GPU: ") and (tmp_path / "toy/gpu.md").is_file()
