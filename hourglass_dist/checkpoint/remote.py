"""Copies of checkpoints in an object store (or any other file system of fsspec).

    s3://bucket/runs/NAME/step_00000500/rank_00000.safetensors ... manifest.json, which comes last
                          /latest                                  the name of the newest one

Every rank copies its own file. As in the run folder, a checkpoint without a manifest is incomplete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from hourglass_dist.core.remote import open_filesystem, retry

T = TypeVar("T")

TIMEOUT_S, DEADLINE_S = 60.0, 300.0
"""Time limits, seconds: of one request, and of one file with all its retries."""


class RemoteCopies:
    """Remote copies of one run's checkpoints. All methods raise ValueError, naming the address,
    when they do not succeed before a deadline."""

    def __init__(self, url: str) -> None:
        """Open the address. Raises ValueError if it is invalid or its package is not installed."""
        self.url = url.rstrip("/")
        try:
            self._system, self._root = open_filesystem(self.url, TIMEOUT_S)
        except ValueError as error:
            raise ValueError(f"checkpoint.remote: {error}") from None

    def put(self, name: str, file: IO[bytes]) -> None:
        """Write the content of the open ``file`` to the remote file ``name``."""

        def write() -> None:
            path = f"{self._root}/{name}"
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            file.seek(0)
            with self._system.open(path, "wb") as out:
                shutil.copyfileobj(file, out, 1 << 22)

        self._retry(name, write)

    def finish(self, folder: Path, kept: Sequence[str]) -> None:
        """Write manifest and ``latest`` of a checkpoint, and remove those not in ``kept``."""
        with (folder / "manifest.json").open("rb") as file:
            self.put(f"{folder.name}/manifest.json", file)
        latest = folder.name.encode() + b"\n"
        self._retry("latest", lambda: self._system.pipe_file(f"{self._root}/latest", latest))
        for path in self._retry("", lambda: self._system.ls(self._root, detail=False)):
            name = path.rstrip("/").rpartition("/")[2]
            if name.startswith("step_") and name not in kept:
                self._system.rm(path, recursive=True)

    def latest(self) -> str | None:
        """Return the name of the newest remote checkpoint; None when there is none."""

        def read() -> str | None:
            try:
                return str(self._system.cat_file(f"{self._root}/latest").decode().strip()) or None
            except FileNotFoundError:
                return None

        return self._retry("latest", read)

    def files(self, name: str) -> list[str]:
        """Return the file names of a checkpoint, the manifest last."""
        path = f"{name}/manifest.json"
        text = self._retry(path, lambda: self._system.cat_file(f"{self._root}/{path}"))
        manifest: dict[str, Any] = json.loads(text)
        return [*sorted(manifest["files"]), "manifest.json"]

    def get(self, name: str, target: Path) -> None:
        """Copy the remote file ``name`` to the local file ``target``."""
        self._retry(name, lambda: self._system.get_file(f"{self._root}/{name}", str(target)))

    def _retry(self, name: str, action: Callable[[], T]) -> T:
        return retry(f"{self.url}/{name}", action, DEADLINE_S)
