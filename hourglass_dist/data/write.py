"""Writing shards: documents -> blocks of T tokens -> WebDataset tars, each whole or not there.

    Packer         document ids, each followed by eos, laid end to end and cut into blocks
    ShardWriter    blocks into tars of ``shard_blocks`` blocks: temporary name, fsync, rename

The same documents give the same bytes. Memory holds the blocks of one shard.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from hourglass_dist.data.shards import (
    DTypeName,
    Shard,
    Split,
    dtype_name,
    dtype_of,
)
from hourglass_dist.data.tokenizer import Tokenizer
from hourglass_dist.files import sha256_of, sync


@dataclass(frozen=True)
class Block:
    """T tokens and what they are."""

    tokens_T: npt.NDArray[Any]
    ends: npt.NDArray[np.uint32]
    """The position after the eos of every document that ends here."""
    first_document: int
    """The number, within the split, of the document that the first token is of."""
    tokens: int
    """How many of the T tokens are no padding."""


class Packer:
    """Lays documents end to end and cuts blocks; the last one is padded with eos."""

    def __init__(self, block_tokens: int, eos_id: int, dtype: DTypeName) -> None:
        self._eos_id = eos_id
        self._tokens_T = np.full(block_tokens, eos_id, dtype_of(dtype))
        self._filled = 0
        self._ends: list[int] = []
        self._documents = 0  # that have ended so far
        self._first_document = 0

    def pack(self, documents: Iterable[npt.NDArray[Any]]) -> Iterator[Block]:
        """The blocks of documents (their ids, without eos)."""
        for ids in documents:
            yield from self._add(ids)
        if self._filled:
            yield self._cut()

    def _add(self, ids: npt.NDArray[Any]) -> Iterator[Block]:
        size = len(self._tokens_T)
        rest = np.append(ids.astype(self._tokens_T.dtype), self._tokens_T.dtype.type(self._eos_id))
        while len(rest):
            taken = rest[: size - self._filled]
            self._tokens_T[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rest = rest[len(taken) :]
            if not len(rest):
                self._ends.append(self._filled)
                self._documents += 1
            if self._filled == size:
                yield self._cut()

    def _cut(self) -> Block:
        ends = np.array(self._ends, dtype="<u4")
        block = Block(self._tokens_T, ends, self._first_document, self._filled)
        self._tokens_T = np.full_like(self._tokens_T, self._eos_id)
        self._filled, self._ends, self._first_document = 0, [], self._documents
        return block


class ShardWriter:
    """Writes the blocks of one split as ``SPLIT-000000.tar`` ... into a folder."""

    def __init__(
        self,
        folder: Path,
        split: Split,
        source: str,
        shard_blocks: int,
        tokenizer: Tokenizer,
    ) -> None:
        """``source`` stands in every sample, ``shard_blocks`` is how many make a shard."""
        self._folder, self._split, self._source = folder, split, source
        self._dtype = dtype_name(tokenizer.vocab_size)
        self._shard_blocks = shard_blocks
        self._byte_lengths_V = tokenizer.byte_lengths()
        self._blocks: list[Block] = []
        self._written = 0

    def add(self, block: Block) -> Iterator[Shard]:
        """Append a block; yields the manifest entry of the shard that it completes."""
        self._blocks.append(block)
        if len(self._blocks) == self._shard_blocks:
            yield self._write()

    def finish(self) -> Iterator[Shard]:
        """Write the blocks that are left; yields the entry of their shard."""
        if self._blocks:
            yield self._write()

    def _write(self) -> Shard:
        import webdataset  # it imports torch, a second that other data commands need not wait

        path = self._folder / f"{self._split}-{self._written:06d}.tar"
        unfinished = path.with_name(f".{path.name}.unfinished")
        with (
            unfinished.open("wb") as file,
            webdataset.TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for i, block in enumerate(self._blocks):
                tar.write(self._sample(f"{path.stem}-{i:06d}", block))
        sync(unfinished)
        shard = self._entry(unfinished, path.name)
        unfinished.rename(path)
        sync(self._folder)
        self._blocks = []
        self._written += 1
        return shard

    def _sample(self, key: str, block: Block) -> dict[str, Any]:
        members = {
            f"tokens.{self._dtype}": block.tokens_T.tobytes(),
            "ends.u32": block.ends.tobytes(),
        }
        about = {
            "source": self._source,
            "first_document": block.first_document,
            "documents": len(block.ends),
            "tokens": block.tokens,
            "crc32c": {name: f"{google_crc32c.value(data):08x}" for name, data in members.items()},
        }
        return {"__key__": key, **members, "json": json.dumps(about).encode()}

    def _entry(self, written: Path, name: str) -> Shard:
        with tarfile.open(written) as tar:  # read back: where the members really are
            offsets = tuple(m.offset_data for m in tar if f".tokens.{self._dtype}" in m.name)
        text_bytes = sum(
            int(self._byte_lengths_V[block.tokens_T[: block.tokens]].sum())
            for block in self._blocks
        )
        return Shard(
            path=name,
            split=self._split,
            bytes=written.stat().st_size,
            sha256=sha256_of(written),
            tokens=sum(block.tokens for block in self._blocks),
            documents=sum(len(block.ends) for block in self._blocks),
            text_bytes=text_bytes,
            offsets=offsets,
        )
