"""What holds for every kind of model, depth and length: no leaks, whatever is packed or padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import zoo
from hourglass_transformer_pytorch import HourglassTransformerLM
from slow_cases import every
from torch import Tensor, nn
from zoo import documents_of, farthest, make_config, make_model, random_text

from hourglass_dist.model import layout
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.layout import keep_boundaries, missed_buckets, row_layouts, word_starts
from hourglass_dist.model.lucidrains import from_lucidrains, lucidrains_kwargs, to_lucidrains

LENGTHS = [1, 2, 5, 7, 13, 24, 26]
CUTS = [(26,), (1, 1, 5, 19), (13, 13), (4, 9, 1, 12), (2, 3, 5, 7, 9)]


every_kind = pytest.mark.parametrize("kind", zoo.KINDS)
every_depth = pytest.mark.parametrize("levels", zoo.LEVELS)
some_depths = pytest.mark.parametrize("levels", every(2, zoo.LEVELS))


def random_masks(length: int) -> Tensor:
    """Padding behind, in front, everywhere, nowhere, and at random."""
    random = torch.rand(4, length, generator=torch.Generator().manual_seed(1)) < 0.6
    places = torch.arange(length)
    fixed = [places < length // 2, places >= length // 2, places < 0, places >= 0]
    return torch.cat([torch.stack(fixed), random])


def changed_at_each_place(tokens_L: Tensor) -> Tensor:
    """(L, L): row t is the text with another token at place t, a space for a letter or back."""
    other_L = torch.where(tokens_L == 32, 97, 32)
    return torch.where(torch.eye(len(tokens_L), dtype=torch.bool), other_L, tokens_L)


def differs(left_BLV: Tensor, right_BLV: Tensor) -> Tensor:
    return (left_BLV - right_BLV).abs().amax(dim=-1) > 1e-12


# --- nothing sees the future ---------------------------------------------------------------------


@every_kind
@every_depth
@torch.no_grad()
def test_no_logit_depends_on_a_later_token(kind: str, levels: str) -> None:
    model = make_model(kind, levels)
    for length in LENGTHS:
        tokens_L = random_text(1, length)[0]
        moved_LL = differs(model(changed_at_each_place(tokens_L)), model(tokens_L[None]))
        assert not moved_LL.tril(-1).any(), f"length {length}: the past changed"
        assert moved_LL.diagonal().all(), f"length {length}: a token does not even reach itself"


@every_kind
@some_depths
@torch.no_grad()
def test_nor_under_masks_and_in_packed_rows(kind: str, levels: str) -> None:
    model = make_model(kind, levels)
    tokens_L = random_text(1, 26)[0]
    changed_LL = changed_at_each_place(tokens_L)
    for mask_L in random_masks(26):
        logits = model(changed_LL, mask_L.expand(26, 26))
        before = model(tokens_L[None], mask_L[None])
        assert before.isfinite().all()
        moved_LL = differs(logits, before).tril(-1)
        assert not moved_LL[:, mask_L].any(), f"{mask_L}"
    documents_1L = documents_of(4, 9, 1, 12)
    packed = model(changed_LL, documents_BL=documents_1L.expand(26, -1))
    moved_LL = differs(packed, model(tokens_L[None], documents_BL=documents_1L))
    same_LL = documents_1L == documents_1L.T
    assert not moved_LL[~same_LL].any()
    assert not moved_LL.tril(-1).any()


@torch.no_grad()
def test_a_broken_shift_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets that end one position later leak it: the test above fails then."""

    def late(x_BL: Tensor, shorten: int, causal: bool) -> Tensor:
        return layout.cut(x_BL.roll(-1, dims=1), shorten, causal)

    monkeypatch.setattr("hourglass_dist.model.pool.cut", late)
    with pytest.raises(AssertionError, match="the past changed"):
        test_no_logit_depends_on_a_later_token("lucidrains", "by 2")


# --- packing and padding -------------------------------------------------------------------------


