"""Ranks that are slower than the others, from what a step takes each of them for itself.

All ranks wait for the slowest, so one slow machine (a hot GPU, a disk that fails, a neighbour on
the same node) makes the whole run slow, and shows nowhere else.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

SLOW = 1.5
"""Times the median of the other ranks; less is the usual difference."""
IN_A_ROW = 5
"""Records in a row in which the same rank is that slow: then it is no accident."""


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """How differently long ranks need for themselves, and which one needs the longest; nothing to
    say of a single rank."""
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
    """The rank that is slow in each of the last ``IN_A_ROW`` records, and how many times slower
    than the others it is at least; None when there is none."""
    last = [record for record in records if "train/slowest_over_others" in record][-IN_A_ROW:]
    ranks = {int(record["train/slowest_rank"]) for record in last}
    times = min((record["train/slowest_over_others"] for record in last), default=0.0)
    return (
        (ranks.pop(), times) if len(last) == IN_A_ROW and len(ranks) == 1 < SLOW < times else None
    )


class Stragglers:
    """Tells of one once, when it begins."""

    def __init__(self, hosts: Sequence[str]) -> None:
        """``hosts``: that of every rank."""
        self._hosts = hosts
        self._last: deque[Mapping[str, float]] = deque(maxlen=IN_A_ROW)
        self._told: int | None = None

    def look(self, step: int, values: Mapping[str, float]) -> str | None:
        """A line, if the record of ``step`` makes a straggler."""
        self._last.append(values)
        found = straggler(self._last)
        before, self._told = self._told, found[0] if found else None
        if found is None or found[0] == before:
            return None
        rank, times = found
        return (
            f"step {step}: rank {rank} ({self._hosts[rank]}) is slow: it needs {times:.1f} times "
            "as long as the others for itself, and all wait for it"
        )
