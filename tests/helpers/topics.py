"""A corpus whose documents come in the order of their topics, and how well batches of it are mixed.

Spread: the squared differences of a batch's topic counts from what is expected, relative to those
of documents drawn independently; 1 is ideal, more is clumped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset

from data_tools.shard import make_dataset, plan_dataset
from hourglass_dist.data.mixture import open_dataset, simple_plan
from hourglass_dist.data.stream import Stream
from hourglass_dist.data.tokenizer import ByteTokenizer

TOPICS, LENGTH, BATCH = 50, 64, 512


def documents(count: int) -> Iterator[tuple[int, str]]:
    """(topic, text) in the order of topics; with its end, a text is a row."""
    for i in range(count):
        topic = i * TOPICS // count
        yield topic, f"{topic:02} {i:08} ".ljust(LENGTH - 1, "x")


def spread(batches: Iterable[list[int]]) -> float:
    """Over batches of topics."""
    expected = BATCH / TOPICS
    chi = [
        ((np.bincount(batch, minlength=TOPICS) - expected) ** 2 / expected).sum() / (TOPICS - 1)
        for batch in batches
    ]
    return float(np.mean(chi))


def ours(folder: Path, count: int) -> float:
    """Sharded by the data tools and read by the stream."""
    lines = [json.dumps({"text": text}) + "\n" for _, text in documents(count)]
    (folder / "topics.jsonl").write_text("".join(lines))
    sizes = {"block_tokens": LENGTH * 256, "shard_blocks": 8}
    job = plan_dataset([folder / "topics.jsonl"], ByteTokenizer(), held_out="none", **sizes)
    make_dataset(job, folder / "dataset")
    dataset = open_dataset(str(folder / "dataset"))
    stream = Stream([dataset], simple_plan(dataset, LENGTH, BATCH, seed=1))
    batches = islice(stream.read(0), count // BATCH)
    rows = (batch.targets_BL[:, :2].numpy() - ord("0") for batch in batches)
    return spread((digits @ [10, 1]).tolist() for digits in rows)


def webdatasets(folder: Path, count: int) -> float:
    """One document a sample, 1000 samples a shard, shards and a buffer of 10,000 shuffled."""
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=1000, verbose=0) as writer:
        for i, (topic, text) in enumerate(documents(count)):
            writer.write({"__key__": f"{i:08}", "topic": f"{topic}", "txt": text})
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1).shuffle(10_000)
    topics = (int(sample["topic"]) for sample in samples)
    return spread(list(islice(topics, BATCH)) for _ in range(count // BATCH))
