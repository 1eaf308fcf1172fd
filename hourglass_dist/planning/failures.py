"""How often machines fail, what that costs a run, and how often it should save.

    train T | stall | train T | stall | train ...        every T seconds the state is copied (stall)
            |-- write --> durable                        a thread writes it while training goes on
                                  X                      a failure: back to what is durable
                                  | notice, queue | start and load | train ...

``goodput`` is the closed form of that for failures without memory, ``simulate`` walks along a line
of failures of any kind, and ``young`` and ``daly`` are the formulas that everybody knows. Those
know only a save that holds training up as long as it takes; here ``stall`` does, and ``write`` only
makes what is lost older.

How often: Llama 3 had 419 unexpected interruptions in 54 days on 16,384 H100 (Grattafiori et al.
2024, arXiv 2407.21783, table 5); jobs of 1,024 A100 in Meta's research cluster lasted 7.9 hours in
the mean (Kokolis et al. 2024, arXiv 2410.21680).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hourglass_dist.core import ranks

DAY = 86400.0
RATES = {"Llama 3": 419 / (54 * 16_384), "RSC-1": 24 / (7.9 * 1024)}
"""Failures of a job for each of its GPUs and day."""

HANGS = 0.10
"""Share of failures that nobody notices before a collective has waited too long: of Llama 3's 8.4 %
were the network's and 1.7 % ended by the watchdog of NCCL."""
CRASH_S, HANG_S = 60.0, ranks.TIMEOUT.total_seconds()
"""From a failure to the end of all ranks."""


@dataclass(frozen=True)
class Saving:
    """What a checkpoint takes."""

    stall_s: float
    """Seconds that training stands still."""
    write_s: float
    """Seconds after that until it counts."""

    def period(self, interval_s: float) -> float:
        """Seconds from one save to the next with so many of training between: a save waits for the
        one before."""
        return max(interval_s, self.write_s) + self.stall_s


@dataclass(frozen=True)
class Return:
    """What lies between a failure and the next step of training."""

    crash_s: float = CRASH_S
    hang_s: float = HANG_S
    hangs: float = HANGS
    queue_s: float = 300.0
    """Until the scheduler has machines, in the mean."""
    queue_spread: float = 0.0
    """Of the logarithm of that; 0 is always the mean."""
    start_s: float = 180.0
    """Processes, communicators, the model, the checkpoint; a failure here begins all again."""

    @property
    def away_s(self) -> float:
        """Without the start, in the mean."""
        return (1 - self.hangs) * self.crash_s + self.hangs * self.hang_s + self.queue_s


@dataclass(frozen=True)
class Outcome:
    """Where the time of a run went, as shares of it."""

    goodput: float
    """Training that was not lost."""
    lost: float
    """Training that was done again."""
    stalled: float
    """Standing still for a save."""
    away: float
    """No training at all."""
    lost_s: float
    """Training lost in one failure, in the mean."""


def mtbf_s(gpus: int, rate: float) -> float:
    """Seconds between failures of a job, in the mean."""
    return DAY / (rate * gpus)


