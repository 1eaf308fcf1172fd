"""Activation checkpointing: what of a level's forward pass is kept, recomputed or moved away.

    none        everything is kept
    full        only the input of every layer (Chen et al. 2016, arXiv 1604.06174)
    every K     the input of each K-th layer, the others whole
    selective   inputs, attention outputs and matrix products; norms, activations and the rest are
                done again (torch's selective policies)
    offload     everything, but in pinned CPU memory until the backward pass; on the CPU as none

``auto`` is settled before a model is built (``cost.choose_checkpointing``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::linear",
    "aten::bmm",
    "mkldnn::_linear_pointwise",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flex_attention",
}
"""Operations whose results ``selective`` keeps."""


class Recompute:
    """Runs the modules of one level under its policy."""

    def __init__(self, policy: str, draws: bool) -> None:
        """``draws``: the level has dropout, so random states must be restored.

        Raises ValueError for ``auto``, which has to be settled first.
        """
        if policy == "auto":
            raise ValueError(
                "model.levels.activation_checkpointing: auto is settled before the model is built"
            )
        self.policy = policy
        self.every = int(policy.split()[1]) if policy.startswith("every") else 1
        self.draws = draws

    def __call__(self, number: int, module: nn.Module, *inputs: Any) -> Any:
        """``module(*inputs)``, the level's module number ``number``."""
        if not (module.training and torch.is_grad_enabled()) or self.policy == "none":
            return module(*inputs)
        if self.policy == "offload":
            with _offloaded(inputs[0].device):
                return module(*inputs)
        if (number + 1) % self.every:
            return module(*inputs)
        options: dict[str, Any] = {}
        if self.policy == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)
        return checkpoint(
            module, *inputs, use_reentrant=False, preserve_rng_state=self.draws, **options
        )


def _keeps(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(operation, "name", lambda: str(operation))()
    name = name.split(".")[0]
    kept = name in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(device: torch.device) -> saved_tensors_hooks:
    """Saved tensors wait in pinned memory; weights, which are there anyway, stay."""

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.device.type == "cpu":
            return tensor
        kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        kept.copy_(tensor, non_blocking=True)
        return kept, tensor.device

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        kept, where = packed
        back: Tensor = kept.to(where, non_blocking=True)
        return back

    return saved_tensors_hooks(pack, unpack)
