"""The order: against a slow and obvious reference, and never another one than it was.

python -m pytest tests/unit/test_order.py --hypothesis-profile=thorough        10,000 random plans
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
from datasets import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from hourglass_dist.config.data import Phase
from hourglass_dist.data.data_plan import DataPlan, Source, largest_remainders
from hourglass_dist.data.order import (
    Location,
    epochs_read,
    locate,
    locate_many,
    ranks_cut,
    require_enough,
)


def simple(
    rows: tuple[int, ...] = (3, 4), lanes: int = 2, seed: int = 0, seq_len: int = 8
) -> DataPlan:
    """One source, one phase, a batch of as many rows as there are lanes."""
    return DataPlan((Source("a", "id", rows),), (Phase(0, lanes, seq_len, (1.0,)),), seed, lanes)


# --- the reference -------------------------------------------------------------------------------


def draws(seed: int, a: int, b: int, c: int, count: int) -> list[int]:
    bits = np.random.Philox(
        key=np.array([seed, a], dtype=np.uint64), counter=np.array([0, 0, b, c], dtype=np.uint64)
    )
    return [int(x) for x in bits.random_raw(count)]


def slow_source(plan: DataPlan, s: int) -> Iterator[Location]:
    """Permute the shards, lay them end to end, cut into lanes, deal one row of each; for ever."""
    source, epoch = plan.sources[s], 0
    while True:
        keys = draws(plan.seed, epoch, 0, s, len(source.rows_per_shard))
        shards = sorted(range(len(keys)), key=lambda shard: keys[shard])
        rest = [
            Location(s, epoch, shard, row)
            for shard in shards
            for row in range(source.rows_per_shard[shard])
        ]
        lanes = []
        for left in range(plan.lanes, 0, -1):
            lanes.append(rest[: math.ceil(len(rest) / left)])
            rest = rest[len(lanes[-1]) :]
        for k in range(len(lanes[0])):
            yield from (lane[k] for lane in lanes if k < len(lane))
        epoch += 1


def slow_slots(
    plan: DataPlan, weights: tuple[float, ...], segment: int, lane: int
) -> Iterator[int]:
    """The sources of a lane, block by block: every quota, then a shuffle; for ever."""
    block = 0
    while True:
        in_order = [s for s, q in enumerate(slow_quotas(weights, plan.mix_block)) for _ in range(q)]
        keys = draws(plan.seed, block, 1 + segment, 0, plan.lanes * plan.mix_block)
        mine = keys[lane * plan.mix_block : (lane + 1) * plan.mix_block]
        yield from (in_order[k] for k in sorted(range(plan.mix_block), key=lambda k: mine[k]))
        block += 1


def slow_quotas(weights: tuple[float, ...], slots: int) -> list[int]:
    shares = [Fraction(weight) * slots / Fraction(sum(weights)) for weight in weights]
    counts = [int(share) for share in shares]
    while sum(counts) < slots:
        s = max(range(len(counts)), key=lambda s: shares[s] - counts[s])
        counts[s] += 1
    return counts


class SlowSource:
    """A source's rows by number, from one pass over it."""

    def __init__(self, plan: DataPlan, s: int) -> None:
        self._rows, self._seen = slow_source(plan, s), list[Location]()

    def __getitem__(self, i: int) -> Location:
        while len(self._seen) <= i:
            self._seen.append(next(self._rows))
        return self._seen[i]


