"""Parameter groups and the learning rate, the latter a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from hourglass_dist.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (0 is the first one).

    Linear warm-up over ``warmup_steps``; then half a cosine to ``min_lr_ratio`` (Loshchilov and
    Hutter 2017, arXiv 1608.03983), or a plateau and a linear decay over the last
    ``decay_fraction`` of all steps (warmup-stable-decay; Hu et al. 2024, arXiv 2404.06395).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        height = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    else:
        height = min(1.0, (total_steps - step) / max(1.0, config.decay_fraction * total_steps))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * height)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices, which decay, and embeddings, norms and biases, which do not.

    Frozen parameters are left out: weight decay would shrink them, and ZeRO would wait for their
    gradients.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    stays = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups: list[dict[str, object]] = [
        {"params": decays, "weight_decay": weight_decay},
        {"params": stays, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over ``parameter_groups``, in torch's
    fused form."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
