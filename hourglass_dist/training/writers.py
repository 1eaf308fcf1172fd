"""Writers of metrics besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow.

The last two are not installed with this package. Project, server and keys come from their own
environment variables (``WANDB_PROJECT``, ``MLFLOW_TRACKING_URI``, ...), so none is in a settings
file. A resumed run continues the same record.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hourglass_dist.config.loader import ConfigError
from hourglass_dist.core.files import replace


class Writer(Protocol):
    """Destination of scalars, texts and histograms."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by name, of completed step ``step``."""

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts by name, of completed step ``step``."""

    def histogram(self, step: int, name: str, heights: Sequence[float]) -> None:
        """Write a histogram with bar heights at 0, 1, 2, ..., of completed step ``step``."""

    def close(self) -> None:
        """Close the writer, after the last value."""


class TensorBoard:
    """Writer of TensorBoard event files in the run folder."""

    def __init__(self, run: Path, name: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: by rank 0 alone

        self._events = SummaryWriter(str(run), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars to the event files."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts to the event files, indented, which Markdown shows as preformatted."""
        for name, text in texts.items():
            self._events.add_text(name, "".join(f"    {x}\n" for x in text.splitlines()), step)

    def histogram(self, step: int, name: str, heights: Sequence[float]) -> None:
        """Write a histogram to the event files."""
        count = len(heights)
        self._events.add_histogram_raw(
            name,
            *(0, count, count, sum(heights), sum(each**2 for each in heights)),
            bucket_limits=[place + 1 for place in range(count)],
            bucket_counts=list(heights),
            global_step=step,
        )

    def close(self) -> None:
        """Close the event files."""
        self._events.close()


class Wandb:
    """Writer to a run of Weights & Biases whose id is the run folder's name and first start."""

    def __init__(self, run: Path, name: str, step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(dir=str(run), id=name, name=run.resolve().name, resume="allow")
        self._run.define_metric("*", step_metric="step")  # steps may be repeated

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars to the run."""
        self._run.log({"step": step, **values})

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts to the settings of the run."""
        self._run.config.update(dict(texts), allow_val_change=True)

    def histogram(self, step: int, name: str, heights: Sequence[float]) -> None:
        """Log one scalar for each bar of a histogram."""
        self.scalars(step, {f"{name}/{place}": each for place, each in enumerate(heights)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MLflow:
    """Writer to a run of MLflow, whose id is kept in the run folder."""

    def __init__(self, run: Path, name: str, step: int) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        known = run / "mlflow_run_id"
        run_id = known.read_text().strip() if known.exists() else None
        started = self._mlflow.start_run(run_id=run_id, run_name=None if run_id else name)
        replace(known, f"{started.info.run_id}\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars to the run, asynchronously."""
        self._mlflow.log_metrics(dict(values), step=step, synchronous=False)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Log texts as files of the run."""
        for name, text in texts.items():
            self._mlflow.log_text(text, f"{name}.txt")

    def histogram(self, step: int, name: str, heights: Sequence[float]) -> None:
        """Log one scalar for each bar of a histogram."""
        self.scalars(step, {f"{name}/{place}": each for place, each in enumerate(heights)})

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


WRITERS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


def require_writers(names: Sequence[str]) -> None:
    """Raise ConfigError when the package of one of ``names`` is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"metrics.writers: the package {name} is not installed: pip install {name}, or "
                "leave it out"
            )


def open_writers(names: Sequence[str], run: Path, name: str, step: int) -> list[Writer]:
    """Return the writers of a run folder, to continue after ``step`` steps; ``name`` identifies the
    run and never changes."""
    return [WRITERS[each](run, name, step) for each in dict.fromkeys(names)]
