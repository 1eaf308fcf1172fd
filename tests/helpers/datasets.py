"""Datasets for tests: made by the real tools from text given as strings; and a flat oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from data_tools.shard import make_dataset, plan_dataset
from hourglass_dist.data.batch import Batch
from hourglass_dist.data.manifest import Manifest, Split, dtype_of
from hourglass_dist.data.mixture import Dataset, simple_plan
from hourglass_dist.data.shards import LocalStore
from hourglass_dist.data.stream import Stream
from hourglass_dist.data.tokenizer import ByteTokenizer, Tokenizer

NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\r\n\t\n",
    "a\0b",
    "\u2581 is how sentencepiece writes a space \u2581\u2581",
    "\u2585\u2581",
    "\ufeffbyte order mark",
    "<s></s><unk><pad><0x41>",
    "e\u0301 \ufb01 \u00bd \u00a0\u3000\u2028\u2029\u0085",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0010ffff \ufffd \uffff",
    "\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \u0928\u092e\u0938\u094d\u0924\u0947",
    "x" * 10_000,
    "\x7f\x01\x1b[0m",
]
"""Text that tokenizers like to change."""


def make(
    folder: Path,
    texts: Sequence[str],
    tokenizer: Tokenizer | None = None,
    *,
    held_out: str = "hash:0.3",
    **settings: Any,
) -> Manifest:
    """A dataset in ``folder / "dataset"`` with the given documents (64-token blocks, 3 a shard)."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sizes = {"block_tokens": 64, "shard_blocks": 3} | settings
    job = plan_dataset([corpus], tokenizer or ByteTokenizer(), held_out=held_out, **sizes)
    return make_dataset(job, folder / "dataset")


def local(manifest: Manifest, name: str = "data") -> Dataset:
    """A dataset in a folder, open."""
    return Dataset(name, str(manifest.folder), manifest, LocalStore(manifest))


def stream_of(
    manifest: Manifest, seq_len: int, batch_size: int, seed: int, *ranks: int, **options: Any
) -> Stream:
    """The stream of one dataset in a folder."""
    dataset = local(manifest)
    return Stream([dataset], simple_plan(dataset, seq_len, batch_size, seed), *ranks, **options)


def assert_same(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    """The same rows with the same tokens and targets."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.tokens_BL, other.tokens_BL)
        assert torch.equal(one.targets_BL, other.targets_BL)
        assert np.array_equal(one.row_ids, other.row_ids)


def words(count: int, seed: int = 0) -> list[str]:
    """``count`` documents of 1 to 60 characters, all different."""
    random = np.random.default_rng(seed)
    return [
        f"{i} " + "".join(random.choice(list("abc \u00e9\u4f60"), int(random.integers(0, 55))))
        for i in range(count)
    ]


def blocks_of(manifest: Manifest, split: Split) -> Iterator[tuple[Any, dict[str, Any], Any]]:
    """(ids, json, document ends) of every block of a split, read by nothing but webdataset."""
    for shard in manifest.split(split):
        path = str(manifest.folder / shard.path)
        for sample in webdataset.WebDataset(path, shardshuffle=False):
            ids = np.frombuffer(sample[f"tokens.{manifest.dtype}"], dtype_of(manifest.dtype))
            ends = np.frombuffer(sample["ends.u32"], "<u4")
            yield ids.astype(np.int64), json.loads(sample["json"]), ends.astype(np.int64)


def plain_webdataset(manifest: Manifest, split: Split) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(ids, json) of every block of a split."""
    yield from ((ids, about) for ids, about, _ in blocks_of(manifest, split))


def refusal(call: Callable[[], object]) -> str:
    """The message of the ValueError that ``call`` raises: one line."""
    try:
        call()
    except ValueError as error:
        message = str(error)
        assert message
        assert "\n" not in message
        return message
    raise AssertionError("expected a ValueError, none was raised")
