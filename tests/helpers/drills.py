"""A run on several hosts, faults that happen to them, and what came of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from hosts import Hosts
from paths import ROOT
from ranks import environment

from hourglass_dist.core.records import read_history, read_jsonl
from hourglass_dist.engine import sharded_state


class Run:
    """One run of ``steps`` steps in a folder, on hosts with a rank each."""

    def __init__(self, hosts: Hosts, folder: Path, config: Path, dataset: Path, steps: int) -> None:
        self.hosts, self.folder, self.log = hosts, folder, folder.with_suffix(".log")
        self.arguments = [
            *(str(config), f"data.dataset={dataset}", f"run.dir={folder}", f"train.steps={steps}"),
            *(f"eval.every={steps}", "data.batch_size=16"),
        ]
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def environment(self, **variables: str) -> dict[str, str]:
        """What torchrun.sh gets, besides ``variables``."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {"PATH": path, "VIRTUAL_ENV": sys.prefix, "PYTHONPATH": str(ROOT)}
        cluster = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": self.hosts.names[0]}
        limits = {"MAX_RESTARTS": "5", "JOIN_TIMEOUT": "120", "SHUTDOWN_TIMEOUT": "60"}
        return environment() | ours | cluster | limits | variables

    def start(self, host: int, *changes: str, **variables: str) -> subprocess.Popen[bytes]:
        """The line that a person types on ``host``."""
        command = ["bash", str(ROOT / "launch/torchrun.sh"), *self.arguments, *changes]
        log, given = self.log_of(host), self.environment(**variables)
        process = self.hosts.start(host, command, log, given)
        self.processes[host] = process
        return process

    def processes_of(self, host: int, word: str) -> list[psutil.Process]:
        """The processes on ``host`` with this word in their command line."""
        tree = psutil.Process(self.processes[host].pid).children(recursive=True)
        return [process for process in tree if word in process.cmdline()]

    def agent(self, host: int) -> psutil.Process:
        """The host's torchrun."""
        (found,) = self.processes_of(host, "hourglass_dist.launch.agent")
        return found

    def rank(self, host: int) -> psutil.Process:
        """The host's rank."""
        (found,) = self.agent(host).children()
        return found

    def log_of(self, host: int) -> Path:
        """What the host has said."""
        return self.folder.with_name(f"{self.folder.name}.{self.hosts.names[host]}.log")

    def said(self, host: int) -> str:
        """The same, read."""
        return self.log_of(host).read_text() if self.log_of(host).exists() else ""

    def steps(self) -> list[int]:
        """The steps that metrics.jsonl has now."""
        log = self.folder / "metrics.jsonl"
        return [record["step"] for record in read_jsonl(log) if "train/loss" in record]

    def last(self) -> int:
        """The last one."""
        return max(self.steps(), default=0)

    def starts(self) -> list[int]:
        """The steps after which the ranks have begun to train."""
        return [entry["step"] for entry in read_history(self.folder) if entry["event"] == "start"]

    def again(self) -> str:
        """Wait until the ranks train again after a fault; what that cost."""
        begun, count, noted = time.monotonic(), len(self.starts()), self.last()

        def started() -> bool:
            nonlocal noted
            noted = max(noted, self.last())  # before it is forgotten
            return len(self.starts()) > count

        self.wait(started)
        back, log = self.starts()[count], self.folder / "metrics.jsonl"
        changed = log.stat().st_mtime_ns  # what is noted past that step is forgotten first
        self.wait(lambda: log.stat().st_mtime_ns > changed and self.last() > back)
        lost = max(0, noted - back)  # ranks that saved may have done one more than they noted
        return f"training again after {time.monotonic() - begun:.0f} s, {lost} steps lost"

    def wait(self, what: Callable[[], bool], seconds: float = 400) -> float:
        """Until ``what`` is so; returns the seconds that took. Fails with all logs."""
        begun = time.monotonic()
        while not what():
            assert time.monotonic() - begun < seconds, self.all_said()
            time.sleep(0.05)
        return time.monotonic() - begun

    def all_said(self) -> str:
        """What every host has said, without the lines of single steps."""
        said = []
        for host, name in enumerate(self.hosts.names):
            lines = [line for line in self.said(host).splitlines() if line[:5] != "step "]
            said += [f"--- {name}", *lines[-40:]]
        return "\n".join(said)

    def reach(self, step: int) -> float:
        """Until this step is noted."""
        return self.wait(lambda: self.last() >= step)

    def stop(self) -> None:
        """Kill whatever still runs."""
        for process in self.processes.values():
            process.kill()
            process.wait(timeout=30)

    def ends(self, host: int, seconds: float = 400) -> int:
        """The exit code of a host's torchrun."""
        process = self.processes[host]
        self.wait(lambda: process.poll() is not None, seconds)
        return process.returncode


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint."""
    state = sharded_state.Reader(run / "checkpoints" / f"step_{step:08d}")
    return {name: state.full("fp32", name) for name in state.names("fp32")}


def largest_difference(one: Path, other: Path, step: int) -> float:
    """Between the weights of two runs."""
    mine, theirs = weights(one, step), weights(other, step)
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)
