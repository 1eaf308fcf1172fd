"""What a plan says of a model is what PyTorch counts: parameters and operations to the last one,
the activations that are counted on the meta device those that a real forward pass keeps."""

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

from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.layers import level_inputs
from hourglass_dist.model.settings import ModelConfig
from hourglass_dist.planning.count import Activations, Pass, count
from hourglass_dist.planning.flops import model_flops
from hourglass_dist.planning.parameters import parameters_of
from hourglass_dist.planning.plan import choose_checkpointing

LENGTHS = (1, 5, 35, 48)  # 5 is shorter than the windows of 7, 35 no multiple of any bucket
DOCUMENTS = (3, 17, 1, 8, 6)
POLICIES = [("none",), ("full",), ("every 2",), ("selective",), ("offload",), ("full", "none")]
CLOSE = {torch.float32: 0.001, torch.bfloat16: 0.01}
"""What memory may be off by, as a share. In fp32 these are the two sums that a loss returns; in
bf16 the statistics of LayerNorm, which are fp32 on GPUs and bf16 on CPUs."""

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

every_kind = pytest.mark.parametrize("kind", KINDS)
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
    config: ModelConfig,
    tokens_BL: Tensor,
    ids_BL: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
) -> int:
    """Bytes of the different tensors that are there after a forward pass and were not before: what
    autograd saves, and what checkpointing hides from it in Python objects."""
    model = HourglassLM(config).to(torch.float32 if autocast else dtype)
    before = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    before |= {t.untyped_storage().data_ptr() for t in (tokens_BL, ids_BL) if t is not None}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    gc.freeze()  # what is there by now is not looked at: that would take the most time
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=autocast),
        ):
            nll, _ = model(tokens_BL, documents_BL=ids_BL, targets_BL=tokens_BL)
        gc.collect()
        alive = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    finally:
        gc.unfreeze()
    storages = [tensor.untyped_storage() for tensor in (*saved, *alive)]
    del nll
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in before}.values())


def counted(
    config: ModelConfig,
    tokens_BL: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    packed: bool = False,
    device: str = "cpu",
    autocast: bool = False,
) -> Activations:
    """What the planner counts for the same pass."""
    how = Pass(*tokens_BL.shape, dtype, packed, device, autocast)
    return count(config, how).under(config.checkpointing)


def kept(activations: Activations) -> int:
    """Bytes that are there when the forward pass has ended."""
    return sum(part.kept + part.offloaded for part in activations.parts)


@every_variant
def test_parameters_and_forward_operations_are_exact(kind: str, more: dict[str, Any]) -> None:
    for config in configs(kind, more):
        model = HourglassLM(config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in model.parameters())
        parameters = parameters_of(config)
        assert (parameters.total, parameters.trained) == (everything, trained)
        levels = [parameters.of_level(level) for level in (None, *range(len(config.levels)))]
        assert sum(levels) == everything
        for length in LENGTHS:
            flops = model_flops(config, length, dense_attention=True)
            tokens_BL = random_text(2, length)
            seen = counted_flops(config, tokens_BL, None, train=False)
            assert flops.forward_per_token == seen / tokens_BL.numel()


@every_meeting
def test_training_operations_are_exact(
    kind: str, more: dict[str, Any], policies: tuple[str, ...], levels: str
) -> None:
    length = 35
    for config in configs(kind, more, levels):
        settled = with_policies(config, policies)
        flops = model_flops(settled, length, dense_attention=True)
        tokens_BL = random_text(2, length)
        seen = counted_flops(settled, tokens_BL, None, train=True) / tokens_BL.numel()
        assert flops.hardware_per_token == pytest.approx(seen, rel=1e-12)
        plain = model_flops(config, length, dense_attention=True)
        assert flops.training_per_token == plain.hardware_per_token


@every_meeting
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_counted_activations_are_those_kept(
    kind: str, more: dict[str, Any], policies: tuple[str, ...], levels: str, dtype: torch.dtype
) -> None:
    """At a width at which tables of words and documents do not weigh more than they do in use."""
    tokens_BL = random_text(2, 35) if dtype == torch.float32 else random_text(3, 48)
    for config in configs(kind, more | {"width": 64}, levels):
        settled = with_policies(config, policies)
        real = kept_bytes(settled, tokens_BL, dtype=dtype)
        assert kept(counted(settled, tokens_BL, dtype)) == pytest.approx(real, rel=CLOSE[dtype])


@every_meeting
def test_packed_rows_cost_what_they_do(
    kind: str, more: dict[str, Any], policies: tuple[str, ...], levels: str
) -> None:
    tokens_BL, ids_BL = random_text(2, sum(DOCUMENTS)), documents_of(*DOCUMENTS).repeat(2, 1)
    length = tokens_BL.shape[1]
    settled = with_policies(make_config(kind, levels, **(more | {"width": 64})), policies)
    flops = model_flops(settled, length, dense_attention=True, packed=True)
    seen = counted_flops(settled, tokens_BL, ids_BL, train=True) / tokens_BL.numel()
    assert flops.hardware_per_token == pytest.approx(seen, rel=1e-12)
    real = kept_bytes(settled, tokens_BL, ids_BL)
    mine = kept(counted(settled, tokens_BL, packed=True))
    assert mine == pytest.approx(real, rel=CLOSE[torch.float32])


