"""Corpus -> dataset: documents are split, encoded, shuffled all together, packed and written.

    inputs -> documents -> parts of a split -> ids -> runs sorted by shuffle key (runs.py)
    runs -> merged -> blocks -> tars -> index.json

A document's place is a hash of (seed, its number), so the same inputs give the same bytes.
Everything is written into a hidden folder beside the new one, which gets its name when it is whole;
memory holds one run and one shard at a time. The short way of ``prepare``: one process, no filters.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from data_tools.datasets.sorted_runs import Run, RunPlan, gather, plan_runs, write_run
from data_tools.live_line import Show, silent
from data_tools.sources.held_out_rule import Rule, parse_rule
from data_tools.sources.text_files import find_inputs, read_documents
from hourglass_dist.config.loader import differences
from hourglass_dist.core.files import new_folder, sha256_of
from hourglass_dist.data.shards import (
    Manifest,
    Recipe,
    Shard,
    Split,
    dtype_name,
)
from hourglass_dist.data.tokenizer import Tokenizer
from hourglass_dist.data.write import cut_blocks, write_shard

SPLITS: tuple[Split, ...] = get_args(Split)
Piece = tuple[Split, int, npt.NDArray[Any]]
"""(split, shuffle key, ids) of a document or a part of one."""
RUN_BYTES = 1 << 27
"""About how many bytes of ids are in memory at once, before they are sorted and written."""


@dataclass
class Counts:
    """What has been read so far, for one split."""

    documents: int = 0
    tokens: int = 0
    """With one end-of-text token per document."""
    text_bytes: int = 0


@dataclass
class Progress:
    """How far the reading is."""

    files: int = 0
    empty_documents: int = 0
    splits: dict[Split, Counts] = field(default_factory=lambda: {s: Counts() for s in SPLITS})

    @property
    def documents(self) -> int:
        """Documents, or parts of them, that were not empty."""
        return sum(counts.documents for counts in self.splits.values())

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all text."""
        return sum(counts.text_bytes for counts in self.splits.values())

    def __str__(self) -> str:
        size = f"{self.text_bytes / 1e6:,.1f} MB"
        return f"{self.files} files, {self.documents:,} documents, {size}"


@dataclass(frozen=True)
class Job:
    """A dataset to be made."""

    inputs: tuple[Path, ...]
    rule: Rule
    tokenizer: Tokenizer
    recipe: Recipe


def plan_job(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    held_out: str,
    separator: str | None = None,
    text_field: str = "text",
    seed: int = 0,
    block_tokens: int = 2**19,
    shard_blocks: int = 64,
    source: str | None = None,
) -> Job:
    """Find the inputs and settle the recipe. Raises ValueError for anything that cannot work."""
    if separator == "":
        raise ValueError("--separator: expected at least one character, given none")
    rule = parse_rule(held_out)
    files = tuple(find_inputs([*inputs, *rule.inputs]))
    recipe = Recipe(
        source=source or files[0].name.partition(".")[0],
        inputs_sha256=_hash_inputs(files),
        separator=separator,
        text_field=text_field,
        held_out=held_out,
        seed=seed,
        block_tokens=block_tokens,
        shard_blocks=shard_blocks,
    )
    return Job(files, rule, tokenizer, recipe)


def _hash_inputs(files: Sequence[Path]) -> str:
    lines = [[path.name, path.stat().st_size, sha256_of(path)] for path in files]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()


def find_finished(job: Job, out: Path) -> Manifest | None:
    """The dataset of this job when ``out`` already holds it; None when ``out`` is free.

    Raises ValueError when ``out`` holds anything else, naming what differs.
    """
    if not out.exists():
        return None
    try:
        manifest = Manifest.load(out)
    except ValueError as error:
        raise ValueError(f"{out}: already exists and is no dataset ({error})") from None
    changed = differences(manifest.recipe, job.recipe)
    if manifest.tokenizer != job.tokenizer.fingerprint:
        changed.append("another tokenizer")
    if changed:
        raise ValueError(
            f"{out}: already exists, made with other settings ({'; '.join(changed)}); "
            "choose another folder or remove it first"
        )
    manifest.verify(full=False)
    return manifest


