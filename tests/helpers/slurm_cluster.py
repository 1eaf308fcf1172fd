"""A real Slurm on hosts of hosts.py: munged, slurmctld on the first, a slurmd on each, two fake
GPUs a node, and two partitions: a job in ``high`` takes the nodes of one in ``low``, which is
queued again.

``missing`` says what is not there. Of Debian's packages it takes slurmctld, slurmd, slurm-client
and munge, with no daemon of theirs running: everything lies in a folder of its own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import hosts

DAEMONS = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
NULL = os.makedev(1, 3)
GPUS = 2

# cred_expire: a job that is queued again waits as long. KillWait: from SIGTERM to SIGKILL.
SLURM = """
ClusterName=test
SlurmctldHost={first}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=10
KillWait=30
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=2 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN\n"
PARTITIONS = """
PartitionName=low Nodes=ALL Default=YES MaxTime=30 PriorityTier=1 GraceTime=40
PartitionName=high Nodes=ALL MaxTime=30 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    absent = [package for name, package in DAEMONS.items() if not shutil.which(name, path=path)]
    return f"needs {', '.join(absent)}" if absent else hosts.missing()


class SlurmCluster:
    """A context with Slurm on ``count`` hosts."""

    def __init__(self, folder: Path, count: int = 2, name: str = "sl", subnet: str = "10.92.0"):
        """Everything of Slurm's own goes into ``folder``."""
        self.hosts = hosts.Hosts(count, name, subnet)
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }

    def __enter__(self) -> SlurmCluster:
        self.folder.mkdir(parents=True)
        self.hosts.__enter__()
        try:
            self._write_settings()
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _write_settings(self) -> None:
        folder, names = self.folder, self.hosts.names
        for part in ("munge", "state", "gpu", *(f"spool/{name}" for name in names)):
            (folder / part).mkdir(parents=True)
        key = folder / "munge/key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        addresses = {name: self.hosts.address(index) for index, name in enumerate(names)}
        common = SLURM.format(folder=folder, first=names[0], address=addresses[names[0]])
        nodes = [NODE.format(name=n, address=a, gpus=GPUS) for n, a in addresses.items()]
        (folder / "slurm.conf").write_text("".join([common, *nodes, PARTITIONS]))
        for index in range(GPUS):  # Slurm believes in any character device
            os.mknod(folder / f"gpu/gpu{index}", stat.S_IFCHR | 0o666, NULL)
        (folder / "gres.conf").write_text(
            f"Name=gpu Flags=nvidia_gpu_env File={folder}/gpu/gpu[0-{GPUS - 1}]\n"
        )

    def _start(self) -> None:
        munge = self.folder / "munge"
        self._daemon(
            *("munge", 0, "munged", "--foreground", "--force", f"--key-file={munge}/key"),
            *(f"--socket={munge}/socket", f"--pid-file={munge}/pid"),
            *(f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        wait_for(lambda: (munge / "socket").exists(), 30, "munged")
        self.start_controller()
        for host in range(len(self.hosts.names)):
            self.start_node(host)
        wait_for(lambda: self.states() == ["idle"] * len(self.hosts.names), 60, "idle nodes")

    def _daemon(self, key: str, host: int, *command: str, is_machine: bool = False) -> None:
        self._daemons[key] = self.hosts.start(
            *(host, command, self.folder / f"{key}.out", self.environment, is_machine)
        )

    def start_controller(self) -> None:
        """Start slurmctld, which knows what it knew before."""
        self._daemon("controller", 0, "slurmctld", "-D")

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs go on."""
        self._daemons["controller"].terminate()
        self._daemons["controller"].wait(timeout=30)

    def start_node(self, host: int) -> None:
        """Start, or start again, a host's slurmd: it and the jobs there are a machine."""
        name = self.hosts.names[host]
        self._daemon(name, host, "slurmd", "-D", "-N", name, is_machine=True)

    def kill_node(self, host: int) -> None:
        """Pull a host's plug: its slurmd and all jobs there are gone at once."""
        process = self._daemons[self.hosts.names[host]]
        process.kill()
        process.wait(timeout=30)

    def run(self, *command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program of Slurm, or one that calls them, on the first host."""
        return subprocess.run(
            self.hosts.command(0, [str(word) for word in command], is_machine=False),
            capture_output=True,
            text=True,
            env=self.environment,
            cwd=cwd,
            timeout=300,
        )

    def states(self) -> list[str]:
        """What Slurm thinks of each node, such as idle."""
        done = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%T")
        return done.stdout.split()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode, Reason, ..."""
        done = self.run("scontrol", "show", "job", number, "--oneliner")
        pairs = [word.partition("=") for word in done.stdout.split() if "=" in word]
        return {name: value for name, _, value in pairs}

    def wait_for_state(self, number: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in one of ``states``; returns what Slurm knows of it."""
        wait_for(lambda: self.job(number).get("JobState") in states, seconds, f"{number}: {states}")
        return self.job(number)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in reversed(self._daemons.values()):
            process.terminate()
        self.hosts.__exit__(None, None, None)


def wait_for(came: Callable[[], bool], seconds: float, what: str) -> None:
    """Look until ``came`` is true; fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not came():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)
