"""The model is the function of ``hourglass-transformer-pytorch``, in values and in gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hourglass_transformer_pytorch import hourglass_transformer_pytorch as reference
from lucidrains_pairs import (
    CASES,
    LENGTH,
    LIMITS,
    README,
    VOCAB,
    Case,
    compare,
    compare_readme,
    pair_from_ours,
    pair_from_reference,
)
from slow_cases import every

from hourglass_dist.config.model import lucidrains_config
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.lucidrains import from_lucidrains, lucidrains_kwargs, to_lucidrains


def named(case: Case) -> str:
    return " ".join(str(case).split())


CAUSAL = [case for case in CASES if case.causal]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", every(5, CASES), ids=named)
def test_logits_and_gradients_agree_in_both_directions(case: Case, dtype: torch.dtype) -> None:
    for make_pair in (pair_from_reference, pair_from_ours):
        difference = compare(*make_pair(case, dtype))
        assert difference.logits < LIMITS[dtype]
        assert difference.gradients < LIMITS[dtype]
        assert difference.largest_logit > 1.0, "the comparison would show nothing"
        assert difference.largest_gradient > 0.02, "the comparison would show nothing"


@pytest.mark.parametrize("case", every(3, CAUSAL[::2]), ids=named)
def test_odd_lengths_agree_once_the_reference_can_run_them(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = pair_from_reference(case, torch.float64)
    lengths = [length for length in (1, 2, 5, 23, 47, 71) if case.shorten]
    for length in lengths:
        tokens_BL = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(4))
        monkeypatch.undo()
        if length == 71:
            with pytest.raises(NameError):
                theirs(tokens_BL)
        monkeypatch.setattr(reference, "math", math, raising=False)  # the import it forgot
        assert (theirs(tokens_BL) - ours(tokens_BL)).abs().max() < 1e-9


@pytest.mark.parametrize("case", every(5, CASES), ids=named)
def test_weights_make_the_round_trip_unchanged(case: Case) -> None:
    _, ours = pair_from_ours(case, torch.float32)
    again = HourglassLM(case.config)
    from_lucidrains(to_lucidrains(ours), again)
    for (name, mine), (other, back) in zip(
        ours.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(mine, back), name


def test_exported_weights_are_a_copy() -> None:
    _, ours = pair_from_ours(CASES[0], torch.float32)
    before = ours.tokens.weight.detach().clone()
    for tensor in to_lucidrains(ours).values():
        tensor.zero_()
    assert torch.equal(ours.tokens.weight, before)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_settings_make_the_round_trip(case: Case) -> None:
    assert lucidrains_config(**lucidrains_kwargs(case.config)) == case.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("to_logits.bias"), "to_logits.bias: missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra: no such weight in this model"),
        (
            lambda w: w.update({"pos_emb.weight": torch.zeros(3, 24)}),
            rf"pos_emb.weight: expected shape \({LENGTH}, 24\), given \(3, 24\)",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name(change, message: str) -> None:  # type: ignore[no-untyped-def]
    theirs, ours = pair_from_reference(CASES[0], torch.float32)
    weights = theirs.state_dict()
    weights["token_emb.weight"] = weights["token_emb.weight"] + 1.0
    change(weights)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        from_lucidrains(weights, ours)
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", every(6, README))
def test_the_examples_of_its_readme_agree(name: str) -> None:
    assert max(compare_readme(name, length=48)) < 1e-5
