"""The order: against a slow and obvious reference, and never another one than it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from datasets import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from hourglass_dist.data.order import Location, Plan, locate, locate_many, ranks_cut

PLANS = st.builds(
    Plan,
    dataset_id=st.just("d"),
    rows_per_shard=st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any).map(tuple),
    seq_len=st.just(8),
    lanes=st.integers(1, 30),
    seed=st.integers(0, 2**64 - 1),
)


def slow_epoch(plan: Plan, epoch: int) -> Iterator[Location]:
    """The rule, word for word: permute, lay end to end, cut into lanes, deal one row of each."""
    key = np.array([plan.seed, epoch], dtype=np.uint64)
    keys = np.random.Philox(key=key).random_raw(len(plan.rows_per_shard)).tolist()
    shards = sorted(range(len(keys)), key=lambda shard: keys[shard])
    laid = [Location(epoch, s, row) for s in shards for row in range(plan.rows_per_shard[s])]
    lanes, rest = [], laid
    for lane in range(plan.lanes):
        length = len(rest) // (plan.lanes - lane) + (len(rest) % (plan.lanes - lane) > 0)
        lanes.append(rest[:length])
        rest = rest[length:]
    for k in range(len(lanes[0])):
        yield from (lane[k] for lane in lanes if k < len(lane))


@settings(deadline=None)
@given(PLANS)
def test_locate_agrees_with_the_slow_reference(plan: Plan) -> None:
    rows = plan.total_rows
    expected = [location for epoch in range(3) for location in slow_epoch(plan, epoch)]
    assert [locate(plan, n) for n in range(3 * rows)] == expected


@settings(deadline=None)
@given(PLANS, st.lists(st.integers(0, 10**12), max_size=20))
def test_locate_many_agrees_with_locate(plan: Plan, ns: list[int]) -> None:
    found = locate_many(plan, np.array(ns, dtype=np.int64))
    rows = zip(found.epochs.tolist(), found.shards.tolist(), found.rows.tolist(), strict=True)
    assert [Location(*row) for row in rows] == [locate(plan, n) for n in ns]


@settings(deadline=None)
@given(PLANS, st.integers(0, 5))
def test_an_epoch_is_every_row_once(plan: Plan, epoch: int) -> None:
    rows = plan.total_rows
    found = [locate(plan, n) for n in range(epoch * rows, (epoch + 1) * rows)]
    every = {(s, row) for s, count in enumerate(plan.rows_per_shard) for row in range(count)}
    assert {location.epoch for location in found} == {epoch}
    assert sorted((location.shard, location.row) for location in found) == sorted(every)


def test_the_order_is_the_one_it_always_was() -> None:
    """A change of this figure breaks every run that is to be continued: raise order.RULE then."""
    plan = Plan("golden", (100, 7, 0, 350, 23), 256, 16, 1234)
    found = locate_many(plan, np.arange(1000))
    data = np.stack([found.epochs, found.shards, found.rows]).astype("<i8").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "86b964828f8e3d4a"
    assert plan.hash[:16] == "3d2ec3655854e108"


def test_epochs_and_seeds_give_other_orders() -> None:
    plan = Plan("d", (1,) * 100, 8, 1, 0)
    orders = {
        tuple(locate_many(p, np.arange(100) + 100 * epoch).shards.tolist())
        for p in (plan, replace(plan, seed=1))
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"dataset_id": "e"},
        {"rows_per_shard": (4, 3)},
        {"seq_len": 16},
        {"lanes": 3},
        {"seed": 1},
    ],
)
def test_the_hash_depends_on_every_field(change: dict[str, object]) -> None:
    plan = Plan("d", (3, 4), 8, 2, 0)
    assert replace(plan, **change).hash != plan.hash  # type: ignore[arg-type]
    assert replace(plan).hash == plan.hash


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 64), st.integers(1, 64))
def test_ranks_cut_the_batch(n: int, local: int, world: int) -> None:
    batch = local * world
    cuts = [ranks_cut(n, batch, world, rank) for rank in range(world)]
    assert [i for cut in cuts for i in cut] == list(range(n, n + batch))
    assert {len(cut) for cut in cuts} == {local}


def test_bad_plans_and_worlds() -> None:
    message = refusal(lambda: ranks_cut(0, 12, 5, 0))
    assert message.endswith(
        "12 rows cannot be dealt equally to 5 ranks; these can: 1, 2, 3, 4, 6, 12"
    )
    assert "lanes" in refusal(lambda: Plan("d", (1,), 8, 0, 0))
    assert "seed" in refusal(lambda: Plan("d", (1,), 8, 1, -1))
    assert "rows" in refusal(lambda: Plan("d", (0, 0), 8, 1, 0))
    assert "given -1" in refusal(lambda: locate(Plan("d", (1,), 8, 1, 0), -1))
