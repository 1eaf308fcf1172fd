"""Writing a dataset: documents in the order of their shuffle keys -> runs -> shards -> index.json.

All commands that make a dataset use this (``data shard``, ``data prepare``, ``data merge`` ...), so
the same inputs, tokenizer and settings give the same bytes. A document's shuffle key is a hash of
(seed, its number). The folder gets its name when complete. Memory holds one run and one shard.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from data_tools.datasets.document_tables import hash_of_held_out, write_table
from data_tools.datasets.sorted_runs import Run, RunPlan, gather, plan_runs, write_run
from data_tools.live_line import Show, silent
from hourglass_dist.core.files import new_folder, sha256_of
from hourglass_dist.data.manifest import Manifest, Recipe, Shard, Split, dtype_name
from hourglass_dist.data.tokenizer import Tokenizer
from hourglass_dist.data.write import cut_blocks, write_shard

SPLITS: tuple[Split, ...] = get_args(Split)
Piece = tuple[Split, int, npt.NDArray[Any], int]
"""Tuple (split, shuffle key, ids, content hash) of a document or a part of one."""
RUN_BYTES = 1 << 27
"""Approximate size of the ids in memory before they are sorted and written, bytes."""


def shuffle_key(seed: int, number: int) -> int:
    """Return the shuffle key of document ``number`` of the inputs, 0 ... 2**64 - 1."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8, person=b"shuffle").digest()
    return int.from_bytes(digest, "big")


def hash_inputs(files: Iterable[Sequence[object]]) -> str:
    """Return a recipe's ``inputs_sha256`` from the (name, size, sha256) of its inputs in order."""
    return hashlib.sha256(json.dumps([list(file) for file in files]).encode()).hexdigest()


def describe_input(path: Path) -> tuple[str, int, str]:
    """Return (name, size in bytes, sha256) of an input file."""
    return path.name, path.stat().st_size, sha256_of(path)


def write_dataset(
    out: Path,
    pieces: Iterable[Piece],
    recipe: Recipe,
    tokenizer: Tokenizer,
    empty_documents: Callable[[], int],
    show: Show = silent,
) -> Manifest:
    """Write documents by their keys to the new folder ``out`` and return the manifest."""
    with new_folder(out) as folder:
        (folder / "runs").mkdir()
        runs = _write_runs(pieces, folder / "runs", tokenizer)
        shards = []
        for split in SPLITS:
            plan = plan_runs(runs[split])
            count = plan.shards(recipe.block_tokens * recipe.shard_blocks)
            for number in range(count):
                shards.append(
                    make_shard(folder, number, split, runs[split], plan, recipe, tokenizer)
                )
                show(f"wrote {split} shard {number + 1:,} of {count:,}")
        shutil.rmtree(folder / "runs")
        finish_dataset(folder, shards, recipe, tokenizer, empty_documents())
    return Manifest.load(out)


def finish_dataset(
    folder: Path, shards: Sequence[Shard], recipe: Recipe, tokenizer: Tokenizer, empty: int
) -> None:
    """Write the tokenizer and, last, the manifest of a folder that has its shards."""
    tokenizer.save(folder)
    Manifest.make(
        folder,
        tokenizer=tokenizer.fingerprint,
        eos_id=tokenizer.eos_id,
        dtype=dtype_name(tokenizer.vocab_size),
        recipe=recipe,
        empty_documents=empty,
        shards=tuple(shards),
        documents_sha256=tuple(sha256_of(folder / shard.table) for shard in shards),
        heldout_sha256=hash_of_held_out(folder, shards),
    ).save()


def _write_runs(
    pieces: Iterable[Piece], folder: Path, tokenizer: Tokenizer
) -> dict[Split, list[Run]]:
    """Write all documents as runs of about RUN_BYTES and return the runs."""
    runs: dict[Split, list[Run]] = {split: [] for split in SPLITS}
    keys: dict[Split, list[int]] = {split: [] for split in SPLITS}
    documents: dict[Split, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}
    hashes: dict[Split, list[int]] = {split: [] for split in SPLITS}

    def flush() -> None:
        for split in SPLITS:
            if documents[split]:
                run = Run(folder / f"{split}-{len(runs[split])}")
                key_array, hash_array = (np.array(c[split], np.uint64) for c in (keys, hashes))
                write_run(run.base, key_array, documents[split], hash_array, tokenizer)
                runs[split].append(run)
                keys[split], documents[split], hashes[split] = [], [], []

    held = 0
    for split, key, ids, content in pieces:
        keys[split].append(key)
        hashes[split].append(content)
        documents[split].append(ids)
        held += ids.nbytes
        if held >= RUN_BYTES:
            flush()
            held = 0
    flush()
    return runs


def make_shard(
    folder: Path,
    number: int,
    split: Split,
    runs: Sequence[Run],
    plan: RunPlan,
    recipe: Recipe,
    tokenizer: Tokenizer,
) -> Shard:
    """Write one shard from the runs of a split and return its manifest entry."""
    size = recipe.block_tokens * recipe.shard_blocks
    begin = number * size
    end = min(begin + size, int(plan.tokens[-1]))
    stretch = gather(runs, plan, begin, end, tokenizer)
    blocks = cut_blocks(
        stretch.tokens, stretch.ends, stretch.first_document, recipe.block_tokens, tokenizer.eos_id
    )
    shard = write_shard(folder, number, split, blocks, recipe.source, tokenizer)
    write_table(folder / shard.table, stretch.ends, stretch.hashes)
    return shard
