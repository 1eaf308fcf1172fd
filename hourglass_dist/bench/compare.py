"""``hourglass bench compare``: held-out bits per byte of several models at equal training FLOPs.

    one YAML file for each arm: a model, the learning rates to try
    budget / (FLOPs of a token x tokens of a step)  ->  steps of each arm
    every learning rate with seed 0                 ->  the best learning rate of each arm
    that rate with seeds 1, 2, ...                  ->  mean and 95 % interval

Seed 0 only chooses: its score does not count, so no arm gains from the number of rates it tried.
Arms of one seed read the same rows in the same order; an arm with more steps reads further rows. A
run is single-threaded PyTorch, and ``--jobs`` of them run side by side. Finished runs are written
to a file: an interrupted comparison continues from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from hourglass_dist.bench.shared import apart, show
from hourglass_dist.config import shipped
from hourglass_dist.config.loader import Section, parse, read_yaml
from hourglass_dist.config.model import Model, PositiveFloat
from hourglass_dist.config.schema import OptimConfig
from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.manifest import Manifest
from hourglass_dist.data.mixture import open_dataset, simple_plan
from hourglass_dist.data.stream import Stream
from hourglass_dist.data.tokenizer import load_tokenizer
from hourglass_dist.engine.optim import learning_rate, make_optimizer
from hourglass_dist.inference.score import Rows, Score, evaluate
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.settings import ModelConfig
from hourglass_dist.planning.flops import model_flops
from hourglass_dist.planning.parameters import parameters_of

TOLERANCE = 0.02
"""Largest relative difference of the training FLOPs of two arms."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t of a two-sided 95 % interval, for 1, 2, ... degrees of freedom."""
MOST_SEEDS = len(T_975) + 1


class Arm(Section):
    """The settings file of an arm."""

    learning_rates: Annotated[list[PositiveFloat], Field(min_length=1)]
    """Peak learning rates to try; schedule: warm-up over a tenth of the steps, half a cosine."""
    model: Model


class Budget(NamedTuple):
    """The settings that all arms have in common."""

    dataset: Path
    flops: float
    """Training FLOPs of one run."""
    rows: int
    length: int
    """Tokens in a row."""


