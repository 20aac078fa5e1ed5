"""Stage 3 of 4: train DeepLabv2 on the pseudo masks (Sec. 0.3.1, 0.4.2).

Run:    python train_seg.py --data data/toy --run runs/toy
        torchrun --nproc-per-node=2 -- train_seg.py --data data/VOC2012 --run runs/voc
Reads:  JPEGImages/ and RUN/pseudo/, the masks of stage 2; the ground truth only to score on val
Writes: RUN/seg.pt every --save-every iterations, RUN/log.jsonl, RUN/preset.txt
Result: mIoU 58.0 (sd 0.6, 5 seeds) on val of the beetles, without CRF, in 73 s on two Xeon cores
The recipe is the public PyTorch DeepLabv2's. It starts from ImageNet: COCO's start saw pixel masks.
"""
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data import Folder, Images, MaskedImages, training_batches
from evaluate import confusion_matrix, miou, predict, predict_log_probs, score_masks
from model import DeepLabv2, SegmenterConfig
from support.checkpoints import (check_loss, finite_mean_loss, open_checkpoint, restore,
                                 save_checkpoint)
from support.files import logged, write_lines
from support.flags import common_flags
from support.masks import IGNORE, read_mask, read_settings
from support.processes import join_processes, launch, wrap_for_training
from support.scores import note_shared

MOMENTUM, WEIGHT_DECAY, POLY_POWER = 0.9, 5e-4, 0.9


def parse_args(argv=None):
    """The flags of stage 3."""
    flags = common_flags(__doc__, trains=True, bf16=("toy", "voc-small"))
    add = flags.add
    add("--train-split", "trainaug", "split to train on; train where DATA has no trainaug",
        voc_small="train")
    add("--val-split", "val", "split that scores the network at every save; none: no score")
    add("--val-images", 100, "images of the val split to score, from its first")
    add("--masks", None, "folder of the masks to learn (default: RUN/pseudo)", type=Path)
    add("--rescale", [0.5, 1.5], "range of the random rescaling in training", toy=[0.75, 1.25],
        photo=[0.7, 1.2], nargs=2, low=0.01, high=100)
    add("--crop", 321, "side of the random crop in pixels", toy=96, voc_small=161, photo=193, low=1)
    add("--backbone", "resnet101.tv_in1k", "a CNN of timm that can keep the output stride",
        toy="resnet_toy", voc_small="resnet18.tv_in1k", photo="tf_efficientnet_lite0.in1k")
    add("--output-stride", 8, "pixels of the image to one of the network's outputs", photo=16,
        choices=(8, 16, 32))
    add("--scales", [1.0, 0.75, 0.5], "input scales that the loss and the maximum are over; the "
        "first is the reference", toy=[1.0], voc_small=[1.0], nargs="+", low=0.01, high=100)
    add("--rates", [6, 12, 18, 24], "dilations of ASPP", toy=[1, 2, 3, 4],
        photo=[1, 2, 3, 4], nargs="+", low=1)
    add("--freeze-bn", True, "keep the batch norms of the ImageNet weights", toy=False)
    add("--batch-size", 10, "images of one iteration, over all ranks together", low=1)
    add("--iterations", 20000, "optimiser steps; the poly decay ends there", coco=100000, toy=1500,
        voc_small=1500, photo=1200, low=1)
    add("--save-every", 1000, "iterations between saves", coco=5000, toy=500, photo=400, low=1)
    add("--lr", 2.5e-4, "the backbone's rate at first", toy=0.02, photo=0.002, low=1e-9, high=10)
    add("--warm-up", 0, "first iterations, over which the rates rise linearly", toy=50, photo=100)
    add("--aspp-lr", 10.0, "ASPP's rate as a multiple of --lr; its biases get twice that", toy=1.0,
        photo=0.03, high=1000)
    args = flags.parse(argv)
    if args.rescale[0] > args.rescale[1]:
        flags.error("--rescale: the smaller number comes first")
    return args


def parameter_groups(model, lr, aspp_lr):
    """SGD's groups: backbone, ASPP weights at aspp_lr times its rate, biases at twice that."""
    return [
        dict(params=[p for p in model.backbone.parameters() if p.requires_grad], base_lr=lr),
        dict(params=[conv.weight for conv in model.aspp], base_lr=aspp_lr * lr),
        dict(params=[conv.bias for conv in model.aspp], base_lr=2 * aspp_lr * lr, weight_decay=0.0)]


def poly(step, iterations, warm_up=0):
    """The factor on every rate at this step: a linear warm-up, and the poly decay from 1 to 0."""
    return min(1, (step + 1) / max(1, warm_up)) * (1 - step / iterations) ** POLY_POWER


