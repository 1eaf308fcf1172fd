"""Detection of stragglers: ranks whose own time per step, without waiting, is longer than others'.

All ranks wait for the slowest one, so a single slow machine (a hot GPU, a failing disk, another job
on the same node) slows the whole run, and no other metric shows which rank it is.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

SLOW = 1.5
"""Smallest ratio of a slow rank's time to the median of the others; less is usual variation."""
IN_A_ROW = 5
"""Number of consecutive records in which a rank must be slow before it is reported."""


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return metrics of the own time per step of each rank, seconds, with the slowest rank; {} for
    a single rank."""
    if len(seconds) == 1:
        return {}
    slowest = seconds.index(max(seconds))
    others = statistics.median([s for rank, s in enumerate(seconds) if rank != slowest])
    return {
        "ranks/seconds_min": min(seconds),
        "ranks/seconds_median": statistics.median(seconds),
        "ranks/seconds_max": max(seconds),
        "train/slowest_over_others": max(seconds) / max(others, 1e-9),
        "train/slowest_rank": slowest,
    }


def straggler(records: Iterable[Mapping[str, float]]) -> tuple[int, float] | None:
    """Return the rank that is slow in each of the last ``IN_A_ROW`` records, with its smallest
    ratio to the others; None when there is none."""
    last = [record for record in records if "train/slowest_over_others" in record][-IN_A_ROW:]
    ranks = {int(record["train/slowest_rank"]) for record in last}
    times = min((record["train/slowest_over_others"] for record in last), default=0.0)
    is_one = len(last) == IN_A_ROW and len(ranks) == 1
    return (ranks.pop(), times) if is_one and times > SLOW else None


class Stragglers:
    """Detector that reports a slow rank once, when it becomes slow."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """Set up the detector; ``hosts`` has the host name of every rank."""
        self._hosts = hosts
        self._last: deque[Mapping[str, float]] = deque(maxlen=IN_A_ROW)
        self._told: int | None = None

    def check(self, step: int, values: Mapping[str, float]) -> str | None:
        """Add the record of ``step``; return a line of text if a rank has become slow."""
        self._last.append(values)
        slow = straggler(self._last)
        before, self._told = self._told, slow[0] if slow else None
        if slow is None or slow[0] == before:
            return None
        rank, times = slow
        return (
            f"step {step}: rank {rank} ({self._hosts[rank]}) is slow: it needs {times:.1f} times "
            "as long as the others for itself, and all wait for it"
        )
