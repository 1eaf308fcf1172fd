"""What holds for every shape of the model: causality, masks, lengths, checkpointing, dropout."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from hourglass_transformer_pytorch import HourglassTransformerLM
from parity import randomise
from torch import Tensor, nn

from hourglass_dist.config import LevelConfig, ModelConfig
from hourglass_dist.model.hourglass import HourglassLM, sum_loss
from hourglass_dist.model.interop import lucidrains_kwargs, to_lucidrains
from hourglass_dist.model.layers import visible_pairs
from hourglass_dist.model.linear import Linear
from hourglass_dist.model.resample import Shorten, ValleyAttention

VOCAB, LONGEST = 29, 26

SHAPES: dict[str, Any] = {
    "flat": [{"layers": 2}],
    "by 2": [{"layers": [1, 1]}, {"layers": 2, "shorten": 2}],
    "by 3": [{"layers": [1, 1]}, {"layers": 1, "shorten": 3}],
    "by 2, 4": [
        {"layers": [1, 0]},
        {"layers": [1, 1], "shorten": 2},
        {"layers": 1, "shorten": 4},
    ],
    "by 3, 2, 2": [
        {"layers": [0, 1]},
        {"layers": [1, 1], "shorten": 3},
        {"layers": [1, 0], "shorten": 2},
        {"layers": 1, "shorten": 2},
    ],
}
KINDS = [("naive", True), ("naive", False), ("linear", True), ("linear", False)]
LENGTHS = [1, 2, 5, 7, 13, 24, 26]

every_shape = pytest.mark.parametrize("shape", SHAPES)
every_kind = pytest.mark.parametrize(("resampling", "attention"), KINDS)


def build(
    shape: str, resampling: str = "naive", attention: bool = True, **more: Any
) -> HourglassLM:
    config = ModelConfig(
        dim=12,
        heads=2,
        dim_head=5,
        levels=[LevelConfig(**level) for level in SHAPES[shape]],
        max_seq_len=LONGEST,
        vocab_size=VOCAB,
        resampling=resampling,  # type: ignore[arg-type]
        attention_resampling=attention,
        **more,
    )
    model = HourglassLM(config).double()
    randomise(model, seed=7)
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_masks(length: int) -> Tensor:
    """Padding behind, in front, everywhere, nowhere, and at random."""
    random = torch.rand(4, length, generator=torch.Generator().manual_seed(1)) < 0.6
    places = torch.arange(length)
    fixed = [places < length // 2, places >= length // 2, places < 0, places >= 0]
    return torch.cat([torch.stack(fixed), random])


def changed_at_each_place(tokens_L: Tensor) -> Tensor:
    """(L, L): row t is the text with another token at place t."""
    return (tokens_L + torch.eye(len(tokens_L), dtype=torch.int64)) % VOCAB


def differs(left_BLV: Tensor, right_BLV: Tensor) -> Tensor:
    return (left_BLV - right_BLV).abs().amax(dim=-1) > 1e-12


@every_shape
@every_kind
@torch.no_grad()
def test_no_logit_depends_on_a_later_token(shape: str, resampling: str, attention: bool) -> None:
    model = build(shape, resampling, attention)
    for length in LENGTHS:
        tokens_L = random_tokens(1, length)[0]
        moved_LL = differs(model(changed_at_each_place(tokens_L)), model(tokens_L[None]))
        assert not moved_LL.tril(-1).any(), f"length {length}: the past changed"
        assert moved_LL.diagonal().all(), f"length {length}: a token does not even reach itself"


@every_shape
@every_kind
@torch.no_grad()
def test_no_logit_depends_on_a_later_token_under_masks(
    shape: str, resampling: str, attention: bool
) -> None:
    model = build(shape, resampling, attention)
    for length in LENGTHS:
        tokens_L = random_tokens(1, length)[0]
        for mask_L in random_masks(length):
            logits = model(changed_at_each_place(tokens_L), mask_L.expand(length, length))
            before = model(tokens_L[None], mask_L[None])
            assert before.isfinite().all()
            assert not differs(logits, before).tril(-1).any(), f"length {length}: {mask_L}"


@torch.no_grad()
def test_the_reference_does_leak_under_masks() -> None:
    """Why the model does not follow it there: a row with nothing to see attends to the future."""
    model = build("by 2")
    theirs = HourglassTransformerLM(**lucidrains_kwargs(model.config)).double()
    theirs.load_state_dict(to_lucidrains(model))
    tokens_L = random_tokens(1, 24)[0]
    mask_L = torch.arange(24) >= 12
    logits = theirs(changed_at_each_place(tokens_L), mask=mask_L.expand(24, 24))
    assert differs(logits, theirs(tokens_L[None], mask=mask_L[None])).tril(-1).any()


@every_shape
@every_kind
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_no_logit_of_a_token_depends_on_padding(
    shape: str, resampling: str, attention: bool, causal: bool
) -> None:
    model = build(shape, resampling, attention, causal=causal)
    for length in LENGTHS:
        mask_BL = random_masks(length)
        tokens_BL = random_tokens(len(mask_BL), length)
        other_BL = torch.where(mask_BL, tokens_BL, random_tokens(len(mask_BL), length, seed=5))
        moved_BL = differs(model(tokens_BL, mask_BL), model(other_BL, mask_BL))
        assert not moved_BL[mask_BL].any(), f"length {length}"


@every_shape
@every_kind
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_a_mask_of_ones_is_no_mask_and_padding_behind_is_not_there(
    shape: str, resampling: str, attention: bool, causal: bool
) -> None:
    model = build(shape, resampling, attention, causal=causal)
    for length in LENGTHS:
        tokens_BL = random_tokens(2, LONGEST)
        mask_BL = (torch.arange(LONGEST) < length).expand(2, -1)
        alone = model(tokens_BL[:, :length])
        assert not differs(model(tokens_BL[:, :length], mask_BL[:, :length]), alone).any()
        assert not differs(model(tokens_BL, mask_BL)[:, :length], alone).any()


@pytest.mark.parametrize("causal", [True, False])
def test_every_position_sees_itself_and_no_other_padding(causal: bool) -> None:
    valid_BL = random_masks(13)
    visible_BLL = visible_pairs(valid_BL, causal)
    assert visible_BLL is not None
    for valid_L, visible_LL in zip(valid_BL, visible_BLL[:, 0], strict=True):
        for query, key in itertools.product(range(13), repeat=2):
            wanted = query == key or (bool(valid_L[key]) and (key < query or not causal))
            assert visible_LL[query, key] == wanted


@pytest.mark.parametrize("causal", [True, False])
def test_a_bucket_is_real_when_a_token_in_it_is(causal: bool) -> None:
    shorten = Shorten(build("by 3", causal=causal).config, 3)
    valid_BL = random_masks(13)
    for valid_L, real_G in zip(valid_BL, shorten.shorten_mask(valid_BL), strict=True):  # type: ignore[arg-type]
        for bucket in range(5):
            first = 3 * bucket - (2 if causal else 0)
            wanted = any(valid_L[place] for place in range(first, first + 3) if 0 <= place < 13)
            assert real_G[bucket] == wanted


@pytest.mark.parametrize("length", [0, LONGEST + 1])
def test_a_length_outside_the_position_table_is_refused(length: int) -> None:
    with pytest.raises(
        ValueError, match=f"expected 1 to max_seq_len={LONGEST} tokens, given {length}"
    ):
        build("by 2")(random_tokens(1, length))


@every_shape
@pytest.mark.parametrize("mask", [False, True])
def test_gradients_are_finite_and_reach_every_trained_weight(shape: str, mask: bool) -> None:
    model = build(shape, "linear")
    mask_BL = random_masks(13)
    tokens_BL = random_tokens(len(mask_BL), 13)
    model(tokens_BL, mask_BL if mask else None).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_only_the_query_side_of_the_way_out_is_frozen() -> None:
    frozen = {n for n, p in build("by 2").named_parameters() if not p.requires_grad}
    parts = ("norm.weight", "norm.bias", "query.weight", "key.weight")
    assert frozen == {f"hourglass.lengthen.attention.{part}" for part in parts}


def backward_and_count(model: HourglassLM, tokens_BL: Tensor) -> int:
    """A backward pass; returns the numbers kept for it since the forward pass."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens_BL).square().sum()
    kept = sum(sizes)
    loss.backward()
    return kept


