"""Data order of training, a pure function: which row of which source is the n-th one ever read.

    step              ->  phase (batch size, sequence length, weights)  ->  its rows n ... n + B - 1
    n                 ->  chunk g, piece      a chunk is a row of the longest sequence length; where
                                              rows are shorter, it is read piece by piece
    g                 ->  lane d = g mod D, slot g // D of that lane
    lane, slot        ->  source s, and c: earlier slots of source s in this lane
    s, i = c * D + d  ->  epoch, shard, row   of the i-th chunk of the source

Mixing: the slots of a lane come in blocks of 1000. Each block has exactly the quota of every source
that the weights ask for, in an order drawn from (seed, phase, block, lane).

One source: epoch e is exactly i = eR ... (e + 1)R - 1 for R chunks. Its shards, permuted anew, are
laid end to end and cut into D equal segments, which are read side by side from their starts. No row
is lost or repeated, whatever the number of rows, shards and lanes (a source with fewer rows than
lanes has empty segments), rows of different lanes come from far apart, and rows of one lane are
neighbours in a file.

A batch is divided among the ranks in contiguous cuts, so every world size that divides it reads
the same batches. All of it is closed form: a permutation over the shards per source and epoch, one
over the slots of a block, then a binary search per row.

Letters: S sources, D lanes, K slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hourglass_dist.data.data_plan import DataPlan

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Location:
    """Position of one row: source, epoch of the source, index of the shard in the split, and row of
    the shard (in rows of its own length)."""

    source: int
    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class Locations:
    """Positions of many rows, as arrays."""

    sources: Int64s
    epochs: Int64s
    shards: Int64s
    rows: Int64s


def locate_many(plan: DataPlan, ns: Int64s) -> Locations:
    """Return the positions of the rows numbered ``ns`` (each >= 0, in any order)."""
    ns = np.asarray(ns, dtype=np.int64)
    chunks, pieces, per_chunk = _chunks(plan, ns)
    sources, indices = _mix(plan, chunks)
    epochs, shards, rows = (np.empty_like(ns) for _ in range(3))
    for s in np.unique(sources).tolist():
        here = sources == s
        epochs[here], shards[here], rows[here] = _locate_in(plan, s, indices[here])
    return Locations(sources, epochs, shards, rows * per_chunk + pieces)


def locate(plan: DataPlan, n: int) -> Location:
    """Return the position of the n-th row ever read. Raises ValueError for a negative n."""
    if n < 0:
        raise ValueError(f"row number: expected at least 0, given {n}")
    found = locate_many(plan, np.array([n], dtype=np.int64))
    return Location(*(int(a[0]) for a in (found.sources, found.epochs, found.shards, found.rows)))


def _chunks(plan: DataPlan, ns: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Return (chunk, piece of it, pieces of a chunk) of every row."""
    orders = plan.orders
    at = np.searchsorted([order.row for order in orders], ns, side="right") - 1
    row, chunk, pieces = (
        np.array([getattr(order, name) for order in orders], np.int64)[at]
        for name in ("row", "chunk", "pieces")
    )
    group, rest = np.divmod(ns - row, plan.lanes * pieces)
    piece, lane = np.divmod(rest, plan.lanes)
    return chunk + group * plan.lanes + lane, piece, pieces


# --- one source ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The shards of an epoch laid end to end."""

    shards: Int64s
    """Shard indices in the order of the epoch."""
    begins: Int64s
    """Number of chunks before each of them."""
    ends: Int64s
    """Number of chunks up to and including each of them."""


@lru_cache(maxsize=256)
def _layout(plan: DataPlan, source: int, epoch: int) -> _Layout:
    rows = np.asarray(plan.sources[source].rows_per_shard, dtype=np.int64)
    shards = np.argsort(_random(plan.seed, epoch, 0, source, len(rows)), kind="stable")
    ends = np.cumsum(rows[shards])
    return _Layout(shards, ends - rows[shards], ends)


