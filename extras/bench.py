"""What each part of the pipeline costs on this machine, as one Markdown table.

Run:  python extras/bench.py [--quick]    ViT-B/16, ResNet-101, photos; --quick: the toy's sizes
Medians after warm-up (loading: one run); on a GPU by CUDA events, in bfloat16. TFLOP/s leave the
LSTMs out. Weights are random. Images are random textures. At VOC's size their files (75 kB) and CRF
lattices (170,000 vertices, of which the fullest has 1,200 pixels) are about as large as VOC's.
"""
import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import multiclass_jaccard_index

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cpews, cpews_model, data, evaluate, model, train_seg  # noqa: E401, E402  no package
from support import crf, run  # noqa: E402

SIZES = {False: dict(vit="vit_base_patch16_384", sides=(384, 640, 960, 1280), blocks=5, C=21,
                     cnn="resnet101", crop=321, photo=(500, 375)),
         True: dict(vit="vit_toy", sides=(96, 160, 240, 320), blocks=4, C=9, cnn="resnet_toy",
                    crop=96, photo=(160, 120))}  # --quick


def parse_args(argv=None):
    """How much to measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy-sized networks and images")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    args = parser.parse_args(argv)
    vars(args).update(SIZES[args.quick], rows=[])
    return args


def milliseconds(device, function):
    """The median time of function() on a device."""
    if device.type == "cuda":
        from triton.testing import do_bench  # comes with torch's CUDA builds
        return do_bench(function, warmup=200, rep=1000, return_mode="median")
    times = []
    while len(times) < 4 or sum(times) < 300:
        began = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def write(args, *lines):
    """Print lines of the table; what there is of it is in --out at any time."""
    print(*lines, sep="\n", flush=True)
    args.rows += lines
    if args.out:
        run.write_lines(args.out, args.rows)


def row(args, part, setting, value, unit, note=""):
    """One more line of the table."""
    write(args, f"| {part} | {setting} | {value:.4g} | {unit} | {note} |")


def begin(args):
    """Find the device and args.ceiling, the rate of a matrix product; begin the table."""
    args.device, _, _ = run.join_processes()
    gpu = args.device.type == "cuda"
    args.batches = (16, 10) if gpu or args.quick else (2, 2)
    args.amp = torch.autocast(args.device.type, torch.bfloat16, gpu)
    write(args, f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu else 'no GPU'}, "
          f"{torch.get_num_threads()} threads{', compiled' if args.compile else ''}", "",
          "| part | setting | median | unit | |", "|---|---|---|---|---|")
    side, dtype = (8192, torch.bfloat16) if gpu else (2048, torch.float32)
    matrix = torch.randn(side, side, dtype=dtype, device=args.device)
    args.ceiling = 2 * side ** 3 / 1e9 / milliseconds(args.device, lambda: matrix @ matrix)
    row(args, "matrix product", f"{side}x{side}", args.ceiling, "TFLOP/s", "the ceiling")


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
    colours = 64 + torch.from_numpy(data.voc_palette()[mask]).permute(2, 0, 1) / 2
    image = (colours + 8 * _noise(3, 5, 7) + roughness * grain).clamp(0, 255).byte()
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), mask


def make_textures(args, root, preset, files, splits):
    """A data set folder of so many files; splits {name: number of ids}, which begin at the first.

    Ids for which there is no file are links to those that are there.
    """
    classes, labels = ["background", *(f"thing{c}" for c in range(1, args.C))], []
    for index in range(max(splits.values())):
        paths = root / f"JPEGImages/{index}.jpg", root / f"SegmentationClass/{index}.png"
        if index < files:
            image, mask = texture(args, index)
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            image.save(paths[0], quality=90)
            data.save_mask(paths[1], mask)
            labels.append(" ".join(classes[c] for c in np.unique(mask)))
        else:
            for path in paths:
                path.symlink_to(f"{index % files}{path.suffix}")
            labels.append(labels[index % files])
    for name, number in splits.items():
        run.write_lines(root / f"ImageSets/Segmentation/{name}.txt", range(number))
    data.write_folder(root, preset, classes, [f"{i} {names}" for i, names in enumerate(labels)])


# --- the parts ---------------------------------------------------------------------------------
def bench_loading(args, folder):
    """Stage 1's and stage 3's data path: decode, resize, augment, in worker processes."""
    ids, side = folder.ids("train"), args.sides[0]
    crops = data.MaskedImages(folder, ids, folder.root / "SegmentationClass", args.crop, (0.5, 1.5),
                              0, (128, 128, 128))
    sets = {"load, flip": data.LabelledImages(folder, ids, side, ("flip",)),
            "load, flip, jitter": data.LabelledImages(folder, ids, side, ("flip", "jitter")),
            "load, rescale, crop, flip": crops}
    for name, dataset in sets.items():
        steps = data.batches(len(dataset), 8, 0, 0, 97)
        args.workers = min(16, os.cpu_count())
        for step, _ in enumerate(data.loader(dataset, args, args.device, batch_sampler=steps)):
            if step == 16:  # those that were loaded ahead are through
                began = time.perf_counter()
        row(args, name, "JPEG of %dx%d" % args.photo,
            8 * (step - 16) / (time.perf_counter() - began), "images/s", f"{args.workers} workers")


def classifier(args, context="hv", dropout=0.2):
    """Stage 1's network, a batch, the loss of its output, and an optimizer."""
    config = model.ClassifierConfig(args.C, args.vit, context=context, dropout=dropout)
    net = model.CPFCTE(config).to(args.device)
    net.train_last(args.blocks)
    images = torch.rand(args.batches[0], 3, *2 * args.sides[:1]).to(args.device)
    labels = torch.ones(len(images), args.C, device=args.device)
    def _loss(Y):
        return model.classification_loss(model.pool_patches(Y), labels)
    return net, images, _loss, torch.optim.Adam(net.parameters(), fused=True)


