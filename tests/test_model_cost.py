"""The closed forms of ``cost.py`` are what PyTorch counts: parameters and operations to the last
one, memory within some per cent."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hourglass_dist.model.cost import ModelCost, model_cost
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model_config import ModelConfig
from tests.zoo import KINDS, LEVELS, make_config, random_text

LENGTHS = (1, 5, 35, 48)  # 5 is shorter than the windows of 7, 35 no multiple of any bucket
DOCUMENTS = (3, 17, 1, 8, 6)
POLICIES = [("none",), ("full",), ("every 2",), ("selective",), ("offload",), ("full", "none")]
CLOSE = 0.03
"""What memory may be off by. What is off are the norm statistics of bf16: fp32 on GPUs, bf16 on
CPUs."""

# Beyond what the files in configs/ have: (kind, options).
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("seed", {"bias": False}),
    ("seed", {"norm": "rms", "qk_norm": True}),
    ("seed", {"feed_forward": "swiglu", "window": 7}),
    ("seed", {"positions": "rope", "max_seq_len": None}),
    ("seed", {"skip": "gated", "wider": 4}),
    ("seed", {"positions": "relative", "max_seq_len": None, "stack_norms": True}),
    ("seed, linear", {"wider": 3, "width_change": "projection"}),
    ("plain", {"window": 7, "qk_norm": True}),
    ("plain", {"downsampling": "linear"}),
    ("plain", {"upsampling": "linear", "stack_norms": True, "wider": 4}),
    ("paper", {"bias": False, "qk_norm": True, "window": 7}),
    ("paper", {"positions": "learned", "max_seq_len": 48, "stack_norms": False}),
    ("paper", {"upsampling": "repeat", "wider": 4, "skip": "gated"}),
    ("paper", {"downsampling": "linear", "wider": -2, "width_change": "projection"}),
    ("modern", {"qk_norm": False, "skip": "plain"}),
    ("modern, windows", {"positions": "relative", "qk_norm": False}),
    ("modern, words", {"bias": True, "norm": "layer", "attention_resampling": "none"}),
]

every_variant = pytest.mark.parametrize(("kind", "more"), VARIANTS, ids=str)
every_shape = pytest.mark.parametrize("levels", LEVELS)


def configs(kind: str, more: dict[str, Any], levels: str = "") -> Iterator[ModelConfig]:
    """The model with every depth, or with one."""
    for shape in [levels] if levels else LEVELS:
        yield make_config(kind, shape, **more)


def with_policies(config: ModelConfig, policies: tuple[str, ...]) -> ModelConfig:
    """The levels take turns."""
    levels = [
        level.model_copy(update={"activation_checkpointing": policy})
        for level, policy in zip(config.levels, cycle(policies), strict=False)
    ]
    return config.model_copy(update={"levels": levels})


def counted_flops(
    config: ModelConfig, tokens_BL: Tensor, ids_BL: Tensor | None, train: bool
) -> int:
    """All rows, as PyTorch's counter sees them on the meta device, attention spelled out."""
    with torch.device("meta"):
        model = HourglassLM(config)
    tokens_BL = tokens_BL.to("meta")
    ids_BL = None if ids_BL is None else ids_BL.to("meta")
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.set_grad_enabled(train),
    ):
        nll, _ = model(tokens_BL, documents_BL=ids_BL, targets_BL=tokens_BL)
        if train:
            nll.backward()
    return counter.get_total_flops()


def kept_bytes(
    config: ModelConfig, tokens_BL: Tensor, ids_BL: Tensor | None = None, bf16: bool = False
) -> int:
    """Bytes of the different tensors that are there after a forward pass and were not before: what
    autograd saves, and what checkpointing hides from it in Python objects."""
    model = HourglassLM(config).to(torch.bfloat16 if bf16 else torch.float32)
    before = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    before |= {t.untyped_storage().data_ptr() for t in (tokens_BL, ids_BL) if t is not None}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    gc.collect()
    gc.freeze()
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            nll, _ = model(tokens_BL, documents_BL=ids_BL, targets_BL=tokens_BL)
        gc.collect()
        alive = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    finally:
        gc.unfreeze()
    storages = [tensor.untyped_storage() for tensor in (*saved, *alive)]
    del nll
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in before}.values())


def predicted_bytes(cost: ModelCost) -> int:
    """On a CPU, where offloading moves nothing."""
    return sum(part.activation_bytes + part.offloaded_bytes for part in cost.parts)


@every_variant
def test_parameters_and_forward_operations_are_exact(kind: str, more: dict[str, Any]) -> None:
    for config, length in product(configs(kind, more), LENGTHS):
        cost = model_cost(config, length, dense_attention=True)
        model = HourglassLM(config)
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        assert cost.parameters == sum(p.numel() for p in model.parameters())
        assert cost.trained_parameters == sum(trained)
        tokens_BL = random_text(2, length)
        counted = counted_flops(config, tokens_BL, None, train=False)
        assert cost.flops_per_token == counted / tokens_BL.numel()


@every_variant
@pytest.mark.parametrize("policies", POLICIES, ids=str)
def test_training_operations_are_exact(
    kind: str, more: dict[str, Any], policies: tuple[str, ...]
) -> None:
    for config, length in product(configs(kind, more), (5, 35)):
        settled = with_policies(config, policies)
        cost = model_cost(settled, length, dense_attention=True)
        tokens_BL = random_text(2, length)
        counted = counted_flops(settled, tokens_BL, None, train=True) / tokens_BL.numel()
        assert cost.hardware_flops_per_token == pytest.approx(counted, rel=1e-12)
        plain = model_cost(config, length, dense_attention=True)
        assert cost.training_flops_per_token == plain.hardware_flops_per_token


@every_variant
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("policies", POLICIES, ids=str)
def test_activation_bytes_are_those_kept(
    kind: str, more: dict[str, Any], policies: tuple[str, ...], bf16: bool
) -> None:
    for config, (rows, length) in product(configs(kind, more), [(2, 35), (3, 48), (1, 31)]):
        settled = with_policies(config, policies)
        cost = model_cost(settled, length, rows=rows, bytes_per_number=2 if bf16 else 4)
        kept = kept_bytes(settled, random_text(rows, length), bf16=bf16)
        assert predicted_bytes(cost) == pytest.approx(kept, rel=CLOSE)
