"""Reading what a run has noted: lines of JSON, and how its starts ended. Knows no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

HISTORY_FILE = "history.jsonl"
KILLED = "killed, no end noted"


def read_history(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's history, oldest first; a line that was cut off is left out."""
    return read_lines(run / HISTORY_FILE)


KILLED = "killed, no end noted"


class Start(NamedTuple):
    """One start of a run and how it ended."""

    step: int
    """From which it went on."""
    time: float
    ending: str | None = None
    """None: it goes on, or nothing was noted."""
    crashed: bool = True
    """Not finished, not stopped on request, not a mistake of the user."""


def starts_of(entries: Iterable[Mapping[str, Any]]) -> list[Start]:
    """The starts that a history tells of, oldest first."""
    found: list[Start] = []
    for entry in entries:
        if entry["event"] == "start":
            found.append(Start(entry["step"], entry["time"]))
        elif found:
            crashed = entry.get("crashed", False)
            found[-1] = found[-1]._replace(ending=entry["reason"], crashed=crashed)
    return found


def require_progress(run: Path, step: int, most: int) -> None:
    """Raise ValueError when the last ``most`` starts of a run all crashed before they had saved
    anything beyond ``step``, from which it would go on now."""
    latest = takewhile(lambda start: start.step == step, reversed(starts_of(read_history(run))))
    crashes = [start.ending or KILLED for start in latest if start.crashed]
    if len(crashes) >= most:
        raise ValueError(
            f"{run}: the last {len(crashes)} starts all crashed before anything beyond step {step} "
            f"was saved (the last one: {crashes[0]}); what they said and {run}/stacks tell why; to "
            f"try again all the same: run.max_fruitless_starts={len(crashes) + most}"
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, without a line that a killed process left unfinished; none when
    there is no file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
