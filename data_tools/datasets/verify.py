"""Full check of a dataset: manifest, tokenizer, files, and every block.

Training checks sizes and hashes, which is enough for a dataset that was right when made. This also
checks that every block follows the format, and that the blocks sum up to the manifest's counts.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from data_tools.datasets.blocks import Sample, read_samples
from data_tools.datasets.document_tables import (
    check_tables,
    content_hashes,
    counted_hashes,
    read_table,
)
from data_tools.live_line import Show, silent
from hourglass_dist.data.manifest import Manifest, Shard, check_sha256
from hourglass_dist.data.tokenizer import Tokenizer, load_tokenizer, require_same
from hourglass_dist.data.write import text_bytes


def verify(folder: Path, show: Show = silent) -> Manifest:
    """Check a whole dataset and return its manifest.

    Raises ValueError for the first mistake, with file, expected and actual value.
    """
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(folder)
    require_same(manifest.tokenizer, tokenizer.fingerprint, "the shards", f"{folder}'s tokenizer")
    if manifest.eos_id != tokenizer.eos_id:
        raise ValueError(
            f"{folder}: end-of-text id: expected {tokenizer.eos_id}, found {manifest.eos_id}"
        )
    manifest.verify(full=False)
    check_tables(manifest)
    begun, size = time.monotonic(), 0
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing releases the GIL
        checks = [pool.submit(_check_shard, manifest, s, tokenizer) for s in manifest.shards]
        try:
            for number, (shard, check) in enumerate(zip(manifest.shards, checks, strict=True), 1):
                check.result()
                size += shard.bytes
                speed = size / 1e6 / max(time.monotonic() - begun, 1e-3)
                show(
                    f"{number:,} of {len(checks):,} shards, {size / 1e6:,.0f} MB, {speed:,.0f} MB/s"
                )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if manifest.documents_sha256:
        _check_documents(manifest, show)
    return manifest


def _check_documents(manifest: Manifest, show: Show) -> None:
    """Raise ValueError when the content of a document does not match the tables."""
    for split in dict.fromkeys(shard.split for shard in manifest.shards):
        counted = counted_hashes(manifest, split)
        for number, expected in enumerate(content_hashes(manifest, split)):
            if (content := next(counted)) != expected:
                where = f"{manifest.folder}: {split} document {number}"
                raise ValueError(f"{where}: content hash: expected {expected}, found {content}")
            if number % 1000 == 0:
                show(f"{number:,} documents of {split}")


def _check_shard(manifest: Manifest, shard: Shard, tokenizer: Tokenizer) -> None:
    path = manifest.folder / shard.path
    check_sha256(path, shard)
    ends: list[npt.NDArray[np.int64]] = []
    offsets: list[int] = []
    sums: list[int] = []
    tokens, documents, size = 0, 0, 0
    last = shard == manifest.split(shard.split)[-1]
    for sample in read_samples(path, manifest.dtype):
        where = f"{path}: {sample.key}"
        may_be_padded = last and len(offsets) == shard.blocks - 1
        size += _check_block(sample, where, manifest, tokenizer, may_be_padded)
        ends.append(sample.ends.astype(np.int64) + len(offsets) * manifest.block_tokens)
        offsets.append(sample.offset)
        sums.append(google_crc32c.value(sample.members[f"tokens.{manifest.dtype}"]))
        tokens += sample.tokens
        documents += len(sample.ends)
    sums_found = {"tokens": tokens, "documents": documents, "text_bytes": size}
    for name, value in sums_found.items():
        _require(value == getattr(shard, name), str(path), name, getattr(shard, name), value)
    if manifest.documents_sha256:
        table = manifest.folder / shard.table
        expected, found = read_table(table, shard)[:, 0].astype(np.int64), np.concatenate(ends)
        same = np.array_equal(expected, found)
        _require(same, str(table), "document ends", expected[:5], found[:5])
    _require(tuple(offsets) == shard.offsets, str(path), "offsets", shard.offsets, offsets)
    _require(tuple(sums) == shard.crc32c, str(path), "crc32c of blocks", shard.crc32c, sums)


def _check_block(
    sample: Sample,
    where: str,
    manifest: Manifest,
    tokenizer: Tokenizer,
    may_be_padded: bool,
) -> int:
    """Return a block's bytes of text. Raises ValueError when it is not what the format promises."""
    for name, expected in sample.crc32c.items():
        found = f"{google_crc32c.value(sample.members[name]):08x}"
        _require(found == expected, where, f"crc32c of {name}", expected, found)
    size, real = manifest.block_tokens, sample.tokens
    tokens_T, ends = sample.tokens_T, sample.ends.astype(np.int64)
    full = 0 < real <= size if may_be_padded else real == size
    _require(len(tokens_T) == size, where, "tokens", size, len(tokens_T))
    _require(full, where, "tokens without padding", size, real)
    largest = int(tokens_T.max())
    _require(
        largest < tokenizer.vocab_size,
        where,
        "largest id",
        f"below {tokenizer.vocab_size}",
        largest,
    )
    padding = tokens_T[real:]
    _require(bool((padding == manifest.eos_id).all()), where, "padding", manifest.eos_id, padding)
    eos_ends = np.flatnonzero(tokens_T[:real] == manifest.eos_id) + 1
    _require(np.array_equal(ends, eos_ends), where, "document ends", eos_ends[:5], ends[:5])
    return text_bytes(tokens_T[:real], tokenizer)


def _require(right: bool, where: str, what: str, expected: object, found: object) -> None:
    if not right:
        raise ValueError(f"{where}: {what}: expected {expected}, found {found}")