def _random(seed: int, a: int, b: int, c: int, count: int) -> npt.NDArray[np.uint64]:
    # Raw Philox output is the same in every version of numpy; Generator.permutation may change.
    key = np.array([seed, a], dtype=np.uint64)
    counter = np.array([0, 0, b, c], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def _locate_in(plan: DataPlan, source: int, indices: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Return (epoch, shard, row) of the chunks numbered ``indices`` of a source."""
    total = plan.sources[source].rows
    epochs, in_epoch = np.divmod(indices, total)
    segment, k = np.divmod(in_epoch, plan.lanes)[::-1]
    length, longer = divmod(total, plan.lanes)  # the first `longer` segments have one more
    places = segment * length + np.minimum(segment, longer) + k
    shards, rows = np.empty_like(places), np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        layout = _layout(plan, source, epoch)
        at = np.searchsorted(layout.ends, places[here], side="right")
        shards[here] = layout.shards[at]
        rows[here] = places[here] - layout.begins[at]
    return epochs, shards, rows


# --- mixing --------------------------------------------------------------------------------------


def _mix(plan: DataPlan, chunks: Int64s) -> tuple[Int64s, Int64s]:
    """Return (source, number within the source) of every chunk."""
    if len(plan.sources) == 1:
        return np.zeros_like(chunks), chunks
    orders = np.searchsorted([s.chunk for s in plan.orders], chunks, side="right") - 1
    slots, lanes = np.divmod(chunks, plan.lanes)
    sources, passed = np.empty_like(chunks), np.empty_like(chunks)
    for index in np.unique(orders).tolist():
        inside = orders == index
        blocks, at = np.divmod(slots - _first_slot(plan, index)[lanes], plan.mix_block)
        for block in np.unique(blocks[inside]).tolist():
            here = inside & (blocks == block)
            source_DK, before_DK = _block(plan, index, block)
            d, k = lanes[here], at[here]
            s = source_DK[d, k].astype(np.int64)
            sources[here] = s
            full = np.asarray(plan.quotas[index])[s] * block
            passed[here] = _passed(plan)[index][s, d] + full + before_DK[d, k]
    return sources, passed * plan.lanes + lanes


def _first_slot(plan: DataPlan, order: int) -> Int64s:
    """Return the first slot of every lane that belongs to an order (D)."""
    lanes_D = np.arange(plan.lanes, dtype=np.int64)
    return (plan.orders[order].chunk - lanes_D + plan.lanes - 1) // plan.lanes


@lru_cache(maxsize=8)
def _passed(plan: DataPlan) -> tuple[Int64s, ...]:
    """Return, for every order, the slots of each source that each lane passes before it (SD)."""
    totals = [np.zeros((len(plan.sources), plan.lanes), np.int64)]
    for index in range(len(plan.orders) - 1):
        slots_D = _first_slot(plan, index + 1) - _first_slot(plan, index)
        totals.append(totals[-1] + _counts(plan, index, slots_D))
    return tuple(totals)


@lru_cache(maxsize=8)
def _block(
    plan: DataPlan, order: int, block: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32]]:
    """Return, for every lane and slot of a block (DK), the source and its earlier uses there."""
    counts = plan.quotas[order]
    in_order_K = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
    keys = _random(plan.seed, block, 1 + order, 0, plan.lanes * plan.mix_block)
    order_DK = np.argsort(keys.reshape(plan.lanes, plan.mix_block), axis=1, kind="stable")
    source_DK = in_order_K[order_DK]
    before_DK = np.zeros(source_DK.shape, np.uint32)
    for s in range(len(counts)):
        is_s_DK = source_DK == s
        before_DK[is_s_DK] = (np.cumsum(is_s_DK, axis=1) - 1)[is_s_DK]
    return source_DK, before_DK


def _counts(plan: DataPlan, order: int, slots_D: Int64s) -> Int64s:
    """Return the count of each source in the first ``slots_D`` slots of an order's lanes (SD)."""
    if len(plan.sources) == 1:
        return slots_D[None]
    blocks_D, rest_D = np.divmod(slots_D, plan.mix_block)
    counts_SD = np.asarray(plan.quotas[order], np.int64)[:, None] * blocks_D
    for block in np.unique(blocks_D[rest_D > 0]).tolist():
        source_DK, _ = _block(plan, order, block)
        counted_DK = (np.arange(plan.mix_block) < rest_D[:, None]) & (blocks_D == block)[:, None]
        for s in range(len(plan.sources)):
            counts_SD[s] += ((source_DK == s) & counted_DK).sum(axis=1)
    return counts_SD


# --- how much of each source ---------------------------------------------------------------------


def _taken(plan: DataPlan, n: int) -> Int64s:
    """Return the chunks of each source that each lane has begun in the first ``n`` rows (SD)."""
    if n == 0:
        return np.zeros((len(plan.sources), plan.lanes), np.int64)
    order = [index for index, s in enumerate(plan.orders) if s.row < n][-1]
    at = plan.orders[order]
    group, rest = divmod(n - at.row, plan.lanes * at.pieces)
    chunks = at.chunk + group * plan.lanes + min(rest, plan.lanes)
    lanes_D = np.arange(plan.lanes, dtype=np.int64)
    slots_D = (chunks - lanes_D + plan.lanes - 1) // plan.lanes
    counts = _counts(plan, order, slots_D - _first_slot(plan, order))
    return _passed(plan)[order] + counts


def epochs_read(plan: DataPlan, step: int) -> dict[str, float]:
    """Return how often the steps before ``step`` read each source, in epochs."""
    taken = _taken(plan, plan.first_row(step)).sum(axis=1).tolist()
    return {
        source.name: count / source.rows for source, count in zip(plan.sources, taken, strict=True)
    }


def require_enough(plan: DataPlan, steps: int) -> None:
    """Raise ValueError when ``steps`` steps would read a source more often than it may be, naming
    the source and the number of steps that it lasts for."""

    def too_far(s: int, step: int) -> bool:
        taken = _taken(plan, plan.first_row(step))[s]
        furthest = np.where(taken > 0, (taken - 1) * plan.lanes + np.arange(plan.lanes), -1).max()
        cap = plan.sources[s].max_epochs
        return cap is not None and int(furthest) >= cap * plan.sources[s].rows

    for s, source in enumerate(plan.sources):
        if too_far(s, steps):
            good, bad = 0, steps
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (good, middle) if too_far(s, middle) else (middle, bad)
            raise ValueError(
                f"source {source.name}: {steps} steps read it "
                f"{epochs_read(plan, steps)[source.name]:.2f} times, max_epochs is "
                f"{source.max_epochs}: it lasts for {good} steps"
            )


def ranks_cut(n: int, batch: int, world: int, rank: int) -> range:
    """Return the row numbers of one rank in the global batch of ``batch`` rows from row ``n`` on.

    Raises ValueError, naming the possible world sizes, when ``world`` does not divide the batch.
    """
    if batch % world:
        sizes = ", ".join(str(w) for w in range(1, batch + 1) if batch % w == 0)
        raise ValueError(
            f"batch size: {batch} rows cannot be divided equally among {world} ranks; "
            f"these can: {sizes}"
        )
    local = batch // world
    return range(n + rank * local, n + (rank + 1) * local)
