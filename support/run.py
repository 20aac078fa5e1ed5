"""What every stage needs and no paper mentions: errors, flags, files, checkpoints, processes."""
import argparse
import ctypes
import hashlib
import json
import math
import multiprocessing as mp
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two runs from one file
    fcntl = None


class DataError(Exception):
    """A user's mistake, told in one line that names the file and the way out."""

    def __init__(self, message):
        # a DataLoader worker hands over its whole traceback as the message: the last line is ours
        last = str(message).strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.DataError: "))


def launch(main, args):
    """Call main(args); a mistake, a lack of memory or disk, or Ctrl-C ends it in one line."""
    for stream in (sys.stdout, sys.stderr):  # a class's name may be none of the console's letters
        stream.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except DataError as error:
        sys.exit(f"error: {error}")
    except (OSError, RuntimeError, MemoryError) as error:
        told = lack(error, args)
        if not (told or isinstance(error, OSError)):
            raise
        sys.exit(f"error: {told or error}")
    except KeyboardInterrupt:
        print("interrupted: what is written stays", file=sys.stderr, flush=True)
        for worker in mp.active_children():
            worker.kill()
        os._exit(130)  # at once: no queue is computed to its end
    if dist.is_initialized():
        dist.destroy_process_group()


NO_MEMORY = ("out of memory|MemoryError|can't allocate|not enough memory|annot allocate memory|"
             "ALLOC_FAILED|can't start new thread")


def lack(error, args=None):
    """One line: what the machine has too little of, and the flags to lower; None: nothing.

    What happens in a DataLoader's worker arrives with its traceback as the message.
    """
    text = f"{type(error).__name__} {error}"
    if "DataLoader worker (pid" in text:
        return "a worker process died (no memory?): call again, with fewer --workers"
    if "shared memory" in text or ("No space left" in text and not getattr(error, "filename", 0)):
        return ("no space left: on the disk, or in shared memory (/dev/shm), which takes less with "
                "fewer --workers, and in a container more with --shm-size")
    if "Too many open files" in text:
        return "too many open files: lower --workers, or raise the limit, as with ulimit -n 4096"
    if re.search(NO_MEMORY, text):
        flags = [f"--{name}" for name in ("batch-size", "crop", "size", "window", "workers")
                 if hasattr(args, name.replace("-", "_"))]
        return f"out of memory: lower {', '.join(flags) or 'what else this machine does'}"


# --- flags -------------------------------------------------------------------------------------

PRESETS = ("voc", "coco", "toy", "voc-small", "photo")
LIKE = {"photo": "voc-small"}  # has its values where a flag names none of its own
NO_SBD = dict(coco="train", toy="train", voc_small="train")  # where trainaug is voc's split


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
            values[name] = options.pop(name.replace("-", "_"), values.get(LIKE.get(name), default))
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
        except DataError as error:
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


def stage_flags(doc, trains=False, bf16=("voc-small",)):
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


# --- files -------------------------------------------------------------------------------------
@contextmanager
def atomic(path):
    """Yield a temporary name beside path and rename it to path once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed run leaves, the next one uses
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own file writer raises RuntimeError
        reason = f"{error}".splitlines()[0][:100]
        raise DataError(f"{path} cannot be written (is the disk full?): {reason}")
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(path, lines):
    """Write a text file, one line an entry, atomically."""
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_text(path):
    """A text file's content: UTF-8, with or without a byte-order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no UTF-8 text: save it as UTF-8")


