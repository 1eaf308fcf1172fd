"""Run by torchrun from ``measure/zero.py``: what every rank really holds and sends.

    zero_worker.py OUT.json '[{"stage": 1, "precision": "fp32", ...}]'

All tensors that Python knows are walked, each storage counted once, and told apart by what the
engine says they are; what is neither weight nor optimizer state nor batch is gradients. Traffic is
counted where every collective passes, in PyTorch's dispatcher, from the sizes of its tensors.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hourglass_dist.config.loader import parse
from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace
from hourglass_dist.engine.engine import Engine
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.planning.plan import plan

LENGTH = 16
KINDS = ("weights", "gradients", "master", "moments")

REST_LOOKS, REST_S = 8, 0.06
"""How often, and how many seconds apart, memory at rest is looked at."""


def settings(case: Mapping[str, Any], world_size: int, micro_batches: int) -> Config:
    """A model of many small layers, so that what is rounded up at the ends of a share is small
    beside it."""
    zero: dict[str, Any] = {"stage": case["stage"], "reduce_bucket_size": 1_000_000}
    zero |= {"allgather_bucket_size": 1_000_000, "stage3_param_persistence_threshold": 0}
    levels = [{"layers": [1, 1]}, {"layers": case["layers"], "shorten": 2}]
    model = {"dim": 64, "heads": 2, "max_seq_len": LENGTH, "vocab_size": 256, "levels": levels}
    return parse(
        Config,
        {
            "run": {"dir": "unused"},
            "data": {
                "dataset": "unused",
                "seq_len": LENGTH,
                "batch_size": world_size * micro_batches,
            },
            "model": model,
            "optim": {"lr": 1e-3},
            "train": {"steps": 2, "micro_batch_size": 1, "precision": case["precision"]},
            "eval": {"every": 1, "batch_size": 1},
            "checkpoint": {"every": 1},
            "deepspeed": {"zero_optimization": zero},
        },
        source="hourglass bench zero",
    )


def sent_by_a_ring(name: str, given: tuple[Any, ...]) -> float:
    """Bytes that each rank sends in a collective of PyTorch's ``c10d``, with a ring: an all-reduce
    is a reduce-scatter and an all-gather, and each of these sends (W - 1) / W of what is whole
    (Patarasuk and Yuan 2009). A broadcast is taken as a pipeline: everything once."""
    whole = {
        "allreduce_": (2, 0),
        "_allgather_base_": (1, 0),  # its output
        "allgather_": (1, 0),
        "_reduce_scatter_base_": (1, 1),  # its input
        "reduce_scatter_": (1, 1),
        "broadcast_": (1, 0),
        "reduce_": (1, 0),
        "barrier": (0, 0),
    }
    times, place = whole[name]
    ranks = _group_size(given)
    return times * sum(map(_bytes, _tensors(given[place]))) * (ranks - 1) / ranks


def _group_size(given: tuple[Any, ...]) -> int:
    """Ranks of the process group among the arguments of a collective, its first object of C++."""
    boxed = next(argument for argument in given if isinstance(argument, torch.ScriptObject))
    group: Any = td.ProcessGroup.unbox(boxed)
    return int(group.size())


def _tensors(given: Any) -> Iterable[Tensor]:
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, list | tuple):
        for inner in given:
            yield from _tensors(inner)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is sent while it is active, and calls ``look`` before every collective."""

    def __init__(self, look: Callable[[], None] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent = 0.0
        self.calls = 0
        self._look = look

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            self._look()
            self.calls += 1
            self.sent += sent_by_a_ring(func.name().split("::")[1], args)
        return func(*args, **(kwargs or {}))


def held(engine: Engine) -> dict[str, int]:
    """Bytes by kind of all tensors made since ``gc.freeze``, each storage once; ``gradients`` is
    what nothing else claims."""
    gc.collect()
    by_kind = engine.tensors()
    gradients = [p.grad for p in by_kind["gathered"] or by_kind["weights"]]
    there = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    storages = [
        tensor.untyped_storage() for tensor in [*there, *(g for g in gradients if g is not None)]
    ]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    claimed = {
        kind: sum(sizes.pop(t.untyped_storage().data_ptr(), 0) for t in tensors)
        for kind, tensors in by_kind.items()
    }
    return claimed | {"gradients": sum(sizes.values())}


def held_at_rest(engine: Engine) -> dict[str, int]:
    """As ``held``, when collectives have let go of their tensors: on a busy machine threads of
    gloo do so late. The least of several looks."""
    looks = [held(engine)]
    for _ in range(REST_LOOKS):
        time.sleep(REST_S)
        looks.append(held(engine))
    return min(looks, key=lambda found: found["gradients"])


def measure(case: dict[str, Any], world: ranks.World) -> dict[str, Any]:
    """Measured and planned bytes of one case, each of the rank that has the most of it."""
    if world.is_main:
        print(f"ranks: {world.size}, ZeRO-{case['stage']}, {case['precision']}", flush=True)
    configs = {n: settings(case, world.size, n) for n in sorted(case["accumulation"])}
    micro_batches, config = max(configs.items())
    gc.collect()
    gc.freeze()  # what is there already does not count
    model = HourglassLM(config.model)
    model.init_weights(0)
    engine = Engine(model, config, world)
    found: dict[str, int] = {}
    for steps_before, n in enumerate(configs):
        engine.step(
            batch(n), 2 * steps_before
        )  # makes the moments, and learns the order at stage 3
        with Collectives() as collectives:
            engine.step(batch(n), 2 * steps_before + 1)
        found[f"sent {n}"] = round(collectives.sent)
    found |= memory(engine, micro_batches, world)
    if config.deepspeed.stage == 0:
        found["master"] = 0  # the weights themselves

    everyone = ranks.gather_ints(list(found.values()), world.device)
    planned = {n: plan(config, world.size) for n, config in configs.items()}
    kept = planned[micro_batches].memory
    return case | {
        "ranks": world.size,
        "parameters": planned[micro_batches].parameters.total,
        "measured": dict(zip(found, map(max, zip(*everyone, strict=True)), strict=True)),
        "planned": {kind: getattr(kept, kind) for kind in KINDS}
        | {"moment": kept.buffer + kept.gathered}
        | {f"sent {n}": made.traffic.total for n, made in planned.items()},
    }


def batch(micro_batches: int) -> dict[str, Tensor]:
    """Random rows of one rank."""
    tokens_BL = torch.randint(256, (micro_batches, LENGTH))
    return {"tokens_BL": tokens_BL, "targets_BL": tokens_BL}


def memory(engine: Engine, micro_batches: int, world: ranks.World) -> dict[str, int]:
    """Bytes by kind at the end of a micro batch, the most over those of a step. ``moment`` is what
    was there on top before a collective of the last one: buffers, gathered weights."""
    after_passes: list[dict[str, int]] = []
    before_collectives: list[dict[str, int]] = []
    deepspeed_step = engine._engine.step

    def step(*args: Any) -> Any:
        after_passes.append(held_at_rest(engine))
        return deepspeed_step(*args)

    def look() -> None:
        if len(after_passes) == micro_batches - 1:
            before_collectives.append(held(engine))

    engine._engine.step = step
    with Collectives(look):
        engine.step(batch(micro_batches), 4)
    engine._engine.step = deepspeed_step
    found = {kind: max(each[kind] for each in after_passes) for kind in KINDS}
    passing = [each["gradients"] + each["buffer"] + each["gathered"] for each in before_collectives]
    return found | {"moment": max([0, *(total - found["gradients"] for total in passing)])}


def main() -> None:
    """OUT.json, and the cases as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = ranks.init()
    results = [measure(case, world) for case in json.loads(sys.argv[2])]
    if world.is_main:
        replace(Path(sys.argv[1]), json.dumps(results))


if __name__ == "__main__":
    main()
