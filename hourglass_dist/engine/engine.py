"""The only importer of deepspeed: a model on this rank's device becomes an engine with five verbs.

    step(rows, step)  ->  StepResult     one optimizer step on this rank's rows
    eval_loss(rows)   ->  nats (B, L)    of each target; no gradient, nothing changed
    weights()         ->  (name, value)  of every weight, whole
    snapshot()        this rank's part of the whole training state, as it is now
    load(folder)      the state, whichever stage and world size wrote it

Rows are a mapping of tensors that begin with B, the rows of this rank: the arguments of the model,
which returns its loss: ``model(**rows) -> (nats summed over the targets that count, how many those
are)``, or with ``each_target=True`` the nats (B, L), not summed.

DeepSpeed 0.19.8 is used for what it is good at, sharding and communication. Batch sizes, clipping
and precision are derived from our settings; the learning rate and the checkpoint files are ours,
because DeepSpeed's files need pickle and the world size that wrote them.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.engine import loss_scale, offload, optim, sharded_state
from hourglass_dist.engine.deepspeed_config import deepspeed_settings
from hourglass_dist.engine.muon import Exchange, MuonAdamW, Piece
from hourglass_dist.engine.sharded_state import Fragment, Key

deepspeed.utils.logger.setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None  # 18 lines at a start
# The shared-memory collectives compile for about a minute at start and serve inference only.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Its own Muon is imported at every start, though nobody uses it; to compile it took a second.
deepspeed.runtime.compiler.compile = lambda: lambda function: function

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Rows = Mapping[str, Tensor | None]
"""Arguments of the model: ``targets_BL`` and whatever it reads."""


class StepResult(NamedTuple):
    """What one optimizer step did, over all ranks."""

    nll: float
    """Nats, summed over the global batch."""
    tokens: int
    """Targets that were scored."""
    grad_norm: float
    """Global gradient norm before clipping; no number when it was not finite."""
    lr: float
    applied: bool
    """Whether the weights were changed: not when the gradient is no number."""
    stop_flags: list[int]
    """Number of ranks that ask for a stop, by reason."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nll / max(1, self.tokens)


