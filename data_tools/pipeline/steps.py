"""The steps of a pipeline: the list of each step's tasks, and the function that runs one.

    read       inputs -> records -> cleaned, filtered, masked documents; the quarantine
    exact      documents with the same hash: all but the first
    bands      pairs of documents that share a band of MinHash
    clusters   pairs -> groups of near duplicates: all but the first
    tokenizer  bytes, a folder, or a new sentencepiece model
    tokens     documents that are left -> splits -> ids -> runs sorted by shuffle key
    shards     runs -> shards

"First" is in the order of sources, files and records. No result depends on how records were divided
among tasks, or tasks among workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.datasets.document_tables import content_hash
from data_tools.datasets.sorted_runs import Run, RunPlan, plan_runs, write_run
from data_tools.datasets.stats import bins_of
from data_tools.datasets.write import SPLITS, make_shard, shuffle_key
from data_tools.pipeline import dedup, read_step
from data_tools.pipeline.documents import Array, Documents
from data_tools.pipeline.inputs import Inputs, read_tasks
from data_tools.pipeline.read_step import Samples
from data_tools.pipeline.workspace import Counts, Spec, Tick, Work
from data_tools.pipeline.workspace import Run as RunTask
from data_tools.sources.held_out_rule import parse_rule
from data_tools.train_tokenizer import lines_of, train_on
from hourglass_dist.data.manifest import Recipe, Split
from hourglass_dist.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)

SAMPLE_CHARACTERS = 100_000
"""Most characters of one document in the sample that a tokenizer is trained on."""


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: tasks that may run in any order, at the same time, anywhere."""

    name: str
    unit: str
    """Unit that its tasks count while they run."""
    specs: Callable[[Work, Inputs], list[Spec]]
    """Function that returns the step's tasks; called when the steps before it are done."""
    run: RunTask
    """Function that runs one task."""


# --- the tokenizer -------------------------------------------------------------------------------


def _tokenizer_specs(work: Work, inputs: Inputs) -> list[Spec]:
    return [{"tokenizer": inputs.tokenizer}]


def _make_tokenizer(work: Work, spec: Spec, folder: Path, tick: Tick) -> Counts:
    settings = work.settings.tokenizer
    tokenizer: Tokenizer = ByteTokenizer()
    documents = 0
    if settings.kind == "folder":
        tokenizer = load_tokenizer(Path(str(settings.folder)))
        if tokenizer.fingerprint.model_sha256 != spec["tokenizer"]:
            raise ValueError(f"{settings.folder}: the tokenizer changed since this was begun")
    elif settings.kind != "bytes":
        texts = _sample(work, tick)
        documents = len(texts)
        lines = [line for text in texts for line in lines_of(text)]
        model = train_on(lines, settings.kind, settings.vocab_size, "tokenizer.vocab_size")
        tokenizer = SentencePieceTokenizer(model, "the new model")
    tokenizer.save(folder)
    return {"documents": documents, "vocab_size": tokenizer.vocab_size}


def _sample(work: Work, tick: Tick) -> list[str]:
    """Return texts drawn at random, up to ``sample_bytes`` in all, without held-out text."""
    rule = parse_rule(work.settings.held_out)
    found = []
    for index in range(len(work.tasks("read"))):
        documents = Documents(work.folder("read", index))
        rows = dedup.parted(work, index, len(documents))[""]
        sizes = np.minimum(np.diff(documents.starts)[rows], SAMPLE_CHARACTERS)
        keys = _keys(work, index, documents, rows)
        found.append((keys, np.full(len(rows), index), rows, sizes))
        tick(tasks=index)
    keys, tasks, rows, sizes = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(keys, kind="stable")
    total = np.cumsum(sizes[order])
    order = order[: max(1, int(np.searchsorted(total, work.settings.tokenizer.sample_bytes)))]
    texts: dict[int, bytes] = {}
    for task in np.unique(tasks[order]):
        places = order[tasks[order] == task]
        documents = Documents(work.folder("read", int(task)))
        texts |= zip(places.tolist(), documents.contents(rows[places]), strict=True)
    path = Path()
    parts = [part for place in order.tolist() for part in rule.parts(texts[place], path)]
    train = (str(part, "utf-8") for split, part in parts if split == "train")
    return [text[:SAMPLE_CHARACTERS] for text in train]


def _keys(work: Work, task: int, documents: Documents, rows: Array) -> Array:
    """Return the shuffle keys of ``rows`` of a read task, from their numbers in the source."""
    source = work.tasks("read")[task]["source"]
    before = (c["records"] for c in work.counts("read")[:task] if c["source"] == source)
    first, seed = sum(before), work.settings.seed
    numbers = documents.origins[rows, 2].tolist()
    keys = (shuffle_key(seed, first + number) for number in numbers)
    return np.fromiter(keys, np.uint64, len(numbers))


def tokenizer_of(work: Work) -> Tokenizer:
    """Return the tokenizer of a pipeline, once its step is done."""
    return load_tokenizer(work.folder("tokenizer", 0))


# --- tokens --------------------------------------------------------------------------------------


def _token_specs(work: Work, inputs: Inputs) -> list[Spec]:
    return [{"source": spec["source"], "task": i} for i, spec in enumerate(work.tasks("read"))]