def slow_order(plan: DataPlan, steps: int) -> Iterator[list[Location]]:
    """The batches of a run, told as a story: lanes take turns, each hands out its next chunk."""
    sources = [SlowSource(plan, s) for s in range(len(plan.sources))]
    passed = Counter[tuple[int, int]]()  # (source, lane) -> chunks handed out
    segment, before = -1, None
    waiting: list[Location] = []  # rows whose chunks were handed out
    turn = 0
    for step in range(steps):
        phase = [phase for phase in plan.phases if phase.first_step <= step][-1]
        pieces = plan.chunk // phase.seq_len
        if (pieces, phase.weights) != before:
            assert not waiting, "a change never cuts a chunk"
            segment, before = segment + 1, (pieces, phase.weights)
            lanes = [slow_slots(plan, phase.weights, segment, d) for d in range(plan.lanes)]
        while len(waiting) < phase.batch_size:
            round_of_chunks = []
            for _ in range(plan.lanes if pieces > 1 else 1):
                d = turn % plan.lanes
                s = next(lanes[d]) if len(sources) > 1 else 0
                round_of_chunks.append(sources[s][passed[s, d] * plan.lanes + d])
                passed[s, d] += 1
                turn += 1
            waiting += [
                replace(chunk, row=chunk.row * pieces + piece)
                for piece in range(pieces)
                for chunk in round_of_chunks
            ]
        yield waiting[: phase.batch_size]
        waiting = waiting[phase.batch_size :]


