"""What every stage needs and no paper mentions: flags, presets, errors, files, checkpoints, processes."""
import argparse
import hashlib
import json
import math
import os
import secrets
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from itertools import starmap
from pathlib import Path

import torch
import torch.distributed as dist

# What a data set changes; each value is the default of the flag of that name, and the flag wins.
# Where a row names no value, the stage's own default stands: the paper's, or ViT-PCM's (README).
VIT_B = "vit_base_patch16_384.augreg_in21k_ft_in1k"
PRESETS = {
    "voc": {
        "train_cls": dict(train_split="trainaug", val_split="val", backbone=VIT_B, size=384,
                          epochs=50, batch_size=16, frozen_epochs=2, train_blocks=5,
                          schedule="two-stage", lr=1e-3, late_lr=1e-4),
        "make_pseudo": dict(split="trainaug", size=960),
        "train_seg": dict(train_split="trainaug", val_split="val", backbone="resnet101.tv_in1k",
                          crop=321, batch_size=10, iterations=20000, save_every=1000, lr=2.5e-4,
                          aspp_lr=10, scales=[1.0, 0.75, 0.5], rescale=[0.5, 1.5],
                          freeze_bn=True),
        "evaluate": dict(split="val"),
    },
    "toy": {
        "train_cls": dict(train_split="train", val_split="val", backbone="vit_toy", size=96,
                          pretrained=False, epochs=6, batch_size=8, frozen_epochs=0,
                          train_blocks=4, schedule="cosine", lr=7e-4, late_lr=0.0, dropout=0.0,
                          augment=["flip"]),
        "make_pseudo": dict(split="train", size=96, crf_sxy=10, crf_srgb=13),  # found on val
        "train_seg": dict(train_split="train", val_split="val", backbone="resnet_toy",
                          pretrained=False, crop=96, batch_size=10, iterations=300, save_every=100,
                          lr=0.02, aspp_lr=1, scales=[1.0, 0.75], rescale=[0.75, 1.25],
                          freeze_bn=False),
        "evaluate": dict(split="test", crf_sxy=10, crf_srgb=13),
    },
}
PRESETS["coco"] = {  # as voc; 100,000 iterations: the public PyTorch DeepLabv2's COCO-Stuff setting
    **PRESETS["voc"],
    "train_cls": PRESETS["voc"]["train_cls"] | dict(train_split="train"),
    "make_pseudo": PRESETS["voc"]["make_pseudo"] | dict(split="train"),
    "train_seg": PRESETS["voc"]["train_seg"] | dict(train_split="train", iterations=100000,
                                                    save_every=5000),
}


# --- command lines, errors, the run folder ---------------------------------------------------

class DataError(Exception):
    """A user's mistake, told in one line that names the file and the way out."""

    def __init__(self, message):
        # a DataLoader worker hands over its whole traceback as the message: the last line is ours
        super().__init__(str(message).strip().splitlines()[-1].removeprefix("support.run.DataError: "))


def run(main, args):
    """Call main(args); a DataError, or a full disk, ends in one line and exit code 1."""
    try:
        main(args)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


def positive(text):
    """argparse type: a whole number above zero."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above zero")
    return int(text)


def probability(text):
    """argparse type: a number from 0 to 1."""
    try:
        if 0 <= float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to 1")


def deviation(text):
    """argparse type: a number from 0.001 up; what is smaller leaves nobody anything to hear."""
    try:
        if 0.001 <= float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0.001 up")


def stage_parser(doc):
    """The flags that all four stages share; parse() fills the defaults that a preset gives."""
    class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        """The docstring as it stands, and each flag's default."""

    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    parser.add_argument("--data", type=Path, help="data set folder, laid out as data.py says")
    parser.add_argument("--run", type=Path, help="folder that this and the other stages write to")
    parser.add_argument("--preset", choices=PRESETS, help="row of PRESETS in support/run.py that gives "
                        "the defaults; without this flag DATA/preset.txt names it, else it is voc")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1),
                        help="worker processes: they load images, write masks and, on a CPU, run "
                        "the CRF; 0: none. Results do not depend on it")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction,
                        default=torch.cuda.is_available(),
                        help="run the network in bfloat16 autocast (the losses stay in float32)")
    return parser


def training_parser(doc):
    """stage_parser, and the flags that the two stages which train share."""
    parser = stage_parser(doc)
    add = parser.add_argument
    add("--weights", help="local copy of the backbone's timm weights, instead of the hub's")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True,
        help="start from the backbone's ImageNet weights, not from random ones")
    add("--seed", type=int, default=0, help="of the weights, the order and the augmentation")
    add("--compile", action="store_true", help="torch.compile the backbone in training: meant for "
        "GPUs and long runs (it needs a C compiler, on a CPU one of C++, and time to begin with)")
    add("--resume", action="store_true",
        help="go on from RUN's checkpoint exactly as if never interrupted")
    add("--overwrite", action="store_true", help="replace RUN's checkpoint if there is one")
    return parser


