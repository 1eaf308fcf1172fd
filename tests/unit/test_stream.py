"""The stream: the same batches on any number of ranks, from any point, every token once."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import (
    assert_same,
    blocks_of,
    local,
    make,
    plain_webdataset,
    refusal,
    stream_of,
    words,
)

from data_tools.train_tokenizer import train_tokenizer
from hourglass_dist.data.batch import Batch
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.manifest import Manifest
from hourglass_dist.data.tokenizer import load_tokenizer

WORLDS = [1, 2, 3, 4, 6, 12]  # all that divide a batch of 12


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make(tmp_path_factory.mktemp("stream"), words(80))


def global_batches(
    manifest: Manifest, world: int, steps: int, start_step: int = 0, seed: int = 5
) -> list[Batch]:
    """The batches of all ranks put together."""
    ranks = [stream_of(manifest, 8, 12, seed, rank, world) for rank in range(world)]
    streams = [stream.batches(start_step) for stream in ranks]
    whole = []
    for parts in islice(zip(*streams, strict=True), steps):
        whole.append(
            Batch(
                torch.cat([part.tokens_BL for part in parts]),
                torch.cat([part.targets_BL for part in parts]),
                np.concatenate([part.row_ids for part in parts]),
            )
        )
    for stream in streams:
        stream.close()
    return whole


def test_a_batch_is_int64_and_shifted(manifest: Manifest) -> None:
    batch = global_batches(manifest, 1, 1)[0]
    for tensor in (batch.tokens_BL, batch.targets_BL):
        assert tensor.shape == (12, 8)
        assert tensor.dtype == torch.int64
    real = batch.targets_BL[:, :-1] >= 0
    assert torch.equal(batch.tokens_BL[:, 1:][real], batch.targets_BL[:, :-1][real])


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_size_reads_the_same_batches(manifest: Manifest, world: int) -> None:
    assert_same(global_batches(manifest, world, 40), global_batches(manifest, 1, 40))


@pytest.mark.parametrize("done", [1, 7, 23])
def test_a_cold_start_goes_on_where_it_was(manifest: Manifest, done: int) -> None:
    """Also on another number of ranks, and across the end of an epoch."""
    whole = global_batches(manifest, 2, 40)
    assert_same(global_batches(manifest, 3, 40 - done, start_step=done), whole[done:])


def test_every_token_is_a_target_once_an_epoch(manifest: Manifest) -> None:
    stream = stream_of(manifest, 8, 1, 5)
    batches = stream.batches()
    for _ in range(3):
        epoch = [next(batches).targets_BL for _ in range(stream.plan.sources[0].rows)]
        targets = torch.cat(epoch).flatten()
        blocks = plain_webdataset(manifest, "train")
        real = Counter(t for ids, about in blocks for t in ids[: about["tokens"]].tolist())
        assert Counter(targets[targets >= 0].tolist()) == real
    batches.close()


@pytest.mark.parametrize("seq_len", [4, 16, 64])
def test_every_target_knows_its_document(manifest: Manifest, seq_len: int) -> None:
    """Numbered by the ends that stand in the shards; off unless it is asked for."""
    blocks = {
        split: [(ids, about, ends) for ids, about, ends in blocks_of(manifest, split)]
        for split in ("train", "heldout")
    }
    expected = {}
    for split in blocks:
        expected[split] = sorted(
            (tuple(targets[real].tolist()), tuple((numbers - numbers[0])[real].tolist()))
            for ids, about, ends in blocks[split]
            for start in range(0, about["tokens"], seq_len)
            for targets in [ids[start : start + seq_len]]
            for numbers in [np.searchsorted(ends, np.arange(start, start + seq_len), "right")]
            for real in [np.arange(start, start + seq_len) < about["tokens"]]
        )
    stream = stream_of(manifest, seq_len, 1, 5, isolate_documents=True)
    found: dict[str, list[Batch]] = {
        "train": list(islice(stream.batches(), stream.plan.sources[0].rows)),
        "heldout": list(held_out_rows([local(manifest)], seq_len, 3, isolate_documents=True)),
    }
    for split, batches in found.items():
        rows = []
        for batch in batches:
            assert batch.documents_BL is not None
            assert batch.documents_BL.dtype == torch.int64
            assert (batch.documents_BL.diff(dim=1) >= 0).all()
            for targets, documents in zip(batch.targets_BL, batch.documents_BL, strict=True):
                real = targets >= 0
                rows.append((tuple(targets[real].tolist()), tuple(documents[real].tolist())))
        assert sorted(rows) == expected[split]
    assert next(stream_of(manifest, seq_len, 1, 5).batches()).documents_BL is None


def test_seeds_give_other_batches(manifest: Manifest) -> None:
    one, other = (global_batches(manifest, 1, 1, seed=seed)[0] for seed in (1, 2))
    assert not torch.equal(one.targets_BL, other.targets_BL)


def test_memory_is_used_again_only_when_nobody_looks_at_it(manifest: Manifest) -> None:
    """Batches that are kept, or any part of them, stay what they were."""
    expected = [batch.targets_BL.clone() for batch in global_batches(manifest, 1, 30)]
    running = stream_of(manifest, 8, 12, 5).read(0)
    kept, addresses = [], set()
    for n, batch in enumerate(islice(running, 30)):
        addresses.add(batch.targets_BL.data_ptr())
        kept.append(
            (n, batch.targets_BL[3:5]) if n % 3 == 0 else (n, batch.targets_BL[3:5].clone())
        )
        del batch
    assert all(torch.equal(rows, expected[n][3:5]) for n, rows in kept)
    assert len(addresses) < 20


# --- state ---------------------------------------------------------------------------------------


def test_the_state_survives_json(manifest: Manifest) -> None:
    state = json.loads(json.dumps(stream_of(manifest, 8, 12, 5, 1, 2).state(3)))
    assert state["next_row"] == 36
    for rank in range(3):
        again = stream_of(manifest, 8, 12, 5, rank, 3)
        again.resume(state, 3)
        assert again.state(3) == state


@pytest.mark.parametrize(
    ("settings", "field"),
    [((16, 12, 5), "seq_len"), ((8, 6, 5), "lanes"), ((8, 12, 6), "seed")],
)
def test_the_state_of_another_stream(
    manifest: Manifest, settings: tuple[int, int, int], field: str
) -> None:
    state = stream_of(manifest, 8, 12, 5).state(0)
    other = stream_of(manifest, *settings)
    assert refusal(lambda: other.resume(state, 0)).startswith(f"data: {field} differs")


def test_the_state_of_another_dataset(manifest: Manifest, tmp_path: Path) -> None:
    other = stream_of(make(tmp_path, words(80, seed=1)), 8, 12, 5)
    state = stream_of(manifest, 8, 12, 5).state(0)
    assert refusal(lambda: other.resume(state, 0)).startswith("data: datasets differs")
    assert "plan differs" in refusal(lambda: other.resume(other.state(0) | {"plan": "x"}, 0))
    assert "next_row differs" in refusal(lambda: other.resume(other.state(1), 0))
    assert "datasets differs" in refusal(lambda: other.resume({}, 0))


def test_worlds_and_lengths_that_do_not_fit(manifest: Manifest) -> None:
    message = refusal(lambda: stream_of(manifest, 8, 12, 5, 0, 5))
    assert "these can: 1, 2, 3, 4, 6, 12" in message
    assert "near lengths" in refusal(lambda: stream_of(manifest, 7, 12, 5))
    assert "given -1" in refusal(lambda: stream_of(manifest, 8, 12, 5).batches(-1))


# --- the thread ----------------------------------------------------------------------------------


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "hourglass-read-ahead"]


def test_the_thread_ends_with_the_generator(manifest: Manifest) -> None:
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    before = set(readers())  # of a test that failed
    stream = stream_of(manifest, 8, 12, 5)
    closed, collected = stream.batches(), stream.batches()
    next(closed)
    next(collected)
    assert len(set(readers()) - before) == 2
    closed.close()
    del collected
    gc.collect()
    assert not set(readers()) - before
    if files:
        assert len(os.listdir("/proc/self/fd")) <= files


def test_what_the_thread_raises_is_raised_here(tmp_path: Path) -> None:
    before = set(readers())
    manifest = make(tmp_path, words(80))
    batches = stream_of(manifest, 8, 12, 5).batches()
    for shard in manifest.split("train"):  # verified, then cut behind its back
        os.truncate(manifest.folder / shard.path, 600)
    assert "truncated shard: expected" in refusal(lambda: next(batches))
    assert not set(readers()) - before


def test_a_thread_that_dies_is_an_error_and_no_endless_wait(manifest: Manifest) -> None:
    """SystemExit raised inside it from outside, as an interpreter or a library might."""
    before = set(readers())
    batches = stream_of(manifest, 8, 12, 5).batches()
    next(batches)
    [thread] = set(readers()) - before
    kill = ctypes.pythonapi.PyThreadState_SetAsyncExc
    assert kill(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)) == 1
    with pytest.raises(OSError, match="the thread that reads data ended: SystemExit"):
        list(islice(batches, 100))
    assert not set(readers()) - before


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 1000])
def test_every_held_out_token_is_scored_once(
    manifest: Manifest, world: int, batch_size: int
) -> None:
    ranks = [list(held_out_rows([local(manifest)], 8, batch_size, r, world)) for r in range(world)]
    shapes = {tuple(tuple(batch.targets_BL.shape) for batch in batches) for batches in ranks}
    assert len(shapes) == 1  # the same forward passes on every rank
    whole = [batch for batches in ranks for batch in batches]
    ids = np.concatenate([batch.row_ids for batch in whole])
    assert sorted(ids[ids >= 0]) == list(range(sum(manifest.rows("heldout", 8))))
    assert (ids < 0).sum() < world
    targets = torch.cat([batch.targets_BL for batch in whole]).flatten()
    blocks = plain_webdataset(manifest, "heldout")
    real = [t for split_ids, about in blocks for t in split_ids[: about["tokens"]].tolist()]
    assert targets[targets >= 0].tolist() == real


@pytest.mark.parametrize("seq_len", [4, 32])
def test_every_held_out_byte_is_scored_once_by_every_tokenizer(
    tmp_path: Path, seq_len: int
) -> None:
    (tmp_path / "text.txt").write_text("\n".join(words(80)))
    bpe = train_tokenizer([tmp_path / "text.txt"], tmp_path / "bpe", kind="bpe", vocab_size=300)
    totals = []
    for name, tokenizer in (("bytes", None), ("bpe", bpe)):
        (tmp_path / name).mkdir(exist_ok=True)
        manifest = make(tmp_path / name, words(80), tokenizer)
        lengths = load_tokenizer(manifest.folder).byte_lengths()
        batches = list(held_out_rows([local(manifest)], seq_len, 8))
        targets = torch.cat([batch.targets_BL for batch in batches]).flatten().numpy()
        totals.append(lengths[targets[targets >= 0]].sum())
        assert totals[-1] == sum(s.text_bytes for s in manifest.split("heldout"))
    assert totals[0] == totals[1] > 0
