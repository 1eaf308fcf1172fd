"""Two hosts that train together, and what may happen to them: in the end the weights are those of a
run that nothing happened to."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
from drills import Run, largest_difference
from hosts import Hosts

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.cluster,
    pytest.mark.skipif(bool(hosts.missing()), reason=f"hosts: {hosts.missing()}"),
]
STEPS = 30


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with Hosts(2, "hg", "10.91.0") as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(
    net: Hosts, tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, dataset: Path
) -> Path:
    run = Run(net, tmp_path_factory.mktemp("plain") / "plain", tiny_config, dataset, STEPS)
    begun = time.monotonic()
    for host in (0, 1):
        run.start(host)
    assert [run.ends(host) for host in (0, 1)] == [0, 0], run.all_said()
    tell("plain run", run, f"{time.monotonic() - begun:.0f} s")
    return run.folder


@pytest.fixture
def run(net: Hosts, tmp_path: Path, tiny_config: Path, dataset: Path) -> Iterator[Run]:
    made = Run(net, tmp_path / "run", tiny_config, dataset, STEPS)
    yield made
    made.stop()


def tell(what: str, run: Run, *lines: str) -> None:
    """For a person who runs the drills with -s."""
    print("", f"=== {what}", *lines, run.all_said(), sep="\n", flush=True)


def finish(run: Run, undisturbed: Path, *hosts_that_end: int, most: float = 0.0) -> None:
    """The run ends well, with the weights of the undisturbed one."""
    assert [run.ends(host) for host in hosts_that_end] == [0] * len(hosts_that_end), run.all_said()
    assert run.steps() == list(range(1, STEPS + 1))
    assert largest_difference(run.folder, undisturbed, STEPS) <= most


def begin(run: Run, step: int, *changes: str, **variables: str) -> None:
    """Both hosts train, and have come to ``step``."""
    for host in (0, 1):
        run.start(host, *changes, **variables)
    run.reach(step)


def test_plain(undisturbed: Path) -> None:
    assert (undisturbed / "checkpoints" / "latest").exists()


def test_a_rank_is_killed(run: Run, undisturbed: Path) -> None:
    begin(run, 12)
    run.rank(1).kill()
    cost = run.again()
    finish(run, undisturbed, 0, 1)
    tell("a rank is killed", run, cost)


@pytest.mark.parametrize("host", [1, 0], ids=["other", "where_all_meet"])
def test_a_node_is_killed_and_replaced(host: int, run: Run, undisturbed: Path) -> None:
    begin(run, 12)
    run.processes[host].kill()
    run.start(host)
    cost = run.again()
    finish(run, undisturbed, 0, 1)
    tell(f"node {host} is killed and replaced", run, cost)


def test_a_node_is_lost_and_comes_back_later(run: Run, undisturbed: Path) -> None:
    begin(run, 12, NNODES="1:2")
    run.processes[1].kill()
    alone = run.again()
    run.reach(run.starts()[-1] + 2)
    lonely = run.rank(0)
    lonely.suspend()  # or the run might be over before the other is there
    run.start(1, NNODES="1:2")
    run.wait(lambda: "a node has come" in run.said(0))
    lonely.resume()
    together = run.again()
    finish(run, undisturbed, 0, 1, most=1e-5)
    tell("a node is lost, and one comes later", run, alone, together)


def test_a_node_is_lost_for_good(run: Run, undisturbed: Path) -> None:
    begin(run, 12, NNODES="1:2")
    run.processes[1].kill()
    cost = run.again()
    finish(run, undisturbed, 0, most=1e-5)
    tell("a node is lost for good", run, cost)


def test_one_node_is_told_to_stop(run: Run, undisturbed: Path) -> None:
    begin(run, 12)
    run.agent(1).send_signal(signal.SIGTERM)
    assert [run.ends(host) for host in (0, 1)] == [75, 75], run.all_said()
    step = run.last()
    begun = time.monotonic()
    begin(run, step + 1)
    cost = (
        f"saved after step {step}; started again, training after {time.monotonic() - begun:.0f} s"
    )
    assert run.starts()[-1] == step
    finish(run, undisturbed, 0, 1)
    tell("one node is told to stop", run, cost)


def test_the_cable_is_out_for_ten_seconds(run: Run, undisturbed: Path) -> None:
    begin(run, 12)
    step = run.last()
    run.hosts.cut(1)
    time.sleep(10)
    run.hosts.mend(1)
    seconds = run.reach(step + 3)
    finish(run, undisturbed, 0, 1)
    assert run.starts() == [0]
    tell("the cable is out for 10 s", run, f"training again after {10 + seconds:.0f} s, 0 lost")


def test_the_cable_is_out_for_good(run: Run, undisturbed: Path) -> None:
    begin(run, 12, "run.hang_minutes=0.2", NNODES="1:2", JOIN_TIMEOUT="30")
    run.hosts.cut(1)
    try:
        cost = run.again()
        finish(run, undisturbed, 0, most=1e-5)
        begun = time.monotonic()
        assert run.ends(1) == 1, run.all_said()
        after = f"the one that is cut off ended {time.monotonic() - begun:.0f} s after the run"
    finally:
        run.hosts.mend(1)
    tell("the cable is out for good", run, cost, after)
