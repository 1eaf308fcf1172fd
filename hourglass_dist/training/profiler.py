"""Profile of a few steps, ``metrics.profile_steps: [first, last]``, on the main rank.

    RUN/profile/rank_00000.json  a trace of torch.profiler, for ui.perfetto.dev
    RUN/profile/table.txt        milliseconds a step: forward, backward and recomputation of each
                                 level, gradients, communication, optimizer, data
    RUN/profile/memory.pickle    on a GPU: allocations, for pytorch.org/memory_viz

Hooks set named ranges during those steps only. The table assigns each instant to one part, so its
lines add up: on a CPU to the innermost range, or to communication while a collective runs; on a GPU
to the range that launched the running kernel, to communication while only that runs, and to
``idle`` while nothing runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._profiler import _RecordFunctionFast
from torch.profiler import ProfilerActivity, profile

from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace
from hourglass_dist.engine.engine import Engine
from hourglass_dist.model.hourglass import Hourglass
from hourglass_dist.training.profile_table import PREFIX, STEP, render_table, time_of_parts

T = TypeVar("T")
ENDS = "embeddings, output"
SNAPSHOT_ENTRIES = 200_000


class Profiler:
    """Profiler of the steps from ``steps[0]`` to ``steps[1]`` (1 is the first); with None, and on
    ranks other than the main one, it does nothing."""

    def __init__(
        self, run: Path, steps: tuple[int, int] | None, engine: Engine, world: ranks.World
    ) -> None:
        self._folder = run / "profile"
        self._engine, self._world = engine, world
        self._first, self._last = steps if steps and world.is_main else (0, -1)
        self._ranges: list[Any] = []
        self._hooks = ExitStack()
        self._profile: profile | None = None
        self._in_forward = False

    def data(self, batches: Iterator[T], step: int) -> Iterator[T]:
        """Yield ``batches``, the first of which is for the step after ``step``; waiting for them
        is the part ``data`` of the table."""
        while True:
            step += 1
            if step == self._first:
                self._start()
            if self._profile:
                self._begin(STEP)
                self._begin("data")
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self._profile:
                self._end()
            yield batch

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the work inside this context as step ``step``, whose batch came from ``data``."""
        try:
            yield
        except BaseException:
            while self._ranges:
                self._end()
            if self._profile:
                self._profile.stop()
            raise
        if self._profile:
            self._end()
            assert not self._ranges, "a range that was begun has ended"
            if step == self._last:
                self._stop()

    def _start(self) -> None:
        on_gpu = self._world.device.type == "cuda"
        if on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._watch(self._engine.module)
        for name, part in (("backward", "gradients"), ("step", "optimizer")):
            self._wrap(self._engine.deepspeed, name, part)
        self._profile = profile(activities=activities)
        self._profile.start()

    def _stop(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        self._hooks.close()
        self._folder.mkdir(exist_ok=True)
        trace = self._folder / f"rank_{self._world.rank:05d}.json"
        self._profile.export_chrome_trace(str(trace))
        if self._world.device.type == "cuda":
            path = str(self._folder / "memory.pickle")
            torch.cuda.memory._dump_snapshot(path)  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile = None
        milliseconds = time_of_parts(json.loads(trace.read_text())["traceEvents"])
        table = render_table(milliseconds, self._first, self._last, self._world.device.type)
        replace(self._folder / "table.txt", table)

    # --- ranges --------------------------------------------------------------------------------

    def _begin(self, part: str) -> None:
        # record_function is an operation, which selective checkpointing would expect to recompute
        named = _RecordFunctionFast(PREFIX + part)
        named.__enter__()
        self._ranges.append(named)

    def _end(self) -> None:
        self._ranges.pop().__exit__(None, None, None)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        """Wrap a method in a named range until the profile ends."""
        method: Callable[..., Any] = getattr(owner, name)

        def ranged(*args: Any, **kwargs: Any) -> Any:
            self._begin(part)
            result = method(*args, **kwargs)
            self._end()
            return result

        setattr(owner, name, ranged)
        self._hooks.callback(delattr, owner, name)

    def _watch(self, model: nn.Module) -> None:
        self._watch_whole(model, ENDS)
        for level in (m for m in model.modules() if isinstance(m, Hourglass)):
            name = f"level {level.index}"
            self._watch_whole(level, name)
            ways = [] if level.is_innermost else [level.shorten, level.lengthen]
            for module in (*level.pre, *level.post, *ways):
                self._watch_again(module, name)

    def _watch_whole(self, module: nn.Module, name: str) -> None:
        """Put ranges around the forward and backward pass of a level or of the model."""
        is_model = name == ENDS

        def before(_: nn.Module, inputs: Any) -> None:
            if module.training:
                self._in_forward = True
                self._begin(f"{name}, forward")

        def after(_: nn.Module, inputs: Any, outputs: Any) -> None:
            if not module.training:
                return
            self._end()
            if is_model:
                self._in_forward = False
            result: Tensor = outputs[0] if is_model else outputs
            result.register_hook(begin_backward)  # type: ignore[no-untyped-call]
            if not is_model:
                inputs[0].register_hook(end_backward)

        def begin_backward(_: Tensor) -> None:
            self._begin(f"{name}, backward")
            if is_model:  # no gradient of a tensor marks the end
                torch.autograd.Variable._execution_engine.queue_callback(self._end)

        def end_backward(_: Tensor) -> None:
            self._end()

        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        self._hooks.callback(module.register_forward_hook(after).remove)

    def _watch_again(self, module: nn.Module, level: str) -> None:
        """Put a range around a module of a level when the backward pass recomputes it."""

        def before(_: nn.Module, inputs: Any) -> None:
            if module.training and not self._in_forward:
                self._begin(f"{level}, recompute")

        def after(_: nn.Module, inputs: Any, outputs: Any) -> None:
            if module.training and not self._in_forward:
                self._end()

        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        # recomputation stops early by an exception, once it has all the tensors it needs
        after_all = module.register_forward_hook(after, always_call=True)
        self._hooks.callback(after_all.remove)
