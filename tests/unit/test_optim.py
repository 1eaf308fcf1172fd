"""The learning rate as a function of the step, and which weights decay."""

from __future__ import annotations

import itertools

import pytest
from toy import make_config, make_model

from hourglass_dist.config.loader import ConfigError
from hourglass_dist.config.schema import OptimConfig
from hourglass_dist.engine.optim import learning_rate, parameter_groups

TOTAL = 1000


def curve(config: OptimConfig) -> list[float]:
    return [learning_rate(step, config, TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_rises_to_the_peak_and_falls_to_the_floor(schedule: str) -> None:
    rates = curve(OptimConfig(lr=2.0, schedule=schedule, warmup_steps=100, min_lr_ratio=0.1))
    peak = rates.index(max(rates))
    assert rates[100] == max(rates) == 2.0
    assert all(a < b for a, b in itertools.pairwise(rates[:101]))
    assert all(a >= b for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert rates[0] == pytest.approx(2.0 / 101)
    assert learning_rate(TOTAL, OptimConfig(lr=2.0, schedule=schedule), TOTAL) == pytest.approx(0.2)


def test_wsd_stays_on_its_plateau_until_the_decay() -> None:
    rates = curve(OptimConfig(lr=1.0, schedule="wsd", warmup_steps=10, decay_fraction=0.25))
    assert set(rates[10:751]) == {1.0}
    assert rates[751] < 1.0


def test_cosine_is_halfway_in_the_middle() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", min_lr_ratio=0.0)
    assert learning_rate(TOTAL // 2, config, TOTAL) == pytest.approx(0.5)


def test_matrices_decay_and_nothing_else() -> None:
    model = make_model(make_config(0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays, stays = (
        {names[id(p)] for p in group["params"]}  # type: ignore[attr-defined]
        for group in parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.1))
    )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen, "weights without influence: in no group, or decay would shrink them"
    assert decays | stays == set(names.values()) - frozen
    assert not decays & stays
    assert all(name.endswith(".weight") and "norm" not in name for name in decays)
    assert {"tokens.weight", "positions.weight"} <= stays
    assert {"head.norm.weight", "head.norm.bias", "head.output.bias"} <= stays
    assert "head.output.weight" in decays


def test_levels_have_rates_of_their_own() -> None:
    model = make_model(make_config(0))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(lr=1.0, level_lr=[1.0, 0.5]))
    inner = {names[id(p)] for group in groups if group["lr_scale"] == 0.5 for p in group["params"]}
    assert inner == {name for name in names.values() if name.startswith("hourglass.inner.")}
    with pytest.raises(ConfigError, match=r"level_lr: expected one number for each of 2 levels"):
        make_config(0, level_lr=[1.0])
