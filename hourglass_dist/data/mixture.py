"""Open datasets and the plan of their order, from the ``data`` section of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hourglass_dist.config.data import CacheConfig, DataConfig
from hourglass_dist.core.remote import is_remote
from hourglass_dist.data.data_plan import DataPlan, Source
from hourglass_dist.data.manifest import Manifest
from hourglass_dist.data.order import require_enough
from hourglass_dist.data.remote import Cache, Remote, RemoteStore, fetch_index
from hourglass_dist.data.shards import LocalStore, Store
from hourglass_dist.data.tokenizer import Tokenizer, load_tokenizer, require_same


@dataclass(frozen=True)
class Dataset:
    """A dataset with its name in a run."""

    name: str
    where: str
    """Folder or address as given."""
    manifest: Manifest
    store: Store

    @property
    def is_remote(self) -> bool:
        """Whether its shards are downloaded."""
        return is_remote(self.where)


def open_dataset(where: str, name: str = "data", cache: CacheConfig | None = None) -> Dataset:
    """Return the dataset of a folder or address. Its shards are not checked yet.

    Raises ValueError when it is missing, damaged or cannot be read.
    """
    if not is_remote(where):
        manifest = Manifest.load(Path(where))
        return Dataset(name, where, manifest, LocalStore(manifest))
    settings = cache or CacheConfig()
    remote, files = Remote(where, settings), Cache(settings)
    manifest = fetch_index(remote, files)
    return Dataset(name, where, manifest, RemoteStore(remote, manifest, files))


def open_mixture(data: DataConfig) -> tuple[list[Dataset], Tokenizer]:
    """Return all sources and their tokenizer. Raises ValueError when the tokenizers differ."""
    datasets = [open_dataset(s.path, s.name, data.cache) for s in data.all_sources]
    first = datasets[0]
    tokenizer = load_tokenizer(first.manifest.folder)
    for dataset in datasets:
        require_same(
            dataset.manifest.tokenizer,
            tokenizer.fingerprint,
            "the shards" if dataset is first else f"the shards of {dataset.where}",
            f"{first.where}'s tokenizer",
        )
    return datasets, tokenizer


def make_plan(datasets: Sequence[Dataset], data: DataConfig, seed: int, steps: int) -> DataPlan:
    """Return the plan of the order of ``steps`` steps.

    Raises ValueError when sequence lengths, phases or weights do not fit the datasets or each
    other, or a source would be read more often than it may be.
    """
    phases = [phase for phase in data.all_phases if phase.first_step < steps]
    longest = max(phase.seq_len for phase in phases)
    plan = DataPlan(
        sources=tuple(
            Source(
                dataset.name,
                dataset.manifest.dataset_id,
                dataset.manifest.rows("train", longest),
                source.max_epochs,
            )
            for dataset, source in zip(datasets, data.all_sources, strict=True)
        ),
        phases=tuple(phases),
        seed=seed,
        lanes=max(phase.batch_size for phase in phases),
    )
    require_enough(plan, steps)
    return plan


def simple_plan(dataset: Dataset, seq_len: int, batch_size: int, seed: int) -> DataPlan:
    """Return the plan of one dataset with one batch size and sequence length."""
    data = DataConfig(dataset=dataset.where, seq_len=seq_len, batch_size=batch_size)
    return make_plan([dataset], data, seed, steps=1)
