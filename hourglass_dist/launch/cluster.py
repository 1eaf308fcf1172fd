"""The settings of a cluster's machines: ``launch/cluster.yaml``, or another file.

They hold everything that differs between clusters; the scripts in ``launch/`` are always the same.
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
"""Seconds that a Slurm job has after ``save_seconds`` to end and to be queued again."""

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
    """Options of ``sbatch``."""

    partition: str | None = None
    """Partition of the jobs; null: Slurm's default."""
    account: str | None = None
    """Account that is charged for the jobs; null: Slurm's default."""
    qos: str | None = None
    """Quality of service of the jobs; null: Slurm's default."""
    time: str | None = None
    """Time limit of a job, such as 23:30:00 or 2-00:00:00. The run is saved before it and queued
    again."""
    options: list[str] = Field(default_factory=list)
    """Further options of sbatch, such as --constraint=h100."""


class SshConfig(Section):
    """Settings for nodes without a scheduler, which are reached over ssh."""

    hostfile: str | None = None
    """File with a line ``HOST slots=RANKS`` for each node, as for DeepSpeed."""
    options: list[str] = Field(default_factory=list)
    """Further options of ssh, such as -p2222."""


class VolumeConfig(Section):
    """A persistent volume claim that every pod mounts."""

    claim: Label
    """Name of the claim."""
    path: Annotated[str, AfterValidator(_folder)]
    """Mount path in the pod."""


class KubernetesConfig(Section):
    """The values that a manifest is filled with."""

    kind: Literal["job", "jobset", "trainjob", "pytorchjob"] = "job"
    """Manifest in launch/k8s: an Indexed Job (job) needs no operator, the others do."""
    namespace: Label | None = None
    """Namespace of all objects; null: kubectl's current one."""
    image: str = "hourglass-dist:latest"
    """Container image, built with ``docker build -f launch/Dockerfile``."""
    cpus: PositiveInt = 8
    """CPU cores that each pod requests."""
    memory: Quantity = "64Gi"
    """Memory that each pod requests, and its limit."""
    shared_memory: Quantity = "16Gi"
    """Size of /dev/shm in each pod: NCCL and data workers use it."""
    volumes: list[VolumeConfig] = Field(default_factory=list)
    """Volumes that hold the run folder and the data."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that the nodes of pods must have."""


class ClusterConfig(Section):
    """The machines of a cluster and how runs start on them."""

    nodes: PositiveInt = 1
    """Number of machines of a run."""
    min_nodes: PositiveInt | None = None
    """Fewest nodes with which the run continues when nodes are lost; nodes that come later join it.
    Null: all nodes."""
    gpus_per_node: PositiveInt | None = None
    """Ranks on each node; null: one for each of its GPUs, or two on CPUs."""
    network_interface: str | None = None
    """Network interface between nodes, such as eth0; null: the choice of NCCL and gloo."""
    port: Port = 29500
    """Port of the rendezvous on the first node. Under Slurm the default is replaced by one computed
    from the job's number."""
    restarts: Annotated[int, Field(ge=0)] = 100
    """Number of times that torchrun restarts the ranks after one was lost. run.max_fruitless_starts
    limits starts without progress."""
    join_minutes: PositiveFloat = 10.0
    """Longest time that a node waits for the others, minutes."""
    save_seconds: PositiveInt = 300
    """Time that ranks have to save after a signal, seconds: more than a checkpoint takes."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of every rank, such as NCCL_IB_HCA."""
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
        """Every number of nodes that the run may continue with."""
        return range(self.min_nodes or self.nodes, self.nodes + 1)


def seconds_of(limit: str) -> int:
    """Return the seconds of a time limit in Slurm's format. Raises ValueError for other text."""
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
    """Raise ConfigError when the batch cannot be divided among the ranks of any number of nodes
    that the run may have. Without ``gpus_per_node`` the ranks check this themselves."""
    for nodes in cluster.node_counts if cluster.gpus_per_node else ():
        try:
            config.accumulation_steps(nodes * (cluster.gpus_per_node or 1))
        except ConfigError as error:
            raise ConfigError(f"{nodes} nodes of {cluster.gpus_per_node} ranks: {error}") from None
