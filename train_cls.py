"""Stage 1 of 4: train the patch classifier from image labels alone (Sec. 0.3, Eq. 1 to 9).

Run:    python train_cls.py --data data/toy --run runs/toy
        torchrun --nproc-per-node=2 -- train_cls.py --data data/VOC2012 --run runs/voc
Reads:  JPEGImages/, image_labels.txt, classes.txt and the splits; never a mask
Writes: RUN/cls.pt after every epoch (weights, config, classes, arguments, optimiser), RUN/log.jsonl
Result: mAP 0.90 (sd 0.01, 5 seeds) on val of the beetles, in 83 s on two Xeon cores
"""
import math
import time

import torch

from data import AUGMENT, Folder, LabelledImages, as_input, loader, sub_seed, training_batches
from model import (CONTEXTS, CPFCTE, ClassifierConfig, border_and_centre, classification_loss,
                   pool_by_place, pool_patches)
from support.checkpoints import (check_loss, finite_mean_loss, open_checkpoint, restore,
                                 save_checkpoint)
from support.files import logged
from support.flags import common_flags
from support.processes import join_processes, launch, wrap_for_training
from support.scores import mean_average_precision, note_shared
from support.tokens import add_tokens_flag, keep_tokens, learning_blocks


def parse_args(argv=None):
    """The flags of stage 1."""
    flags = common_flags(__doc__, trains=True)
    add = flags.add  # the default is voc's; toy=, photo= override it; photo inherits voc_small's
    add("--train-split", "trainaug", "split to train on; train where DATA has no trainaug",
        voc_small="train")
    add("--val-split", "val", "split whose image labels score each epoch; none: no score")
    add("--size", 384, "resize images to SIZE x SIZE", toy=96, voc_small=224, photo=448, low=1)
    add("--augment", ["flip", "jitter"], "vflip and transpose are ViT-PCM's", toy=["flip"],
        photo=[], nargs="*", choices=AUGMENT)
    add("--backbone", "vit_base_patch16_384.augreg_in21k_ft_in1k",
        "any plain ViT of timm (or vit_toy); its patch tokens are P in Eq. (1)", toy="vit_toy",
        voc_small="vit_tiny_patch16_224.augreg_in21k_ft_in1k", photo="vit_lite0")
    add("--class-tokens", "soft", "t(i) in Eq. (2). soft: each patch's own mixture of the tokens; "
        "all: every token for every patch, which is a bias; append: tokens join the BiLSTM's "
        "lines; none: without, Table 4", choices=("soft", "all", "append", "none"))
    add("--context", "hv", "Eq. (3) to (6). hv: BiLSTMs along rows and columns; raster: one along "
        "the row-major sequence; none: without. Not in the paper: conv, a depthwise 7x7; pool, "
        "means of row and column", choices=(*CONTEXTS, "none"))
    add("--dropout", 0.2, "before the BiLSTM and before the classifier", toy=0.0, high=0.99)
    add("--pool", "topk", "Eq. (8), Table 5", choices=("topk", "max", "avg"))
    add("--top-k", 6, "K in Eq. (8): 1 is max pooling, all patches is average pooling", toy=12,
        photo=50, low=1)
    add("--centre-steps", 10, "first steps, which instead of Eq. (8) pool background from the "
        "border of the images and every other class from their centre", toy=0)
    add("--epochs", 50, "passes over the training images", toy=6, voc_small=12, photo=1, low=1)
    add("--batch-size", 16, "images of one step, over all ranks together", low=1)
    add("--frozen-epochs", 2, "first epochs, in which the backbone does not learn", toy=0, photo=0)
    add("--train-blocks", 5, "last blocks trained after that; above the ViT's depth: all", photo=0)
    add_tokens_flag(add)
    add("--schedule", "two-stage", "two-stage: --lr for the first two epochs, --late-lr after; "
        "cosine: a warm-up of one epoch to --lr, then down to --late-lr", toy="cosine",
        choices=("two-stage", "cosine"))
    add("--lr", 1e-3, "Adam's learning rate at first", low=1e-9, high=10)
    add("--late-lr", 1e-4, "Adam's learning rate later", toy=0.0, high=10)
    add("--module-lr", 1.0, "factor on the rate of class tokens and context", photo=0.1, high=1000)
    args = flags.parse(argv)
    if args.class_tokens == "append" and args.context not in ("hv", "raster"):
        flags.error("--class-tokens append needs --context hv or raster: without a BiLSTM the "
                    "appended tokens never meet the patches")
    if args.tokens and args.augment:
        flags.error("--tokens keeps one view of each image: pass --augment without a name")
    return args


def parameter_groups(model, module_lr):
    """Adam's groups: backbone and W_c; class tokens and context at module_lr times their rate."""
    base, modules = [], []
    for name, parameter in model.named_parameters():
        (base if name.startswith(("backbone.", "classifier.")) else modules).append(parameter)
    return [dict(params=base, factor=1.0), dict(params=modules, factor=module_lr)]


