"""Files of JSON lines, and how the starts of a run ended; no import of torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from hourglass_dist.core.files import replace

HISTORY_FILE = "history.jsonl"
KILLED = "killed, no end noted"


def read_history(run: Path) -> list[dict[str, Any]]:
    """Return the entries of a run's history, oldest first, without an unfinished line."""
    return read_jsonl(run / HISTORY_FILE)


class Start(NamedTuple):
    """One start of a run and how it ended."""

    step: int
    """Number of completed steps at the start."""
    time: float
    """Time of the start, seconds since 1970."""
    ending: str | None = None
    """Reason of its end; None while it runs or when it was killed."""
    crashed: bool = True
    """Whether it crashed: neither finished, nor stopped on request, nor failed by a user's
    mistake."""


def starts_of(entries: Iterable[Mapping[str, Any]]) -> list[Start]:
    """Return the starts in the entries of a history, oldest first."""
    starts: list[Start] = []
    for entry in entries:
        if entry["event"] == "start":
            starts.append(Start(entry["step"], entry["time"]))
        elif starts:
            crashed = entry.get("crashed", False)
            starts[-1] = starts[-1]._replace(ending=entry["reason"], crashed=crashed)
    return starts


def require_progress(run: Path, step: int, most: int) -> None:
    """Raise ValueError when a run's last ``most`` starts all crashed before saving anything beyond
    ``step``, from which it would continue."""
    latest = takewhile(lambda start: start.step == step, reversed(starts_of(read_history(run))))
    crashes = [start.ending or KILLED for start in latest if start.crashed]
    if len(crashes) >= most:
        raise ValueError(
            f"{run}: the last {len(crashes)} starts all crashed before anything beyond step {step} "
            f"was saved (the last one: {crashes[0]}); what they said and {run}/stacks tell why; to "
            f"try again all the same: run.max_fruitless_starts={len(crashes) + most}"
        )


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record to a .jsonl file. Raises OSError."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def forget_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the records past ``step`` and any unfinished line from a .jsonl file; return the
    others."""
    kept = [record for record in read_jsonl(path) if record["step"] <= step]
    text = "".join(json.dumps(record) + "\n" for record in kept)
    if path.exists() and path.read_text() != text:
        replace(path, text)
    return kept


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a .jsonl file, unfinished lines left out; [] for a missing file."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
