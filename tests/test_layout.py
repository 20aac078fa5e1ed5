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
    """Every module that a file imports: `from support import crf` names support and support.crf."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", FILES)
def test_a_file_stays_on_its_floor_and_has_short_functions_and_lines(name):
    text = FILES[name].read_text()
    tree = ast.parse(text)
    imported = set(modules(tree))
    assert STAGES & imported <= ({"evaluate"} if name in STAGES - {"evaluate"} else set())
    assert not {"extras", "tests", "conftest"} & {module.split(".")[0] for module in imported}
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
               if isinstance(node, ast.FunctionDef)}
    assert not {function: length for function, length in lengths.items() if length > 60}
    assert not [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 100]


def test_the_six_scripts_are_all_there_are_and_say_what_they_do():
    assert {path.stem for path in ROOT.glob("*.py")} == STAGES | {"model", "data"}
    for path in ROOT.glob("*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert path.stem == "model" or {"Run:", "Writes:"} <= set(doc.split())
