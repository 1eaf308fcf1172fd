"""Files that are whole or not there: checksums, syncing to disk, replacing in one instant."""

from __future__ import annotations

import hashlib
import os
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


def replace(path: Path, text: str) -> None:
    """Write a small file so that readers see the old or the new one, never a part."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    sync(unfinished)
    unfinished.rename(path)
    sync(path.parent)