class Job(NamedTuple):
    """One training run."""

    name: str
    model: ModelConfig
    optim: OptimConfig
    steps: int
    seed: int
    budget: Budget

    def key(self, dataset_id: str) -> str:
        """Return a hash of all settings that decide the run's result."""
        decides = {
            "model": asdict(self.model),
            "optim": self.optim.model_dump(mode="json"),
            "data": [dataset_id, self.budget.rows, self.budget.length, self.steps, self.seed],
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


class Entry(NamedTuple):
    """An arm with its size and cost."""

    name: str
    arm: Arm
    parameters: int
    flops_per_token: float
    """FLOPs of the forward and backward pass of one token."""
    steps: int
    budget: Budget

    @property
    def tokens(self) -> int:
        """Training tokens of one run."""
        return self.steps * self.budget.rows * self.budget.length

    @property
    def flops(self) -> float:
        """Training FLOPs of one run."""
        return self.tokens * self.flops_per_token

    def job(self, lr: float, seed: int) -> Job:
        """Return a run of this arm with a peak learning rate and a seed."""
        optim = OptimConfig(lr=lr, warmup_steps=self.steps // 10)
        return Job(self.name, self.arm.model, optim, self.steps, seed, self.budget)


def read_arms(folder: Path, budget: Budget) -> list[Entry]:
    """Return the arms of a folder, each with its number of steps.

    Raises ValueError when there are none, a file is wrong, or the budget is so small that the FLOPs
    of whole steps differ by more than ``TOLERANCE``.
    """
    folder = shipped.find(folder, suffix="")
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise ValueError(f"{folder}: expected a YAML file for each arm, found none")
    entries = []
    for file in files:
        arm = parse(Arm, read_yaml(file), source=str(file))
        parameters = parameters_of(arm.model).total
        per_token = model_flops(arm.model, budget.length).training_per_token
        steps = max(1, round(budget.flops / (per_token * budget.rows * budget.length)))
        entries.append(Entry(file.stem, arm, parameters, per_token, steps, budget))
    spent = {entry.name: entry.flops for entry in entries}
    least, most = min(spent, key=spent.__getitem__), max(spent, key=spent.__getitem__)
    if spent[most] > (1 + TOLERANCE) * spent[least]:
        raise ValueError(
            f"--flops: {budget.flops:.3g} are too few: whole steps would give {most} "
            f"{spent[most]:.3g} and {least} {spent[least]:.3g}, more than {TOLERANCE:.0%} apart"
        )
    return entries


def bench_compare(
    folder: Path, budget: Budget, seeds: int, jobs: int, out: Path, dry_run: bool
) -> list[dict[str, Any]]:
    """Train the runs that are not in ``out``, print the table and return its rows. Raises
    ValueError for wrong arms, data or results."""
    if not 2 <= seeds <= MOST_SEEDS:
        raise ValueError(f"--seeds: expected 2 to {MOST_SEEDS} for an interval, given {seeds}")
    entries = read_arms(folder, budget)
    manifest, tokenizer = Manifest.load(budget.dataset), load_tokenizer(budget.dataset)
    for entry in entries:
        if entry.arm.model.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"{entry.name}: model.vocab_size: the tokenizer of {budget.dataset} has "
                f"{tokenizer.vocab_size} ids, given {entry.arm.model.vocab_size}"
            )
    _show_arms(entries, seeds)
    if dry_run:
        return []
    results = Results(out, manifest.dataset_id)
    sweep = [entry.job(lr, 0) for entry in entries for lr in entry.arm.learning_rates]
    results.complete(sweep, jobs, later=seeds * len(entries))
    best = [
        min((entry.job(lr, 0) for lr in entry.arm.learning_rates), key=results.bits)
        for entry in entries
    ]
    scored = [job._replace(seed=seed) for job in best for seed in range(1, seeds + 1)]
    results.complete(scored, jobs, later=0)
    return _show_scores(entries, best, scored, results)


# --- one run -------------------------------------------------------------------------------------


def train(job: Job) -> dict[str, float]:
    """Train and score one model, and return its held-out bits per byte and the seconds taken."""
    start, world = time.perf_counter(), ranks.init()
    dataset = open_dataset(str(job.budget.dataset))
    tokenizer = load_tokenizer(job.budget.dataset)
    rows, length = job.budget.rows, job.budget.length
    torch.manual_seed(job.seed)
    model = HourglassLM(job.model).to(world.device)
    model.init_weights(job.seed)
    optimizer = make_optimizer(model, job.optim)
    stream = Stream([dataset], simple_plan(dataset, length, rows, job.seed))
    with closing(stream.batches()) as batches:
        for at in range(job.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(at, job.optim, job.steps)
            nats, count = model(**_on(world.device, next(batches).rows))
            (nats / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.optim.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()

    @torch.no_grad()
    def nats_of(rows: Rows) -> torch.Tensor:
        nats_BL: torch.Tensor = model(**_on(world.device, rows), each_target=True)[0]
        return nats_BL

    held_out = held_out_rows([dataset], length, 4 * rows)
    score = evaluate(nats_of, held_out, tokenizer.byte_lengths(), world).whole
    return {"bits_per_byte": _finite(score), "seconds": time.perf_counter() - start}


def _on(device: torch.device, rows: Rows) -> dict[str, Any]:
    return {name: None if t is None else t.to(device) for name, t in rows.items()}


def _finite(score: Score) -> float:
    """Return the bits per byte, or infinity for a score that is NaN or infinite."""
    return score.bits_per_byte if math.isfinite(score.bits_per_byte) else math.inf


# --- all runs ------------------------------------------------------------------------------------


class Results:
    """A file of JSON lines, one for each finished run, which is replaced atomically."""

    def __init__(self, path: Path, dataset_id: str) -> None:
        """Read the file if it exists. Raises ValueError for a line that is not a result."""
        self.path, self.dataset_id = path, dataset_id
        self.lines: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                found = json.loads(line)
                self.lines[found["key"]] = found
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: expected a result of bench compare") from None

    def bits(self, job: Job) -> float:
        """Return the held-out bits per byte of a finished run."""
        return float(self.lines[job.key(self.dataset_id)]["bits_per_byte"])

    def seconds(self, job: Job) -> float:
        """Return the seconds that a finished run took."""
        return float(self.lines[job.key(self.dataset_id)]["seconds"])

    def complete(self, wanted: Sequence[Job], jobs: int, later: int) -> None:
        """Train the missing runs, ``jobs`` at a time; ``later`` (runs to follow) is for the ETA."""
        missing = [job for job in wanted if job.key(self.dataset_id) not in self.lines]
        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(apart, train, job, threads=1): job for job in missing}
            try:
                taken: list[float] = []
                for future in as_completed(futures):
                    job, result = futures[future], future.result()
                    self._add(job, result)
                    taken.append(result["seconds"])
                    left = len(missing) - len(taken) + later
                    minutes = statistics.mean(taken) * left / jobs / 60
                    print(
                        f"{job.name}, lr {job.optim.lr:g}, seed {job.seed}: "
                        f"{result['bits_per_byte']:.4f} bits/byte, {result['seconds']:.0f} s; "
                        f"{left} runs left, about {minutes:.0f} min",
                        flush=True,
                    )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _add(self, job: Job, result: dict[str, float]) -> None:
        key = job.key(self.dataset_id)
        about = {"arm": job.name, "lr": job.optim.lr, "seed": job.seed, "steps": job.steps}
        self.lines[key] = {**about, **result, "key": key}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace(self.path, "".join(json.dumps(line) + "\n" for line in self.lines.values()))


# --- the tables ----------------------------------------------------------------------------------


def _show_arms(entries: Sequence[Entry], seeds: int) -> None:
    rows = [
        {
            "arm": entry.name,
            "hierarchy": entry.arm.model.hierarchy,
            "parameters": entry.parameters,
            "each": entry.flops_per_token / 1e6,
            "steps": entry.steps,
            "tokens": entry.tokens / 1e6,
            "flops": entry.flops / 1e12,
            "rates": ", ".join(f"{lr:g}" for lr in entry.arm.learning_rates),
        }
        for entry in entries
    ]
    columns = {
        "arm": "{arm}",
        "layers@stride": "{hierarchy}",
        "parameters": "{parameters:,}",
        "MFLOPs/token": "{each:.2f}",
        "steps": "{steps:,}",
        "M tokens": "{tokens:.2f}",
        "TFLOPs": "{flops:.3f}",
        "learning rates": "{rates}",
    }
    budget = entries[0].budget
    sweep = sum(len(entry.arm.learning_rates) for entry in entries)
    show(
        f"{sweep} runs to choose learning rates, {seeds * len(entries)} that count; "
        f"{budget.rows} x {budget.length} tokens a step of {budget.dataset}",
        rows,
        columns,
    )


def _show_scores(
    entries: Sequence[Entry], best: Sequence[Job], scored: Sequence[Job], results: Results
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry, chosen in zip(entries, best, strict=True):
        jobs = [job for job in scored if job.name == entry.name]
        bits = [results.bits(job) for job in jobs]
        rates = entry.arm.learning_rates
        edge = chosen.optim.lr in (min(rates), max(rates)) and len(rates) > 1
        row = {
            "arm": entry.name,
            "parameters": entry.parameters,
            "tokens": entry.tokens / 1e6,
            "lr": f"{chosen.optim.lr:g}" + (" (edge)" if edge else ""),
            "mean": statistics.mean(bits),
            "interval": interval(bits),
            "each": " ".join(f"{value:.4f}" for value in bits),
            "seconds": statistics.mean(results.seconds(job) for job in jobs),
        }
        rows.append(row)
    rows.sort(key=itemgetter("mean"))
    columns = {
        "arm": "{arm}",
        "parameters": "{parameters:,}",
        "M tokens": "{tokens:.2f}",
        "learning rate": "{lr}",
        "bits/byte": "{mean:.4f}",
        "95 %": "± {interval:.4f}",
        "each seed": "{each}",
        "s a run": "{seconds:.0f}",
    }
    show(
        f"Held-out bits per byte after {entries[0].flops / 1e12:.2f} TFLOPs of training each; "
        "the learning rate is the best of seed 0, which is not among these; edge: of those tried",
        rows,
        columns,
    )
    return rows


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean, by Student's t."""
    return T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