@st.composite
def plans(draw: st.DrawFn) -> tuple[DataPlan, int]:
    """A plan and a number of steps that goes past its last change."""
    rows = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any).map(tuple)
    sources = tuple(
        Source(f"s{s}", "id", counts)
        for s, counts in enumerate(draw(st.lists(rows, min_size=1, max_size=4)))
    )
    lanes = draw(st.integers(1, 12))
    phases, step = [], 0
    for _ in range(draw(st.integers(1, 4))):
        batch, pieces = draw(st.integers(1, 12)), draw(st.sampled_from([1, 1, 2, 4]))
        weights = tuple(float(draw(st.integers(1, 4))) for _ in sources)
        phases.append(Phase(step, batch, 16 // pieces, weights))
        group = lanes * pieces
        even = group // math.gcd(group, batch) if pieces > 1 else 1
        step += even * draw(st.integers(1, max(1, 12 // even)))
    longest = max(phase.seq_len for phase in phases)  # fewer pieces when no phase has 16 tokens
    assert all(longest % phase.seq_len == 0 for phase in phases)
    plan = DataPlan(sources, tuple(phases), draw(st.integers(0, 2**64 - 1)), lanes, mix_block=20)
    return plan, step + draw(st.integers(0, 8))


# --- against it ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(plans())
def test_locate_agrees_with_the_slow_reference(given: tuple[DataPlan, int]) -> None:
    plan, steps = given
    n = 0
    for step, expected in enumerate(slow_order(plan, steps)):
        assert plan.first_row(step) == n
        assert plan.phase(step).batch_size == len(expected)
        found = locate_many(plan, np.arange(n, n + len(expected)))
        columns = (found.sources, found.epochs, found.shards, found.rows)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        assert [Location(*row) for row in rows] == expected
        n += len(expected)
    assert plan.first_row(steps) == n


@settings(deadline=None)
@given(plans(), st.lists(st.integers(0, 10**9), max_size=20))
def test_locate_many_agrees_with_locate(given: tuple[DataPlan, int], ns: list[int]) -> None:
    plan, _ = given
    found = locate_many(plan, np.array(ns, dtype=np.int64))
    columns = (found.sources, found.epochs, found.shards, found.rows)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    assert [Location(*row) for row in rows] == [locate(plan, n) for n in ns]


@settings(deadline=None)
@given(plans())
def test_what_was_read_of_each_source(given: tuple[DataPlan, int]) -> None:
    """Counted against the chunks that the rows belong to, at every step."""
    plan, steps = given
    seen: list[set[tuple[int, int, int]]] = [set() for _ in plan.sources]
    for step, batch in enumerate(slow_order(plan, steps)):
        pieces = plan.chunk // plan.phase(step).seq_len
        for at in batch:
            seen[at.source].add((at.epoch, at.shard, at.row // pieces))
        read = epochs_read(plan, step + 1)
        for source, chunks in zip(plan.sources, seen, strict=True):
            assert read[source.name] == len(chunks) / source.rows


@settings(deadline=None)
@given(plans(), st.data())
def test_a_source_runs_out_when_it_is_said_to(
    given: tuple[DataPlan, int], data: st.DataObject
) -> None:
    plan, steps = given
    if steps == 0:
        return
    s = data.draw(st.integers(0, len(plan.sources) - 1))
    read = [
        (at.epoch, step)
        for step, batch in enumerate(slow_order(plan, steps))
        for at in batch
        if at.source == s
    ]
    for cap in range(1, 4):
        too_late = [step for epoch, step in read if epoch >= cap]
        sources = list(plan.sources)
        sources[s] = replace(sources[s], max_epochs=cap)
        capped = replace(plan, sources=tuple(sources))
        if too_late:
            message = refusal(partial(require_enough, capped, steps))
            assert message.endswith(f"max_epochs is {cap}: it lasts for {too_late[0]} steps")
            require_enough(capped, too_late[0])
        else:
            require_enough(capped, steps)


# --- what follows from it ------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any).map(tuple),
    st.integers(1, 30),
    st.integers(0, 2**64 - 1),
    st.integers(0, 5),
)
def test_an_epoch_is_every_row_once(
    rows: tuple[int, ...], lanes: int, seed: int, epoch: int
) -> None:
    total = sum(rows)
    plan = simple(rows, lanes, seed)
    found = [locate(plan, n) for n in range(epoch * total, (epoch + 1) * total)]
    every = {(s, row) for s, count in enumerate(rows) for row in range(count)}
    assert {location.epoch for location in found} == {epoch}
    assert sorted((location.shard, location.row) for location in found) == sorted(every)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(1, 3))
def test_the_mixture_is_exact_to_the_row(lanes: int, seed: int, blocks: int) -> None:
    """After every 1000 slots of all lanes the counts are the quotas, and each source has been read
    from its beginning on, nothing left out and nothing twice."""
    sources = tuple(Source(name, "id", (40, 7, 90)) for name in "abc")
    plan = DataPlan(sources, (Phase(0, lanes, 8, (0.7, 0.25, 0.05)),), seed, lanes)
    found = locate_many(plan, np.arange(blocks * 1000 * lanes))
    assert np.bincount(found.sources).tolist() == [blocks * lanes * q for q in (700, 250, 50)]
    for s in range(3):
        epochs, rows = found.epochs[found.sources == s], found.rows[found.sources == s]
        shards = found.shards[found.sources == s]
        triples = set(zip(epochs.tolist(), shards.tolist(), rows.tolist(), strict=True))
        assert len(triples) == len(epochs)
        for epoch in range(len(epochs) // 137):
            assert (epochs == epoch).sum() == 137


def test_the_order_is_the_one_it_always_was() -> None:
    """A change of these figures breaks every run that is to be continued: raise plan.RULE then."""
    plan = simple((100, 7, 0, 350, 23), 16, 1234, 256)
    found = locate_many(plan, np.arange(1000))
    data = np.stack([found.epochs, found.shards, found.rows]).astype("<i8").tobytes()
    assert hashlib.sha256(data).hexdigest()[:16] == "86b964828f8e3d4a"
    assert plan.hash[:16] == "bcff3af5b3ba07d9"
    mixed = DataPlan(
        (Source("a", "1", (100, 7)), Source("b", "2", (5, 0, 30), 9)),
        (Phase(0, 8, 64, (2, 1)), Phase(24, 16, 128, (2, 1)), Phase(50, 16, 128, (0, 1))),
        1234,
        16,
    )
    found = locate_many(mixed, np.arange(2000))
    columns = [found.sources, found.epochs, found.shards, found.rows]
    assert hashlib.sha256(np.stack(columns).astype("<i8").tobytes()).hexdigest()[:16] == (
        "d8dd4b16251a276c"
    )


def test_epochs_sources_and_seeds_give_other_orders() -> None:
    plan = simple((1,) * 100, 1)
    twins = DataPlan(
        (plan.sources[0], replace(plan.sources[0], name="b")), (Phase(0, 1, 8, (1, 1)),), 0, 1
    )
    mixed = locate_many(twins, np.arange(200))
    orders = {
        tuple(locate_many(p, np.arange(100) + 100 * epoch).shards.tolist())
        for p in (plan, replace(plan, seed=1))
        for epoch in (0, 1, 2)
    } | {tuple(mixed.shards[mixed.sources == 1].tolist())}
    assert len(orders) == 7


@pytest.mark.parametrize(
    "change",
    [
        {"sources": (Source("a", "other", (3, 4)),)},
        {"sources": (Source("b", "id", (3, 4)),)},
        {"sources": (Source("a", "id", (4, 3)),)},
        {"sources": (Source("a", "id", (3, 4), 5),)},
        {"phases": (Phase(0, 4, 8, (1.0,)),)},
        {"phases": (Phase(0, 2, 16, (1.0,)),)},
        {"phases": (Phase(0, 2, 8, (1.0,)), Phase(9, 3, 8, (1.0,)))},
        {"lanes": 3},
        {"seed": 1},
        {"mix_block": 10},
    ],
)
def test_the_hash_depends_on_every_field(change: dict[str, Any]) -> None:
    plan = simple()
    assert replace(plan, **change).hash != plan.hash
    assert replace(plan).hash == plan.hash


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 64), st.integers(1, 64))
def test_ranks_cut_the_batch(n: int, local: int, world: int) -> None:
    batch = local * world
    cuts = [ranks_cut(n, batch, world, rank) for rank in range(world)]
    assert [i for cut in cuts for i in cut] == list(range(n, n + batch))
    assert {len(cut) for cut in cuts} == {local}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1, 1), [334, 333, 333]),
        ((0.1, 0, 0.9), [100, 0, 900]),
        ((5e-324, 0, 0), [1000, 0, 0]),
        ((1e308, 1e308, 0), [500, 500, 0]),
    ],
)
def test_quotas(weights: tuple[float, ...], expected: list[int]) -> None:
    assert list(largest_remainders(weights, 1000, "abc")) == expected


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, -0.5), "weight of b: expected a number of at least 0, given -0.5"),
        ((math.nan, 1), "weight of a: expected a number of at least 0, given nan"),
        ((math.inf, 1), "weight of a: expected a number of at least 0, given inf"),
        ((0, 0), "weights of a, b: all are 0"),
        ((1, 1e-4), "weight of b: 0.0001 is less than 1/1000 of the mixture"),
    ],
)
def test_weights_that_are_none(weights: tuple[float, ...], expected: str) -> None:
    sources = (Source("a", "id", (1,)), Source("b", "id", (1,)))
    assert refusal(lambda: DataPlan(sources, (Phase(0, 1, 8, weights),), 0, 1)).startswith(expected)


