"""The progress of a step as one line: tasks, documents, MB, MB/s, documents kept, time left."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta

from data_tools.live_line import Show
from data_tools.pipeline.workspace import DONE_FILE, Counts, Spec, Work


class Progress:
    """The progress of one step."""

    def __init__(
        self, work: Work, step: str, unit: str, tasks: Sequence[Spec], left: int, show: Show
    ) -> None:
        """Start the clock; ``left`` of the tasks remain, an earlier run finished the others."""
        self._work, self._step, self._unit, self._show = work, step, unit, show
        self._tasks, self._left = len(tasks), left
        self._begun = time.monotonic()
        self._finished: dict[str, Counts] = {}

    def show(self) -> None:
        """Show the line."""
        self._show(self.line())

    def line(self) -> str:
        """Return the line, from the present state of the work folder."""
        folder = self._work.root / self._step
        for path in folder.iterdir():
            if path.name.isdigit() and path.name not in self._finished:
                about = json.loads((path / DONE_FILE).read_bytes())
                self._finished[path.name] = _in_short(about["counts"])
        done = len(self._finished)
        running = [*self._work.running(self._step), *self._finished.values()]
        words = [f"{self._step}: {done:,} of {self._tasks:,} tasks"]
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
        """Return the line for a finished step."""
        words = [f"{self._step:<9} {self._tasks:,} tasks"]
        if self._step == "read":
            records, kept, aside, size = (
                sum(c[name] for c in counts) for name in ("records", "kept", "quarantined", "bytes")
            )
            dropped = sum(sum(c["dropped"].values()) for c in counts)
            words += [f"{records:,} documents, {size / 1e6:,.1f} MB"]
            words += [f"kept {kept:,}, dropped {dropped:,}, quarantined {aside:,}"]
        elif self._step in ("exact", "clusters"):
            words.append(f"{sum(c['duplicates'] for c in counts):,} duplicates")
        elif self._step == "tokens":
            size = sum(c[split]["text_bytes"] for c in counts for split in ("train", "heldout"))
            tokens = sum(c[split]["tokens"] for c in counts for split in ("train", "heldout"))
            words.append(f"{size / 1e6:,.1f} MB, {tokens:,} tokens")
        if self._left < self._tasks:
            words.append(f"{self._tasks - self._left:,} of them done before")
        if self._step in ("read", "tokens") and self._left == self._tasks:
            words.append(f"{size / 1e6 / max(seconds, 1e-3):,.1f} MB/s")
        return f"{', '.join(words)}, {seconds:.1f} s"


def _in_short(counts: Counts) -> Counts:
    """Return the counts of a finished task under the names of a running one's."""
    if "records" in counts:  # of reading
        words = {name: counts[name] for name in ("bytes", "kept", "quarantined")}
        return words | {"documents": counts["records"], "dropped": sum(counts["dropped"].values())}
    if "train" in counts:  # of tokens
        size = counts["train"]["text_bytes"] + counts["heldout"]["text_bytes"]
        return {"documents": counts["documents"], "bytes": size}
    return {}
