"""When a run was started and how each start ended: ``RUN/history.jsonl``.

    {"event": "start", "time": 1770000000.0, "step": 500, "ranks": 8, "device": "NVIDIA H100 ...",
     "host": "node0", "versions": {"torch": "2.13.0", ...}, "revision": "c688d1e"}
    {"event": "end", "time": 1770003600.0, "step": 1000, "reason": "finished", "crashed": false}

``time`` is in seconds since 1970, ``step`` how many steps were done. A killed process leaves no
end: a start that follows a start says so. A run that is started again and again, and crashes each
time before it has saved anything new, is refused in the end: see ``require_progress``.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch

from hourglass_dist import dist
from hourglass_dist.stop import Interrupted

HISTORY_FILE = "history.jsonl"
KILLED = "killed, no end noted"
PACKAGES = ("hourglass_dist", "torch", "deepspeed")


class History:
    """Notes the start and the end of this process's part of a run, on the main rank.

    A context: leaving it notes how it ended, if it had begun.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / HISTORY_FILE
        self._is_open = False
        self.step = 0
        """Steps done so far; whoever counts them keeps it."""
        self.first_start = time.time()
        """When the run was started for the first time, in seconds since 1970."""

    def start(self, step: int, world: dist.World) -> None:
        """This process goes on after ``step`` steps."""
        self.step = step
        if not world.is_main:
            return
        known = read_history(self._path.parent)
        device = device_name(world.device)
        now = self._add("start", ranks=world.size, device=device, **about_this_code())
        self._is_open = True
        self.first_start = min(entry["time"] for entry in [*known, now])

    def _add(self, event: str, **facts: Any) -> dict[str, Any]:
        entry: dict[str, Any] = {"event": event, "time": time.time(), "step": self.step, **facts}
        with suppress(OSError), self._path.open("a") as file:  # no reason to end a run
            file.write(json.dumps(entry) + "\n")
        return entry

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_open:
            first_line = (str(error).splitlines() or [""])[0]
            if kind is None:
                reason = "finished"
            elif issubclass(kind, Interrupted):
                reason = first_line.partition(";")[0]
            else:
                reason = f"{kind.__name__}: {first_line}"[:500]
            no_crash = (Interrupted, KeyboardInterrupt, ValueError, OSError)
            crashed = kind is not None and not issubclass(kind, no_crash)
            self._add("end", reason=reason, crashed=crashed)


def about_this_code() -> dict[str, Any]:
    """Where this process runs which code."""
    return {
        "host": socket.gethostname(),
        "versions": {name: version(name) for name in PACKAGES},
        "revision": revision(),
    }


def device_name(device: torch.device) -> str:
    """The accelerator's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def revision() -> str | None:
    """The commit of the checkout that this code lies in; None where it is installed."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


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
