"""Inputs of the data order: sources, phases of the run, seed, lanes.

``order.py`` computes which row is read when. This file holds its inputs and refuses impossible
ones. All of them enter the plan's hash.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

from hourglass_dist.config.data import Phase

RULE = 2
"""Version of the rule of ``order.py``; part of every plan's hash."""


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture."""

    name: str
    dataset_id: str
    rows_per_shard: tuple[int, ...]
    """Number of rows of the longest sequence length in each shard of the split."""
    max_epochs: int | None = None
    """Maximum number of epochs; None: as many as the run needs."""

    @cached_property
    def rows(self) -> int:
        """Number of rows in an epoch."""
        return sum(self.rows_per_shard)


@dataclass(frozen=True)
class Order:
    """Start of the rows of one length and mixture. A chunk is a row of the longest length."""

    row: int
    """Number of the first row."""
    chunk: int
    """Number of the chunk of that row."""
    pieces: int
    """Number of rows in a chunk."""
    weights: tuple[float, ...]
    """Share of each source, on any positive scale."""


@dataclass(frozen=True)
class DataPlan:
    """All inputs of the data order; equal plans give equal orders."""

    sources: tuple[Source, ...]
    phases: tuple[Phase, ...]
    seed: int
    lanes: int
    """Number of positions of a source that are read side by side; by default the largest batch."""
    mix_block: int = 1000
    """Number of slots of a lane in which the mixture is exact."""

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible plan."""
        if not self.sources or not self.phases or self.phases[0].first_step != 0:
            raise ValueError("plan: expected a source, and a phase from step 0 on")
        for source in self.sources:
            if source.rows < 1 or min(source.rows_per_shard) < 0:
                raise ValueError(f"{source.name}: rows: expected at least 1, given {source.rows}")
        if self.lanes < 1:
            raise ValueError(f"lanes: expected at least 1, given {self.lanes}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2**64 - 1, given {self.seed}")
        for before, after in pairwise(self.phases):
            if after.first_step <= before.first_step:
                raise ValueError(
                    f"phases: expected growing steps, given {before.first_step} and then "
                    f"{after.first_step}"
                )
        for phase in self.phases:
            if min(phase.batch_size, phase.seq_len) < 1 or self.chunk % phase.seq_len:
                raise ValueError(
                    f"sequence length: {phase.seq_len} does not divide the longest, {self.chunk}"
                )
            if len(phase.weights) != len(self.sources):
                raise ValueError(f"weights: expected {len(self.sources)}, given {phase.weights}")
        assert self.orders, "refuses phases that do not fit"
        assert self.quotas, "refuses weights that are none"

    @cached_property
    def chunk(self) -> int:
        """Tokens of the longest row."""
        return max(phase.seq_len for phase in self.phases)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the rule's version and of every field; checkpoints store it."""
        fields = asdict(self)
        fields["stages"] = fields.pop("phases")  # as it was called when the hash was first taken
        return hashlib.sha256(
            json.dumps({"rule": RULE} | fields, sort_keys=True).encode()
        ).hexdigest()

    def __hash__(self) -> int:
        return hash(self.hash)  # cached: plans are looked up for every batch

    # Steps and rows

    def phase(self, step: int) -> Phase:
        """Return the phase of a step (0 is the first)."""
        return [phase for phase in self.phases if phase.first_step <= max(step, 0)][-1]

    def first_row(self, step: int) -> int:
        """Return the number of the first row of a step: the count of all rows of earlier steps.

        Raises ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, given {step}")
        ends = [*(phase.first_step for phase in self.phases[1:]), step]
        return sum(
            max(0, min(end, step) - phase.first_step) * phase.batch_size
            for phase, end in zip(self.phases, ends, strict=True)
        )

    @cached_property
    def orders(self) -> tuple[Order, ...]:
        """Orders of the run; a phase that changes only the batch size continues the last order."""
        orders: list[Order] = []
        for phase in self.phases:
            pieces = self.chunk // phase.seq_len
            row, chunk = self.first_row(phase.first_step), 0
            if orders:
                last = orders[-1]
                if (pieces, phase.weights) == (last.pieces, last.weights):
                    continue
                rows, group = row - last.row, self.lanes * last.pieces
                if last.pieces > 1 and rows % group:
                    raise ValueError(self._uneven(phase.first_step, last, group))
                chunk = last.chunk + rows // last.pieces
            orders.append(Order(row, chunk, pieces, phase.weights))
        return tuple(orders)

    def _uneven(self, step: int, order: Order, group: int) -> str:
        batch = self.phase(step - 1).batch_size
        rows = self.first_row(step) - order.row
        near = [
            s
            for s in range(max(1, step - group), step + group + 1)
            if (here := rows + (s - step) * batch) > 0 and here % group == 0
        ]
        near = sorted(sorted(near, key=lambda s: abs(s - step))[:2])
        return (
            f"phases: a change at step {step} would leave rows of {self.chunk} tokens half read "
            f"by rows of {self.chunk // order.pieces}; steps near it that do not: "
            f"{', '.join(map(str, near)) or 'none'}"
        )

    @cached_property
    def quotas(self) -> tuple[tuple[int, ...], ...]:
        names = [source.name for source in self.sources]
        return tuple(
            largest_remainders(order.weights, self.mix_block, names) for order in self.orders
        )


def largest_remainders(
    weights: Sequence[float], slots: int, names: Sequence[str]
) -> tuple[int, ...]:
    """Return whole numbers in proportion to ``weights`` that sum to ``slots`` (largest remainders).

    Raises ValueError, naming the source, for weights that are negative, NaN or infinite, all zero,
    or positive and too small for one slot.
    """
    for name, weight in zip(names, weights, strict=True):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight of {name}: expected a number of at least 0, given {weight}")
    total = sum(map(Fraction, weights))
    if total == 0:
        raise ValueError(f"weights of {', '.join(names)}: all are 0")
    exact = [Fraction(weight) * slots / total for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_rest = sorted(range(len(counts)), key=lambda s: counts[s] - exact[s])
    for s in by_rest[: slots - sum(counts)]:
        counts[s] += 1
    for name, weight, count in zip(names, weights, counts, strict=True):
        if weight > 0 and count == 0:
            raise ValueError(
                f"weight of {name}: {weight} is less than 1/{slots} of the mixture; use 0 to leave "
                "it out"
            )
    return tuple(counts)
