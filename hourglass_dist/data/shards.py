"""Rows of shards, read by position without scanning or decoding the tar."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hourglass_dist.data.manifest import Manifest, Shard, Split, dtype_of

IGNORED = -100
"""Target of positions that the loss ignores (padding)."""

Int64s = npt.NDArray[np.int64]
Ids = npt.NDArray[Any]
"""Token ids in the type of the shards."""


class Store(Protocol):
    """Access to the shards of a dataset."""

    def check(self, split: Split, part: tuple[int, int], skip: Collection[str]) -> None:
        """Raise ValueError, as ``Manifest.verify`` does, when a shard is known to be wrong."""

    def open(self, shard: Shard) -> int:
        """Return a descriptor of a whole file, to be closed. Raises ValueError or OSError."""

    def block(self, shard: Shard, index: int) -> bytes | None:
        """Return the ids of one block of a file that is still being downloaded; None when it can be
        opened or must be waited for. Raises ValueError or OSError."""

    def expect(self, shards: Sequence[Shard]) -> None:
        """Download these shards, the only ones read from now on, and give up the room of others
        first."""


class LocalStore:
    """Shards in a local folder; a missing one is an error."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def check(self, split: Split, part: tuple[int, int], skip: Collection[str]) -> None:
        """Verify this part of the split's shards (sha256)."""
        self._manifest.verify(split, part=part, skip=skip)

    def open(self, shard: Shard) -> int:
        """Return a descriptor of the file. Raises ValueError when it is missing."""
        path = self._manifest.folder / shard.path
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing shard: expected {shard.bytes} bytes") from None

    def block(self, shard: Shard, index: int) -> None:
        """Return None: every file is complete."""

    def expect(self, shards: Sequence[Shard]) -> None:
        """Do nothing, as local shards need no download."""


class ShardReader:
    """Rows of a split by (shard, row), from at most ``max_open`` open files. Close it after use.

    Rows are read and not memory-mapped. A mapped file that is cut, or whose disk fails, kills the
    process without a message; a read raises an error that names the file.

    B: rows, L: tokens in a row, M = L + 1.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: Split,
        seq_len: int,
        max_open: int = 512,
        store: Store | None = None,
        skip: Collection[str] = (),
    ) -> None:
        """Open a split; rows of the shards in ``skip`` have no targets and are not read.

        Raises ValueError when ``seq_len`` does not divide a block.
        """
        self.rows_per_shard = manifest.rows(split, seq_len)
        self.eos_id = manifest.eos_id
        self.seq_len = seq_len
        self.dtype = dtype_of(manifest.dtype)
        self._manifest = manifest
        self._store = store or LocalStore(manifest)
        self._shards: Sequence[Shard] = manifest.split(split)
        self._blank = np.array([shard.path in skip for shard in self._shards])
        self._tokens = np.array([shard.tokens for shard in self._shards])
        blocks = np.array([shard.blocks for shard in self._shards])
        self._first_block = np.cumsum(blocks) - blocks
        self._offsets = np.concatenate([shard.offsets for shard in self._shards])
        self._open: dict[int, int] = {}
        self._early: dict[int, dict[int, bytes]] = {}  # blocks of shards being downloaded
        self._max_open = max_open

    def fill(self, ids_BM: Ids, places: Int64s, shards: Int64s, rows: Int64s) -> Int64s:
        """Read rows into ``ids_BM[places]`` and return the number of targets of each without
        padding.

        A row begins with the id before its first target; in a block's first row that is eos.
        ``ids_BM`` is contiguous, of this reader's type. Raises ValueError or OSError, naming the
        shard, when a file is missing, ends early or cannot be read.
        """
        length, size = self.seq_len, self.dtype.itemsize
        width = (length + 1) * size
        assert ids_BM.shape[1] * ids_BM.itemsize == width
        blocks, starts = np.divmod(rows * length, self._manifest.block_tokens)
        offsets = self._offsets[self._first_block[shards] + blocks] + (starts - 1) * size
        blank = self._blank[shards]
        ids_BM[places[blank]] = self.eos_id
        ids_BM[places[starts == 0], 0] = self.eos_id
        memory = memoryview(ids_BM.reshape(-1).data).cast("B")
        columns = (shards, blocks, places * width, offsets, np.where(starts == 0, size, 0))
        wanted = ~blank
        for shard, block, place, offset, left_out in zip(
            *(column[wanted].tolist() for column in columns), strict=True
        ):
            part = memory[place + left_out : place + width]
            if shard not in self._open and (early := self._block(shard, block)) is not None:
                begin = offset + left_out - self._shards[shard].offsets[block]
                part[:] = early[begin : begin + len(part)]
                continue
            file = self._open[shard] if shard in self._open else self._file(shard)
            if os.preadv(file, [part], offset + left_out) != len(part):
                self._complain(shard, offset)
        real: Int64s = np.clip(self._tokens[shards] - rows * length, 0, length)
        return np.where(blank, 0, real)

    def row(self, shard: int, row: int) -> tuple[Int64s, Int64s]:
        """Return ``(inputs_L, targets_L)`` of a row, as ``fill`` and ``split_rows`` make them."""
        ids_BM = np.empty((1, self.seq_len + 1), self.dtype)
        one = np.zeros(1, np.int64)
        real_B = self.fill(ids_BM, one, one + shard, one + row)
        inputs_BL, targets_BL = np.empty((2, 1, self.seq_len), np.int64)
        split_rows(ids_BM, real_B, inputs_BL, targets_BL)
        return inputs_BL[0], targets_BL[0]

    def close(self) -> None:
        """Close all open shards."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _block(self, shard: int, block: int) -> bytes | None:
        """Return a block of a shard that is still being downloaded, else None."""
        if (known := self._early.get(shard, {}).get(block)) is not None:
            return known
        found = self._store.block(self._shards[shard], block)
        if found is not None:
            self._early.setdefault(shard, {})[block] = found
        return found

    def _file(self, shard: int) -> int:
        self._early.pop(shard, None)
        if len(self._open) == self._max_open:
            os.close(self._open.pop(next(iter(self._open))))  # the first one opened
        self._open[shard] = self._store.open(self._shards[shard])
        return self._open[shard]

    def _complain(self, shard: int, offset: int) -> None:
        entry, found = self._shards[shard], os.fstat(self._open[shard]).st_size
        path = self._manifest.folder / entry.path
        raise ValueError(
            f"{path}: truncated shard: expected {entry.bytes} bytes, found {found}, reading at "
            f"{offset}"
        )


def split_rows(ids_BM: Ids, real_B: Int64s, inputs_BL: Int64s, targets_BL: Int64s) -> None:
    """Split rows read by ``fill`` into inputs and targets: each target with the token before it.

    Targets of a row after its first ``real_B`` are -100.
    """
    inputs_BL[:], targets_BL[:] = ids_BM[:, :-1], ids_BM[:, 1:]
    for i in np.flatnonzero(real_B < targets_BL.shape[1]):
        targets_BL[i, real_B[i] :] = IGNORED
