"""The assignment of extras/starter.py: its checks fail, and pass with the originals."""
import ast

import pytest

import starter
from conftest import ROOT
from support.files import UserError

TWICE = """
import glob, os, shutil, sys, pytest
root, checks, scripts = sys.argv[1], sys.argv[2], sys.argv[3].split()
files = [*glob.glob("tests/test_eq*.py"), "tests/test_score.py", "tests/test_deeplabv2.py"]
words = [*files, "-q", "--tb=no", "-rf", "-p", "no:cacheprovider", "-m", checks]
print("exit code", int(pytest.main(words)))
for script in scripts:
    shutil.copy(f"{root}/{script}", script)
for name, module in list(sys.modules.items()):
    if str(getattr(module, "__file__", None)).startswith(os.getcwd()):
        del sys.modules[name]
print("exit code", int(pytest.main(words)))
"""


def written(folder):
    starter.main(starter.parse_args([str(folder)]))
    return folder


def test_the_checks_fail_in_the_starter_and_pass_with_the_originals(tmp_path, script):
    home = written(tmp_path / "assignment")
    (home / "twice.py").write_text(TWICE)
    checks = " or ".join(f"eq{name}" if name.isdigit() else name for name in starter.EXERCISES)
    scripts = {file for file, _, _ in starter.EXERCISES.values()}
    _, output = script(home / "twice.py", ROOT, checks, " ".join(scripts), cwd=home,
                       env={"COLUMNS": "300"})
    before, after, _ = output.split("exit code ")
    failed = [line for line in before.splitlines() if line.startswith("FAILED")]
    assert after.startswith("1") and all("- NotImplementedError: " in f for f in failed), before
    for _, _, message in starter.EXERCISES.values():
        assert any(line.endswith(message) for line in failed), message
    assert output.endswith("exit code 0\n"), after
    assert "Your teacher" in (home / "docs/ANSWERS.md").read_text()
    assert not {".git", ".venv", "data", "runs"} & {path.name for path in home.iterdir()}


def found(tree, name):
    """The definition of a function or of Class.function."""
    for part in name.split("."):
        tree = next(node for node in tree.body if getattr(node, "name", None) == part)
    return tree


@pytest.mark.parametrize("file, names, message", starter.EXERCISES.values())
def test_signature_docstring_and_the_rest_of_the_file_stay(file, names, message):
    source = changed = (ROOT / file).read_text()
    for name in names:
        changed = starter.without_body(changed, name, message)
    assert max(map(len, changed.splitlines())) <= 100
    before, after = ast.parse(source), ast.parse(changed)
    for name in names:
        old, new = found(before, name), found(after, name)
        assert ast.get_docstring(new) == ast.get_docstring(old)
        assert isinstance(new.body[-1], ast.Raise) and len(new.body) <= 2
        old.body = new.body = []  # what is left: signature and decorators
    assert ast.dump(before) == ast.dump(after)


def test_a_folder_that_exists_or_lies_in_the_repository_is_refused(tmp_path):
    for where in (tmp_path, ROOT / "assignment", ROOT / "docs/new"):
        with pytest.raises(UserError, match="choose another folder"):
            written(where)
    assert not (ROOT / "assignment").exists() and not (ROOT / "docs/new").exists()