@every_kind
@some_depths
@torch.no_grad()
def test_a_packed_document_is_as_if_it_were_alone(kind: str, levels: str) -> None:
    model = make_model(kind, levels)
    for lengths in CUTS:
        tokens_1L = random_text(1, sum(lengths))
        assert missed_buckets(model.config, tokens_1L, documents_of(*lengths))[0] == 0
        packed = model(tokens_1L, documents_BL=documents_of(*lengths))
        alone = [model(part) for part in tokens_1L.split(lengths, dim=1)]
        assert farthest(packed, torch.cat(alone, dim=1)) < 1e-10, lengths


@every_kind
@some_depths
@torch.no_grad()
def test_padding_is_as_if_it_were_not_there(kind: str, levels: str) -> None:
    """Left, right, in the middle: the real tokens alone give the same logits."""
    model = make_model(kind, levels)
    for length in (2, 13, 26):
        mask_BL = random_masks(length)
        tokens_BL = random_text(len(mask_BL), length)
        padded_BLV = model(tokens_BL, mask_BL)
        for tokens_L, mask_L, padded_LV in zip(tokens_BL, mask_BL, padded_BLV, strict=True):
            if mask_L.any():
                alone_NV = model(tokens_L[mask_L][None])[0]
                assert farthest(padded_LV[mask_L], alone_NV) < 1e-10, f"{mask_L}"
        everywhere = torch.ones_like(mask_BL)
        assert farthest(model(tokens_BL, everywhere), model(tokens_BL)) < 1e-12


@every_kind
@torch.no_grad()
def test_padded_rows_of_packed_documents(kind: str) -> None:
    model = make_model(kind, "by 2, 4")
    tokens_1L, documents_1L = random_text(1, 26), documents_of(7, 8, 11)
    mask_1L = torch.ones_like(tokens_1L, dtype=torch.bool)
    mask_1L[:, 7:15] = False
    both = model(tokens_1L, mask_1L, documents_1L)
    assert farthest(both[:, :7], model(tokens_1L[:, :7])) < 1e-10
    assert farthest(both[:, 15:], model(tokens_1L[:, 15:])) < 1e-10


@every_depth
@pytest.mark.parametrize("kind", ["lucidrains", "lucidrains, linear", "plain"])
@torch.no_grad()
def test_an_encoder_does_not_see_padding(kind: str, levels: str) -> None:
    model = make_model(kind, levels, causal=False)
    for length in LENGTHS:
        mask_BL = random_masks(length)
        tokens_BL = random_text(len(mask_BL), length)
        other_BL = torch.where(mask_BL, tokens_BL, random_text(len(mask_BL), length, seed=5))
        moved_BL = differs(model(tokens_BL, mask_BL), model(other_BL, mask_BL))
        assert not moved_BL[mask_BL].any(), f"length {length}"
        assert farthest(model(tokens_BL, torch.ones_like(mask_BL)), model(tokens_BL)) < 1e-12


@pytest.mark.parametrize("dtype", every(2, [torch.float32, torch.bfloat16]), ids=str)
@every_kind
@some_depths
@pytest.mark.parametrize("given", ["nothing", "mask", "documents"])
def test_gradients_are_finite_and_reach_every_trained_weight(
    kind: str, levels: str, given: str, dtype: torch.dtype
) -> None:
    """Fully masked rows and buckets included; documents shorter than a bucket, too."""
    model = make_model(kind, levels).to(dtype)
    mask_BL = random_masks(26)
    tokens_BL = random_text(len(mask_BL), 26)
    more: dict[str, Any] = {
        "nothing": {},
        "mask": {"mask_BL": mask_BL},
        "documents": {"documents_BL": documents_of(1, 1, 5, 19).expand(len(mask_BL), -1)},
    }[given]
    logits_BLV = model(tokens_BL, **more)
    assert logits_BLV.isfinite().all()
    nats, _ = model(tokens_BL, targets_BL=tokens_BL, **more)
    nats.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