def parse(parser, stage, argv=None, needed=("data", "run")):
    """Parse argv with the defaults that --preset, or DATA/preset.txt, gives to this stage."""
    argv = sys.argv[1:] if argv is None else argv
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    notes = [home / "preset.txt" for home in (known.data, known.run) if home]
    named = [note.read_text().strip() for note in notes if note.is_file()]
    preset = known.preset or (named or ["voc"])[0]
    if preset not in PRESETS:
        parser.error(f"unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
    defaults = dict(PRESETS[preset][stage])
    for flag in ("train_split", "split"):  # VOC without SBD has no trainaug.txt: its own train then
        if defaults.get(flag) == "trainaug" and known.data:
            if not (known.data / "ImageSets/Segmentation/trainaug.txt").exists():
                defaults[flag] = "train"
    parser.set_defaults(preset=preset, **defaults)
    args = parser.parse_args(argv)
    for name in needed:
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed")
    return args


@contextmanager
def atomic(path):
    """Yield a temporary name beside path and rename it to path once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(path, lines):
    """Write a text file, one line an entry, atomically."""
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def write_folder_files(root, preset, classes, label_lines):
    """Write a folder's three readable files; image_labels.txt, the last one, completes it."""
    write_lines(root / "classes.txt", classes)
    write_lines(root / "preset.txt", [preset])
    write_lines(root / "image_labels.txt", label_lines)

def log(run, stage, **values):
    """Print one line of results and append the same values to RUN/log.jsonl."""
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{stage}  " + "  ".join(shown), flush=True)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"stage": stage, **values}) + "\n")


def in_parallel(function, jobs, workers):
    """Yield function(*job) in order, from worker processes, while jobs are still being made."""
    if workers == 0:
        yield from starmap(function, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = deque()
        for job in jobs:
            pending.append(pool.submit(function, *job))
            if len(pending) > 8 * workers:  # bounds the memory that waiting jobs hold
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def digest(path):
    """A short fingerprint of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def claim(directory, settings, overwrite):
    """Note what the masks in directory are made with; refuse to mix them with others."""
    note = directory / "settings.json"
    if overwrite and directory.is_dir():
        for path in directory.glob("*.png"):
            path.unlink()
    elif note.is_file() and json.loads(note.read_text()) != settings:
        raise DataError(f"{directory} holds masks of other data, cls.pt or flags ({note}): "
                        "--overwrite replaces them, --run writes elsewhere")
    write_lines(note, [json.dumps(settings)])


# --- checkpoints and processes -----------------------------------------------------------------

MADE_BY = {"cls": "train_cls.py", "seg": "train_seg.py"}


def save_checkpoint(path, kind, model, **content):
    """Write a file that describes itself: what it is, its config and weights, and `content`."""
    with atomic(path) as temporary:
        torch.save({"kind": kind, "config": asdict(model.config), "model": model.state_dict(),
                    **content}, temporary)


def load_checkpoint(path, kind):
    """The dictionary that save_checkpoint wrote, on the CPU; kind is "cls" or "seg"."""
    if not path.is_file():
        raise DataError(f"{path} not found: run {MADE_BY[kind]} first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own
        raise DataError(f"{path} is not a readable checkpoint ({type(error).__name__}): "
                        f"run {MADE_BY[kind]} again")
    found = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if found != kind:
        raise DataError(f"{path} is no {kind} checkpoint but {found or 'something else'}: "
                        f"{MADE_BY[kind]} writes one")
    return checkpoint


def join_processes():
    """(device, rank, world): this process's place under torchrun (nccl or gloo), or alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.set_flush_denormal(True)  # a CPU is several times slower on the tiniest gradients
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise DataError(f"--nproc-per-node is more than the {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:  # the long timeout: ranks wait while others finish their CRFs or rank 0 scores
        cuda = dict(backend="nccl", device_id=device) if device.type == "cuda" else {}
        dist.init_process_group(**{"backend": "gloo", **cuda}, timeout=timedelta(hours=12))
    return device, rank, world

READ_EVERY = 20  # steps between two looks at the loss: each look waits for the GPU


def read_losses(recent, where, way_out):
    """The losses of [(tensor, samples)] as numbers; one that is not finite names its samples."""
    losses = torch.stack([loss for loss, _ in recent]).tolist()
    for loss, (_, samples) in zip(losses, recent):
        if not math.isfinite(loss):
            raise DataError(f"the loss is {loss} {where}, images {', '.join(samples)}: {way_out}")
    return losses


def plain(args):
    """The arguments of a run as checkpoints keep them: paths as strings."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}


def check_resume(checkpoint, args, path, **facts):
    """Refuse to go on with other flags, or on other data, than the checkpoint was made with."""
    for name, value in facts.items():
        if checkpoint[name] != value:
            raise DataError(f"{path} was made with other {name}: choose another --run, or "
                            "--overwrite")
    free = {"data", "run", "preset", "workers", "amp", "compile", "cache", "weights",
            "pretrained", "resume", "overwrite"}
    for name, old in checkpoint["args"].items():
        if name not in free and plain(args).get(name) != old:
            raise DataError(f"{path} was made with --{name.replace('_', '-')} {old}, now it is "
                            f"{plain(args).get(name)}: choose another --run, or --overwrite")
