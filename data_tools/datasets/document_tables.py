"""Table of documents beside every shard: the end of each, and a hash of its content.

    SHARD.documents.u64    little-endian pairs (end, hash), one for each document that ends there

``end`` is the position after its eos among the tokens of the shard; ``hash`` is xxh3_64 of its
UTF-8, so that the same text has the same hash under every tokenizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from data_tools.datasets.inspect import document_ids
from hourglass_dist.core.files import sha256_of, sync
from hourglass_dist.data.manifest import Manifest, Shard, Split
from hourglass_dist.data.tokenizer import load_tokenizer

UInt64s = npt.NDArray[np.uint64]


def content_hash(text: bytes) -> int:
    """Return the content hash (xxh3_64) of a document given as UTF-8."""
    return xxhash.xxh3_64_intdigest(text)


def write_table(path: Path, ends: npt.NDArray[np.int64], hashes: UInt64s) -> None:
    """Write the table of a shard and flush it to disk."""
    np.stack([ends.astype("<u8"), hashes.astype("<u8")], axis=1).tofile(path)
    sync(path)


def read_table(path: Path, shard: Shard) -> UInt64s:
    """Return (end, hash) of all documents, (n, 2). Raises ValueError for a missing or cut table."""
    expected = shard.documents * 16
    size = path.stat().st_size if path.exists() else None
    if size != expected:
        raise ValueError(f"{path}: table of documents: expected {expected} bytes, found {size}")
    return np.fromfile(path, "<u8").reshape(-1, 2)


def check_tables(manifest: Manifest) -> None:
    """Raise ValueError when a table of documents is not the one in the manifest."""
    if not manifest.documents_sha256:
        return
    folder = manifest.folder
    for shard, expected in zip(manifest.shards, manifest.documents_sha256, strict=True):
        read_table(folder / shard.table, shard)
        if (sha256 := sha256_of(folder / shard.table)) != expected:
            raise ValueError(
                f"{folder / shard.table}: altered table of documents: expected sha256 "
                f"{expected[:12]}, found {sha256[:12]}"
            )
    if (digest := hash_of_held_out(folder, manifest.shards)) != manifest.heldout_sha256:
        raise ValueError(
            f"{folder}: hash of the held-out documents: expected {manifest.heldout_sha256}, "
            f"found {digest}"
        )


def hash_of_held_out(folder: Path, shards: Sequence[Shard]) -> str:
    """Return the sha256 of the sorted hashes of the held-out documents: equal for equal text."""
    tables = [read_table(folder / s.table, s)[:, 1] for s in shards if s.split == "heldout"]
    hashes = np.sort(np.concatenate([np.zeros(0, "<u8"), *tables]))
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def content_hashes(manifest: Manifest, split: Split) -> Iterator[int]:
    """Yield the content hashes of a split in order, from the tables or (format 2) the tokens."""
    if manifest.documents_sha256:
        for shard in manifest.split(split):
            yield from read_table(manifest.folder / shard.table, shard)[:, 1].tolist()
    else:
        yield from counted_hashes(manifest, split)


def counted_hashes(manifest: Manifest, split: Split) -> Iterator[int]:
    """Yield the content hashes of a split in order, computed from its tokens."""
    tokenizer = load_tokenizer(manifest.folder)
    for ids in document_ids(manifest, split):
        yield content_hash(tokenizer.decode_bytes(ids))
