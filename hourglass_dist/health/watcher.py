"""Ends ranks that hang, from outside: a thread in torchrun's own process, one on every node.

Each rank reports every now and then that it is alive, and for how long it may be silent from here
on: by a datagram, so that neither a file system nor a changed clock can make a rank look dead. When
one is silent for longer

    the stacks of all ranks of this node go to RUN/stacks/, by py-spy, which can read a process that
    is stopped or holds Python's lock; where it may not, by a signal to the rank;
    those that are still silent a moment later get SIGKILL, the only signal for a stopped process.

torchrun then starts all ranks again, or ends. Ranks on other nodes wait for the one that hangs, so
the watchers there do the same at about the same time.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hourglass_dist.health.heartbeat import process_state

VARIABLE = "HOURGLASS_WATCHER"
"""Environment variable with the name of the watcher's socket."""
STACKS_SIGNAL = signal.SIGUSR2
"""Signal on which a rank writes its own stacks."""
KEPT = 3
"""Number of files with stacks of earlier hangs that are kept for each rank."""
PY_SPY_SECONDS = 15
MARGIN = 60.0
"""Seconds that a watcher has to do all of this, before a rank ends itself."""


class WatcherClient:
    """Tells the watcher, from a rank, that the rank is alive."""

    def __init__(self, rank: int, stacks: Path) -> None:
        """``stacks``: the file for this rank's stacks."""
        self._about = {"rank": rank, "stacks": str(stacks.resolve())}
        name = os.environ.get(VARIABLE)
        self.is_watched = name is not None
        self._address = f"\0{name}"
        if self.is_watched:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            with suppress(OSError, AttributeError):  # where Linux lets only parents look inside
                ctypes.CDLL(None).prctl(_PR_SET_PTRACER, os.getppid())

    def report(self, step: int, limit: float | None) -> None:
        """Report that this rank has done ``step`` steps, and may be silent for ``limit`` seconds;
        with None, it is watched no longer."""
        if self.is_watched:
            message = json.dumps({**self._about, "step": step, "limit": limit}).encode()
            with suppress(OSError):  # the watcher is gone, or busy
                self._socket.sendto(message, self._address)


_PR_SET_PTRACER = 0x59616D61


@dataclass
class _Rank:
    """What the watcher knows of a rank."""

    rank: int
    stacks: Path
    step: int
    limit: float
    heard: float
    """When it last reported, by the watcher's clock."""


class Watcher(threading.Thread):
    """Watches the ranks that this process has started."""

    def __init__(self) -> None:
        super().__init__(name="watcher", daemon=True)
        self._ranks: dict[int, _Rank] = {}
        self.ended: set[int] = set()
        """Processes that got SIGKILL because they hung."""
        name = f"hourglass-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(f"\0{name}")  # a name without a file, gone with this process
        os.environ[VARIABLE] = name

    def run(self) -> None:
        while True:
            self._listen(0.25)
            if silent := self._silent():
                self._end(silent)

    def _listen(self, seconds: float) -> None:
        """Receive reports for so long. The kernel says who sent one; only children count."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                message, extra, *_ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
            except TimeoutError:
                return
            pid = struct.unpack("3i", extra[0][2])[0]
            if (process_state(pid) or ("", 0))[1] != os.getpid():
                continue
            report = json.loads(message)
            if report["limit"] is None:
                self._ranks.pop(pid, None)
            else:
                about = report["rank"], Path(report["stacks"]), report["step"], report["limit"]
                self._ranks[pid] = _Rank(*about, heard=time.monotonic())

    def _silent(self) -> list[int]:
        """The processes that have been silent for too long."""
        for pid in [pid for pid in self._ranks if process_state(pid) is None]:
            del self._ranks[pid]
        now = time.monotonic()
        return [pid for pid, rank in self._ranks.items() if now - rank.heard > rank.limit]

    def _end(self, silent: Sequence[int]) -> None:
        """Write the stacks of all ranks, and kill those that are still silent then."""
        begun = time.monotonic()
        first = self._ranks[silent[0]]
        which = ", ".join(str(self._ranks[pid].rank) for pid in silent[:8])
        say(
            f"rank {which} on {socket.gethostname()}: no sign of life for {first.limit:,.0f} s, "
            f"after step {first.step}; the stacks of this node's ranks go to {first.stacks.parent}"
        )
        with ThreadPoolExecutor(8) as several:
            list(several.map(self._write_stacks, list(self._ranks)))
        self._listen(min(5.0, first.limit / 4))  # the other nodes' watchers are not done yet
        for pid, rank in list(self._ranks.items()):
            if rank.heard < begun:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.ended.add(pid)
                del self._ranks[pid]

    def _write_stacks(self, pid: int) -> None:
        rank = self._ranks[pid]
        state = process_state(pid)
        if state is None:
            return
        stopped = state[0] in "Tt"
        title = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}: rank {rank.rank} on {socket.gethostname()}, "
            f"process {pid}{', which is stopped' if stopped else ''}, after step {rank.step}: "
            f"silent for {time.monotonic() - rank.heard:.1f} s"
        )
        stacks = py_spy(pid, stopped)
        with suppress(OSError), rank.stacks.open("a") as file:
            file.write(f"{title}\n{stacks or 'py-spy cannot read it; what it writes itself:'}\n")
        if not stacks:
            with suppress(ProcessLookupError):
                os.kill(pid, STACKS_SIGNAL)
                os.kill(pid, signal.SIGCONT)
            time.sleep(1.0)


def py_spy(pid: int, stopped: bool) -> str:
    """The stacks of all threads of a process; nothing when they cannot be read."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    # to halt a process that is stopped already is an error
    ways = [["--nonblocking"]] if stopped else [[], ["--nonblocking"]]
    for way in ways if program else []:
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [str(program), "dump", "--pid", str(pid), *way],
                capture_output=True,
                text=True,
                timeout=PY_SPY_SECONDS,
                check=True,
            )
            return done.stdout
    return ""


@contextmanager
def watching() -> Iterator[Watcher | None]:
    """A watcher over the ranks that are started inside; None where the system has no way to know
    who sent a report (it is not Linux): there ranks end themselves."""
    if not hasattr(socket, "SO_PASSCRED"):
        yield None
        return
    watcher = Watcher()
    watcher.start()
    yield watcher


def open_stacks(run: Path, rank: int) -> Path:
    """The file for a rank's stacks, empty. Those of earlier hangs are kept under the time that they
    were written at, the last few."""
    path = run / "stacks" / f"rank_{rank:05d}.txt"
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.exists() and path.stat().st_size:
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem}_{written}.txt"))
        for old in sorted(path.parent.glob(f"{path.stem}_*.txt"))[:-KEPT]:
            old.unlink(missing_ok=True)
    path.touch()
    return path


def say(line: str) -> None:
    """Print a line for whoever started torchrun."""
    print(line, file=sys.stderr, flush=True)
