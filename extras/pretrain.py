"""Pretrain a backbone by image classification, where timm's pretrained weights cannot be had.

Run:    python extras/pretrain.py --data data/tiny_imagenet --run runs/vit
Reads:  DATA/train/CLASS/ and DATA/val/CLASS/, folders of images (torchvision's ImageFolder)
Writes: RUN/pretrain.pt after every epoch, RUN/log.jsonl, and RUN/weights.pth: the backbone, which
        --weights of train_cls.py and of train_seg.py takes
"""
import math
import sys
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402  the scripts are no package
from model import ClassifierConfig, Normalise  # noqa: E402
from support import run  # noqa: E402
from support.backbones import create_backbone  # noqa: E402


def parse_args(argv=None):
    """The flags of pretraining."""
    flags = run.stage_flags(__doc__, trains=True, bf16=run.PRESETS, pretrained=False)
    add = flags.add
    add("--backbone", "vit_small_photo", "any network of timm that classifies images")
    add("--size", 64, "side of the images in pixels", low=1)
    add("--epochs", 30, "passes over DATA/train", low=1)
    add("--batch-size", 128, "images of one step, over all ranks together", low=1)
    add("--lr", 1e-3, "AdamW's rate after an epoch of warm-up; a cosine follows", low=1e-9)
    add("--weight-decay", 0.05, "AdamW's, of all but biases and norms", high=10)
    add("--crop", 0.35, "least share of an image that a random crop keeps", low=0.01, high=1)
    add("--mixup", 0.2, "alpha of mixup; 0: none", high=100)
    add("--label-smoothing", 0.1, "of the cross-entropy", high=1)
    return flags.parse(argv)


class Classes(ImageFolder):
    """(index, draw) -> image (3, S, S) uint8, number of its class."""

    def __init__(self, root, seed, *transforms):
        self.seed, change = seed, v2.Compose([*transforms, v2.PILToTensor()])
        try:
            super().__init__(root, change, loader=data.read_image)
        except FileNotFoundError as error:  # no folder, no class, a class without an image
            raise run.DataError(f"{root} needs a folder of images for each class: {error}")

    def __getitem__(self, item):
        with data.seeded(self.seed, item[1]):
            return super().__getitem__(item[0])


@torch.no_grad()
def validate(model, val, args, device):
    """Top-1 and top-5 accuracy on the val folder."""
    hits, model, order = torch.zeros(2), model.eval(), [(index, 0) for index in range(len(val))]
    for images, labels in data.loader(val, args, device, batch_size=args.batch_size, sampler=order):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            scores = model(images.to(device) / 255).cpu()
        right = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        hits += torch.stack([right[:, 0].sum(), right.sum()])
    model.train()
    return dict(zip(("top1", "top5"), (hits / len(val)).tolist()))


def main(args):
    device, rank, world = run.join_processes(args.device)
    S, batch = args.size, args.batch_size
    train = Classes(args.data / "train", args.seed, v2.RandomResizedCrop(S, (args.crop, 1)),
                    v2.RandomHorizontalFlip())
    val = Classes(args.data / "val", args.seed, v2.Resize(S), v2.CenterCrop(S))
    facts, a_pass = dict(classes=train.classes, images=len(train)), len(train) // batch
    if train.classes != val.classes:
        raise run.DataError(f"{args.data}/train and {args.data}/val have different classes")
    mix = v2.MixUp(num_classes=len(val.classes), alpha=args.mixup) if args.mixup else v2.Identity()

    path, checkpoint = run.open_checkpoint(args, "pretrain", **facts)
    torch.manual_seed(args.seed)
    pretrained, weights = (False, None) if checkpoint else (args.pretrained, args.weights)
    fixed = getattr(timm.get_pretrained_cfg(args.backbone), "fixed_input_size", False)  # as ViTs'
    backbone = create_backbone(args.backbone, "classifier of timm", pretrained, weights,
                               num_classes=len(val.classes), **{"img_size": S} if fixed else {})
    model = nn.Sequential(Normalise(backbone), backbone).to(device)
    model.config = ClassifierConfig(len(val.classes), args.backbone)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), fused=True)
    run.restore(path, checkpoint, model=model, optimizer=optimizer)
    network = run.prepare(model.train(), args, world)

    for epoch in range(checkpoint["epoch"] if checkpoint else 0, args.epochs):
        step, began, total = epoch * a_pass, time.time(), torch.zeros((), device=device)
        torch.manual_seed(args.seed * 1_000_003 + epoch * world + rank)  # mixup
        order = data.batches(len(train), batch, args.seed, step, step + a_pass, rank, world)
        batches = data.loader(train, args, device, batch_sampler=order)
        for images, labels in run.progress(batches, f"epoch {epoch + 1}", a_pass, rank > 0):
            for group in optimizer.param_groups:
                cosine = (1 + math.cos(math.pi * step / (args.epochs * a_pass))) / 2
                group["lr"] = args.lr * min((step + 1) / a_pass, cosine)
            images, labels = mix(images.to(device) / 255, labels.to(device))
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                scores = network(images).float()
            loss = F.cross_entropy(scores, labels, label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
        loss = run.mean_loss(total, a_pass, world, model, f"in epoch {epoch + 1}", path)
        if rank == 0:
            speed = a_pass * batch / (time.time() - began)
            run.log(args.run, "pretrain", epoch=epoch + 1, of=args.epochs, loss=loss,
                    **validate(model, val, args, device), images_s=speed)
            with run.atomic(args.run / "weights.pth") as temporary:
                torch.save(backbone.state_dict(), temporary)
            run.save_checkpoint(path, "pretrain", model, args, **facts, epoch=epoch + 1,
                                optimizer=optimizer.state_dict())


if __name__ == "__main__":
    run.launch(main, parse_args())
