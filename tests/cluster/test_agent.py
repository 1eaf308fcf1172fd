"""The agent of a node: what it refuses, what it waits for, when it starts ranks again."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import hosts
import pytest
from hosts import Hosts
from paths import ROOT
from rank_hosts import free_port
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher import api

from hourglass_dist.launch.rendezvous import Meeting, own_address

needs_hosts = pytest.mark.skipif(bool(hosts.missing()), reason=f"hosts: {hosts.missing()}")


def words(*options: str) -> list[str]:
    return [sys.executable, "-m", "hourglass_dist.launch.agent", *options]


def program(folder: Path, body: str) -> str:
    """A program for ranks, with what it may need."""
    path = folder / "program.py"
    path.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{body}\n")
    return str(path)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=200
    )


def test_torch_still_has_what_the_agent_replaces() -> None:
    ours = {"_invoke_run", "_rendezvous", "_monitor_workers", "_restart_workers", "_shutdown"}
    assert ours <= set(dir(LocalElasticAgent))
    assert list(inspect.signature(LocalElasticAgent._shutdown).parameters)[1:] == [
        *("death_sig", "timeout"),
    ]
    inside = inspect.getsource(LocalElasticAgent._invoke_run)
    assert "self._remaining_restarts > 0" in inside
    assert "self._worker_group.state = state" in inside
    assert "self._shutdown_timeout" in inspect.getsource(LocalElasticAgent.run)
    assert "self._state_holder" in inspect.getsource(DynamicRendezvousHandler.num_nodes_waiting)
    assert "LocalElasticAgent(" in inspect.getsource(api.launch_agent)


@pytest.mark.parametrize(
    ("body", "code", "starts"),
    [
        ("sys.exit(2)", 2, 1),
        ("sys.exit(75)", 75, 1),
        ("sys.exit(0 if rank or len(open(LOG).readlines()) > 2 else 7)", 0, 2),
        ("os.kill(os.getpid(), 9)", 137, 3),
    ],
)
def test_only_crashed_ranks_start_again(body: str, code: int, starts: int, tmp_path: Path) -> None:
    log = tmp_path / "starts"
    note = f"LOG = {str(log)!r}\nif rank == 0: open(LOG, 'a').write('start\\n')\ntime.sleep(0.5)\n"
    target = program(tmp_path, note + body.replace("> 2", "> 1"))
    done = run(words("--standalone", "--local-addr", "127.0.0.1", "--max-restarts=2", target))
    assert done.returncode == code, done.stderr
    assert len(log.read_text().splitlines()) == starts
    assert len(done.stderr.splitlines()) == (starts if code == 137 else starts - 1)


def test_a_port_that_is_taken_is_named() -> None:
    here = socket.gethostname()
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"^MASTER_PORT: {port} is taken on {here}, .*PORT="):
            Meeting(f"localhost:{port}", (2, 2), 60).find("job")


def test_two_nodes_of_a_job_on_one_machine_share_the_port() -> None:
    port = free_port()
    first, second, other = (Meeting(f"localhost:{port}", (2, 2), 60) for _ in range(3))
    first.find("job")
    with socket.create_server(("", port)):
        second.find("job")
        with pytest.raises(ValueError, match="MASTER_PORT"):
            other.find("another")
    assert (first.serves, second.serves) == (True, False)


def test_an_address_that_nobody_knows_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"^MASTER_ADDR: no-such-host.invalid is not the name"):
        Meeting("no-such-host.invalid:29500", (2, 2), 1).find("job")


def test_an_interface_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(ValueError, match=f"^NETWORK_INTERFACE: {socket.gethostname()} has no x7;"):
        own_address("x7")


def script(**environment: str) -> str:
    """What launch/torchrun.sh says when it refuses."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(["bash", str(ROOT / "launch/torchrun.sh"), "x.yaml"], **{"PATH": path} | environment)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("nodes", ["0", "two", "3:2", "1:"])
def test_numbers_of_nodes_are_checked(nodes: str) -> None:
    assert f"expected a number of nodes, or MIN:MAX, given {nodes}" in script(NNODES=nodes)


def test_nodes_that_are_counted_cannot_be_fewer() -> None:
    assert "NODE_RANK" in script(NNODES="1:2", NODE_RANK="0", MASTER_ADDR="localhost")


