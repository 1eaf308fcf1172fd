"""What to do about a step that went wrong: note it, go on, stop when it does not pass."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hourglass_dist import dist
from hourglass_dist.engine import StepResult

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
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(f"{about}: skipped; rows {rows.start} to {rows.stop - 1}", flush=True)
        if self._in_a_row >= self._most:
            raise FloatingPointError(
                f"{about}: {self._in_a_row} steps in a row changed nothing (train.max_skipped_steps"
                f"); their rows are in {self._path}"
            )
