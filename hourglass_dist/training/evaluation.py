"""Evaluations during a run: held-out scores, and samples of generated text.

They do not change the training: they draw from no random generator that a step uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.data.batch import Batch
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.mixture import Dataset
from hourglass_dist.data.tokenizer import Tokenizer
from hourglass_dist.engine.engine import Engine
from hourglass_dist.inference.score import Evaluation, Score, evaluate, fixed_strides
from hourglass_dist.training.metrics import Metrics
from hourglass_dist.training.samples import prompts_of_rows, prompts_of_text, write_samples


class Evaluations:
    """Evaluations of one run; every method is called by all ranks."""

    def __init__(
        self,
        config: Config,
        datasets: Sequence[Dataset],
        tokenizer: Tokenizer,
        engine: Engine,
        world: ranks.World,
        watching: Callable[[Iterator[Batch]], Iterator[Batch]],
    ) -> None:
        """Prepare the prompts; ``watching`` yields batches and reports each to the watchdog.

        Raises ValueError, on all ranks, for a prompt that is not valid for the tokenizer.
        """
        self._config, self._datasets, self._tokenizer = config, datasets, tokenizer
        self._engine, self._world, self._watching = engine, world, watching
        self._strides = fixed_strides(config.model)
        self._prompts: list[list[int]] = []
        if config.eval.samples:
            self._prompts = ranks.raise_on_all_ranks(self._find_prompts, world.device)

    def make(self, step: int, metrics: Metrics) -> Score:
        """Score the held-out text after ``step``, record it and return the score of all sources.

        After the last step also score with sliding windows if ``eval.stride`` is set. Raises
        ValueError, on all ranks, when held-out text can no longer be read.
        """
        with metrics.pause("evaluation"):
            scores = self._score(sliding=False)
        metrics.record_eval(step, scores, "heldout", "held out")
        metrics.record_positions(step, scores, self._strides[1:])
        stride = self._config.eval.stride
        if stride and step == self._config.train.steps:
            with metrics.pause("evaluation"):
                last = self._score(sliding=True)
            windows = f"held out, {self._config.eval_context} tokens every {stride}"
            metrics.record_eval(step, last, "sliding", windows)
        if self._config.eval.samples:
            with metrics.pause("samples"):
                self._write_samples(step, metrics)
        return scores.whole

    def _find_prompts(self) -> list[list[int]]:
        if given := self._config.eval.prompts:
            return prompts_of_text(given, self._tokenizer)
        rows = held_out(self._config, self._datasets, self._world)
        return prompts_of_rows(rows, self._config.eval.samples) or [[self._tokenizer.eos_id]]

    def _write_samples(self, step: int, metrics: Metrics) -> None:
        weights = {n: w for n, w in self._engine.weights() if self._world.is_main}

        def write() -> None:
            if self._world.is_main:
                model, run, settings = self._config.model, self._config.run, self._config.eval
                samples = write_samples(
                    model, weights, self._tokenizer, self._prompts, settings.samples, run.seed
                )
                metrics.record_samples(step, samples)

        ranks.raise_on_all_ranks(write, self._world.device)

    def _score(self, sliding: bool) -> Evaluation:
        rows = ranks.raise_on_all_ranks(
            partial(held_out, self._config, self._datasets, self._world, sliding),
            self._world.device,
        )
        return evaluate(
            self._engine.eval_loss,
            self._watching(rows),
            self._tokenizer.byte_lengths(),
            self._world,
            [dataset.name for dataset in self._datasets],
            self._strides[-1],
        )


def held_out(
    config: Config, datasets: Sequence[Dataset], world: ranks.World, sliding: bool = False
) -> Iterator[Batch]:
    """Return this rank's batches of held-out rows, every token once over all ranks; ``sliding``: in
    windows of ``eval.context`` and ``eval.stride``. Raises ValueError as ``held_out_rows`` does."""
    return held_out_rows(
        datasets,
        config.eval_context if sliding else config.data.seq_len,
        config.eval.batch_size,
        world.rank,
        world.size,
        config.data.isolate_documents,
        stride=config.eval.stride if sliding else None,
    )


def check_held_out(config: Config, datasets: Sequence[Dataset], world: ranks.World) -> None:
    """Verify this rank's share of the held-out shards. Raises ValueError where a later evaluation
    would fail."""
    held_out(config, datasets, world)
    if config.eval.stride:
        held_out(config, datasets, world, sliding=True)
