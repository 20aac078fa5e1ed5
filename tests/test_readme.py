"""README.md and docs/: commands parse, the map names what exists, links lead somewhere."""
import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {page.relative_to(ROOT): page.read_text()
         for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMANDS = sorted({line.split("  #")[0].strip() for text in PAGES.values()
                   for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
                   for line in block.splitlines()})
MAP = re.findall(r"^\|(.*)\|(.*)\|(.*)\|$",
                 re.search(r"\| paper \| where \|.*?\n\n", README, re.DOTALL)[0], re.MULTILINE)[2:]
PLAIN = {target: re.findall(r"`(python [^`]+)`", cell) for target, cell in re.findall(
    r"^\| `make ([^`]+)` \| (.*?) \|", (ROOT / "docs/COMMANDS.md").read_text(), re.MULTILINE)}
NAME = r"`([\w/]+\.py):([\w.]+)`"


def parse_args_of(script):
    """The function of a script, which may be in a folder: extras/cpews/train.py."""
    module = "datasets/make.py" if script == "data.py" else script
    return importlib.import_module(module.removesuffix(".py").replace("/", ".")).parse_args


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("python ", "torchrun "))
                                     and not c.startswith("python -m ")])
def test_commands_parse(command):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    parse_args_of(words[script])(words[script + 1:])


def test_make_targets_variables_and_the_flags_they_pass_on_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(" ".join(re.findall(r"^([\w ./-]+):", makefile, re.MULTILINE)).split())
    variables = set(re.findall(r"^(\w+) \??=", makefile, re.MULTILINE))
    inline = re.findall(r"`(make [^`\n]+)`", "".join(PAGES.values()))
    commands = [c for c in COMMANDS if c.startswith("make ")] + inline
    assert {"make demo", "make test"} <= set(commands)
    for word in (word for command in commands for word in shlex.split(command)[1:]):
        name, _, value = word.partition("=")
        assert name in (variables if "=" in word else targets), word
        for script in {"CLS_FLAGS": ["train_cls"], "SEG_FLAGS": ["train_seg"]}.get(name, ()):
            needed = ["--data", "data/toy", "--run", "runs/toy"]
            importlib.import_module(script).parse_args([*needed, *shlex.split(value)])


def asked_for(words):
    """What a command asks for: the script and its arguments with all defaults, or its words."""
    if words[0] == "-m":
        return {word for word in words if not word.startswith("tests")}
    arguments = parse_args_of(words[0])(words[1:])
    return words[0], {name: value.strip() if isinstance(value, str) else value
                      for name, value in vars(arguments).items()}


@pytest.mark.skipif(shutil.which("make") is None, reason="compares with make")
@pytest.mark.parametrize("target", PLAIN)
def test_plain_commands_are_those_of_make(target):
    made = subprocess.run(["make", "-nB", *target.split()], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout.replace("\\\n", " ")
    python = ".venv/bin/python "
    made = [asked_for(shlex.split(line.removeprefix(python)))
            for line in made.splitlines() if line.startswith(python)]
    plain = [asked_for(shlex.split(line)[1:]) for line in PLAIN[target]]
    assert plain and plain == made[-len(plain):]


@pytest.mark.skipif(shutil.which("make") is None, reason="calls make")
def test_flags_of_the_command_line_leave_voc_small_its_preset():
    made = subprocess.run(["make", "-nB", "voc-small", "FLAGS=--workers 8"], cwd=ROOT, text=True,
                          capture_output=True, check=True).stdout
    stages = [line for line in made.splitlines() if "--data data/VOC2012" in line]
    assert len(stages) == 4
    assert all("--workers 8" in line and "--preset voc-small" in line for line in stages)


def test_plain_commands_stand_beside_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split())
    assert {target.split()[0] for target in PLAIN} == targets - {"clean"}


