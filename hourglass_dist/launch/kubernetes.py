"""Fills a manifest of ``launch/k8s/`` with the settings of a run and of a cluster.

    launch/k8s/KIND.yaml + cluster file + CONFIG key=value ...  ->  the input of kubectl

The file is read as YAML, and fields are set by their paths: all other fields stay. The settings
file is added as a ConfigMap, so that pods train with exactly the settings checked here.

Pods meet by torchrun's c10d rendezvous at the host name of pod 0. So every kind needs the same
variables, a recreated pod replaces the one before it, and there may be fewer nodes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from hourglass_dist.config.loader import read_documents
from hourglass_dist.config.schema import Config
from hourglass_dist.launch.cluster import ClusterConfig

CONFIG_FOLDER = "/etc/hourglass"
LONGEST_NAME = 41  # host names have at most 63 letters; some are NAME-preflight-worker-1234
GRACE_SECONDS = 30  # time that a pod has to end after saving
RETRY_EXIT_CODE = "203"  # a PyTorchJob retries after exit codes of 128 and more only


@dataclass(frozen=True)
class _Places:
    """The document of a kind that is filled in, and the dotted paths in it."""

    document: str
    pod: str
    job: str | None = None
    group: str | None = None
    """Path of the replicated job whose name is part of the pods' names."""


PLACES = {
    "job": _Places("Job", "spec.template", "spec"),
    "jobset": _Places(
        *("JobSet", "spec.replicatedJobs.0.template.spec.template"),
        *("spec.replicatedJobs.0.template.spec", "spec.replicatedJobs.0"),
    ),
    "trainjob": _Places(
        *("TrainingRuntime", "spec.template.spec.replicatedJobs.0.template.spec.template"),
        *(
            "spec.template.spec.replicatedJobs.0.template.spec",
            "spec.template.spec.replicatedJobs.0",
        ),
    ),
    "pytorchjob": _Places("PyTorchJob", "spec.pytorchReplicaSpecs.Worker.template"),
}


class Manifest:
    """The YAML documents of a template."""

    def __init__(self, path: Path) -> None:
        """Read the template. Raises ConfigError when it is not YAML."""
        self._path, self.documents = path, read_documents(path)

    def at(self, kind: str, path: str) -> Any:
        """Return the dict or list at a dotted path in the document of a kind. Raises ValueError
        when there is none."""
        found: Any = next((d for d in self.documents if d.get("kind") == kind), None)
        if found is None:
            raise ValueError(f"{self._path}: has no document 'kind: {kind}' to fill")
        done = []
        for part in path.split("."):
            done.append(part)
            inner: Any = None
            if isinstance(found, dict):
                inner = found.get(part)
            elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                inner = found[int(part)]
            if not isinstance(inner, dict | list):
                raise ValueError(f"{self._path}: {kind} has no {'.'.join(done)} to fill")
            found = inner
        return found

    def text(self) -> str:
        """Return all documents as YAML."""
        return yaml.dump_all(self.documents, Dumper=_Dumper, sort_keys=False, width=1000)


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes ambiguous text and writes text of several lines as a block."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = re.fullmatch(r"[A-Za-z/][\w./-]+", text) is not None
    style = "|" if "\n" in text else None if is_plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def run_name(config: Config, suffix: str = "") -> str:
    """Return the run folder's name as a short Kubernetes name of a to z, 0 to 9 and -."""
    folder = PurePosixPath(config.run.dir).name
    name = re.sub(r"[^a-z0-9]+", "-", folder.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}".strip("-")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9].rstrip('-')}-{zlib.crc32(folder.encode()):08x}"
    return f"{name}{suffix}"


