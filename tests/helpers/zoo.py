"""Small models of every kind, with the options of the files in configs/."""

from __future__ import annotations

from typing import Any

import torch
from paths import CONFIGS
from torch import Tensor, nn

from hourglass_dist.config.loader import read_yaml
from hourglass_dist.config.model import parse_model
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.settings import ModelConfig

LONGEST = 48

SIZES = ("dim", "heads", "dim_head", "max_seq_len", "vocab_size", "levels", "dropout")

LEVELS: dict[str, list[dict[str, Any]]] = {
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


def preset(name: str) -> dict[str, Any]:
    """The options of ``configs/NAME.yaml`` without its sizes."""
    model = read_yaml(CONFIGS / f"{name}.yaml")["model"]
    return {key: value for key, value in model.items() if key not in SIZES}


# Name: the options, and what happens to the levels.
KINDS: dict[str, dict[str, Any]] = {
    "lucidrains": preset("lucidrains") | {"max_seq_len": LONGEST},
    "lucidrains, linear": preset("lucidrains")
    | {"max_seq_len": LONGEST, "downsampling": "linear", "upsampling": "linear"},
    "plain": preset("lucidrains") | {"max_seq_len": LONGEST, "attention_resampling": "none"},
    "paper": preset("paper"),
    "paper, words": preset("paper") | {"upsampling": "repeat", "words": True},
    "modern": preset("modern") | {"wider": 4},
    "modern, windows": preset("modern") | {"wider": 4, "window": 5},
    "modern, words": preset("modern") | {"wider": 4, "window": 7, "words": True},
    "modern, projected": preset("modern") | {"wider": -4, "width_change": "projection"},
}


def make_config(kind: str, levels: str = "by 2", **more: Any) -> ModelConfig:
    """A small model: ``words`` pools first at word starts, ``wider`` changes the width from level
    to level, ``window`` is that of every level."""
    options = KINDS[kind] | more
    words, wider = options.pop("words", False), options.pop("wider", 0)
    window, extra = options.pop("window", None), options.pop("extra_buckets", 12)
    width = options.pop("width", 16)
    settings = [dict(level) for level in LEVELS[levels]]
    for index, level in enumerate(settings):
        level |= {"dim": width + wider * index, "heads": 2, "dim_head": 6, "window": window}
        level["extra_buckets"] = extra
        if words and index == 1:
            level["pooling"] = "spacelike"
    return parse_model({"dim": width, "levels": settings} | options, source="zoo")


def make_model(kind: str, levels: str = "by 2", seed: int = 7, **more: Any) -> HourglassLM:
    """In fp64, with random weights everywhere."""
    model = HourglassLM(make_config(kind, levels, **more)).double()
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Normal weights of std 0.3 everywhere; norms and gates around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            is_gain = ("norm" in name or "gate" in name) and name.endswith("weight")
            parameter.copy_(values + 1.0 if is_gain else values)


def random_text(rows: int, length: int, seed: int = 0) -> Tensor:
    """Bytes, every third about a space: words of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BL = torch.randint(256, (rows, length), generator=generator)
    return tokens_BL.masked_fill(torch.rand(rows, length, generator=generator) < 0.3, 32)


def documents_of(*lengths: int) -> Tensor:
    """(1, L) ids of documents of these lengths."""
    ids = [torch.full((length,), index) for index, length in enumerate(lengths)]
    return torch.cat(ids)[None]


def farthest(left: Tensor, right: Tensor) -> float:
    """The largest difference."""
    return float((left - right).abs().max())


def with_policy(model: HourglassLM, policy: str) -> HourglassLM:
    """The same model with this activation checkpointing at every level."""
    copy = HourglassLM(model.config.with_checkpointing(policy)).double()
    copy.load_state_dict(model.state_dict())
    return copy
