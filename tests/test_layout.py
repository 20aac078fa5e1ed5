"""Two floors: subjects know no stage, stages import subjects; and no function is long."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = {"train_cls", "make_pseudo", "train_seg", "evaluate"}
SUBJECTS = {"model", "data", *(
    f"{folder}.{path.stem}" for folder in ("datasets", "support")
    for path in ROOT.glob(f"{folder}/*.py"))}
FILES = {name: ROOT / f"{name.replace('.', '/')}.py" for name in sorted(STAGES | SUBJECTS)}


def modules(tree):
    """Every module that a file imports: `from support import run` names support and support.run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.fixture(params=FILES)
def file(request):
    """(module name, source text, syntax tree) of each script and each file beneath them."""
    text = FILES[request.param].read_text()
    return request.param, text, ast.parse(text)


def test_subjects_import_no_stage_and_stages_none_but_evaluate(file):
    name, _, tree = file
    allowed = {"evaluate"} if name in STAGES - {"evaluate"} else set()
    assert STAGES & set(modules(tree)) <= allowed


def test_nothing_imports_extras_or_tests(file):
    _, _, tree = file
    assert not {"extras", "tests", "conftest"} & {name.split(".")[0] for name in modules(tree)}


def test_no_function_is_longer_than_60_lines(file):
    _, _, tree = file
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef)}
    assert not {name: length for name, length in lengths.items() if length > 60}


def test_no_line_is_longer_than_100_columns(file):
    _, text, _ = file
    assert not [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100]


def test_the_six_scripts_are_all_there_are():
    assert {path.stem for path in ROOT.glob("*.py")} == STAGES | {"model", "data"}


@pytest.mark.parametrize("name", [name for name in FILES if "." not in name])
def test_a_script_says_what_it_does_before_it_imports(name):
    tree = ast.parse(FILES[name].read_text())
    assert len(ast.get_docstring(tree).splitlines()[0]) <= 100
    if name != "model":
        assert {"Run:", "Writes:"} <= set(ast.get_docstring(tree).split())
