"""What the machines of a cluster are like: ``launch/cluster.yaml``, or a file of one's own.

Everything that differs between clusters is here; the scripts in ``launch/`` are the same for all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hourglass_dist.config import shipped
from hourglass_dist.config.loader import ConfigError, Section, parse, read_yaml
from hourglass_dist.config.model import PositiveFloat, PositiveInt
from hourglass_dist.config.schema import Config

END_SECONDS = 60
"""What a Slurm job has after the seconds for saving, to end and to be queued again."""

Port = Annotated[int, Field(ge=1024, le=65535)]


def _quantity(text: str) -> str:
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?", text):
        raise ValueError(f"expected a quantity of memory such as 64Gi, given {text!r}")
    return text


def _label(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", text):
        raise ValueError(f"expected a name of a to z, 0 to 9 and -, given {text!r}")
    return text


def _folder(text: str) -> str:
    if not text.startswith("/") or ":" in text:
        raise ValueError(f"expected a path from the root, such as /data, given {text!r}")
    return text


Quantity = Annotated[str, AfterValidator(_quantity)]
Label = Annotated[str, AfterValidator(_label)]


class SlurmConfig(Section):
    """What ``sbatch`` is told."""

    partition: str | None = None
    """Where jobs go; null: Slurm's default."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    time: str | None = None
    """Time limit of a job, as 23:30:00 or 2-00:00:00. The run saves itself before and is queued
    again."""
    options: list[str] = Field(default_factory=list)
    """More options of sbatch, such as --constraint=h100."""


class SshConfig(Section):
    """How nodes without a scheduler are reached."""

    hostfile: str | None = None
    """File with a line ``HOST slots=RANKS`` for each node, as DeepSpeed has it."""
    options: list[str] = Field(default_factory=list)
    """More options of ssh, such as -p2222."""


class VolumeConfig(Section):
    """A persistent volume claim that every pod sees."""

    claim: Label
    """Its name."""
    path: Annotated[str, AfterValidator(_folder)]
    """Where in the pod."""


class KubernetesConfig(Section):
    """What a manifest is filled with."""

    kind: Literal["job", "jobset", "trainjob", "pytorchjob"] = "job"
    """Which file in launch/k8s: an Indexed Job needs no operator, the others do."""
    namespace: Label | None = None
    """Null: kubectl's own."""
    image: str = "hourglass-dist:latest"
    """Made with ``docker build -f launch/Dockerfile``."""
    cpus: PositiveInt = 8
    """Of each pod."""
    memory: Quantity = "64Gi"
    """Of each pod."""
    shared_memory: Quantity = "16Gi"
    """/dev/shm of each pod: NCCL and data workers use it."""
    volumes: list[VolumeConfig] = Field(default_factory=list)
    """The run folder and the data lie there."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that nodes must have."""


class ClusterConfig(Section):
    """The machines of a cluster and how to start there."""

    nodes: PositiveInt = 1
    """Machines of a run."""
    min_nodes: PositiveInt | None = None
    """With as few the run goes on when nodes are lost, and takes up those that come; null: only
    with all."""
    gpus_per_node: PositiveInt | None = None
    """Ranks on each; null: one for each of its GPUs, or two on CPUs."""
    network_interface: str | None = None
    """Between nodes, such as eth0; null: what NCCL and gloo choose."""
    port: Port = 29500
    """Where ranks meet, on the first node. Under Slurm the default stands for one made of the
    job's number."""
    restarts: Annotated[int, Field(ge=0)] = 100
    """How often torchrun starts the ranks again after one was lost. Starts that get nowhere are
    few: see run.max_fruitless_starts."""
    join_minutes: PositiveFloat = 10.0
    """How long a node waits for the others."""
    save_seconds: PositiveInt = 300
    """What ranks have after a signal, to save: more than a checkpoint takes."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every rank, such as NCCL_IB_HCA."""
    slurm: SlurmConfig = SlurmConfig()
    ssh: SshConfig = SshConfig()
    kubernetes: KubernetesConfig = KubernetesConfig()

    @model_validator(mode="after")
    def _check(self) -> ClusterConfig:
        least = self.save_seconds + 2 * END_SECONDS
        if self.slurm.time and seconds_of(self.slurm.time) <= least:
            raise ValueError(
                f"slurm.time: expected more than {least} seconds, because a job is told to save "
                f"save_seconds and up to {2 * END_SECONDS} seconds before, given {self.slurm.time}"
            )
        if self.min_nodes and self.min_nodes > self.nodes:
            raise ValueError(
                f"min_nodes: expected at most nodes ({self.nodes}), given {self.min_nodes}"
            )
        for name in self.environment:
            if not name.isidentifier():
                raise ValueError(f"environment: expected names of variables, given {name!r}")
        return self

    @property
    def node_counts(self) -> range:
        """Every number of nodes that the run may go on with."""
        return range(self.min_nodes or self.nodes, self.nodes + 1)


def seconds_of(limit: str) -> int:
    """A time limit as Slurm reads it. Raises ValueError when it is none."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d\d?){0,2}", limit):
        raise ValueError(f"slurm.time: expected such as 23:30:00 or 2-00:00:00, given {limit}")
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)  # 90 and 90:00 are minutes
    return 86400 * int(days or 0) + sum(u * p for u, p in zip(units, parts, strict=False))


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file, or the shipped one for the bare name ``cluster``.

    Raises ConfigError with one line for every mistake.
    """
    path = shipped.find(path, shipped.LAUNCH)
    return parse(ClusterConfig, read_yaml(path), source=str(path))


def require_ranks(cluster: ClusterConfig, config: Config) -> None:
    """Raise ConfigError when the batch cannot be divided among the ranks of a number of nodes that
    the run may have. Where ``gpus_per_node`` is left open, the ranks look themselves."""
    for nodes in cluster.node_counts if cluster.gpus_per_node else ():
        try:
            config.accumulation_steps(nodes * (cluster.gpus_per_node or 1))
        except ConfigError as error:
            raise ConfigError(f"{nodes} nodes of {cluster.gpus_per_node} ranks: {error}") from None
