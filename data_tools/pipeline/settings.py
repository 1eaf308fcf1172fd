"""The settings of ``hourglass data prepare``: a YAML file for all steps from inputs to datasets.

    sources -> normalise -> filters -> dedup -> pii -> held_out -> tokenizer -> shards

All but ``executor`` affect the result. A folder that was started with others is refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from data_tools.sources.held_out_rule import parse_rule
from hourglass_dist.config import shipped
from hourglass_dist.config.loader import ConfigError, Section, apply_override, parse, read_yaml

Rule = Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"]


class Source(Section):
    """A source of text. It becomes a dataset of its own, OUT/NAME, which training can weight."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the source's dataset folder; every sample contains it."""
    inputs: list[str] = Field(min_length=1)
    """Files and folders: text, JSON lines, CSV, Parquet, Arrow, WARC, WebDataset tars."""
    text_field: str = "text"
    """Field or column of the text; in tars the member that holds it (text: KEY.txt)."""
    separator: str | None = None
    """Text between documents in text files; null: a file is a document."""
    suffixes: list[str] = Field(default_factory=list)
    """Endings of the files to read in folders, such as .py; unknown ones are read as plain text.
    Empty list: every known kind."""


class Normalise(Section):
    """Changes of every document before filters and deduplication."""

    repair: bool = False
    """Whether ftfy repairs wrongly decoded text and broken characters."""
    unicode: Literal["none", "NFC"] = "none"
    """Unicode normal form of the text."""


class Language(Section):
    """A filter that keeps documents of some languages, by a fastText model."""

    model: str
    """Local file of the fastText model, such as lid.176.bin."""
    keep: list[str] = Field(min_length=1)
    """Labels of the languages to keep, such as en."""
    min_score: float = Field(default=0.65, ge=0, le=1)
    """Least probability of the most likely label, which must be in ``keep``."""


class Filters(Section):
    """Filters that drop documents. The first that drops one gives the reason."""

    min_bytes: NonNegativeInt = 0
    """Smallest document that is kept, UTF-8 bytes."""
    max_bytes: PositiveInt = 2**27
    """Largest document that is kept, UTF-8 bytes."""
    language: Language | None = None
    """Language filter; null: all languages are kept."""
    rules: list[Rule] = Field(default_factory=list)
    """Rules of datatrove with its thresholds for English, in this order. c4 also drops lines."""


class MinHash(Section):
    """MinHash near duplicates: documents that share all hashes of at least one band."""

    words: PositiveInt = 5
    """Number of words in a shingle. Shorter documents have no near duplicates."""
    bands: PositiveInt = 14
    """Number of bands; more of them find less similar documents."""
    rows: PositiveInt = 8
    """Hashes in a band; more find fewer. 14 bands of 8 find 92 % at a similarity of 0.8."""


class Dedup(Section):
    """Deduplication within and across sources: the first of equal documents stays."""

    exact: bool = True
    """Whether documents with the same text as an earlier one are dropped."""
    minhash: MinHash | None = None
    """Settings of near duplicates to drop; null: they are kept."""


class Pii(Section):
    """Masking of personal data."""

    emails: bool = False
    """Whether email addresses become email@example.com."""
    ips: bool = False
    """Whether public IP addresses become 22.214.171.124."""


class TokenizerSettings(Section):
    """The tokenizer of all datasets."""

    kind: Literal["bytes", "unigram", "bpe", "folder"] = "bytes"
    """Kind of tokenizer: bytes, a new sentencepiece model (unigram, bpe), or an existing folder."""
    vocab_size: PositiveInt = 32768
    """Number of pieces of a new model."""
    sample_bytes: PositiveInt = 100_000_000
    """Most bytes of text to train a new model on: documents drawn at random, none held out."""
    folder: str | None = None
    """Folder made by 'hourglass data tokenizer', for kind folder."""

    @model_validator(mode="after")
    def _folder_when_it_is_used(self) -> TokenizerSettings:
        if (self.kind == "folder") != (self.folder is not None):
            raise ValueError(
                "tokenizer.folder: expected with tokenizer.kind=folder, and only then, "
                f"given {self.folder!r} with kind {self.kind}"
            )
        return self


class Shards(Section):
    """Sizes of the datasets' blocks and shards."""

    block_tokens: PositiveInt = 2**19
    """Number of tokens in a block; sequence lengths must divide it."""
    shard_blocks: PositiveInt = 64
    """Most blocks in a shard."""


class ExecutorSettings(Section):
    """The executor of tasks. Every kind gives the same results, bit for bit."""

    kind: Literal["local", "ray", "slurm"] = "local"
    """Kind of workers: processes of this machine, tasks of a Ray cluster, or a Slurm array job."""
    workers: PositiveInt | None = None
    """Most tasks at a time; null: one for every core (of the cluster, for ray)."""
    ray_address: str | None = None
    """Address of the Ray cluster, such as auto or 10.0.0.1:6379; null: one is started here."""
    slurm_options: list[str] = Field(default_factory=list)
    """Further options of sbatch, such as --partition=cpu."""


class Prepare(Section):
    """The settings of a pipeline."""

    out: str
    """Folder of the datasets; all workers must see it."""
    seed: NonNegativeInt = 0
    """Seed of the shuffle, of the tokenizer's sample and of the report's samples."""
    task_bytes: PositiveInt = 2**26
    """Approximate input of one task, bytes; a task holds its text in memory."""
    max_quarantined: float = Field(default=0.001, ge=0, le=1)
    """Largest fraction of records that are not text; above it the job fails."""
    sources: list[Source] = Field(min_length=1)
    """Sources of text, each a dataset."""
    normalise: Normalise = Normalise()
    """Changes of every document's text."""
    filters: Filters = Filters()
    """Filters of documents."""
    dedup: Dedup = Dedup()
    """Deduplication of documents."""
    pii: Pii = Pii()
    """Masking of personal data."""
    held_out: str = "hash:0.01"
    """Text kept out of training: hash:0.01 (documents by content), last:0.1 or none."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """Tokenizer of all datasets."""
    shards: Shards = Shards()
    """Sizes of blocks and shards."""
    executor: ExecutorSettings = ExecutorSettings()
    """Executor of the tasks."""

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: list[Source]) -> list[Source]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are called {name!r}")
            if name in ("work", "tokenizer"):
                raise ValueError(f"sources: {name!r} is the name of another folder in out")
        return sources

    @field_validator("held_out")
    @classmethod
    def _is_a_rule(cls, rule: str) -> str:
        if rule.startswith("input:"):
            raise ValueError("held_out: expected hash:0.01, last:0.1 or none, given an input")
        try:
            parse_rule(rule)
        except ValueError as error:
            raise ValueError(str(error).replace("--held-out", "held_out")) from None
        return rule

    @property
    def workers(self) -> int:
        """Number of tasks that run at a time."""
        return self.executor.workers or len(os.sched_getaffinity(0))

    def decisive(self) -> Prepare:
        """Return these settings with the default executor, which does not affect the result."""
        return self.model_copy(update={"executor": ExecutorSettings()})


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Prepare:
    """Load a YAML file, or the shipped one of a bare name, with ``key=value`` changes.

    Raises ConfigError for a wrong file or setting.
    """
    path = shipped.find(path, shipped.CONFIGS / "prepare")
    settings: dict[str, Any] = read_yaml(path)
    changed = [apply_override(settings, override) for override in overrides]
    try:
        return parse(Prepare, settings, source=str(path), overridden=changed)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
