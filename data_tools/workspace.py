"""All or nothing: a folder of output appears under its name when it is whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hourglass_dist.files import sync

Show = Callable[[str], None]
"""Shows a line about how far a long step is, over the line before."""


def silent(line: str) -> None:
    """Shows nothing."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that becomes ``out`` at the end, and vanishes on an error.

    What a killed process left there is swept away. Raises ValueError when another process is
    writing ``out``.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    missing = [parent for parent in folder.parents if not parent.exists()]  # nearest first
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another process is writing this folder") from None
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
            sync(folder)
            folder.rename(out)
            sync(out.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):  # it is in use by now
                    parent.rmdir()
            raise
    finally:
        os.close(lock)
