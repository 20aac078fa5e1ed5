"""How fast a stage is as it is: its own main(), with a meter in the place of its progress bar.

extras/gpu.py runs this. The meter is an iterator, so it sees a stage from one step to the next
one: it lets it warm up, counts operations, takes the time, profiles, and ends it.
"""
import gc
import math
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench, model, train_cls, train_seg  # noqa: E401, E402  no package
from support.run import DataError  # noqa: E402

STEPS = {False: (256, 256, 16), True: (2, 4, 2)}  # --quick: to warm up, to time, to profile


class Enough(Exception):
    """Ends a stage of which enough was seen."""


def covered(intervals):
    """The length of the union of intervals (start, end)."""
    total, until = 0, -math.inf
    for start, end in sorted(intervals):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def meter(args, seen, group, items, *_, **__):
    """A progress bar that ends with Enough. group: items whose operations are counted, if any.

    seen gets the seconds of an item and the share of time in which no kernel runs; args.flops is
    that of an item, without LSTMs.
    """
    kind, (warm_up, timed, profiled) = args.device.type.upper(), STEPS[args.quick]
    def _clock():
        if kind == "CUDA":
            torch.cuda.synchronize()
        return time.perf_counter()
    items = iter(items)
    yield from islice(items, warm_up)
    if group:
        with FlopCounterMode(display=False) as counter:
            yield from islice(items, group)
        args.flops = counter.get_total_flops() / group
    began = _clock()
    yield from islice(items, timed)
    seen["seconds"] = (_clock() - began) / timed
    with profile(activities=[getattr(ProfilerActivity, kind)]) as profiler:
        began = _clock()
        yield from islice(items, profiled)
        wall = _clock() - began
    busy = covered((event.time_range.start, event.time_range.end) for event in profiler.events()
                   if event.device_type.name == kind and not event.is_user_annotation
                   and not event.name.startswith("Mem"))  # Memcpy, Memset
    seen["idle"] = 1 - busy / 1e6 / wall
    raise Enough


def call(args, stage, flags, bar=None):
    """Run a stage's main() on OUT/data, with another progress bar; returns its arguments."""
    words = ["--data", str(args.folder / "data"), "--run", str(args.folder / "run")]
    if stage in (train_cls, train_seg):
        words += ["--val-split", "none", "--no-pretrained"]
    if stage is train_seg:
        words += ["--masks", str(args.folder / "data/SegmentationClass")]
    if args.quick:  # else workers compute the masks, unseen by the meter
        words += ["--workers", "0"]
    stage_args = stage.parse_args([*words, *flags.split()])
    with mock.patch.object(stage, "progress", bar or stage.progress), suppress(Enough):
        stage.main(stage_args)
    return stage_args


def measure(args, part, setting, stage, flags, group=1):
    """One row: a stage's speed, its share of the ceiling, its memory, and idle time.

    Where it fails, the row says so. group: see meter(); 0 takes the operations of the row before.
    """
    gc.collect()
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    seen = {}
    try:
        given = call(args, stage, flags, partial(meter, args, seen, group))
    except (DataError, RuntimeError) as error:  # of memory, of a compiler
        return bench.row(args, part, setting, math.nan, "", f"{error}".splitlines()[0][:200])
    seconds, rate = seen["seconds"], args.flops / seen["seconds"] / 1e12
    value, unit = (given.batch_size / seconds, "images/s") if stage is train_cls else (
        1000 * seconds, "ms/step" if stage is train_seg else "ms/image")
    bench.row(args, part, setting, value, unit, f"{given.workers} workers, {rate:.3g} TFLOP/s, "
              f"{100 * rate / args.ceiling:.0f} % of the ceiling, "
              f"{torch.accelerator.max_memory_allocated() / 2 ** 30:.1f} GiB, idle "
              f"{100 * seen['idle']:.0f} % of the time")


@contextmanager
def lstms_in_bfloat16():
    """The BiLSTMs and their weights, which the stages run in float32."""
    def _scan(lstm, lines, class_tokens=None):
        if lstm.weight_hh_l0.dtype != torch.bfloat16:
            lstm.bfloat16()
        def _rounded(sequence):
            return lstm(sequence.bfloat16())[0].float(), None
        return scan(_rounded, lines, class_tokens)
    scan = model.scan
    with mock.patch.object(model, "scan", _scan):
        yield
