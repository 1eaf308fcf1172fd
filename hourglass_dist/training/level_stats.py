"""Statistics of a step by level: norms, activations, logits, and the time of each rank.

    norms          taken in the optimizer's step, which sees this rank's fp32 weights and gradients
                   at every ZeRO stage
    activations    RMS of the output of each level, of the last micro batch
    logits         largest absolute logit of the last micro batch, taken inside the loss
    own seconds    time of the forward passes, in which no rank waits for another (stages 0 to 2; at
                   stage 3 weights are gathered there)

All but the last are taken only in steps that are recorded. Nothing here changes the training.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hourglass_dist.engine.engine import Engine
from hourglass_dist.engine.optim import level_of
from hourglass_dist.model.head import Output
from hourglass_dist.model.hourglass import Hourglass

ENDS = "ends"
"""Name for embeddings, final norm and output layer."""


def part_of(parameter: str) -> str:
    """Return the part of a model with this parameter: ``level_0``, ``level_1``, ... or ``ends``.

    As in ``hourglass plan``, resampling layers between two levels belong to the outer level.
    """
    inside = parameter.find("hourglass.")
    return ENDS if inside < 0 else f"level_{level_of(parameter[inside:])}"


class LevelStats:
    """Collector of statistics from an engine's model and optimizer; created by all ranks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._on = False
        named = engine.module.named_parameters()
        self.parts = sorted({part_of(name) for name, p in named if p.requires_grad}, key=_order)
        self._squares: dict[tuple[str, str], Tensor] = {}
        self._before: dict[int, Tensor] = {}
        self._places: dict[int, list[tuple[str, int, int]]] = {}
        self._activations: dict[int, tuple[Tensor, int]] = {}
        self._timer = _Timer()
        self._levels = [m for m in engine.module.modules() if isinstance(m, Hourglass)]
        self._outputs = [m for m in engine.module.modules() if isinstance(m, Output)]
        for level in self._levels:
            level.register_forward_hook(self._see_stream)
        engine.module.register_forward_pre_hook(self._timer.begin)
        engine.module.register_forward_hook(self._timer.end)

    @contextmanager
    def collecting(self, on: bool) -> Iterator[None]:
        """Collect statistics of the step taken inside this context, if ``on``."""
        if not on:
            yield
            return
        self._start()
        before = self._engine.optimizer.register_step_pre_hook(self._before_update)
        after = self._engine.optimizer.register_step_post_hook(self._after_update)
        try:
            yield
        finally:
            before.remove()
            after.remove()
            self._on = False
            for output in self._outputs:
                output.watched = False

    def _start(self) -> None:
        self._on = True
        self._squares, self._activations = {}, {}
        self._places = defaultdict(list)
        for fragment in self._engine.fragments():
            if fragment.is_saved_here and fragment.numel:
                place = part_of(fragment.name), fragment.offset, fragment.numel
                self._places[id(fragment.flat)].append(place)
        for output in self._outputs:
            output.watched, output.largest_logit = True, None

    # --- hooks ---------------------------------------------------------------------------------

    def _see_stream(self, level: Any, inputs: Any, x_BLD: Tensor) -> None:
        if self._on and level.training:
            norm = torch.linalg.vector_norm(x_BLD.detach(), dtype=torch.float32)
            self._activations[level.index] = norm, x_BLD.numel()

    @torch.no_grad()
    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in _stepped(optimizer):
            self._before[id(flat)] = flat.detach().clone()
            self._add("grad", flat, flat.grad)
            self._add("param", flat, flat)

    @torch.no_grad()
    def _after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in _stepped(optimizer):
            self._add("update", flat, self._before.pop(id(flat)).sub_(flat))

    def _add(self, kind: str, flat: Tensor, tensor: Tensor | None) -> None:
        assert tensor is not None
        numbers = tensor.detach().view(-1)
        for part, offset, numel in self._places[id(flat)]:
            norm = torch.linalg.vector_norm(numbers.narrow(0, offset, numel), dtype=torch.float32)
            square = norm.double().square()
            self._squares[kind, part] = self._squares.get((kind, part), 0) + square

    # --- results -------------------------------------------------------------------------------

    def own_seconds(self) -> float:
        """Return the seconds of this rank's forward passes since the last call."""
        return self._timer.take()

    def local_sums(self) -> list[float]:
        """Return this rank's sums of the last collected step, for ``metrics``."""
        numbers = [
            float(self._squares.get((kind, part), 0.0))
            for kind in ("grad", "param", "update")
            for part in self.parts
        ]
        for level in self._levels:
            norm, count = self._activations.get(level.index, (0.0, 0))
            numbers += [float(norm) ** 2, float(count)]
        logits = [float(o.largest_logit) for o in self._outputs if o.largest_logit is not None]
        return [*numbers, max(logits, default=math.nan)]

    def metrics(self, of_ranks: Sequence[Sequence[float]], grad_norm: float) -> dict[str, float]:
        """Return metrics by name from the ``local_sums`` of every rank.

        The optimizer sees clipped gradients, so their norms are scaled to ``grad_norm``, the norm
        of all gradients before clipping.
        """
        *columns, logits = zip(*of_ranks, strict=True)
        sums = iter([sum(column) for column in columns])
        grad, param, update = ({part: next(sums) for part in self.parts} for _ in range(3))
        values: dict[str, float] = {}
        if (all_grad := sum(grad.values())) > 0:  # a skipped step has none
            for part in self.parts:
                values[f"grad_norm/{part}"] = grad_norm * math.sqrt(grad[part] / all_grad)
        if sum(update.values()) > 0:
            values |= _norms("param_norm", param) | _norms("update_norm", update)
            for part in [*self.parts, "all"]:
                norm = values[f"param_norm/{part}"]
                values[f"update_ratio/{part}"] = values[f"update_norm/{part}"] / (norm or math.nan)
        for level in self._levels:
            square, count = next(sums), next(sums)
            values[f"activation_rms/level_{level.index}"] = math.sqrt(square / max(1.0, count))
        values["logits/largest"] = max(logits)
        return values


def _norms(name: str, squares: dict[str, float]) -> dict[str, float]:
    norms = {f"{name}/{part}": math.sqrt(square) for part, square in squares.items()}
    return norms | {f"{name}/all": math.sqrt(sum(squares.values()))}


def _order(part: str) -> tuple[bool, int]:
    return part == ENDS, int(part.rpartition("_")[2]) if part != ENDS else 0


def _stepped(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the tensors that this call of the optimizer's step changes."""
    for group in optimizer.param_groups:
        yield from (flat for flat in group["params"] if flat.grad is not None)


class _Timer:
    """Timer of a module's forward passes in training mode, by GPU events where there is a GPU."""

    def __init__(self) -> None:
        self._begun: Any = None
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            self._begun = self._now()

    def end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if not module.training or self._begun is None:
            return
        ended = self._now()
        if isinstance(ended, float):
            self._seconds += ended - self._begun
        else:
            self._events.append((self._begun, ended))

    def _now(self) -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def take(self) -> float:
        """Return the seconds timed since the last call; wait for the device where needed."""
        for begun, ended in self._events:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
