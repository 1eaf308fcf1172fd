"""What a person sees of a run: a console line, TensorBoard events, and ``metrics.jsonl``.

    {"step": 500, "train/loss": 1.93, "train/bits_per_byte": 2.78, ...}      every few steps
    {"step": 500, "heldout/loss": 1.95, "heldout/bits_per_byte": 2.81, ...}  at every evaluation

``positions.jsonl`` has held-out scores by place in the bucket, ``samples.jsonl`` what the model
writes.

All three say the same. A resumed run first forgets what an interrupted one recorded past its
checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from hourglass_dist import dist
from hourglass_dist.config import Config
from hourglass_dist.data.stream import Batch
from hourglass_dist.engine import StepResult
from hourglass_dist.evaluate import Evaluation, count_bytes
from hourglass_dist.files import replace
from hourglass_dist.model.layout import missed_buckets
from hourglass_dist.samples import Sample


class Metrics:
    """Records on the main rank; on the others every method does nothing."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        byte_lengths_V: np.ndarray,
        first_step: int,
        world: dist.World,
    ) -> None:
        self._config = config
        self._byte_lengths_V = byte_lengths_V
        self._world = world
        self._clock = Clock(config.train.steps, config.data.tokens, first_step)
        if world.is_main:
            self._jsonl, self._positions = folder / "metrics.jsonl", folder / "positions.jsonl"
            self._samples = folder / "samples.jsonl"
            for path in (self._jsonl, self._positions, self._samples):
                forget_after(path, first_step)
            self._events = SummaryWriter(str(folder), purge_step=first_step + 1)

    def record(
        self,
        step: int,
        result: StepResult,
        batch: Batch,
        epochs: Callable[[int], dict[str, float]],
        skipped: int,
    ) -> None:
        """Note completed step ``step`` (1 is the first). Called by all ranks, each with its rows of
        the batch; ``epochs(step)`` is how often each source has been read, ``skipped`` how many
        steps of the run changed nothing."""
        self._clock.tick(step, batch.waited_s)
        total = self._config.train.steps
        if not (due(step, self._config.metrics.every) or step in (1, total)):
            return
        mine = count_bytes(batch.targets_BL, self._byte_lengths_V)
        buckets = missed_buckets(self._config.model, batch.tokens_BL, batch.documents_BL)
        size, missed, wanted = dist.sum_over_ranks([mine, *buckets], self._world.device)
        values = {
            "train/loss": result.loss,
            "train/bits_per_byte": result.nll / math.log(2) / max(1.0, size),
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "train/tokens_per_second": self._clock.tokens_per_second,
            "train/data_wait": self._clock.share_waited(),
            "train/skipped_steps": skipped,
        }
        values |= {f"data/{name}/epochs": read for name, read in epochs(step).items()}
        if wanted:  # buckets begin at words or documents: how many of those had no room
            values["train/missed_buckets"] = missed / wanted
        if self._world.is_main:
            self._write(step, values)
            self._show(
                f"step {step:>{len(str(total))}}/{total}  loss {result.loss:.4f}  "
                f"bits/byte {values['train/bits_per_byte']:.4f}  lr {result.lr:.1e}  "
                f"grad {result.grad_norm:.2f}  {self._clock.tokens_per_second:,.0f} tokens/s  "
                f"{clock_time(self._clock.seconds_left)} left"
            )

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside is not spent on steps and does not count in their speed."""
        begun = time.perf_counter()
        yield
        self._clock.pause(time.perf_counter() - begun)

    def record_eval(self, step: int, found: Evaluation, kind: str, title: str) -> None:
        """Note held-out scores after ``step`` under ``KIND/...``: the whole, and each source where
        there are several."""
        if not self._world.is_main:
            return
        whole = found.whole
        values: dict[str, float] = {}
        several = found.sources if len(found.sources) > 1 else {}
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

    def record_places(self, step: int, found: Evaluation, strides: Sequence[int]) -> None:
        """Note held-out bits per byte by place in the bucket, for buckets of these strides."""
        if not self._world.is_main:
            return
        for stride in strides:
            scores = found.by_place(stride)
            bits = [score.bits_per_byte for score in scores]
            if not all(map(math.isfinite, bits)):
                continue
            record = {"step": step, "stride": stride, "bits_per_byte": bits}
            append(self._positions, record | {"bytes": [score.bytes for score in scores]})
            self._events.add_histogram_raw(
                f"heldout/place_of_{stride}",
                *(0, stride, stride, sum(bits), sum(each**2 for each in bits)),
                bucket_limits=[place + 1 for place in range(stride)],
                bucket_counts=bits,
                global_step=step,
            )

    def record_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Note what the model wrote after ``step``. Called by the main rank."""
        for number, (prompt, text) in enumerate(samples):
            append(self._samples, {"step": step, "prompt": prompt, "text": text})
            quoted = "".join(f"    {line}\n" for line in f"{prompt}▸{text}".splitlines())
            self._events.add_text(f"samples/{number}", quoted, step)

    def say(self, line: str) -> None:
        """One lasting line on the console."""
        if self._world.is_main:
            print(f"\r\033[K{line}" if sys.stdout.isatty() else line, flush=True)

    def _show(self, line: str) -> None:
        """A line that the next one overwrites on a terminal, and that stays in a log file."""
        print(f"\r\033[K{line}", end="", flush=True) if sys.stdout.isatty() else self.say(line)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        append(self._jsonl, {"step": step, **values})
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the TensorBoard file."""
        if self._world.is_main:
            self._events.close()


class Clock:
    """Speed and time left, from the time that training steps took."""

    def __init__(self, steps: int, tokens: Callable[[int], int], step: int) -> None:
        """Starts now, after ``step`` completed steps of ``steps``; ``tokens(step)`` are read before
        a step."""
        self._steps = steps
        self._tokens = tokens
        self._step = step
        self._last = time.perf_counter()
        self._smooth = 0.0
        self._waited = self._spent = 0.0

    def tick(self, step: int, waited: float) -> None:
        """A step is completed, ``waited`` seconds of it for data; the average forgets with a
        horizon of 20 steps."""
        now = time.perf_counter()
        seconds, self._last, self._step = now - self._last, now, step
        self._smooth = 0.95 * self._smooth + 0.05 * seconds if self._smooth else seconds
        self._waited += waited
        self._spent += seconds

    def pause(self, seconds: float) -> None:
        """Take out time that was not spent on steps."""
        self._last += seconds

    def share_waited(self) -> float:
        """The share of the time since the last call that this rank waited for data."""
        share = self._waited / self._spent if self._spent else 0.0
        self._waited = self._spent = 0.0
        return share

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        tokens = self._tokens(self._step) - self._tokens(self._step - 1)
        return tokens / self._smooth if self._smooth else 0.0

    @property
    def seconds_left(self) -> float:
        """Until the last step, evaluations left out."""
        return (self._steps - self._step) * self._smooth


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after ``step``."""
    return step % every == 0


def clock_time(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Drop the records of a file of JSON lines past ``step`` and a last line that a killed process
    left unfinished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    replace(path, "".join(kept))
