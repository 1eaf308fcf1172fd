"""Diagram of a model: one bar for each stack of layers, as long as the sequence at its level.

level 0          1 layer   ################################
level 1, by 2    4 layers          ################
level 0          1 layer   ################################
"""

from __future__ import annotations

from typing import NamedTuple

from hourglass_dist.model.settings import ModelConfig

WIDTH = 48


class Stack(NamedTuple):
    """Stack of consecutive layers at one level."""

    level: int
    stride: int
    """Tokens under one position."""
    layers: int
    dim: int


def stacks(model: ModelConfig) -> list[Stack]:
    """Return the stacks from input to output, with empty ones; the innermost level has one stack,
    every other level two."""
    down: list[Stack] = []
    up: list[Stack] = []
    stride = 1
    for index, level in enumerate(model.levels):
        stride *= level.shorten if index else 1
        is_innermost = index == len(model.levels) - 1
        layers = level.pre + level.post if is_innermost else level.pre
        down.append(Stack(index, stride, layers, level.dim))
        if not is_innermost:
            up.insert(0, Stack(index, stride, level.post, level.dim))
    return down + up


def label(stack: Stack) -> str:
    """Return a label such as ``level 1, by 2: 4 layers of width 128``."""
    by = f", by {stack.stride}" if stack.stride > 1 else ""
    layers = f"{stack.layers} layer{'' if stack.layers == 1 else 's'}"
    return f"level {stack.level}{by}: {layers} of width {stack.dim}"


def as_text(model: ModelConfig) -> str:
    """Return the diagram as text."""
    lines = []
    for stack in stacks(model):
        bar = "#" * max(1, WIDTH // stack.stride)
        lines.append(f"{bar:^{WIDTH}}  {label(stack)}")
    return f"{model.hierarchy}\n\n" + "\n".join(lines) + "\n"
