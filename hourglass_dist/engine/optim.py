"""Parameter groups, optimizers, and the learning rate as a function of the step alone."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hourglass_dist.config.schema import OptimConfig
from hourglass_dist.engine.muon import MuonAdamW

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Return the learning rate of optimizer step ``step`` (0 is the first one).

    Linear warm-up over ``warmup_steps``; then half a cosine to ``min_lr_ratio`` (Loshchilov and
    Hutter 2017, arXiv 1608.03983), a straight line to it, or a plateau and a straight line over the
    last ``decay_fraction`` of all steps (warmup-stable-decay; Hu et al. 2024, arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "cosine":
        height = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    elif config.schedule == "linear":
        height = max(0.0, 1.0 - progress)
    else:
        height = min(1.0, (total_steps - step) / max(1.0, config.decay_fraction * total_steps))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * height)


def level_of(name: str) -> int:
    """Return the level of a parameter: 0 at full resolution, for embeddings and the output layer.

    Resampling layers between two levels belong to the outer one.
    """
    match = re.match(r"hourglass\.((?:inner\.)*)", name)
    return match[1].count("inner") if match else 0


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return groups of equal optimizer, decay and rate, with keys ``params``, ``weight_decay``,
    ``lr_scale`` and ``muon``.

    Matrices decay; embeddings, norms and biases do not. With ``muon``, Muon trains the matrices
    between the embeddings and the output layer. Frozen parameters are left out: weight decay would
    shrink them, and ZeRO would wait for their gradients.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            decays = len(shape) >= 2 and id(parameter) not in embeddings
            scale = config.level_lr[level_of(name)] if config.level_lr else 1.0
            groups[not decays, is_muons(name, shape, config), scale].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if stays else config.weight_decay,
            "lr_scale": scale,
            "muon": muon,
        }
        for (stays, muon, scale), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def is_muons(name: str, shape: Sequence[int], config: OptimConfig) -> bool:
    """Return whether Muon trains this parameter, unless it is frozen."""
    hidden = name.startswith("hourglass.") and len(shape) == 2 and min(shape) > 1
    return config.name == "muon" and hidden


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return torch's fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), or Muon with it,
    over ``parameter_groups``."""
    kind = MuonAdamW if config.name == "muon" else torch.optim.AdamW
    return kind(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