class Engine:
    """A model, its AdamW and DeepSpeed around both.

    Raises ConfigError when the settings do not fit the world size.
    """

    def __init__(self, model: nn.Module, config: Config, world: ranks.World) -> None:
        self._config = config
        self._world = world
        self.stage = config.deepspeed.stage
        settings = deepspeed_settings(config, world.size)
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
        if isinstance(optimizer, MuonAdamW):
            optimizer.exchanges = self._exchanges()
        self._room = sharded_state.Room()

    def step(
        self, rows: Rows, step: int, stop_flags: Callable[[], Sequence[int]] = tuple
    ) -> StepResult:
        """One optimizer step, number ``step`` (0 is the first), on this rank's rows of the global
        batch. ``stop_flags`` is called at its end: the flags travel with the loss, so they cost no
        collective of their own.

        The gradient is that of nats summed over the batch and divided by its number of positions,
        so it does not depend on how the rows are dealt to ranks and micro batches.
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
        """One step with the learning rate 0, on one micro batch: all memory that a step takes, and
        nothing changed by it. Only before the first step and before ``load``."""
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
        """The model, as DeepSpeed has wrapped it."""
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Ours: the tensors that it steps are this rank's fp32 weights."""
        outer = self._engine.optimizer
        inner: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
        return inner

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine, for a profile to look at."""
        return self._engine

    def held(self) -> Iterator[Fragment]:
        """Every range of trained weights whose master copy this rank holds."""
        return self._fragments()

    def _accumulate(self, micro_batches: int) -> None:
        """Make an optimizer step of so many forward passes: the batch may grow during a run."""
        if micro_batches != self._engine.gradient_accumulation_steps():
            rows = micro_batches * self._config.train.micro_batch_size * self._world.size
            self._engine.set_train_batch_size(rows)
            self._engine.micro_steps = 0  # or steps end after the wrong pass

    def _clip(self) -> float:
        """Stage 0 only, where DeepSpeed clips but does not tell the norm, and takes any step."""
        trained = [p for p in self._module.parameters() if p.requires_grad]
        limit = self._config.optim.clip_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(trained, limit))
        if not math.isfinite(norm):
            for parameter in trained:
                parameter.grad = None  # AdamW leaves what has no gradient alone
        return norm

    @torch.no_grad()
    def eval_loss(self, rows: Rows) -> Tensor:
        """(B, L) the nats of each target of this rank's rows, 0 where there is none."""
        self._engine.eval()
        nats_BL: Tensor = self._engine(**self._place(rows), each_target=True)[0]
        return nats_BL

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, value) of every weight as forward passes see it, whole, one after another.

        Called by all ranks together, to the end. At stage 3 each is put together from the ranks'
        parts when its turn comes; otherwise the values are those that are trained, no copies.
        """
        for name, parameter in self._module.named_parameters():
            if self.stage < 3:
                yield name, parameter.detach()
            else:
                partitioned: Any = parameter
                part = partitioned.ds_tensor.detach().view(-1).to(self._world.device)
                whole = torch.cat(ranks.gather(part))[: partitioned.ds_numel]
                yield name, whole.view(partitioned.ds_shape)

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
        """A copy of this rank's part of the state; the next one overwrites it."""
        states = self._engine.optimizer.state.values()
        steps = max((int(state["step"]) for state in states if state), default=0)
        scale = loss_scale.state(self._engine.optimizer)
        return self._room.snapshot(self._pieces(), self._shapes(), steps, scale)

    def _pieces(self) -> Iterator[tuple[Key, Tensor]]:
        """What this rank saves. A tensor may hold something else when the next one is asked for."""
        for part in offload.each_here(self._engine.optimizer, self._fragments()):
            if part.mine and part.numel:
                state = self._state(part)
                yield Key("fp32", part.name, part.start), part.view(part.flat)
                for kind in self._moments(part.name):
                    yield Key(kind, part.name, part.start), part.view(state[kind])
        for name, start, tensor, mine in self._frozen():
            if mine and tensor.numel():
                yield Key("frozen", name, start), tensor

    def load(self, folder: Path) -> None:
        """Take weights and moments from a folder of snapshots, of any stage and world size.

        Called by all ranks together. Raises ValueError, on all of them, when it is the state of
        another model or cannot be read.
        """
        ranks.raise_on_all_ranks(
            lambda: self._read_state(sharded_state.Reader(folder)), self._world.device
        )
        self._refresh_weights()

    @torch.no_grad()
    def _read_state(self, reader: sharded_state.Reader) -> None:
        shapes = self._shapes()
        for name in sorted(shapes.keys() | reader.shapes.keys()):
            if shapes.get(name) != reader.shapes.get(name):
                raise ValueError(
                    f"{reader.folder}: {name}: the model has shape {shapes.get(name)}, "
                    f"the checkpoint {reader.shapes.get(name)}"
                )
        loss_scale.restore(self._engine.optimizer, reader.loss_scale)
        for part in offload.each_here(self._engine.optimizer, self._fragments(), changed=True):
            state = self._state(part)
            state["step"].fill_(reader.optimizer_steps)
            kinds = self._moments(part.name)
            for kind, target in [("fp32", part.flat), *((k, state[k]) for k in kinds)]:
                part.view(target).copy_(reader.read(kind, part.name, part.start, part.numel))
        for name, start, tensor, _ in self._frozen():
            tensor.copy_(reader.read("frozen", name, start, tensor.numel()))

    def _state(self, part: Fragment) -> dict[str, Tensor]:
        """What the optimizer keeps of a fragment's tensor; zeros before the first step that
        changed anything."""
        every = self._engine.optimizer.state
        if not every.get(part.flat):
            kinds = self._moments(part.name)
            every[part.flat] = {kind: torch.zeros_like(part.flat) for kind in kinds}
            every[part.flat]["step"] = torch.tensor(0.0, device=part.flat.device)
        found: dict[str, Tensor] = every[part.flat]
        return found

    def _moments(self, name: str) -> tuple[str, ...]:
        """What the optimizer keeps of a parameter besides its fp32 weights."""
        return optim.MUON_MOMENTS if name in self._muons else optim.ADAMW_MOMENTS

    def _exchanges(self) -> dict[int, Exchange]:
        """Of each flat tensor with Muon's matrices: which they are, and what of them is here."""
        shapes = self._shapes()
        matrices: dict[int, list[Any]] = defaultdict(list)
        pieces: dict[int, list[Piece]] = defaultdict(list)
        for name, flat in self._flats():
            if name in self._muons:
                matrices[id(flat)].append((name, shapes[name]))
        for part in self._fragments():
            if part.name in self._muons and part.numel:
                piece = Piece(part.name, part.start, part.numel, part.offset)
                pieces[id(part.flat)].append(piece)
        return {
            flat: Exchange(every, pieces[flat], self.stage == 0, self._world.device)
            for flat, every in matrices.items()
        }

    def _flats(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained parameter, the same on all ranks, and the flat tensor of its group."""
        names = {id(p): name for name, p in self._module.named_parameters() if p.requires_grad}
        optimizer = self._engine.optimizer
        if self.stage == 0:
            flats: list[Tensor] = [p for p in self._module.parameters() if p.requires_grad]
            groups = [[flat] for flat in flats]
        elif self.stage == 3:
            groups, flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
        else:
            own_bf16 = hasattr(optimizer, "bf16_groups")
            groups = optimizer.bf16_groups if own_bf16 else optimizer.bit16_groups
            flats = self._flat_groups()
        for group, flat in zip(groups, flats, strict=True):
            yield from ((names[id(p)], flat) for p in group)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._module.named_parameters()
        }

    def _fragments(self) -> Iterator[Fragment]:
        """Every range of trained weights that this rank holds, wherever this ZeRO stage keeps
        it."""
        optimizer, rank = self._engine.optimizer, self._world.rank
        names = {id(p): name for name, p in self._module.named_parameters() if p.requires_grad}
        parameters = [p for p in self._module.parameters() if p.requires_grad]
        if self.stage == 0:
            for index, p in enumerate(parameters):
                mine = index % self._world.size == rank
                yield Fragment(names[id(p)], 0, p.numel(), p, 0, mine)
        elif self.stage < 3:
            for p in parameters:
                if (mapping := getattr(p, "_hp_mapping", None)) is not None:
                    flat = self._flat_groups()[mapping.param_group_index]
                    start, where = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Fragment(names[id(p)], start.start, start.numel, flat, where.start, True)
        else:
            for flat, group in zip(
                optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True
            ):
                offset = 0
                for p in group:
                    size = p.partition_numel()
                    numel = max(0, min(size, p.ds_numel - rank * size))
                    yield Fragment(names[id(p)], rank * size, numel, flat, offset, True)
                    offset += size

    def _flat_groups(self) -> list[Tensor]:
        """This rank's fp32 partitions at stages 1 and 2 (bf16 at stage 1 has an optimizer of its
        own)."""
        optimizer = self._engine.optimizer
        own = getattr(optimizer, "fp32_groups_flat_partition", None)
        flats: list[Tensor] = own or optimizer.single_partition_of_fp32_groups
        return flats

    def _frozen(self) -> Iterator[tuple[str, int, Tensor, bool]]:
        """(name, start, flat view of this rank's range, whether this rank saves it) of untrained
        weights."""
        frozen = [(n, p) for n, p in self._module.named_parameters() if not p.requires_grad]
        for name, parameter in frozen:
            if self.stage < 3:
                yield name, 0, parameter.detach().view(-1), self._world.is_main
            else:
                partitioned: Any = parameter
                size = partitioned.partition_numel()
                start = size * self._world.rank
                numel = max(0, min(size, partitioned.ds_numel - start))
                yield name, start, partitioned.ds_tensor.detach().view(-1)[:numel], True

    def tensors(self) -> dict[str, list[Tensor]]:
        """What this rank keeps, by kind: weights (at stage 3 its part), gathered weights, fp32
        master weights, moments, and the buffers in which gradients wait. Gradients are elsewhere at
        every stage and moment, and are not listed."""
        optimizer = self._engine.optimizer
        parameters: list[Any] = list(self._module.parameters())
        split = self.stage == 3
        known = [p for group in optimizer.param_groups for p in group["params"]]
        buckets = getattr(optimizer, "ipg_buckets", {}).values()
        buffers = [bucket.buffer for bucket in buckets if bucket.buffer is not None]
        return {
            "weights": [p.ds_tensor if split else p for p in parameters],
            "gathered": parameters if split else [],
            "master": optimizer.fp32_partitioned_groups_flat if split else known,
            "moments": [t for s in optimizer.state.values() for k, t in s.items() if k != "step"],
            "buffer": [t for b in buffers for t in ([b] if isinstance(b, Tensor) else b)],
        }

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """Make the weights that the forward pass uses equal to the master weights."""
        optimizer = self._engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer._partition_all_parameters()  # an evaluation leaves the old ones gathered
            parameters: list[Any] = list(self._module.parameters())
            for parameter in parameters:
                parameter.ds_secondary_tensor = None  # hpZ's copy, of the weights before
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                with offload.here(optimizer, flat):
                    optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def making_weights(
    config: Config, world: ranks.World
) -> Callable[[nn.Module], AbstractContextManager[None]]:
    """For ``HourglassLM.init_weights`` on the meta device: a module's own weights come to this
    rank's device before they are drawn; at stage 3 only a part of them stays."""
    dtype = DTYPES[config.train.precision]

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
                zero_param_parallel_group=_node_group(config, world),
            )

    return made


def _node_group(config: Config, world: ranks.World) -> Any:
    """The ranks that keep a second copy of the weights among them; None where nobody does."""
    size, groups = config.deepspeed.group_size(world.size), deepspeed.utils.groups
    if size and groups._get_zero_param_intra_parallel_group() is None:
        deepspeed.init_distributed(verbose=False)  # takes PyTorch's, which is there
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()
