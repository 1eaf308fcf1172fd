"""An estimate of a pipeline's input, output and time, from a small sample."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from data_tools.pipeline.clean import Cleaner
from data_tools.pipeline.inputs import InputFile, Inputs, read_tasks
from data_tools.pipeline.settings import Prepare, Source
from data_tools.sources.readers import read_records
from data_tools.sources.text_files import Problem
from hourglass_dist.data.manifest import dtype_name, dtype_of
from hourglass_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

SAMPLE_FILES, SAMPLE_BYTES, SAMPLE_SECONDS = 12, 2_000_000, 3.0
GUESSED_BYTES_PER_TOKEN, GUESSED_BYTES_PER_S = 4.0, 12e6
"""Assumed figures of a sentencepiece model that is not trained yet."""


@dataclass
class _Sample:
    read_bytes: int = 0
    kept_bytes: int = 0
    tokens: float = 0
    seconds: float = 0
    counts: Counter[str] = field(default_factory=Counter)


def plan(settings: Prepare, inputs: Inputs) -> list[str]:
    """Return lines about inputs, a sample of them, tasks, output, disk and time; write nothing."""
    lines, text_bytes = [], 0
    for source in settings.sources:
        files = inputs.files[source.name]
        size = sum(file.text_bytes for file in files)
        text_bytes += size
        stored = sum(file.bytes for file in files)
        about = f", about {size / 1e6:,.1f} MB of text" if size != stored else ""
        lines.append(
            f"inputs    {source.name}: {len(files):,} files, {stored / 1e6:,.1f} MB{about}"
        )
    sample = _take_sample(settings, inputs)
    counts = ", ".join(f"{count:,} {name}" for name, count in sample.counts.most_common())
    lines.append(f"sample    {sample.read_bytes / 1e6:,.1f} MB: {counts}")
    tasks = len(read_tasks(settings, inputs))
    kept = text_bytes * sample.kept_bytes / max(sample.read_bytes, 1)
    tokens = text_bytes * sample.tokens / max(sample.read_bytes, 1)
    vocabulary = 256 if settings.tokenizer.kind == "bytes" else settings.tokenizer.vocab_size
    shards = tokens * dtype_of(dtype_name(vocabulary)).itemsize
    out = Path(settings.out).absolute()
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    lines += [
        f"tasks     {tasks:,} of reading, {tasks:,} of tokens, "
        f"{-(-int(tokens) // (settings.shards.block_tokens * settings.shards.shard_blocks)):,} "
        f"or more shards; {settings.executor.kind}, {settings.workers} at a time",
        f"output    {out}: about {kept / 1e6:,.1f} MB of text, {tokens / 1e6:,.1f} M tokens, "
        f"{shards / 1e6:,.1f} MB of shards (before duplicates are dropped)",
        f"disk      about {(kept + 2 * shards) / 1e6:,.1f} MB while it is made, "
        f"{free / 1e6:,.0f} MB free",
        f"time      about {timedelta(seconds=round(_seconds(settings, sample, text_bytes)))}",
    ]
    return lines


def _seconds(settings: Prepare, sample: _Sample, text_bytes: int) -> float:
    """Return the time, seconds: 10 for the start, the sample's rate, and sorting at 100 MB/s."""
    work = text_bytes * (sample.seconds / max(sample.read_bytes, 1) + 1e-8)
    return 10 + work / settings.workers


def _take_sample(settings: Prepare, inputs: Inputs) -> _Sample:
    """Clean and encode a little of every source, and return the counts and times."""
    sample, cleaner = _Sample(), Cleaner(settings)
    tokenizer: Tokenizer | None = None
    if settings.tokenizer.kind == "bytes":
        tokenizer = ByteTokenizer()
    elif settings.tokenizer.folder:
        tokenizer = load_tokenizer(Path(settings.tokenizer.folder))
    for source in settings.sources:
        begun = time.monotonic()
        limit = sample.read_bytes + SAMPLE_BYTES // len(settings.sources)
        for text in _records(source, inputs.files[source.name]):
            _count(sample, cleaner, tokenizer, text)
            late = time.monotonic() - begun > SAMPLE_SECONDS / len(settings.sources)
            if sample.read_bytes >= limit or late:
                break
        sample.seconds += time.monotonic() - begun
    return sample


def _records(source: Source, files: list[InputFile]) -> Iterator[str | Problem]:
    """Yield the first records of files spread evenly over the source."""
    step = max(1, len(files) // SAMPLE_FILES)
    for file in files[::step]:
        read = 0
        for _, text in read_records(Path(file.path), source.text_field, source.separator):
            yield text
            read += len(text) if isinstance(text, str) else 0
            if read > SAMPLE_BYTES // SAMPLE_FILES:
                break


def _count(
    sample: _Sample, cleaner: Cleaner, tokenizer: Tokenizer | None, text: str | Problem
) -> None:
    if isinstance(text, Problem):
        sample.counts["quarantined"] += 1
        return
    size = len(text.encode())
    sample.read_bytes += size
    cleaned, reason = cleaner.clean(text, size)
    sample.counts[reason or "kept"] += 1
    if reason:
        return
    cleaner.keys(cleaned, cleaned.encode())
    masked = cleaner.mask(cleaned)
    size = len(masked.encode())
    sample.kept_bytes += size
    if tokenizer:
        sample.tokens += len(tokenizer.encode(masked)) + 1
    else:
        sample.tokens += size / GUESSED_BYTES_PER_TOKEN
        sample.seconds += size / GUESSED_BYTES_PER_S