@every_shape
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_nothing(shape: str, dropout: float) -> None:
    plain = build(shape, "linear", attn_dropout=dropout, ff_dropout=dropout)
    levels = [
        level.model_copy(update={"activation_checkpointing": "full"})
        for level in plain.config.levels
    ]
    saving = HourglassLM(plain.config.model_copy(update={"levels": levels})).double()
    saving.load_state_dict(plain.state_dict())
    kept = [backward_and_count(model, random_tokens(2, 23)) for model in (plain, saving)]
    assert kept[1] < kept[0] / 2, "nothing was saved by recomputing"
    for (name, one), two in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad), name


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    tokens_BL = random_tokens(2, 13)
    plain = build("by 2")
    for more in ({"attn_dropout": 0.5}, {"ff_dropout": 0.5}):
        model = build("by 2", **more)
        assert not differs(model.eval()(tokens_BL), plain(tokens_BL)).any()
        assert differs(model.train()(tokens_BL), plain(tokens_BL)).any()


@torch.no_grad()
def test_dropout_on_the_way_out_is_right_in_the_mean_and_drops_whole_heads() -> None:
    config = build("by 2").config.model_copy(update={"attn_dropout": 0.4})
    attention = ValleyAttention(config).double()
    attention.out.weight.copy_(torch.eye(12, 10))
    attention.out.bias.zero_()
    valley_BGD = torch.randn(1, 4000, 12, dtype=torch.float64).mul(0.0).add(1.0)
    dropped = attention(valley_BGD, 3)
    whole = attention.eval()(valley_BGD, 3)
    assert dropped.shape == (1, 4000, 3, 12)
    torch.testing.assert_close(dropped.mean(dim=(0, 1, 2)), whole[0, 0, 0], rtol=0.05, atol=0)
    heads = (dropped[..., :10].unflatten(-1, (2, 5)) == 0).double().mean(dim=-1)
    assert ((heads == 0) | (heads == 1)).all()


