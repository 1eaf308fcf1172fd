"""The end of the model: norm, output layer, and a loss that never holds all logits.

Logits of a 32k vocabulary are larger than everything else in the model. With targets given, the
loss is computed in chunks of positions: the logits of a chunk, its loss, and at once its part of
the gradients, so that the logits can be freed. That costs no more operations than the usual way (as
in Liger Kernel, arXiv 2410.10989).

Legend: B rows, L positions, N = B*L, D width, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hourglass_dist.model.linear import Linear
from hourglass_dist.model.norms import make_norm
from hourglass_dist.model.settings import ModelConfig

IGNORED_TARGET = -100
CHUNK_LOGITS = 2**23
"""Most logits in memory at a time (32 MiB in fp32), but at least those of one position."""


class Head(nn.Module):
    """The final norm and the output layer, which gives logits or a loss."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__()
        self.norm = make_norm(config, dim)
        self.output = Output(dim, config.vocab_size, config.bias, config.z_loss)

    def forward(
        self, x_BLD: Tensor, targets_BL: Tensor | None = None, each_target: bool = False
    ) -> Any:
        """Map (B, L, D) to logits (B, L, V); with targets to (summed nats, number of targets).

        With ``each_target`` nats are not summed: (B, L), 0 without a target, no gradient.
        """
        return self.output(self.norm(x_BLD), targets_BL, each_target)


class Output(Linear):
    """The output layer and its loss: under ZeRO-3 its weights are gathered while both run."""

    watched = False
    """Whether the loss records ``largest_logit``."""
    largest_logit: Tensor | None = None
    """Largest absolute logit of the last rows whose summed loss was computed."""

    def __init__(self, dim: int, vocab_size: int, bias: bool, z_loss: float = 0.0) -> None:
        super().__init__(dim, vocab_size, bias)
        self.z_loss = z_loss

    def forward(
        self, x_BLD: Tensor, targets_BL: Tensor | None = None, each_target: bool = False
    ) -> Any:
        """Return what ``Head.forward`` does. The loss sums, in fp32, targets that are not -100.

        Its gradient, not its value, includes that of ``z_loss * log(Z)^2`` for each of them, Z the
        sum of all exp(logit) (Chowdhery et al. 2022, arXiv 2204.02311, section 5).
        """
        if targets_BL is None:
            return super().forward(x_BLD)
        x_ND, targets_N = x_BLD.flatten(0, 1), targets_BL.flatten()
        count = (targets_N != IGNORED_TARGET).sum()
        needs = torch.is_grad_enabled() and (x_ND.requires_grad or self.weight.requires_grad)
        if x_ND.device.type != "meta" and torch.is_autocast_enabled(x_ND.device.type):
            x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
        if each_target:
            nats_N = _nats_of_each(x_ND, self.weight, self.bias, targets_N)
            return nats_N.view_as(targets_BL), count
        nats, largest = _loss(
            x_ND, self.weight, self.bias, targets_N, self.z_loss, needs, self.watched
        )
        if self.watched:
            self.largest_logit = largest
        return nats, count


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        z_loss: float,
        needs_gradients: bool,
        watched: bool,
    ) -> tuple[Tensor, Tensor]:
        chunk = max(1, CHUNK_LOGITS // len(weight_VD))
        nats = x_ND.new_zeros((), dtype=_wide(x_ND.dtype))
        largest = torch.zeros_like(nats)
        weight = weight_VD.to(x_ND.dtype)
        grads = None
        if needs_gradients:
            for_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=nats.dtype)
            grads = torch.empty_like(x_ND), torch.zeros_like(weight, dtype=nats.dtype), for_bias
        for start in range(0, len(x_ND), chunk):
            part = slice(start, start + chunk)
            bias = None if bias_V is None else bias_V.to(x_ND.dtype)
            logits_CV = F.linear(x_ND[part], weight, bias)
            if watched:
                largest = torch.maximum(largest, logits_CV.abs().amax().to(nats.dtype))
            logits_CV = logits_CV.to(nats.dtype)
            log_p_CV = logits_CV.log_softmax(dim=-1)
            nats += F.nll_loss(
                log_p_CV, targets_N[part], ignore_index=IGNORED_TARGET, reduction="sum"
            )
            if grads is not None:
                log_z_C1 = logits_CV[:, :1] - log_p_CV[:, :1] if z_loss else None
                scale_C1 = None if log_z_C1 is None else 1.0 + 2.0 * z_loss * log_z_C1
                _add_gradients(grads, part, log_p_CV, scale_C1, x_ND, weight, targets_N[part])
            del logits_CV
        ctx.dtypes = weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.save_for_backward(*(grads or ()))
        ctx.mark_non_differentiable(largest)
        return nats, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        for_x, for_weight, for_bias = ctx.saved_tensors
        bias_type = ctx.dtypes[1]
        return (
            for_x * grad.to(for_x.dtype),
            (for_weight * grad).to(ctx.dtypes[0]),
            None if bias_type is None else (for_bias * grad).to(bias_type),
            *(None, None, None, None),
        )


def _add_gradients(
    grads: tuple[Tensor, Tensor, Tensor | None],
    part: slice,
    log_p_CV: Tensor,
    scale_C1: Tensor | None,
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
) -> None:
    """Add the gradients of a chunk: scale * softmax - one_hot at targets, 0 elsewhere."""
    for_x, for_weight, for_bias = grads
    counts_C1 = (targets_C != IGNORED_TARGET).unsqueeze(1)
    d_CV = log_p_CV.exp_()
    if scale_C1 is not None:
        d_CV.mul_(scale_C1)
    here_C1 = targets_C.clamp(min=0).unsqueeze(1)
    d_CV.scatter_add_(1, here_C1, -torch.ones_like(here_C1, dtype=d_CV.dtype))
    d_CV.mul_(counts_C1)
    if for_bias is not None:
        for_bias += d_CV.sum(dim=0)
    d_CV = d_CV.to(x_ND.dtype)
    for_x[part] = d_CV @ weight_VD
    for_weight += d_CV.t() @ x_ND[part]


@torch.no_grad()
def _nats_of_each(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor
) -> Tensor:
    """Return the loss of every target, nats (N,); positions without one cost nothing."""
    chunk = max(1, CHUNK_LOGITS // len(weight_VD))
    weight = weight_VD.to(x_ND.dtype)
    bias = None if bias_V is None else bias_V.to(x_ND.dtype)
    nats_N = x_ND.new_zeros(len(x_ND), dtype=_wide(x_ND.dtype))
    for positions_C in torch.split((targets_N != IGNORED_TARGET).nonzero()[:, 0], chunk):
        logits_CV = F.linear(x_ND[positions_C], weight, bias).to(nats_N.dtype)
        nats_N[positions_C] = F.cross_entropy(logits_CV, targets_N[positions_C], reduction="none")
    return nats_N


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


_loss: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLoss.apply
