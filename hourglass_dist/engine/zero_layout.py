"""Layout of a rank's weights, fp32 master weights and moments at every ZeRO stage.

    stage 0      the parameters are their own master weights, the same on all ranks; rank r saves
                 every N-th one, from number r on
    stages 1, 2  a flat fp32 tensor for each parameter group: this rank's share of its parameters,
                 concatenated
    stage 3      a flat fp32 tensor for each sub-group: 1/N of each of its parameters

The optimizer steps these flat tensors. ``fragments`` gives the range of each parameter in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hourglass_dist.core import ranks
from hourglass_dist.engine import offload
from hourglass_dist.engine.sharded_state import Fragment


class ZeroLayout:
    """Layout of the tensors of one DeepSpeed engine."""

    def __init__(self, engine: Any, stage: int, world: ranks.World) -> None:
        self._stage, self._world = stage, world
        self._optimizer = engine.optimizer
        self._module: nn.Module = engine.module
        named = list(self._module.named_parameters())
        self._trained: list[tuple[str, Any]] = [(n, p) for n, p in named if p.requires_grad]
        self._untrained: list[tuple[str, Any]] = [(n, p) for n, p in named if not p.requires_grad]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the full shape of every parameter, by name."""
        return {
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._module.named_parameters()
        }

    def fragments(self) -> Iterator[Fragment]:
        """Yield every range of trained weights whose master copy this rank holds."""
        if self._stage == 0:
            for index, (name, p) in enumerate(self._trained):
                mine = index % self._world.size == self._world.rank
                yield Fragment(name, 0, p.numel(), p, 0, mine)
        elif self._stage < 3:
            flats = self._partitions()
            for name, p in self._trained:
                if (mapping := getattr(p, "_hp_mapping", None)) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    flat = flats[mapping.param_group_index]
                    yield Fragment(name, here.start, here.numel, flat, there.start, True)
        else:
            names = {id(p): name for name, p in self._trained}
            for flat, group in self._sub_groups():
                offset = 0
                for p in group:
                    start, numel = self._share(p)
                    yield Fragment(names[id(p)], start, numel, flat, offset, True)
                    offset += p.partition_numel()

    def frozen(self) -> Iterator[Fragment]:
        """Yield every range of frozen weights that this rank holds."""
        for name, p in self._untrained:
            if self._stage < 3:
                yield Fragment(name, 0, p.numel(), p, 0, self._world.is_main)
            else:
                yield Fragment(name, *self._share(p), p.ds_tensor, 0, True)

    def flats(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, flat tensor of its group) of every trained parameter, in the same order on
        all ranks, whether or not this rank holds a range of it."""
        optimizer = self._optimizer
        if self._stage == 0:
            yield from self._trained
            return
        names = {id(p): name for name, p in self._trained}
        if self._stage == 3:
            groups = self._sub_groups()
        else:
            own_bf16 = hasattr(optimizer, "bf16_groups")
            parameters = optimizer.bf16_groups if own_bf16 else optimizer.bit16_groups
            groups = list(zip(self._partitions(), parameters, strict=True))
        for flat, group in groups:
            yield from ((names[id(p)], flat) for p in group)

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, value) of every weight as forward passes use it. All ranks must iterate
        together, to the end: stage 3 gathers them one by one. Other stages make no copies."""
        for name, parameter in self._module.named_parameters():
            if self._stage < 3:
                yield name, parameter.detach()
            else:
                partitioned: Any = parameter
                share = partitioned.ds_tensor.detach().view(-1).to(self._world.device)
                whole = torch.cat(ranks.gather(share))[: partitioned.ds_numel]
                yield name, whole.view(partitioned.ds_shape)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Make the weights of the forward pass equal to the master weights."""
        optimizer = self._optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            optimizer._partition_all_parameters()  # an evaluation leaves the old weights gathered
            for _, parameter in [*self._trained, *self._untrained]:
                parameter.ds_secondary_tensor = None  # hpZ's copy of the old weights
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                with offload.in_memory(optimizer, flat):
                    optimizer._reassign_or_swap_out_partitioned_parameters(index)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return this rank's tensors by kind: weights (stage 3: its share), gathered weights, fp32
        master weights, moments, and the buffers of gradients to reduce. Gradients are not listed:
        their tensors depend on the stage and the moment."""
        optimizer = self._optimizer
        parameters: list[Any] = list(self._module.parameters())
        is_split = self._stage == 3
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        buckets = getattr(optimizer, "ipg_buckets", {}).values()
        buffers = [bucket.buffer for bucket in buckets if bucket.buffer is not None]
        return {
            "weights": [p.ds_tensor if is_split else p for p in parameters],
            "gathered": parameters if is_split else [],
            "master": optimizer.fp32_partitioned_groups_flat if is_split else stepped,
            "moments": [t for s in optimizer.state.values() for k, t in s.items() if k != "step"],
            "buffer": [t for b in buffers for t in ([b] if isinstance(b, Tensor) else b)],
        }

    def _partitions(self) -> list[Tensor]:
        """Return this rank's flat tensors at stages 1 and 2, one for each parameter group. bf16 at
        stage 1 has its own optimizer class, with another name for them."""
        own_bf16 = getattr(self._optimizer, "fp32_groups_flat_partition", None)
        flats: list[Tensor] = own_bf16 or self._optimizer.single_partition_of_fp32_groups
        return flats

    def _sub_groups(self) -> list[tuple[Tensor, list[Any]]]:
        """Return the flat tensor and the parameters of each sub-group of stage 3."""
        optimizer = self._optimizer
        flats = optimizer.fp32_partitioned_groups_flat
        return list(zip(flats, optimizer.fp16_groups, strict=True))

    def _share(self, parameter: Any) -> tuple[int, int]:
        """Return start and length of this rank's 1/N of a parameter at stage 3, without padding."""
        size = parameter.partition_numel()
        start = size * self._world.rank
        return start, max(0, min(size, parameter.ds_numel - start))
