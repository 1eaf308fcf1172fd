"""What to do about steps that go wrong, or never end.

no number as loss or gradient   the step changes nothing, is noted; too many in a row end the run
a loss that jumps and stays     back to the last checkpoint, past the batches that did it
a rank that never comes         the stacks of every rank in the run folder, and the run ends
"""

from __future__ import annotations

import faulthandler
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hourglass_dist import dist
from hourglass_dist.config import SpikeConfig
from hourglass_dist.engine import StepResult

T = TypeVar("T")

SKIPPED_FILE = "skipped.jsonl"


class SkippedSteps:
    """Counts steps whose loss or gradient is no number. The engine has left the weights alone."""

    def __init__(self, run: Path, most: int, step: int, world: dist.World) -> None:
        """Goes on after ``step`` steps with what the run folder has noted about them; stops after
        ``most`` in a row."""
        self._path, self._most, self._world = run / SKIPPED_FILE, most, world
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        known = [entry for entry in map(json.loads, lines) if entry["step"] <= step]
        self.total = len(known)
        steps = {entry["step"] for entry in known}
        self._in_a_row = next(n for n in range(step + 1) if step - n not in steps)
        dist.barrier()
        if world.is_main and len(known) < len(lines):  # steps that are taken again
            self._path.write_text("".join(json.dumps(entry) + "\n" for entry in known))

    def look(self, step: int, result: StepResult, rows: range) -> None:
        """Note completed step ``step`` with the rows of its batch when it was skipped.

        Raises FloatingPointError when it was one too many.
        """
        if result.applied and math.isfinite(result.nll):
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        about = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
        if self._world.is_main:
            entry = {"step": step, "loss": str(result.loss), "rows": [rows.start, rows.stop]}
            with suppress(OSError), self._path.open("a") as file:  # it is said below, too
                file.write(json.dumps(entry) + "\n")
            print(f"{about}: skipped; rows {rows.start} to {rows.stop - 1}", flush=True)
        if self._in_a_row >= self._most:
            raise FloatingPointError(
                f"{about}: {self._in_a_row} steps in a row changed nothing (train.max_skipped_steps"
                f"); their rows are in {self._path}"
            )


class SpikeFound(Exception):
    """The loss has jumped: go back to step ``good`` or before, and leave the batches up to
    ``data_step`` out."""

    def __init__(self, line: str, good: int, data_step: int) -> None:
        super().__init__(line)
        self.good, self.data_step = good, data_step


PATIENCE = 3
"""High losses in a row that make a spike: one strange batch is none."""


class LossSpikes:
    """Finds a loss that has jumped and stays up, and knows which batches have been left out since.

    A function of the losses alone, which are the same on every rank, and its state is saved: a
    resumed run decides as the uninterrupted one did.
    """

    def __init__(self, config: SpikeConfig | None, state: dict[str, Any]) -> None:
        """Goes on from a ``state``; {} at the beginning."""
        self._config = config
        self._losses: list[float] = list(state.get("losses", []))
        self._high = int(state.get("high", 0))
        self.left_out: list[tuple[int, int]] = [(s, n) for s, n in state.get("left_out", [])]
        """(after this step, so many steps of the data)."""

    def state(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {"losses": self._losses, "high": self._high, "left_out": self.left_out}

    def data_step(self, step: int) -> int:
        """The step of the data plan that is read after ``step`` completed steps."""
        return step + sum(steps for after, steps in self.left_out if after <= step)

    def look(self, step: int, loss: float) -> None:
        """Raise SpikeFound when ``step`` completes a spike and another may still be left out."""
        if self._config is None or not math.isfinite(loss):
            return
        full = len(self._losses) == self._config.window
        if full and loss > self._limit():
            self._high += 1
            if self._high >= PATIENCE and len(self.left_out) < self._config.most:
                raise SpikeFound(
                    f"step {step}: the loss has jumped to {loss:.4f} and stays over "
                    f"{self._limit():.4f}",
                    # the step before the first high loss made it high
                    good=step - self._high - 1,
                    data_step=self.data_step(step),
                )
        else:
            self._high = 0
            self._losses = [*self._losses[full:], loss]

    def _limit(self) -> float:
        """Of the loss: so many standard deviations over the mean of the window; at least 1 % of the
        mean counts as one."""
        assert self._config is not None
        mean = statistics.fmean(self._losses)
        spread = max(statistics.pstdev(self._losses), 0.01 * mean)
        return mean + self._config.sigmas * spread

    def back_at(self, step: int, state: dict[str, Any], data_step: int) -> LossSpikes:
        """These guards after the run went back to ``step``, with the ``state`` saved there, and
        goes on with the data of ``data_step``."""
        back = LossSpikes(self._config, state)
        # what was left out after later steps is part of what is left out now
        back.left_out = [(s, n if s <= step else 0) for s, n in self.left_out]
        back.left_out.append((step, data_step - back.data_step(step)))
        return back


START_SECONDS = 600.0
"""What a run has at least for its start and its first step, which may compile."""


class Watchdog:
    """Ends this process when nothing has happened for a while; its stacks are then in the run
    folder.

    A timer of its own, outside of Python's lock: a process that hangs inside a collective is ended
    too. All ranks wait for the hung one and so end at about the same time.
    """

    def __init__(self, run: Path, minutes: float, world: dist.World) -> None:
        folder = run / "stacks"
        folder.mkdir(exist_ok=True, parents=True)
        self._path = folder / f"rank_{world.rank:05d}.txt"
        self._file = self._path.open("w")
        self._seconds = 60 * minutes
        self._last = -math.inf
        self._arm(max(self._seconds, START_SECONDS))

    def beat(self) -> None:
        """Something has happened."""
        if (now := time.monotonic()) - self._last > min(1.0, self._seconds / 4):
            self._last = now
            self._arm(self._seconds)

    def _arm(self, seconds: float) -> None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def watching(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; each one shows that something happens."""
        for item in items:
            self.beat()
            yield item

    def close(self) -> None:
        """The run ends well."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._path.unlink(missing_ok=True)
        with suppress(OSError):  # other ranks have theirs there
            self._path.parent.rmdir()
