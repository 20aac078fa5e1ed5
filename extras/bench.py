"""What loading, the stages, the context and the CRF cost on this machine, as one Markdown table.

Run:    python extras/bench.py [--quick] [--only PART]
        python extras/bench.py --gpu --out runs/gpu.md     (make gpu)
Writes: the table to the terminal and to --out, a row as soon as it is measured (docs/SPEED.md)
ViT-B/16, ResNet-101 and photos; with --quick the toy's networks and sizes. The stages run as they
are, from files to files; medians are over calls after a warm-up; a GPU computes in bfloat16.
Weights are random. Images are random textures. At VOC's size their files (75 kB) and CRF lattices
(170,000 vertices, of which the fullest has 1,200 pixels) are about as large as VOC's.
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import Timer
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data, evaluate, make_pseudo, model, train_cls, train_seg
from datasets import write_folder
from support import crf
from support.files import UserError, read_text, write_lines
from support.masks import save_mask, voc_palette
from support.processes import join_processes, launch

SIZES = {False: dict(vit="vit_base_patch16_384", sides=(384, 640, 960, 1280), C=21,
                     cnn="resnet101", crop=321, photo=(500, 375), preset="voc"),
         True: dict(vit="vit_toy", sides=(96, 160, 240, 320), C=9, cnn="resnet_toy", crop=96,
                    photo=(160, 120), preset="toy")}  # --quick
STAGE_1 = {"hv": "", "raster": "--context raster", "none": "--context none",
           "hv, frozen": "--train-blocks 0"}
ON_A_GPU = {"hv, --compile": "--compile", "hv, 4 workers": "--workers 4"}
# images that each stage sees in the paper's run on VOC: minutes = images / speed / 60
PAPER = {"stage 1, hv": 48 * 10582, "stage 1, hv, frozen": 2 * 10582, "stage 2": 10582,
         "stage 3": 20_000 * 10, "stage 4, CRF": 1449}


def parse_args(argv=None):
    """How much to measure; the arguments also hold the sizes and what to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy-sized networks and images")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--gpu", action="store_true", dest="compare", help="compare a GPU with the "
                        "CPU, then all parts; without a GPU at toy sizes: they run, no more")
    args = parser.parse_args(argv)
    args.quick |= args.compare and not torch.cuda.is_available()
    vars(args).update(SIZES[args.quick], workers=min(16, os.cpu_count()), parts=[args.only] if
                      args.only else [part for part in PARTS if args.compare or part != "equal"])
    return args


def milliseconds(function):
    """The median time of function(), also on a GPU, for which the timer waits."""
    timer = Timer("f()", globals=dict(f=function), num_threads=torch.get_num_threads())
    return 1000 * timer.adaptive_autorange().median


def row(args, part, setting, value, unit, note=""):
    """Print one more line of the table; what there is of it is in --out at any time."""
    args.rows.append(f"| {part} | {setting} | {value:.4g} | {unit} | {note} |")
    print(args.rows[-1], flush=True)
    if args.out:
        write_lines(args.out, args.rows)


# --- images ------------------------------------------------------------------------------------
def texture(args, seed):
    """A PIL image of three regions, rough here and smooth there, and its mask (H, W) uint8."""
    (W, H), generator = args.photo, torch.Generator().manual_seed(seed)

    def _noise(channels, *cells):
        coarse = torch.randn(1, channels, *cells, generator=generator)
        return F.interpolate(coarse, (H, W), mode="bicubic")[0]
    labels = torch.cat([torch.zeros(1), 1 + torch.randperm(args.C - 1, generator=generator)[:2]])
    mask = labels.byte()[_noise(3, 3, 4).argmax(0)].numpy()
    roughness = 24 * (2 * _noise(1, 4, 5)).exp().clamp(max=2)
    grain = _noise(1, H // 2, W // 2) + _noise(1, H // 4, W // 4)
    colours = 64 + torch.from_numpy(voc_palette()[mask]).permute(2, 0, 1) / 2
    image = (colours + 8 * _noise(3, 5, 7) + roughness * grain).clamp(0, 255).byte()
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), mask


