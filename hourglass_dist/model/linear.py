"""A linear layer that does not hold its weight between the forward and the backward pass.

``nn.Linear`` saves a view of its weight for the backward pass. ZeRO-3 frees the gathered weight
after the forward pass and gathers it again for the backward pass; the view would keep every layer's
gathered weight in memory. This layer saves the parameter itself, which ZeRO-3 empties.

Under autocast and ``torch.compile`` it is ``nn.Linear``. Legend: N rows, D input width, O output
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Linear(nn.Linear):
    """``nn.Linear`` that saves its parameter, not a view of it, for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., O)."""
        casts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
        if casts or torch.compiler.is_compiling():
            return super().forward(x)
        out_NO = _linear(x.flatten(0, -2), self.weight, self.bias)
        return out_NO.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight_OD)
        return F.linear(x_ND, weight_OD, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_ND, weight_OD = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            grad_NO @ weight_OD if for_x else None,
            grad_NO.t() @ x_ND if for_weight else None,
            grad_NO.sum(dim=0) if for_bias else None,
        )


_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _Linear.apply
