"""``hourglass launch TARGET CONFIG``: makes one command of a cluster file and a run's settings.

    TARGET     the command                                        what runs on every node
    torchrun   bash launch/torchrun.sh CONFIG                     launch/torchrun.sh
    ssh        python -m hourglass_dist.launch.ssh HOSTS CONFIG   launch/torchrun.sh
    slurm      sbatch launch/slurm.sbatch CONFIG                  launch/torchrun.sh
    k8s        kubectl create -f - < launch/k8s/KIND.yaml, filled launch/torchrun.sh

The torchrun line itself is built in launch/torchrun.sh alone, from the variables that
``node_environment`` sets.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hourglass_dist.config.schema import Config
from hourglass_dist.config.shipped import LAUNCH
from hourglass_dist.launch.cluster import END_SECONDS, ClusterConfig
from hourglass_dist.launch.hostfile import read_hostfile
from hourglass_dist.launch.kubernetes import manifest


@dataclass(frozen=True)
class Launch:
    """A command, its variables in addition to those of this process, and its standard input."""

    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    input: str | None = None
    output: Path | None = None
    """File in the run folder for a Slurm job's output; %j stands for the job's number."""


@dataclass(frozen=True)
class Request:
    """The run that is to be started, and its cluster."""

    cluster: ClusterConfig
    config: Config
    arguments: Sequence[str]
    """Arguments of the ranks: CONFIG.yaml key=value ..."""
    preflight_only: bool = False


def node_environment(request: Request) -> dict[str, str]:
    """Return the variables from which launch/torchrun.sh builds its command, without those that
    differ from node to node."""
    cluster = request.cluster
    counts = cluster.node_counts
    found = {
        "NNODES": str(cluster.nodes) if len(counts) == 1 else f"{counts[0]}:{counts[-1]}",
        "MASTER_PORT": str(cluster.port),
        "MAX_RESTARTS": str(0 if request.preflight_only else cluster.restarts),
        "JOIN_TIMEOUT": str(round(60 * cluster.join_minutes)),
        "SHUTDOWN_TIMEOUT": str(cluster.save_seconds),
    }
    if cluster.gpus_per_node:
        found["NPROC_PER_NODE"] = str(cluster.gpus_per_node)
    if cluster.network_interface:
        found["NETWORK_INTERFACE"] = cluster.network_interface
    if request.preflight_only:
        found["HOURGLASS_PROGRAM"] = "preflight"
    return found | cluster.environment


def counted(target: str, cluster: ClusterConfig) -> ClusterConfig:
    """Return the cluster with the numbers of nodes and ranks of ``target``: for ssh the hostfile's.

    Raises ValueError when the hostfile is missing or wrong.
    """
    if target != "ssh":
        return cluster
    if not cluster.ssh.hostfile:
        raise ValueError("ssh.hostfile: the cluster file must name one: a line 'HOST slots=8' each")
    hosts, slots = read_hostfile(Path(cluster.ssh.hostfile))
    if cluster.min_nodes and cluster.min_nodes > len(hosts):
        raise ValueError(f"min_nodes: {cluster.ssh.hostfile} has only {len(hosts)} hosts")
    return cluster.model_copy(update={"nodes": len(hosts), "gpus_per_node": slots})


def torchrun(request: Request) -> Launch:
    """Return the command for this node; with several nodes, each runs it with MASTER_ADDR set."""
    script = str(LAUNCH / "torchrun.sh")
    return Launch(["bash", script, *request.arguments], node_environment(request))


def ssh(request: Request) -> Launch:
    """Return the command that starts every node of the hostfile over ssh."""
    settings = request.cluster.ssh
    assert settings.hostfile  # see ``counted``
    options = [f"--ssh-option={option}" for option in settings.options]
    options += [f"--pass={name}" for name in request.cluster.environment]
    command = [sys.executable, "-m", "hourglass_dist.launch.ssh", *options]
    command += [settings.hostfile, *request.arguments]
    return Launch(command, node_environment(request))


def slurm(request: Request) -> Launch:
    """Return the sbatch command; the job's output goes into the run folder."""
    cluster, settings, run = request.cluster, request.cluster.slurm, Path(request.config.run.dir)
    name = "preflight-%j.out" if request.preflight_only else "slurm-%j.out"
    given = {
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time,
        "gpus-per-node": cluster.gpus_per_node,
        "job-name": run.name,
        "output": f"{str(run).replace('%', '%%')}/{name}",
        "signal": f"USR1@{cluster.save_seconds + END_SECONDS}",
    }
    nodes = f"{cluster.node_counts[0]}-{cluster.nodes}" if cluster.min_nodes else cluster.nodes
    command = [
        *("sbatch", f"--nodes={nodes}"),
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        *("--parsable", "--export=ALL"),
        *(["--no-kill"] if cluster.min_nodes else []),
        *(["--wait", "--no-requeue"] if request.preflight_only else []),
        *(*settings.options, str(LAUNCH / "slurm.sbatch"), *request.arguments),
    ]
    environment = node_environment(request)
    if cluster.port == ClusterConfig.model_fields["port"].default:
        del environment["MASTER_PORT"]  # the script makes one of the job's number
    return Launch(command, environment, output=run / name)


def k8s(request: Request) -> Launch:
    """Return the kubectl command with the manifest as its input. ``create`` refuses a name that is
    taken; ``apply`` would leave a job that has ended unchanged."""
    space = request.cluster.kubernetes.namespace
    command = ["kubectl", "create", *([f"--namespace={space}"] if space else []), "-f", "-"]
    text = manifest(
        *(LAUNCH / "k8s", request.cluster, request.config, request.arguments),
        node_environment(request),
    )
    return Launch(command, input=text)


TARGETS = {"torchrun": torchrun, "ssh": ssh, "slurm": slurm, "k8s": k8s}


def show(launch: Launch) -> str:
    """Return the command as a shell line; for Kubernetes the manifest alone."""
    if launch.input is not None:
        return launch.input
    variables = [f"{name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    return f"{' '.join([*variables, shlex.join(launch.command)])}\n"


def start(launch: Launch) -> int:
    """Run the command and return its exit code; one without input replaces this process.

    Raises ValueError when the program is not installed.
    """
    program = launch.command[0]
    if not shutil.which(program):
        raise ValueError(f"{program}: not found on this machine; --print shows what would be run")
    environment = os.environ | launch.environment
    if launch.output:
        return submit(launch, environment)
    if launch.input is None:
        sys.stdout.flush()
        os.execvpe(program, launch.command, environment)
    return subprocess.run(launch.command, input=launch.input, text=True, check=False).returncode


def submit(launch: Launch, environment: dict[str, str]) -> int:
    """Run sbatch and return its exit code; print where to look, or the output if waited for."""
    assert launch.output
    run = launch.output.parent
    run.mkdir(parents=True, exist_ok=True)  # Slurm makes no folders
    with subprocess.Popen(
        launch.command, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        number = process.stdout.readline().strip().partition(";")[0]
        output, waits = Path(str(launch.output).replace("%j", number)), "--wait" in launch.command
        if number:
            more = "which is shown when it has ended" if waits else f"or: hourglass status {run}"
            print(f"job {number}: look at {output}, {more}", flush=True)
    if waits and output.exists():
        print(output.read_text(), end="")
    return process.returncode
