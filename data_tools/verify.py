"""Checking a dataset from the outside in: manifest, tokenizer, files, and every block.

Training checks sizes and hashes, which is enough once a dataset was right. This also checks that it
was: that every block is what the format promises and adds up to what the manifest says.
"""

from __future__ import annotations

from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from data_tools.blocks import Sample, read_samples
from data_tools.workspace import Show, silent
from hourglass_dist.data.shards import Manifest, Shard
from hourglass_dist.data.tokenizer import Tokenizer, load_tokenizer, require_same


def verify(folder: Path, show: Show = silent) -> Manifest:
    """Check everything.

    Raises ValueError for the first thing that is wrong: the file, the expected, the found.
    """
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(folder)
    require_same(manifest.tokenizer, tokenizer.fingerprint, "the shards", f"{folder}'s tokenizer")
    if manifest.eos_id != tokenizer.eos_id:
        raise ValueError(
            f"{folder}: end-of-text id: expected {tokenizer.eos_id}, found {manifest.eos_id}"
        )
    manifest.verify()
    for shard in manifest.shards:
        show(shard.path)
        _check_shard(manifest, shard, tokenizer)
    return manifest


def _check_shard(manifest: Manifest, shard: Shard, tokenizer: Tokenizer) -> None:
    path = manifest.folder / shard.path
    lengths_V = tokenizer.byte_lengths()
    offsets: list[int] = []
    tokens, documents, text_bytes = 0, 0, 0
    last = shard == manifest.split(shard.split)[-1]
    for sample in read_samples(path, manifest.dtype):
        where = f"{path}: {sample.key}"
        may_be_padded = last and len(offsets) == shard.blocks - 1
        text_bytes += _check_block(sample, where, manifest, lengths_V, may_be_padded)
        offsets.append(sample.offset)
        tokens += sample.tokens
        documents += len(sample.ends)
    found = {"tokens": tokens, "documents": documents, "text_bytes": text_bytes}
    for name, value in found.items():
        _require(value == getattr(shard, name), str(path), name, getattr(shard, name), value)
    _require(tuple(offsets) == shard.offsets, str(path), "offsets", shard.offsets, offsets)


def _check_block(
    sample: Sample,
    where: str,
    manifest: Manifest,
    lengths_V: npt.NDArray[np.int64],
    may_be_padded: bool,
) -> int:
    """Raise ValueError when a block is not what the format promises; returns its bytes of text."""
    for name, expected in sample.crc32c.items():
        found = f"{google_crc32c.value(sample.members[name]):08x}"
        _require(found == expected, where, f"crc32c of {name}", expected, found)
    size, real = manifest.block_tokens, sample.tokens
    tokens_T, ends = sample.tokens_T, sample.ends.astype(np.int64)
    full = 0 < real <= size if may_be_padded else real == size
    _require(len(tokens_T) == size, where, "tokens", size, len(tokens_T))
    _require(full, where, "tokens without padding", size, real)
    largest = int(tokens_T.max())
    _require(largest < len(lengths_V), where, "largest id", f"below {len(lengths_V)}", largest)
    padding = tokens_T[real:]
    _require(bool((padding == manifest.eos_id).all()), where, "padding", manifest.eos_id, padding)
    eos_ends = np.flatnonzero(tokens_T[:real] == manifest.eos_id) + 1
    _require(np.array_equal(ends, eos_ends), where, "document ends", eos_ends[:5], ends[:5])
    return int(lengths_V[tokens_T[:real]].sum())


def _require(right: bool, where: str, what: str, expected: object, found: object) -> None:
    if not right:
        raise ValueError(f"{where}: {what}: expected {expected}, found {found}")
