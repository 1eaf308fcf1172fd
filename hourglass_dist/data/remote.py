"""Datasets in an object store or on a web server: downloaded with retries, cached by hash.

    s3://bucket/dataset   gs://...   http(s)://...     read through fsspec, a part at a time

    CACHE/index/HASH/      index.json and tokenizer of an address, fetched at every start
    CACHE/shards/SHA256    a whole shard; the least recently used is removed first
    CACHE/lock             held while room is made, and while a finished shard gets its name

A shard is downloaded under a lock of its own, so one process of a machine does it and the others
wait; written under a temporary name, hashed, synced, renamed. A process that finds one hashes it
before its first use. Files are removed while others read them: on Linux they stay readable.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import google_crc32c

from hourglass_dist.config.data import CacheConfig
from hourglass_dist.core.files import file_lock, replace, sha256_of
from hourglass_dist.core.remote import EXTRAS, open_filesystem, retry
from hourglass_dist.data.manifest import INDEX_FILE, Manifest, Shard, Split, dtype_of
from hourglass_dist.data.tokenizer import DESCRIPTION_FILE, MODEL_FILE

PART_BYTES = 16 << 20
"""Size of one read request, bytes."""
FETCHERS = 4
"""Number of shards that a rank downloads at a time."""
ABANDONED_S = 3600.0
"""Age after which a download that does not grow counts as abandoned, seconds."""
GONE = -1.0
"""Access time given to shards that are not needed any more."""


# --- one address ---------------------------------------------------------------------------------


class Remote:
    """Folder of an object store or web server."""

    def __init__(self, url: str, settings: CacheConfig) -> None:
        """Open ``url``. Raises ValueError for an unknown scheme or a missing package."""
        self.url = url.rstrip("/")
        self._settings = settings
        if self.url.partition("://")[0] not in EXTRAS:
            raise ValueError(f"{url}: expected a folder, s3://, gs://, http:// or https://")
        self._system, _ = open_filesystem(self.url, settings.timeout_s)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes ``start`` to ``end`` of a file, or all of it.

        Retries until the deadline and raises ValueError, as ``retry`` describes.
        """
        from fsspec.asyn import sync

        address = f"{self.url}/{name}"

        def once() -> bytes:
            data: bytes = sync(
                self._system.loop,
                *(self._system._cat_file, address),
                timeout=self._settings.timeout_s,
                start=start,
                end=end,
            )
            if start is not None and end is not None and len(data) != end - start:
                if len(data) < end:  # a server that ignores ranges sends the whole file
                    raise OSError(f"expected {end - start} bytes, got {len(data)}")
                data = data[start:end]
            return data

        return retry(address, once, self._settings.deadline_s)


# --- the cache -----------------------------------------------------------------------------------


