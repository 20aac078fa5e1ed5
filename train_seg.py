"""Stage 3 of 4: train DeepLabv2 on the pseudo masks (Sec. 0.3.1, 0.4.2).

Run:    python train_seg.py --data data/toy --run runs/toy
        torchrun --nproc-per-node=2 -- train_seg.py --data data/VOC2012 --run runs/voc
Reads:  JPEGImages/ and RUN/pseudo/, the masks of stage 2; the ground truth only to score on val
Writes: RUN/seg.pt every --save-every iterations, RUN/log.jsonl
The recipe is that of the public PyTorch DeepLabv2 which the field uses; the weights to start from
are ImageNet classification's: a COCO-pretrained start would have seen pixel masks.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import IGNORE, Folder, MaskedImages
from evaluate import confusion_matrix, iou_per_class, predict, predict_logits
from model import DeepLabv2, SegmenterConfig
from support.run import (READ_EVERY, DataError, check_resume, join_processes, load_checkpoint, log,
                         parse, plain, positive, read_losses, run, save_checkpoint, training_parser,
                         write_lines)

STAGE = "train_seg"
MOMENTUM, WEIGHT_DECAY, POLY_POWER = 0.9, 5e-4, 0.9


def parse_args(argv=None):
    """The flags of stage 3."""
    parser = training_parser(__doc__)
    add = parser.add_argument
    add("--train-split", help="split whose images and pseudo masks are trained on")
    add("--val-split", help="split that scores the network at every save; none: no score")
    add("--val-images", type=int, default=100, help="that score is over the first so many images")
    add("--masks", type=Path, help="folder of the masks to learn (default: RUN/pseudo)")
    add("--backbone", help="a CNN of timm with output stride 8 (or resnet_toy)")
    add("--scales", type=float, nargs="+", help="input scales that the loss and the maximum are "
        "over; the first is the reference")
    add("--rescale", type=float, nargs=2, help="range of the random rescaling in training")
    add("--crop", type=positive, help="side of the random crop in pixels")
    add("--batch-size", type=positive, help="images of one iteration, over all ranks together")
    add("--iterations", type=positive, help="optimiser steps; the poly decay ends there")
    add("--save-every", type=positive, help="iterations between two checkpoints")
    add("--lr", type=float, help="of the backbone, before the poly decay")
    add("--aspp-lr", type=float, help="of ASPP's weights, times --lr; its biases get twice that")
    add("--freeze-bn", action=argparse.BooleanOptionalAction,
        help="keep the batch norms of the ImageNet weights")
    return parse(parser, STAGE, argv)


def parameter_groups(model, lr, aspp_lr):
    """SGD's groups: backbone, ASPP weights at aspp_lr times its rate, biases at twice that."""
    return [
        dict(params=[p for p in model.backbone.parameters() if p.requires_grad], base_lr=lr),
        dict(params=[conv.weight for conv in model.aspp], base_lr=aspp_lr * lr),
        dict(params=[conv.bias for conv in model.aspp], base_lr=2 * aspp_lr * lr,
             weight_decay=0.0),
    ]


def poly(step, iterations):
    """The factor that the poly schedule puts on every rate at this step, from 1 to 0."""
    return (1 - step / iterations) ** POLY_POWER


def multi_scale_loss(outputs, masks, world=1):
    """Sum over DeepLabv2's outputs of the mean cross-entropy over pixels that are not 255.

    masks (B, H, W) int64 are resized to each output by nearest neighbour. With several ranks the
    mean is over the pixels of all of them, so that the gradient is that of one process.
    """
    sizes = [logits.shape[-2:] for logits in outputs]
    targets = [F.interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0].long()
               for size in sizes]
    pixels = torch.stack([(target != IGNORE).sum() for target in targets]).float()
    if world > 1:
        dist.all_reduce(pixels)
        pixels /= world  # DistributedDataParallel averages the gradients over the ranks
    sums = torch.stack([F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
                        for logits, target in zip(outputs, targets)])
    return (sums / pixels.clamp(min=1)).sum()


