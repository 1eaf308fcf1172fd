"""Corpora for the preparation tests: texts of words, with duplicates and damage at known places."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.datasets.inspect import documents
from data_tools.pipeline.prepare import prepare
from data_tools.pipeline.report import Report
from data_tools.pipeline.settings import Prepare
from hourglass_dist.config.loader import parse
from hourglass_dist.data.manifest import Manifest
from hourglass_dist.data.tokenizer import load_tokenizer

VOCABULARY = [
    f"{a}{b}{c}"
    for a in ("ba", "ko", "ri", "mu")
    for b in ("la", "ne", "s")
    for c in ("t", "m", "")
]


def texts(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """``count`` texts of sentences, all different."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        chosen = random.choice(VOCABULARY, int(random.integers(words // 2, 2 * words)))
        lines = [" ".join(chosen[j : j + 12]) + "." for j in range(0, len(chosen), 12)]
        found.append(f"Text {seed} {i}.\n" + "\n".join(lines))
    return found


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def settings(folder: Path, *inputs: Path, **changes: Any) -> Prepare:
    """Settings of a pipeline from JSON lines to ``folder / "out"``: small blocks, many tasks."""
    plain = {
        "out": str(folder / "out"),
        "task_bytes": 20_000,
        "sources": [{"name": "corpus", "inputs": [str(path) for path in inputs]}],
        "shards": {"block_tokens": 1024, "shard_blocks": 8},
        "held_out": "hash:0.1",
        "executor": {"workers": 1},
    }
    return parse(Prepare, plain | changes, source="test")


def run(*arguments: Any, **changes: Any) -> Report:
    """Prepare to the end."""
    report = prepare(settings(*arguments, **changes))
    assert report is not None
    return report


def shard_hashes(out: Path) -> dict[str, str]:
    """sha256 of every shard below a folder, by its name there."""
    found = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*.tar"))
        if "work" not in path.relative_to(out).parts
    }
    assert found
    return found


FULL = {
    "dedup": {"minhash": {}},
    "pii": {"emails": True, "ips": True},
    "filters": {"min_bytes": 30, "rules": ["gopher_repetition"]},
    "tokenizer": {"kind": "unigram", "vocab_size": 330, "sample_bytes": 100_000},
}


def all_texts(out: Path) -> list[str]:
    """Every document of every dataset below a folder, decoded."""
    found = []
    for index in sorted(out.glob("*/index.json")):
        manifest = Manifest.load(index.parent)
        tokenizer = load_tokenizer(index.parent)
        for split in dict.fromkeys(shard.split for shard in manifest.shards):
            found += documents(manifest, split, tokenizer)
    return found


@contextlib.contextmanager
def killing(root: Path, wanted: Callable[[str, int], bool]) -> Iterator[list[str]]:
    """SIGKILL for the process that does a task, in the middle of it, when ``wanted(stage, n)`` says
    so of the n-th task seen in a stage; yields the stages in which that happened."""
    killed: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        seen: dict[Path, None] = {}
        while not stop.is_set():
            for path in root.glob("*/.0*.unfinished"):
                stage = path.parent.name
                if path not in seen:
                    number = sum(p.parent.name == stage for p in seen)
                    seen[path] = None
                    if wanted(stage, number):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(path.name.split(".")[-2]), signal.SIGKILL)
                            killed.append(stage)
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()