class Cache:
    """Folder of shards named by their hashes, shared by all processes of a machine."""

    def __init__(self, settings: CacheConfig) -> None:
        """Create the folder. Raises OSError when it cannot be made or written."""
        self.folder = Path(settings.dir)
        self._limit = int(settings.max_gb * 1e9)
        (self.folder / "shards").mkdir(parents=True, exist_ok=True)
        (self.folder / "index").mkdir(exist_ok=True)
        self._good: dict[str, tuple[int, ...]] = {}
        self._wanted: dict[str, int] = {}

    def want(self, shards: Sequence[Shard], of: Sequence[Shard]) -> None:
        """Keep ``shards`` of the split ``of``, and give up the room of its other shards first.

        Raises ValueError when they do not fit together with those that the other ranks of this
        machine read side by side.
        """
        names = {shard.sha256: shard.bytes for shard in shards}
        for shard in of:
            if shard.sha256 in names:
                self._wanted[shard.sha256] = shard.bytes
            elif self._wanted.pop(shard.sha256, None):
                self._touch(shard.sha256, GONE)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        needed = min(sum(self._wanted.values()) * ranks, sum(shard.bytes for shard in of))
        if needed > self._limit:
            raise ValueError(
                f"data.cache.max_gb: {ranks} ranks of this machine read {len(self._wanted)} shards "
                f"each side by side: expected at least {needed / 1e9:.3f}, given "
                f"{self._limit / 1e9:.3f}"
            )

    def holds(self, shard: Shard) -> bool:
        """Return whether a file of that name and size exists."""
        try:
            return self._path(shard.sha256).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    def open(self, shard: Shard, download: Callable[[int], None]) -> int:
        """Return a descriptor of a shard's file whose hash is right.

        ``download`` writes a missing shard into a descriptor and refuses a wrong one. Raises what
        it raises, and OSError when the disk is full.
        """
        if (file := self._take(shard)) is not None:
            return file
        lock = self._path(f".{shard.sha256}.lock")
        with file_lock(lock):
            if (file := self._take(shard)) is None:
                self._fill(shard, download)
                file = self._take(shard)
            lock.unlink(missing_ok=True)
        if file is None:
            raise OSError(f"{self._path(shard.sha256)}: removed while it was being read")
        return file

    def _take(self, shard: Shard) -> int | None:
        """Return a descriptor of a file with the right hash, or None; a wrong file is removed."""
        path = self._path(shard.sha256)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        about = os.fstat(file)
        version = (about.st_ino, about.st_size, about.st_mtime_ns)
        if self._good.get(shard.sha256) != version:
            if about.st_size != shard.bytes or sha256_of(path) != shard.sha256:
                os.close(file)
                path.unlink(missing_ok=True)
                return None
            self._good[shard.sha256] = version
        self._touch(shard.sha256, time.time())
        return file

    def _fill(self, shard: Shard, download: Callable[[int], None]) -> None:
        path, part = self._path(shard.sha256), self._path(f".{shard.sha256}.part")
        for attempt in (1, 2):
            with file_lock(self.folder / "lock"):  # so that no other download takes the room
                self._make_room(shard.bytes, at_least=shard.bytes if attempt == 2 else 0)
                file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
                os.truncate(file, shard.bytes)
            try:
                download(file)
                os.fsync(file)
                with file_lock(self.folder / "lock"):  # _make_room counts every file
                    part.rename(path)
                return
            except OSError as error:
                part.unlink(missing_ok=True)
                if error.errno != errno.ENOSPC or attempt == 2:
                    reason = f"cannot write a shard of {shard.bytes} bytes"
                    raise OSError(f"{self.folder}: {reason}: {error}") from None
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            finally:
                os.close(file)

    def _make_room(self, size: int, at_least: int = 0) -> None:
        """Remove files, under the lock, until ``size`` more bytes fit, and at least ``at_least``
        bytes: first those that nobody needs, then the least recently used, never wanted ones."""
        files = []
        for path in (self.folder / "shards").iterdir():
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                abandoned = time.time() - about.st_mtime > ABANDONED_S
                if path.suffix == ".part" and abandoned:
                    path.unlink(missing_ok=True)
                else:
                    files.append((about.st_atime, about.st_size, path))
        over = sum(size for _, size, _ in files) + size - self._limit
        over = max(over, at_least)
        for _, length, path in sorted(files):
            if over > 0 and not path.name.startswith(".") and path.name not in self._wanted:
                path.unlink(missing_ok=True)
                over -= length
        if over > 0 and not at_least:
            raise ValueError(
                f"data.cache.max_gb: no room in {self.folder} for a shard of {size} bytes "
                f"beside those in use; given {self._limit / 1e9:.3f}"
            )

    def _touch(self, name: str, when: float) -> None:
        path = self._path(name)
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(path, ns=(int(when * 1e9), path.stat().st_mtime_ns))

    def _path(self, name: str) -> Path:
        return self.folder / "shards" / name


# --- a dataset -----------------------------------------------------------------------------------


