"""A stage as a process, its ranks under torchrun, and its workers."""
import ctypes
import multiprocessing as mp
import os
import shutil
import signal
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from support.files import UserError, lack


def launch(main, args):
    """Call main(args); a mistake, a lack of memory or disk, or Ctrl-C ends it in one line."""
    for stream in (sys.stdout, sys.stderr):  # a class's name may be none of the console's letters
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (OSError, RuntimeError, MemoryError) as error:
        told = lack(error, args)
        if not (told or isinstance(error, OSError)):
            raise
        sys.exit(f"error: {told or error}")
    except KeyboardInterrupt:
        print("interrupted: what is written stays", file=sys.stderr)
        for worker in mp.active_children():
            worker.kill()
        os._exit(130)  # at once: no queue is computed to its end
    if dist.is_initialized():
        dist.destroy_process_group()


TORCHRUN = "RANK WORLD_SIZE LOCAL_RANK MASTER_PORT MASTER_ADDR".split()


def place():
    """(rank, world, local rank) as torchrun says it in the environment: whole, or not at all."""
    found = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    if not {*found} & {*TORCHRUN[:3]}:
        return 0, 1, 0
    try:
        rank, world, local_rank, port = (int(found.get(name, "?")) for name in TORCHRUN[:4])
        if 0 <= rank < world and local_rank >= 0 and 0 < port < 65536 and found.get("MASTER_ADDR"):
            return rank, world, local_rank
    except ValueError:
        pass
    told = " ".join(f"{name}={value}" for name, value in found.items())
    raise UserError(f"the environment has {told}, which is not what torchrun sets "
                    f"({', '.join(TORCHRUN)}): unset it, or start with torchrun")


def join_processes(name="auto"):
    """(device, rank, world) under torchrun (nccl or gloo), or alone; name: of --device."""
    rank, world, local_rank = place()
    torch.set_flush_denormal(True)  # a CPU is several times slower on denormal numbers
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine or this torch has no Apple GPU")
    device = torch.device("mps" if name == "mps" else "cpu")
    if name == "auto" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc-per-node is more than the {torch.cuda.device_count()} GPUs")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:  # the long timeout: ranks wait while others finish their CRFs or rank 0 scores
        cuda = dict(backend="nccl", device_id=device) if device.type == "cuda" else {}
        if rank == 0:
            print(f"rank 0 of {world} waits for the others")
        dist.init_process_group(**{"backend": "gloo", **cuda}, timeout=timedelta(hours=12))
    return device, rank, world


def wrap_for_training(model, args, world):
    """The network that trains: model, over several ranks if there are, compiled if asked for."""
    network = DistributedDataParallel(model) if world > 1 else model
    if not args.compile:
        return network
    words = "CC gcc clang" if torch.cuda.is_available() else "CXX g++ clang++"
    variable, *names = words.split()
    if not any(map(shutil.which, [*names, os.environ.get(variable, names[0])])):
        raise UserError(f"--compile needs {' or '.join(names)}: install one, or leave the flag out")
    return torch.compile(network, dynamic=False)


def ignore_interrupts(worker):
    """worker_init_fn of a DataLoader: Ctrl-C is the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # PR_SET_PDEATHSIG, or a worker in mid-transfer outlives a kill
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if mp.get_start_method() == "fork" and os.getppid() != mp.parent_process().pid:
            os._exit(1)  # the parent was killed before that call


class FunctionDataset(partial):
    """A function as a data set: its "index" is a job, the function's arguments."""

    def __getitem__(self, job):
        return self(*job)


def identity(result):
    """collate_fn of a DataLoader that leaves arrays arrays."""
    return result


def map_in_workers(function, jobs, workers):
    """Iterate over function(*job) in order; DataLoader's workers compute while jobs are made."""
    # unlike multiprocessing.Pool it draws few jobs ahead and reports a killed worker
    return iter(DataLoader(FunctionDataset(function), batch_size=None, sampler=jobs,
                           num_workers=workers, collate_fn=identity,
                           worker_init_fn=ignore_interrupts,
                           prefetch_factor=4 if workers else None))
