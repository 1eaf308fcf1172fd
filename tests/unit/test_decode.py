"""Step by step gives what one forward pass gives, for rows at any place, at a constant cost."""

from __future__ import annotations

import itertools

import pytest
import torch
import zoo
from torch import Tensor
from zoo import farthest, make_model, random_text

from hourglass_dist.model.cache import Cache
from hourglass_dist.model.decode import prefill, step
from hourglass_dist.model.hourglass import HourglassLM

every_kind = pytest.mark.parametrize("kind", zoo.KINDS)
every_depth = pytest.mark.parametrize("levels", zoo.LEVELS)
ROWS, LENGTH = 5, 31


def steps_apart(model: HourglassLM, tokens_BL: Tensor, lengths_B: Tensor) -> float:
    """The largest difference between reading on token by token and one forward pass."""
    rows = torch.arange(len(tokens_BL))
    whole_BLV = model(tokens_BL)
    logits_BV, cache = prefill(model, tokens_BL[:, : int(lengths_B.max())], lengths_B)
    worst = farthest(logits_BV, whole_BLV[rows, lengths_B - 1])
    for place_B in (lengths_B + more for more in range(LENGTH - int(lengths_B.max()))):
        logits_BV = step(model, tokens_BL[rows, place_B], cache)
        worst = max(worst, farthest(logits_BV, whole_BLV[rows, place_B]))
    return worst


@every_kind
@every_depth
@torch.no_grad()
def test_steps_give_what_one_forward_pass_gives(kind: str, levels: str) -> None:
    """Prompts of different lengths in one batch: rows are at different places in their buckets."""
    model = make_model(kind, levels)
    for lengths in ([1] * ROWS, [12] * ROWS, [1, 7, 4, 10, 13]):
        assert steps_apart(model, random_text(ROWS, LENGTH), torch.tensor(lengths)) < 1e-10, lengths


@torch.no_grad()
def test_words_past_the_cap_are_passed_over_in_the_same_way() -> None:
    model = make_model("modern, words", "by 3", extra_buckets=0)
    tokens_BL = torch.tensor([list(b"a b c d e ffffff g h i j kkkk l m n o p")[:LENGTH]] * 2)
    assert steps_apart(model, tokens_BL, torch.tensor([1, 6])) < 1e-10


@torch.no_grad()
def test_positions_in_the_wrong_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hourglass_dist.model.decode._pool",
        lambda shorten, window_NSD, size_N: shorten.pool(window_NSD.roll(1, 1)[:, None], None),
    )
    with pytest.raises(AssertionError):
        test_steps_give_what_one_forward_pass_gives("lucidrains, linear", "by 3")


@torch.no_grad()
def test_the_caches_of_windowed_levels_do_not_grow() -> None:
    model = make_model("modern, windows", "by 2, 4")
    logits_BV, cache = prefill(model, random_text(2, 9))
    before = cache.bytes
    for token_B in random_text(90, 2):
        logits_BV = step(model, token_B, cache)
    assert logits_BV.isfinite().all()
    assert cache.bytes == before
    growing = prefill(make_model("modern", "by 2, 4"), random_text(2, 9))[1]
    shorter = growing.bytes
    for token_B in random_text(90, 2):
        step(make_model("modern", "by 2, 4"), token_B, growing)
    assert growing.bytes > 2 * shorter


@torch.no_grad()
def test_inner_levels_run_only_when_a_bucket_is_full() -> None:
    model = make_model("plain", "by 2, 4")
    _, cache = prefill(model, random_text(1, 1))
    calls: list[int] = []
    for level, module in enumerate(
        (model.hourglass, model.hourglass.inner, model.hourglass.inner.inner)
    ):
        module.pre[0].feed_forward.register_forward_pre_hook(
            lambda *_, level=level: calls.append(level)
        )
    for token_B in random_text(32, 1):
        step(model, token_B, cache)
    assert [calls.count(level) for level in range(3)] == [32, 16, 4]


def cache_of(kind: str, rows: int = 2) -> tuple[HourglassLM, Cache]:
    model = make_model(kind, "by 2")
    return model, prefill(model, random_text(rows, 5))[1]


def test_a_cache_of_another_model_or_batch_is_refused() -> None:
    model, cache = cache_of("lucidrains")
    with pytest.raises(ValueError, match="made by a model with other settings"):
        step(make_model("plain", "by 2"), torch.zeros(2, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, given 3 tokens"):
        step(model, torch.zeros(3, dtype=torch.int64), cache)


def test_a_full_position_table_is_refused_and_only_there() -> None:
    for kind, full in (("lucidrains", True), ("modern", False)):
        model = make_model(kind, "by 2")
        _, cache = prefill(model, random_text(1, zoo.LONGEST))
        if full:
            with pytest.raises(ValueError, match=f"max_seq_len={zoo.LONGEST} tokens"):
                step(model, torch.zeros(1, dtype=torch.int64), cache)
        else:
            step(model, torch.zeros(1, dtype=torch.int64), cache)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 6], None])
def test_prompts_need_tokens(lengths: list[int] | None) -> None:
    given = None if lengths is None else torch.tensor(lengths)
    with pytest.raises(ValueError, match="expected prompts of 1 to"):
        prefill(make_model("lucidrains"), random_text(2, 5 if lengths else 0), given)


def test_an_encoder_does_not_generate() -> None:
    with pytest.raises(ValueError, match="needs a causal model"):
        prefill(make_model("lucidrains", causal=False), random_text(1, 5))


@torch.no_grad()
def test_generation_from_bf16_weights_follows_the_forward_pass() -> None:
    for kind, levels in itertools.product(("lucidrains", "modern, words"), ("by 2", "by 2, 4")):
        model = make_model(kind, levels).to(torch.bfloat16)
        tokens_BL = random_text(2, 20)
        whole_BLV = model(tokens_BL).float()
        _, cache = prefill(model, tokens_BL[:, :10])
        for place in range(10, 20):
            logits_BV = step(model, tokens_BL[:, place], cache).float()
            spread = float(whole_BLV[:, place].std())
            assert farthest(logits_BV, whole_BLV[:, place]) < 0.25 * spread
