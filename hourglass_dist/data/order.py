"""The order of training as a pure function: which row of which shard is the n-th one ever read.

    n  ->  epoch, i = divmod(n, rows in all)
    i  ->  lane i mod L, place i // L in that lane
    the epoch's shards, permuted by (seed, epoch), laid end to end and cut into L equal segments:
    lane d reads segment d from its start                ->  shard, row

An epoch is exactly n = epoch * R ... (epoch + 1) * R - 1: no row is lost or repeated, whatever the
number of rows, shards and lanes. Rows of different lanes come from far apart, rows of one lane are
neighbours in a file. A batch is positions n ... n + B - 1, dealt to the ranks in contiguous cuts,
so every world size that divides B reads the same batches.

Cost: a permutation and a cumulative sum over the shards per epoch, then a binary search per row.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

RULE = 1
"""The version of the rule above; part of every plan's hash."""


@dataclass(frozen=True)
class Plan:
    """Everything that the order depends on."""

    dataset_id: str
    rows_per_shard: tuple[int, ...]
    """Rows of ``seq_len`` tokens in every shard of the split."""
    seq_len: int
    """Tokens in a row."""
    lanes: int
    """How many places of the epoch's order are read side by side; the global batch by default."""
    seed: int

    def __post_init__(self) -> None:
        """Raise ValueError for a plan without rows, without lanes or with a seed out of range."""
        if self.total_rows < 1 or min(self.rows_per_shard) < 0:
            raise ValueError(f"rows: expected at least 1, given {self.rows_per_shard}")
        if self.lanes < 1:
            raise ValueError(f"lanes: expected at least 1, given {self.lanes}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2**64 - 1, given {self.seed}")

    @cached_property
    def total_rows(self) -> int:
        """Rows in an epoch."""
        return sum(self.rows_per_shard)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the rule and of every field."""
        return hashlib.sha256(
            json.dumps({"rule": RULE} | asdict(self), sort_keys=True).encode()
        ).hexdigest()

    def __hash__(self) -> int:
        return hash(self.hash)  # cached: plans are looked up once per row, with thousands of shards


@dataclass(frozen=True)
class Location:
    """One row: its epoch, the index of its shard in the split, its number in the shard."""

    epoch: int
    shard: int
    row: int


@dataclass(frozen=True)
class Locations:
    """Many rows, as three arrays."""

    epochs: Int64s
    shards: Int64s
    rows: Int64s


@dataclass(frozen=True)
class _Layout:
    """The shards of an epoch laid end to end."""

    shards: Int64s
    """Shard indices in the epoch's order."""
    ends: Int64s
    """Rows up to and with each of them."""


@lru_cache(maxsize=8)
def _layout(plan: Plan, epoch: int) -> _Layout:
    # Raw Philox output is the same in every version of numpy; Generator.permutation may change.
    key = np.array([plan.seed, epoch], dtype=np.uint64)
    keys = np.random.Philox(key=key).random_raw(len(plan.rows_per_shard))
    shards = np.argsort(keys, kind="stable")
    rows = np.asarray(plan.rows_per_shard, dtype=np.int64)
    return _Layout(shards, np.cumsum(rows[shards]))


def _places(plan: Plan, in_epoch: Int64s) -> Int64s:
    """Place in the epoch's order of the i-th row: the start of its lane's segment + k."""
    lane, k = in_epoch % plan.lanes, in_epoch // plan.lanes
    length, longer = divmod(plan.total_rows, plan.lanes)  # the first `longer` lanes have one more
    return lane * length + np.minimum(lane, longer) + k


def locate_many(plan: Plan, ns: Int64s) -> Locations:
    """Where the rows numbered ``ns`` (each >= 0, in any order) are."""
    epochs, in_epoch = np.divmod(np.asarray(ns, dtype=np.int64), plan.total_rows)
    places = _places(plan, in_epoch)
    shards, rows = np.empty_like(places), np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        layout = _layout(plan, int(epoch))
        at = np.searchsorted(layout.ends, places[here], side="right")
        shards[here] = layout.shards[at]
        begins = layout.ends[at] - np.asarray(plan.rows_per_shard)[shards[here]]
        rows[here] = places[here] - begins
    return Locations(epochs, shards, rows)


def locate(plan: Plan, n: int) -> Location:
    """Where the n-th row ever read (n >= 0) is. Raises ValueError for a negative n."""
    if n < 0:
        raise ValueError(f"row number: expected at least 0, given {n}")
    found = locate_many(plan, np.array([n], dtype=np.int64))
    return Location(int(found.epochs[0]), int(found.shards[0]), int(found.rows[0]))


def ranks_cut(n: int, batch: int, world: int, rank: int) -> range:
    """The row numbers of one rank in the global batch of ``batch`` rows from row ``n`` on.

    Raises ValueError when the ranks cannot have equal parts, saying which world sizes can.
    """
    if batch % world:
        sizes = ", ".join(str(w) for w in range(1, batch + 1) if batch % w == 0)
        raise ValueError(
            f"batch size: {batch} rows cannot be dealt equally to {world} ranks; these can: {sizes}"
        )
    local = batch // world
    return range(n + rank * local, n + (rank + 1) * local)
