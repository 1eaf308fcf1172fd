"""The ``data`` section of a run's settings: which tokens are read, and in what portions."""

from __future__ import annotations

from typing import Annotated, NamedTuple

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


class Portion(NamedTuple):
    """What a step of some part of a run takes from the data."""

    first_step: int
    batch_size: int
    seq_len: int
    weights: tuple[float, ...]


class DataConfig(Section):
    """Which tokens are read, and in what portions."""

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
    def portions(self) -> list[Portion]:
        """The phases and what comes after them, from step 0 on."""
        usual = {source.name: source.weight for source in self.all_sources}
        portions, first = [], 0
        for phase in self.phases:
            portions.append(
                Portion(
                    first,
                    phase.batch_size or self.batch_size,
                    phase.seq_len or self.seq_len,
                    tuple((usual | phase.weights).values()),
                )
            )
            first = phase.until_step
        return [*portions, Portion(first, self.batch_size, self.seq_len, tuple(usual.values()))]

    @property
    def longest(self) -> int:
        """Tokens in the longest row of the run."""
        return max(portion.seq_len for portion in self.portions)

    def tokens(self, step: int) -> int:
        """Tokens that the steps before ``step`` take, padding included."""
        portions = self.portions
        ends = [*(portion.first_step for portion in portions[1:]), step]
        return sum(
            max(0, min(end, step) - p.first_step) * p.batch_size * p.seq_len
            for p, end in zip(portions, ends, strict=True)
        )
