"""The closed forms of ``cost.py`` are what PyTorch counts, to the last number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hourglass_dist.config import LevelConfig, ModelConfig
from hourglass_dist.model.cost import ModelCost, model_cost
from hourglass_dist.model.hourglass import HourglassLM, sum_loss

ROWS = 2

LEVELS: dict[str, list[dict[str, Any]]] = {
    "flat": [{"layers": 3}],
    "by 2": [{"layers": [1, 1]}, {"layers": 2, "shorten": 2}],
    "by 3, 2": [
        {"layers": [0, 2]},
        {"layers": [1, 1], "shorten": 3},
        {"layers": 1, "shorten": 2},
    ],
}
KINDS = [("naive", True), ("naive", False), ("linear", True), ("linear", False)]

every_shape = pytest.mark.parametrize("shape", LEVELS)
every_kind = pytest.mark.parametrize(("resampling", "attention"), KINDS)
every_length = pytest.mark.parametrize("length", [1, 35, 48])
checkpointing = pytest.mark.parametrize("checkpointed", [(), (0,), (0, 1, 2)])


def settings(shape: str, resampling: str, attention: bool, checkpointed: Any = ()) -> ModelConfig:
    levels = [
        LevelConfig(**level, activation_checkpointing="full" if index in checkpointed else "none")
        for index, level in enumerate(LEVELS[shape])
    ]
    return ModelConfig(
        dim=24,
        heads=3,
        dim_head=10,
        levels=levels,
        max_seq_len=48,
        vocab_size=37,
        resampling=resampling,  # type: ignore[arg-type]
        attention_resampling=attention,
    )


def counted_flops(config: ModelConfig, length: int, backward: bool) -> float:
    """Per token, as PyTorch's counter sees them on the meta device, attention spelled out."""
    with torch.device("meta"):
        model = HourglassLM(config)
        tokens_BL = torch.zeros(ROWS, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        nll, _ = sum_loss(model(tokens_BL), tokens_BL)
        if backward:
            nll.backward()
    return counter.get_total_flops() / (ROWS * length)


@every_shape
@every_kind
@every_length
def test_parameters_and_forward_operations_are_exact(
    shape: str, resampling: str, attention: bool, length: int
) -> None:
    config = settings(shape, resampling, attention)
    cost = model_cost(config, length, dense_attention=True)
    model = HourglassLM(config)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.flops_per_token == counted_flops(config, length, backward=False)


@every_shape
@every_kind
@every_length
@checkpointing
def test_training_operations_are_exact(
    shape: str, resampling: str, attention: bool, length: int, checkpointed: tuple[int, ...]
) -> None:
    config = settings(shape, resampling, attention, checkpointed)
    cost = model_cost(config, length, dense_attention=True)
    counted = counted_flops(config, length, backward=True)
    assert cost.hardware_flops_per_token == pytest.approx(counted, rel=1e-12)
    plain = model_cost(settings(shape, resampling, attention), length, dense_attention=True)
    assert cost.training_flops_per_token == plain.hardware_flops_per_token


def test_causal_attention_counts_the_pairs_that_it_needs() -> None:
    config = settings("flat", "naive", False)
    saved = [
        model_cost(config, n, dense_attention=True).levels[0].flops
        - model_cost(config, n).levels[0].flops
        for n in (1, 2, 3)
    ]
    per_pair = 3 * 4 * 30  # layers; two products of two operations each; heads * dim_head
    assert saved == [0, per_pair, 3 * per_pair]


def kept_bytes(model: HourglassLM, length: int) -> int:
    """Bytes of the different tensors that a forward pass keeps, weights and indices aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens_BL = torch.zeros(ROWS, length, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nll, _ = sum_loss(model(tokens_BL), tokens_BL)
    del nll
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def predicted_bytes(cost: ModelCost) -> int:
    return sum(part.activation_bytes for part in cost.parts)


@every_shape
@every_kind
@pytest.mark.parametrize("length", [35, 48])
@checkpointing
def test_activation_bytes_are_exact(
    shape: str, resampling: str, attention: bool, length: int, checkpointed: tuple[int, ...]
) -> None:
    config = settings(shape, resampling, attention, checkpointed)
    cost = model_cost(config, length, rows=ROWS)
    assert predicted_bytes(cost) == kept_bytes(HourglassLM(config), length)


def test_half_the_bytes_for_half_the_precision_except_for_statistics() -> None:
    config = settings("by 2", "linear", True)
    four, two, none = (
        predicted_bytes(model_cost(config, 48, rows=ROWS, bytes_per_number=n)) for n in (4, 2, 0)
    )
    assert four - none == 2 * (two - none)
    assert none > 0


def test_recomputation_needs_one_part_at_a_time() -> None:
    plain, saving = (
        model_cost(settings("by 2", "naive", True, levels), 48) for levels in ((), (0, 1))
    )
    assert saving.activation_bytes < plain.activation_bytes
    assert saving.activation_bytes > predicted_bytes(saving)
