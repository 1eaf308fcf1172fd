"""A sign of life of every rank, for ``hourglass status``: ``RUN/heartbeats/rank_00003.json``.

    {"time": 1770000000.0, "rank": 3, "ranks": 8, "host": "node0", "pid": 4711,
     "space": "pid:[4026531836]", "doing": "training", "step": 500, "seconds": 0.31, "loss": 1.93,
     "limit": 600.0}

``time`` is in seconds since 1970, ``step`` how many are done, ``seconds`` what the last one took,
``loss`` its loss (on the main rank), ``limit`` how many seconds the rank may be silent. A run that
ends by itself leaves none of these files; a killed one does.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

FOLDER = "heartbeats"


@dataclass(frozen=True)
class Beat:
    """What a rank said last."""

    time: float
    rank: int
    ranks: int
    host: str
    pid: int
    space: str
    """Where ``pid`` means something: see ``process_space``."""
    doing: str
    step: int
    seconds: float | None
    loss: float | None
    limit: float

    @property
    def where(self) -> str:
        """``rank 3 (node0)``."""
        return f"rank {self.rank} ({self.host})"


def pause_between(ranks: int) -> float:
    """Seconds between two writes of a rank: a file system has to bear those of all of them."""
    return max(5.0, ranks / 100)


class Heart:
    """Writes this rank's file, now and then; there is no thread."""

    def __init__(self, run: Path, rank: int, ranks: int, step: int, limit: float) -> None:
        """A rank that starts after ``step`` steps. The main rank forgets those of an earlier start
        with more ranks."""
        self._folder = run / FOLDER
        self._path = self._folder / _name(rank)
        self._unfinished = self._path.with_name(f".{self._path.name}.unfinished")
        self._written = time.monotonic()
        host = socket.gethostname()
        self._beat = Beat(
            *(time.time(), rank, ranks, host, os.getpid(), process_space(), "starting", step),
            *(None, None, limit),
        )
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for other in read_heartbeats(run) if rank == 0 else ():
                if other.rank >= ranks:
                    (self._folder / _name(other.rank)).unlink(missing_ok=True)
        self._write()

    def beat(
        self, doing: str, step: int, seconds: float | None, loss: float | None, limit: float
    ) -> None:
        """Something has happened; written at once when it is something new, else now and then."""
        new = (doing, limit) != (self._beat.doing, self._beat.limit)
        self._beat = replace(
            self._beat, doing=doing, step=step, seconds=seconds, loss=loss, limit=limit
        )
        often = min(pause_between(self._beat.ranks), limit / 4)
        if new or time.monotonic() - self._written > often:
            self._written = time.monotonic()
            self._write()

    def _write(self) -> None:
        """Whole or not at all, but not synced: what a crash of the machine takes is of no use."""
        self._beat = replace(self._beat, time=time.time())
        with suppress(OSError):  # a full disk ends no run
            self._unfinished.write_text(json.dumps(asdict(self._beat)))
            self._unfinished.rename(self._path)

    def close(self) -> None:
        """The rank ends by itself."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._unfinished.unlink(missing_ok=True)
            self._folder.rmdir()  # of the last rank


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def read_heartbeats(run: Path) -> list[Beat]:
    """The last sign of every rank, in rank order; files that cannot be read are left out."""
    found = []
    names = {field.name for field in fields(Beat)}
    for path in sorted((run / FOLDER).glob("rank_*.json")):
        with suppress(OSError, ValueError, TypeError):
            entry = json.loads(path.read_text())
            found.append(Beat(**{name: entry[name] for name in names & entry.keys()}))
    return found


def process_space() -> str:
    """Linux's name for the processes that this one sees: containers of one host have their own;
    empty elsewhere."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_state(pid: int) -> tuple[str, int] | None:
    """Linux's letter for the state of a process of this machine (T: stopped) and its parent; None
    when it is gone, or the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else (state, int(parent))


def clock_time(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
