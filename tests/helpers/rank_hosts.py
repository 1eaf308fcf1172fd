"""Ranks on "hosts" of their own: another name, and other folders in the same places."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import pytest
from ranks import environment


@dataclass(frozen=True)
class Done:
    """How a rank ended."""

    returncode: int
    stdout: str
    stderr: str


def own_namespace(script: str, *command: str) -> list[str]:
    """The command line of ``command`` in mounts and a host name of its own, after ``script``."""
    root = () if os.geteuid() == 0 else ("--map-root-user",)
    shell = ("bash", "-ec", f'{script}\nexec "$@"', "bash")
    return ["unshare", *root, "--mount", "--uts", *shell, *command]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_nodes(
    target: Sequence[str],
    own: Mapping[int, Sequence[str]] | None = None,
    scripts: Mapping[int, str] | None = None,
) -> list[Done]:
    """Two ranks of ``python TARGET``, rank r on host ``node<r>`` with arguments of its ``own`` and
    a shell script that prepares its host. Skips the test where there are no namespaces."""
    if subprocess.run(own_namespace("true", "true"), capture_output=True).returncode:
        pytest.skip("needs root, or user namespaces")
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = []
    for rank in range(2):
        script = f"hostname node{rank}\n{(scripts or {}).get(rank, '')}"
        command = own_namespace(script, sys.executable, *target, *(own or {}).get(rank, ()))
        about = {"RANK": str(rank), "LOCAL_RANK": "0"}
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment() | together | about,
            )
        )
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Done(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


@contextmanager
def slowed(process: psutil.Process) -> Iterator[None]:
    """The process runs a fifth of the time meanwhile."""
    over = threading.Event()

    def work() -> None:
        with suppress(psutil.NoSuchProcess):
            while not over.is_set():
                process.send_signal(signal.SIGSTOP)
                time.sleep(0.08)
                process.send_signal(signal.SIGCONT)
                time.sleep(0.02)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
