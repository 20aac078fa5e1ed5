"""Does a GPU compute what the CPU computes? Then all of bench.py at VOC's sizes (docs/SPEED.md).

Run:    python extras/gpu.py [--only PART] [--out runs/gpu.md]
Writes: OUT, the table of bench.py after the rows of this comparison
No data set and no pretrained weights: stage 4's CRF is over the classes that an untrained network
finds. Without a GPU all parts run on the CPU at toy sizes: this shows that they run, not how fast.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
from model import CPFCTE, ClassifierConfig, DeepLabv2, SegmenterConfig, upsample
from support.crf import dense_crf
from support.processes import launch


def outputs_and_gradient(network, images, kind, half):
    """The outputs on a device, perhaps in bfloat16, and the gradient of their mean square."""
    network.to(kind).zero_grad()
    with torch.autocast(kind, torch.bfloat16, half):
        outputs = network(images.to(kind))[-1].float()  # DeepLabv2: the maximum over scales
    outputs.square().mean().backward()
    gradient = [weight.grad.flatten() for weight in network.parameters() if weight.grad is not None]
    return outputs.detach().cpu(), torch.cat(gradient).cpu()


def equal(args):
    """The CPU against the device: outputs and gradients of both networks, the CRF's labels."""
    torch.manual_seed(0)
    networks = {"stage 1": (CPFCTE(ClassifierConfig(args.C, args.vit, dropout=0.0)), args.sides[0]),
                "stage 3": (DeepLabv2(SegmenterConfig(args.C, args.cnn)).eval(), args.crop)}
    for name, (network, side) in networks.items():
        images = torch.rand(2, 3, side, side)
        outputs, gradient = outputs_and_gradient(network, images, "cpu", False)
        for precision in ("float32", "bfloat16"):
            other, others = outputs_and_gradient(network, images, args.device.type,
                                                 precision != "float32")
            bench.row(args, f"{name}, CPU and GPU", precision, (other - outputs).abs().max(),
                      "largest difference", f"outputs reach {outputs.abs().max():.3g}; gradients "
                      f"differ by {100 * (others - gradient).norm() / gradient.norm():.2g} %")
    image = np.array(bench.texture(args, 0)[0])
    probs = upsample(2 * torch.randn(args.C, 12, 12), *image.shape[:2]).softmax(dim=0)
    here, there = (dense_crf(image, probs.to(device), backend="torch").argmax(0).cpu()
                   for device in ("cpu", args.device))
    bench.row(args, "CRF, CPU and GPU", f"{args.C} labels", 100 * (here == there).float().mean(),
              "% of the pixels", "have the same label")


def parse_args(argv=None):
    """Those of bench.py, with one part more; without a GPU at toy sizes."""
    return bench.parse_args(argv, {"equal": equal}, out=Path("runs/gpu.md"),
                            quick=not torch.cuda.is_available())


def main(args):
    bench.main(args)
    if not args.gpu:
        print(f"no GPU: {args.out} has toy sizes on the CPU, which say nothing of CUDA")


if __name__ == "__main__":
    launch(main, parse_args())