def learning_rate(args, step, steps_per_epoch):
    """The two-stage rate of Sec. 0.4.2, or a warm-up and a cosine for training from scratch."""
    if args.schedule == "two-stage":
        return args.lr if step < 2 * steps_per_epoch else args.late_lr
    warm_up = (step + 1) / steps_per_epoch
    progress = step / (args.epochs * steps_per_epoch)
    cosine = args.late_lr + (args.lr - args.late_lr) * (1 + math.cos(math.pi * progress)) / 2
    return min(warm_up, 1) * cosine


@torch.no_grad()
def validate(model, dataset, args, device):
    """{name: value} of a split, by its image labels alone.

    val_map: mAP of the image scores, over the object classes that occur. border_background and
    centre_background: the share of background in these patches; a note if sides look exchanged.
    """
    model.eval()
    scores, background = [], []
    in_order = [(index, 0) for index in range(len(dataset))]  # (index, number of the draw)
    for images, _ in loader(dataset, args, device, batch_size=args.batch_size, sampler=in_order):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            Y = model(as_input(images, device))                       # (B, h, w, C)
        scores.append(pool_patches(Y, args.pool, args.top_k))
        background.append((Y.argmax(dim=-1) == 0).float())            # (B, h, w)
    model.train()
    background = torch.cat(background)                                # (n, h, w)
    border, centre = (background[:, place].mean().item()
                      for place in border_and_centre(*background.shape[1:]))
    if border < centre - 0.05:
        print(f"note: {border:.2f} of the border, {centre:.2f} of the centre is background: object "
              "and background look exchanged. Train with more --centre-steps or another --seed")
    return dict(val_map=mean_average_precision(torch.cat(scores).cpu(), dataset.labels),
                border_background=border, centre_background=centre)


def main(args):
    device, rank, world = join_processes(args.device)

    # --- data ---
    folder = Folder(args.data)
    ids = folder.ids(args.train_split)
    train = LabelledImages(folder, ids, args.size, args.augment, args.seed)
    val = None if args.val_split == "none" else LabelledImages(
        folder, folder.ids(args.val_split), args.size)
    if val and rank == 0:
        note_shared(ids, val.ids)
    steps_per_epoch = len(ids) // args.batch_size

    # --- model ---
    inputs = dict(classes=folder.classes, ids=ids, labels=train.labels.argwhere().tolist())
    path, checkpoint = open_checkpoint(args, "cls", args.epochs, **inputs)
    torch.manual_seed(args.seed)
    config = ClassifierConfig(len(folder.classes), args.backbone, args.class_tokens, args.context,
                              args.dropout)
    pretrained, weights = (False, None) if checkpoint else (args.pretrained, args.weights)
    model = CPFCTE(config, pretrained, weights).to(device)
    optimizer = torch.optim.Adam(parameter_groups(model, args.module_lr), lr=args.lr, fused=True)
    first_epoch = checkpoint["epoch"] if checkpoint else 0
    restore(path, checkpoint, model=model, optimizer=optimizer)
    for dataset in [each for each in (train, val) if each and args.tokens]:
        keep_tokens(dataset, model, learning_blocks(vars(args)), args, device)

    # --- train ---
    for epoch in range(first_epoch, args.epochs):
        if epoch in (first_epoch, args.frozen_epochs):
            model.set_trainable_blocks(0 if epoch < args.frozen_epochs else args.train_blocks)
            network = wrap_for_training(model.train(), args, world)
        first, began, total = epoch * steps_per_epoch, time.time(), torch.zeros((), device=device)
        torch.manual_seed(sub_seed(args.seed, epoch * world + rank))  # dropout
        for step, images, image_labels in training_batches(
                train, args, device, first, first + steps_per_epoch, f"epoch {epoch + 1}", rank,
                world):
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(args, step, steps_per_epoch)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                Y = network(images)                          # Eq. (1) to (7)  (B, h, w, C)
            s = (pool_by_place(Y) if step < args.centre_steps else
                 pool_patches(Y, args.pool, args.top_k))     # Eq. (8)         (B, C)
            loss = classification_loss(s, image_labels)      # Eq. (9)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            check_loss(total, step + 1, path)

        # --- save, score, log ---
        loss = finite_mean_loss(total, steps_per_epoch, world, model, f"in epoch {epoch + 1}", path)
        speed = steps_per_epoch * args.batch_size / (time.time() - began)
        if rank == 0:
            save_checkpoint(path, "cls", model, args, **inputs, epoch=epoch + 1,
                            optimizer=optimizer.state_dict())
            with logged(args.run, "train_cls", epoch=epoch + 1, of=args.epochs, loss=loss,
                        lr=optimizer.param_groups[0]["lr"], images_s=speed) as line:
                line.update(validate(model, val, args, device) if val else {})


if __name__ == "__main__":
    launch(main, parse_args())
