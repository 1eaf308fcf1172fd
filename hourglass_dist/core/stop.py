"""Requests to stop a run before its end: by a signal, a file, or the clock.

    SIGTERM, SIGUSR1     what schedulers send before they take a machine away
    RUN/STOP             an empty file that a person makes
    run.time_limit_hours since the start of the process

A request to one rank is enough. All ranks learn of it after the same step, save and end with
``exit_codes.STOPPED``. The run folder then holds a file INTERRUPTED that says why; the same command
continues.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FILE, TIME = "the file STOP", "run.time_limit_hours"
REASONS = (*(number.name for number in SIGNALS), FILE, TIME)


class Interrupted(Exception):
    """Raised when a run stops on request; its state is saved."""


class StopRequests:
    """Stop requests by signal, file and clock, checked after every step."""

    def __init__(self, run: Path, time_limit_hours: float | None, world: ranks.World) -> None:
        """Handle the signals until the process ends, and remove an earlier INTERRUPTED."""
        self._stop, self._interrupted, self._world = run / "STOP", run / "INTERRUPTED", world
        self._ends = time.monotonic() + 3600 * time_limit_hours if time_limit_hours else None
        self._asked: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)
        if world.is_main:
            self._interrupted.unlink(missing_ok=True)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._asked = signal.Signals(number).name

    def stop_flags(self) -> list[int]:
        """Return a flag of 0 or 1 for each of ``REASONS``: whether this rank wants to stop for it.
        Only the main rank checks the file and the clock."""
        asked = self._asked
        if self._world.is_main and not asked:
            if self._stop.exists():
                asked = FILE
            elif self._ends is not None and time.monotonic() > self._ends:
                asked = TIME
        return [int(reason == asked) for reason in REASONS]

    def reason(self, stop_flags: Sequence[int]) -> str | None:
        """Return the reason to stop from the summed flags of all ranks, or None."""
        return next((name for name, count in zip(REASONS, stop_flags, strict=True) if count), None)

    def mark_stopped(self, reason: str, step: int) -> Interrupted:
        """Record that the run was saved after ``step`` and stops; return the exception to raise."""
        line = f"stopped by {reason} after step {step}, which is saved"
        if self._world.is_main:
            self._stop.unlink(missing_ok=True)
            replace(self._interrupted, f"{line}\n")
        return Interrupted(f"{line}; the same command continues")
