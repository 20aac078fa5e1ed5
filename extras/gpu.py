"""Does a GPU compute what the CPU computes? Then all of bench.py at VOC's sizes (docs/SPEED.md).

Run:    python extras/gpu.py [--only PART] [--out runs/gpu.md]
Writes: OUT, the table of bench.py after the rows of this comparison
No data set and no pretrained weights: stage 4's CRF is over the classes that an untrained network
finds. Without a GPU all parts run on the CPU at toy sizes: this shows that they run, not how fast.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench  # noqa: E402
from model import (CPFCTE, ClassifierConfig, DeepLabv2, SegmenterConfig,  # noqa: E402
                   classification_loss, pool_patches, upsample)
from support.crf import dense_crf  # noqa: E402
from support.run import launch  # noqa: E402
from train_seg import multi_scale_loss, parameter_groups  # noqa: E402


def classifier(args):
    """Stage 1's network without dropout, two images, the loss of its output, an optimizer."""
    net, labels = CPFCTE(ClassifierConfig(args.C, args.vit, dropout=0.0)), torch.ones(2, args.C)
    images = torch.rand(2, 3, args.sides[0], args.sides[0])
    def _loss(Y):
        return classification_loss(pool_patches(Y), labels.to(Y.device))
    return net, images, _loss, torch.optim.Adam(net.parameters())


def segmenter(args):
    """The same of stage 3."""
    net = DeepLabv2(SegmenterConfig(args.C, args.cnn))
    net.freeze_batch_norm()
    images = torch.rand(2, 3, args.crop, args.crop)
    masks = torch.randint(0, args.C, (2, args.crop, args.crop))
    def _loss(outputs):
        return multi_scale_loss(outputs, masks.to(outputs[0].device))
    return net, images, _loss, torch.optim.SGD(parameter_groups(net, 1e-4, 10), lr=1e-4)


def outputs_and_losses(job, args, kind, half):
    """(what the network gives, the losses of three steps) on a device, perhaps in bfloat16."""
    torch.manual_seed(0)
    net, images, loss, optimizer = job(args)
    net, images, losses = net.to(kind), images.to(kind), []
    network = torch.autocast(kind, torch.bfloat16, half)(net)
    with torch.no_grad():
        outputs = network(images)[-1].float().cpu()  # DeepLabv2: the maximum over scales
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(loss(network(images)))
        losses[-1].backward()
        optimizer.step()
    return outputs, torch.stack(losses).detach().cpu()


def equal(args):
    """The CPU against the device: outputs, losses of three steps, the labels of the CRF."""
    for name, job in (("stage 1", classifier), ("stage 3", segmenter)):
        outputs, losses = outputs_and_losses(job, args, "cpu", False)
        for precision in ("float32", "bfloat16"):
            other, others = outputs_and_losses(job, args, args.device.type, precision != "float32")
            bench.row(args, f"{name}, CPU and GPU", precision, (other - outputs).abs().max(),
                      "largest difference", f"outputs reach {outputs.abs().max():.3g}; losses of "
                      f"three steps differ by {100 * (others / losses - 1).abs().max():.2g} %")
    image = np.array(bench.texture(args, 0)[0])
    probs = upsample(2 * torch.randn(args.C, 12, 12), *image.shape[:2]).softmax(dim=0)
    here, there = (dense_crf(image, probs.to(device), backend="torch").argmax(0).cpu()
                   for device in ("cpu", args.device))
    bench.row(args, "CRF, CPU and GPU", f"{args.C} labels", 100 * (here == there).float().mean(),
              "% of the pixels", "have the same label")


PARTS = {"equal": equal, **bench.PARTS}


def parse_args(argv=None):
    """Which part, and where to; without a GPU at toy sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.md"), help="the table")
    args = parser.parse_args(argv)
    sizes = bench.parse_args([] if torch.cuda.is_available() else ["--quick"])
    return argparse.Namespace(**vars(sizes) | vars(args))


def main(args):
    bench.main(args, PARTS)
    if not args.gpu:
        print(f"no GPU: {args.out} has toy sizes on the CPU, which say nothing of CUDA")


if __name__ == "__main__":
    launch(main, parse_args())