def test_flags_that_the_text_names_exist():
    folders = "", "support", "datasets", "extras", "extras/cpews"
    code = "".join(path.read_text() for folder in folders for path in (ROOT / folder).glob("*.py"))
    known = set(re.findall(r'"(--[a-z][\w-]*)"', code)) | {"--help"}
    for page, text in PAGES.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", prose):
            assert flag in known or flag.replace("--no-", "--") in known, f"{page}: {flag}"


def exists(file, name):
    """Whether a file of the repository defines a function, class, method or constant."""
    if not (ROOT / file).is_file():
        return False
    body = ast.parse((ROOT / file).read_text()).body
    for part in name.split("."):
        found = [node for node in body if part == getattr(node, "name", None)]
        if not found:
            return False
        body = found[0].body
    return True


def test_functions_and_tests_that_the_text_names_exist():
    for page, text in PAGES.items():
        missing = [":".join(where) for where in re.findall(NAME, text) if not exists(*where)]
        assert not missing, f"{page} names what is not there: {missing}"


def test_the_map_leads_from_every_equation_to_code_and_to_a_test():
    for paper, where, held_to in MAP:
        assert re.search(NAME, where) and "`tests/" not in where, paper
        tests = re.findall(NAME, held_to)
        assert tests and all(file.startswith("tests/") for file, _ in tests), paper
        assert all(name.startswith("test_") for _, name in tests), paper
    for number in range(1, 11):
        assert any(f"({number})" in paper for paper, _, _ in MAP if "Eq." in paper), number


def test_the_code_names_the_equations_too():
    code = "".join((ROOT / name).read_text() for name in ("model.py", "make_pseudo.py"))
    for number in {*range(1, 11)} - {4}:  # it stands as Eq. (3), (4)
        assert f"Eq. ({number})" in code


def slugs(text):
    """The anchors that GitHub gives the headings of a page."""
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_links_within_the_repository_resolve():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if not link.startswith("https://"):
                file, _, anchor = link.partition("#")
                target = (ROOT / page).parent / file if file else ROOT / page
                assert target.is_file(), f"{page}: {link}"
                assert not anchor or anchor in slugs(target.read_text()), f"{page}: {link}"


def test_every_page_and_picture_is_reached():
    links = {Path(link.partition("#")[0]).name for text in PAGES.values()
             for link in re.findall(r"\]\(([^)\s]+)\)", text)}
    for path in (ROOT / "docs").iterdir():
        assert path.name in links, f"no page links to {path.name}"


def test_the_readme_has_three_screens():
    assert len(README.splitlines()) <= 150


def test_the_readme_says_how_long_the_six_files_are():
    lines = sum(len(path.read_text().splitlines()) for path in ROOT.glob("*.py"))
    said = re.search(r"six\s+files, about ([\d,]+) lines", README)[1]
    assert said == f"{round(lines, -2):,}"


WALK = re.findall(r"^`([^`\n]+\.py)`, [^\n]*:\n\n```python\n(.*?)^```",
                  PAGES[Path("docs/WALKTHROUGH.md")], re.DOTALL | re.MULTILINE)
assert len(WALK) == PAGES[Path("docs/WALKTHROUGH.md")].count("```python") >= 9


@pytest.mark.parametrize("file, block", WALK,
                         ids=[f"{k}-{file}" for k, (file, _) in enumerate(WALK)])
def test_the_walkthrough_quotes_what_is_there(file, block):
    source = (ROOT / file).read_text()
    for piece in block.split("...\n"):  # whole lines, one after the other
        assert piece.strip() and f"\n{piece}" in source, piece


def test_the_walkthrough_has_every_equation():
    sections = PAGES[Path("docs/WALKTHROUGH.md")].split("\n## ")
    for name in ("Eq. (1):", "Eq. (2):", "Eq. (3) to (6):", "Eq. (7):", "Eq. (8):", "Eq. (9):",
                 "Eq. (10):", "The dense CRF", "mIoU"):
        section = next(text for text in sections if text.startswith(name))
        assert "```math" in section and "```python" in section, name
