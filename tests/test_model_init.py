"""The first weights are those of the table in ``HourglassLM.init_weights``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hourglass_dist.config import LevelConfig, ModelConfig
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.resample import LinearPool, LinearSpread, MeanPool

CONFIG = ModelConfig(
    dim=64,
    heads=4,
    dim_head=16,
    levels=[
        LevelConfig(layers=[1, 2]),
        LevelConfig(layers=[1, 1], shorten=2),
        LevelConfig(layers=2, shorten=3),
    ],
    max_seq_len=128,
    resampling="linear",
)
BRANCHES = 2 * (1 + 2 + 1 + 1 + 2) + 2 * 2 * 2  # of the layers, and of two ways in and two ways out


def test_every_weight_follows_the_table() -> None:
    model = HourglassLM(CONFIG)
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
            checked += 2
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            if isinstance(module, nn.Linear) and module.bias is not None:
                assert (module.bias == 0).all(), name
                checked += 1
            checked += 1
            if not name.endswith("proj"):
                std = 0.02 / math.sqrt(BRANCHES) if name.endswith("out") else 0.02
                assert module.weight.std().item() == pytest.approx(std, rel=0.06), name
                assert abs(module.weight.mean().item()) < 0.1 * std, name
    assert checked == len(list(model.parameters()))


def test_linear_resampling_starts_as_the_naive_one() -> None:
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
