"""Activation checkpointing: which activations of a level are kept, recomputed or offloaded.

    none        all activations are kept
    full        only the input of every layer (Chen et al. 2016, arXiv 1604.06174)
    every K     the input of each K-th layer, and all activations of the others
    selective   inputs, attention outputs and matrix products; everything else is recomputed
                (PyTorch's selective activation checkpointing)
    offload     all activations, in pinned CPU memory until the backward pass; on the CPU as none

``auto`` is settled before a model is built (``planning.plan.choose_checkpointing``).

Under ``torch.compile`` a layer and its recomputation are one graph: the recomputation of ``full``
and ``selective`` is fused with the rest of the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
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
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flex_attention",
}
"""Names of the operations whose results ``selective`` keeps."""
MOST_GRAPHS = 256
"""Limit of compiled graphs, for modules, shapes and numbers of rows (PyTorch's default: 8)."""


class Recompute:
    """Activation checkpointing of one level: runs its modules under its policy."""

    def __init__(self, policy: str, draws: bool) -> None:
        """Set the policy. ``draws``: a level has dropout, so random states must be restored.

        Raises ValueError for ``auto``, which has to be settled first.
        """
        recomputes(policy, 0)
        self.policy = policy
        self._run: Callable[..., Any] = _run
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": draws}
        if policy == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keeps)
        self._run_again: Callable[..., Any] = partial(checkpoint, _run, **options)

    def compile(self) -> None:
        """Compile training passes to one graph for each kind of module and shape."""
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        self._run = torch.compile(self._run, dynamic=False, fullgraph=True)
        self._run_again = torch.compile(self._run_again, dynamic=False, fullgraph=True)

    def __call__(self, number: int, module: nn.Module, *inputs: Any) -> Any:
        """Return ``module(*inputs)``, for the level's module number ``number``."""
        if not (module.training and torch.is_grad_enabled()):
            return module(*inputs)
        if self.policy == "offload":
            with _offloaded(inputs[0].device):
                return self._run(module, *inputs)
        if recomputes(self.policy, number):
            return self._run_again(module, *inputs)
        return self._run(module, *inputs)


def recomputes(policy: str, number: int) -> bool:
    """Return whether the backward pass recomputes module ``number`` of a level.

    Raises ValueError for ``auto``, which has to be settled first.
    """
    if policy == "auto":
        raise ValueError(
            "model.levels.activation_checkpointing: auto is settled before the model is built"
        )
    every = int(policy.split()[1]) if policy.startswith("every") else 1
    return policy not in ("none", "offload") and (number + 1) % every == 0


def _run(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def _keeps(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(operation, "name", lambda: str(operation))()
    name = name.split(".")[0]
    kept = name in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(device: torch.device) -> saved_tensors_hooks:
    """Return hooks that keep saved tensors, but not weights, in pinned CPU memory."""

    def pack(tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.device.type != "cuda":
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
