"""The loss scale of fp16 training: saved, put back, left alone by a dry-run step.

Small gradients are zero in fp16, so DeepSpeed multiplies the loss with a power of two before the
backward pass and divides the gradients after it; a step whose gradients overflow changes nothing
and halves the factor (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). The factor and what
decides the next one are part of the training state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Of DeepSpeed's DynamicLossScaler."""


def stay_above_zero(optimizer: Any) -> None:
    """At its least the scale stays there; DeepSpeed would end the run. Steps in a row that change
    nothing are counted elsewhere."""
    if state(optimizer):
        optimizer.loss_scaler.raise_error_at_min_scale = False


def state(optimizer: Any) -> dict[str, float]:
    """What DeepSpeed's ``optimizer`` knows about its loss scale; {} where there is none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in FIELDS}


def restore(optimizer: Any, values: Mapping[str, float]) -> None:
    """Put back what ``state`` gave; {} changes nothing."""
    for name in FIELDS if values else ():
        setattr(optimizer.loss_scaler, name, values[name])


@contextmanager
def kept(optimizer: Any) -> Iterator[None]:
    """Whatever happens inside, the scale is as before."""
    before = state(optimizer)
    yield
    restore(optimizer, before)
