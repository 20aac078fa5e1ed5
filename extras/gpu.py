"""Does a GPU compute what the CPU computes? Then all of bench.py at VOC's sizes (docs/SPEED.md).

Run:    python extras/gpu.py [--only PART] [--out runs/gpu.md]
Writes: OUT, the table of bench.py after the rows of this comparison
No data set and no pretrained weights: stage 4's CRF is over the classes that an untrained network
finds. Without a GPU all parts run on the CPU at toy sizes: this shows that they run, not how fast.
"""
from pathlib import Path

import torch

import bench


def parse_args(argv=None):
    """Those of bench.py; without a GPU at toy sizes."""
    return bench.parse_args(argv, bench.PARTS, out=Path("runs/gpu.md"),
                            quick=not torch.cuda.is_available())


def main(args):
    bench.main(args)
    if not args.gpu:
        print(f"no GPU: {args.out} has toy sizes on the CPU, which say nothing of CUDA")


if __name__ == "__main__":
    bench.launch(main, parse_args())
