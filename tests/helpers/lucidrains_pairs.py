"""Pairs of a model of ``hourglass-transformer-pytorch`` 0.0.6 and ours with the same weights.

Weights are random, norms and biases too, and go to and from the reference through ``lucidrains``.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import torch
from hourglass_transformer_pytorch import HourglassTransformerLM
from torch import Tensor
from torch.nn import functional as F

from hourglass_dist.config.model import lucidrains_config
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.layers import level_inputs
from hourglass_dist.model.lucidrains import from_lucidrains, lucidrains_kwargs, to_lucidrains
from hourglass_dist.model.settings import ModelConfig

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
VOCAB, ROWS, LENGTH = 37, 2, 72

NESTINGS: list[tuple[Any, Any]] = [
    ((1, 2, 1), 2),
    ((2, 1, 1), 3),
    ((1, 1, 2), 4),
    ((1, (1, 2, 1), 1), (2, 4)),
    ((1, (2, 1, 1), 1), 3),
    ((1, (1, (1, 1, 1), 1), 1), 2),
    ((0, (1, (0, 2, 1), 0), 1), (2, 3, 4)),
]
"""(depth, shorten_factor) as the reference takes them: one, two and three levels inside."""


class Case(NamedTuple):
    """A configuration of both models."""

    depth: Any
    shorten: Any
    resampling: str
    attention: bool
    causal: bool

    def __str__(self) -> str:
        attends = "attention" if self.attention else "-"
        sight = "causal" if self.causal else "full"
        return f"{self.depth!s:30} s={self.shorten!s:9} {self.resampling:6} {attends:9} {sight:6}"

    @property
    def config(self) -> ModelConfig:
        return lucidrains_config(
            num_tokens=VOCAB,
            dim=24,
            max_seq_len=LENGTH,
            depth=self.depth,
            shorten_factor=self.shorten,
            heads=3,
            dim_head=10,
            attn_resampling=self.attention,
            updown_sample_type=self.resampling,
            causal=self.causal,
        )


CASES = [
    Case(*nesting, *rest)
    for nesting in NESTINGS
    for rest in itertools.product(("naive", "linear"), (True, False), (True, False))
] + [Case(2, None, "naive", False, causal) for causal in (True, False)]


class Difference(NamedTuple):
    """Largest absolute differences, and the sizes of what was compared."""

    logits: float
    gradients: float
    largest_logit: float
    largest_gradient: float


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Normal weights of std 0.2 everywhere; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
            is_gain = "norm" in name and name.endswith("weight")
            parameter.copy_(values + 1.0 if is_gain else values)


def pair_from_reference(case: Case, dtype: torch.dtype) -> tuple[HourglassTransformerLM, Any]:
    """The reference with random weights, and our model with those weights."""
    theirs = HourglassTransformerLM(**lucidrains_kwargs(case.config)).to(dtype)
    randomise(theirs, seed=1)
    ours = HourglassLM(case.config).to(dtype)
    from_lucidrains(theirs.state_dict(), ours)
    return theirs, ours


def pair_from_ours(case: Case, dtype: torch.dtype) -> tuple[HourglassTransformerLM, Any]:
    """Our model with random weights, and the reference with those weights."""
    ours = HourglassLM(case.config).to(dtype)
    randomise(ours, seed=2)
    theirs = HourglassTransformerLM(**lucidrains_kwargs(case.config)).to(dtype)
    theirs.load_state_dict(to_lucidrains(ours), strict=True)
    return theirs, ours


def gradients_as_lucidrains(model: HourglassLM) -> dict[str, Tensor]:
    """Our gradients under the reference's names: those of weights without any are zeros."""
    holder = copy.deepcopy(model)
    for parameter, holds in zip(model.parameters(), holder.parameters(), strict=True):
        assert (parameter.grad is not None) == parameter.requires_grad
        holds.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return to_lucidrains(holder)


def compare(theirs: HourglassTransformerLM, ours: HourglassLM) -> Difference:
    """Logits, and gradients of the mean cross entropy, of one random batch."""
    generator = torch.Generator().manual_seed(3)
    tokens_BL, targets_BL = torch.randint(VOCAB, (2, ROWS, LENGTH), generator=generator)
    logits = []
    for model in (theirs, ours):
        logits_BLV = model(tokens_BL)
        F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten()).backward()
        logits.append(logits_BLV.detach())
    mine = gradients_as_lucidrains(ours)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert mine.keys() == wanted.keys()
    return Difference(
        float((logits[0] - logits[1]).abs().max()),
        max(float((mine[name] - wanted[name]).abs().max()) for name in wanted),
        float(logits[0].abs().max()),
        max(float(gradient.abs().max()) for gradient in wanted.values()),
    )


# --- the README of the reference -----------------------------------------------------------------

LEVELS_OF_MANY = {"num_tokens": 20_000, "dim": 512, "max_seq_len": 1024, "causal": False}
README: dict[str, dict[str, Any]] = {
    "usage": {
        "num_tokens": 256,
        "dim": 512,
        "max_seq_len": 1024,
        "heads": 8,
        "dim_head": 64,
        "shorten_factor": 2,
        "depth": (4, 2, 4),
    },
    "nested": {
        "num_tokens": 256,
        "dim": 512,
        "max_seq_len": 1024,
        "shorten_factor": (2, 4),
        "depth": (4, (2, 1, 2), 3),
    },
    "funnel": LEVELS_OF_MANY
    | {"attn_resampling": False, "shorten_factor": 2, "depth": (2, (2, (2, 2, 2), 2), 2)},
    "images": {
        "num_tokens": 256,
        "dim": 512,
        "max_seq_len": 1024,
        "shorten_factor": 2,
        "depth": (4, 2, 4),
        "updown_sample_type": "linear",
        "causal": False,
    },
    "encoder": LEVELS_OF_MANY | {"shorten_factor": 2, "depth": (4, 2, 4)},
    "enwik8": {
        "num_tokens": 256,
        "dim": 512,
        "max_seq_len": 512,
        "depth": (4, 2, 4),
        "shorten_factor": 2,
        "heads": 8,
    },
}
"""The six models of its README (the last is that of its train.py). ``images`` runs the hourglass
alone, on vectors; ``encoder`` gets a mask of ones."""


def compare_readme(name: str, length: int) -> tuple[float, float]:
    """(largest difference of the outputs, from their weights and from ours) in fp32, weights as
    each package first draws them."""
    torch.manual_seed(0)
    config = lucidrains_config(**README[name])
    differences = []
    for from_theirs in (True, False):
        theirs, ours = HourglassTransformerLM(**README[name]), HourglassLM(config)
        if from_theirs:
            from_lucidrains(theirs.state_dict(), ours)
        else:
            theirs.load_state_dict(to_lucidrains(ours), strict=True)
        with torch.no_grad():
            if name == "images":
                x_BLD = torch.randn(1, length, config.dim)
                theirs.transformer.norm_out = torch.nn.Identity()
                layouts = ours.layouts(torch.zeros(1, length, dtype=torch.int64))
                inputs = level_inputs(ours.config, layouts, x_BLD)
                found = theirs.transformer(x_BLD), ours.hourglass(x_BLD, inputs)
            else:
                tokens_BL = torch.randint(config.vocab_size, (1, length))
                mask_BL = torch.ones_like(tokens_BL).bool() if name == "encoder" else None
                found = theirs(tokens_BL, mask=mask_BL), ours(tokens_BL, mask_BL)
        differences.append(float((found[0] - found[1]).abs().max()))
    return differences[0], differences[1]
