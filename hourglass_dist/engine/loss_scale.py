"""The loss scale of fp16 training: saved, restored, and unchanged by the dry-run step.

Small gradients are zero in fp16, so DeepSpeed multiplies the loss by a power of two before the
backward pass and divides the gradients by it afterwards. A step whose gradients overflow changes no
weight and halves the scale (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2). The scale and
its counters are part of the training state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's DynamicLossScaler that are saved."""


def stay_above_zero(optimizer: Any) -> None:
    """Keep the scale at its minimum, where DeepSpeed would end the run; ``SkippedSteps`` counts
    the steps that change no weight."""
    if state(optimizer):
        optimizer.loss_scaler.raise_error_at_min_scale = False


def state(optimizer: Any) -> dict[str, float]:
    """Return the state of the loss scale of DeepSpeed's ``optimizer``; {} if it has none."""
    scaler = getattr(optimizer, "loss_scaler", None)
    if not getattr(scaler, "dynamic", False):
        return {}
    return {name: getattr(scaler, name) for name in FIELDS}


def restore(optimizer: Any, values: Mapping[str, float]) -> None:
    """Restore ``values``, as returned by ``state``; {} changes nothing."""
    for name in FIELDS if values else ():
        setattr(optimizer.loss_scaler, name, values[name])


@contextmanager
def kept(optimizer: Any) -> Iterator[None]:
    """Restore the loss scale at the end of this context."""
    before = state(optimizer)
    yield
    restore(optimizer, before)
