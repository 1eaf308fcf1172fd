"""New datasets from existing ones, without encoding anything again.

    merge      several into one, all documents shuffled together
    split      one into two, by the content of its documents
    reshard    other sizes of blocks and shards, the same order

Also the comparison of two datasets (``compare``), and their text (``export_text``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from data_tools.datasets.document_tables import check_tables, content_hashes
from data_tools.datasets.inspect import document_ids, documents
from data_tools.datasets.write import SPLITS, Piece, write_dataset
from data_tools.live_line import Show, silent
from hourglass_dist.config.loader import differences
from hourglass_dist.core.files import require_new, sync
from hourglass_dist.data.manifest import Manifest, Split
from hourglass_dist.data.tokenizer import load_tokenizer, require_same


def splits_of(manifest: Manifest) -> list[Split]:
    """Return the splits that have shards."""
    return [split for split in SPLITS if any(shard.split == split for shard in manifest.shards)]


def _pieces(manifest: Manifest, key: Callable[[int, Any], int | None]) -> Iterator[Piece]:
    """Yield all documents with their keys; a key of None leaves a document out."""
    for split in splits_of(manifest):
        documents = zip(document_ids(manifest, split), content_hashes(manifest, split), strict=True)
        for number, (ids, content) in enumerate(documents):
            if (place := key(number, ids)) is not None:
                yield split, place, ids, content


def _load(folder: Path) -> Manifest:
    manifest = Manifest.load(folder)
    manifest.verify()
    check_tables(manifest)
    return manifest


def merge(folders: Sequence[Path], out: Path, seed: int = 0, show: Show = silent) -> Manifest:
    """Write one shuffled dataset of all documents of several and return its manifest.

    Raises ValueError when their tokenizers differ or one is damaged.
    """
    require_new(out)
    manifests = [_load(folder) for folder in folders]
    for other in manifests[1:]:
        names = str(manifests[0].folder), str(other.folder)
        require_same(manifests[0].tokenizer, other.tokenizer, *names)

    def shuffled(which: int) -> Callable[[int, Any], int]:
        return lambda number, ids: _hash(f"{seed} {which} {number}".encode())

    pieces = (
        piece for i, manifest in enumerate(manifests) for piece in _pieces(manifest, shuffled(i))
    )
    ids = [manifest.dataset_id for manifest in manifests]
    recipe = manifests[0].recipe.model_copy(
        update={
            "source": "+".join(dict.fromkeys(m.recipe.source for m in manifests)),
            "inputs_sha256": hashlib.sha256(json.dumps(["merge", ids]).encode()).hexdigest(),
            "held_out": ", ".join(dict.fromkeys(m.recipe.held_out for m in manifests)),
            "seed": seed,
        }
    )
    empty = sum(manifest.empty_documents for manifest in manifests)
    return write_dataset(out, pieces, recipe, load_tokenizer(folders[0]), lambda: empty, show)


def split(
    folder: Path, first: Path, second: Path, fraction: float, show: Show = silent
) -> tuple[Manifest, Manifest]:
    """Write two datasets: documents whose content hashes below ``fraction``, and the others.

    Raises ValueError, leaving nothing behind, when one would have nothing to train on.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--fraction: expected a number between 0 and 1, given {fraction}")
    require_new(first)
    require_new(second)
    manifest, tokenizer = _load(folder), load_tokenizer(folder)

    def is_first(ids: Any) -> bool:
        return _hash(ids.tobytes()) < int(fraction * 2**64)

    def part(wanted: bool) -> Callable[[int, Any], int | None]:
        return lambda number, ids: number if is_first(ids) == wanted else None

    sides = {True: first, False: second}
    for ids in document_ids(manifest, "train"):
        sides.pop(is_first(ids), None)
        if not sides:
            break
    for empty in sides.values():
        raise ValueError(
            f"{empty}: would have none of the training documents of {folder}; "
            "choose another fraction or a dataset of more documents"
        )
    made = []
    for out, wanted in ((first, True), (second, False)):
        what = json.dumps(["split", manifest.dataset_id, fraction, wanted]).encode()
        update = {"inputs_sha256": hashlib.sha256(what).hexdigest()}
        recipe = manifest.recipe.model_copy(update=update)
        pieces = _pieces(manifest, part(wanted))
        made.append(write_dataset(out, pieces, recipe, tokenizer, lambda: 0, show))
    return made[0], made[1]


def reshard(
    folder: Path, out: Path, block_tokens: int, shard_blocks: int, show: Show = silent
) -> Manifest:
    """Write the same documents in the same order, in blocks and shards of other sizes."""
    require_new(out)
    manifest = _load(folder)
    update = {"block_tokens": block_tokens, "shard_blocks": shard_blocks}
    recipe = manifest.recipe.model_copy(update=update)
    pieces = _pieces(manifest, lambda number, ids: number)
    tokenizer = load_tokenizer(folder)
    return write_dataset(out, pieces, recipe, tokenizer, lambda: manifest.empty_documents, show)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def compare(a: Path, b: Path) -> list[str]:
    """Return what differs between two datasets, one fact per line; [] when they are the same."""
    manifests = [Manifest.load(folder) for folder in (a, b)]
    if manifests[0].dataset_id == manifests[1].dataset_id:
        return []
    lines = [f"recipe    {line}" for line in differences(*(m.recipe for m in manifests))]
    same = manifests[0].tokenizer == manifests[1].tokenizer
    lines += [] if same else ["tokenizer differs: documents are compared as text"]
    for name in SPLITS:
        hashes = [_hashes(m, name) for m in manifests]
        common = len(np.intersect1d(hashes[0], hashes[1]))
        only = [len(np.unique(found)) - common for found in hashes]
        tokens = [sum(s.tokens for s in m.shards if s.split == name) for m in manifests]
        lines.append(
            f"{name:<9} tokens {tokens[0]:,} -> {tokens[1]:,}; documents {len(hashes[0]):,} -> "
            f"{len(hashes[1]):,}: {common:,} in both, {only[0]:,} only in {a}, "
            f"{only[1]:,} only in {b}"
        )
    return lines


def _hashes(manifest: Manifest, split: Split) -> npt.NDArray[np.uint64]:
    if split not in splits_of(manifest):
        return np.zeros(0, np.uint64)
    return np.fromiter(content_hashes(manifest, split), np.uint64)


def export_text(folder: Path, out: Path, split: Split, show: Show = silent) -> int:
    """Write the documents of a split as JSON lines, compressed if the name ends in .zst, and return
    their number. Raises ValueError when ``out`` exists."""
    require_new(out)
    manifest, tokenizer = Manifest.load(folder), load_tokenizer(folder)
    manifest.verify(split)
    unfinished = out.with_name(f".{out.name}.unfinished")
    count = 0
    with unfinished.open("wb") as raw:
        zipped = out.suffix == ".zst"
        file = zstandard.ZstdCompressor().stream_writer(raw, closefd=False) if zipped else raw
        for text in documents(manifest, split, tokenizer):
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            count += 1
            if count % 1000 == 0:
                show(f"{count:,} documents")
        if zipped:
            file.close()
    sync(unfinished)
    unfinished.rename(out)
    return count
