"""Watchdog for a rank that hangs: its stacks are written to the run folder and it is ended."""

from __future__ import annotations

import faulthandler
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from hourglass_dist.core import ranks
from hourglass_dist.health import watcher
from hourglass_dist.health.heartbeat import HeartbeatFile

T = TypeVar("T")

START_SECONDS = 600.0
"""Shortest limit for the start and the first step, which may compile, seconds."""


class Watchdog:
    """Watchdog that reports that this rank is alive, and ends it when it has been silent too long;
    its stacks are then in the run folder.

    Under torchrun ``health/watcher.py`` ends the rank. Without a watcher a timer in this process
    does; it does not need Python's lock, so it also ends a process that hangs inside a collective.
    All ranks wait for the hung one and so end at about the same time.
    """

    def __init__(self, run: Path, minutes: float, world: ranks.World, step: int) -> None:
        """Start the watch of a rank that has done ``step`` steps."""
        self._path = watcher.open_stacks(run, world.rank)
        self._file = self._path.open("a")
        faulthandler.register(watcher.STACKS_SIGNAL, file=self._file, all_threads=True)
        self._client = watcher.WatcherClient(world.rank, self._path)
        self._seconds, self._is_main = 60 * minutes, world.is_main
        self._doing, self._step = "starting", step
        self._took: float | None = None
        self._loss: float | None = None
        self._last = self._armed = time.monotonic()
        limit = max(self._seconds, START_SECONDS)
        self._heartbeat = HeartbeatFile(run, world.rank, world.size, step, limit)
        self._arm(limit)

    def step(self, step: int, loss: float) -> None:
        """Report that ``step`` is complete."""
        self._took = time.monotonic() - self._last
        self._step, self._loss = step, loss if self._is_main and math.isfinite(loss) else None
        self.beat("training")

    def beat(self, doing: str) -> None:
        """Report that this rank is alive, and what it does now."""
        now = self._last = time.monotonic()
        self._heartbeat.beat(doing, self._step, self._took, self._loss, self._seconds)
        if doing != self._doing or now - self._armed > min(1.0, self._seconds / 4):
            self._doing, self._armed = doing, now
            self._arm(self._seconds)

    def _arm(self, seconds: float) -> None:
        self._client.report(self._step, seconds)
        margin = watcher.MARGIN if self._client.is_watched else 0.0
        faulthandler.dump_traceback_later(seconds + margin, exit=True, file=self._file)

    def watching(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the batches of an evaluation, with a report for each one."""
        for item in items:
            self.beat("evaluating")
            yield item

    def close(self) -> None:
        """End the watch, when the run ends by itself."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(watcher.STACKS_SIGNAL)
        self._client.report(self._step, None)
        self._heartbeat.close()
        self._file.close()
        with suppress(OSError):
            if not self._path.stat().st_size:
                self._path.unlink()
            self._path.parent.rmdir()  # unless other ranks have theirs there


def record_collectives(run: Path) -> None:
    """Let NCCL record its last collectives and write them beside the stacks when one times out;
    called before the process group is made. To read them:
    ``python -m torch.distributed.flight_recorder.fr_trace``."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((run / "stacks" / "nccl_rank_").resolve()))