# --- the reference's masks -----------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["lucidrains", "lucidrains, linear", "plain"])
@torch.no_grad()
def test_legacy_masks_are_those_of_the_reference_and_leak(kind: str, causal: bool) -> None:
    """Why they are not the default: a row with nothing to see attends to everything."""
    legacy = make_model(kind, "by 2, 4", causal=causal, legacy_mask=True)
    theirs = HourglassTransformerLM(**lucidrains_kwargs(legacy.config)).double()
    theirs.load_state_dict(to_lucidrains(legacy))
    mask_BL = random_masks(24)
    tokens_BL = random_text(len(mask_BL), 24)
    assert farthest(theirs(tokens_BL, mask=mask_BL), legacy(tokens_BL, mask_BL)) < 1e-10
    if causal:
        tokens_L, mask_LL = tokens_BL[0], (torch.arange(24) >= 12).expand(24, 24)
        before = theirs(tokens_L[None], mask=mask_LL[:1])
        moved_LL = differs(theirs(changed_at_each_place(tokens_L), mask=mask_LL), before)
        assert moved_LL.tril(-1).any(), "the reference does not leak any more"


@pytest.mark.parametrize(
    ("kind", "more", "setting"),
    [
        ("modern", {}, "positions"),
        ("paper", {}, "positions"),
        ("plain", {"skip": "gated"}, "skip"),
        ("lucidrains", {"ff_mult": 3}, "ff_mult"),
    ],
)
def test_other_models_do_not_go_to_the_reference(
    kind: str, more: dict[str, Any], setting: str
) -> None:
    model = make_model(kind, "by 2", **more)
    with pytest.raises(ValueError, match=f"cannot build this model: model.*{setting}"):
        to_lucidrains(model)
    with pytest.raises(ValueError, match="cannot build this model"):
        from_lucidrains({}, model)


# --- where buckets lie ---------------------------------------------------------------------------


