"""The closed forms of ``cost.py`` are what PyTorch counts: parameters and operations to the last
one, memory within some per cent."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice, product
from typing import Any

import pytest
import torch
from slow_cases import every
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import KINDS, LEVELS, documents_of, make_config, random_text

from hourglass_dist.model import decode
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.layers import level_inputs
from hourglass_dist.model.settings import ModelConfig
from hourglass_dist.planning.cost import ModelCost, choose_checkpointing, model_cost

LENGTHS = (1, 5, 35, 48)  # 5 is shorter than the windows of 7, 35 no multiple of any bucket
DOCUMENTS = (3, 17, 1, 8, 6)
POLICIES = [("none",), ("full",), ("every 2",), ("selective",), ("offload",), ("full", "none")]
CLOSE = 0.03
"""What memory may be off by. What is off most are the norm statistics of bf16: fp32 on GPUs, bf16
on CPUs, and a large share of models as small as these."""

# Beyond what the files in configs/ have: (kind, options).
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("lucidrains", {"bias": False}),
    ("lucidrains", {"norm": "rms", "qk_norm": True}),
    ("lucidrains", {"feed_forward": "swiglu", "window": 7}),
    ("lucidrains", {"positions": "rope", "max_seq_len": None}),
    ("lucidrains", {"skip": "gated", "wider": 4}),
    ("lucidrains", {"positions": "relative", "max_seq_len": None, "stack_norms": True}),
    ("lucidrains, linear", {"wider": 3, "width_change": "projection"}),
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

every_variant = pytest.mark.parametrize(("kind", "more"), every(3, VARIANTS), ids=str)


MEETINGS = [
    (kind, more, POLICIES[(2 * number + turn) % len(POLICIES)], list(LEVELS)[(number + turn) % 5])
    for number, (kind, more) in enumerate(VARIANTS)
    for turn in range(2)
]
"""Every variant with two policies at two depths, in turn: all of them would take minutes."""
every_meeting = pytest.mark.parametrize(
    ("kind", "more", "policies", "levels"), every(5, MEETINGS), ids=str
)


def configs(kind: str, more: dict[str, Any], levels: str = "") -> Iterator[ModelConfig]:
    """The model with every depth, or with one."""
    for shape in [levels] if levels else LEVELS:
        yield make_config(kind, shape, **more)


def with_policies(config: ModelConfig, policies: tuple[str, ...]) -> ModelConfig:
    """The levels take turns."""
    return config.with_checkpointing(list(islice(cycle(policies), len(config.levels))))


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
    return int(counter.get_total_flops())


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

    gc.freeze()  # what is there by now is not looked at: that would take the most time
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
    for config in configs(kind, more):
        model = HourglassLM(config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
        for length in LENGTHS:
            cost = model_cost(config, length, dense_attention=True)
            assert (cost.parameters, cost.trained_parameters) == (everything, trained)
            tokens_BL = random_text(2, length)
            counted = counted_flops(config, tokens_BL, None, train=False)
            assert cost.flops_per_token == counted / tokens_BL.numel()


@every_meeting
def test_training_operations_are_exact(
    kind: str, more: dict[str, Any], policies: tuple[str, ...], levels: str
) -> None:
    length = 35
    for config in configs(kind, more, levels):
        settled = with_policies(config, policies)
        cost = model_cost(settled, length, dense_attention=True)
        tokens_BL = random_text(2, length)
        counted = counted_flops(settled, tokens_BL, None, train=True) / tokens_BL.numel()
        assert cost.hardware_flops_per_token == pytest.approx(counted, rel=1e-12)
        plain = model_cost(config, length, dense_attention=True)
        assert cost.training_flops_per_token == plain.hardware_flops_per_token


@every_meeting
@pytest.mark.parametrize("bf16", [False, True])
def test_activation_bytes_are_those_kept(
    kind: str, more: dict[str, Any], policies: tuple[str, ...], levels: str, bf16: bool
) -> None:
    """At a width at which tables of words and documents do not weigh more than they do in use."""
    rows, length = (3, 48) if bf16 else (2, 35)
    for config in configs(kind, more | {"width": 64}, levels):
        settled = with_policies(config, policies)
        cost = model_cost(settled, length, rows=rows, bytes_per_number=2 if bf16 else 4)
        kept = kept_bytes(settled, random_text(rows, length), bf16=bf16)
        assert predicted_bytes(cost) == pytest.approx(kept, rel=CLOSE)


@every_meeting
def test_packed_rows_cost_what_they_do(
    kind: str, more: dict[str, Any], policies: tuple[str, ...], levels: str
) -> None:
    tokens_BL, ids_BL = random_text(2, sum(DOCUMENTS)), documents_of(*DOCUMENTS).repeat(2, 1)
    length = tokens_BL.shape[1]
    settled = with_policies(make_config(kind, levels, **(more | {"width": 64})), policies)
    cost = model_cost(settled, length, rows=2, dense_attention=True, packed=True)
    counted = counted_flops(settled, tokens_BL, ids_BL, train=True) / tokens_BL.numel()
    assert cost.hardware_flops_per_token == pytest.approx(counted, rel=1e-12)
    kept = kept_bytes(settled, tokens_BL, ids_BL)
    assert predicted_bytes(cost) == pytest.approx(kept, rel=CLOSE)


@every_variant
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputing_a_layer_holds_what_it_would_have_kept(
    kind: str, more: dict[str, Any], policy: str
) -> None:
    config = with_policies(make_config(kind, "flat", **more), (policy,))
    one = replace(config, levels=(replace(config.levels[0], layers=1),))
    tokens_BL = random_text(2, 48)
    transient = model_cost(one, 48, rows=2).levels[0].transient_bytes
    whole = kept_bytes(with_policies(one, ("none",)), tokens_BL)
    assert whole - kept_bytes(one, tokens_BL) == pytest.approx(transient, rel=CLOSE)


@every_variant
def test_needed_pairs_are_those_that_the_masks_leave(kind: str, more: dict[str, Any]) -> None:
    for config, length in product(configs(kind, more), (5, 35)):
        model = HourglassLM(config)
        tokens_BL = random_text(1, length)
        with torch.no_grad():
            x_BLD, layouts = model.embed(tokens_BL), model.layouts(tokens_BL)
        inputs = level_inputs(config, layouts, x_BLD)
        cost = model_cost(config, length)
        dense = model_cost(config, length, dense_attention=True)
        for level, own, one, all_pairs in zip(
            config.levels, inputs, cost.levels, dense.levels, strict=True
        ):
            n, own_mask = own.rows.length, own.mask
            lower = torch.ones(n, n).tril()
            seen = int((lower.cumsum(0).tril() <= (level.window or n)).logical_and(lower).sum())
            computed = n * n if own_mask.bias is None else own_mask.bias.numel()
            taken_off = (level.pre + level.post) * (computed - seen)
            if own.cross is not None:
                if own.rows.buckets is not None:
                    continue  # where words begin is not known: as if they lay evenly
                for rule in (own.cross.down, own.cross.up):
                    mask = rule.mask(model.tokens.weight, flex=False).bias
                    assert isinstance(mask, Tensor)
                    taken_off += int(mask.isinf().sum())
            wide = 2 if config.positions == "relative" else 1
            assert all_pairs.flops - one.flops == 4 * level.inner * wide * taken_off


@every_variant
def test_cache_bytes_are_those_of_a_prompt(kind: str, more: dict[str, Any]) -> None:
    for config, length in product(configs(kind, more), (48,)):
        _, cache = decode.prefill(HourglassLM(config), random_text(1, length))
        assert model_cost(config, length).cache_bytes == cache.bytes


@every_variant
def test_cache_grows_by_what_a_token_adds(kind: str, more: dict[str, Any]) -> None:
    for config in configs(kind, more):
        stride = config.strides[-1]
        near, far = (model_cost(config, n) for n in (stride * 20, stride * 30))
        grown = (far.cache_bytes - near.cache_bytes) / (stride * 10)
        assert near.cache_bytes_per_token == far.cache_bytes_per_token == pytest.approx(grown)


@every_variant
@pytest.mark.parametrize("levels", ["flat", "by 2", "by 2, 4"])
def test_checkpointing_is_chosen_to_fit(kind: str, more: dict[str, Any], levels: str) -> None:
    config = with_policies(make_config(kind, levels, **more), ("auto", "every 2", "auto"))

    def cost(model: ModelConfig) -> ModelCost:
        return model_cost(model, 48, rows=2, bytes_per_number=2)

    def choose(budget: int) -> ModelConfig:
        return choose_checkpointing(config, 48, rows=2, bytes_per_number=2, budget=budget)

    policies = [level.activation_checkpointing for level in choose(2**40).levels]
    assert policies == ["none", "every 2", "none"][: len(policies)]
    before = cost(choose(2**40))
    budget = before.activation_bytes
    least = 0
    while not least:
        try:
            chosen = cost(choose(budget))
        except ValueError as error:
            least = int(str(error).split(" take ")[1].split()[0].replace(",", ""))
            break
        assert chosen.activation_bytes <= budget
        assert chosen.recompute_flops >= before.recompute_flops
        before, budget = chosen, chosen.activation_bytes - 1
    assert least == budget + 1 == before.activation_bytes


def test_checkpointing_that_is_not_automatic_stays() -> None:
    config = with_policies(make_config("modern", "by 2"), ("full", "selective"))
    assert choose_checkpointing(config, 48, rows=1, bytes_per_number=4, budget=1) == config
    with pytest.raises(ValueError, match="auto has no cost before it is settled"):
        model_cost(with_policies(config, ("auto",)), 48)