def manifest(
    folder: Path,
    cluster: ClusterConfig,
    config: Config,
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> str:
    """Return the filled manifest as YAML. Raises ValueError when the template lacks a field to fill
    or the run folder is not on a volume."""
    settings = cluster.kubernetes
    is_preflight = environment.get("HOURGLASS_PROGRAM") == "preflight"
    name = run_name(config, "-preflight" if is_preflight else "")
    filled, places = Manifest(folder / f"{settings.kind}.yaml"), PLACES[settings.kind]
    _fill_kind(filled, places, cluster, name, 0 if is_preflight else cluster.restarts)
    variables = dict(environment) | _meeting(filled, places, cluster, name)
    _fill_container(filled, places, cluster, arguments[1:], variables)
    _fill_volumes(filled, places, cluster, name, config)
    text = {"config.yaml": Path(arguments[0]).read_text(encoding="utf-8")}
    filled.documents.insert(0, {"apiVersion": "v1", "kind": "ConfigMap", "data": text})
    own = filled.at(places.document, "metadata").get("name")
    for document in filled.documents:
        _name(document, name, settings.namespace, own)
    return filled.text()


def _name(document: dict[str, Any], name: str, namespace: str | None, own: str | None) -> None:
    """Set a document's namespace, and its name if that was the template's (``own``)."""
    given = document.pop("metadata", None) or {"name": own}
    about = {key: document.pop(key, "") for key in ("apiVersion", "kind")}
    found = {**given, "name": name if given.get("name") == own else given.get("name")}
    if namespace:
        found["namespace"] = namespace
    rest = dict(document)
    document.clear()
    document.update({**about, "metadata": found, **rest})


def _meeting(
    filled: Manifest, places: _Places, cluster: ClusterConfig, name: str
) -> dict[str, str]:
    """Return the variables by which pods find each other."""
    if places.group:
        pods = f"{name}-{filled.at(places.document, places.group).get('name')}-0"
    else:
        pods = name if places.job else f"{name}-worker"
    first = f"{pods}-0.{name}" if places.job else f"{pods}-0"
    found = {"JOB_ID": name, "MASTER_ADDR": first}
    if cluster.nodes > 1:
        found["NODE_NAMES"] = " ".join(f"{pods}-{index}" for index in range(cluster.nodes))
    return found if places.job else found | {"RETRY_EXIT_CODE": RETRY_EXIT_CODE}


def _fill_kind(
    filled: Manifest, places: _Places, cluster: ClusterConfig, name: str, restarts: int
) -> None:
    kind, nodes = cluster.kubernetes.kind, cluster.nodes
    if places.job:
        filled.at(places.document, places.job).update(
            completions=nodes, parallelism=nodes, backoffLimitPerIndex=restarts
        )
    if kind == "job":
        filled.at("Service", "spec")["selector"] = {"batch.kubernetes.io/job-name": name}
        filled.at("Service", "spec.ports.0")["port"] = cluster.port
        filled.at("Job", "spec.template.spec")["subdomain"] = name
    elif kind == "trainjob":
        filled.at("TrainingRuntime", "spec.mlPolicy")["numNodes"] = nodes
        filled.at("TrainJob", "spec.trainer")["numNodes"] = nodes
        filled.at("TrainJob", "spec.runtimeRef")["name"] = name
    elif kind == "pytorchjob":
        filled.at("PyTorchJob", "spec.runPolicy")["backoffLimit"] = restarts
        filled.at("PyTorchJob", "spec.pytorchReplicaSpecs.Worker")["replicas"] = nodes
        if cluster.min_nodes:
            filled.at("PyTorchJob", "spec")["elasticPolicy"] = {
                "minReplicas": cluster.min_nodes,
                "maxReplicas": nodes,
                "rdzvBackend": "c10d",
                "maxRestarts": restarts,
            }


def _fill_container(
    filled: Manifest,
    places: _Places,
    cluster: ClusterConfig,
    overrides: Sequence[str],
    variables: Mapping[str, str],
) -> None:
    """Set the image, arguments, port, environment and resources of a pod's container."""
    kind, pod = places.document, places.pod
    settings, path = cluster.kubernetes, f"{pod}.spec.containers.0"
    container = filled.at(kind, path)
    container["image"] = settings.image
    container["args"] = [f"{CONFIG_FOLDER}/config.yaml", *overrides]
    filled.at(kind, f"{path}.ports.0")["containerPort"] = cluster.port
    environment = [{"name": name, "value": value} for name, value in variables.items()]
    container["env"] = _merged(filled.at(kind, f"{path}.env"), environment, "name")
    asked = {"cpu": str(settings.cpus), "memory": settings.memory}
    limits = {"memory": settings.memory}
    if cluster.gpus_per_node:
        limits["nvidia.com/gpu"] = str(cluster.gpus_per_node)
    resources = filled.at(kind, f"{path}.resources")
    resources["requests"] = {**(resources.get("requests") or {}), **asked}
    resources["limits"] = {**(resources.get("limits") or {}), **limits}


def _fill_volumes(
    filled: Manifest, places: _Places, cluster: ClusterConfig, name: str, config: Config
) -> None:
    """Set a pod's volumes, node selector and grace period."""
    kind, path = places.document, places.pod
    settings, spec = cluster.kubernetes, filled.at(kind, f"{path}.spec")
    container = filled.at(kind, f"{path}.spec.containers.0")
    claims = {f"volume-{index}": volume for index, volume in enumerate(settings.volumes)}
    memory = {"medium": "Memory", "sizeLimit": settings.shared_memory}
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": name}},
        {"name": "shm", "emptyDir": memory},
        *(
            {"name": key, "persistentVolumeClaim": {"claimName": volume.claim}}
            for key, volume in claims.items()
        ),
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
        *({"name": key, "mountPath": volume.path} for key, volume in claims.items()),
    ]
    spec["volumes"] = _merged(filled.at(kind, f"{path}.spec.volumes"), volumes, "name")
    mounted = _merged(filled.at(kind, f"{path}.spec.containers.0.volumeMounts"), mounts, "name")
    container["volumeMounts"] = mounted
    _require_volume(
        config.run.dir,
        [str(mount.get("mountPath")) for mount in mounted if isinstance(mount, dict)],
    )
    if settings.node_selector:
        spec["nodeSelector"] = {**(spec.get("nodeSelector") or {}), **settings.node_selector}
    spec["terminationGracePeriodSeconds"] = cluster.save_seconds + GRACE_SECONDS


def _merged(there: list[Any], new: list[dict[str, Any]], key: str) -> list[Any]:
    """Return the template's items, then the new ones, which replace items of the same name."""
    names = {item[key] for item in new}
    kept = [item for item in there if not isinstance(item, dict) or item.get(key) not in names]
    return kept + new


def _require_volume(run: str, places: Sequence[str]) -> None:
    """Raise ValueError when a run folder is on no volume and would be lost with its pod."""
    folder = PurePosixPath(run)
    kept = [place for place in places if place not in (CONFIG_FOLDER, "/dev/shm")]
    if ".." in folder.parts or not any(folder.is_relative_to(place) for place in kept):
        known = f" ({', '.join(kept)})" if kept else ", and there is none"
        raise ValueError(
            f"run.dir: {run} would be gone with the pod: expected a folder in one of "
            f"kubernetes.volumes{known}"
        )
