"""The norms of a model: LayerNorm or RMSNorm.

``torch.nn.RMSNorm`` is many operations on the CPU, each of which saves fp32 copies for the backward
pass. This one saves the input, the weight and one number for each position; under
``torch.compile`` and on GPUs it is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hourglass_dist.model.settings import ModelConfig

EPS = 1e-5
"""Constant added to the variance (LayerNorm) or the mean square (RMSNorm)."""


def make_norm(config: ModelConfig, dim: int) -> nn.Module:
    """Return a norm of this model's kind for vectors of width ``dim``."""
    if config.norm == "rms":
        return RMSNorm(dim)
    return nn.LayerNorm(dim, eps=EPS, bias=config.bias)


class RMSNorm(nn.Module):
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight, the mean in fp32 (Zhang, Sennrich 2019)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        if x.device.type == "cuda" or torch.compiler.is_compiling():
            out: Tensor = F.rms_norm(x, self.weight.shape, self.weight, EPS)
            return out
        normed: Tensor = _rms_norm(x, self.weight)
        return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor) -> Tensor:
        wide = _wide(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(EPS).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        normed: Tensor = (wide * scale).to(x.dtype) * weight_D
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight_D, scale = ctx.saved_tensors
        wide_grad = _wide(grad)
        normed = _wide(x) * scale
        for_weight = (wide_grad * normed).flatten(0, -2).sum(dim=0).to(weight_D.dtype)
        inner = wide_grad * _wide(weight_D)
        along = (inner * normed).mean(dim=-1, keepdim=True)
        return ((inner - normed * along) * scale).to(x.dtype), for_weight


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or in fp64 if it has that dtype."""
    return x if x.dtype == torch.float64 else x.float()


_rms_norm: Callable[[Tensor, Tensor], Tensor] = _RMSNorm.apply