def segmenter(args):
    """The same of stage 3."""
    net = model.DeepLabv2(model.SegmenterConfig(args.C, args.cnn)).to(args.device)
    net.freeze_batch_norm()
    images = torch.rand(args.batches[1], 3, args.crop, args.crop).to(args.device)
    masks = torch.randint(0, args.C, (len(images), args.crop, args.crop)).to(args.device)
    def _loss(outputs):
        return train_seg.multi_scale_loss(outputs, masks)
    groups = train_seg.parameter_groups(net, 1e-4, 10)
    return net, images, _loss, torch.optim.SGD(groups, lr=1e-4, fused=True)


def train_step(args, network, images, loss, optimizer):
    """One step of training; the loss before it."""
    optimizer.zero_grad()
    value = loss(args.amp(network)(images))
    value.backward()
    optimizer.step()
    return value.detach()


def bench_step(args, name, net, *job):
    """A training step of net, compiled if asked for; returns its milliseconds."""
    network, images = run.prepare(net, args, 1), job[0]
    ms = milliseconds(args.device, lambda: train_step(args, network, *job))
    with FlopCounterMode(display=False) as counter:  # it does not know LSTMs
        train_step(args, network, *job)
    rate = counter.get_total_flops() / ms / 1e9
    row(args, name, f"{tuple(images.shape)}", ms, "ms", f"{1000 * len(images) / ms:.1f} images/s, "
        f"{rate:.3g} TFLOP/s, {100 * rate / args.ceiling:.0f} % of the ceiling")
    return ms


def bench_classifier(args, context):
    """Stage 1's step and its parts, forward and backward; inference at growing sizes."""
    net, images, loss, optimizer = classifier(args, context)
    def _head(tokens):
        return loss(net.classifier(net.dropout(tokens)).float().softmax(dim=-1))
    whole = bench_step(args, f"stage 1 step, {context}", net, images, loss, optimizer)
    tokens = args.amp(net.patch_tokens)(images).detach().requires_grad_()
    for name, part, start in (("backbone", net.patch_tokens, images), ("head", _head, tokens),
                              ("tokens", net.enhance, tokens), ("context", net.fuse, tokens)):
        ms = milliseconds(args.device, lambda: args.amp(part)(start).sum().backward())
        row(args, f"- {name}", f"{context}, forward, backward", 100 * ms / whole, "% of the step",
            f"{ms:.3g} ms")
    for side in args.sides:
        picture = torch.rand(1, 3, side, side, device=args.device)
        with torch.no_grad():
            tokens = args.amp(net.eval().patch_tokens)(picture)
            ms = milliseconds(args.device, lambda: args.amp(net)(picture))
            share = 100 * milliseconds(args.device, lambda: args.amp(net.fuse)(tokens)) / ms
        row(args, f"inference, {context}", f"{side}x{side}", ms, "ms/image",
            f"context {share:.1f} %")


def bench_segmenter(args, image):
    """Stage 3's step; stage 4 on one image without the CRF, its score against torchmetrics'."""
    net, *job = segmenter(args)
    bench_step(args, "stage 3 step", net, *job)
    ms = milliseconds(args.device, lambda: evaluate.predict(evaluate.predict_logits(
        net, image, args.device, args.device.type == "cuda"), image))
    row(args, "stage 4, no CRF", "%dx%d" % args.photo, ms, "ms/image")
    pair = torch.randint(0, args.C, (2, *args.photo), dtype=torch.uint8)
    ms = milliseconds(pair.device, lambda: evaluate.confusion_matrix(*pair.numpy(), args.C))
    ratio = ms / milliseconds(pair.device, lambda: multiclass_jaccard_index(
        *pair, args.C, ignore_index=data.IGNORE, validate_args=False))
    row(args, "stage 4, score", "CPU", ms, "ms/image", f"{ratio:.2f} x torchmetrics'")


