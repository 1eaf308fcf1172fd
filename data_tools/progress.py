"""How far a stage is, as one line: tasks, documents, MB, MB/s, what was kept, time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

from data_tools.workspace import Counts, Show, Spec, Work


class Progress:
    """Of one stage."""

    def __init__(
        self, work: Work, stage: str, unit: str, tasks: Sequence[Spec], left: int, show: Show
    ) -> None:
        """``left`` of the tasks are still to be done; the others are from an earlier run."""
        self._work, self._stage, self._unit, self._show = work, stage, unit, show
        self._tasks, self._left = len(tasks), left
        self._begun = time.monotonic()
        self._finished: dict[int, Counts] = {}

    def show(self) -> None:
        """Look at the folder and show the line."""
        self._show(self.line())

    def line(self) -> str:
        """The line."""
        folder = self._work.root / self._stage
        done = sum(1 for path in folder.iterdir() if path.name.isdigit())
        running = self._work.running(self._stage)
        words = [f"{self._stage}: {done:,} of {self._tasks:,} tasks"]
        for name in ("documents", "bytes", "kept", "dropped", "quarantined"):
            total = sum(counts.get(name, 0) for counts in running)
            if total:
                words.append(f"{total / 1e6:,.1f} MB" if name == "bytes" else f"{total:,} {name}")
        elapsed = time.monotonic() - self._begun
        new = done - (self._tasks - self._left)
        if new > 0:
            left = timedelta(seconds=round(elapsed / new * (self._tasks - done)))
            words.append(f"{left} left")
        return ", ".join(words)

    def summary(self, counts: Sequence[Counts], seconds: float) -> str:
        """The line for a finished stage."""
        words = [f"{self._stage:<9} {self._tasks:,} tasks"]
        if self._stage == "read":
            records, kept, aside, size = (
                sum(c[name] for c in counts) for name in ("records", "kept", "quarantined", "bytes")
            )
            dropped = sum(sum(c["dropped"].values()) for c in counts)
            words += [f"{records:,} documents, {size / 1e6:,.1f} MB"]
            words += [f"kept {kept:,}, dropped {dropped:,}, quarantined {aside:,}"]
        elif self._stage in ("exact", "clusters"):
            words.append(f"{sum(c['duplicates'] for c in counts):,} duplicates")
        elif self._stage == "tokens":
            size = sum(c[split]["text_bytes"] for c in counts for split in ("train", "heldout"))
            tokens = sum(c[split]["tokens"] for c in counts for split in ("train", "heldout"))
            words.append(f"{size / 1e6:,.1f} MB, {tokens:,} tokens")
        if self._left < self._tasks:
            words.append(f"{self._tasks - self._left:,} of them done before")
        if self._stage in ("read", "tokens") and self._left == self._tasks:
            words.append(f"{size / 1e6 / max(seconds, 1e-3):,.1f} MB/s")
        return f"{', '.join(words)}, {seconds:.1f} s"