def test_a_change_that_would_cut_a_row_names_steps_that_do_not() -> None:
    source = (Source("a", "id", (50,)),)
    phases = (Phase(0, 4, 8, (1.0,)), Phase(9, 8, 32, (1.0,)))
    message = refusal(lambda: DataPlan(source, phases, 0, 8))
    assert "a change at step 9 would leave rows of 32 tokens half read" in message
    assert message.endswith("steps near it that do not: 8, 16")
    for step in (8, 16):
        DataPlan(source, (phases[0], replace(phases[1], first_step=step)), 0, 8)
    ramp = (phases[0], Phase(3, 8, 8, (1.0,)))  # the batch alone may change at any step
    DataPlan(source, ramp, 0, 8)
    assert "does not divide the longest, 32" in refusal(
        lambda: DataPlan(source, (replace(phases[0], seq_len=12), phases[1]), 0, 8)
    )


def test_bad_plans_and_worlds() -> None:
    message = refusal(lambda: ranks_cut(0, 12, 5, 0))
    assert message.endswith(
        "12 rows cannot be divided equally among 5 ranks; these can: 1, 2, 3, 4, 6, 12"
    )
    assert "lanes" in refusal(lambda: simple(lanes=0))
    assert "seed" in refusal(lambda: simple(seed=-1))
    assert "rows" in refusal(lambda: simple((0, 0)))
    assert "given -1" in refusal(lambda: locate(simple(), -1))
    assert "given -1" in refusal(lambda: simple().first_row(-1))
    assert "growing steps, given 5 and then 5" in refusal(
        lambda: replace(simple(), phases=tuple(Phase(s, 1, 8, (1.0,)) for s in (0, 5, 5)))
    )
