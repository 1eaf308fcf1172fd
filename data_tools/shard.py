"""``hourglass data shard``: a corpus becomes a dataset without filters, in one process.

    inputs -> documents -> parts of a split -> ids -> datasets/write.py

``hourglass data prepare`` without filters makes the same dataset, with the same id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.datasets.document_tables import content_hash
from data_tools.datasets.write import (
    SPLITS,
    Piece,
    describe_input,
    hash_inputs,
    shuffle_key,
    write_dataset,
)
from data_tools.live_line import Show, silent
from data_tools.sources.held_out_rule import Rule, parse_rule
from data_tools.sources.text_files import find_inputs, read_documents
from hourglass_dist.config.loader import differences
from hourglass_dist.data.manifest import Manifest, Recipe, Split
from hourglass_dist.data.tokenizer import Tokenizer


@dataclass
class SplitCounts:
    """Counts of what has been read for one split."""

    documents: int = 0
    tokens: int = 0
    """Number of tokens, one end-of-text token per document included."""
    text_bytes: int = 0

    def add(self, tokens: int, text_bytes: int) -> None:
        """Add one document with its tokens and bytes of text."""
        self.documents += 1
        self.tokens += tokens
        self.text_bytes += text_bytes


@dataclass
class ReadCounts:
    """Counts of files and documents that have been read."""

    files: int = 0
    empty_documents: int = 0
    splits: dict[Split, SplitCounts] = field(
        default_factory=lambda: {s: SplitCounts() for s in SPLITS}
    )

    @property
    def documents(self) -> int:
        """Number of non-empty documents, or parts of them."""
        return sum(counts.documents for counts in self.splits.values())

    @property
    def text_bytes(self) -> int:
        """Number of UTF-8 bytes of all text."""
        return sum(counts.text_bytes for counts in self.splits.values())

    def __str__(self) -> str:
        size = f"{self.text_bytes / 1e6:,.1f} MB"
        return f"{self.files} files, {self.documents:,} documents, {size}"


@dataclass(frozen=True)
class DatasetSpec:
    """Inputs and recipe of a dataset to be made."""

    inputs: tuple[Path, ...]
    rule: Rule
    tokenizer: Tokenizer
    recipe: Recipe


def plan_dataset(
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
) -> DatasetSpec:
    """Return a dataset's input files and recipe. Raises ValueError for impossible options."""
    if separator == "":
        raise ValueError("--separator: expected at least one character, given none")
    rule = parse_rule(held_out)
    files = tuple(find_inputs([*inputs, *rule.inputs]))
    recipe = Recipe(
        source=source or files[0].name.partition(".")[0],
        inputs_sha256=hash_inputs(map(describe_input, files)),
        separator=separator,
        text_field=text_field,
        held_out=held_out,
        seed=seed,
        block_tokens=block_tokens,
        shard_blocks=shard_blocks,
    )
    return DatasetSpec(files, rule, tokenizer, recipe)


def find_finished(spec: DatasetSpec, out: Path) -> Manifest | None:
    """Return the dataset in ``out`` if it is of this spec; None when ``out`` does not exist.

    Raises ValueError when ``out`` holds anything else, naming what differs.
    """
    if not out.exists():
        return None
    try:
        manifest = Manifest.load(out)
    except ValueError as error:
        raise ValueError(f"{out}: already exists and is no dataset ({error})") from None
    changed = differences(manifest.recipe, spec.recipe)
    if manifest.tokenizer != spec.tokenizer.fingerprint:
        changed.append("another tokenizer")
    if changed:
        raise ValueError(
            f"{out}: already exists, made with other settings ({'; '.join(changed)}); "
            "choose another folder or remove it first"
        )
    manifest.verify(full=False)
    return manifest


def count(spec: DatasetSpec, show: Show = silent) -> ReadCounts:
    """Read and encode everything without writing; return the counts."""
    counts = ReadCounts()
    for _ in _encoded(spec, counts, show):
        pass
    _require_text(spec, counts)
    return counts


def make_dataset(spec: DatasetSpec, out: Path, show: Show = silent) -> Manifest:
    """Write the dataset to the new folder ``out`` and return its manifest.

    Raises ValueError, leaving nothing behind, when the inputs are damaged or have no text.
    """
    counts = ReadCounts()

    def encoded() -> Iterator[Piece]:
        yield from _encoded(spec, counts, show)
        _require_text(spec, counts)

    return write_dataset(
        out, encoded(), spec.recipe, spec.tokenizer, lambda: counts.empty_documents, show
    )


def _encoded(spec: DatasetSpec, counts: ReadCounts, show: Show) -> Iterator[Piece]:
    """Yield (split, shuffle key, ids, content hash) of every part of every document."""
    number = 0
    for path in spec.inputs:
        for document in read_documents(path, spec.recipe.separator, spec.recipe.text_field):
            for split, part in spec.rule.parts(document.encode(), path):
                ids = spec.tokenizer.encode_utf8(part)
                counts.splits[split].add(len(ids) + 1, len(part))
                key = shuffle_key(spec.recipe.seed, number)
                yield split, key, ids, content_hash(part)
            counts.empty_documents += not document
            number += 1
            if number % 100 == 0:
                show(str(counts))
        counts.files += 1


def _require_text(spec: DatasetSpec, counts: ReadCounts) -> None:
    if not counts.documents:
        raise ValueError(
            f"{spec.inputs[0]}: empty corpus: {len(spec.inputs)} input files without any text"
        )
    for split in SPLITS:
        wanted = split == "train" or spec.rule.text != "none"
        if wanted and not counts.splits[split].documents:
            raise ValueError(
                f"--held-out {spec.rule.text}: no text is left for split {split!r} "
                f"({counts.documents} documents in all)"
            )
