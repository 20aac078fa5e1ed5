"""The whole pipeline on a GPU: is it right, how fast is it, what misses its goal?

Run:    python extras/gpu.py [--only PART] [--out runs/gpu]    all parts: about 20 minutes
Writes: OUT/voc/PART.md, a part's rows as they come; OUT/voc/gpu.md, all rows, the time that the
        paper would take, and the goals that were missed; OUT/voc/tests.txt, data/ and run/
No data, weights or network: 600 files of random textures stand for VOC's 10,582 images. The stages
run as they are, until extras/meter.py has seen enough. Untrained networks find other classes than
trained ones, and stage 4's CRF is over those. Without a GPU the parts, less the tests, run on the
CPU at toy sizes, in OUT/toy: this shows that they run, not how fast.
"""
import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import agree, bench, evaluate, make_pseudo, train_cls, train_seg  # noqa: E401, E402  no package
from meter import call, lstms_in_bfloat16, measure  # noqa: E402
from support import run  # noqa: E402

LIMIT = 420  # seconds, after which a part is ended
SPLITS = {False: {"trainaug": 10582, "val": 1449, "few": 32},  # --quick or not
          True: {"train": 160, "val": 16, "few": 32}}
STAGE_1 = {"hv": "", "hv, --compile": "--compile", "hv, LSTM in bfloat16": "",
           "hv, 8 workers": "--workers 8", "hv, 4 workers": "--workers 4",
           "hv, frozen": "--train-blocks 0", "raster": "--context raster",
           "raster, LSTM in bfloat16": "--context raster", "none": "--context none"}
GOALS = {("tests", "CUDA visible"): ("<=", 0), ("CRF, CPU and GPU", "21 labels"): (">=", 99.99),
         ("- context", "hv, forward, backward"): ("<=", 5), ("CRF, torch", "3 labels"): ("<=", 20),
         ("stage 1", "hv"): (">=", 1500), ("stage 2", "CRF"): ("<=", 25),
         ("stage 3", "the paper"): ("<=", 12), ("stage 4", "the paper"): ("<=", 2),
         ("all stages", "the paper"): ("<=", 30)}


def parse_args(argv=None):
    """Which part, and where to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="repeat this part")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder for all of it")
    return parser.parse_args(argv)


# --- the parts ---------------------------------------------------------------------------------
def stage_1(args):
    """Training with loading; the first row is what the paper's 48 last epochs cost."""
    for setting, flags in STAGE_1.items():
        with lstms_in_bfloat16() if "bfloat16" in setting else nullcontext():
            measure(args, "stage 1", setting, train_cls, f"--frozen-epochs 0 --overwrite {flags}",
                    "--compile" not in flags)


def stage_2(args):
    """Pseudo masks, from files to files."""
    call(args, train_cls, "--train-split few --epochs 1 --overwrite")
    measure(args, "stage 2", "CRF", make_pseudo, "--crf torch --batch-size 8 --overwrite", 8)


def stage_3(args):
    """Training with loading."""
    measure(args, "stage 3", f"{args.crop}x{args.crop}", train_seg, "--overwrite")


def stage_4(args):
    """Prediction, from files to files."""
    call(args, train_seg, "--train-split few --iterations 1 --overwrite")
    for setting, flags in (("CRF", "--crf torch"), ("no CRF", "")):
        measure(args, "stage 4", setting, evaluate, f"--split val {flags}")


PARTS = dict(equal=agree.equal, repeat=agree.repeat, bench=bench.parts, stage1=stage_1,
             stage2=stage_2, stage3=stage_3, stage4=stage_4, tests=agree.tests)


# --- the whole ---------------------------------------------------------------------------------
def paper(found):
    """{(stage, "the paper"): minutes} from the rows {(part, setting): value} of VOC's sizes."""
    def _seconds(*key):  # of an image or a step
        value = found.get(key, math.nan)
        return 1 / value if key[0] == "stage 1" else value / 1000
    images, val = SPLITS[False]["trainaug"], SPLITS[False]["val"]
    stages = {"stage 1": images * (2 * _seconds("stage 1", "hv, frozen")
                                   + 48 * _seconds("stage 1", "hv")),
              "stage 2": images * _seconds("stage 2", "CRF"),
              "stage 3": 20_000 * _seconds("stage 3", "321x321"),
              "stage 4": val * _seconds("stage 4", "CRF")}
    stages["all stages"] = sum(stages.values())
    return {(name, "the paper"): seconds / 60 for name, seconds in stages.items()}


def report(folder, gpu):
    """Write gpu.md: all rows; of a GPU also the paper's minutes and the goals that it misses."""
    paths = [path for path in (folder / f"{part}.md" for part in PARTS) if path.is_file()]
    lines = [line for path in paths for line in [*run.read_text(path).splitlines(), ""]]
    rows = [line.split(" | ") for line in lines if line.startswith("| ") and "median" not in line]
    found = {(part[2:], setting): float(value) for part, setting, value, *_ in rows}
    found |= (minutes := paper(found))
    lines += ["The paper: 2 epochs frozen and 48 not, 20,000 iterations, without saves and scores:",
              "", "| stage | minutes |", "|---|---|",
              *(f"| {stage} | {value:.3g} |" for (stage, _), value in minutes.items()), ""] * gpu
    for key, (sign, goal) in GOALS.items() if gpu else ():
        value = found.get(key, math.nan)  # which misses every goal
        if not (value >= goal if sign == ">=" else value <= goal):
            lines.append(f"- missed: {', '.join(key)}: {value:.4g}, the goal is {sign} {goal}")
    run.write_lines(folder / "gpu.md", lines)


def run_part(part, folder, quick):
    """One part, in this process."""
    args, root = bench.parse_args(["--quick"] * quick), folder / "data"
    args.folder, args.out = folder, folder / f"{part}.md"
    if not (root / "image_labels.txt").is_file():  # which is written last
        shutil.rmtree(root, ignore_errors=True)
        bench.make_textures(args, root, folder.name, 16 if quick else 600, SPLITS[quick])
    bench.begin(args)
    PARTS[part](args)


def main(args):
    gpu = torch.cuda.is_available()
    folder = args.out / ("voc" if gpu else "toy")
    if args.only:
        run_part(args.only, folder, not gpu)
        return report(folder, gpu)
    for part in [part for part in PARTS if gpu or part != "tests"]:
        (folder / f"{part}.md").unlink(missing_ok=True)  # of an earlier run
        words = [sys.executable, __file__, "--only", part, "--out", str(args.out)]
        process = subprocess.Popen(words, start_new_session=True)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            print(f"{part} was ended after {LIMIT} s: {folder}/{part}.md has its rows", flush=True)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    report(folder, gpu)
    print(f"written: {folder}/gpu.md" if gpu else
          f"no GPU: {folder}/gpu.md has toy sizes on the CPU, which say nothing of CUDA")


if __name__ == "__main__":
    run.launch(main, parse_args())
