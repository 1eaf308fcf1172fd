"""The work folder of a pipeline, and the tasks in it.

    OUT/work/
        STEP/tasks.json               the specification of every task of a step
        STEP/000000/                  the outputs of a task and done.json: all of them or none
        STEP/progress/0 error/0       the counts of a running task; the error of a failed one

A task is a pure function of its entry in tasks.json and of the outputs of earlier steps. It writes
into a hidden folder that is renamed when everything is on the disk. So it may be killed, or run
twice at once, anywhere: a worker needs only this folder.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from data_tools.pipeline.settings import Prepare, load_settings
from hourglass_dist.core.files import replace, sync

Spec = dict[str, Any]
"""The specification of a task, as JSON."""
Counts = dict[str, Any]
"""The counts of a task, as JSON."""
DONE_FILE = "done.json"
WORK_FORMAT = 2
"""Version of the tasks' outputs: those of another version are made again."""


@dataclass(frozen=True)
class Work:
    """The work folder, OUT/work."""

    root: Path

    @cached_property
    def settings(self) -> Prepare:
        """The settings that the folder was started with."""
        return load_settings(self.root.parent / "settings.yaml")

    def tasks(self, step: str) -> list[Spec]:
        """Return the tasks of a step. Raises FileNotFoundError before ``begin``."""
        path = self.root / step / "tasks.json"
        return _read_tasks(path, path.stat().st_mtime_ns)

    def folder(self, step: str, index: int) -> Path:
        """Return the folder of a task's outputs, which exists once the task is done."""
        return self.root / step / f"{index:06d}"

    def begin(self, step: str, specs: list[Spec], before: str) -> None:
        """Write the tasks of a step; ``before`` is the identity of the step before."""
        folder = self.root / step
        for name in ("progress", "error"):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).mkdir(parents=True)
        keyed = [spec | {"key": _hash([WORK_FORMAT, before, step, spec])} for spec in specs]
        replace(folder / "tasks.json", json.dumps(keyed))
        for left in folder.glob(".*.unfinished"):  # of killed workers
            shutil.rmtree(left, ignore_errors=True)

    def done(self, step: str, index: int, key: str) -> Counts | None:
        """Return the counts of a finished task; None when it is not done.

        Outputs with another key, or with missing files, are removed and count as not done.
        """
        folder = self.folder(step, index)
        try:
            about = json.loads((folder / DONE_FILE).read_bytes())
        except FileNotFoundError:
            return None
        paths = {folder / name: size for name, size in about["files"].items()}
        whole = all(p.exists() and p.stat().st_size == size for p, size in paths.items())
        if about["key"] != key or not whole:
            shutil.rmtree(folder)
            return None
        counts: Counts = about["counts"]
        return counts

    def counts(self, step: str) -> list[Counts]:
        """Return the counts of the tasks of a finished step."""
        paths = (self.folder(step, i) / DONE_FILE for i in range(len(self.tasks(step))))
        return [json.loads(path.read_bytes())["counts"] for path in paths]

    def errors(self, step: str) -> dict[int, str]:
        """Return the error messages of failed tasks, by task index."""
        found = sorted((self.root / step / "error").glob("[0-9]*"))
        return {int(path.name): path.read_text() for path in found}

    def running(self, step: str) -> list[Counts]:
        """Return the present counts of running tasks."""
        found = []
        for path in (self.root / step / "progress").glob("[0-9]*"):
            with suppress(OSError, ValueError):  # it is just being written
                found.append(json.loads(path.read_bytes()))
        return found


@lru_cache(maxsize=8)
def _read_tasks(path: Path, version: int) -> list[Spec]:
    """Read tasks.json once per process and version: it may be large."""
    found: list[Spec] = json.loads(path.read_bytes())
    return found


def identity_of(specs: list[Spec], counts: list[Counts]) -> str:
    """Return a hash that identifies the outputs of a finished step."""
    return _hash([[spec["key"] for spec in specs], counts])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Ticker:
    """A writer of a task's progress, a few times a second at most."""

    def __init__(self, path: Path) -> None:
        self._path, self._next, self._parent = path, 0.0, os.getppid()

    def __call__(self, **counts: int) -> None:
        """Write the counts when it is time; end the process when its parent is gone."""
        now = time.monotonic()
        if now < self._next:
            return
        if os.getppid() != self._parent:
            os._exit(3)
        with suppress(OSError):
            self._path.write_text(json.dumps(counts))
        self._next = now + 0.3


Tick = Callable[..., None]
Run = Callable[[Work, Spec, Path, Tick], Counts]
"""Function that runs a task: (work, spec, output folder, progress callback) -> counts."""


def do_task(work: Work, step: str, index: int, run: Run) -> bool:
    """Run a task unless it is done, write its error if it fails, return whether it is done."""
    gc.set_threshold(200_000, 50, 50)  # else lists of a million arrays are searched for cycles
    spec = work.tasks(step)[index]
    if work.done(step, index, spec["key"]) is not None:
        return True
    progress = work.root / step / "progress" / str(index)
    error_file = work.root / step / "error" / str(index)
    try:
        with _task_folder(work.folder(step, index)) as folder:
            counts = run(work, spec, folder, Ticker(progress))
            files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            about = {"key": spec["key"], "files": files, "counts": counts}
            (folder / DONE_FILE).write_text(json.dumps(about))
    except (ValueError, OSError) as error:
        replace(error_file, " ".join(str(error).split()) or type(error).__name__)
        return False
    finally:
        progress.unlink(missing_ok=True)
    return True


@contextmanager
def _task_folder(final: Path) -> Iterator[Path]:
    """Make a hidden folder of this process, which is synced and renamed to ``final`` at the end."""
    folder = final.with_name(f".{final.name}.{os.uname().nodename}.{os.getpid()}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        for path in folder.iterdir():
            sync(path)
        sync(folder)
        try:
            folder.rename(final)
        except OSError:
            if not (final / DONE_FILE).exists():
                raise
            # the same task ran twice at once, and the other process has written the same outputs
        sync(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
