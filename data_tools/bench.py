"""Speed of preparing text on one core, compared with sentencepiece's own encoding alone.

Every round runs both on the same documents: sentencepiece's own ``encode``, then all steps of a
pipeline without filters, from JSON lines to shards. Times are processor seconds of this process, so
other load on the machine matters little. A ratio is the median over the rounds; a warm-up round
before the first does not count.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import sentencepiece

from data_tools.live_line import Show, silent
from data_tools.pipeline.inputs import find
from data_tools.pipeline.settings import Prepare
from data_tools.pipeline.steps import STEPS
from data_tools.pipeline.workspace import Work, do_task
from data_tools.sources.text_files import find_inputs, read_documents
from data_tools.train_tokenizer import lines_of, train_on
from hourglass_dist.config.loader import parse, to_yaml
from hourglass_dist.data.tokenizer import SentencePieceTokenizer

DOCUMENT_CHARACTERS = 3000
TRAINING_LINES = 20_000


def bench_prepare(
    inputs: Sequence[Path], kinds: Sequence[str], megabytes: int, rounds: int, show: Show = silent
) -> list[str]:
    """Return lines with MB/s per core by kind of tokenizer. Raises ValueError for bad inputs."""
    documents = _documents(inputs, megabytes)
    size = sum(len(document.encode()) for document in documents) / 1e6
    lines = [
        f"{len(documents):,} documents, {size:,.1f} MB, {rounds} rounds, one core; "
        "MB of text per processor second",
        f"{'tokenizer':<10} {'raw':>8} {'prepare':>8} {'ratio':>6}   steps",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.jsonl"
        corpus.write_bytes(b"".join(orjson.dumps({"text": d}) + b"\n" for d in documents))
        for kind in kinds:
            show(f"{kind}: training")
            model = _model(kind, documents, Path(scratch) / kind)
            found = []
            for number in range(rounds + 1):
                show(f"{kind}: round {number} of {rounds}")
                raw = _raw_seconds(model, documents) if model else 0.0
                found.append((raw, _step_seconds(kind, corpus, Path(scratch))))
            lines.append(_line(kind, size, found[1:]))
    return lines


def _documents(inputs: Sequence[Path], megabytes: int) -> list[str]:
    """Return the inputs' text in pieces of 3,000 characters, repeated up to ``megabytes`` MB."""
    texts = [text for path in find_inputs(inputs) for text in read_documents(path, None, "text")]
    pieces = [
        text[begin : begin + DOCUMENT_CHARACTERS]
        for text in texts
        for begin in range(0, len(text), DOCUMENT_CHARACTERS)
    ]
    if not pieces:
        raise ValueError(f"{inputs[0]}: no text")
    size = sum(len(piece.encode()) for piece in pieces)
    return (pieces * -(-megabytes * 1_000_000 // size))[: len(pieces) * megabytes * 10**6 // size]


def _model(kind: str, documents: Sequence[str], folder: Path) -> bytes | None:
    """Train a sentencepiece model, save it in a folder and return it; None for bytes."""
    if kind == "bytes":
        return None
    lines = [line for document in documents[:4000] for line in lines_of(document)]
    model = train_on(lines[:TRAINING_LINES], "bpe" if kind == "bpe" else "unigram", 4096)
    folder.mkdir()
    SentencePieceTokenizer(model, kind).save(folder)
    return model


def _raw_seconds(model: bytes, documents: Sequence[str]) -> float:
    processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    begun = time.process_time()
    for document in documents:
        processor.encode(document)
    return time.process_time() - begun


def _step_seconds(kind: str, corpus: Path, scratch: Path) -> dict[str, float]:
    """Return the processor time of every pipeline step run in this process, seconds."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        wanted = {"kind": "bytes"}
        if kind != "bytes":
            wanted = {"kind": "folder", "folder": str(scratch / kind)}
        settings = parse(
            Prepare,
            {
                "out": out,
                "sources": [{"name": "bench", "inputs": [str(corpus)]}],
                "dedup": {"exact": False},
                "tokenizer": wanted,
            },
            source="bench",
        )
        (Path(out) / "settings.yaml").write_text(to_yaml(settings))
        work, inputs, seconds = Work(Path(out) / "work"), find(settings), {}
        for step in STEPS:
            begun = time.process_time()
            work.begin(step.name, step.specs(work, inputs), "")
            for index in range(len(work.tasks(step.name))):
                done = do_task(work, step.name, index, step.run)
                assert done, work.errors(step.name)
            seconds[step.name] = time.process_time() - begun
        return seconds


def _line(kind: str, size: float, found: Sequence[tuple[float, dict[str, float]]]) -> str:
    totals = [sum(steps.values()) for _, steps in found]
    raw = statistics.median(seconds for seconds, _ in found)
    ratio = statistics.median(r / t for (r, _), t in zip(found, totals, strict=True))
    steps = ", ".join(
        f"{name} {statistics.median(steps[name] for _, steps in found) * 1e3 / size:.2f}"
        for name in ("read", "tokens", "shards")
    )
    raw_speed, share = (f"{size / raw:,.1f}", f"{ratio:.2f}") if raw else ("", "")
    speed = size / statistics.median(totals)
    return f"{kind:<10} {raw_speed:>8} {speed:>8,.1f} {share:>6}   {steps} ms/MB"
