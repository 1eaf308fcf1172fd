"""How long training stands still for a checkpoint, and takes to resume from one.

    python -m tests.measure.save --millions 20 --repeats 3

One rank with its whole state, at ZeRO stage 1. Synchronous is the same save, waited for.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from hourglass_dist.bench.shared import headline, machine, show
from hourglass_dist.checkpoint.save import Checkpoints, TrainingProgress
from hourglass_dist.config.loader import parse
from hourglass_dist.config.schema import CheckpointConfig, Config
from hourglass_dist.core import ranks
from hourglass_dist.engine.engine import Engine
from hourglass_dist.model.hourglass import HourglassLM

ROWS, LENGTH = 1, 256


def bench_save(folder: Path, millions: int, repeats: int) -> tuple[dict[str, Any], list[Any]]:
    """Save a model of so many ``millions`` of parameters in a new folder below ``folder``; the
    facts and rows that were printed."""
    world = ranks.init()
    config = _config(millions)
    model = HourglassLM(config.model).to(world.device)
    parameters = sum(p.numel() for p in model.parameters())
    engine = Engine(model, config, world)
    tokens_BL = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    rows = {"tokens_BL": tokens_BL, "targets_BL": tokens_BL}
    engine.step(rows, 0)
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        checkpoints = Checkpoints(place, CheckpointConfig(every=1, keep=1), world)
        measured = _saves(engine, checkpoints, rows, repeats)
        size = sum(f.stat().st_size for f in place.rglob("*.safetensors"))
        begun = time.perf_counter()
        found = checkpoints.newest()
        assert found is not None
        verified = time.perf_counter()
        engine.load(found[0])
        loaded = time.perf_counter()
    finally:
        shutil.rmtree(place)
    facts = machine(world.device) | {"parameters": parameters, "checkpoint_bytes": size}
    table = _table(measured) | {
        "resume: every byte verified": verified - begun,
        "resume: read into the engine": loaded - verified,
    }
    result = [{"what": what, "seconds": f"{s:.3f}"} for what, s in table.items()]
    print(headline(facts))
    title = f"{parameters / 1e6:.0f} M parameters, {size / 1e9:.2f} GB of state"
    show(title, result, {"": "{what}", "seconds": "{seconds}"})
    return facts, result


def _config(millions: int) -> Config:
    dim = 1024 if millions >= 50 else 128
    layers = max(2, round(millions * 1e6 / (12 * dim * dim)))
    outer = {"layers": [1, 1], "dim": dim}
    settings = {
        "run": {"dir": "unused"},
        "data": {"dataset": "unused", "seq_len": LENGTH, "batch_size": ROWS},
        "model": {
            "dim": dim,
            "heads": dim // 64,
            "dim_head": 64,
            "positions": "rope",
            "levels": [outer, {"layers": layers, "shorten": 4}],
        },
        "optim": {"lr": 1e-4},
        "train": {"steps": 1000, "micro_batch_size": ROWS},
        "eval": {"every": 1000, "batch_size": ROWS},
        "checkpoint": {"every": 1},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }
    return parse(Config, settings, source="bench save")


def _saves(
    engine: Engine, checkpoints: Checkpoints, rows: Mapping[str, Tensor | None], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every part, by turns."""
    found: dict[str, list[float]] = {
        name: [] for name in ("sync", "async", "in all", "step", "step while writing")
    }
    step = 0

    def timed(name: str, work: Any) -> None:
        begun = time.perf_counter()
        work()
        found[name].append(time.perf_counter() - begun)

    def save() -> None:
        nonlocal step
        step += 1
        checkpoints.save(engine.snapshot, TrainingProgress(step, {}, {}, engine.stage))

    def save_and_wait() -> None:
        save()
        checkpoints.finish()

    save_and_wait()  # takes the memory for snapshots, once
    for _ in range(repeats):
        timed("sync", save_and_wait)
        timed("step", lambda: engine.step(rows, step))
        begun = time.perf_counter()
        timed("async", save)
        writing = [t for t in threading.enumerate() if t.name == "checkpoint"]
        while any(thread.is_alive() for thread in writing):
            timed("step while writing", lambda: engine.step(rows, step))
        found["in all"].append(time.perf_counter() - begun)
    return found


def _table(found: Mapping[str, list[float]]) -> dict[str, float]:
    middle = {name: statistics.median(values) for name, values in found.items()}
    return {
        "a step": middle["step"],
        "synchronous: training stands still": middle["sync"],
        "asynchronous: training stands still": middle["async"],
        "asynchronous: until it is saved, steps included": middle["in all"],
        "a step while it is written": middle["step while writing"],
    }


def main(folder: Path = Path(), millions: int = 200, repeats: int = 5) -> None:
    """Print the table: ``folder`` is on the disk to be measured, ``millions`` are parameters."""
    bench_save(folder, millions, repeats)


if __name__ == "__main__":
    typer.run(main)