def validate(model, folder, ids, args, device):
    """mIoU over the first images of the split, without CRF; None where there is no ground truth."""
    C = len(folder.classes)
    confusion = np.zeros((C, C + 1), np.int64)
    for image_id in ids[:args.val_images]:
        if folder.mask_path(image_id).is_file():
            image = np.array(data.read_image(folder.image_path(image_id)))
            truth = data.read_mask(folder.mask_path(image_id), C, image.shape[1::-1])
            mask = predict(predict_logits(model, image, device, args.amp), image)
            confusion += confusion_matrix(mask, truth, C)
    return float(np.nanmean(iou_per_class(confusion))) if confusion.any() else None


def set_train(model, freeze_bn):
    """Training mode; with freeze_bn the batch norms stay as the ImageNet weights have them."""
    model.train()
    if freeze_bn:
        model.freeze_batch_norm()


def main(args):
    device, rank, world = join_processes()
    path = args.run / "seg.pt"
    if path.exists() and not (args.resume or args.overwrite):
        raise DataError(f"{path} exists: --resume goes on, --overwrite starts anew")
    checkpoint = load_checkpoint(path, "seg") if args.resume and path.exists() else None

    # --- data ---
    folder = Folder(args.data)
    ids = folder.ids(args.train_split)
    val_ids = [] if args.val_split == "none" else folder.ids(args.val_split)
    masks_dir = args.masks or args.run / "pseudo"
    note = masks_dir / "settings.json"  # how stage 2 made them
    facts = dict(classes=folder.classes, ids=ids, masks=note.read_text() if note.is_file() else "")

    # --- model ---
    torch.manual_seed(args.seed)
    config = SegmenterConfig(len(folder.classes), args.backbone, scales=tuple(args.scales))
    pretrained, weights = (False, None) if checkpoint else (args.pretrained, args.weights)
    model = DeepLabv2(config, pretrained, weights).to(device)
    if args.compile:
        model.compile_backbone()
    set_train(model, args.freeze_bn)
    optimizer = torch.optim.SGD(parameter_groups(model, args.lr, args.aspp_lr), lr=args.lr,
                                momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    step = 0
    if checkpoint:
        check_resume(checkpoint, args, path, **facts)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["step"]
        if step == args.iterations:
            print(f"{STAGE}  {path} is complete: {step} iterations")
    network = DistributedDataParallel(model) if world > 1 else model

    # --- batches ---
    fill = tuple((255 * model.normalise.mean).round().int().flatten().tolist())
    dataset = MaskedImages(folder, ids, masks_dir, args.crop, args.rescale, args.seed, fill)
    loader = DataLoader(dataset, num_workers=args.workers, pin_memory=device.type == "cuda",
                        batch_sampler=data.batches(len(ids), args.batch_size, args.seed, step,
                                                   args.iterations, rank, world))

    # --- train ---
    write_lines(args.run / "preset.txt", [args.preset])  # for evaluate.py --image
    progress = tqdm(loader, initial=step, total=args.iterations,
                    disable=None if rank == 0 else True)
    losses, recent, began = [], [], time.time()
    for images, masks, indices in progress:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * poly(step, args.iterations)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            outputs = network(images.to(device, non_blocking=True) / 255)
        loss = multi_scale_loss(outputs, masks.to(device, non_blocking=True), world)
        recent.append((loss.detach(), [ids[i] for i in indices]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        saves = step % args.save_every == 0 or step == args.iterations
        if step % READ_EVERY and not saves:
            continue
        losses += read_losses(recent, f"up to iteration {step}",
                              f"lower --lr; {path} keeps the last save")
        recent.clear()
        speed = len(losses) * args.batch_size / (time.time() - began)
        lr = optimizer.param_groups[0]["lr"]
        progress.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lr:.1e}", images_s=f"{speed:.0f}")
        if not saves:
            continue

        # --- save, score, log ---
        mean_loss = torch.tensor(losses, device=device).mean() / world
        if world > 1:
            dist.all_reduce(mean_loss)
        if rank == 0:
            miou = validate(model, folder, val_ids, args, device)
            set_train(model, args.freeze_bn)
            save_checkpoint(path, "seg", model, **facts, step=step, args=plain(args),
                            optimizer=optimizer.state_dict())
            log(args.run, STAGE, iteration=step, of=args.iterations, loss=float(mean_loss),
                     lr=lr, val_miou=miou, val_images=len(val_ids[:args.val_images]), crf=False,
                     images_s=speed)
        losses, began = [], time.time()


if __name__ == "__main__":
    run(main, parse_args())
