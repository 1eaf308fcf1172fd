"""Failure rates of clusters, their cost for a run, and the best checkpoint interval.

    train T | stall | train T | stall | train ...        every T seconds the state is copied (stall)
            |-- write --> durable                        a thread writes it while training goes on
                                  X                      a failure: back to the last durable state
                                  | notice, queue | start and load | train ...

``goodput`` is the closed form for exponentially distributed times between failures. ``simulate``
draws them from a Weibull distribution. ``young`` and ``daly`` are the well-known formulas, in which
training waits for the whole save. Here it waits for ``stall`` only; ``write`` makes the last
durable state older.

Rates: Llama 3 had 419 unexpected interruptions in 54 days on 16,384 H100 (Grattafiori et al.
2024, arXiv 2407.21783, table 5); jobs of 1,024 A100 in Meta's research cluster lasted 7.9 hours on
average (Kokolis et al. 2024, arXiv 2410.21680).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hourglass_dist.core import ranks

DAY = 86400.0
RATES = {"Llama 3": 419 / (54 * 16_384), "RSC-1": 24 / (7.9 * 1024)}
"""Failures of a job per GPU and day."""

HANGS = 0.10
"""Share of failures that are noticed only when a collective times out: of Llama 3's failures 8.4 %
were of the network and 1.7 % were ended by the watchdog of NCCL."""
CRASH_S, HANG_S = 60.0, ranks.TIMEOUT.total_seconds()
"""Time from a crash, and from a hang, to the end of all ranks, seconds."""


@dataclass(frozen=True)
class Saving:
    """Time that one checkpoint takes."""

    stall_s: float
    """Time that training stalls, seconds."""
    write_s: float
    """Time from the end of the stall until the checkpoint is durable, seconds."""

    def period(self, interval_s: float) -> float:
        """Return the seconds from one save to the next, with ``interval_s`` of training between; a
        save waits for the previous one."""
        return max(interval_s, self.write_s) + self.stall_s


@dataclass(frozen=True)
class Return:
    """Delays between a failure and the next training step."""

    crash_s: float = CRASH_S
    hang_s: float = HANG_S
    hangs: float = HANGS
    queue_s: float = 300.0
    """Mean queue time, seconds."""
    queue_spread: float = 0.0
    """Standard deviation of the logarithm of the queue time; 0: every queue time is the mean."""
    start_s: float = 180.0
    """Time of a start until the checkpoint is loaded, seconds; a failure in it restarts it."""

    @property
    def away_s(self) -> float:
        """Mean time from a failure to the next start, seconds."""
        return (1 - self.hangs) * self.crash_s + self.hangs * self.hang_s + self.queue_s


@dataclass(frozen=True)
class Outcome:
    """Shares of the time of a run, and the mean loss per failure."""

    goodput: float
    """Share of time in training that was kept."""
    lost: float
    """Share of time in training that was lost and repeated."""
    stalled: float
    """Share of time in stalls for checkpoints."""
    away: float
    """Share of time without a running job: notice, queue and start."""
    lost_s: float
    """Mean training time lost per failure, seconds."""


def mtbf_s(gpus: int, rate: float) -> float:
    """Return the mean time between failures of a job, seconds; ``rate`` is per GPU and day."""
    return DAY / (rate * gpus)


def young(cost_s: float, mtbf_s: float) -> float:
    """Return the best checkpoint interval to first order, seconds (Young 1974)."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly(cost_s: float, mtbf_s: float) -> float:
    """Return the best checkpoint interval to higher order, seconds (Daly 2006)."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    part = cost_s / (2 * mtbf_s)
    return young(cost_s, mtbf_s) * (1 + math.sqrt(part) / 3 + part / 9) - cost_s


def goodput(interval_s: float, saving: Saving, back: Return, mtbf_s: float) -> float:
    """Return the share of time in training that is kept, for exponential times between failures.

    The job saves n checkpoints or more before a failure with probability P(X > n periods + write).
    A failure comes after ``mtbf_s`` on average, and a restart takes exp(start / mtbf) attempts.
    """
    lives = math.exp(min(700.0, saving.period(interval_s) / mtbf_s))
    saves = math.exp(-saving.write_s / mtbf_s) / (lives - 1)
    attempts = math.exp(min(700.0, back.start_s / mtbf_s))
    return saves * interval_s / (attempts * (mtbf_s + back.away_s))


def best_interval(saving: Saving, back: Return, mtbf_s: float) -> float:
    """Return the interval of the largest ``goodput``, seconds, by golden-section search."""
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
"""Loss of goodput that is accepted for fewer checkpoints."""


def longest_interval(saving: Saving, back: Return, mtbf_s: float) -> float:
    """Return the longest interval, seconds, whose ``goodput`` is at most ``ENOUGH`` below the
    largest: fewer checkpoints spare a shared file system."""
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
    """Simulate a run with ``failures`` failures and return where its time went.

    ``shape`` is the Weibull shape of the times between failures (1: exponential; below 1: failures
    come in groups). After ``limit_s`` seconds a job is saved, ended and queued again. The same
    ``seed`` gives the same failures for every interval.
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
    """State of a simulated job."""

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
        """Start the job at time ``at``, seconds; training begins at ``self._began``."""
        self._called, self._began = at, at + self._start_s

    def until(self, at: float) -> None:
        """Simulate every end by the time limit before ``at``: save, wait for it, queue again."""
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
        """Simulate a failure at time ``at``; a queued job is not affected."""
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
        """Return the shares of the simulated time."""
        whole = self.useful + self.lost + self.stalled + self.away
        assert whole >= time_s * 0.999, "time is missing"
        return Outcome(
            *(self.useful / whole, self.lost / whole, self.stalled / whole, self.away / whole),
            lost_s=self.lost / failures,
        )
