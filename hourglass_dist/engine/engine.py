"""The training engine: a model on this rank's device, trained by DeepSpeed. Its main methods:

    step(rows, step)  ->  StepResult     one optimizer step on this rank's rows
    eval_loss(rows)   ->  nats (B, L)    of each target; no gradient, no state changes
    weights()         ->  (name, value)  of every weight, unsharded
    snapshot()        copies this rank's part of the training state
    load(folder)      restores a state, of any ZeRO stage and world size

Rows are a mapping of tensors whose first dimension is B, the rows of this rank. They are the
arguments of the model: ``model(**rows) -> (nats summed over the scored targets, number of scored
targets)``, or with ``each_target=True`` the nats (B, L), not summed, and that number.

DeepSpeed 0.19.8 does the sharding and the communication. Batch sizes, clipping and precision are
derived from our settings. The learning rate and the checkpoint files are our own, because
DeepSpeed's files need pickle and the world size that wrote them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.engine import compat, loss_scale, offload, optim, sharded_state
from hourglass_dist.engine.compat import deepspeed
from hourglass_dist.engine.deepspeed_config import deepspeed_settings
from hourglass_dist.engine.muon import Exchange, MuonAdamW
from hourglass_dist.engine.sharded_state import Fragment, Key
from hourglass_dist.engine.zero_layout import ZeroLayout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Rows = Mapping[str, Tensor | None]
"""Arguments of the model by name: ``targets_BL`` and its inputs."""


class StepResult(NamedTuple):
    """Result of one optimizer step, over all ranks."""

    nll: float
    """Negative log-likelihood summed over the global batch, nats."""
    tokens: int
    """Number of scored targets of the global batch."""
    grad_norm: float
    """Global gradient norm before clipping; NaN when it was not finite."""
    lr: float
    applied: bool
    """Whether the weights were updated: False when the gradient is NaN or infinite."""
    stop_flags: list[int]
    """Number of ranks that ask for a stop, for each reason."""

    @property
    def loss(self) -> float:
        """Mean loss, nats per scored target."""
        return self.nll / max(1, self.tokens)


class Engine:
    """A model and its optimizer (AdamW, or Muon with AdamW), wrapped by DeepSpeed.

    Raises ConfigError when the settings do not fit the world size.
    """

    def __init__(self, model: nn.Module, config: Config, world: ranks.World) -> None:
        self._config = config
        self._world = world
        self.stage = config.deepspeed.stage
        numbers = (getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        settings = deepspeed_settings(config, world.size, sum(numbers))
        if config.deepspeed.zero_optimization.offload_optimizer == "nvme":
            folder = Path(settings["zero_optimization"]["offload_optimizer"]["nvme_path"])
            builder = deepspeed.ops.op_builder.AsyncIOBuilder()
            ranks.raise_on_all_ranks(lambda: offload.require_files(builder, folder), world.device)
        optimizer = optim.make_optimizer(model, config.optim)
        names = {id(p): name for name, p in model.named_parameters()}
        muons = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
        self._muons = {names[id(p)] for p in muons}
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        loss_scale.stay_above_zero(self._engine.optimizer)
        self._module: nn.Module = self._engine.module
        self._layout = ZeroLayout(self._engine, self.stage, world)
        if isinstance(optimizer, MuonAdamW):
            optimizer.exchanges = self._exchanges()
        self._buffers = sharded_state.PinnedBuffers()

    def step(
        self, rows: Rows, step: int, stop_flags: Callable[[], Sequence[int]] = tuple
    ) -> StepResult:
        """Take optimizer step number ``step`` (0 is the first) on this rank's rows of the global
        batch. ``stop_flags`` is called at the end: its flags are reduced together with the loss,
        without a collective of their own.

        The gradient is that of the nats summed over the batch, divided by its number of positions:
        it does not depend on how the rows are split among ranks and micro batches.
        """
        self._engine.train()
        ranks.seed_step(self._config.run.seed, step, self._world.rank)
        lr = optim.learning_rate(step, self._config.optim, self._config.train.steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        norm = math.nan
        nll, count = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        for micro in self._micro_batches(rows):
            micro_nll, micro_count = self._engine(**micro)
            self._engine.backward(micro_nll / micro["targets_BL"].numel())
            if self.stage == 0 and self._engine.is_gradient_accumulation_boundary():
                norm = self._clip()
            self._engine.step()
            nll += micro_nll.detach()
            count += micro_count
        mine = [nll.item(), count.item(), *stop_flags()]
        total_nll, total_count, *told = ranks.sum_over_ranks(mine, nll.device)
        applied = math.isfinite(norm)
        if self.stage > 0:
            applied = not self._engine.optimizer.overflow
            norm = float(self._engine.get_global_grad_norm()) if applied else math.nan
        return StepResult(total_nll, int(total_count), norm, lr, applied, [int(n) for n in told])

    def dry_run_step(self, rows: Rows) -> None:
        """Take a step of learning rate 0 on one micro batch: it allocates the memory of a step and
        changes nothing. Call it only before the first step and before ``load``."""
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = 0.0
        self._accumulate(1)
        micro = self._place(rows)
        nats, _ = self._engine(**micro)
        with loss_scale.kept(self._engine.optimizer):
            self._engine.backward(nats / micro["targets_BL"].numel())
            self._engine.step()
        offload.forget_moments(self._engine.optimizer)

    @property
    def module(self) -> nn.Module:
        """The model inside DeepSpeed's engine."""
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Our optimizer; the tensors that it steps are this rank's fp32 master weights."""
        outer = self._engine.optimizer
        inner: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
        return inner

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine, for profiling."""
        return self._engine

    def _accumulate(self, micro_batches: int) -> None:
        """Set the micro batches of an optimizer step: the batch may grow during a run."""
        if micro_batches != self._engine.gradient_accumulation_steps():
            rows = micro_batches * self._config.train.micro_batch_size * self._world.size
            compat.change_accumulation(self._engine, rows)

    def _clip(self) -> float:
        """Clip gradients at stage 0, where DeepSpeed gives no norm, and return the norm."""
        trained = [p for p in self._module.parameters() if p.requires_grad]
        limit = self._config.optim.clip_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(trained, limit))
        if not math.isfinite(norm):
            for parameter in trained:
                parameter.grad = None  # AdamW skips parameters without gradient
        return norm

    @torch.no_grad()
    def eval_loss(self, rows: Rows) -> Tensor:
        """Return the nats of each target of this rank's rows, (B, L); 0 without a target."""
        self._engine.eval()
        nats_BL: Tensor = self._engine(**self._place(rows), each_target=True)[0]
        return nats_BL

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, value) of every weight as forward passes use it, unsharded. All ranks must
        iterate together, to the end."""
        yield from self._layout.whole_weights()

    def fragments(self) -> Iterator[Fragment]:
        """Yield every range of trained weights whose master copy this rank holds."""
        return self._layout.fragments()

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return the tensors of this rank by kind; see ``ZeroLayout.tensors``."""
        return self._layout.tensors()

    def _micro_batches(self, rows: Rows) -> Iterator[dict[str, Tensor]]:
        size = self._config.train.micro_batch_size
        there = {name: tensor for name, tensor in rows.items() if tensor is not None}
        count = len(there["targets_BL"])
        assert count % size == 0, "batch and settings disagree"
        self._accumulate(count // size)
        for first in range(0, count, size):
            yield self._place({name: t[first : first + size] for name, t in there.items()})

    def _place(self, rows: Rows) -> dict[str, Tensor]:
        device = self._world.device
        there = {name: tensor for name, tensor in rows.items() if tensor is not None}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in there.items()}

    # --- state ---------------------------------------------------------------------------------

    def snapshot(self) -> sharded_state.Snapshot:
        """Return a copy of this rank's part of the state; the next snapshot overwrites it."""
        states = self._engine.optimizer.state.values()
        steps = max((int(state["step"]) for state in states if state), default=0)
        scale = loss_scale.state(self._engine.optimizer)
        return self._buffers.snapshot(self._saved(), self._layout.shapes(), steps, scale)

    def _saved(self) -> Iterator[tuple[Key, Tensor]]:
        """Yield the ranges that this rank saves. With optimizer state in files, a tensor is valid
        only until the next one is requested."""
        fragments = self._layout.fragments()
        for fragment in offload.each_in_memory(self._engine.optimizer, fragments):
            if fragment.is_saved_here and fragment.numel:
                name, start, state = fragment.name, fragment.start, self._state(fragment)
                yield Key("fp32", name, start), fragment.view(fragment.flat)
                for kind in self._moments(name):
                    yield Key(kind, name, start), fragment.view(state[kind])
        for fragment in self._layout.frozen():
            if fragment.is_saved_here and fragment.numel:
                key = Key("frozen", fragment.name, fragment.start)
                yield key, fragment.view(fragment.flat)

    def load(self, folder: Path) -> None:
        """Load weights and moments from a folder of snapshots, of any stage and world size.

        All ranks call it together. Raises ValueError, on all ranks, when it is the state of another
        model or cannot be read.
        """
        ranks.raise_on_all_ranks(
            lambda: self._read_state(sharded_state.Reader(folder)), self._world.device
        )
        self._layout.refresh_weights()

    @torch.no_grad()
    def _read_state(self, reader: sharded_state.Reader) -> None:
        shapes = self._layout.shapes()
        for name in sorted(shapes.keys() | reader.shapes.keys()):
            if shapes.get(name) != reader.shapes.get(name):
                raise ValueError(
                    f"{reader.folder}: {name}: the model has shape {shapes.get(name)}, "
                    f"the checkpoint {reader.shapes.get(name)}"
                )
        loss_scale.restore(self._engine.optimizer, reader.loss_scale)
        fragments = self._layout.fragments()
        for fragment in offload.each_in_memory(self._engine.optimizer, fragments, changed=True):
            state = self._state(fragment)
            state["step"].fill_(reader.optimizer_steps)
            targets = {"fp32": fragment.flat}
            targets |= {kind: state[kind] for kind in self._moments(fragment.name)}
            for kind, target in targets.items():
                fragment.view(target).copy_(reader.read(kind, *fragment.range))
        for fragment in self._layout.frozen():
            fragment.view(fragment.flat).copy_(reader.read("frozen", *fragment.range))

    def _state(self, fragment: Fragment) -> dict[str, Tensor]:
        """Return the optimizer's state of a fragment's tensor; zeros before the first applied
        step."""
        states = self._engine.optimizer.state
        flat = fragment.flat
        if not states.get(flat):
            states[flat] = {kind: torch.zeros_like(flat) for kind in self._moments(fragment.name)}
            states[flat]["step"] = torch.tensor(0.0, device=flat.device)
        state: dict[str, Tensor] = states[flat]
        return state

    def _moments(self, name: str) -> tuple[str, ...]:
        """Return the names of the optimizer's moments of a parameter."""
        return optim.MUON_MOMENTS if name in self._muons else optim.ADAMW_MOMENTS

    def _exchanges(self) -> dict[int, Exchange]:
        """Return Muon's exchange of each flat tensor (by ``id``) with Muon's matrices."""
        shapes = self._layout.shapes()
        matrices: dict[int, list[Any]] = defaultdict(list)
        fragments: dict[int, list[Fragment]] = defaultdict(list)
        for name, flat in self._layout.flats():
            if name in self._muons:
                matrices[id(flat)].append((name, shapes[name]))
        for fragment in self._layout.fragments():
            if fragment.name in self._muons and fragment.numel:
                fragments[id(fragment.flat)].append(fragment)
        return {
            flat: Exchange(every, fragments[flat], self.stage == 0, self._world.device)
            for flat, every in matrices.items()
        }


def making_weights(
    config: Config, world: ranks.World
) -> Callable[[nn.Module], AbstractContextManager[None]]:
    """Return the context for ``HourglassLM.init_weights`` on the meta device: it allocates a
    module's own weights on this rank's device, and at stage 3 partitions them afterwards."""
    dtype = DTYPES[config.train.precision]
    secondary = config.deepspeed.group_size(world.size)

    @contextmanager
    def made(module: nn.Module) -> Iterator[None]:
        module.to_empty(device=world.device, recurse=False)
        yield
        own = list(module.parameters(recurse=False))
        if config.deepspeed.stage == 3 and own:
            for parameter in own:
                parameter.data = parameter.data.to(dtype)
            deepspeed.zero.Init(
                nn.ParameterList(own),
                dtype=dtype,
                mem_efficient_linear=False,
                zero_param_parallel_group=compat.secondary_group(secondary),
            )

    return made
