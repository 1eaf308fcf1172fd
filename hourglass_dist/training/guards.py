"""What to do about steps that go wrong, or never end.

no number as loss or gradient   the step changes nothing, is noted; too many in a row end the run
a loss that jumps and stays     back to the last checkpoint, past the batches that did it
a rank that never comes         the stacks of every rank in the run folder, and the run ends
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from hourglass_dist.config.schema import SpikeConfig
from hourglass_dist.core import ranks
from hourglass_dist.engine.engine import StepResult
from hourglass_dist.health import watcher
from hourglass_dist.health.heartbeat import Heart

T = TypeVar("T")

SKIPPED_FILE = "skipped.jsonl"


class SkippedSteps:
    """Counts steps whose loss or gradient is no number. The engine has left the weights alone."""

    def __init__(self, run: Path, most: int, step: int, world: ranks.World) -> None:
        """Goes on after ``step`` steps with what the run folder has noted about them; stops after
        ``most`` in a row."""
        self._path, self._most, self._world = run / SKIPPED_FILE, most, world
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        known = [entry for entry in map(json.loads, lines) if entry["step"] <= step]
        self.total = len(known)
        steps = {entry["step"] for entry in known}
        self._in_a_row = next(n for n in range(step + 1) if step - n not in steps)
        ranks.barrier()
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
    """Shows that this rank lives, and ends it when nothing has happened for a while; its stacks are
    then in the run folder.

    Under torchrun ``health/watcher.py`` does that. Without it, or when it is gone, too, a timer of
    this process does, outside of Python's lock: a process that hangs inside a collective
    is ended as well. All ranks wait for the hung one and so end at about the same time.
    """

    def __init__(self, run: Path, minutes: float, world: ranks.World, step: int) -> None:
        """A rank that starts after ``step`` steps."""
        self._path = watcher.open_stacks(run, world.rank)
        self._file = self._path.open("a")
        faulthandler.register(watcher.STACKS_SIGNAL, file=self._file, all_threads=True)
        self._sign = watcher.Sign(world.rank, self._path)
        self._seconds, self._is_main = 60 * minutes, world.is_main
        self._doing, self._step = "starting", step
        self._took: float | None = None
        self._loss: float | None = None
        self._last = self._armed = time.monotonic()
        limit = max(self._seconds, START_SECONDS)
        self._heart = Heart(run, world.rank, world.size, step, limit)
        self._arm(limit)

    def step(self, step: int, loss: float) -> None:
        """Completed step ``step`` is done."""
        self._took = time.monotonic() - self._last
        self._step, self._loss = step, loss if self._is_main and math.isfinite(loss) else None
        self.beat("training")

    def beat(self, doing: str) -> None:
        """Something has happened."""
        now = self._last = time.monotonic()
        self._heart.beat(doing, self._step, self._took, self._loss, self._seconds)
        if doing != self._doing or now - self._armed > min(1.0, self._seconds / 4):
            self._doing, self._armed = doing, now
            self._arm(self._seconds)

    def _arm(self, seconds: float) -> None:
        self._sign.give(self._step, seconds)
        margin = watcher.MARGIN if self._sign.is_watched else 0.0
        faulthandler.dump_traceback_later(seconds + margin, exit=True, file=self._file)

    def watching(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, those of an evaluation; each one shows that something happens."""
        for item in items:
            self.beat("evaluating")
            yield item

    def close(self) -> None:
        """The run ends by itself."""
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(watcher.STACKS_SIGNAL)
        self._sign.give(self._step, None)
        self._heart.close()
        self._file.close()
        with suppress(OSError):
            if not self._path.stat().st_size:
                self._path.unlink()
            self._path.parent.rmdir()  # unless other ranks have theirs there


def record_collectives(run: Path) -> None:
    """Let NCCL keep its last collectives and write them beside the stacks when one waits for too
    long; before the process group is made. ``python -m torch.distributed.flight_recorder.fr_trace``
    reads them."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str((run / "stacks" / "nccl_rank_").resolve()))