@every_kind
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_dropout_keeps_its_masks(kind: str, policy: str) -> None:
    """On a CPU attention with dropout is no fused kernel, and keeps all its weights."""
    config = make_config(kind, "by 3", width=64, dropout=0.2, residual_dropout=True)
    config, tokens_BL = with_policies(config, (policy,)), random_text(2, 48)
    real, mine = kept_bytes(config, tokens_BL), kept(counted(config, tokens_BL))
    states = round((real - mine) / torch.get_rng_state().nbytes)  # one a recomputed module
    assert states <= (0 if policy == "none" else 5)
    real -= states * torch.get_rng_state().nbytes
    assert mine == pytest.approx(real, rel=CLOSE[torch.float32])


@every_kind
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_autocast_keeps_narrow_copies(kind: str, policy: str) -> None:
    config = with_policies(make_config(kind, "by 3", width=64), (policy,))
    tokens_BL = random_text(2, 48)
    real = kept_bytes(config, tokens_BL, dtype=torch.bfloat16, autocast=True)
    mine = kept(counted(config, tokens_BL, torch.bfloat16, autocast=True))
    assert mine == pytest.approx(real, rel=0.1)


@every_kind
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_keeps_nothing_for_each_pair(kind: str, packed: bool) -> None:
    """Twice the length takes twice the memory: FlexAttention has no masks of L x L."""
    config = make_config(kind, "by 2, 4")
    if config.max_seq_len is not None:
        config = replace(config, max_seq_len=2048)
    short, long = (
        kept(counted(config, torch.empty(2, n), packed=packed, device="cuda")) for n in (1024, 2048)
    )
    assert long / short == pytest.approx(2, rel=0.05)


def test_a_gpu_keeps_a_byte_for_each_number_that_dropout_sees() -> None:
    plain = make_config("paper", "by 3", width=64, residual_dropout=False)
    dropping = make_config("paper", "by 3", width=64, residual_dropout=True, dropout=0.2)
    tokens_BL = random_text(2, 48)
    without, here, gone = (
        kept(counted(config, tokens_BL, device=device))
        for config, device in ((plain, "cuda"), (dropping, "cpu"), (dropping, "cuda"))
    )
    assert without < gone < here


def test_offloaded_activations_leave_a_gpu_only() -> None:
    config = with_policies(make_config("modern", "by 2"), ("offload",))
    tokens_BL = random_text(2, 48)
    here, gone = (counted(config, tokens_BL, device=device) for device in ("cpu", "cuda"))
    assert here.offloaded == 0 < gone.offloaded
    assert kept(here) < kept(gone), "what is saved twice is copied twice"
    assert gone.total < here.total / 2


@every_variant
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputing_a_layer_holds_what_it_would_have_kept(
    kind: str, more: dict[str, Any], policy: str
) -> None:
    config = with_policies(make_config(kind, "flat", **more), (policy,))
    one = replace(config, levels=(replace(config.levels[0], layers=1),))
    tokens_BL = random_text(2, 48)
    transient = counted(one, tokens_BL).levels[0].transient
    whole = kept_bytes(with_policies(one, ("none",)), tokens_BL)
    spared = whole - kept_bytes(one, tokens_BL)
    if policy == "full":
        assert spared == pytest.approx(transient, rel=0.03)
    else:  # keeps results, too, that nothing would have saved
        assert 0.97 * spared <= transient < whole


@every_variant
def test_needed_pairs_are_those_that_the_masks_leave(kind: str, more: dict[str, Any]) -> None:
    for config, length in product(configs(kind, more), (5, 35)):
        model = HourglassLM(config)
        tokens_BL = random_text(1, length)
        with torch.no_grad():
            x_BLD, layouts = model.embed(tokens_BL), model.layouts(tokens_BL)
        inputs = level_inputs(config, layouts, x_BLD)
        flops = model_flops(config, length)
        dense = model_flops(config, length, dense_attention=True)
        for level, own, one, all_pairs in zip(
            config.levels, inputs, flops.levels, dense.levels, strict=True
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
            assert all_pairs.forward - one.forward == 4 * level.inner * wide * taken_off


@every_variant
@pytest.mark.parametrize("levels", ["flat", "by 2", "by 2, 4"])
def test_checkpointing_is_chosen_to_fit(kind: str, more: dict[str, Any], levels: str) -> None:
    config = with_policies(make_config(kind, levels, **more), ("auto", "every 2", "auto"))
    how = Pass(2, 48, torch.bfloat16, packed=False, device="cpu")

    def needed(model: ModelConfig) -> int:
        return count(model, how).under(model.checkpointing).total

    def recomputed(model: ModelConfig) -> int:
        return model_flops(model, 48).recomputed

    policies = choose_checkpointing(config, how, 2**40).checkpointing
    assert policies == ["none", "every 2", "none"][: len(policies)]
    before = choose_checkpointing(config, how, 2**40)
    budget = needed(before)
    least = 0
    while not least:
        try:
            chosen = choose_checkpointing(config, how, budget)
        except ValueError as error:
            least = int(str(error).split(" take ")[1].split()[0].replace(",", ""))
            break
        assert needed(chosen) <= budget
        assert recomputed(chosen) >= recomputed(before)
        before, budget = chosen, needed(chosen) - 1
    assert least == budget + 1 == needed(before)


def test_checkpointing_that_is_not_automatic_stays() -> None:
    config = with_policies(make_config("modern", "by 2"), ("full", "selective"))
    how = Pass(1, 48, torch.float32, packed=False, device="cpu")
    assert choose_checkpointing(config, how, 2**40) == config
    with pytest.raises(ValueError, match="auto is settled before"):
        model_flops(with_policies(config, ("auto",)), 48)
