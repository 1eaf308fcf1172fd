"""The first weights are those of the table in ``HourglassLM.init_weights``."""

from __future__ import annotations

import math

import pytest
import torch
from zoo import preset

from hourglass_dist.config.model import parse_model
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.pool import LinearPool, LinearSpread, MeanPool
from hourglass_dist.model.settings import ModelConfig

LEVELS = [{"layers": [1, 2]}, {"layers": [1, 1], "shorten": 2}, {"layers": 2, "shorten": 3}]
LUCIDRAINS = preset("lucidrains") | {
    "max_seq_len": 128,
    "downsampling": "linear",
    "upsampling": "linear",
}
MODELS = {
    "lucidrains": LUCIDRAINS,
    "paper": preset("paper"),
    "modern": preset("modern"),
}


def config_of(kind: str) -> ModelConfig:
    levels = [dict(level) for level in LEVELS]
    if kind == "modern":
        levels = [level | {"dim": 64 + 64 * index} for index, level in enumerate(levels)]
    settings = {"dim": 64, "heads": 4, "levels": levels} | MODELS[kind]
    return parse_model(settings, source="test")


CONFIG = config_of("lucidrains")
LAYERS = 2 * (1 + 2 + 1 + 1 + 2)
WAYS = 2 * 2 * 2  # attention and feed-forward, two ways in and two ways out
BRANCHES = {"lucidrains": LAYERS + WAYS, "paper": LAYERS + WAYS, "modern": LAYERS}


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_follows_the_table(kind: str) -> None:
    model = HourglassLM(config_of(kind))
    small = 0.02 / math.sqrt(BRANCHES[kind])
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if ("norm" in owner or "gate" in owner) and last == "weight":
            assert (parameter == 1).all(), name
        elif last == "bias" or last in ("content", "place"):
            assert (parameter == 0).all(), name
        elif not owner.endswith("proj"):
            std = small if owner.endswith(".out") else 0.02
            few = parameter.numel() < 1000
            assert parameter.std().item() == pytest.approx(std, rel=0.25 if few else 0.06), name
            assert abs(parameter.mean().item()) < (0.5 if few else 0.1) * std, name


def test_linear_resampling_starts_as_mean_and_repeat() -> None:
    model = HourglassLM(CONFIG)
    x_BGSD = torch.randn(2, 5, 3, 64)
    pools = [m for m in model.modules() if isinstance(m, LinearPool)]
    spreads = [m for m in model.modules() if isinstance(m, LinearSpread)]
    torch.testing.assert_close(pools[1](x_BGSD, None), MeanPool()(x_BGSD, None))
    spread = spreads[1](x_BGSD[:, :, 0])
    torch.testing.assert_close(spread, x_BGSD[:, :, :1].expand_as(spread))


def test_a_seed_gives_the_same_weights_again_and_another_seed_others() -> None:
    first, again, other = HourglassLM(CONFIG), HourglassLM(CONFIG), HourglassLM(CONFIG)
    for model, seed in ((first, 5), (again, 5), (other, 6)):
        torch.rand(3)  # the global generator has no say
        model.init_weights(seed)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not torch.equal(pairs[0][0], pairs[0][2])


def test_a_model_can_be_built_without_memory_and_filled_later() -> None:
    with torch.device("meta"):
        model = HourglassLM(CONFIG)
        assert model(torch.zeros(2, 17, dtype=torch.int64)).shape == (2, 17, 256)
    assert all(parameter.is_meta for parameter in model.parameters())
    model = model.to_empty(device="cpu")
    model.init_weights(0)
    for mine, wanted in zip(model.parameters(), HourglassLM(CONFIG).parameters(), strict=True):
        assert torch.equal(mine, wanted)


def test_the_first_loss_is_that_of_knowing_nothing() -> None:
    model = HourglassLM(CONFIG)
    logits_BLV = model(torch.randint(256, (2, 64)))
    entropy = -(logits_BLV.log_softmax(-1) * logits_BLV.softmax(-1)).sum(-1).mean()
    assert entropy.item() == pytest.approx(math.log(256), rel=0.01)
