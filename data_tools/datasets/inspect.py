"""Inspection of a dataset: the facts of its manifest, its rows, and its documents as text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.datasets.blocks import read_samples
from hourglass_dist.data.manifest import Manifest, Split, dtype_of
from hourglass_dist.data.mixture import open_dataset, simple_plan
from hourglass_dist.data.order import locate_many, ranks_cut
from hourglass_dist.data.tokenizer import Ids, Tokenizer


def describe(manifest: Manifest, tokenizer: Tokenizer) -> str:
    """Return the facts of a dataset, one per line."""
    recipe = manifest.recipe
    facts = {
        "dataset": f"{manifest.folder}, id {manifest.dataset_id}",
        "source": f"{recipe.source}, inputs {recipe.inputs_sha256[:12]}",
        "tokenizer": f"{tokenizer.name}, {tokenizer.vocab_size:,} ids, "
        f"vocabulary {manifest.tokenizer.vocab_sha256[:12]}",
        "blocks": f"of {manifest.block_tokens:,} tokens of type {manifest.dtype}, "
        f"at most {recipe.shard_blocks} in a shard",
        "held out": recipe.held_out,
    }
    for split in dict.fromkeys(shard.split for shard in manifest.shards):
        shards = manifest.split(split)
        tokens, text = (sum(getattr(s, name) for s in shards) for name in ("tokens", "text_bytes"))
        facts[split] = (
            f"{tokens:,} tokens, {text:,} bytes of text ({text / tokens:.2f} bytes per token), "
            f"{sum(s.documents for s in shards):,} documents, {sum(s.blocks for s in shards):,} "
            f"blocks, {len(shards):,} shards"
        )
    return "\n".join(f"{name:<10} {fact}" for name, fact in facts.items())


def documents(manifest: Manifest, split: Split, tokenizer: Tokenizer) -> Iterator[str]:
    """Return the documents of a split as text, in the order of writing."""
    return (tokenizer.decode(ids.tolist()) for ids in document_ids(manifest, split))


def document_ids(manifest: Manifest, split: Split, shards: range | None = None) -> Iterator[Ids]:
    """Yield the ids of the documents of a split, without eos; with ``shards`` only of those that
    end in these shards. The first of them is cut if it began in an earlier shard."""
    begun: list[Ids] = []
    entries = manifest.split(split)
    for number in shards or range(len(entries)):
        for sample in read_samples(manifest.folder / entries[number].path, manifest.dtype):
            position = 0
            for end in sample.ends.tolist():
                begun.append(sample.tokens_T[position : end - 1])  # without the eos
                yield np.concatenate(begun)
                begun, position = [], end
            begun.append(sample.tokens_T[position:])


def random_documents(
    manifest: Manifest, split: Split, tokenizer: Tokenizer, count: int, seed: int
) -> Iterator[tuple[int, str]]:
    """Yield (number, text) of ``count`` documents drawn at random, in their order."""
    entries = manifest.split(split)
    ends = np.cumsum([shard.documents for shard in entries])
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.choice(ends[-1], min(count, int(ends[-1])), replace=False))
    for number in chosen.tolist():
        last = int(np.searchsorted(ends, number, side="right"))
        first = last  # the shard in which it begins: the nearest one before with an end in it
        while first > 0 and number == (ends[last - 1] if last else 0):
            first -= 1
            if entries[first].documents:
                break
        before = int(ends[first - 1]) if first else 0
        ids = next(
            islice(document_ids(manifest, split, range(first, last + 1)), number - before, None)
        )
        yield number, tokenizer.decode(ids.tolist())


def row_ids(manifest: Manifest, split: Split, seq_len: int, row: int) -> tuple[str, int, Ids]:
    """Return (shard, row within it, target ids) of a row of a split.

    Raises ValueError when there is no such row.
    """
    rows = manifest.rows(split, seq_len)
    if not 0 <= row < sum(rows):
        raise ValueError(f"--row: expected 0 to {sum(rows) - 1:,}, given {row:,}")
    ends = np.cumsum(rows)
    number = int(np.searchsorted(ends, row, side="right"))
    shard, inside = manifest.split(split)[number], row - int(ends[number] - rows[number])
    block, start = divmod(inside * seq_len, manifest.block_tokens)
    dtype = dtype_of(manifest.dtype)
    path = manifest.folder / shard.path
    real = min(seq_len, shard.tokens - inside * seq_len)
    ids = np.fromfile(path, dtype, real, offset=shard.offsets[block] + start * dtype.itemsize)
    return shard.path, inside, ids


def batch_rows(
    folder: Path, step: int, batch_size: int, seq_len: int, ranks: int, seed: int
) -> Iterator[str]:
    """Yield the rows that a run on this dataset alone reads at a step (0 is the first), one line
    for each rank and shard.

    Raises ValueError when ``seq_len`` does not divide a block, or ``ranks`` not the batch.
    """
    dataset = open_dataset(str(folder))
    plan = simple_plan(dataset, seq_len, batch_size, seed)
    shards = dataset.manifest.split("train")
    for rank in range(ranks):
        cut = ranks_cut(plan.first_row(step), batch_size, ranks, rank)
        found = locate_many(plan, np.arange(cut.start, cut.stop))
        for number in np.unique(found.shards).tolist():
            here = found.shards == number
            epochs = ", ".join(map(str, np.unique(found.epochs[here])))
            rows = ", ".join(map(str, found.rows[here].tolist()))
            yield f"rank {rank}: epoch {epochs}, {shards[number].path}: rows {rows}"
