"""Stage 1 of 4: train the patch classifier from image labels alone (Sec. 0.3, Eq. 1 to 9).

Run:    python train_cls.py --data data/toy --run runs/toy
        torchrun --nproc-per-node=2 -- train_cls.py --data data/VOC2012 --run runs/voc
Reads:  JPEGImages/, image_labels.txt, classes.txt and the splits; never a mask
Writes: RUN/cls.pt after every epoch (weights, config, classes, arguments, optimiser), RUN/log.jsonl
        DATA/cache/SPLIT-SIZE-*.npy, the decoded images, with --cache
"""
import math
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from data import Folder, LabelledImages, augment
from model import CPFCTE, ClassifierConfig, classification_loss, pool_patches
from support.run import (READ_EVERY, DataError, check_resume, join_processes, load_checkpoint, log,
                         parse, plain, positive, read_losses, run, save_checkpoint, training_parser)

STAGE = "train_cls"


def parse_args(argv=None):
    """The flags of stage 1."""
    parser = training_parser(__doc__)
    add = parser.add_argument
    add("--train-split", help="split whose images and image labels are trained on")
    add("--val-split", help="split whose image labels score each epoch; none: no score")
    add("--size", type=positive,
        help="images are resized to SIZE x SIZE, aspect ratio not kept")
    add("--backbone", help="any ViT of timm (or vit_toy); its patch tokens are P in Eq. (1)")
    add("--class-tokens", choices=("soft", "all", "append", "none"), default="soft",
        help="t(i) in Eq. (2). soft: each patch's own mixture of the tokens; all: every token for "
        "every patch, which is a bias; append: tokens join the BiLSTM's lines; none: Table 4")
    add("--context", choices=("hv", "raster", "none"), default="hv", help="Eq. (3) to (6). hv: "
        "along rows and columns; raster: along the row-major sequence; none: Table 4")
    add("--pool", choices=("topk", "max", "avg"), default="topk", help="Eq. (8), Table 5")
    add("--top-k", type=positive, default=6,
        help="K in Eq. (8): 1 is max pooling, all patches is average pooling")
    add("--dropout", type=float, default=0.2, help="before the BiLSTM and before the classifier")
    add("--cache", action="store_true", help="decode and resize every image only once, into one "
        "file per split in DATA/cache (VOC at 384: 5.3 GB); all runs share it, with equal results")
    add("--augment", nargs="*", choices=("flip", "jitter", "vflip", "transpose"),
        default=["flip", "jitter"], help="the last two are ViT-PCM's, off in this repository")
    add("--epochs", type=positive, help="passes over the training images")
    add("--batch-size", type=positive, help="images of one step, over all ranks together")
    add("--frozen-epochs", type=int, help="first epochs, in which the backbone does not learn")
    add("--train-blocks", type=int, help="last transformer blocks that learn after that; all of "
        "them: the whole backbone, embeddings included")
    add("--schedule", choices=("two-stage", "cosine"), help="two-stage: --lr for the first two "
        "epochs, --late-lr after; cosine: a warm-up of one epoch to --lr, then down to --late-lr")
    add("--lr", type=float, help="Adam's learning rate at first")
    add("--late-lr", type=float, help="Adam's learning rate later")
    return parse(parser, STAGE, argv)


def learning_rate(args, step, steps_per_epoch):
    """The two-stage rate of Sec. 0.4.2, or a warm-up and a cosine for training from scratch."""
    if args.schedule == "two-stage":
        return args.lr if step < 2 * steps_per_epoch else args.late_lr
    warm_up = (step + 1) / steps_per_epoch
    progress = step / (args.epochs * steps_per_epoch)
    cosine = args.late_lr + (args.lr - args.late_lr) * (1 + math.cos(math.pi * progress)) / 2
    return min(warm_up, 1) * cosine