def fetch_index(remote: Remote, cache: Cache) -> Manifest:
    """Download a dataset's manifest and tokenizer into the cache and return the manifest.

    Raises ValueError when they are missing or damaged.
    """
    folder = cache.folder / "index" / hashlib.sha256(remote.url.encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    index = remote.read(INDEX_FILE)
    tokenizer = {DESCRIPTION_FILE: remote.read(DESCRIPTION_FILE)}
    if b"sentencepiece" in tokenizer[DESCRIPTION_FILE]:
        tokenizer[MODEL_FILE] = remote.read(MODEL_FILE)
    with file_lock(folder / "lock"):
        for name, data in (tokenizer | {INDEX_FILE: index}).items():
            replace(folder / name, data)
        try:
            return Manifest.load(folder)
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), remote.url)) from None


class RemoteStore:
    """Shards of a remote dataset, read through the cache."""

    def __init__(self, remote: Remote, manifest: Manifest, cache: Cache) -> None:
        self._remote, self._manifest, self._cache = remote, manifest, cache
        self._ahead: list[Shard] = []
        self._coming: set[str] = set()
        self._wake = threading.Condition()
        self._fetchers = 0

    def check(self, split: Split, part: tuple[int, int], skip: Collection[str]) -> None:
        """Check nothing: every shard is hashed when it is downloaded."""

    def open(self, shard: Shard) -> int:
        """Return a descriptor of a shard, downloaded first if need be."""
        return self._cache.open(shard, lambda file: self._download(shard, file))

    def block(self, shard: Shard, index: int) -> bytes | None:
        """Return the ids of one block of a shard that is still being downloaded, so that a run
        starts early; None otherwise, and when the block does not match its checksum."""
        with self._wake:
            ahead = (other.sha256 for other in self._ahead)
            on_its_way = shard.sha256 in self._coming or shard.sha256 in ahead
        if not on_its_way or self._cache.holds(shard):
            return None
        start = shard.offsets[index]
        size = self._manifest.block_tokens * dtype_of(self._manifest.dtype).itemsize
        data = self._remote.read(shard.path, start, start + size)
        return data if google_crc32c.value(data) == shard.crc32c[index] else None

    def expect(self, shards: Sequence[Shard]) -> None:
        """Download these shards in this order, by threads, and keep them in the cache.

        Raises ValueError when the cache is too small for them.
        """
        self._cache.want(shards, self._manifest.shards)
        with self._wake:
            self._ahead = [shard for shard in shards if not self._cache.holds(shard)]
            self._wake.notify_all()
            for _ in range(min(FETCHERS, len(self._ahead)) - self._fetchers):
                self._fetchers += 1
                threading.Thread(target=self._fetch, name="hourglass-fetch", daemon=True).start()

    def _fetch(self) -> None:
        """Download the shards ahead; the reader that needs a shard raises its errors."""
        while True:
            with self._wake:
                if not self._ahead:
                    self._fetchers -= 1
                    return
                shard = self._ahead.pop(0)
                self._coming.add(shard.sha256)
            with contextlib.suppress(ValueError, OSError):
                os.close(self.open(shard))
            with self._wake:
                self._coming.discard(shard.sha256)

    def _download(self, shard: Shard, file: int) -> None:
        """Write a shard into a file. Raises ValueError when its hash is wrong twice."""
        found = ""
        for _ in range(2):  # it may have been replaced while it was read
            digest = hashlib.sha256()
            for start in range(0, shard.bytes, PART_BYTES):
                data = self._remote.read(shard.path, start, min(start + PART_BYTES, shard.bytes))
                digest.update(data)
                view = memoryview(data)
                while view:
                    written = os.pwrite(file, view, start)
                    view, start = view[written:], start + written
            found = digest.hexdigest()
            if found == shard.sha256:
                return
        raise ValueError(
            f"{self._remote.url}/{shard.path}: altered shard: expected sha256 "
            f"{shard.sha256[:12]}, found {found[:12]}"
        )
