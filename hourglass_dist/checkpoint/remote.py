"""Copies of checkpoints in an object store (or any place that fsspec writes to).

    s3://bucket/runs/NAME/step_00000500/rank_00000.safetensors ... manifest.json, which comes last
                          /latest                                  the name of the newest one

Every rank copies its own file. As in the run folder, a checkpoint without a manifest is none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from hourglass_dist.data.remote import EXTRAS


class RemoteCopies:
    """A place elsewhere for the checkpoints of one run."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for an address whose package is not installed, or that cannot be."""
        self.url = url.rstrip("/")
        scheme = self.url.partition("://")[0]
        package, extra = EXTRAS.get(scheme, ("fsspec", "s3"))
        try:
            from fsspec.core import url_to_fs

            self._system, self._root = url_to_fs(self.url)
        except ImportError:
            raise ValueError(
                f"{self.url}: needs the package {package}: pip install 'hourglass_dist[{extra}]'"
            ) from None
        except ValueError as error:
            raise ValueError(f"checkpoint.remote: {self.url}: {error}") from None

    def put(self, name: str, file: IO[bytes]) -> None:
        """Write ``name`` from an open file. Raises OSError."""
        path = f"{self._root}/{name}"
        self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self._system.open(path, "wb") as out:
            shutil.copyfileobj(file, out, 1 << 22)

    def finish(self, folder: Path, kept: Sequence[str]) -> None:
        """The rest of a checkpoint whose other files are there; then forget those not ``kept``."""
        with (folder / "manifest.json").open("rb") as file:
            self.put(f"{folder.name}/manifest.json", file)
        with self._system.open(f"{self._root}/latest", "wb") as out:
            out.write(folder.name.encode() + b"\n")
        for path in self._system.ls(self._root, detail=False):
            name = path.rstrip("/").rpartition("/")[2]
            if name.startswith("step_") and name not in kept:
                self._system.rm(path, recursive=True)

    def latest(self) -> str | None:
        """The name of the newest checkpoint there. Raises OSError when the place is not reached."""
        self._system.invalidate_cache()
        try:
            name = self._system.cat_file(f"{self._root}/latest").decode().strip()
        except FileNotFoundError:
            return None
        return name or None

    def files(self, name: str) -> list[str]:
        """The files of a checkpoint, the manifest last."""
        manifest: dict[str, Any] = json.loads(
            self._system.cat_file(f"{self._root}/{name}/manifest.json")
        )
        return [*sorted(manifest["files"]), "manifest.json"]

    def get(self, name: str, target: Path) -> None:
        """Read ``name`` into a file. Raises OSError."""
        self._system.get_file(f"{self._root}/{name}", str(target))
