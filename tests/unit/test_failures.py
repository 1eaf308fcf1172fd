"""Failures cost what the formulas say where these hold; scale.md shows what is computed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from paths import ROOT

from hourglass_dist.config.schema import load
from hourglass_dist.engine.sharded_state import write_tensors
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.planning.collective_times import all_reduce_s, ring_s
from hourglass_dist.planning.failures import (
    ENOUGH,
    RATES,
    Return,
    Saving,
    best_interval,
    daly,
    goodput,
    longest_interval,
    mtbf_s,
    simulate,
    young,
)
from hourglass_dist.planning.forecast import cluster, forecast
from hourglass_dist.planning.render import render_forecast
from tests.measure.scale import index_of, reports, restart, size_of

LARGE = ROOT / "configs" / "large_zero3.yaml"
DAY = 86400.0
AT_ONCE = Return(crash_s=0, hangs=0, queue_s=0, start_s=0)
SLOW = Return(queue_s=600, queue_spread=0.5, start_s=300)


# --- failures ------------------------------------------------------------------------------------


def test_without_failures_only_saves_cost_time() -> None:
    saving = Saving(stall_s=2, write_s=40)
    assert goodput(198, saving, SLOW, 1e12) == pytest.approx(0.99, abs=1e-6)
    assert simulate(198, saving, SLOW, 1e12, failures=1).goodput == pytest.approx(0.99, abs=1e-4)


@pytest.mark.parametrize("hours", [2, 12, 100])
@pytest.mark.parametrize("saving", [Saving(40, 0), Saving(1, 40), Saving(0.1, 600)])
def test_the_walk_agrees_with_the_closed_form(hours: int, saving: Saving) -> None:
    for interval in (60, 600, 3600):
        expected = goodput(interval, saving, SLOW, 3600 * hours)
        found = simulate(interval, saving, SLOW, 3600 * hours, failures=20_000)
        assert found.goodput == pytest.approx(expected, abs=0.01)
        shares = found.goodput + found.lost + found.stalled + found.away
        assert shares == pytest.approx(1)


@pytest.mark.parametrize("cost", [5, 40, 120])
def test_the_best_interval_is_dalys_where_saves_hold_training_up(cost: float) -> None:
    mtbf, saving = DAY / 2, Saving(cost, 0)
    best = best_interval(saving, AT_ONCE, mtbf)
    assert best == pytest.approx(daly(cost, mtbf), rel=0.01)
    assert best == pytest.approx(young(cost, mtbf), rel=0.05)
    tried = {share: share * best for share in (0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0)}
    walked = {
        share: simulate(interval, saving, AT_ONCE, mtbf).goodput
        for share, interval in tried.items()
    }
    top = max(walked, key=walked.__getitem__)
    assert 0.8 <= top <= 1.25
    assert walked[1.0] > max(walked[0.25], walked[4.0]) + ENOUGH


def test_saving_beside_training_is_better_at_every_interval_and_best_more_often() -> None:
    beside, whole, mtbf = Saving(0.5, 40), Saving(40.5, 0), DAY / 4
    for interval in (60, 300, 1800, 7200):
        together = simulate(interval, whole, SLOW, mtbf)
        assert simulate(interval, beside, SLOW, mtbf).goodput > together.goodput
    assert best_interval(beside, SLOW, mtbf) < best_interval(whole, SLOW, mtbf) / 3


def test_a_save_waits_for_the_one_before() -> None:
    slow = Saving(stall_s=1, write_s=300)
    assert slow.period(100) == 301
    often, seldom = simulate(100, slow, SLOW, DAY), simulate(300, slow, SLOW, DAY)
    assert often.goodput == pytest.approx(seldom.goodput / 3, rel=0.05)
    assert best_interval(slow, SLOW, DAY) >= 295


def test_longer_intervals_lose_more_and_so_do_more_failures() -> None:
    saving = Saving(1, 40)
    for intervals in ([60, 300, 900, 3600, 4 * 3600],):
        lost = [simulate(t, saving, SLOW, DAY, failures=5000).lost_s for t in intervals]
        assert lost == sorted(lost)
        assert lost[2] == pytest.approx(40 + 900 / 2, rel=0.05)
    found = [simulate(900, saving, SLOW, mtbf).goodput for mtbf in (DAY * 10, DAY, DAY / 10)]
    assert found == sorted(found, reverse=True)


def test_the_longest_interval_costs_no_more_than_it_says() -> None:
    for saving, mtbf in itertools.product((Saving(1, 40), Saving(40, 0)), (DAY / 4, 30 * DAY)):
        best, longest = (found(saving, SLOW, mtbf) for found in (best_interval, longest_interval))
        least = goodput(best, saving, SLOW, mtbf) - ENOUGH
        assert longest > best
        assert goodput(longest, saving, SLOW, mtbf) == pytest.approx(least, abs=1e-6)


def test_a_time_limit_costs_queueing_but_loses_nothing() -> None:
    saving = Saving(1, 40)
    limited = simulate(600, saving, SLOW, 10 * DAY, limit_s=DAY / 4, failures=3000)
    free = simulate(600, saving, SLOW, 10 * DAY, failures=3000)
    queue = (SLOW.queue_s + SLOW.start_s + 41) / (DAY / 4)
    assert free.goodput - limited.goodput == pytest.approx(queue, rel=0.2)
    assert limited.lost_s == pytest.approx(free.lost_s, rel=0.2)


def test_published_rates() -> None:
    assert mtbf_s(16_384, RATES["Llama 3"]) == pytest.approx(54 * DAY / 419)
    assert mtbf_s(1024, RATES["RSC-1"]) == pytest.approx(7.9 * 3600)


# --- collectives ---------------------------------------------------------------------------------


def test_rings_are_bandwidth_when_much_is_sent_and_latency_when_little_is() -> None:
    assert ring_s(100e9, 64, 8, 280e9) == pytest.approx(100 / 280, rel=0.01)
    little = [ring_s(8, 8 * nodes, nodes, 280e9) for nodes in (2, 8, 32, 128, 512)]
    for fewer, more in itertools.pairwise(little):
        assert 3 < more / fewer < 4.1
    assert all_reduce_s(8, 4096, 512, 280e9) < little[-1] / 10


# --- files ---------------------------------------------------------------------------------------


def test_the_index_of_a_state_file_is_as_long_as_said(tmp_path: Path) -> None:
    model = load(LARGE).model
    with torch.device("meta"):
        names = {name: list(p.shape) for name, p in HourglassLM(model).named_parameters()}
    kinds = ("fp32", "exp_avg", "exp_avg_sq")
    tensors = {f"{k}/{name}@123456789": torch.zeros(9) for k in kinds for name in names}
    file = tmp_path / "rank.safetensors"
    write_tensors(file, tensors, {"shapes": json.dumps(names), "optimizer_steps": "1"})
    length = int.from_bytes(file.read_bytes()[:8], "little")
    pieces, found = index_of(model)
    assert pieces == len(tensors)
    assert found == pytest.approx(length, rel=0.1)


# --- on paper ------------------------------------------------------------------------------------


def test_more_ranks_than_rows_take_a_larger_batch_and_longer_to_start() -> None:
    few, many = (size_of(LARGE, [], "h100", gpus) for gpus in (256, 1024))
    assert (few.rows, many.rows) == (512, 1024)
    assert restart(many.chosen).opens == 16 * restart(few.chosen).opens
    assert restart(many.chosen).seconds > restart(few.chosen).seconds


def test_the_plan_says_how_often_to_save() -> None:
    found = forecast(load(LARGE), cluster("h100", 8, 8))
    text = render_forecast(found, None, None)
    assert "  failures: 0.21 a week; checkpoint.every: 500 leaves 99.95% of the time; " in text


def test_the_page_shows_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "scale.md").read_text()
    for title, rows, columns in reports(LARGE, [], "h100", [64, 256, 512, 1024, 4096], 3000, 0):
        for row in rows:
            cells = [pattern.format_map(row) for pattern in columns.values()]
            assert f"| {' | '.join(cells)} |" in page, title
