"""Runs a script of the tests on several ranks, the way a user would: torchrun, real processes,
gloo."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from paths import HELPERS


def environment() -> dict[str, str]:
    """This process's environment, one thread a rank, and no GPU: the tests compare CPU figures."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def torchrun_command(ranks: int, *target: str) -> list[str]:
    """The command line of ``ranks`` local ranks."""
    return [
        *(sys.executable, "-m", "hourglass_dist.launch.agent", "--standalone"),
        *("--local-addr", "127.0.0.1"),
        *(f"--nproc-per-node={ranks}", *target),
    ]  # fmt: skip


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a torchrun and all its ranks, which are in sessions of their own, and wait."""
    agent = psutil.Process(process.pid)
    family = [*agent.children(recursive=True), agent]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=30)


def start_torchrun(ranks: int, *target: str) -> subprocess.Popen[str]:
    """Start ``target`` (a script, or -m and a module, with arguments); its output is piped."""
    return subprocess.Popen(
        torchrun_command(ranks, *target),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until a training has noted ``step`` in its folder; fails when it ends before."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 240
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def torchrun(ranks: int, *target: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``target`` (a script, or -m and a module, with arguments) and wait; ends its whole
    process group."""
    process = start_torchrun(ranks, *map(str, target))
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            kill_tree(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_worker(ranks: int, name: str, *arguments: object) -> str:
    """Run ``tests/NAME`` on ``ranks`` ranks; fails with its output when it does."""
    done = torchrun(ranks, str(HELPERS / name), *map(str, arguments))
    assert done.returncode == 0, f"{name} failed:\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


def on_ranks(ranks: int, worker: str, *arguments: object) -> Any:
    """What ``helpers/WORKER OUT.json *arguments`` writes on ``ranks`` ranks. What they print goes
    to standard error: it shows how far they are."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = torchrun_command(ranks, str(HELPERS / worker), str(out), *map(str, arguments))
        subprocess.run(command, env=environment(), stdout=2, check=True)
        return json.loads(out.read_text())


def numbers(text: str) -> list[int]:
    """Whole numbers written with commas, as an option of the instruments."""
    return [int(number) for number in text.split(",")]


def hourglass(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run the ``hourglass`` command and wait."""
    done = subprocess.run(
        [Path(sys.executable).with_name("hourglass"), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def commands(*given: Sequence[object]) -> list[subprocess.CompletedProcess[str]]:
    """What these ``hourglass`` commands do, run in one process after one another: only the first
    waits for PyTorch."""
    done = subprocess.run(
        [sys.executable, str(HELPERS / "commands_worker.py")],
        input=json.dumps([list(map(str, arguments)) for arguments in given]),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [
        subprocess.CompletedProcess(["hourglass", *map(str, arguments)], *result)
        for arguments, result in zip(given, json.loads(done.stdout), strict=True)
    ]
