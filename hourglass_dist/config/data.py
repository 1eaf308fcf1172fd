"""The ``data`` section of a run's settings: which tokens are read, and in what phases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from hourglass_dist.config.loader import Section

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class SourceConfig(Section):
    """One dataset of a mixture."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """A word for it, in messages, metrics and ``skip_shards``."""
    path: str
    """Where it lies, as ``data.dataset``."""
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Its share of the rows, on any scale; kept to the thousandth of all rows."""
    max_epochs: PositiveInt | None = None
    """How often it may be read. A run that would read it more often is refused at its start."""


class PhaseConfig(Section):
    """An early part of a run that differs from the rest. What is left out does not differ."""

    until_step: PositiveInt
    """The phase ends when this many optimizer steps are done."""
    seq_len: PositiveInt | None = None
    """Tokens in one row. All sequence lengths of a run divide the longest."""
    batch_size: PositiveInt | None = None
    """Rows in one optimizer step."""
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """Weights of sources, by name; 0 leaves a source out."""


class CacheConfig(Section):
    """The disk cache of shards that lie in an object store or behind a web server."""

    dir: str = "data/cache"
    """Folder on a local disk. Runs and ranks may share one."""
    max_gb: PositiveFloat = 200.0
    """Size limit of the folder, in 10^9 bytes. What is read last goes last."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one request may take. Shards are read 16 MiB at a time."""
    deadline_s: Annotated[float, Field(gt=0.0, le=480.0)] = 300.0
    """Seconds after which a read that keeps failing is given up. Ranks wait for each other for
    10 minutes."""


@dataclass(frozen=True)
class Phase:
    """A part of a run with one batch size, sequence length and mixture."""

    first_step: int
    """The optimizer step (0 is the first) with which it begins."""
    batch_size: int
    """Rows in a step, over all ranks."""
    seq_len: int
    """Tokens in a row."""
    weights: tuple[float, ...]
    """Share of each source; any positive scale."""


class DataConfig(Section):
    """Which tokens are read, and in what phases."""

    dataset: str | None = None
    """Folder of shards made by ``hourglass data`` (the folder that holds index.json), or its
    address: s3://, gs://, http:// or https://. For one source; for more see ``sources``."""
    sources: list[SourceConfig] = Field(default_factory=list)
    """The datasets of a mixture, all of one tokenizer."""
    seq_len: PositiveInt
    """Tokens in one row. Must divide the block size of the shards."""
    batch_size: PositiveInt
    """Rows in one optimizer step, over all ranks and all accumulation steps together."""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Early parts of the run with other batch sizes, sequence lengths or weights, in order. After
    the last one the settings above hold."""
    isolate_documents: bool = False
    """Documents that share a row do not see each other."""
    skip_shards: list[str] = Field(default_factory=list)
    """Training shards to leave out, as SOURCE/FILE such as web/train-000017.tar (one dataset is the
    source ``data``). Their rows stay in their places, without a target. May grow when a run is
    continued; checkpoints remember it."""
    cache: CacheConfig = CacheConfig()

    @model_validator(mode="after")
    def _sources_and_phases(self) -> DataConfig:
        if (self.dataset is None) == (not self.sources):
            given = "neither" if self.dataset is None else "both"
            raise ValueError(f"data: expected dataset or sources, given {given}")
        names = [source.name for source in self.all_sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"data.sources: name {name!r} is given {names.count(name)} times")
        last = 0
        for index, phase in enumerate(self.phases):
            if phase.until_step <= last:
                raise ValueError(
                    f"data.phases.{index}.until_step: expected more than {last}, where it begins, "
                    f"given {phase.until_step}"
                )
            last = phase.until_step
            for name in phase.weights:
                if name not in names:
                    raise ValueError(
                        f"data.phases.{index}.weights: no source {name!r}; there are "
                        f"{', '.join(names)}"
                    )
        return self

    @property
    def all_sources(self) -> list[SourceConfig]:
        """The sources; one dataset is a source called ``data``."""
        if self.dataset is not None:
            return [SourceConfig(name="data", path=self.dataset)]
        return self.sources

    @property
    def all_phases(self) -> list[Phase]:
        """The phases and what comes after them, from step 0 on."""
        usual = {source.name: source.weight for source in self.all_sources}
        phases, first = [], 0
        for early in self.phases:
            batch_size, seq_len = early.batch_size or self.batch_size, early.seq_len or self.seq_len
            weights = tuple((usual | early.weights).values())
            phases.append(Phase(first, batch_size, seq_len, weights))
            first = early.until_step
        return [*phases, Phase(first, self.batch_size, self.seq_len, tuple(usual.values()))]

    @property
    def longest(self) -> int:
        """Tokens in the longest row of the run."""
        return max(phase.seq_len for phase in self.all_phases)

    def tokens(self, step: int) -> int:
        """Tokens that the steps before ``step`` take, padding included."""
        phases = self.all_phases
        ends = [*(phase.first_step for phase in phases[1:]), step]
        return sum(
            max(0, min(end, step) - phase.first_step) * phase.batch_size * phase.seq_len
            for phase, end in zip(phases, ends, strict=True)
        )