def make_textures(args, root, splits):
    """A data set folder of textures; splits {name: number of images}: each the first so many."""
    classes, labels = ["background", *(f"thing{c}" for c in range(1, args.C))], []
    (root / "JPEGImages").mkdir(parents=True)
    for index in range(max(splits.values())):
        image, mask = texture(args, index)
        image.save(root / f"JPEGImages/{index}.jpg", quality=90)
        save_mask(root / f"SegmentationClass/{index}.png", mask)
        labels.append(" ".join([f"{index}", *(classes[c] for c in np.unique(mask))]))
    for name, number in splits.items():
        write_lines(root / f"ImageSets/Segmentation/{name}.txt", range(number))
    write_folder(root, args.preset, classes, labels)


# --- the parts ---------------------------------------------------------------------------------
class UsualImages(data.Images):
    """What one usually writes: image (3, S, S) float32, resized, flipped and normalised."""

    def __init__(self, folder, ids, side):
        super().__init__(folder, ids)
        self.change = transforms.Compose([
            transforms.Resize((side, side), transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])

    def __getitem__(self, item):
        path = self.folder.image_path(self.ids[item[0]])
        return self.change(Image.open(path).convert("RGB"))


def loading(args, rounds=3):
    """Stage 1's and stage 3's data path beside a usual one: decode, resize, augment, batch.

    All are measured in turn, `rounds` times: other work on the machine meets each of them.
    """
    folder, side = data.Folder(args.root), args.sides[0]
    ids, masks, fill = folder.ids("val"), folder.root / "SegmentationClass", (128, 128, 128)
    sets = {"load, flip, usual": UsualImages(folder, ids, side),
            "load, flip": data.LabelledImages(folder, ids, side, ("flip",)),
            "load, flip, jitter": data.LabelledImages(folder, ids, side, ("flip", "jitter")),
            "load, rescale, crop, flip": data.MaskedImages(folder, ids, masks, args.crop,
                                                           (0.5, 1.5), 0, fill)}
    speeds = {name: [] for name in sets}
    for name, dataset in rounds * [*sets.items()]:
        steps = data.batches(len(dataset), 8, 0, 0, 97)
        for step, _ in enumerate(data.loader(dataset, args, args.device, batch_sampler=steps)):
            if step == 16:  # those that were loaded ahead are through
                began = time.perf_counter()
        speeds[name].append(8 * (step - 16) / (time.perf_counter() - began))
    usual = statistics.median(speeds["load, flip, usual"])
    for name, found in speeds.items():
        row(args, name, "JPEG of %dx%d" % args.photo, statistics.median(found), "images/s",
            f"{args.workers} workers, {statistics.median(found) / usual:.2f} x usual")


def stages(args):
    """Training as it logs itself, masks, predictions: images/s, and the time of the paper's run."""
    where = ["--data", str(args.root), "--run", str(args.root / "run")]
    trains = ["--overwrite", "--val-split", "none", "--no-pretrained"]

    def _speed(name, stage, flags, more=()):
        began = time.time()
        try:
            stage.main(stage.parse_args([*where, *more, *flags.split()]))
        except (UserError, RuntimeError) as error:  # of memory, of a compiler
            return print(f"{name}: {error}"[:200], flush=True)
        speed = len(data.Folder(args.root).ids("val")) / (time.time() - began)
        if more:  # a training logs its own: of its second epoch or round, which is warm
            log = read_text(args.root / "run/log.jsonl").splitlines()
            speed = json.loads(log[-1])["images_s"]
        note = f"the paper's: {PAPER[name] / speed / 60:.3g} minutes" if name in PAPER else ""
        row(args, name, "from files to files", speed, "images/s", note)
    for name, flags in (STAGE_1 | ON_A_GPU if args.gpu else STAGE_1).items():
        _speed(f"stage 1, {name}", train_cls, f"--frozen-epochs 0 --epochs 2 {flags}", trains)
    _speed("stage 2", make_pseudo, "--split val --crf torch --overwrite")
    iterations = 400 if args.gpu else 4
    _speed("stage 3", train_seg, f"--iterations {iterations} --save-every {iterations // 2}",
           [*trains, "--masks", str(args.root / "SegmentationClass")])
    _speed("stage 4, no CRF", evaluate, "--split val")
    _speed("stage 4, CRF", evaluate, "--split val --crf torch")


def context(args):
    """The share of the context module in stage 1's step, forward and backward, and in inference."""
    def _pass(function, start):
        total = args.amp(function)(start).sum()
        if total.requires_grad:
            total.backward()

    sizes = [("step", args.sides[0], 16 if args.gpu or args.quick else 2),
             *(("inference", side, 1) for side in args.sides)]
    for name in ("raster", "conv", "pool", "hv"):
        net = model.CPFCTE(model.ClassifierConfig(args.C, args.vit, context=name)).to(args.device)
        for what, side, batch in sizes:
            net.train(what == "step")
            images = torch.rand(batch, 3, side, side, device=args.device)
            with torch.no_grad():
                tokens = args.amp(net.patch_tokens)(images)
            with torch.set_grad_enabled(net.training):
                whole = milliseconds(lambda: _pass(net, images))
                part = milliseconds(lambda: _pass(net.fuse, tokens))
            row(args, f"{what}, {name}", f"{tuple(images.shape)}", whole, "ms",
                f"context {100 * part / whole:.1f} %")


def dense_crf(args):
    """The dense CRF over all classes, as the field runs it, and over three."""
    image = torch.from_numpy(np.array(texture(args, 0)[0])).to(args.device)
    for labels in (args.C, 3):
        maps = 2 * torch.randn(labels, 12, 12, device=args.device)
        probs = model.upsample(maps, *image.shape[:2]).softmax(dim=0)
        for name in ("torch", "pydensecrf") if crf.densecrf else ("torch",):
            ms = milliseconds(lambda: crf.dense_crf(image, probs, backend=name))
            row(args, f"CRF, {name}", f"{labels} labels", ms, "ms")


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
    classifier = model.CPFCTE(model.ClassifierConfig(args.C, args.vit, dropout=0.0))
    segmenter = model.DeepLabv2(model.SegmenterConfig(args.C, args.cnn)).eval()
    for name, network, side in (("stage 1", classifier, args.sides[0]),
                                ("stage 3", segmenter, args.crop)):
        images = torch.rand(2, 3, side, side)
        outputs, gradient = outputs_and_gradient(network, images, "cpu", False)
        for precision in ("float32", "bfloat16"):
            other, others = outputs_and_gradient(network, images, args.device.type,
                                                 precision != "float32")
            row(args, f"{name}, CPU and GPU", precision, (other - outputs).abs().max(),
                "largest difference", f"outputs reach {outputs.abs().max():.3g}; gradients "
                f"differ by {100 * (others - gradient).norm() / gradient.norm():.2g} %")
    image = np.array(texture(args, 0)[0])
    probs = model.upsample(2 * torch.randn(args.C, 12, 12), *image.shape[:2]).softmax(dim=0)
    here, there = (crf.dense_crf(image, probs.to(device), backend="torch").argmax(0).cpu()
                   for device in ("cpu", args.device))
    row(args, "CRF, CPU and GPU", f"{args.C} labels", 100 * (here == there).float().mean(),
        "% of the pixels", "have the same label")


PARTS = {"equal": equal, "loading": loading, "context": context, "crf": dense_crf, "stages": stages}


def main(args):
    args.device, _, _ = join_processes()
    args.gpu = args.device.type == "cuda"
    args.amp = torch.autocast(args.device.type, torch.bfloat16, args.gpu)
    device = torch.cuda.get_device_name() if args.gpu else "no GPU"
    args.rows = [f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads", "",
                 "| part | setting | median | unit | |", "|---|---|---|---|---|"]
    print(*args.rows, sep="\n")
    with tempfile.TemporaryDirectory() as root:
        args.root = Path(root)
        if {"loading", "stages"} & {*args.parts}:
            number, val = (2560, 480) if args.gpu else (64, 16) if args.quick else (32, 8)
            make_textures(args, args.root, {"train": number, "val": val})
        for part in args.parts:
            PARTS[part](args)
    if args.compare and not args.gpu:
        print("no GPU: toy sizes on the CPU, which say nothing of CUDA")


if __name__ == "__main__":
    launch(main, parse_args())