@every_shape
@every_kind
@torch.no_grad()
def test_every_weight_is_used_inside_its_own_module_only(
    shape: str, resampling: str, attention: bool
) -> None:
    """As under ZeRO-3, where weights are there only while the module that owns them runs."""
    model = build(shape, resampling, attention)
    expected = model(random_tokens(2, 13))
    stored = {parameter: parameter.data for parameter in model.parameters()}

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = stored[parameter]

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=torch.float64)

    for module in model.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    assert torch.equal(model(random_tokens(2, 13)), expected)


def test_the_loss_is_a_sum_over_targets_that_count() -> None:
    logits_BLV = torch.randn(2, 5, VOCAB, dtype=torch.bfloat16)
    targets_BL = torch.tensor([[0, 1, 2, -100, 4], [-100, -100, 0, 0, 28]])
    nll, count = sum_loss(logits_BLV, targets_BL)
    log_p = logits_BLV.float().log_softmax(-1)
    wanted = sum(
        -log_p[b, i, t] for b, row in enumerate(targets_BL) for i, t in enumerate(row) if t >= 0
    )
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, wanted)
    assert count == 7
    nothing, none = sum_loss(logits_BLV, torch.full((2, 5), -100))
    assert (nothing, none) == (0, 0)


@pytest.mark.parametrize(("wide_in", "wide_out"), [(16, 40), (40, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fast_linear_layer_is_a_linear_layer(wide_in: int, wide_out: int, bias: bool) -> None:
    torch.manual_seed(0)
    fast, plain = Linear(wide_in, wide_out, bias), nn.Linear(wide_in, wide_out, bias)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(wide_in, 7, 3).permute(2, 1, 0)
    gradients = []
    for layer in (fast, plain):
        given = x.clone().requires_grad_()
        out = layer(given)
        assert out.shape == (3, 7, wide_out)
        out.square().sum().backward()
        gradients.append([out, given.grad, *(p.grad for p in layer.parameters())])
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_linear_layer_does_not_hold_a_weight_that_is_taken_away(dtype: torch.dtype) -> None:
    """As ZeRO-3 does between the forward and the backward pass."""
    layer = Linear(64, 64, dtype=dtype)
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    out = layer(x)
    weight, gathered = layer.weight.detach().clone(), weakref.ref(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0, dtype=dtype)
    gc.collect()
    assert gathered() is None
    layer.weight.data = weight
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1), rtol=0.02, atol=0.05)


def test_the_fast_linear_layer_keeps_frozen_weights_and_follows_autocast() -> None:
    layer = Linear(8, 8).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