def average_precision(scores, truth):
    """Mean of the precision at each positive, images ranked by score; (n,) and (n,) bool."""
    ranked = truth[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
    return precision[ranked].mean()


def multi_label_scores(scores, labels):
    """(macro F1 at 0.5, mAP) over the object classes that occur; scores and labels (n, C)."""
    f1, ap = [], []
    for s, y in zip(scores[:, 1:].T, labels[:, 1:].T.astype(bool)):
        if y.any():
            f1.append(2 * (y & (s > 0.5)).sum() / (y.sum() + (s > 0.5).sum()))
            ap.append(average_precision(s, y))
    return float(np.mean(f1)), float(np.mean(ap))


@torch.no_grad()
def validate(model, loader, args, device):
    """(F1, mAP) of the image scores against the image labels of a loader's data set."""
    model.eval()
    scores = []
    for images, *_ in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            patch_probs = model(images.to(device) / 255)
        scores.append(pool_patches(patch_probs, args.pool, args.top_k).cpu())
    model.train()
    return multi_label_scores(torch.cat(scores).numpy(), loader.dataset.labels.numpy())


def main(args):
    device, rank, world = join_processes()
    path = args.run / "cls.pt"
    if path.exists() and not (args.resume or args.overwrite):
        raise DataError(f"{path} exists: --resume goes on, --overwrite starts anew")
    checkpoint = load_checkpoint(path, "cls") if args.resume and path.exists() else None

    # --- data ---
    folder = Folder(args.data)
    ids = folder.ids(args.train_split)
    splits = {name: LabelledImages(folder, folder.ids(name), args.size)
              for name in (args.train_split, args.val_split) if name != "none"}
    if args.cache:
        for name, dataset in splits.items():
            dataset.use_cache(name, args.workers, rank, world)
    val_loader = None
    if args.val_split != "none" and rank == 0:
        val_loader = splits[args.val_split].in_order(args.batch_size, args.workers)
    steps_per_epoch = len(ids) // args.batch_size
    last_step = args.epochs * steps_per_epoch

    # --- model ---
    torch.manual_seed(args.seed)
    config = ClassifierConfig(len(folder.classes), args.backbone, args.class_tokens, args.context,
                              args.dropout)
    pretrained, weights = (False, None) if checkpoint else (args.pretrained, args.weights)
    model = CPFCTE(config, pretrained, weights).to(device)
    if args.compile:
        model.compile_backbone()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    step = 0
    if checkpoint:
        check_resume(checkpoint, args, path, classes=folder.classes, ids=ids)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step = checkpoint["epoch"] * steps_per_epoch
        if step == last_step:
            print(f"{STAGE}  {path} is complete: {args.epochs} epochs")

    # --- train ---
    loader = DataLoader(splits[args.train_split], num_workers=args.workers,
                        pin_memory=device.type == "cuda",
                        batch_sampler=data.batches(len(ids), args.batch_size, args.seed, step,
                                                   last_step, rank, world))
    progress = tqdm(loader, initial=step, total=last_step, disable=None if rank == 0 else True)
    losses, recent, began, network = [], [], time.time(), None
    for images, labels, indices, draws in progress:
        epoch = step // steps_per_epoch
        if network is None or step == args.frozen_epochs * steps_per_epoch:
            model.train_last(0 if epoch < args.frozen_epochs else args.train_blocks)
            network = DistributedDataParallel(model) if world > 1 else model
            network.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, steps_per_epoch)
        images = images.to(device, non_blocking=True) / 255
        images = augment(images, args.seed, draws, args.augment)
        torch.manual_seed(args.seed * 1_000_003 + step * world + rank)  # dropout: step's alone
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            patch_probs = network(images)
        scores = pool_patches(patch_probs, args.pool, args.top_k)
        loss = classification_loss(scores, labels.to(device, non_blocking=True))
        recent.append((loss.detach(), [ids[i] for i in indices]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % READ_EVERY and step % steps_per_epoch:
            continue
        losses += read_losses(recent, f"in epoch {epoch + 1}",
                              f"lower --lr; {path} keeps the last whole epoch")
        recent.clear()
        speed = len(losses) * args.batch_size / (time.time() - began)
        lr = optimizer.param_groups[0]["lr"]
        progress.set_postfix(loss=f"{losses[-1]:.3f}", lr=f"{lr:.1e}", images_s=f"{speed:.0f}")
        if step % steps_per_epoch:
            continue

        # --- end of an epoch: score, save, log ---
        mean_loss = torch.tensor(losses, device=device).mean() / world
        if world > 1:
            dist.all_reduce(mean_loss)
        if rank == 0:
            f1, mean_ap = (validate(model, val_loader, args, device) if val_loader
                           else (None, None))
            save_checkpoint(path, "cls", model, classes=folder.classes, ids=ids,
                            epoch=epoch + 1, args=plain(args), optimizer=optimizer.state_dict())
            log(args.run, STAGE, epoch=epoch + 1, of=args.epochs, loss=float(mean_loss),
                     lr=lr, val_f1=f1, val_map=mean_ap, images_s=speed)
        losses, began = [], time.time()


if __name__ == "__main__":
    run(main, parse_args())
