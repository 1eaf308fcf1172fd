"""The ``data`` section of a run's settings: the tokens that are read, and the phases of a run."""

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
    """Name of the dataset in messages, metrics and ``skip_shards``."""
    path: str
    """Folder or address of the dataset, as in ``data.dataset``."""
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Share of the rows, on any scale; it is exact to a thousandth of all rows."""
    max_epochs: PositiveInt | None = None
    """Maximum number of epochs. A run that would need more is refused at its start."""


class PhaseConfig(Section):
    """An early part of a run with its own settings. Settings left out are those of the run."""

    until_step: PositiveInt
    """Optimizer step after which the phase ends."""
    seq_len: PositiveInt | None = None
    """Tokens in one row. Must divide the longest row length of the run."""
    batch_size: PositiveInt | None = None
    """Rows in one optimizer step, over all ranks."""
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)
    """Weights of the sources by name; 0 leaves a source out."""


class CacheConfig(Section):
    """Disk cache of the shards of an object store or web server."""

    dir: str = "data/cache"
    """Folder on a local disk. Runs and ranks may share it."""
    max_gb: PositiveFloat = 200.0
    """Size limit of the folder, in 10^9 bytes. The least recently used shards are removed first."""
    timeout_s: PositiveFloat = 60.0
    """Timeout of one request, seconds. Shards are read 16 MiB at a time."""
    deadline_s: Annotated[float, Field(gt=0.0, le=480.0)] = 300.0
    """Time after which a failing read is given up, seconds. Ranks wait for each other for 10
    minutes."""


@dataclass(frozen=True)
class Phase:
    """Part of a run with one batch size, sequence length and mixture."""

    first_step: int
    """First optimizer step of the phase; 0 is the first of the run."""
    batch_size: int
    """Rows in one optimizer step, over all ranks."""
    seq_len: int
    """Tokens in one row."""
    weights: tuple[float, ...]
    """Share of each source, on any positive scale."""


class DataConfig(Section):
    """The tokens that are read, and the phases of a run."""

    dataset: str | None = None
    """Dataset folder made by ``hourglass data`` (the folder that holds index.json), or its address:
    s3://, gs://, http:// or https://. For several datasets use ``sources``."""
    sources: list[SourceConfig] = Field(default_factory=list)
    """Datasets of a mixture, all with the same tokenizer."""
    seq_len: PositiveInt
    """Tokens in one row. Must divide the block size of the shards."""
    batch_size: PositiveInt
    """Rows in one optimizer step, over all ranks and all accumulation steps together."""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Early parts of the run with other batch sizes, sequence lengths or weights, in order. The
    settings above hold after the last one."""
    isolate_documents: bool = False
    """Whether documents that share a row are kept from seeing each other."""
    skip_shards: list[str] = Field(default_factory=list)
    """Training shards to leave out, as SOURCE/FILE such as web/train-000017.tar (the source of a
    single dataset is called ``data``). Their rows keep their positions but have no targets. The
    list may grow when a run is continued; checkpoints store it."""
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
        """All sources; a single dataset is a source called ``data``."""
        if self.dataset is not None:
            return [SourceConfig(name="data", path=self.dataset)]
        return self.sources

    @property
    def all_phases(self) -> list[Phase]:
        """All phases of the run from step 0 on; the last one follows the early phases."""
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
        """Return the number of tokens, padding included, that the steps before ``step`` read."""
        phases = self.all_phases
        ends = [*(phase.first_step for phase in phases[1:]), step]
        return sum(
            max(0, min(end, step) - phase.first_step) * phase.batch_size * phase.seq_len
            for phase, end in zip(phases, ends, strict=True)
        )
