"""The flags that the stages share, with a default for each preset."""
import argparse
import os
from pathlib import Path

import torch

from support.files import UserError, read_text

PRESETS = ("voc", "coco", "toy", "voc-small", "photo")
INHERITS = {"photo": "voc-small"}  # has its values where a flag names none of its own


def number(kind, low, high):
    """argparse type: a finite number of a kind (int or float) from low to high."""
    def _parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    _parse.__name__ = f"{'whole ' * (kind is int)}number from {low} to {high}:"  # argparse tells it
    return _parse


class Flags:
    """argparse with a default for each preset, which stands on the flag's own line."""

    def __init__(self, doc):
        self.parser = argparse.ArgumentParser(  # SUPPRESS: parse() shall see what was given
            None, None, doc, formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS)
        self.error, self.defaults = self.parser.error, {}

    def add(self, flag, default, text, low=0, high=10**9, **options):
        """add("--lr", 1e-3, "what it is", toy=7e-4): voc's default, and where a preset departs.

        voc-small is voc_small here. A number, or a list of them, lies in [low, high]; a bool makes
        --flag and --no-flag.
        """
        values = {}
        for name in PRESETS:
            inherited = values.get(INHERITS.get(name), default)
            values[name] = options.pop(name.replace("-", "_"), inherited)
        sample = default[0] if isinstance(default, list) else default
        if isinstance(sample, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(sample, (int, float)):
            options["type"] = number(type(sample), low, high)
        others = [f", {name} {value}" for name, value in values.items() if value != default]
        if others or default not in (None, False):
            text += f" (default {default}{''.join(others)})"
        self.parser.add_argument(flag, help=text, **options)
        self.defaults[flag[2:].replace("-", "_")] = values

    def parse(self, argv=None, needed=("data", "run")):
        """The arguments, with the defaults of --preset, or of the one that DATA or RUN names."""
        given = vars(self.parser.parse_args(argv))
        for name in needed:
            if name not in given:
                self.error(f"--{name} is needed")
        notes = [given[home] / "preset.txt" for home in ("data", "run") if home in given]
        note = next((note for note in notes if note.is_file()), None)
        try:
            preset = given.get("preset") or (read_text(note).strip() if note else "voc")
        except UserError as error:
            self.error(error)
        if preset not in PRESETS:
            self.error(f"{note}: unknown preset {preset!r}: choose from {', '.join(PRESETS)}")
        chosen = {name: values[preset] for name, values in self.defaults.items()}
        for name in ("train_split", "split"):  # VOC without SBD has no trainaug.txt: its own train
            if chosen.get(name) == "trainaug" and "data" in given:
                lists = given["data"] / "ImageSets/Segmentation"
                chosen[name] = next((split for split in ("trainaug", "train_aug")
                                     if (lists / f"{split}.txt").exists()), "train")
        return argparse.Namespace(**chosen | given | dict(preset=preset))


def common_flags(doc, trains=False, bf16=("voc-small",)):
    """The flags that all four stages share, and those of the two which train.

    bf16: presets that a CPU which computes in bfloat16 runs in it.
    """
    flags = Flags(doc)
    add = flags.add
    add("--data", None, "data set folder, laid out as data.py says", type=Path)
    add("--run", None, "folder that this and the other stages write to", type=Path)
    add("--preset", None, "whose defaults to take; if not given, what DATA/preset.txt names, else "
        "voc", choices=PRESETS)
    add("--workers", min(16, os.cpu_count() or 1), "processes that load images and, on a CPU, run "
        "the CRF; results do not depend on it", high=1024)
    add("--device", "auto", "auto: a GPU of CUDA, if there is one, else the CPU; mps: Apple's GPU, "
        "untested", choices=("auto", "cpu", "mps"))
    gpu = torch.cuda.is_available()
    add("--amp", gpu, "run the network in bfloat16 autocast",
        **{name.replace("-", "_"): gpu or torch.cpu._is_avx512_bf16_supported() for name in bf16})
    if not trains:
        add("--window", None, "predict in overlapping windows of W x W pixels and average their "
            "probabilities: for images larger than those it learnt from (default: no windows)",
            metavar="W", type=number(int, 1, 10**5))
        add("--stride", None, "pixels between two windows (default: half a window)", metavar="S",
            type=number(int, 1, 10**5))
        return flags
    add("--weights", None, "local copy of the backbone's timm weights, instead of the hub's")
    add("--pretrained", True, "start from the backbone's ImageNet weights, not from random "
        "ones", toy=False)
    add("--seed", 0, "of the weights, the order and the augmentation", high=2**31 - 1)
    add("--compile", False, "torch.compile the network: meant for GPUs and long runs")
    add("--resume", False, "go on from RUN's checkpoint, if any, as if never interrupted")
    add("--overwrite", False, "replace RUN's checkpoint if there is one")
    return flags
