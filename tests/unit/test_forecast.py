"""A forecast suggests what fits, refuses what does not, and moves with the machines."""

from __future__ import annotations

import itertools

import pytest
from paths import CONFIGS
from ranks import hourglass
from slow_cases import every

from hourglass_dist.config.schema import Config, load
from hourglass_dist.planning.devices import DEVICES, planned_device
from hourglass_dist.planning.forecast import EXACT, candidates, cluster, forecast, suggest
from hourglass_dist.planning.render import render_forecast

KNOWN = sorted(key.lower() for key, device in DEVICES.items() if device.node)


ALONE = "deepspeed.zero_optimization.zero_hpz_partition_size=null"


def large(*more: str) -> Config:
    return load(CONFIGS / "large_zero3.yaml", more)


def test_more_nodes_take_less_memory_of_each_and_less_time() -> None:
    found = [forecast(large(), cluster("h100", nodes, 8)) for nodes in (1, 2, 4, 8, 16)]
    for fewer, more in itertools.pairwise(found):
        assert more.memory < fewer.memory
        assert more.step_s < fewer.step_s
        assert more.gpu_hours >= 0.99 * fewer.gpu_hours


@pytest.mark.parametrize("name", ["base_zero2", "large_zero3", "modern"])
@pytest.mark.parametrize("gpu", every(5, KNOWN))
def test_what_is_suggested_fits_and_nothing_that_fits_is_much_faster(name: str, gpu: str) -> None:
    machines = cluster(gpu, 1, 8)
    config = load(CONFIGS / f"{name}.yaml")
    best, least = suggest(config, machines)
    assert best is not None
    assert least is not None
    assert best.memory <= machines.node.memory
    for each in candidates(config, machines):
        assert not each.fits or (1 + EXACT) * each.step_s >= best.step_s
        assert each.memory >= least.memory
    again = forecast(best.plan.config, machines)  # a run with these settings
    assert again.memory == best.memory
    assert again.step_s == best.step_s


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    stage0 = large("deepspeed.zero_optimization.stage=0", ALONE)
    machines = cluster("h100", 8, 8)
    found = forecast(stage0, machines)
    assert found.plan.memory.total > machines.node.memory
    assert not found.fits
    assert "does not fit: " in render_forecast(found, *suggest(stage0, machines))
    lone = cluster("h100", 1, 1)
    best, least = suggest(large(), lone)
    assert best is None
    assert least is not None
    assert not least.fits
    text = render_forecast(forecast(large(), lone), best, least)
    assert "Nothing fits: " in text
    assert max(map(len, text.splitlines())) <= 110


def test_stages_share_out_more_and_more() -> None:
    machines = cluster("a100", 4, 8)
    memory = [
        forecast(large(f"deepspeed.zero_optimization.stage={stage}", ALONE), machines).plan.memory
        for stage in range(4)
    ]
    kept = [m.weights + m.gradients + m.master + m.moments for m in memory]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4


def test_network_cards_limit_what_leaves_a_node() -> None:
    inside, outside = cluster("h100", 1, 8), cluster("h100", 2, 8)
    assert outside.bandwidth < inside.bandwidth
    assert cluster("h100", 2, 4).bandwidth == pytest.approx(outside.bandwidth / 2)


def test_the_command_forecasts_at_a_given_price() -> None:
    config = CONFIGS / "base_zero2.yaml"
    done = hourglass("plan", config, "--gpu", "H100", "--price", "10")
    hours = forecast(load(config), cluster("h100", 1, 8)).gpu_hours
    assert f"${hours * 10:,.0f} at $10.00 an hour" in done.stdout


def test_unknown_names_and_batches_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match=f"--gpu: expected one of {', '.join(KNOWN)}, given"):
        cluster("h1000", 1, 8)
    with pytest.raises(ValueError, match="world sizes that can: 1, 2, 4, 8"):
        forecast(load(CONFIGS / "base_zero2.yaml"), cluster("h100", 3, 8))


def test_names_are_read_in_any_case() -> None:
    assert planned_device("mi300x") == planned_device("MI300X")
