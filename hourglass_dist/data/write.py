"""Writing of shards: tokens -> blocks of T tokens -> WebDataset tars, each complete or absent.

    require_ids    refuses unknown ids, and an end-of-text id inside a document
    cut_blocks     cuts the tokens of a shard, an eos after every document, into blocks
    write_shard    writes blocks into a tar: temporary name, fsync, rename

The same documents give the same bytes. Memory holds the blocks of one shard.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import numpy.typing as npt

from hourglass_dist.core.files import sync
from hourglass_dist.data.manifest import Shard, Split, dtype_name
from hourglass_dist.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Block:
    """Block of T tokens with its documents."""

    tokens_T: npt.NDArray[Any]
    ends: npt.NDArray[np.uint32]
    """Positions in the block after the eos of every document that ends there."""
    first_document: int
    """Number, within the split, of the document of the first token."""
    tokens: int
    """Number of tokens without padding."""


def require_ids(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> None:
    """Raise ValueError naming the first id that no document may have: an unknown id (it might not
    fit the type of the shard), or the end-of-text id."""
    ends = ids == tokenizer.eos_id
    if ids.max(initial=0) < tokenizer.vocab_size and not ends.any():
        return
    unknown = ids >= tokenizer.vocab_size
    at = int((unknown | ends).argmax())
    expected = f"expected 0 to {tokenizer.vocab_size - 1}"
    what = expected if unknown[at] else "the end-of-text id inside a document"
    raise ValueError(f"token {at}: id {int(ids[at])}: {what}")


def cut_blocks(
    tokens: npt.NDArray[Any],
    ends: npt.NDArray[np.int64],
    first_document: int,
    block_tokens: int,
    eos_id: int,
) -> list[Block]:
    """Return the blocks of a shard; a last block that ``tokens`` do not fill is padded with eos.

    ``ends`` are the positions after every eos; ``first_document`` is the number of the document
    that ``tokens`` begin with.
    """
    blocks = []
    for begin in range(0, len(tokens), block_tokens):
        tokens_T = tokens[begin : begin + block_tokens]
        real = len(tokens_T)
        if real < block_tokens:
            padding = np.full(block_tokens - real, eos_id, tokens.dtype)
            tokens_T = np.concatenate([tokens_T, padding])
        low, high = np.searchsorted(ends, (begin, begin + real), side="right")
        inside = (ends[low:high] - begin).astype("<u4")
        blocks.append(Block(tokens_T, inside, first_document + int(low), real))
    return blocks


def write_shard(
    folder: Path,
    number: int,
    split: Split,
    blocks: Sequence[Block],
    source: str,
    tokenizer: Tokenizer,
) -> Shard:
    """Write ``SPLIT-NUMBER.tar`` into a folder and return its manifest entry.

    ``source`` is stored in every sample.
    """
    path = folder / f"{split}-{number:06d}.tar"
    unfinished = path.with_name(f".{path.name}.unfinished")
    dtype = dtype_name(tokenizer.vocab_size)
    samples = [
        _sample(f"{path.stem}-{i:06d}", block, source, dtype) for i, block in enumerate(blocks)
    ]
    with unfinished.open("wb", buffering=1 << 20) as file:
        sha256 = _write_tar(file, samples)
    sync(unfinished)
    with tarfile.open(unfinished) as tar:  # read back the real offsets of the members
        offsets = tuple(m.offset_data for m in tar if f".tokens.{dtype}" in m.name)
    shard = Shard(
        path=path.name,
        split=split,
        bytes=unfinished.stat().st_size,
        sha256=sha256,
        tokens=sum(block.tokens for block in blocks),
        documents=sum(len(block.ends) for block in blocks),
        text_bytes=sum(text_bytes(block.tokens_T[: block.tokens], tokenizer) for block in blocks),
        offsets=offsets,
        crc32c=tuple(google_crc32c.value(sample[f"tokens.{dtype}"]) for sample in samples),
    )
    unfinished.rename(path)
    sync(folder)
    return shard


def text_bytes(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> int:
    """Return the number of UTF-8 bytes of text that ids stand for."""
    lengths_V = tokenizer.byte_lengths()
    if tokenizer.name == "bytes":
        return len(ids) - int(np.count_nonzero(ids == tokenizer.eos_id))
    return int(np.bincount(ids, minlength=len(lengths_V)) @ lengths_V)


class _Hashing:
    """Writable file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def _write_tar(file: BinaryIO, samples: Sequence[dict[str, Any]]) -> str:
    """Write samples as WebDataset does and return the sha256 (hex) of the file."""
    import webdataset  # here, as it imports torch, which takes a second

    hashing = _Hashing(file)
    with webdataset.TarWriter(hashing, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
    return hashing.sha256.hexdigest()


def _sample(key: str, block: Block, source: str, dtype: str) -> dict[str, Any]:
    members = {f"tokens.{dtype}": block.tokens_T.tobytes(), "ends.u32": block.ends.tobytes()}
    about = {
        "source": source,
        "first_document": block.first_document,
        "documents": len(block.ends),
        "tokens": block.tokens,
        "crc32c": {name: f"{google_crc32c.value(data):08x}" for name, data in members.items()},
    }
    return {"__key__": key, **members, "json": json.dumps(about).encode()}