def kept_one_by_one(wanted: list[bool], shorten: int, extra: int) -> Iterator[bool]:
    """``keep_boundaries`` of one document, as its docstring says it."""
    kept = 0
    for place, is_wanted in enumerate(wanted):
        after = min(kept + is_wanted, place // shorten + 1 + extra)
        yield after > kept
        kept = after


@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("shorten", [2, 3, 5])
def test_boundaries_past_the_cap_are_passed_over_until_there_is_room(
    shorten: int, extra: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    documents_1L = documents_of(1, 17, 2, 30, 9, 40)
    place_1L = layout.document_positions(documents_1L)
    for density in (0.2, 0.6, 1.0):
        wanted_1L = torch.rand(place_1L.shape, generator=generator) < density
        wanted_1L |= place_1L == 0
        expected = [
            kept
            for part in wanted_1L[0].split((1, 17, 2, 30, 9, 40))
            for kept in kept_one_by_one(part.tolist(), shorten, extra)
        ]
        assert keep_boundaries(wanted_1L, place_1L, shorten, extra)[0].tolist() == expected


def test_words_begin_where_a_spacelike_byte_is_followed_by_another_kind() -> None:
    def begins(text: str) -> list[int]:
        data = torch.tensor([list(text.encode())])
        return word_starts(data)[0].nonzero()[:, 0].tolist()

    assert begins("to be, or 2b--so") == [0, 3, 7, 10, 14]
    assert begins("  x\n\ty") == [2, 5]
    assert begins("日本語") == [1, 4, 7], "each character has its bucket"
    assert begins("café au") == [0, 4, 6]


@torch.no_grad()
def test_a_text_of_short_words_stays_within_its_buckets_and_says_how_many_it_missed() -> None:
    config = make_config("modern, words", "by 3", extra_buckets=0)
    tokens_1L = torch.tensor([list(b"a b c d e f g h i j k l m n o p ")])
    [rows, _] = row_layouts(config, tokens_1L)
    assert rows.buckets is not None
    used = int((rows.buckets.end_BG < 32).sum())
    assert used <= rows.size == 11
    assert missed_buckets(config, tokens_1L) == (16 - used, 16)
    assert missed_buckets(make_config("modern, words", "by 3"), tokens_1L) == (0, 16)


@pytest.mark.parametrize("kind", ["plain", "modern, words"])
@torch.no_grad()
def test_documents_past_the_last_bucket_of_a_row_do_without_and_see_nothing(kind: str) -> None:
    """A row has room for length / shorten + extra buckets; here its later documents have none."""
    model = make_model(kind, "by 3", extra_buckets=0)
    lengths = (4, *([1] * 20), 2)
    tokens_1L, documents_1L = random_text(1, 26), documents_of(*lengths)
    missed, wanted = missed_buckets(model.config, tokens_1L, documents_1L)
    assert 0 < missed < wanted
    before = model(tokens_1L, documents_BL=documents_1L)
    assert before.isfinite().all()
    changed_LL = changed_at_each_place(tokens_1L[0])
    moved_LL = differs(model(changed_LL, documents_BL=documents_1L.expand(26, -1)), before)
    assert not moved_LL[documents_1L.expand(26, -1) != documents_1L.T].any()
    assert farthest(before[:, :4], model(tokens_1L[:, :4])) < 1e-10


# --- lengths and weights -------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, zoo.LONGEST + 1])
def test_a_length_outside_the_position_table_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"given {length}"):
        make_model("lucidrains")(random_text(1, length))


@torch.no_grad()
def test_models_without_a_table_take_any_length() -> None:
    for kind in ("paper", "modern, words"):
        tokens_1L = random_text(1, 5 * zoo.LONGEST + 1)
        assert make_model(kind, "by 2, 4")(tokens_1L).isfinite().all()
        with pytest.raises(ValueError, match="at least 1 token in a row, given 0"):
            make_model(kind)(random_text(1, 0))


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[0, 0, 1, 0]], "row 0: document ends out of order"),
        ([[0, 0, 1]], r"documents: expected shape \(1, 4\) as the tokens, given \(1, 3\)"),
    ],
)
def test_documents_out_of_order_are_refused(documents: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model("lucidrains")(random_text(1, 4), documents_BL=torch.tensor(documents))


@torch.no_grad()
def test_drawn_shorten_factors_are_used_in_training_only() -> None:
    model = make_model("plain", "by 3")
    outer, inner = model.config.levels
    levels = outer, replace(inner, shorten_choices=(2, 5))
    drawn = HourglassLM(replace(model.config, levels=levels)).double()
    drawn.load_state_dict(model.state_dict())
    tokens_BL = random_text(2, 23)
    assert torch.equal(drawn.eval()(tokens_BL), model(tokens_BL))
    drawn.train()
    seen = {float(drawn(tokens_BL).sum()) for _ in range(20)}
    expected = set()
    for shorten in (2, 5):
        levels = outer, replace(inner, shorten=shorten)
        fixed = HourglassLM(replace(model.config, levels=levels)).double()
        fixed.load_state_dict(model.state_dict())
        expected.add(float(fixed(tokens_BL).sum()))
    assert seen == expected


@every_kind
@pytest.mark.parametrize("levels", ["flat", "by 2, 4"])
@torch.no_grad()
def test_every_weight_is_used_inside_its_own_module_only(kind: str, levels: str) -> None:
    """As under ZeRO-3, where weights are there only while the module that owns them runs."""
    model = make_model(kind, levels)
    tokens_BL = random_text(2, 13)
    expected = model(tokens_BL)
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
    assert torch.equal(model(tokens_BL), expected)


def test_only_the_query_side_of_the_way_out_is_frozen() -> None:
    frozen = {n for n, p in make_model("lucidrains").named_parameters() if not p.requires_grad}
    parts = ("norm.weight", "norm.bias", "query.weight", "key.weight")
    assert frozen == {f"hourglass.lengthen.attention.{part}" for part in parts}
