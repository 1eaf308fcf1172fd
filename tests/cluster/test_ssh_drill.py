"""A run over real ssh to two hosts, and what happens to its launcher and to the hosts."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sshd
from drills import Run, largest_difference
from hosts import Hosts
from paths import ROOT
from sshd import Sshd

pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.cluster,
    pytest.mark.skipif(bool(sshd.missing()), reason=f"sshd: {sshd.missing()}"),
]
STEPS = 30


class Launched(Run):
    """A run that ``hourglass_dist.launch.ssh`` starts, on the first host."""

    servers: Sshd

    def launch(self, **variables: str) -> None:
        hostfile = self.folder.with_suffix(".hosts")
        hostfile.write_text("".join(f"{name} slots=1\n" for name in self.hosts.names))
        option = f"--ssh-option=-F {self.servers.config}"
        command = [sys.executable, "-m", "hourglass_dist.launch.ssh", option, str(hostfile)]
        given = self.environment(NNODES="2", PYTHONPATH=str(ROOT), **variables)
        del given["MASTER_ADDR"]
        self.processes[0] = self.hosts.start(
            0, [*command, *self.arguments], self.log_of(0), given, is_machine=False
        )

    def left(self) -> list[str]:
        """Processes of the run that are on any host."""
        return [
            line
            for host in range(2)
            for word in ("hourglass_dist.train", "lifeline.sh")
            for line in self.servers.processes(host, word)
        ]


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    with Hosts(2, "hgs", "10.91.1") as made:
        yield made


@pytest.fixture(scope="module")
def servers(net: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Sshd:
    return Sshd(net, tmp_path_factory.mktemp("ssh") / "sshd")


@pytest.fixture
def run(
    net: Hosts, servers: Sshd, tmp_path: Path, tiny_config: Path, dataset: Path
) -> Iterator[Launched]:
    made = Launched(net, tmp_path / "run", tiny_config, dataset, STEPS)
    made.servers = servers
    yield made
    made.stop()


@pytest.fixture(scope="module")
def undisturbed(
    net: Hosts,
    servers: Sshd,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Path,
    dataset: Path,
) -> Path:
    made = Launched(net, tmp_path_factory.mktemp("ssh") / "plain", tiny_config, dataset, STEPS)
    made.servers = servers
    made.launch()
    assert made.ends(0) == 0, made.all_said()
    print("", "=== plain run over ssh", made.all_said(), sep="\n")
    assert not made.left()
    return made.folder


def finish(run: Launched, undisturbed: Path) -> None:
    """The run ends well, with the weights of the undisturbed one, and nothing is left."""
    assert run.ends(0) == 0, run.all_said()
    assert run.steps() == list(range(1, STEPS + 1))
    assert largest_difference(run.folder, undisturbed, STEPS) == 0
    run.wait(lambda: not run.left(), 20)


def test_the_launcher_is_told_to_stop(run: Launched, undisturbed: Path) -> None:
    run.launch()
    run.reach(12)
    run.processes[0].send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert run.ends(0) == 75, run.all_said()
    print("", f"=== the launcher is told to stop: {time.monotonic() - begun:.0f} s", sep="\n")
    assert not run.left()
    assert (run.folder / "INTERRUPTED").exists()
    step = run.last()
    run.launch()
    finish(run, undisturbed)
    print(run.all_said())
    assert run.starts() == [0, step]


def test_the_launcher_is_killed(run: Launched, undisturbed: Path) -> None:
    run.launch()
    run.reach(12)
    run.processes[0].kill()
    seconds = run.wait(lambda: not run.left())
    assert (run.folder / "INTERRUPTED").exists()
    print("", f"=== the launcher is killed: nothing left after {seconds:.0f} s", sep="\n")
    step = run.last()
    run.launch()
    finish(run, undisturbed)
    assert run.starts() == [0, step]


@pytest.mark.parametrize("host", [1, 0])
def test_a_host_dies_and_comes_back(run: Launched, undisturbed: Path, host: int) -> None:
    run.launch()
    run.reach(12)
    run.servers.servers[host].kill()
    time.sleep(3)
    run.servers.start(host)
    cost = run.again()
    finish(run, undisturbed)
    print("", f"=== host {host} dies and comes back: {cost}", run.all_said(), sep="\n")
