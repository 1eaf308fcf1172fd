"""Run by torchrun from ``bench/loop.py``: a training, and between its steps those of bare loops.

    loop_worker.py OUT.json STEPS CONFIG.yaml key=value ...

``train.train`` runs as it is: stream, checks, metrics, stop requests. After each step of it a bare
engine takes a step on one batch that is always the same, and on one rank PyTorch alone, too: a busy
machine slows all of them. Where layers are compiled, an engine without that is one more. Nothing is
evaluated or saved before the last step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hourglass_dist import train
from hourglass_dist.config.schema import Config, load
from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace
from hourglass_dist.core.stop import StopRequests
from hourglass_dist.engine.engine import Engine
from hourglass_dist.engine.optim import make_optimizer
from hourglass_dist.planning.plan import settle_checkpointing

NEVER = 10**9


class Interleaved:
    """Takes the times of a training's steps and of other steps between them."""

    def __init__(self, others: dict[str, Callable[[], object]]) -> None:
        self._others = others
        self.seconds: dict[str, list[float]] = {name: [] for name in ("training", *others)}
        self.outside: list[float] = []
        """Of each step of the training: what was not spent in DeepSpeed's engine."""
        self._began: float | None = None
        self._inside = 0.0

    def watch(self, engine_class: Any) -> None:
        """Take the time of passes and updates of every engine."""
        for name in ("forward", "backward", "step"):
            setattr(engine_class, name, self._timed(getattr(engine_class, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = method(*args, **kwargs)
            self._inside += time.perf_counter() - begun
            return result

        return timed

    def after_step(self) -> None:
        """The training has ended a step and looked for stop requests."""
        now = time.perf_counter()
        if self._began is not None:
            self.seconds["training"].append(now - self._began)
            self.outside.append(now - self._began - self._inside)
            for name, other in self._others.items():
                ranks.barrier()
                begun = time.perf_counter()
                other()
                self.seconds[name].append(time.perf_counter() - begun)
        ranks.barrier()
        self._began, self._inside = time.perf_counter(), 0.0


def main() -> None:
    """OUT.json, the number of steps, a settings file and changes."""
    torch.set_num_threads(1)
    out, steps, file, *overrides = sys.argv[1:]
    world = ranks.init()
    changes = [f"run.dir={Path(out).parent / 'run'}", f"train.steps={steps}"]
    changes += [f"eval.every={NEVER}", f"checkpoint.every={NEVER}"]
    config = settle_checkpointing(load(file, [*overrides, *changes]), world.device.type)
    micro_batches = bare_batch(config, world)
    bare = Engine(train.make_model(config, world), config, world)._engine
    others: dict[str, Callable[[], object]] = {"bare engine": engine_loop(bare, micro_batches)}
    if config.train.compile:
        train_as_it_is = config.train.model_copy(update={"compile": False})
        as_it_is = config.model_copy(update={"train": train_as_it_is})
        plain = Engine(train.make_model(as_it_is, world), as_it_is, world)._engine
        others["not compiled"] = engine_loop(plain, micro_batches)
    if world.size == 1:
        others["plain PyTorch"] = plain_loop(config, world, micro_batches)
    times = Interleaved(others)
    times.watch(type(bare))
    look = StopRequests.reason

    def look_and_compare(requests: StopRequests, stop_flags: Sequence[int]) -> str | None:
        found = look(requests, stop_flags)
        times.after_step()
        return found

    StopRequests.reason = look_and_compare  # type: ignore[method-assign,assignment]
    train.train(config)
    if world.is_main:
        replace(Path(out), dumps({"seconds": times.seconds, "outside": times.outside}))


def bare_batch(config: Config, world: ranks.World) -> list[dict[str, Tensor]]:
    """Random rows of one rank, in micro batches."""
    size, length = config.train.micro_batch_size, config.data.seq_len
    found = []
    for _ in range(config.accumulation_steps(world.size)):
        tokens_BL = torch.randint(config.model.vocab_size, (size, length), device=world.device)
        found.append({"tokens_BL": tokens_BL, "targets_BL": tokens_BL})
    return found


def engine_loop(engine: Any, micro_batches: list[dict[str, Tensor]]) -> Callable[[], None]:
    """A step of DeepSpeed's engine with the same settings and none of our parts around it."""

    def step() -> None:
        for rows in micro_batches:
            nll, _ = engine(**rows)
            engine.backward(nll / rows["targets_BL"].numel())
            engine.step()

    return step


def plain_loop(
    config: Config, world: ranks.World, micro_batches: list[dict[str, Tensor]]
) -> Callable[[], None]:
    """A step of the model and its optimizer alone."""
    model = train.make_model(config, world)
    optimizer = make_optimizer(model, config.optim)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for rows in micro_batches:
            nll, _ = model(**rows)
            (nll / rows["targets_BL"].numel() / len(micro_batches)).backward()
        if config.optim.clip_grad_norm:
            nn.utils.clip_grad_norm_(trained, config.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
