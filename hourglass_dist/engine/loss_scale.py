"""The loss scale of fp16 training: saved, put back, unchanged by the dry-run step.

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
    """Let the scale stay at its minimum, where DeepSpeed would end the run; ``SkippedSteps``
    counts steps that change nothing."""
    if state(optimizer):
        optimizer.loss_scaler.raise_error_at_min_scale = False


def state(optimizer: Any) -> dict[str, float]:
    """The state of the loss scale of DeepSpeed's ``optimizer``; {} where it has none."""
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
    """Restore the scale at the end."""
    before = state(optimizer)
    yield
    restore(optimizer, before)
