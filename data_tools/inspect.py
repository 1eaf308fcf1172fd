"""Looking at a dataset: what its manifest says, and its documents as text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_tools.blocks import read_samples
from hourglass_dist.data.shards import Manifest, Split
from hourglass_dist.data.tokenizer import Ids, Tokenizer


def describe(manifest: Manifest, tokenizer: Tokenizer) -> str:
    """The facts of a dataset, a line for each."""
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
    """The documents of a split as text, in the order in which they were written."""
    begun: list[Ids] = []
    for shard in manifest.split(split):
        for sample in read_samples(manifest.folder / shard.path, manifest.dtype):
            position = 0
            for end in sample.ends.tolist():
                begun.append(sample.tokens_T[position : end - 1])  # without the eos
                yield tokenizer.decode(np.concatenate(begun).tolist())
                begun, position = [], end
            begun.append(sample.tokens_T[position:])
