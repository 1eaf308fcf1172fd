"""Run by torchrun from test_engine.py: trains a small model on every rank and writes its losses.

    engine_worker.py OUT.json '[{"stage": 1, "precision": "fp32", "steps": 20, "save": DIR, "load":
    DIR}, ...]'

Each entry is one engine, built anew, or with "plain": KIND the oracle on these ranks; the number of
ranks is that of torchrun.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from toy import make_batch, make_config, make_model, plain_pytorch

from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.engine import loss_scale, sharded_state
from hourglass_dist.engine.engine import Engine


def run(case: dict[str, Any], world: ranks.World) -> dict[str, Any]:
    if "plain" in case:
        losses = plain_pytorch(case["steps"], case["plain"], case["steps"], world.rank, world.size)
        return {"losses": losses}
    keys = ("micro_batch_size", "checkpointing", "offload", "hpz", "dim", "zero_more")
    more = {key: case[key] for key in keys if key in case}
    if case.get("precision") == "fp16":  # torch can on any CPU; DeepSpeed asks for fast ones
        get_accelerator().is_fp16_supported = lambda: True
    total = case.get("total_steps", 20)
    config = make_config(
        case["stage"], case.get("precision", "fp32"), steps=total, **more, **case.get("optim", {})
    )
    engine = Engine(make_model(config), config, world)
    if "scale" in case:
        loss_scale.restore(
            engine.deepspeed.optimizer, scale_of(engine) | {"cur_scale": case["scale"]}
        )
    if case.get("dry_run"):
        tokens = torch.zeros(config.train.micro_batch_size, config.data.seq_len, dtype=torch.int64)
        engine.dry_run_step({"tokens_BL": tokens, "targets_BL": tokens})
    if case.get("look"):
        engine.eval_loss(rows_of(10_000, config, slice(None)))
    if "load" in case:
        engine.load(Path(case["load"]))
    if "resave" in case:
        write(engine, Path(case["resave"]), world)
    losses, norms, applied = [], [], []
    size = config.data.batch_size // world.size
    share = slice(world.rank * size, (world.rank + 1) * size)
    for step in range(case.get("first", 0), case["steps"]):
        result = engine.step(rows_of(step, config, share), step)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        applied.append(result.applied)
    if "save" in case:
        write(engine, Path(case["save"]), world)
    rows = rows_of(10_000, config, slice(None))
    nats = engine.eval_loss(rows)
    again = []
    if "back" in case:  # with what the evaluation has gathered still there
        engine.load(Path(case["back"]))
        for step in range(case["back_at"], case["steps"]):
            again.append(engine.step(rows_of(step, config, share), step).loss)
    return {
        "losses": losses,
        "again": again,
        "norms": norms,
        "applied": applied,
        "scale": scale_of(engine).get("cur_scale"),
        "buffer": sum(tensor.numel() for tensor in engine.tensors()["buffer"]),
        "second_copy": sum(tensor.numel() for tensor in second_copy(engine)),
        "eval": float(nats.sum() / (rows["targets_BL"] >= 0).sum()),
    }


def rows_of(number: int, config: Config, share: slice) -> dict[str, Tensor]:
    tokens, targets = make_batch(number, config)
    return {"tokens_BL": tokens[share], "targets_BL": targets[share]}


def second_copy(engine: Engine) -> list[Tensor]:
    found = (getattr(p, "ds_secondary_tensor", None) for p in engine.module.parameters())
    return [tensor for tensor in found if tensor is not None]


def scale_of(engine: Engine) -> dict[str, float]:
    return loss_scale.state(engine.deepspeed.optimizer)


def write(engine: Engine, folder: Path, world: ranks.World) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    engine.snapshot().write(folder / sharded_state.file_name(world.rank))
    ranks.barrier()


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    world = ranks.init()
    results = [run(case, world) for case in cases]
    if world.is_main:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
