"""Files that are whole or not there, a run's folder and its log, and errors in one line."""
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: there nothing keeps two runs from one file
    fcntl = None


class UserError(Exception):
    """A user's mistake, told in one line that names the file and the way out."""

    def __init__(self, message):
        # a DataLoader worker hands over its whole traceback as the message: the last line is ours
        last = str(message).strip().splitlines()[-1]
        super().__init__(last.removeprefix(f"{__name__}.UserError: "))


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


# --- files ------------------------------------------------------------------------------------
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
        raise UserError(f"{path} cannot be written (is the disk full?): {reason}")
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
        raise UserError(f"{path} is no UTF-8 text: save it as UTF-8")


def git_commit():
    """The commit of this code, or None outside a git checkout."""
    words = ["git", "rev-parse", "HEAD"]
    return shutil.which("git") and subprocess.run(
        words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None


def file_hash(path):
    """A short fingerprint of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def first_file(paths):
    """The first that exists; where none does, the first."""
    paths = [*paths]
    return next((path for path in paths if path.is_file()), paths[0])


# --- the run's folder ------------------------------------------------------------------------
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
        raise UserError(f"--run {run} is no folder that can be written to: choose another")
    run.mkdir(parents=True, exist_ok=True)
    path = run.resolve() / ".lock"
    if path in HELD or (dist.is_initialized() and dist.get_rank()):
        return
    file = open(path, "a+", encoding="utf-8", errors="replace")
    if not flock(file):
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(f"--run {run} is in use by {owner}: wait for it, or choose another --run")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    HELD[path] = file


def log(run, stage, **values):
    """Print one line of results and append the same values to RUN/log.jsonl."""
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{stage}  " + "  ".join(shown))
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
