"""extras/bench.py on the CPU at toy sizes: what it does, not how fast it is."""
from unittest import mock

import numpy as np
import pytest
import torch

import bench
import data
from support import files
from support.masks import read_image, read_mask

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu runs the parts there")


def rows(text):
    """{(part, setting): (value, unit, note)} of a table."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in text.splitlines() if line.startswith("| ")][1:]
    return {(part, setting): (float(value), *rest) for part, setting, value, *rest in lines}


@pytest.fixture
def once(monkeypatch):
    """What is timed runs once; stage 1 has two settings."""
    monkeypatch.setattr(bench, "milliseconds", lambda function: [function(), 1][1])
    monkeypatch.setattr(bench, "STAGE_1", {"hv": "", "none": "--context none"})


def textures(root, number):
    """(data set folder, arguments of bench.py --quick)."""
    args = bench.parse_args(["--quick"])
    bench.make_textures(args, root / "data", {"train": number, "few": 2})
    return data.Folder(root / "data"), args


def test_textures_are_a_data_set(tmp_path):
    folder, _ = textures(tmp_path, 5)
    assert folder.ids("few") == ["0", "1"] and len(folder.ids("train")) == 5
    for image_id in folder.ids("train"):
        image = read_image(folder.image_path(image_id))
        mask = read_mask(folder.mask_path(image_id), len(folder.classes), image.size)
        assert folder.image_labels(image_id).nonzero().flatten().tolist() == sorted(
            {0, *np.unique(mask).tolist()})


def test_the_usual_loader_gives_our_images_normalised(tmp_path):
    folder, _ = textures(tmp_path, 2)
    ours, _ = data.LabelledImages(folder, ["0"], 96)[0, 0]
    usual = bench.UsualImages(folder, ["0"], 96)[0, 0] / 2 + 0.5
    assert min((side - ours / 255).abs().max() for side in (usual, usual.flip(-1))) < 1e-5


def test_make_gpu_compares_the_cpu_with_itself_and_fills_the_table(tmp_path, capsys, once):
    speeds, log = [], files.log
    with mock.patch.object(files, "log", lambda home, stage, **values: (
            speeds.append(values.get("images_s")), log(home, stage, **values))):
        bench.main(bench.parse_args(["--gpu", "--out", str(tmp_path / "gpu.md")]))
    found = rows((tmp_path / "gpu.md").read_text())
    for part in ("stage 1, CPU and GPU", "stage 3, CPU and GPU"):
        assert found[part, "float32"][0] == 0 and found[part, "float32"][2].endswith("by 0 %")
        assert 0 < found[part, "bfloat16"][0] < 0.05
    assert found["CRF, CPU and GPU", "9 labels"][0] == 100
    assert found["load, flip, usual", "JPEG of 160x120"][2].endswith("1.00 x usual")
    for name in ("hv", "raster", "conv", "pool"):
        whole = found[f"inference, {name}", "(1, 3, 96, 96)"]
        assert whole[2] == "context 100.0 %"  # both take 1 ms
    parts = {part: row for (part, _), row in found.items()}
    minutes = 48 * 10582 / speeds[1] / 60  # of the second epoch
    assert parts["stage 1, hv"] == (pytest.approx(speeds[1], rel=1e-3), "images/s",
                                    f"the paper's: {minutes:.3g} minutes")
    assert {"load, flip", "load, flip, jitter", "load, rescale, crop, flip", "CRF, torch",
            "step, hv", "stage 1, none", "stage 2", "stage 3", "stage 4, CRF",
            "stage 4, no CRF"} <= set(parts)
    assert "say nothing of CUDA" in capsys.readouterr().out


def test_a_setting_that_fails_is_told_and_the_next_one_runs(capsys, once, monkeypatch):
    monkeypatch.setattr(bench, "STAGE_1", {"hv": "--batch-size 999"})
    bench.main(bench.parse_args(["--quick", "--only", "stages"]))
    output = capsys.readouterr().out
    assert "stage 1, hv: 64 images cannot fill --batch-size 999" in output
