"""Does a GPU compute what the CPU computes, and the same twice? Parts of extras/gpu.py."""
import argparse
import os
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bench, model, train_cls, train_seg  # noqa: E401, E402  no package
from meter import Enough, call  # noqa: E402
from support import crf, run  # noqa: E402


def equal(args):
    """The CPU against the device, at batch 2: outputs, losses of three steps, the CRF's labels."""
    jobs = {"stage 1": partial(bench.classifier, dropout=0.0), "stage 3": bench.segmenter}
    places = (("cpu", False), (args.device.type, False), (args.device.type, True))
    for name, job in jobs.items():
        seen = []
        for kind, half in places:
            torch.manual_seed(0)
            here = argparse.Namespace(**vars(args) | dict(
                batches=(2, 2), device=torch.device(kind),
                amp=torch.autocast(kind, torch.bfloat16, half)))
            net, images, *rest = job(here)
            with torch.no_grad():
                outputs = here.amp(net)(images)[-1].cpu()  # DeepLabv2: the maximum over scales
            steps = [bench.train_step(here, net, images, *rest).item() for _ in range(3)]
            seen.append((outputs, torch.tensor(steps)))
        outputs, losses = seen[0]
        for precision, (other, others) in zip(("float32", "bfloat16"), seen[1:]):
            bench.row(args, f"{name}, CPU and GPU", precision, (other - outputs).abs().max(),
                      "largest difference", f"outputs reach {outputs.abs().max():.3g}; losses of "
                      f"three steps differ by {100 * (others / losses - 1).abs().max():.2g} %")
    image = np.array(bench.texture(args, 0)[0])
    probs = model.upsample(2 * torch.randn(args.C, 12, 12), *image.shape[:2]).softmax(dim=0)
    here, there = (crf.dense_crf(image, probs.to(device), backend="torch").argmax(0).cpu()
                   for device in ("cpu", args.device))
    bench.row(args, "CRF, CPU and GPU", f"{args.C} labels", 100 * (here == there).float().mean(),
              "% of the pixels", "have the same label")


def repeat(args):
    """Train twice, and once more with an interruption: how far apart are the weights?"""
    stages = {"stage 1": (train_cls, "cls", "--epochs 2 --frozen-epochs 1"),
              "stage 3": (train_seg, "seg", "--iterations 4 --save-every 2")}
    for name, (stage, kind, flags) in stages.items():
        rounds, weights = count(), []
        def _interrupted(items, *_, **__):
            if next(rounds):
                raise Enough
            return items
        for bar in (None, None, _interrupted):
            call(args, stage, f"--train-split few {flags} --overwrite", bar)
            call(args, stage, f"--train-split few {flags} --resume")
            saved = run.load_checkpoint(args.folder / f"run/{kind}.pt", kind)["model"]
            weights.append(torch.cat([values.flatten() for values in saved.values()]))
        for what, other in zip(("two equal runs", "interrupted, resumed"), weights[1:]):
            bench.row(args, name, what, (other - weights[0]).abs().max(), "largest difference",
                      f"{100 * (other != weights[0]).float().mean():.3g} % of the weights differ")


def tests(args):
    """All tests, with CUDA visible."""
    output, env = args.folder / "tests.txt", {"CUDA_VISIBLE_DEVICES": "0"} | os.environ
    with open(output, "w") as file:
        code = subprocess.call([sys.executable, "-m", "pytest", "-v", "tests"], cwd=ROOT, env=env,
                               stdout=file, stderr=file)
    last = run.read_text(output).splitlines()[-1].strip("= ")
    bench.row(args, "tests", "CUDA visible", code, "exit code", last)