def git_commit():
    """The commit of this code, or None outside a git checkout."""
    words = ["git", "rev-parse", "HEAD"]
    return shutil.which("git") and subprocess.run(
        words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None


def digest(path):
    """A short fingerprint of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def flock(file, wait=False):
    """Whether this process has, from now until it ends, an open file's lock for itself."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB * (not wait))
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        pass
    return True


HELD = {}  # {path of RUN/.lock: the open file}: those of this process


def open_run(run):
    """Make the run folder, and keep other processes out of it until this one ends.

    Says now, not after an epoch, that it cannot be written. The lock of a killed process is gone.
    """
    if run.exists() and not (run.is_dir() and os.access(run, os.W_OK)):
        raise DataError(f"--run {run} is no folder that can be written to: choose another")
    run.mkdir(parents=True, exist_ok=True)
    path = run.resolve() / ".lock"
    if path in HELD or (dist.is_initialized() and dist.get_rank()):
        return
    file = open(path, "a+", encoding="utf-8", errors="replace")
    if not flock(file):
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise DataError(f"--run {run} is in use by {owner}: wait for it, or choose another --run")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    HELD[path] = file


def log(run, stage, **values):
    """Print one line of results and append the same values to RUN/log.jsonl."""
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{stage}  " + "  ".join(shown), flush=True)
    path = run / "log.jsonl"
    before = read_text(path).splitlines() if path.is_file() else []
    write_lines(path, [*before, json.dumps({"stage": stage, **values})])


@contextmanager
def logged(run, stage, **values):
    """log() at the end of the block, with what the block adds to the dictionary that it gets.

    Also where the block fails: what is known of an epoch is not lost with its validation.
    """
    try:
        yield values
    finally:
        log(run, stage, **values)


def progress(items, desc, total=None, disable=False):
    """tqdm's bar on a terminal; elsewhere a plain line every half minute."""
    plain = dict(mininterval=30, maxinterval=30, delay=30,
                 bar_format="{desc}: {n_fmt} of {total_fmt} [{elapsed}<{remaining}]\n")
    return tqdm(items, desc, total, disable=disable, **{} if sys.stderr.isatty() else plain)


# --- checkpoints: RUN/cls.pt, RUN/seg.pt, RUN/cpews.pt -----------------------------------------

MADE_BY = {"cls": "train_cls.py", "seg": "train_seg.py", "cpews": "extras/cpews/train.py"}
NEEDED = {"cls": "config model optimizer classes ids labels --seed epoch --epochs --size".split(),
          "seg": "config model optimizer classes ids labels --seed step".split(),
          "cpews": "config model optimizer classes ids labels pools --seed step".split()}
FREE = ("data run preset device workers amp compile weights pretrained tokens resume "
        "overwrite").split()


def load_checkpoint(path, kind):
    """The dictionary that save_checkpoint wrote, on the CPU; kind is one of MADE_BY."""
    again = f"run {MADE_BY[kind]}"
    if not path.is_file():
        raise DataError(f"{path} not found: {again} first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found, flags = checkpoint["kind"], {f"--{name}" for name in dict(checkpoint["args"])}
    except Exception as error:  # zip, pickle and torch each have their own
        if lack(error):
            raise
        raise DataError(f"{path} is not a readable checkpoint ({type(error).__name__}): {again}")
    missing = {*NEEDED[kind]} - {*checkpoint} - flags
    if found != kind or missing:
        fault = f"no {kind} checkpoint but {found}" if found != kind else f"without {missing}"
        raise DataError(f"{path} is {fault}: {again}")
    return checkpoint


def open_checkpoint(args, kind, end, **facts):
    """(path, checkpoint): RUN's, where --resume asks for it and flags and facts fit; or None.

    end is the epoch or step at which it is finished.
    """
    path, way_out = args.run / f"{kind}.pt", "choose another --run, or --overwrite"
    open_run(args.run)
    if not path.exists() or args.overwrite:
        return path, None
    if not args.resume:
        raise DataError(f"{path} exists: --resume goes on, --overwrite starts anew")
    checkpoint = load_checkpoint(path, kind)
    for name, value in facts.items():
        if checkpoint.get(name) != value:
            raise DataError(f"{path} was made with other {name}: {way_out}")
    for name, old in checkpoint["args"].items():
        now = getattr(args, name, None)
        if name not in FREE and old not in (now, str(now)):  # paths are kept as text
            flag = name.replace("_", "-")
            raise DataError(f"{path} was made with --{flag} {old}, now it is {now}: {way_out}")
    done = checkpoint["epoch" if kind == "cls" else "step"]
    print(f"{path} is finished: nothing to do" if done >= end else
          f"going on from {path} ({done} of {end})", flush=True)
    return path, checkpoint


def restore(path, checkpoint, **parts):
    """Give model and optimizer the state of a checkpoint, if there is one."""
    try:
        for name, part in parts.items() if checkpoint else ():
            part.load_state_dict(checkpoint[name])
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not fit ({str(error).splitlines()[0][:80]}): train anew")


def check_finite(logits, model):
    """End where a network gives numbers that are not finite."""
    if not logits.isfinite().all():
        raise DataError(f"{type(model).__name__} gives numbers that are not finite: lower --lr")


LOOK = 50  # steps between two looks at the loss, each of which waits for the GPU


def check_loss(total, step, path):
    """End, at every LOOK-th step, where a sum of losses is not finite."""
    if step % LOOK == 0 and not math.isfinite(total.item()):
        raise DataError(f"loss not finite by step {step}: lower --lr; {path} stays")


def mean_loss(total, steps, world, model, where, path):
    """The mean over steps and ranks of the losses summed in total; ends where it is not finite."""
    if world > 1:
        dist.all_reduce(total)
    loss = total.item() / steps / world
    if not math.isfinite(loss) or not all(w.isfinite().all() for w in model.state_dict().values()):
        raise DataError(f"loss {loss:.3g} or weights not finite {where}: lower --lr; {path} stays")
    return loss


def save_checkpoint(path, kind, model, args, **content):
    """Write a file that describes itself: what it is, its config and weights, and `content`."""
    plain = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    with atomic(path) as temporary:
        torch.save({"kind": kind, "config": asdict(model.config), "args": plain,
                    "model": model.state_dict(), **content}, temporary)


# --- folders of masks --------------------------------------------------------------------------
def read_settings(folder):
    """How the masks in a folder were made, as claimed() noted it; {} if it did not."""
    note = folder / "settings.json"
    try:
        return dict(json.loads(read_text(note))) if note.is_file() else {}
    except (ValueError, TypeError):
        raise DataError(f"{note} is damaged: delete it and the masks beside it")


def same_settings(old, new):
    """Whether masks were made so; the data may have moved since, if the labels are known."""
    moved = "data" in old and "labels" in new and not Path(old["data"]).exists()
    return (old | {"data": new.get("data")} if moved else old) == new


def check_masks(folder, settings, way_out="--overwrite replaces them, --run writes elsewhere"):
    """Refuse to add masks to those that were made with other settings, or nobody knows how."""
    if any(folder.glob("*.png")) and not same_settings(read_settings(folder), settings):
        raise DataError(f"{folder} holds masks of other data, labels, weights or flags, or has no "
                        f"settings.json: {way_out}")


def claimed(results, outputs, overwrite):
    """The same results; once the first exists, each folder of outputs notes its settings.

    With overwrite the masks there are deleted then, not before a mistake in the flags can show.
    """
    first = next(results, None)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for folder, settings in outputs.items():
            for path in folder.glob("*.png") if overwrite else ():
                path.unlink()
            write_lines(folder / "settings.json", [json.dumps(settings)])
    if dist.is_initialized():
        dist.barrier()
    yield from chain([] if first is None else [first], results)


# --- processes ---------------------------------------------------------------------------------
TORCHRUN = "RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT".split()


def place():
    """(rank, world, local rank) as torchrun says it in the environment: whole, or not at all."""
    found = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    if not {*found} & {*TORCHRUN[:3]}:
        return 0, 1, 0
    try:
        numbers = "RANK WORLD_SIZE LOCAL_RANK MASTER_PORT".split()
        rank, world, local_rank, port = (int(found.get(name, "?")) for name in numbers)
        if 0 <= rank < world and local_rank >= 0 and 0 < port < 65536 and found.get("MASTER_ADDR"):
            return rank, world, local_rank
    except ValueError:
        pass
    told = " ".join(f"{name}={value}" for name, value in found.items())
    raise DataError(f"the environment has {told}, which is not what torchrun sets "
                    f"({', '.join(TORCHRUN)}): unset it, or start with torchrun")


def join_processes(name="auto"):
    """(device, rank, world): this process's place under torchrun (nccl or gloo), or alone.

    name is that of --device.
    """
    rank, world, local_rank = place()
    torch.set_flush_denormal(True)  # a CPU is several times slower on denormal numbers
    if name == "mps" and not torch.backends.mps.is_available():
        raise DataError("--device mps: this machine or this torch has no Apple GPU")
    device = torch.device("mps" if name == "mps" else "cpu")
    if name == "auto" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise DataError(f"--nproc-per-node is more than the {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:  # the long timeout: ranks wait while others finish their CRFs or rank 0 scores
        cuda = dict(backend="nccl", device_id=device) if device.type == "cuda" else {}
        if rank == 0:
            print(f"rank 0 of {world} waits for the others", flush=True)
        dist.init_process_group(**{"backend": "gloo", **cuda}, timeout=timedelta(hours=12))
    return device, rank, world


def prepare(model, args, world):
    """The network that trains: model, over several ranks if there are, compiled if asked for."""
    network = DistributedDataParallel(model) if world > 1 else model
    if not args.compile:
        return network
    words = "CC gcc clang" if torch.cuda.is_available() else "CXX g++ clang++"
    variable, *names = words.split()
    if not any(map(shutil.which, [*names, os.environ.get(variable, names[0])])):
        raise DataError(f"--compile needs {' or '.join(names)}: install one, or leave the flag out")
    return torch.compile(network, dynamic=False)


def ignore_interrupts(worker):
    """worker_init_fn of a DataLoader: Ctrl-C is the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG, or a worker in mid-transfer outlives a kill
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if mp.get_start_method() == "fork" and os.getppid() != mp.parent_process().pid:
            os._exit(1)  # the parent was killed before that call


class Calls(partial):
    """A function as a data set: its "index" is a job, the function's arguments."""

    def __getitem__(self, job):
        return self(*job)


def as_it_is(result):
    """collate_fn of a DataLoader that leaves arrays arrays."""
    return result


def in_workers(function, jobs, workers):
    """Iterate over function(*job) in order; DataLoader's workers compute while jobs are made."""
    # unlike multiprocessing.Pool it draws few jobs ahead and reports a killed worker
    return iter(DataLoader(Calls(function), batch_size=None, sampler=jobs, num_workers=workers,
                           collate_fn=as_it_is, worker_init_fn=ignore_interrupts,
                           prefetch_factor=4 if workers else None))
