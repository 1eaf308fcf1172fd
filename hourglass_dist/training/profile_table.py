"""Time of each part of a step, computed from a trace of torch.profiler."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

PREFIX = "part: "
"""Prefix of the names of the ranges that are parts."""
STEP = "step"
"""Name of the range around a whole step."""
PASSES = ("forward", "backward", "recompute")
ON_HOST = ("user_annotation", "cpu_op")
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
COMMUNICATION = "communication"


class Interval(NamedTuple):
    """Interval of time of one part, microseconds."""

    start: float
    end: float
    part: str
    rank: int = 0
    """Priority where intervals overlap: the highest rank wins, then the one that began last."""


def time_of_parts(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the milliseconds of every part in the steps of a trace (``traceEvents``); their sum is
    the time of the steps.

    Time outside all parts is ``other`` on a CPU and ``idle`` on a GPU.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    ranges = [
        _interval(event, str(event["name"]).removeprefix(PREFIX))
        for event in whole
        if str(event["name"]).startswith(PREFIX) and event.get("cat") in ON_HOST
    ]
    steps = [each for each in ranges if each.part == STEP]
    kernels = [event for event in whole if event.get("cat") in GPU_WORK]
    work = _on_gpu(kernels, whole, ranges) if kernels else [*ranges, *_collectives(whole)]
    inside = [each for each in work if any(s.start <= each.start < s.end for s in steps)]
    totals: dict[str, float] = defaultdict(float)
    for start, end, part, _ in slices([*steps, *inside]):
        totals[part] += (end - start) / 1000
    rest = totals.pop(STEP, 0.0)
    return dict(totals) | {"idle" if kernels else "other": rest}


def _interval(event: Mapping[str, Any], part: str, rank: int = 0) -> Interval:
    start = float(event["ts"])
    return Interval(start, start + float(event["dur"]), part, rank)


def _collectives(events: Iterable[Mapping[str, Any]]) -> list[Interval]:
    """Return the intervals of gloo's collectives, for which the calling thread waits."""
    return [
        _interval(event, COMMUNICATION, 1)
        for event in events
        if str(event["name"]).startswith(("gloo:", "c10d::"))
    ]


def _on_gpu(
    kernels: Iterable[Mapping[str, Any]],
    events: Iterable[Mapping[str, Any]],
    ranges: list[Interval],
) -> list[Interval]:
    """Return kernels as work of the range that launched them; NCCL's have the lower rank."""
    launches = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }
    host = list(slices(ranges))
    begins = [each.start for each in host]
    intervals = []
    for kernel in kernels:
        launched = launches.get(kernel["args"].get("correlation"), float(kernel["ts"]))
        index = bisect_right(begins, launched) - 1
        named = index >= 0 and launched < host[index].end and host[index].part != STEP
        part = host[index].part if named else "other"
        is_nccl = "nccl" in str(kernel["name"]).lower()
        intervals.append(_interval(kernel, COMMUNICATION if is_nccl else part, 1 if is_nccl else 2))
    return intervals


def slices(intervals: Iterable[Interval]) -> Iterator[Interval]:
    """Yield the time that intervals cover, cut so that each instant belongs to one interval."""
    waiting = sorted(intervals, reverse=True)
    times = sorted({time for each in waiting for time in each[:2]})
    open_ones: list[tuple[int, float, Interval]] = []
    for start, end in pairwise(times):
        while waiting and waiting[-1].start <= start:
            each = waiting.pop()
            heapq.heappush(open_ones, (-each.rank, -each.start, each))
        while open_ones and open_ones[0][2].end <= start:
            heapq.heappop(open_ones)
        if open_ones:
            yield Interval(start, end, open_ones[0][2].part)


def render_table(milliseconds: Mapping[str, float], first: int, last: int, device: str) -> str:
    """Return a table of the parts of steps ``first`` to ``last``, milliseconds per step."""
    count = last - first + 1
    each = {part: value / count for part, value in milliseconds.items()}
    total = sum(each.values())
    where = "the device's time" if device == "cuda" else "the host's time"
    lines = [
        f"Steps {first} to {last} of the main rank, milliseconds a step of {where}",
        "",
        f"{'':22}{''.join(f'{name:>11}' for name in PASSES)}{'all':>11}{'share':>9}",
    ]
    wholes = [part.rpartition(", ") for part in each]
    for name in sorted({whole for whole, _, kind in wholes if kind in PASSES}, key=_order):
        values = [each.get(f"{name}, {kind}", 0.0) for kind in PASSES]
        cells = "".join(f"{value:>11.2f}" if value else f"{'':11}" for value in values)
        lines.append(f"{name:22}{cells}{_sum(sum(values), total)}")
    for part in ("gradients", "optimizer", COMMUNICATION, "data", "other", "idle"):
        if part in each:
            lines.append(f"{part:22}{'':33}{_sum(each[part], total)}")
    lines.append(f"{'all':22}{'':33}{_sum(total, total)}")
    return "\n".join(lines) + "\n"


def _order(name: str) -> tuple[bool, int]:
    is_level = name.startswith("level ")
    return not is_level, int(name.partition(" ")[2]) if is_level else 0


def _sum(value: float, total: float) -> str:
    return f"{value:>11.2f}{value / (total or 1):>9.1%}"
