"""Files: checksums, syncing to disk, atomic replacement, locks."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import google_crc32c


def checksum(path: Path) -> int:
    """Return the crc32c of a file."""
    total = google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return int.from_bytes(total.digest(), "big")


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: str | bytes) -> None:
    """Replace a small file atomically: readers see the old or the new content, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(unfinished)
    unfinished.rename(path)
    sync(path.parent)


def require_new(out: Path) -> None:
    """Raise ValueError when ``out`` exists."""
    if out.exists():
        raise ValueError(f"{out}: already exists; choose another folder or remove it first")


@contextmanager
def file_lock(path: Path, busy: str | None = None) -> Iterator[int]:
    """Hold an exclusive lock on a folder, or a file made if missing, and yield its descriptor.

    The lock ends with its process. Waits for another holder, or raises ``ValueError(busy)`` at
    once.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise ValueError(busy) from None
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``out`` that is renamed to ``out`` at the end.

    It is removed on an error; what a killed process left there is removed first. Raises ValueError
    when another process is writing ``out``.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    missing = [parent for parent in folder.parents if not parent.exists()]  # nearest first
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder, busy=f"{out}: another process is writing this folder"):
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
                with suppress(OSError):  # another process uses it by now
                    parent.rmdir()
            raise
