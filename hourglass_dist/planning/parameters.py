"""Parameter counts of a model, taken from the model itself on the ``meta`` device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from hourglass_dist.config.schema import OptimConfig
from hourglass_dist.engine.optim import is_muons
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.settings import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Names and shapes of parameters, and which of them are frozen."""

    shapes: dict[str, torch.Size]
    frozen: frozenset[str]
    """Names of parameters without a gradient."""

    @property
    def total(self) -> int:
        """Number of all parameters, with frozen ones."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def trained(self) -> int:
        """Number of parameters that have a gradient."""
        return self.total - sum(self.shapes[name].numel() for name in self.frozen)

    def of_level(self, index: int | None) -> int:
        """Return the number of parameters of one level with its resampling layers; None: of the
        modules outside all levels."""
        return sum(shape.numel() for name, shape in self.shapes.items() if _level(name) == index)

    def of_muon(self, optim: OptimConfig) -> int:
        """Return the number of parameters that Muon trains."""
        return sum(
            shape.numel()
            for name, shape in self.shapes.items()
            if name not in self.frozen and is_muons(name, shape, optim)
        )

    def small_tensors(self, elements: int) -> int:
        """Return the number of tensors with at most ``elements`` elements."""
        return sum(shape.numel() <= elements for shape in self.shapes.values())


def parameters_of(config: ModelConfig) -> Parameters:
    """Return the parameters of a model; its activation checkpointing does not matter."""
    return _parameters(config.with_checkpointing("none"))


@lru_cache(maxsize=32)
def _parameters(config: ModelConfig) -> Parameters:
    with torch.device("meta"):
        named = dict(HourglassLM(config).named_parameters())
    return Parameters(
        {name: parameter.shape for name, parameter in named.items()},
        frozenset(name for name, parameter in named.items() if not parameter.requires_grad),
    )


def _level(name: str) -> int | None:
    """Return the level of a parameter: 2 for ``hourglass.inner.inner.pre.0...``."""
    return name.count("inner.") if name.startswith("hourglass.") else None
