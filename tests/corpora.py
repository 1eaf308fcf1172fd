"""Corpora for the preparation tests: texts of words, with duplicates and damage at known places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.prepare import prepare
from data_tools.report import Report
from data_tools.settings import Prepare
from hourglass_dist.config.loader import parse

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