def count(job: Job, show: Show = silent) -> Progress:
    """Read and encode everything, write nothing."""
    progress = Progress()
    for _ in _encoded(job, progress, show):
        pass
    _require_text(job, progress)
    return progress


def make_dataset(job: Job, out: Path, show: Show = silent) -> Manifest:
    """Write the dataset to the new folder ``out``.

    Raises ValueError, leaving nothing behind, when the inputs are damaged or have no text.
    """
    progress = Progress()

    def encoded() -> Iterator[Piece]:
        yield from _encoded(job, progress, show)
        _require_text(job, progress)

    return write_dataset(
        out, encoded(), job.recipe, job.tokenizer, lambda: progress.empty_documents, show
    )


def write_dataset(
    out: Path,
    pieces: Iterable[Piece],
    recipe: Recipe,
    tokenizer: Tokenizer,
    empty_documents: Callable[[], int],
    show: Show = silent,
) -> Manifest:
    """Write documents, in the order of their keys, to the new folder ``out``."""
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
        tokenizer.save(folder)
        Manifest.make(
            folder,
            tokenizer=tokenizer.fingerprint,
            eos_id=tokenizer.eos_id,
            dtype=dtype_name(tokenizer.vocab_size),
            recipe=recipe,
            empty_documents=empty_documents(),
            shards=tuple(shards),
        ).save()
    return Manifest.load(out)


def _write_runs(
    pieces: Iterable[Piece], folder: Path, tokenizer: Tokenizer
) -> dict[Split, list[Run]]:
    """All documents in runs of about RUN_BYTES."""
    runs: dict[Split, list[Run]] = {split: [] for split in SPLITS}
    keys: dict[Split, list[int]] = {split: [] for split in SPLITS}
    documents: dict[Split, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}

    def flush() -> None:
        for split in SPLITS:
            if documents[split]:
                run = Run(folder / f"{split}-{len(runs[split])}")
                write_run(run.base, np.array(keys[split], np.uint64), documents[split], tokenizer)
                runs[split].append(run)
                keys[split], documents[split] = [], []

    held = 0
    for split, key, ids in pieces:
        keys[split].append(key)
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
    """Write one shard out of the runs of a split; returns its manifest entry."""
    size = recipe.block_tokens * recipe.shard_blocks
    begin = number * size
    end = min(begin + size, int(plan.tokens[-1]))
    found = gather(runs, plan, begin, end, tokenizer)
    blocks = cut_blocks(
        found.tokens, found.ends, found.first_document, recipe.block_tokens, tokenizer.eos_id
    )
    return write_shard(folder, number, split, blocks, recipe.source, tokenizer)


def _encoded(job: Job, progress: Progress, show: Show) -> Iterator[Piece]:
    """(split, shuffle key, ids) of every part of every document."""
    number = 0
    for path in job.inputs:
        for document in read_documents(path, job.recipe.separator, job.recipe.text_field):
            for split, text in job.rule.parts(document, path) if document else ():
                if text:
                    ids = job.tokenizer.encode(text)
                    counts = progress.splits[split]
                    counts.documents += 1
                    counts.tokens += len(ids) + 1
                    counts.text_bytes += len(text.encode())
                    yield split, _shuffle_key(job.recipe.seed, number), ids
            progress.empty_documents += not document
            number += 1
            if number % 100 == 0:
                show(str(progress))
        progress.files += 1


def _shuffle_key(seed: int, number: int) -> int:
    """A document's place in the shuffled corpus, 0 ... 2**64 - 1."""
    digest = hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8, person=b"shuffle").digest()
    return int.from_bytes(digest, "big")


def _require_text(job: Job, progress: Progress) -> None:
    if not progress.documents:
        raise ValueError(
            f"{job.inputs[0]}: empty corpus: {len(job.inputs)} input files without any text"
        )
    for split in SPLITS:
        wanted = split == "train" or job.rule.text != "none"
        if wanted and not progress.splits[split].documents:
            raise ValueError(
                f"--held-out {job.rule.text}: no text is left for split {split!r} "
                f"({progress.documents} documents in all)"
            )
