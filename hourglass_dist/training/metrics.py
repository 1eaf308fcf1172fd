"""Metrics of a run: console lines, metric writers such as TensorBoard, and ``metrics.jsonl``.

    {"step": 500, "train/loss": 1.93, "train/bits_per_byte": 2.78, ...}      every few steps
    {"step": 500, "heldout/loss": 1.95, "heldout/bits_per_byte": 2.81, ...}  at every evaluation
    {"step": 500, "time/checkpoint_seconds": 0.4, ...}                       after every pause

``positions.jsonl`` has held-out scores by offset in a bucket, ``samples.jsonl`` generated text.

The writers get the same values as the files. A resumed run first removes what an interrupted one
recorded past its checkpoint. docs/training.md explains every name.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hourglass_dist.config.loader import to_yaml
from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.core.records import append_jsonl, forget_after
from hourglass_dist.core.text import show_duration
from hourglass_dist.data.batch import Batch
from hourglass_dist.engine.engine import Engine, StepResult
from hourglass_dist.health.history import History
from hourglass_dist.health.stragglers import Stragglers, spread
from hourglass_dist.inference.score import Evaluation, count_bytes
from hourglass_dist.model.layout import missed_buckets
from hourglass_dist.report.diagram import as_text
from hourglass_dist.training.level_stats import LevelStats
from hourglass_dist.training.samples import Sample
from hourglass_dist.training.throughput import Throughput, memory
from hourglass_dist.training.writers import Writer, open_writers

USEFUL = "time/useful_seconds"


class Metrics:
    """Recorder of the metrics of a run; only the main rank writes."""

    def __init__(
        self,
        history: History,
        config: Config,
        byte_lengths_V: np.ndarray,
        engine: Engine,
        world: ranks.World,
        throughput: Throughput,
        plan: str,
    ) -> None:
        """Continue after the steps done in ``history``; ``plan`` is a text for the writers."""
        self._config, self._world, self._history = config, world, history
        self._byte_lengths_V = byte_lengths_V
        self._level_stats = LevelStats(engine)
        self._throughput = throughput
        self._folder = Path(config.run.dir)
        self._jsonl = self._folder / "metrics.jsonl"
        self._positions = self._folder / "positions.jsonl"
        self._samples = self._folder / "samples.jsonl"
        self._writers: list[Writer] = []
        self._losing = False
        self._stragglers = Stragglers(ranks.gather_texts(platform.node(), world.device))
        self.go_back(history.step)
        if world.is_main:
            self._write_settings(history.step, plan)

    def go_back(self, step: int) -> None:
        """Continue after ``step`` and remove what was recorded past it."""
        self._history.step = step
        useful = 0.0
        if self._world.is_main:
            known = forget_after(self._jsonl, step)
            forget_after(self._positions, step)
            forget_after(self._samples, step)
            useful = max((record.get(USEFUL, 0.0) for record in known), default=0.0)
            self.close()
            first = int(self._history.first_start)
            name = f"{self._folder.resolve().name}-{first}"
            self._writers = open_writers(self._config.metrics.writers, self._folder, name, step)
        steps, tokens = self._config.train.steps, self._config.data.tokens
        self._clock = Clock(steps, tokens, step, useful)

    def _write_settings(self, step: int, plan: str) -> None:
        """Write model, plan and settings as texts of the writers."""
        texts = {
            "model": as_text(self._config.model),
            "plan": plan,
            "config": to_yaml(self._config),
        }
        for writer in self._writers:
            writer.texts(step, texts)

    def records(self, step: int) -> bool:
        """Return whether completed step ``step`` is recorded."""
        return due(step, self._config.metrics.every) or step in (1, self._config.train.steps)

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Collect statistics of the step inside this context if ``step`` is recorded."""
        with self._level_stats.collecting(self.records(step)):
            yield

    def record(
        self,
        step: int,
        result: StepResult,
        batch: Batch,
        epochs: Callable[[int], dict[str, float]],
        skipped: int,
    ) -> None:
        """Record completed step ``step`` (1 is the first). Called by all ranks, each with its rows
        of the batch; ``epochs(step)`` returns how often each source has been read, ``skipped`` is
        the number of skipped steps of the run."""
        own = self._level_stats.own_seconds()
        self._clock.tick(step, batch.waited_s, own, result.applied)
        self._history.step = step
        if not self.records(step):
            return
        size = count_bytes(batch.targets_BL, self._byte_lengths_V)
        missed, wanted = missed_buckets(self._config.model, batch.tokens_BL, batch.documents_BL)
        share, own_mean = self._clock.shares()
        used = memory(self._world.device)
        mine = [size, missed, wanted, own_mean, *used.values(), *self._level_stats.local_sums()]
        everyone = ranks.gather_floats(mine, self._world.device)
        if not self._world.is_main:
            return
        sizes, missed_each, wanted_each, seconds, *_ = zip(*everyone, strict=True)
        values = {
            "train/loss": result.loss,
            "train/bits_per_byte": result.nll / math.log(2) / max(1.0, sum(sizes)),
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "train/data_wait": share,
            "train/skipped_steps": skipped,
        }
        values |= {f"data/{name}/epochs": read for name, read in epochs(step).items()}
        if any(wanted_each):  # buckets begin at words or documents; some starts got no bucket
            values["train/missed_buckets"] = sum(missed_each) / sum(wanted_each)
        speed = self._clock.tokens_per_second
        bytes_per_token = sum(sizes) / max(1, result.tokens)
        values |= self._throughput.metrics(speed, bytes_per_token, batch.tokens_BL.shape[1])
        values |= self._times() | spread(seconds)
        if told := self._stragglers.check(step, values):
            self.say(told)
        start = 4 + len(used)
        for index, name in enumerate(used, start=4):
            values[f"memory/{name}"] = max(rank[index] for rank in everyone)
        inside = [rank[start:] for rank in everyone]
        values |= self._level_stats.metrics(inside, result.grad_norm)
        self._write(step, values)
        self._show(self._line(step, values))

    def _times(self) -> dict[str, float]:
        useful, age = self._clock.useful_seconds, time.time() - self._history.first_start
        return {USEFUL: useful, "train/goodput": useful / max(age, useful, 1e-9)}

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        total = self._config.train.steps
        mfu = f"mfu {values['train/mfu']:.1%}  " if "train/mfu" in values else ""
        return (
            f"step {step:>{len(str(total))}}/{total}  loss {values['train/loss']:.4f}  "
            f"bits/byte {values['train/bits_per_byte']:.4f}  lr {values['train/lr']:.1e}  "
            f"grad {values['train/grad_norm']:.2f}  "
            f"{values['train/tokens_per_second']:,.0f} tokens/s  {mfu}"
            f"{show_duration(self._clock.seconds_left)} left"
        )

    @contextmanager
    def pause(self, name: str | None = None) -> Iterator[None]:
        """Exclude the time inside this context from the speed of steps; with a ``name`` record it
        as ``time/NAME_seconds``."""
        begun = time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        self._clock.pause(seconds)
        if name and self._world.is_main:
            self._write(self._history.step, {f"time/{name}_seconds": seconds, **self._times()})

    def record_eval(self, step: int, evaluation: Evaluation, kind: str, title: str) -> None:
        """Record held-out scores after ``step`` under ``KIND/...``: over all text, and of each
        source where there are several."""
        if not self._world.is_main:
            return
        whole = evaluation.whole
        values: dict[str, float] = {}
        several = evaluation.sources if len(evaluation.sources) > 1 else {}
        for prefix, score in [(kind, whole), *((f"{kind}/{n}", s) for n, s in several.items())]:
            values |= {
                f"{prefix}/loss": score.loss,
                f"{prefix}/bits_per_byte": score.bits_per_byte,
                f"{prefix}/bytes": score.bytes,
            }
        self._write(step, values)
        each = ", ".join(f"{name} {score.bits_per_byte:.4f}" for name, score in several.items())
        self.say(
            f"step {step}: {title}: loss {whole.loss:.4f} nats/token, "
            f"{whole.bits_per_byte:.4f} bits/byte over {whole.bytes:,} bytes"
            + (f" ({each})" if each else "")
        )

    def record_positions(self, step: int, evaluation: Evaluation, strides: Sequence[int]) -> None:
        """Record held-out bits per byte by offset in a bucket, for buckets of each stride."""
        if not self._world.is_main:
            return
        for stride in strides:
            scores = evaluation.by_place(stride)
            bits = [score.bits_per_byte for score in scores]
            if not all(map(math.isfinite, bits)):
                continue
            record = {"step": step, "stride": stride, "bits_per_byte": bits}
            record |= {"bytes": [score.bytes for score in scores]}
            name = f"heldout/place_of_{stride}"
            self._note(self._positions, record, partial(histogram, step, name, bits))

    def record_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record the text that the model generated after ``step``; called by the main rank."""
        for number, (prompt, text) in enumerate(samples):
            record = {"step": step, "prompt": prompt, "text": text}
            told = {f"samples/{number}": f"{prompt}▸{text}"}
            self._note(self._samples, record, partial(texts, step, told))

    def say(self, line: str) -> None:
        """Print a line on the console that stays there, on the main rank."""
        if self._world.is_main:
            print(f"\r\033[K{line}" if sys.stdout.isatty() else line, flush=True)

    def _show(self, line: str) -> None:
        """Print a line that the next one overwrites on a terminal, and that stays in a log file."""
        print(f"\r\033[K{line}", end="", flush=True) if sys.stdout.isatty() else self.say(line)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._note(self._jsonl, {"step": step, **values}, partial(scalars, step, values))

    def _note(self, path: Path, record: Mapping[str, Any], tell: Callable[[Writer], None]) -> None:
        """Append a record to a file and pass it to the writers. On any error (a full disk, a server
        that is gone) the record is lost and the run continues."""
        try:
            append_jsonl(path, record)
            for writer in self._writers:
                tell(writer)
            self._losing = False
        except Exception as error:  # a library may raise anything
            if not self._losing:
                self.say(f"numbers of step {record['step']} are lost, training continues: {error}")
            self._losing = True

    def close(self) -> None:
        """Close the writers."""
        for writer in self._writers:
            with suppress(Exception):  # the numbers are in metrics.jsonl
                writer.close()


def scalars(step: int, values: Mapping[str, float], writer: Writer) -> None:
    """Write scalars to one writer."""
    writer.scalars(step, values)


def texts(step: int, told: Mapping[str, str], writer: Writer) -> None:
    """Write texts to one writer."""
    writer.texts(step, told)


def histogram(step: int, name: str, heights: Sequence[float], writer: Writer) -> None:
    """Write a histogram to one writer."""
    writer.histogram(step, name, heights)


class Clock:
    """Clock for the speed of training steps and the time left."""

    def __init__(
        self, steps: int, tokens: Callable[[int], int], step: int, useful_seconds: float = 0.0
    ) -> None:
        """Start now, after ``step`` of ``steps`` steps, which took ``useful_seconds``;
        ``tokens(step)`` returns the tokens of the first ``step`` steps."""
        self._steps = steps
        self._tokens = tokens
        self._step = step
        self._last = time.perf_counter()
        self._smooth = 0.0
        self._waited = self._own = self._spent = 0.0
        self._ticks = 0
        self.useful_seconds = useful_seconds
        """Time of all useful steps, seconds: steps repeated after a restart count once, skipped
        steps not at all."""

    def tick(self, step: int, waited: float, own: float, counts: bool) -> None:
        """Add a completed step, with ``waited`` seconds for data and ``own`` seconds in this rank's
        forward passes; the moving average of its time spans about 20 steps."""
        now = time.perf_counter()
        seconds, self._last, self._step = now - self._last, now, step
        self._smooth = 0.95 * self._smooth + 0.05 * seconds if self._smooth else seconds
        self._waited += waited
        self._own += waited + own
        self._spent += seconds
        self._ticks += 1
        self.useful_seconds += seconds if counts else 0.0

    def pause(self, seconds: float) -> None:
        """Exclude ``seconds`` that were not spent on steps."""
        self._last += seconds

    def shares(self) -> tuple[float, float]:
        """Return, since the last call, the share of time that this rank waited for data, and its
        own seconds per step, the mean time for data and forward passes."""
        share = self._waited / self._spent if self._spent else 0.0
        own = self._own / max(1, self._ticks)
        self._waited = self._own = self._spent = 0.0
        self._ticks = 0
        return share, own

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all ranks, from the moving average."""
        tokens = self._tokens(self._step) - self._tokens(self._step - 1)
        return tokens / self._smooth if self._smooth else 0.0

    @property
    def seconds_left(self) -> float:
        """Seconds until the last step, without evaluations."""
        return (self._steps - self._step) * self._smooth


def due(step: int, every: int) -> bool:
    """Return whether ``step`` is a multiple of ``every``."""
    return step % every == 0
