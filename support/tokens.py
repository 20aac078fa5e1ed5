"""--tokens DIR: what a frozen backbone makes of each image, computed once for all runs.

DIR/KEY.npy holds the tokens (n, D) float16 of the image whose file has the hash KEY, and
DIR/made_with.json says what made them. A run adds the images that are missing.
"""
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from data import Images, as_input, loader
from support.files import UserError, atomic, file_hash, flock, progress, read_text, write_lines


def add_tokens_flag(add):
    """The flag of stages 1 and 2."""
    add("--tokens", None, "keep what the frozen part of the backbone makes of each image in this "
        "folder, and take it from there if it has it: a later run starts at once", type=Path)


class KeptTokens:
    """{image id: its tokens (n, D) float16}, each read from its file when it is asked for."""

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, image_id):
        try:
            return torch.from_numpy(np.load(self.paths[image_id]))
        except (EOFError, ValueError):  # a power failure can leave half a file
            raise UserError(f"{self.paths[image_id]} is damaged: delete it")


def learning_blocks(args):
    """How many of the last blocks learn in a run of train_cls.py with this {flag: value}."""
    return args["train_blocks"] if args["epochs"] > args["frozen_epochs"] else 0


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


def frozen_tokens(model, images):
    """The ViT's tokens (B, n, D) of images (B, 3, H, W), before its last blocks_left."""
    vit, entering = model.backbone, []
    if not model.blocks_left:
        return vit.forward_features(model.normalise(images))
    hook = vit.blocks[-model.blocks_left].register_forward_pre_hook(
        lambda block, inputs: entering.append(inputs[0]))
    vit.forward_features(model.normalise(images))
    hook.remove()
    return entering[0]


@contextmanager
def locked(home):
    """The folder, while no other run adds to it."""
    if home.is_file():
        raise UserError(f"{home} is a file: --tokens takes a folder")
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".tokens.lock", "a") as file:
        if not flock(file):
            print(f"{home}: another run fills it; waiting")
            flock(file, wait=True)
        yield


def check_made_with(home, made_with):
    """Note in a new folder what makes its tokens; refuse one that holds something else."""
    note = home / "made_with.json"
    if not note.is_file():
        if any(not path.name.startswith(".") for path in home.iterdir()):
            raise UserError(f"{home} holds something else: --tokens takes a new folder")
        return write_lines(note, [json.dumps(made_with)])
    try:
        found = dict(json.loads(read_text(note)))
    except (ValueError, TypeError):
        raise UserError(f"{note} is damaged: choose another --tokens")
    for name, value in made_with.items():
        if found.get(name) != value:
            raise UserError(f"{home} is of {name} {found.get(name)}, now it is {value}: choose "
                            "another --tokens")


@torch.no_grad()
def keep_tokens(dataset, model, blocks, args, device):
    """Let a data.Images read its tokens from args.tokens, after adding those that it lacks.

    blocks: how many of the last blocks learn, and so come after what is kept.
    """
    vit, home, folder = model.backbone, args.tokens, dataset.folder
    if blocks > len(vit.blocks):
        raise UserError(f"--tokens keeps what never learns: lower --train-blocks to at most "
                        f"{len(vit.blocks)}")
    if blocks and not isinstance(vit, VisionTransformer):
        raise UserError(f"--tokens with {model.config.backbone}: pass --train-blocks 0")
    model.eval().blocks_left = blocks
    made_with = dict(backbone=model.config.backbone, size=dataset.size, blocks_after=blocks,
                     amp=args.amp, weights=frozen_digest(model))
    paths = {i: home / f"{file_hash(folder.image_path(i))}.npy" for i in dataset.ids}
    with locked(home):
        check_made_with(home, made_with)
        images = Images(folder, [i for i in paths if not paths[i].is_file()], dataset.size)
        batches = loader(images, args, device, batch_size=8, collate_fn=list)
        for items in progress(batches, f"tokens for {home}", len(batches)):
            ids, _, resized = zip(*items)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                tokens = frozen_tokens(model, as_input(torch.stack(resized), device))
            for image_id, of_image in zip(ids, tokens.half().cpu()):
                if not of_image.isfinite().all():
                    raise UserError(f"tokens of {image_id} do not fit into float16: train without "
                                    "--tokens")
                with atomic(paths[image_id]) as temporary, open(temporary, "wb") as file:
                    np.save(file, of_image.numpy())
    dataset.tokens = KeptTokens(paths)
