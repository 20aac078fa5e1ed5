"""Kill the stages at random moments, go on, and compare with a run that nobody interrupted.

Run:    python extras/kill_test.py [--kills 10] [--seed 0] [--folder runs/kill_test]
Prints: one line for each kill and a verdict; exit code 1 if anything differs or is left behind
A kill is SIGKILL to a stage's main process, as Linux sends it where memory runs out: code -9; code
0 had ended before. All on the CPU, where one seed gives the same bits. 200 kills take an hour.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from datasets.beetles import make_toy  # noqa: E402  the six scripts are a folder, not a package
from support.run import DataError, launch, number  # noqa: E402

STAGES = {  # flags with which a stage works longer than it takes to start, and what it writes
    "train_cls": ("--epochs 16 --batch-size 4 --dropout 0.2 --resume", "cls.pt"),
    "make_pseudo": ("--batch-size 1", "bpm pseudo"),
    "train_seg": ("--iterations 48 --save-every 2 --batch-size 4 --resume", "seg.pt"),
    "evaluate": ("--crf", "pred results.json")}


def parse_args(argv=None):
    """How many kills, and where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=number(int, 1, 10**6), default=10, help="over all stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/kill_test", help="made anew")
    return parser.parse_args(argv)


def stage(name, run, seconds=None):
    """Run a stage, or kill it after so many seconds; its process, which has ended."""
    command = [sys.executable, ROOT / f"{name}.py", "--data", run.parent / "data", "--run", run,
               "--workers", "2", *STAGES[name][0].split()]
    with open(run / "output.txt", "a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True,
                                   env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    if process.wait() > 0:
        raise DataError(f"{name}.py ended with an error of its own: see {run}/output.txt")
    return process


def products(run):
    """{name: value} of a run's pictures, leftovers, weights and scores, to be compared."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*")
             if path.suffix in (".png", ".tmp")}
    for name in ("cls.pt", "seg.pt"):
        model = torch.load(run / name, weights_only=True)["model"]
        found |= {f"{name} {key}": weight.numpy().tobytes() for key, weight in model.items()}
    results = json.loads((run / "results.json").read_text())
    return found | {key: results[key] for key in results if key not in ("masks", "checkpoint")}


def main(args):
    data, whole, killed = (args.folder / name for name in ("data", "whole", "killed"))
    for run in (whole, killed):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir(parents=True)
    make_toy(data, (24, 4, 24))
    seconds, sessions, rng, kills = {}, [], random.Random(args.seed), 0
    for name in STAGES:
        began = time.time()
        stage(name, whole)
        seconds[name] = time.time() - began
    while kills < args.kills:  # rounds of the four stages, each of which begins with nothing
        for name, (_, writes) in STAGES.items():
            subprocess.run(["rm", "-rf", *map(killed.joinpath, writes.split())], check=True)
            for _ in range(min(rng.randint(1, 4), args.kills - kills)):
                delay = rng.uniform(0.3, 1) * seconds[name]  # before that it only starts
                process = stage(name, killed, delay)
                sessions.append(str(process.pid))
                kills += process.returncode < 0
                print(f"{name} after {delay:.2f} s: code {process.returncode}", flush=True)
            stage(name, killed)
        time.sleep(12)  # workers without a parent notice within five seconds
        a, b = products(whole), products(killed)
        wrong = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
        ps = subprocess.run(["ps", "-ostat=,args=", "-s", ",".join(sessions)], capture_output=True)
        wrong += [line for line in ps.stdout.decode().splitlines() if line[0] != "Z"]  # Z: dead
        if wrong:
            raise DataError(f"{len(wrong)} things differ or are left: {', '.join(wrong[:9])}")
    print(f"{kills} kills: the same {len(a):,} weights, masks and scores; nothing is left behind")


if __name__ == "__main__":
    launch(main, parse_args())
