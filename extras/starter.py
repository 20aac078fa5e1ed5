"""The assignment: a copy of the repository in which the functions of the exercises are empty.

Run:    python extras/starter.py ../assignment       (docs/TEACHING.md; there: make check EQ=8)
Writes: DIR, the repository without data, runs, history and answers; the functions of EXERCISES
        keep signature and docstring, and raise NotImplementedError
"""
import argparse
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support.files import UserError, write_lines
from support.processes import launch

# check (make check EQ=...): script, functions, what the error says is to be written
EXERCISES = {
    "2": ("model.py", ["CPFCTE.enhance", "CPFCTE.class_attention"],
          "Eq. (2), Sec. 0.3.2: [p_i ; t(i)], then a linear map back to D"),
    "3": ("model.py", ["RowsAndColumns.forward", "RowMajor.forward", "scan"],
          "Eq. (3) to (6), Sec. 0.3.3: hv and raster; class tokens lead each line; float32"),
    "8": ("model.py", ["pool_patches"],
          "Eq. (8), Sec. 0.3.4: mean of each class's K largest scores; max: K = 1, avg: K = N"),
    "9": ("model.py", ["classification_loss"],
          "Eq. (9), Sec. 0.3.4: binary cross-entropy, s clamped to [1e-6, 1 - 1e-6]"),
    "10": ("make_pseudo.py", ["pseudo_masks"],
           "Eq. (10), Sec. 0.3.4: upsample, argmax, class numbers; then the same after the CRF"),
    "confusion": ("evaluate.py", ["confusion_matrix"],
                  "Sec. 0.4.1: pixels counted by true and predicted class"),
    "iou": ("evaluate.py", ["iou_per_class"], "Sec. 0.4.1: TP / (TP + FP + FN) of each class"),
    "deeplabv2": ("train_seg.py", ["multi_scale_loss"],
                  "Sec. 0.4.2: sum over outputs of the mean cross-entropy; masks by nearest-exact"),
}


def without_body(source, name, message):
    """The source text of a script in which the function `name` (or Class.name) is to be written."""
    body = ast.parse(source).body
    for part in name.split("."):
        node = next(node for node in body if getattr(node, "name", None) == part)
        body = node.body
    first = body[1] if ast.get_docstring(node) else body[0]
    lines, indent = source.splitlines(), " " * first.col_offset
    error = [f"{indent}raise NotImplementedError(", f'{indent}    "{message}")']
    lines[first.lineno - 1:node.end_lineno] = error
    return "\n".join(lines)


def parse_args(argv=None):
    """Where to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="folder to write; it must not exist")
    return parser.parse_args(argv)


def main(args):
    if args.dir.exists() or args.dir.resolve().is_relative_to(ROOT):
        raise UserError(f"{args.dir} exists, or lies in the repository: choose another folder")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "ANSWERS.md")
    shutil.copytree(ROOT, args.dir, ignore=left_out)
    shutil.copy(ROOT / ".gitignore", args.dir)
    write_lines(args.dir / "docs/ANSWERS.md", ["# Answers", "", "Your teacher has them."])
    for script, names, message in EXERCISES.values():
        source = (args.dir / script).read_text(encoding="utf-8")
        for name in names:
            source = without_body(source, name, message)
        write_lines(args.dir / script, source.splitlines())
    print(f"written: {args.dir}, to be completed: "
          + ", ".join(name for _, names, _ in EXERCISES.values() for name in names))


if __name__ == "__main__":
    launch(main, parse_args())
