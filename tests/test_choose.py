"""extras/choose.py: which setting each score chooses, and what that is worth on test."""
import pytest

import choose
import study
from support.files import UserError
from test_extras import calls, run_study  # noqa: F401  a fixture

HEADS = ("variant", "seed", "split", "metric", "value")
RUNS = {  # (setting, seed): BPM of val, mAP, loss, BPM of test
    ("A", 0): (50, 90, 0.30, 53), ("B", 0): (40, 95, 0.20, 47), ("C", 0): (30, 80, 0.40, 56),
    ("A", 1): (50, 97, 0.30, 51), ("B", 1): (40, 95, 0.20, 45), ("C", 1): (49, 80, 0.10, 48)}


def raw(method=""):
    names = (("val", "BPM"), ("val", "val mAP"), ("val", "loss x100"), ("test", "BPM"))
    return [dict(zip(HEADS, (setting, seed, *name, value)), method=method)
            for (setting, seed), values in RUNS.items() for name, value in zip(names, values)]


def test_choices_by_hand():
    lines = choose.choices(choose.grid(raw("x") + raw("another"), "x"))
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in lines[2:]}
    assert cells["BPM of val"][2:4] == ["52.0", "1.4"] and cells["BPM of val"][-1] == "A (2)"
    assert cells["mAP of val"][2:5] == ["49.0", "2.8", "-3.0"]  # 47 and 51 against 53 and 51
    assert cells["mAP of val"][-1] == "B (1); A (1)"
    assert cells["training loss"][2:5] == ["47.5", "0.7", "-4.5"]  # 47 and 48
    assert cells["best on test"][2:5] == ["53.5", "3.5", "+1.5"]
    assert cells["any setting"][2:5] == ["50.0", "2.8", "-2.0"]  # 156 / 3 and 144 / 3


def test_a_grid_is_trained_and_chosen_from(toy, tmp_path, calls, monkeypatch, capsys):  # noqa: F811
    rows = [(f"K {k}", "-", f"--top-k {k} --context none", "--crf none") for k in (1, 12)]
    monkeypatch.setitem(study.STUDIES, "choose", rows)
    for split in ("val", "test"):
        home = run_study(toy, tmp_path, "choose", "--seeds", "0", "1", "--split", split)
    assert [script for script, _ in calls].count("evaluate.py") == 8  # the BPM alone
    files = [home / "choose-val.csv", home / "choose-test.csv"]
    choose.main(choose.parse_args([*map(str, files)]))
    assert "| training loss | image labels of train | " in capsys.readouterr().out
    with pytest.raises(UserError, match="choose-val.csv: needs .*test BPM"):
        choose.main(choose.parse_args([str(files[0])]))