@needs_hosts
class TestTwoHosts:
    """Programs of seconds on two hosts."""

    @pytest.fixture
    def net(self) -> Hosts:  # type: ignore[misc]
        with Hosts(2, "hga", "10.91.2") as made:
            yield made

    def start(self, net: Hosts, host: int, target: str, log: Path, **more: str) -> subprocess.Popen:
        options = ("--rdzv-backend=c10d", f"--rdzv-endpoint={net.names[0]}:29500", "--rdzv-id=x")
        command = words(*options, "--nnodes", more.pop("NNODES", "2"), "--max-restarts=3", target)
        given = {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "JOIN_TIMEOUT": "60",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        return net.start(host, command, log, os.environ | given | more)

    @pytest.mark.slow
    def test_a_node_that_never_comes_is_named(self, net: Hosts, tmp_path: Path) -> None:
        log = tmp_path / "log"
        names = {"NODE_NAMES": " ".join(net.names), "JOIN_TIMEOUT": "14"}
        process = self.start(net, 0, program(tmp_path, ""), log, **names)
        assert process.wait(timeout=200) == 1
        *waiting, line = log.read_text().splitlines()
        assert line == (
            "hga0:29500: 1 of 2 nodes are there (hga0), missing: hga1 after 14 s: given up"
        )
        assert [words.split(";")[0] for words in waiting] == [
            "waiting for nodes at hga0:29500: 1 of 2 nodes are there (hga0), missing: hga1"
        ]

    @pytest.mark.cluster
    def test_a_node_that_does_not_come_back_is_named(self, net: Hosts, tmp_path: Path) -> None:
        target, logs = (
            program(tmp_path, "time.sleep(8)\nsys.exit(1)"),
            [tmp_path / "0", tmp_path / "1"],
        )
        names = {"NODE_NAMES": " ".join(net.names), "JOIN_TIMEOUT": "25"}
        first, second = (self.start(net, i, target, logs[i], **names) for i in (0, 1))
        for _ in range(2000):
            if second.poll() is None and "start again" in logs[1].read_text():
                second.kill()
            if first.poll() is not None:
                break
            threading.Event().wait(0.1)
        assert first.wait(timeout=1) == 1
        *_, line = logs[0].read_text().splitlines()
        assert line.startswith("hga0:29500: 1 of 2 nodes are there (hga0), missing: hga1 after 25")

    def test_the_exit_code_of_one_node_is_that_of_all(self, net: Hosts, tmp_path: Path) -> None:
        """Rank 1 has bad settings; rank 0 crashes without it, and would start again."""
        gone = str(tmp_path / "gone")
        body = f"""
if rank:
    open({gone!r}, "w").close()
    sys.exit(2)
while not os.path.exists({gone!r}):
    time.sleep(0.1)
time.sleep(1)
sys.exit(1)
"""
        target = program(tmp_path, body)
        both = [self.start(net, host, target, tmp_path / f"{host}") for host in (0, 1)]
        assert [process.wait(timeout=200) for process in both] == [2, 2]
        said = (tmp_path / "0").read_text().splitlines()
        assert said[-1] == "the run has ended on another node, with exit code 2"

    @pytest.mark.slow
    def test_ranks_that_saved_for_a_new_node_start_again(self, net: Hosts, tmp_path: Path) -> None:
        """The first node's rank ends with 75 because a second one comes, and then with 0."""
        body = """
size = int(os.environ["WORLD_SIZE"])
print("size", size, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
time.sleep(100 if size == 1 else 1)
"""
        target, log = program(tmp_path, body), tmp_path / "0"
        first = self.start(net, 0, target, log, NNODES="1:2")
        come = threading.Event()
        for _ in range(1000):
            if log.exists() and "size 1" in log.read_text():
                break
            come.wait(0.1)
        second = self.start(net, 1, target, tmp_path / "1", NNODES="1:2")
        assert [process.wait(timeout=200) for process in (first, second)] == [0, 0]
        assert [line for line in log.read_text().splitlines() if "size" in line] == [
            *("size 1", "size 2"),
        ]
        assert "a node has come" in log.read_text()