def _make_tokens(work: Work, spec: Spec, folder: Path, tick: Tick) -> Counts:
    documents = Documents(work.folder("read", spec["task"]))
    parted = dedup.parted(work, spec["task"], len(documents))
    rows = parted[""]
    tokenizer, rule = tokenizer_of(work), parse_rule(work.settings.held_out)
    keys = _keys(work, spec["task"], documents, rows)
    places: dict[Split, list[int]] = {split: [] for split in SPLITS}
    ids: dict[Split, list[Array]] = {split: [] for split in SPLITS}
    sizes: dict[Split, list[int]] = {split: [] for split in SPLITS}
    hashes: dict[Split, list[int]] = {split: [] for split in SPLITS}
    done = 0
    for place, data in enumerate(documents.contents(rows)):
        for split, part in rule.parts(data, Path()):
            places[split].append(place)
            ids[split].append(tokenizer.encode_utf8(part))
            sizes[split].append(len(part))
            hashes[split].append(content_hash(part))
            done += len(part)
        if place % 64 == 0:
            tick(documents=place, bytes=done)
    dropped = {reason: len(some) for reason, some in parted.items() if reason and len(some)}
    counts: Counts = {"source": spec["source"], "documents": len(rows), "dropped": dropped}
    for split in SPLITS:
        lengths = np.array([len(each) for each in ids[split]], np.int64)
        text_bytes = np.array(sizes[split], np.int64)
        if len(lengths):
            contents = np.array(hashes[split], np.uint64)
            write_run(folder / split, keys[places[split]], ids[split], contents, tokenizer)
        counts[split] = {
            "documents": len(lengths),
            "tokens": int(lengths.sum()) + len(lengths),
            "text_bytes": int(text_bytes.sum()),
            "bytes": bins_of(text_bytes),
            "tokens_per_byte": bins_of(lengths * 4096 // np.maximum(text_bytes, 1)),
        }
    _sample_documents(work, spec, documents, parted).write(folder)
    return counts


def _sample_documents(
    work: Work, spec: Spec, documents: Documents, parted: dict[str, Array]
) -> Samples:
    """Return some documents of each reason in ``parted``, for the report."""
    samples = Samples()
    for reason, rows in parted.items():
        keys = _keys(work, spec["task"], documents, rows)
        first = np.sort(np.argsort(keys)[: Samples.KEPT])
        for place, text in zip(first, documents.texts(rows[first]), strict=True):
            number, position, _ = documents.origins[rows[place]].tolist()
            samples.add(int(keys[place]), spec["source"], reason, number, position, text)
    return samples


# --- shards --------------------------------------------------------------------------------------


def runs_of(work: Work, source: str, split: Split) -> list[Run]:
    """Return the sorted runs of a split of a source."""
    tasks = work.tasks("tokens")
    bases = [work.folder("tokens", i) / split for i, t in enumerate(tasks) if t["source"] == source]
    return [Run(base) for base in bases if Path(f"{base}.ids").exists()]


def _shard_specs(work: Work, inputs: Inputs) -> list[Spec]:
    settings = work.settings
    specs: list[Spec] = []
    for source in settings.sources:
        for split in SPLITS:
            plan = plan_runs(runs_of(work, source.name, split))
            plan.save(work.root / f"plan-{source.name}-{split}.npy")
            shards = plan.shards(settings.shards.block_tokens * settings.shards.shard_blocks)
            specs += [
                {"source": source.name, "split": split, "number": number}
                for number in range(shards)
            ]
    return specs


def _make_shard(work: Work, spec: Spec, folder: Path, tick: Tick) -> Counts:
    tick(shards=0)
    source, split = spec["source"], spec["split"]
    plan = RunPlan.load(work.root / f"plan-{source}-{split}.npy")
    runs = runs_of(work, source, split)
    recipe = recipe_of(work, source)
    shard = make_shard(folder, spec["number"], split, runs, plan, recipe, tokenizer_of(work))
    return shard.model_dump(mode="json")


def recipe_of(work: Work, name: str) -> Recipe:
    """Return the recipe in the manifest of a source's dataset."""
    settings = work.settings
    source = next(source for source in settings.sources if source.name == name)
    return Recipe(
        source=name,
        inputs_sha256=read_step.hash_of_inputs(work, name),
        separator=source.separator,
        text_field=source.text_field,
        held_out=settings.held_out,
        seed=settings.seed,
        block_tokens=settings.shards.block_tokens,
        shard_blocks=settings.shards.shard_blocks,
    )


def _read_specs(work: Work, inputs: Inputs) -> list[Spec]:
    return read_tasks(work.settings, inputs)


STEPS = (
    Step("read", "bytes", _read_specs, read_step.read),
    Step("exact", "documents", dedup.exact_specs, dedup.find_exact),
    Step("bands", "documents", dedup.band_specs, dedup.find_pairs),
    Step("clusters", "pairs", dedup.cluster_specs, dedup.find_clusters),
    Step("tokenizer", "tasks", _tokenizer_specs, _make_tokenizer),
    Step("tokens", "bytes", _token_specs, _make_tokens),
    Step("shards", "shards", _shard_specs, _make_shard),
)
BY_NAME = {step.name: step for step in STEPS}
