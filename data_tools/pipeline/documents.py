"""Kept documents on disk: written by the tasks of the read step, used by later steps.

text.bin        UTF-8 of all n documents, end to end
starts.npy      (n + 1): byte offset of each document, and the end of the last
origins.npy     (n, 3): number of the input file within the source, position in the file, number of
                the record within the task
digests.npy     (n, 2): 128-bit hash of the text before masking
bands.npy       (bands, n): MinHash band hashes, which near duplicates share
has_bands.npy   (n): whether the document has band hashes
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class DocumentWriter:
    """A writer of the documents of one task."""

    def __init__(self, folder: Path, bands: int) -> None:
        self._folder, self._band_count = folder, bands
        self._file = (folder / "text.bin").open("wb", buffering=1 << 20)
        self._lengths: list[int] = []
        self._origins: list[tuple[int, int, int]] = []
        self._digests: list[bytes] = []
        self._bands: list[npt.NDArray[np.uint64] | None] = []

    def add(
        self,
        origin: tuple[int, int, int],
        text: bytes,
        digest: bytes,
        bands: npt.NDArray[np.uint64] | None,
    ) -> None:
        """Append a document."""
        self._file.write(text)
        self._lengths.append(len(text))
        self._origins.append(origin)
        self._digests.append(digest)
        if self._band_count:
            self._bands.append(bands)

    def close(self) -> None:
        """Close text.bin and write the arrays."""
        self._file.close()
        count = len(self._lengths)
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(self._lengths, out=starts[1:])
        self._save("starts", starts)
        self._save("origins", np.array(self._origins, np.int64).reshape(count, 3))
        digests = np.frombuffer(b"".join(self._digests), "<u8").reshape(count, 2)
        self._save("digests", digests)
        if self._band_count:
            blank = np.zeros(self._band_count, np.uint64)
            rows = [blank if bands is None else bands for bands in self._bands]
            table = np.array(rows, np.uint64).reshape(count, self._band_count)
            self._save("bands", np.ascontiguousarray(table.T))
            self._save("has_bands", np.array([bands is not None for bands in self._bands], bool))

    def _save(self, name: str, array: Array) -> None:
        np.save(self._folder / f"{name}.npy", array)


class Documents:
    """A reader of the documents of one task."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def starts(self) -> Array:
        """(n + 1) byte offsets: the start of each document, and the end of the last."""
        return self._load("starts")

    @cached_property
    def origins(self) -> Array:
        """(n, 3): file number, position in the file, record number."""
        return self._load("origins")

    @property
    def digests(self) -> Array:
        """(n, 2): the halves of 128-bit hashes."""
        return self._load("digests")

    def band(self, band: int) -> tuple[Array, Array]:
        """Return the rows and the hashes of one band of the documents that have them."""
        bands = np.load(self._folder / "bands.npy", mmap_mode="r")[band]
        rows = np.flatnonzero(self._load("has_bands"))
        return rows, np.asarray(bands)[rows]

    def texts(self, rows: Array) -> Iterator[str]:
        """Yield the texts of the documents in ``rows``."""
        return (str(data, "utf-8") for data in self.contents(rows))

    def contents(self, rows: Array) -> Iterator[bytes]:
        """Yield the UTF-8 of the documents in ``rows``."""
        starts = self.starts
        if not len(rows) or not starts[-1]:
            return
        with (self._folder / "text.bin").open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            begins, ends = starts[rows].tolist(), starts[rows + 1].tolist()
            for begin, end in zip(begins, ends, strict=True):
                yield content[begin:end]
            content.close()

    def _load(self, name: str) -> Array:
        array: Array = np.load(self._folder / f"{name}.npy")
        return array