def young(cost_s: float, mtbf_s: float) -> float:
    """The best interval to first order (Young 1974)."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly(cost_s: float, mtbf_s: float) -> float:
    """The best interval to higher order (Daly 2006)."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    part = cost_s / (2 * mtbf_s)
    return young(cost_s, mtbf_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s


def goodput(interval_s: float, saving: Saving, back: Return, mtbf_s: float) -> float:
    """The share of time that is training that counts, when failures have no memory.

    A life of the job has n checkpoints with probability P(X > n periods + write); it takes
    ``mtbf_s``, and coming back exp(start / mtbf) attempts.
    """
    lives = math.exp(min(700.0, saving.period(interval_s) / mtbf_s))
    saves = math.exp(-saving.write_s / mtbf_s) / (lives - 1)
    attempts = math.exp(min(700.0, back.start_s / mtbf_s))
    return saves * interval_s / (attempts * (mtbf_s + back.away_s))


def best_interval(saving: Saving, back: Return, mtbf_s: float) -> float:
    """The interval of the largest ``goodput``, by golden sections of its logarithm."""
    low, high = math.log(max(1.0, saving.write_s / 10)), math.log(10 * mtbf_s)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if goodput(math.exp(a), saving, back, mtbf_s) < goodput(math.exp(b), saving, back, mtbf_s):
            low = a
        else:
            high = b
    return math.exp((low + high) / 2)


ENOUGH = 0.001
"""A share of the time that is not worth more checkpoints."""


def longest_interval(saving: Saving, back: Return, mtbf_s: float) -> float:
    """The longest interval with a ``goodput`` at most ``ENOUGH`` under the largest: what to take,
    since a file system has others to serve, too."""
    low = best_interval(saving, back, mtbf_s)
    high, least = 100 * mtbf_s, goodput(low, saving, back, mtbf_s) - ENOUGH
    for _ in range(60):
        middle = math.sqrt(low * high)
        if goodput(middle, saving, back, mtbf_s) >= least:
            low = middle
        else:
            high = middle
    return low


def simulate(
    interval_s: float,
    saving: Saving,
    back: Return,
    mtbf_s: float,
    *,
    failures: int = 20_000,
    shape: float = 1.0,
    limit_s: float | None = None,
    seed: int = 0,
) -> Outcome:
    """Walk along so many failures. ``shape`` is that of a Weibull distribution of the times between
    them (1 has no memory, below 1 they come in groups); ``limit_s`` ends a job, which is saved
    before, and queues it again.

    The same ``seed`` gives the same failures to every interval.
    """
    random = np.random.default_rng(seed)
    gaps = random.weibull(shape, failures) * mtbf_s / math.gamma(1 + 1 / shape)
    spread = back.queue_spread
    queues = back.queue_s * np.exp(spread * random.standard_normal(2 * failures) - spread**2 / 2)
    hangs = random.random(failures) < back.hangs
    notices = np.where(hangs, back.hang_s, back.crash_s)
    walk = _Walk(interval_s, saving, limit_s, back.start_s, iter(_cycle(queues.tolist())))
    walk.start(0.0)
    times = np.cumsum(gaps)
    for at, notice in zip(times.tolist(), notices.tolist(), strict=True):
        walk.until(at)
        walk.fail(at, notice)
    return walk.outcome(float(times[-1]), failures)


def _cycle(values: list[float]) -> Iterator[float]:
    while True:
        yield from values


class _Walk:
    """A job on the way along the line of time."""

    def __init__(
        self,
        interval_s: float,
        saving: Saving,
        limit_s: float | None,
        start_s: float,
        queues: Iterator[float],
    ) -> None:
        self._interval, self._saving, self._limit = interval_s, saving, limit_s
        self._period, self._start_s, self._queues = saving.period(interval_s), start_s, queues
        self.useful = self.lost = self.stalled = self.away = 0.0

    def start(self, at: float) -> None:
        """Begin to come up; training begins at ``self._began``."""
        self._called, self._began = at, at + self._start_s

    def until(self, at: float) -> None:
        """Every end by the limit before ``at``: saved, waited for, queued again."""
        while self._limit is not None and self._called + self._limit < at:
            end = max(self._began, self._called + self._limit)
            lived = end - self._began
            saves = math.floor(lived / self._period)
            stalls = saves * (self._period - self._interval)
            self.useful += lived - stalls
            self.stalled += stalls + self._saving.stall_s + self._saving.write_s
            queued = next(self._queues)
            self.away += self._start_s + queued
            self.start(end + self._saving.stall_s + self._saving.write_s + queued)

    def fail(self, at: float, notice: float) -> None:
        """A failure, which a job that is not there does not feel."""
        if at < self._called:
            return
        lived = at - self._began
        if lived <= 0:
            self.away += at - self._called
        else:
            self.away += self._start_s
            saves = max(0, math.floor((lived - self._saving.write_s) / self._period))
            begun = math.floor(lived / self._period)
            stalls = begun * (self._period - self._interval)
            self.useful += saves * self._interval
            self.stalled += stalls
            self.lost += lived - stalls - saves * self._interval
        gone = notice + next(self._queues)
        self.away += gone
        self.start(at + gone)

    def outcome(self, time_s: float, failures: int) -> Outcome:
        """Shares of all the time that was walked."""
        whole = self.useful + self.lost + self.stalled + self.away
        assert whole >= time_s * 0.999, "time is missing"
        return Outcome(
            *(self.useful / whole, self.lost / whole, self.stalled / whole, self.away / whole),
            lost_s=self.lost / failures,
        )
