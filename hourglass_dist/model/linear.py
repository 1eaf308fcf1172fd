"""A linear layer that is as fast on the CPU in fp32 as the machine allows.

PyTorch sends fp32 products on the CPU to MKL, which leaves the AVX-512 units of AMD processors
unused. oneDNN, which is in every x86 build of PyTorch, uses them: forward and backward ran at 220
instead of 104 GFLOP/s on one Zen core (2048 rows, 192 x 768, PyTorch 2.13). Elsewhere (other
devices, other dtypes, autocast, ``torch.compile``) this is ``nn.Linear``.

Legend: N rows, D input width, O output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MANY_ROWS = 1024
"""oneDNN builds a kernel for every new shape. Training repeats its shapes; generation does not, and
only gains where one product costs more than a kernel."""

_HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """``nn.Linear``, through oneDNN where that is faster. The same up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        if not _pays(x, self.weight):
            return super().forward(x)
        out_NO: Tensor = _linear(x.flatten(0, -2), self.weight, self.bias)
        return out_NO.view(*x.shape[:-1], -1)


def _pays(x: Tensor, weight_OD: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == weight_OD.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and (torch.is_grad_enabled() or x.shape[:-1].numel() >= MANY_ROWS)
    )


def _product(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b. Either argument may be a transposed view."""
    out_NO: Tensor = torch.ops.mkldnn._linear_pointwise(x_ND, weight_OD, bias_O, "none", [], "")
    return out_NO


def _weight_gradient(grad_NO: Tensor, x_ND: Tensor) -> Tensor:
    """grad^T x, (O, D). oneDNN copies its first factor, so the narrow one comes first."""
    if grad_NO.shape[1] > x_ND.shape[1]:
        return _product(x_ND.t(), grad_NO.t()).t().contiguous()
    return _product(grad_NO.t(), x_ND.t())


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_ND, weight_OD)
        return _product(x_ND, weight_OD, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_OD = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(grad_NO, weight_OD.t()) if for_x else None,
            _weight_gradient(grad_NO, x_ND) if for_weight else None,
            grad_NO.sum(dim=0) if for_bias else None,
        )


_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _OneDNNLinear.apply