def multi_scale_loss(outputs, masks, world=1):
    """Sum over DeepLabv2's outputs of the mean cross-entropy over pixels that are not 255.

    masks (B, H, W) int64 are resized to each output by nearest neighbour. With several ranks the
    mean is over the pixels of all of them, so that the gradient is that of one process.
    """
    targets = [F.interpolate(masks[:, None].float(), logits.shape[-2:], mode="nearest-exact")
               .squeeze(1).long() for logits in outputs]
    pixels = torch.stack([(target != IGNORE).sum() for target in targets]).float()
    if world > 1:
        dist.all_reduce(pixels)
        pixels /= world  # DistributedDataParallel averages the gradients over the ranks
    sums = torch.stack([F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
                        for logits, target in zip(outputs, targets)])
    return (sums / pixels.clamp(min=1)).sum()


def open_val(args, folder, ids, rank):
    """The val images with a true mask. Reading all masks now reveals damaged files."""
    val_ids = [] if args.val_split == "none" else folder.ids(args.val_split)[:args.val_images]
    if rank == 0:
        note_shared(ids, val_ids)
        score_masks(folder, val_ids, folder.root / "SegmentationClass")  # only reads and checks
    return Images(folder, [i for i in val_ids if folder.mask_path(i).is_file()])


def validate(model, val, args, device):
    """mIoU over the images of val, without CRF; None where there is no ground truth."""
    folder, C = val.folder, len(val.folder.classes)
    confusion = np.zeros((C, C + 1), np.int64)
    for image_id, image, _ in val:
        truth = read_mask(folder.mask_path(image_id), C, image.shape[1::-1])
        mask = predict(predict_log_probs(model, image, device, args.amp), image)
        confusion += confusion_matrix(mask, truth, C)
    return miou(confusion)


def main(args):
    device, rank, world = join_processes(args.device)

    # --- data ---
    folder = Folder(args.data)
    ids = folder.ids(args.train_split)
    val, masks_dir = open_val(args, folder, ids, rank), args.masks or args.run / "pseudo"

    # --- model ---
    inputs = dict(classes=folder.classes, ids=ids, labels=folder.labels_hash(),
                 masks=read_settings(masks_dir) | dict(data=None))  # which may move
    path, checkpoint = open_checkpoint(args, "seg", args.iterations, **inputs)
    torch.manual_seed(args.seed)
    config = SegmenterConfig(len(folder.classes), args.backbone, tuple(args.rates),
                             tuple(args.scales), args.output_stride)
    pretrained, weights = (False, None) if checkpoint else (args.pretrained, args.weights)
    model = DeepLabv2(config, pretrained, weights).to(device)
    if args.freeze_bn:
        model.freeze_batch_norm()
    optimizer = torch.optim.SGD(parameter_groups(model, args.lr, args.aspp_lr), lr=args.lr,
                                momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    done = checkpoint["step"] if checkpoint else 0
    restore(path, checkpoint, model=model, optimizer=optimizer)
    network = wrap_for_training(model, args, world)

    # --- train: in rounds, each of which ends with a save ---
    fill = tuple((255 * model.normalise.mean).round().int().flatten().tolist())
    train = MaskedImages(folder, ids, masks_dir, args.crop, args.rescale, args.seed, fill)
    for first in range(done, args.iterations, args.save_every):
        last = min(first + args.save_every, args.iterations)
        began, total = time.time(), torch.zeros((), device=device)
        for step, images, masks in training_batches(
                train, args, device, first, last, f"to iteration {last}", rank, world):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * poly(step, args.iterations, args.warm_up)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                outputs = network(images)                       # logits of each scale, maximum
            loss = multi_scale_loss(outputs, masks, world)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            check_loss(total, step + 1, path)

        # --- save, score, log ---
        loss = finite_mean_loss(total, last - first, world, model, f"before iteration {last}", path)
        speed = (last - first) * args.batch_size / (time.time() - began)
        if rank == 0:
            write_lines(args.run / "preset.txt", [args.preset])  # for evaluate.py --image
            save_checkpoint(path, "seg", model, args, **inputs, step=last,
                            optimizer=optimizer.state_dict())
            with logged(args.run, "train_seg", iteration=last, of=args.iterations, loss=loss,
                        lr=optimizer.param_groups[0]["lr"], images_s=speed) as line:
                line.update(val_miou=validate(model, val, args, device), val_images=len(val),
                            crf=False)
            model.train()


if __name__ == "__main__":
    launch(main, parse_args())