def bench_cpews(args):
    """CPEWS: a step of the main loop and its parts; with --quick of the toy preset, else of voc."""
    recipe = cpews.parse_args(["--data", "-", "--run", "-", "--preset", "toy" if args.quick else
                               "voc", "--ism-from", "0", "--seg-from", "0"])
    net = cpews_model.CPEWS(cpews_model.CPEWSConfig(
        args.C, recipe.backbone, recipe.aux_block, recipe.fov_dilation)).to(args.device)
    net.amp, O, D = args.device.type == "cuda", args.C - 1, net.backbone.embed_dim
    net.train_encoder(True)
    images = torch.rand(recipe.batch_size if args.quick or net.amp else 1, 3, recipe.crop,
                        recipe.crop, device=args.device)
    y = torch.zeros(len(images), O, device=args.device)
    y[:, :2] = 1
    batch = images, images[:, 0] >= 0, y
    pools = {name: [torch.randn(10, D, device=args.device) for _ in range(O)] for name in "PNU"}
    def _loss(layers):
        losses, _ = cpews.batch_losses(net, lambda _: layers, batch, pools, recipe, 0)
        return sum(losses.values())
    whole = bench_step(args, "CPEWS step", net.encode, images, _loss,
                       torch.optim.AdamW(net.parameters(), fused=True))
    features, aux = (layer.detach().requires_grad_() for layer in net.encode(images))
    @torch.no_grad()
    def _cams():
        encodings = net.encodings(images, recipe.cam_scales).values()
        return net.cams(encodings, y, images.shape[2:])
    cams, thresholds = _cams(), (recipe.cam_high, recipe.cam_low)
    def _labels():
        return cpews_model.pixel_labels(cams[0], images, y, batch[1], *thresholds,
                                        recipe.par_dilations)
    def _prototypes():
        raw, _ = net.maps(features, aux)
        f, regions = cpews_model.region_features(raw, features, recipe.mask_threshold)
        distances = cpews_model.prototype_distances(f, y > 0, pools)
        scores = cpews_model.false_scores(raw, features, regions, y, pools)
        (cpews_model.pdl_loss(distances, recipe.temperature)
         + cpews_model.ssl_loss(scores)).backward()
    targets = _labels()
    parts = {"F and A, backward, too": lambda: sum(map(torch.sum, net.encode(images))).backward(),
             "maps, E6": _cams,
             "ISM, E7, E8": lambda: cpews_model.ism_loss(features, cpews_model.token_labels(
                 cams[1], batch[1], aux.shape[2:], *thresholds)).backward(),
             "prototypes, E9, E11, E12": _prototypes,
             "pixel labels, E13, E14": _labels,
             "decoder, E5, E15": lambda: cpews_model.seg_loss(net.segment(features),
                                                              targets).backward()}
    for name, part in parts.items():
        ms = milliseconds(args.device, part)
        row(args, f"- {name}", f"batch {len(images)}", 100 * ms / whole, "% of the step",
            f"{ms:.4g} ms")


def bench_crf(args, image):
    """The dense CRF over all classes, as the field runs it, and over three."""
    names, first = ("pydensecrf", "torch")[not crf.densecrf:], None
    for labels in (args.C, 3):
        maps = 2 * torch.randn(labels, 12, 12, device=args.device)
        probs = model.upsample(maps, *image.shape[:2]).softmax(dim=0)
        for name in names:
            ms = milliseconds(args.device, lambda: crf.dense_crf(image, probs, backend=name))
            first = ms if name == names[0] else first
            row(args, f"CRF, {name}", f"{labels} labels", ms, "ms",
                f"{ms / first:.2f} x {names[0]}'s")


def parts(args):
    """All parts."""
    with tempfile.TemporaryDirectory() as root:
        make_textures(args, Path(root), "toy", 16, {"train": 16})
        folder = data.Folder(root)
        image = torch.from_numpy(np.array(data.read_image(folder.image_path("0"))))
        bench_loading(args, folder)
    for context in ("raster", "conv", "pool", "hv"):
        bench_classifier(args, context)
    bench_segmenter(args, image.to(args.device))
    bench_cpews(args)
    bench_crf(args, image.to(args.device))
    row(args, "peak memory", "host", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20,
        "GiB")
    if args.device.type == "cuda":
        row(args, "peak memory", "GPU", torch.cuda.max_memory_allocated() / 2 ** 30, "GiB")


def main(args):
    begin(args)
    parts(args)


if __name__ == "__main__":
    run.launch(main, parse_args())
