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
    """crc32c of a file."""
    total = google_crc32c.Checksum()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return int.from_bytes(total.digest(), "big")


def sha256_of(path: Path) -> str:
    """The sha256 (hex) of a file."""
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Force a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: str | bytes) -> None:
    """Write a small file so that readers see the old or the new one, never a part."""
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
    """Hold the lock of a folder, or of a file, which is made if need be; yields its descriptor.

    A lock ends with the process that holds it. Waits for another holder, or raises
    ``ValueError(busy)`` at once.
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
    """A hidden folder beside ``out`` that becomes ``out`` at the end, and vanishes on an error.

    What a killed process left there is swept away. Raises ValueError when another process is
    writing ``out``.
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
                with suppress(OSError):  # it is in use by now
                    parent.rmdir()
            raise
