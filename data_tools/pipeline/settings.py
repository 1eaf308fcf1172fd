"""Every setting of ``hourglass data prepare``: one YAML describes the way from inputs to datasets.

    sources -> normalise -> filters -> dedup -> pii -> held_out -> tokenizer -> shards

All but ``executor`` decides what comes out. A folder that was begun with other settings is refused.
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
    """Text of one kind. It becomes a dataset of its own, OUT/NAME, to be weighted in training."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """The name of its dataset folder; it stands in every sample."""
    inputs: list[str] = Field(min_length=1)
    """Files and folders: text, JSON lines, CSV, Parquet, Arrow, WARC, WebDataset tars."""
    text_field: str = "text"
    """The field or column of the text; in tars the member that holds it (text: KEY.txt)."""
    separator: str | None = None
    """What stands between documents in text files; none: a file is a document."""
    suffixes: list[str] = Field(default_factory=list)
    """Endings of the files to read in folders, such as .py; what is of no known kind is plain text.
    None: every known kind."""


class Normalise(Section):
    """What is changed in every document before anything looks at it."""

    repair: bool = False
    """Undo wrong decoding and broken characters with ftfy."""
    unicode: Literal["none", "NFC"] = "none"
    """The Unicode normal form."""


class Language(Section):
    """Keep documents of some languages, by a fastText model."""

    model: str
    """A local model file, such as lid.176.bin."""
    keep: list[str] = Field(min_length=1)
    """Labels to keep, such as en."""
    min_score: float = Field(default=0.65, ge=0, le=1)
    """The least probability of one of them."""


class Filters(Section):
    """Which documents are dropped. The first rule that drops one gives the reason."""

    min_bytes: NonNegativeInt = 0
    """UTF-8 bytes of a document, at least."""
    max_bytes: PositiveInt = 2**27
    """UTF-8 bytes of a document, at most."""
    language: Language | None = None
    """By language; none: all are kept."""
    rules: list[Rule] = Field(default_factory=list)
    """Rules of datatrove with its thresholds, for English, in this order. c4 drops lines, too."""


class MinHash(Section):
    """Near duplicates: documents that share all hashes of at least one band."""

    words: PositiveInt = 5
    """Words in a shingle. Shorter documents have no near duplicates."""
    bands: PositiveInt = 14
    """Bands; more find less similar documents."""
    rows: PositiveInt = 8
    """Hashes in a band; more find fewer. 14 bands of 8 find a similarity of 0.8 with 92 %."""


class Dedup(Section):
    """Which repeated documents are dropped, within and across sources: the first one stays."""

    exact: bool = True
    """Documents with the same text."""
    minhash: MinHash | None = None
    """Documents with nearly the same text."""


class Pii(Section):
    """What is masked."""

    emails: bool = False
    """Email addresses become email@example.com."""
    ips: bool = False
    """Public IP addresses become 22.214.171.124."""


class TokenizerSettings(Section):
    """What makes ids of text."""

    kind: Literal["bytes", "unigram", "bpe", "folder"] = "bytes"
    """Bytes, a new sentencepiece model, or one that is there already."""
    vocab_size: PositiveInt = 32768
    """Pieces of a new model."""
    sample_bytes: PositiveInt = 100_000_000
    """Text that a new model is trained on, at most: documents drawn at random, none held out."""
    folder: str | None = None
    """A folder made by 'hourglass data tokenizer', for kind folder."""

    @model_validator(mode="after")
    def _folder_when_it_is_used(self) -> TokenizerSettings:
        if (self.kind == "folder") != (self.folder is not None):
            raise ValueError(
                "tokenizer.folder: expected with tokenizer.kind=folder, and only then, "
                f"given {self.folder!r} with kind {self.kind}"
            )
        return self


class Shards(Section):
    """The form of the datasets."""

    block_tokens: PositiveInt = 2**19
    """Tokens in a block; sequence lengths must divide it."""
    shard_blocks: PositiveInt = 64
    """Blocks in a shard, at most."""


class ExecutorSettings(Section):
    """Where the work is done. The results are the same to the last bit."""

    kind: Literal["local", "ray", "slurm"] = "local"
    """Processes of this machine, tasks of a Ray cluster, or an array job of Slurm."""
    workers: PositiveInt | None = None
    """How many tasks run at a time; none: one for every core (of the cluster, for ray)."""
    ray_address: str | None = None
    """The cluster, such as auto or 10.0.0.1:6379; none: one is started on this machine."""
    slurm_options: list[str] = Field(default_factory=list)
    """Options of sbatch, such as --partition=cpu."""


class Prepare(Section):
    """The settings of a pipeline."""

    out: str
    """The folder of the datasets; it must be visible to all workers."""
    seed: NonNegativeInt = 0
    """Of the shuffle, of the tokenizer's sample and of the samples in the report."""
    task_bytes: PositiveInt = 2**26
    """Input in one task, about; a task holds its text in memory."""
    max_quarantined: float = Field(default=0.001, ge=0, le=1)
    """The job fails when more than this fraction of the records is no text."""
    sources: list[Source] = Field(min_length=1)
    """The inputs."""
    normalise: Normalise = Normalise()
    """Changes of the text."""
    filters: Filters = Filters()
    """Documents to drop."""
    dedup: Dedup = Dedup()
    """Duplicates to drop."""
    pii: Pii = Pii()
    """Personal data to mask."""
    held_out: str = "hash:0.01"
    """Text kept out of training: hash:0.01 (documents by content), last:0.1 or none."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """Text to ids."""
    shards: Shards = Shards()
    """Ids to shards."""
    executor: ExecutorSettings = ExecutorSettings()
    """Who does it."""

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
        """Tasks at a time."""
        return self.executor.workers or len(os.sched_getaffinity(0))

    def decisive(self) -> Prepare:
        """These settings without what makes no difference to the result."""
        return self.model_copy(update={"executor": ExecutorSettings()})


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Prepare:
    """The settings of a YAML file, or the shipped ones of a bare name, with ``key=value`` changes.

    Raises ConfigError.
    """
    path = shipped.find(path, shipped.CONFIGS / "prepare")
    settings: dict[str, Any] = read_yaml(path)
    changed = [apply_override(settings, override) for override in overrides]
    try:
        return parse(Prepare, settings, source=str(path), overridden=changed)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deep") from None
