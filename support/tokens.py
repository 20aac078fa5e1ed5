"""--tokens FILE: what a frozen backbone makes of each image, computed once for all runs.

The file begins with a line of JSON, padded to HEADER bytes, that says what made the tokens. Then
one record an image follows: the hash of its file (KEY bytes) and its tokens (n, D) float16. Images
that are missing are added at the end.
"""
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from data import Images, as_input, loader
from support.run import DataError, digest, flock, progress

HEADER, KEY = 4096, 16


def add_tokens_flag(add):
    """The flag of stages 1 and 2."""
    add("--tokens", None, "keep what the frozen part of the backbone makes of each image in this "
        "file, and take it from there if it has it: a later run starts at once", type=Path)


class KeptTokens:
    """{image id: its tokens (n, D) float16}, from a file that keep_tokens() has filled."""

    def __init__(self, path, shape, rows):
        self.path, self.shape, self.rows = path, shape, rows  # rows: {image id: number of record}

    def __getitem__(self, image_id):
        start = HEADER + self.rows[image_id] * record_size(self.shape) + KEY
        tokens = np.fromfile(self.path, np.float16, int(np.prod(self.shape)), offset=start)
        return torch.from_numpy(tokens).view(self.shape)


def record_size(shape):
    """Bytes of one image."""
    return KEY + 2 * int(np.prod(shape))


def learning_blocks(args):
    """How many of the last blocks learn in a run of train_cls.py with these arguments."""
    return args.train_blocks if args.epochs > args.frozen_epochs else 0


def frozen_digest(model):
    """A hash of the weights before the last model.blocks_left blocks, in which tokens are kept."""
    blocks = model.backbone.blocks
    learn = tuple(f"blocks.{i}." for i in range(len(blocks) - model.blocks_left, len(blocks)))
    learn += ("norm.", "fc_norm.") if model.blocks_left else ()
    sha = hashlib.sha256()
    for name, weight in model.backbone.state_dict().items():
        if not name.startswith(learn):
            sha.update(name.encode() + weight.cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


@contextmanager
def locked(path):
    """The file, open to read and to write, while no other run adds to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("ab").close()
    with open(path, "r+b") as file:
        if not flock(file):
            print(f"{path}: another run fills it; waiting", flush=True)
            flock(file, wait=True)
        yield file


def check_header(path, header, made_with):
    """Refuse a file that is of something else, or of other tokens."""
    try:
        found = dict(json.loads(header))
    except (ValueError, TypeError):
        raise DataError(f"{path} is no file of tokens: --tokens takes the name of a new one")
    for name, value in made_with.items():
        if found.get(name) != value:
            raise DataError(f"{path} is of {name} {found.get(name)}, now it is {value}: choose "
                            "another --tokens")


@torch.no_grad()
def keep_tokens(dataset, model, blocks, args, device):
    """Let a data.Images read KeptTokens, after adding those that args.tokens lacks.

    blocks: how many of the last blocks learn, and so come after what is kept.
    """
    vit, path, folder, ids = model.backbone, args.tokens, dataset.folder, dataset.ids
    size = dataset.size
    if blocks > len(vit.blocks):
        raise DataError(f"--tokens keeps what never learns: lower --train-blocks to at most "
                        f"{len(vit.blocks)}")
    if blocks and not isinstance(vit, VisionTransformer):
        raise DataError(f"--tokens with {model.config.backbone}: pass --train-blocks 0")
    model.eval().blocks_left = blocks
    images = Images(folder, ids, size)
    shape = list(model.frozen_tokens(torch.zeros(1, 3, size, size, device=device)).shape[1:])
    made_with = dict(backbone=model.config.backbone, size=size, blocks_after=blocks, amp=args.amp,
                     shape=shape, weights=frozen_digest(model))
    keys = [digest(folder.image_path(image_id)).encode() for image_id in ids]
    with locked(path) as file:
        header, record = file.read(HEADER), record_size(shape)
        if header:
            check_header(path, header, made_with)
        else:
            file.write(json.dumps(made_with).encode().ljust(HEADER))
        number = (file.seek(0, 2) - HEADER) // record  # an unfinished record is written over
        rows = {}
        for row in range(number):
            file.seek(HEADER + row * record)
            rows[file.read(KEY)] = row
        missing = [k for k, key in enumerate(keys) if key not in rows]
        file.seek(HEADER + number * record)
        batches = loader(images, args, device, batch_size=8, sampler=missing, collate_fn=list)
        batches = progress(batches, f"tokens for {path}", (len(missing) + 7) // 8)
        for row, (k, tokens) in enumerate(zip(missing, frozen(model, batches, args, device)),
                                          start=number):
            if not tokens.isfinite().all():
                raise DataError(f"{path}: tokens of {ids[k]} do not fit into float16: train "
                                "without --tokens")
            file.write(keys[k] + tokens.numpy().tobytes())
            rows[keys[k]] = row
    dataset.tokens = KeptTokens(path, shape, {i: rows[key] for i, key in zip(ids, keys)})


def frozen(model, batches, args, device):
    """Yield the tokens (n, D) float16 of each image."""
    for items in batches:
        images = as_input(torch.stack([image for _, _, image in items]), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            tokens = model.frozen_tokens(images)
        yield from tokens.half().cpu()
