"""Handling of bad steps: NaN or infinite losses, and loss spikes.

NaN or infinite loss or gradient   the step changes nothing and is recorded; too many in a row end
                                   the run
a loss that jumps and stays high   the run goes back to a checkpoint and leaves out the batches
"""

from __future__ import annotations

import math
import statistics
from contextlib import suppress
from pathlib import Path
from typing import Any

from hourglass_dist.config.schema import SpikeConfig
from hourglass_dist.core import ranks
from hourglass_dist.core.records import append_jsonl, forget_after, read_jsonl
from hourglass_dist.engine.engine import StepResult

SKIPPED_FILE = "skipped.jsonl"


class SkippedSteps:
    """Counter of steps with a NaN or infinite loss or gradient, which the engine does not apply."""

    def __init__(self, run: Path, most: int, step: int, world: ranks.World) -> None:
        """Continue after ``step`` steps with the skipped steps of the run folder; ``most`` skipped
        steps in a row end the run."""
        self._path, self._most, self._world = run / SKIPPED_FILE, most, world
        steps = {entry["step"] for entry in read_jsonl(self._path) if entry["step"] <= step}
        self.total = len(steps)
        self._in_a_row = next(n for n in range(step + 1) if step - n not in steps)
        ranks.barrier()  # all have read the file
        if world.is_main:
            forget_after(self._path, step)  # those steps are taken again

    def check(self, step: int, result: StepResult, rows: range) -> None:
        """Record ``step`` with the rows of its batch if it was skipped.

        Raises FloatingPointError after too many skipped steps in a row.
        """
        if result.applied and math.isfinite(result.nll):
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        about = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}"
        if self._world.is_main:
            entry = {"step": step, "loss": str(result.loss), "rows": [rows.start, rows.stop]}
            with suppress(OSError):  # it is printed, too
                append_jsonl(self._path, entry)
            print(f"{about}: skipped; rows {rows.start} to {rows.stop - 1}", flush=True)
        if self._in_a_row >= self._most:
            raise FloatingPointError(
                f"{about}: {self._in_a_row} steps in a row changed nothing (train.max_skipped_steps"
                f"); their rows are in {self._path}"
            )


class SpikeFound(Exception):
    """Signal of a loss spike: the run must go back to step ``good`` or before, and leave out the
    batches before ``data_step``."""

    def __init__(self, line: str, good: int, data_step: int) -> None:
        super().__init__(line)
        self.good, self.data_step = good, data_step


PATIENCE = 3
"""Number of consecutive high losses that make a spike; one alone is an unusual batch."""


class LossSpikes:
    """Detector of a loss that jumps and stays high, with the list of batches left out for it.

    It depends only on the losses, which are the same on every rank, and its state is saved: a
    resumed run decides like an uninterrupted one.
    """

    def __init__(self, config: SpikeConfig | None, state: dict[str, Any]) -> None:
        """Continue from a saved ``state``; {} at the start of a run."""
        self._config = config
        self._losses: list[float] = list(state.get("losses", []))
        self._high = int(state.get("high", 0))
        self.left_out: list[tuple[int, int]] = [(s, n) for s, n in state.get("left_out", [])]
        """Pairs of a step and the number of steps of data that are left out after it."""

    def state(self) -> dict[str, Any]:
        """Return the whole state, for JSON."""
        return {"losses": self._losses, "high": self._high, "left_out": self.left_out}

    def data_step(self, step: int) -> int:
        """Return the step of the data order that is read after ``step`` completed steps."""
        return step + sum(steps for after, steps in self.left_out if after <= step)

    def check(self, step: int, loss: float) -> None:
        """Raise SpikeFound when ``step`` completes a spike, unless ``most`` were left out."""
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
        """Return the highest normal loss: the mean of the window plus ``sigmas`` standard
        deviations, each at least 1 % of the mean."""
        assert self._config is not None
        mean = statistics.fmean(self._losses)
        spread = max(statistics.pstdev(self._losses), 0.01 * mean)
        return mean + self._config.sigmas * spread

    def back_at(self, step: int, state: dict[str, Any], data_step: int) -> LossSpikes:
        """Return a copy for a run that goes back to ``step``, with the ``state`` saved there, and
        reads the data of ``data_step`` next."""
        back = LossSpikes(self._config, state)
        # the new entry covers what was left out after later steps
        back.left_out = [(s, n if s <= step else 0) for s, n in self.left_out]
        back.left_out.append((step, data_step - back.data_step(step)))
        return back
