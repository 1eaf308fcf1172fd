"""The parameters of a model, read off the model itself on the ``meta`` device."""

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
    """Names, sizes and what is trained."""

    shapes: dict[str, torch.Size]
    frozen: frozenset[str]
    """Names of those without a gradient."""

    @property
    def total(self) -> int:
        """All parameters, frozen ones too."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def trained(self) -> int:
        """Parameters that have a gradient."""
        return self.total - sum(self.shapes[name].numel() for name in self.frozen)

    def of_level(self, index: int | None) -> int:
        """Those of one level with the ways to the next one and back; None: all that is in no
        level."""
        return sum(shape.numel() for name, shape in self.shapes.items() if _level(name) == index)

    def of_muon(self, optim: OptimConfig) -> int:
        """Parameters that Muon trains."""
        return sum(
            shape.numel()
            for name, shape in self.shapes.items()
            if name not in self.frozen and is_muons(name, shape, optim)
        )

    def small_tensors(self, elements: int) -> int:
        """How many tensors have no more than so many elements."""
        return sum(shape.numel() <= elements for shape in self.shapes.values())


def parameters_of(config: ModelConfig) -> Parameters:
    """The parameters of a model, whatever its checkpointing."""
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
    """``hourglass.inner.inner.pre.0...`` is of level 2."""
    return name.count("inner.") if name.startswith("hourglass.") else None
