"""Executors of a step's tasks: local processes, a Ray cluster, or an array job of Slurm.

After ``run``, every task has been tried once. The work folder then holds the outputs of finished
tasks and the errors of failed ones; a task with neither was killed. The pipeline reads the folder
and calls ``run`` again for tasks that were killed. ``tick`` is called a few times a second; when it
raises, the executor stops the tasks that it started.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from data_tools.pipeline.settings import Prepare

Tick = Callable[[], None]
PAUSE_S = 0.2


class Executor(Protocol):
    """The interface of executors."""

    def run(self, step: str, indices: Sequence[int], tick: Tick) -> None:
        """Try every task once."""


@contextmanager
def open_executor(settings: Prepare, root: Path) -> Iterator[Executor]:
    """Open the executor of the settings. Raises ValueError when it is not available."""
    kinds = {"local": _local, "ray": _ray, "slurm": _slurm}
    with kinds[settings.executor.kind](settings, root) as executor:
        yield executor


def _environment() -> dict[str, str]:
    """Return the variables of workers: one thread for each library, as every core has a worker."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


# --- processes of this machine -------------------------------------------------------------------


class _Local:
    def __init__(self, root: Path, workers: int) -> None:
        self._root, self._workers = root, workers
        self._idle: list[subprocess.Popen[str]] = []
        self._busy: list[subprocess.Popen[str]] = []

    def run(self, step: str, indices: Sequence[int], tick: Tick) -> None:
        waiting = list(indices)
        with selectors.DefaultSelector() as selector:
            while waiting or self._busy:
                while waiting and len(self._busy) < self._workers:
                    worker = self._idle.pop() if self._idle else self._start()
                    self._busy.append(worker)
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
                    with suppress(BrokenPipeError):  # it is dead: its stdout is then at its end
                        print(step, waiting.pop(0), file=worker.stdin, flush=True)
                for key, _ in selector.select(PAUSE_S):
                    worker = key.data
                    selector.unregister(key.fileobj)
                    self._busy.remove(worker)
                    if worker.stdout.readline():
                        self._idle.append(worker)
                    else:
                        worker.wait()  # it was killed
                tick()

    def _start(self) -> subprocess.Popen[str]:
        with (self._root / "workers.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "data_tools.pipeline.worker", str(self._root)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=_environment(),
            )  # fmt: skip

    def close(self) -> None:
        for worker in [*self._idle, *self._busy]:
            worker.kill()
            worker.communicate()


@contextmanager
def _local(settings: Prepare, root: Path) -> Iterator[Executor]:
    executor = _Local(root, settings.workers)
    try:
        yield executor
    finally:
        executor.close()


# --- Ray -----------------------------------------------------------------------------------------


class _Ray:
    def __init__(self, ray: Any, root: Path, workers: int | None) -> None:
        from data_tools.pipeline.worker import work_on

        self._ray, self._root, self._workers = ray, root, workers
        self._task = ray.remote(num_cpus=1, max_retries=0)(work_on)

    def run(self, step: str, indices: Sequence[int], tick: Tick) -> None:
        waiting = list(indices)
        running: list[Any] = []
        most = self._workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    running.append(self._task.remote(self._root, step, waiting.pop(0)))
                ended, running = self._ray.wait(running, timeout=PAUSE_S)
                for task in ended:
                    with suppress(self._ray.exceptions.RayError):  # killed: its folder is not there
                        self._ray.get(task)
                tick()
        finally:
            for task in running:
                self._ray.cancel(task, force=True)


@contextmanager
def _ray(settings: Prepare, root: Path) -> Iterator[Executor]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ValueError("executor.kind=ray needs Ray: pip install 'hourglass_dist[ray]'") from None
    address = settings.executor.ray_address
    _require_listener(address)
    started_here: dict[str, Any] = {"num_cpus": settings.workers, "include_dashboard": False}
    environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    try:
        ray.init(
            address=address, runtime_env=environment, log_to_driver=False, logging_level="error",
            **({} if address else started_here),
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"executor.ray_address: {address}: no Ray there: {error}") from None
    try:
        yield _Ray(ray, root, settings.executor.workers)
    finally:
        ray.shutdown()


def _require_listener(address: str | None) -> None:
    """Raise ValueError when nothing answers at HOST:PORT; Ray itself would try for minutes."""
    found = re.fullmatch(r"(.+):([0-9]+)", address or "")
    if not found or "://" in found[1]:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"executor.ray_address: {address}: no Ray there: {error}") from None


# --- Slurm ---------------------------------------------------------------------------------------


class _Slurm:
    def __init__(self, root: Path, workers: int, options: Sequence[str]) -> None:
        self._root, self._workers, self._options = root, workers, options

    def run(self, step: str, indices: Sequence[int], tick: Tick) -> None:
        listed = self._root / step / "slurm.json"
        listed.write_text(json.dumps(list(indices)))
        workers = min(self._workers, len(indices))
        words = [
            sys.executable,
            "-m",
            "data_tools.pipeline.worker",
            str(self._root),
            step,
            str(listed),
        ]
        script = f'#!/bin/sh\nexec {shlex.join(words)} "$SLURM_ARRAY_TASK_ID" {workers}\n'
        job = self._call(
            ["sbatch", "--parsable", f"--array=0-{workers - 1}", f"--job-name=prepare-{step}",
             "--ntasks=1", f"--output={self._root / step / 'slurm-%a.log'}",
             f"--chdir={Path.cwd()}", *self._options],
            script,
        ).partition(";")[0].strip()  # fmt: skip
        try:
            while self._call(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip():
                tick()
                time.sleep(PAUSE_S)
            tick()
        except BaseException:
            self._call(["scancel", job])
            raise

    def _call(self, words: Sequence[str], script: str = "") -> str:
        done = subprocess.run(
            words, input=script, capture_output=True, text=True, env=_environment(), check=False
        )
        if done.returncode and not re.search("Invalid job id", done.stderr):  # that is: job over
            raise ValueError(f"{words[0]}: {' '.join(done.stderr.split()) or done.returncode}")
        return done.stdout


@contextmanager
def _slurm(settings: Prepare, root: Path) -> Iterator[Executor]:
    try:
        subprocess.run(["sbatch", "--version"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError("executor.kind=slurm: sbatch does not run on this machine") from None
    yield _Slurm(root, settings.workers, settings.executor.slurm_options)
