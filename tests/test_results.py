"""docs/results.csv: every table that names it quotes its means, deviations and differences."""
import csv
import re
import statistics
from pathlib import Path

import pytest

import choose
import study

DOCS = Path(__file__).parent.parent / "docs"
RAW = list(csv.DictReader((DOCS / "results.csv").open()))
MARK = r"<!-- results.csv: (.*?) -->\n((?:\|.*\n)+)"
TABLES = [(page.name, dict(word.split("=") for word in about.split("; ")), lines)
          for page in sorted(DOCS.glob("*.md"))
          for about, lines in re.findall(MARK, page.read_text())]


def scores(where):
    """{variant: {metric: {seed: value}}} of the rows of results.csv that where asks for."""
    found = {}
    for row in RAW:
        if all(row[name] == value for name, value in where.items()):
            of_variant = found.setdefault(row["variant"], {})
            of_variant.setdefault(row["metric"], {})[int(row["seed"])] = float(row["value"])
    return found


def test_every_score_is_there_once():
    keys = [tuple(row[name] for name in RAW[0] if name != "value") for row in RAW]
    assert len(set(keys)) == len(keys) > 100
    assert TABLES


@pytest.mark.parametrize("page, where, lines", TABLES)
def test_a_table_quotes_results_csv(page, where, lines):
    head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")]
                      for line in lines.splitlines()]
    raw, first, checked = scores(where), None, 0
    for row in rows:
        mine, metric = raw[row[0].strip("*")], None
        first = first or mine
        for name, cell in zip(head[1:], row[1:]):
            metric = name if name in mine else metric
            if name in mine:
                expected = f"{statistics.mean(mine[name].values()):.1f}"
            elif name == "sd":
                expected = f"{statistics.stdev(mine[metric].values()):.1f}"
            elif name == "seeds":
                expected = str(len(next(iter(mine.values()))))
            elif name in ("gain", "95 % interval"):
                seeds = sorted({*mine[metric]} & {*first[metric]})
                pair = [[{metric: side[metric][seed]} for seed in seeds] for side in (mine, first)]
                expected = study.gain(*pair, [metric])[name != "gain"] if mine is not first else ""
            else:
                continue
            assert cell.strip("*") == expected, (row[0], name, metric)
            checked += 1
    assert checked


@pytest.mark.parametrize("method", sorted({row["method"] for row in RAW
                                           if "grid" in row["method"]}))
def test_the_choices_are_those_of_the_grid(method):
    lines = choose.choices(choose.grid(RAW, method))
    assert "\n".join(lines) in (DOCS / "PHOTOGRAPHS.md").read_text()
