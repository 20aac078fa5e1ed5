"""RUN/cls.pt, RUN/seg.pt, RUN/cpews.pt: what they hold, who may go on from them."""
import math
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from support.files import UserError, atomic, lack, open_run

MADE_BY = {"cls": "train_cls.py", "seg": "train_seg.py", "cpews": "extras/cpews/train.py"}
NEEDED = {"cls": "config model optimizer classes ids labels --seed epoch --epochs --size".split(),
          "seg": "config model optimizer classes ids labels --seed step".split(),
          "cpews": "config model optimizer classes ids labels pools --seed step".split()}
MAY_CHANGE_ON_RESUME = ("data run preset device workers amp compile weights pretrained tokens "
                        "resume overwrite").split()


def load_checkpoint(path, kind):
    """The dictionary that save_checkpoint wrote, on the CPU; kind is one of MADE_BY."""
    again = f"run {MADE_BY[kind]}"
    if not path.is_file():
        raise UserError(f"{path} not found: {again} first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, flags = checkpoint["kind"], {f"--{name}" for name in dict(checkpoint["args"])}
    except Exception as error:  # zip, pickle and torch each have their own
        if lack(error):
            raise
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__}): {again}")
    missing = {*NEEDED[kind]} - {*checkpoint} - flags
    if found != kind or missing:
        fault = f"no {kind} checkpoint but {found}" if found != kind else f"without {missing}"
        raise UserError(f"{path} is {fault}: {again}")
    return checkpoint


def open_checkpoint(args, kind, end, **inputs):
    """(path, checkpoint to resume or None); refuses other flags or inputs; end: epochs or steps."""
    path, way_out = args.run / f"{kind}.pt", "choose another --run, or --overwrite"
    open_run(args.run)
    if not path.exists() or args.overwrite:
        return path, None
    if not args.resume:
        raise UserError(f"{path} exists: --resume goes on, --overwrite starts anew")
    checkpoint = load_checkpoint(path, kind)
    for name, value in inputs.items():
        if checkpoint.get(name) != value:
            raise UserError(f"{path} was made with other {name}: {way_out}")
    for name, old in checkpoint["args"].items():
        flag, now = name.replace("_", "-"), getattr(args, name, None)
        same = old in (now, str(now))  # paths are kept as text
        if not same and name not in MAY_CHANGE_ON_RESUME:
            raise UserError(f"{path} was made with --{flag} {old}, now it is {now}: {way_out}")
    done = checkpoint["epoch" if kind == "cls" else "step"]
    print(f"{path} is finished: nothing to do" if done >= end else
          f"going on from {path} ({done} of {end})")
    return path, checkpoint


def restore(path, checkpoint, **parts):
    """Give model and optimizer the state of a checkpoint, if there is one."""
    try:
        for name, part in parts.items() if checkpoint else ():
            part.load_state_dict(checkpoint[name])
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit ({str(error).splitlines()[0][:80]}): train anew")


def save_checkpoint(path, kind, model, args, **content):
    """Write a file that describes itself: what it is, its config and weights, and `content`."""
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    with atomic(path) as temporary:
        torch.save({"kind": kind, "config": asdict(model.config), "args": plain,
                    "model": model.state_dict(), **content}, temporary)


# --- numbers that are not finite -------------------------------------------------------------
LOOK = 50  # steps between two looks at the loss, each of which waits for the GPU


def check_finite(logits, model):
    """End where a network gives numbers that are not finite."""
    if not logits.isfinite().all():
        raise UserError(f"{type(model).__name__} gives numbers that are not finite: train it again "
                        "with a lower --lr")


def check_loss(total, step, path):
    """End, at every LOOK-th step, where a sum of losses is not finite."""
    if step % LOOK == 0 and not math.isfinite(total.item()):
        raise UserError(f"loss not finite by step {step}: lower --lr; {path} stays")


def finite_mean_loss(total, steps, world, model, where, path):
    """The mean over steps and ranks of the losses summed in total; ends where it is not finite."""
    if world > 1:
        dist.all_reduce(total)
    loss = total.item() / steps / world
    if not math.isfinite(loss) or not all(w.isfinite().all() for w in model.state_dict().values()):
        raise UserError(f"loss {loss:.3g} or weights not finite {where}: lower --lr; {path} stays")
    return loss
