"""A small hourglass, its data and settings, shared by the engine tests and their worker."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor

from hourglass_dist.config.loader import parse
from hourglass_dist.config.schema import Config
from hourglass_dist.engine import optim
from hourglass_dist.model.hourglass import HourglassLM

VOCAB, LENGTH = 61, 16


def make_model(config: Config) -> HourglassLM:
    """Two levels, frozen weights among the trained ones, recomputation at the outer level."""
    model = HourglassLM(config.model)
    model.init_weights(config.run.seed)
    return model


def make_config(
    stage: int,
    precision: str = "fp32",
    micro_batch_size: int = 4,
    checkpointing: str | None = None,
    steps: int = 20,
    offload: bool = False,
    hpz: int | None = None,
    dim: int = 24,
    zero_more: dict[str, object] | None = None,
    **optim: Any,
) -> Config:
    """16 rows a step; ``checkpointing`` is that of all levels, or else full at the outer one."""
    outer, inner = checkpointing or "full", checkpointing or "none"
    zero: dict[str, object] = {"stage": stage, "zero_hpz_partition_size": hpz}
    if offload:
        zero["offload_optimizer"] = "cpu"
        zero |= {"offload_param": "cpu"} if stage == 3 else {}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # or a model this small is not partitioned
    zero |= zero_more or {}
    settings = {
        "run": {"dir": "unused", "seed": 5},
        "data": {"dataset": "unused", "seq_len": LENGTH, "batch_size": 16},
        "model": {
            "dim": dim,
            "heads": 3,
            "dim_head": 7,
            "max_seq_len": LENGTH,
            "vocab_size": VOCAB,
            "attention_resampling": "bucket",
            "levels": [
                {"layers": [1, 1], "activation_checkpointing": outer},
                {"layers": 1, "shorten": 3, "activation_checkpointing": inner},
            ],
        },
        "optim": {
            "lr": 1e-2,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "clip_grad_norm": 0.5,
            **optim,
        },
        "train": {"steps": steps, "micro_batch_size": micro_batch_size, "precision": precision},
        "eval": {"every": 10, "batch_size": 4},
        "checkpoint": {"every": 10},
        "deepspeed": {"zero_optimization": zero},
    }
    return parse(Config, settings, source="test")


def make_batch(step: int, config: Config) -> tuple[Tensor, Tensor]:
    """The global batch of a step: the next token is a fixed function of this one, with noise."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (config.data.batch_size, LENGTH), generator=generator)
    targets = (tokens * 7 + 3 + torch.randint(2, tokens.shape, generator=generator)) % VOCAB
    targets[0, -3:] = -100  # some positions do not count
    return tokens, targets


def plain_pytorch(
    steps: int, kind: str = "fp32", total_steps: int = 20, rank: int = 0, ranks: int = 1
) -> list[float]:
    """The oracle: no engine, the whole batch at once (of several ranks, each its part, and one
    all-reduce of every gradient); the loss of every step.

    ``kind`` is fp32, fp64, autocast (fp32 weights, products in bf16) or bf16 (weights and gradients
    in bf16, master weights and AdamW in fp32).
    """
    config = make_config(0, steps=total_steps)
    master = make_model(config).to(torch.float64 if kind == "fp64" else torch.float32)
    model = copy.deepcopy(master).bfloat16() if kind == "bf16" else master
    if kind == "bf16":
        master = copy.deepcopy(model).float()  # DeepSpeed's masters begin with rounded weights
    optimizer = torch.optim.AdamW(
        optim.parameter_groups(master, config.optim),
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )
    trained = [p for p in master.parameters() if p.requires_grad]
    used = [p for p in model.parameters() if p.requires_grad]
    size = config.data.batch_size // ranks
    losses = []
    for step in range(steps):
        tokens, targets = make_batch(step, config)
        share = slice(rank * size, (rank + 1) * size)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, config.optim, config.train.steps)
        with torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext():
            nll, count = model(tokens[share], targets_BL=targets[share])
        (nll / targets[share].numel()).backward()
        total = torch.tensor([nll.item(), float(count)], dtype=torch.float64)
        for tensor in [*(p.grad for p in used), total] if ranks > 1 else []:
            td.all_reduce(tensor)
        for ours, theirs in zip(trained, used, strict=True):
            ours.grad = (theirs.grad / ranks).to(ours.dtype)
        torch.nn.utils.clip_grad_norm_(trained, config.optim.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(trained, used, strict=True):
                theirs.copy_(ours)
        losses.append(float(total[0] / total[1]))
    return losses
