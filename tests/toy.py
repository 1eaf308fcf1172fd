"""A small hourglass, its data and settings, shared by the engine tests and their worker."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hourglass_dist.config import Config
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.sections import parse

VOCAB, LENGTH = 61, 16


def make_model(config: Config) -> HourglassLM:
    """Two levels, frozen weights among the trained ones, recomputation at the outer level."""
    model = HourglassLM(config.model)
    model.init_weights(config.run.seed)
    return model


def make_config(stage: int, precision: str = "fp32", **optim: Any) -> Config:
    zero: dict[str, object] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # or a model this small is not partitioned
    settings = {
        "run": {"dir": "unused", "seed": 5},
        "data": {"dataset": "unused", "seq_len": LENGTH, "batch_size": 16},
        "model": {
            "dim": 24,
            "heads": 3,
            "dim_head": 7,
            "max_seq_len": LENGTH,
            "vocab_size": VOCAB,
            "attention_resampling": "bucket",
            "levels": [
                {"layers": [1, 1], "activation_checkpointing": "full"},
                {"layers": 1, "shorten": 3},
            ],
        },
        "optim": {
            "lr": 1e-2,
            "warmup_steps": 3,
            "weight_decay": 0.1,
            "clip_grad_norm": 0.5,
            **optim,
        },
        "train": {"steps": 20, "micro_batch_size": 4, "precision": precision},
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
