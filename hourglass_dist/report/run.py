"""Contents of a run folder for its report; the run may still be in progress."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hourglass_dist.config.schema import Config, load
from hourglass_dist.core.records import read_history, read_jsonl


@dataclass(frozen=True)
class Run:
    """Contents of a run folder."""

    path: Path
    config: Config
    metrics: dict[str, list[tuple[float, float]]]
    """Pairs of step and value for every metric, in order of steps."""
    history: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    positions: list[dict[str, Any]]
    profile: str
    """Table of the profiler; empty when no profile was made."""

    @property
    def step(self) -> int:
        """Last recorded step."""
        return int(max((points[-1][0] for points in self.metrics.values()), default=0))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """Entries of the history that are starts."""
        return [entry for entry in self.history if entry["event"] == "start"]

    def last(self, name: str) -> float | None:
        """Return the newest value of a metric; None without one."""
        points = self.metrics.get(name)
        return points[-1][1] if points else None


def read_run(path: Path) -> Run:
    """Read a run folder. Raises ValueError when it holds no run, or no metric is recorded yet."""
    if not (path / "metrics.jsonl").exists():
        raise ValueError(f"{path}: no metrics.jsonl: expected the folder of a run that has begun")
    metrics: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in read_jsonl(path / "metrics.jsonl"):
        for name, value in record.items():
            if name != "step":
                metrics[name].append((record["step"], value))
    profile = path / "profile" / "table.txt"
    return Run(
        path=path,
        config=load(path / "config.yaml"),
        metrics=dict(metrics),
        history=read_history(path),
        skipped=read_jsonl(path / "skipped.jsonl"),
        samples=read_jsonl(path / "samples.jsonl"),
        positions=read_jsonl(path / "positions.jsonl"),
        profile=profile.read_text() if profile.exists() else "",
    )
