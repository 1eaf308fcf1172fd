"""Manifests as a cluster would look at them: the published types (k8s_types.py), and the rules that
the API server has besides, as far as our manifests meet them.

    python tests/helpers/k8s_check.py FILE ...
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from k8s_types import type_problems

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # of Services: they begin with a letter
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
Document = dict[str, Any]


def problems(text: str) -> list[str]:
    """What is wrong with a file of manifests; nothing is as it should be."""
    try:
        documents = [d for d in yaml.safe_load_all(text) if d]
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not all(isinstance(document, dict) for document in documents):
        return ["expected documents of fields"]
    found = [] if documents else ["nothing in it"]
    for document in documents:
        wrong = list(type_problems(document)) or list(name_problems(document))
        found += [f"{document.get('kind')}: {line}" for line in wrong]
    if found:
        return found  # rules look into documents whose types are right
    for document in documents:
        rules = rule_problems(document, documents)
        found += [f"{document['kind']}: {line}" for line in rules]
    return found


def name_problems(document: Document) -> Iterator[str]:
    name = document.get("metadata", {}).get("name", "")
    if not LABEL.fullmatch(name):
        yield f"metadata.name: expected a to z, 0 to 9 and -, given {name!r}"


def rule_problems(document: Document, documents: list[Document]) -> Iterator[str]:
    """The rules of a document's kind, in the company of the others."""
    kind, spec, name = document["kind"], document.get("spec", {}), document["metadata"]["name"]
    if kind == "Service":
        yield from service_problems(spec, documents)
    elif kind == "Job":
        yield from job_problems(spec, documents)
        yield from network_problems(name, spec, documents)
    elif kind == "JobSet":
        yield from jobset_problems(name, spec, documents)
    elif kind == "TrainingRuntime":
        yield from jobset_problems(name, spec["template"]["spec"], documents)
        marks = spec["template"]["spec"]["replicatedJobs"][0]["template"].get("metadata", {})
        if "trainer.kubeflow.org/trainjob-ancestor-step" not in marks.get("labels", {}):
            yield "spec.template: no job is labelled as the trainer's"
    elif kind == "TrainJob":
        yield from trainjob_problems(spec, documents)
    elif kind == "PyTorchJob":
        yield from pytorchjob_problems(name, spec, documents)


def labels(document: Document) -> dict[str, str]:
    """What the pods of a document are labelled with."""
    name = document["metadata"]["name"]
    template = document.get("spec", {}).get("template", {}).get("metadata", {})
    given: dict[str, str] = template.get("labels", {})
    return {**given, "job-name": name, "batch.kubernetes.io/job-name": name}


def service_problems(spec: Document, documents: list[Document]) -> Iterator[str]:
    pods = [labels(d).items() for d in documents if d["kind"] == "Job"]
    if not any(spec["selector"].items() <= found for found in pods):
        yield f"spec.selector: no pod has the labels {spec['selector']}"
    if spec.get("clusterIP") != "None" or not spec.get("publishNotReadyAddresses"):
        yield "spec: pods find each other by a headless Service that names those not ready"


def network_problems(name: str, spec: Document, documents: list[Document]) -> Iterator[str]:
    """A pod of an Indexed Job has a name where a Service is called as its subdomain."""
    domain = spec["template"]["spec"].get("subdomain")
    if domain not in [d["metadata"]["name"] for d in documents if d["kind"] == "Service"]:
        yield f"spec.template.spec.subdomain: no Service is called {domain!r}"
    yield from address_problems(spec["template"], f"{name}-0.{domain}")
    yield from host_problems(name, spec["parallelism"])


def address_problems(template: Document, address: str) -> Iterator[str]:
    """Filled manifests send every pod to pod 0."""
    env = template["spec"]["containers"][0].get("env", [])
    for variable in env:
        if variable["name"] == "MASTER_ADDR" and variable.get("value") != address:
            yield f"MASTER_ADDR: pod 0 is {address}, given {variable.get('value')}"
    if env and not any(variable["name"] == "MASTER_ADDR" for variable in env):
        yield "MASTER_ADDR: missing"


def host_problems(prefix: str, count: int) -> Iterator[str]:
    longest = f"{prefix}-{max(0, count - 1)}"
    if len(longest) > 63:
        yield f"metadata.name: the host name {longest} has more than 63 letters"


def job_problems(spec: Document, documents: list[Document]) -> Iterator[str]:
    if spec.get("completionMode") != "Indexed":
        yield "spec.completionMode: ranks need Indexed"
    if spec.get("completions") != spec.get("parallelism"):
        yield "spec.parallelism: all pods must run at once: as many as completions"
    if "maxFailedIndexes" in spec and "backoffLimitPerIndex" not in spec:
        yield "spec.maxFailedIndexes: needs backoffLimitPerIndex"
    policy = spec.get("podFailurePolicy")
    if policy:
        if spec["template"]["spec"].get("restartPolicy") != "Never":
            yield "spec.podFailurePolicy: needs restartPolicy Never"
        if spec.get("podReplacementPolicy", "Failed") != "Failed":
            yield "spec.podReplacementPolicy: with a podFailurePolicy only Failed"
        names = [c["name"] for c in spec["template"]["spec"]["containers"]]
        for rule in policy["rules"]:
            yield from failure_rule_problems(rule, names)
    for code, action in ((2, "FailJob"), (75, "Ignore")):
        if action_for(policy or {"rules": []}, code) != action:
            yield f"spec.podFailurePolicy: exit code {code} must be met with {action}"
    if spec["template"]["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
        yield "spec.template.spec.restartPolicy: a Job has Never or OnFailure"
    yield from pod_problems(spec["template"]["spec"], documents)


def failure_rule_problems(rule: Document, containers: list[str]) -> Iterator[str]:
    codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
    if rule["action"] not in ("FailJob", "FailIndex", "Ignore", "Count"):
        yield f"spec.podFailurePolicy: no action {rule['action']}"
    if (codes is None) == (conditions is None):
        yield "spec.podFailurePolicy: a rule has onExitCodes or onPodConditions"
    for condition in conditions or []:
        if condition.get("status", "True") not in ("True", "False", "Unknown"):
            yield f"spec.podFailurePolicy: no status {condition['status']!r}"
    if codes:
        if codes["operator"] not in ("In", "NotIn"):
            yield f"spec.podFailurePolicy: no operator {codes['operator']}"
        if codes.get("containerName", containers[0]) not in containers:
            yield f"spec.podFailurePolicy: no container {codes['containerName']}"
        values = codes["values"]
        if (
            values != sorted(set(values))
            or not values
            or (0 in values and codes["operator"] == "In")
        ):
            yield f"spec.podFailurePolicy: values rise and are not 0, given {values}"


def action_for(policy: Document, code: int, conditions: tuple[str, ...] = ()) -> str:
    """What the first rule says that meets a pod's end; Count where none does."""
    for rule in policy["rules"]:
        codes = rule.get("onExitCodes")
        if codes and code and (code in codes["values"]) == (codes["operator"] == "In"):
            return str(rule["action"])
        if any(pattern["type"] in conditions for pattern in rule.get("onPodConditions", [])):
            return str(rule["action"])
    return "Count"


def pod_problems(pod: Document, documents: list[Document]) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    maps = [d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap"]
    for name in sorted({name for name in volumes if volumes.count(name) > 1}):
        yield f"volumes: {name} is there twice"
    for volume in pod.get("volumes", []):
        if len(volume) != 2:
            yield f"volumes: {volume['name']} has not one source"
        if "configMap" in volume and volume["configMap"]["name"] not in maps:
            yield f"volumes: no ConfigMap is called {volume['configMap']['name']}"
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield "securityContext: runs as root"
    for container in pod["containers"]:
        yield from container_problems(container, volumes)
        variables = {v["name"]: v.get("value", "") for v in container.get("env", [])}
        grace = pod.get("terminationGracePeriodSeconds", 30)
        if grace <= int(variables.get("SHUTDOWN_TIMEOUT", 0)):
            yield f"terminationGracePeriodSeconds: {grace} s, and saving may take as long"


def container_problems(container: Document, volumes: list[str]) -> Iterator[str]:
    if not LABEL.fullmatch(container["name"]):
        yield f"containers: no name of a container: {container['name']!r}"
    if not container.get("image"):
        yield "containers: without an image"
    names = [variable["name"] for variable in container.get("env", [])]
    for name in sorted(set(names)):
        if not VARIABLE.fullmatch(name) or names.count(name) > 1:
            yield f"env: {name!r} is no name, or there twice"
    paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    for mount in container.get("volumeMounts", []):
        path = mount["mountPath"]
        if mount["name"] not in volumes:
            yield f"volumeMounts: no volume {mount['name']}"
        if not path.startswith("/") or ":" in path or paths.count(path) > 1:
            yield f"volumeMounts: {path!r} is no path, or there twice"
    asked = container.get("resources", {}).get("requests", {})
    limits = container.get("resources", {}).get("limits", {})
    for name in {n for n in (*asked, *limits) if "/" in n}:
        if asked.get(name, limits.get(name)) != limits.get(name):
            yield f"resources: as much {name} must be the limit as is requested"
        if not str(limits.get(name)).isdecimal():
            yield f"resources: expected whole {name}, given {limits.get(name)}"


def jobset_problems(name: str, spec: Document, documents: list[Document]) -> Iterator[str]:
    network = spec.get("network", {})
    if not (network.get("enableDNSHostnames") and network.get("publishNotReadyAddresses")):
        yield "spec.network: pods find each other by host names, also of those not ready"
    for group in spec["replicatedJobs"]:
        job = group["template"]["spec"]
        yield from job_problems(job, documents)
        yield from host_problems(f"{name}-{group['name']}-0", job["parallelism"])
        yield from address_problems(job["template"], f"{name}-{group['name']}-0-0.{name}")


def trainjob_problems(spec: Document, documents: list[Document]) -> Iterator[str]:
    wanted = (spec["runtimeRef"].get("kind"), spec["runtimeRef"]["name"])
    runtimes = [d for d in documents if (d["kind"], d["metadata"]["name"]) == wanted]
    if not runtimes:
        yield f"spec.runtimeRef: there is no {wanted[0]} {wanted[1]}"
        return
    nodes = spec["trainer"]["numNodes"]
    job = runtimes[0]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    if not nodes == runtimes[0]["spec"]["mlPolicy"]["numNodes"] == job["parallelism"]:
        yield "spec.trainer.numNodes: the runtime has another number"


def pytorchjob_problems(name: str, spec: Document, documents: list[Document]) -> Iterator[str]:
    for kind, replicas in spec["pytorchReplicaSpecs"].items():
        if kind not in ("Master", "Worker"):
            yield f"spec.pytorchReplicaSpecs: no replicas of kind {kind}"
            continue
        pod = replicas["template"]["spec"]
        if pod["containers"][0]["name"] != "pytorch":
            yield "spec.pytorchReplicaSpecs: the operator looks for a container called pytorch"
        elastic = spec.get("elasticPolicy", {})
        if elastic.get("maxReplicas", replicas["replicas"]) < elastic.get("minReplicas", 1):
            yield "spec.elasticPolicy: fewer at most than at least"
        yield from pod_problems(pod, documents)
        yield from host_problems(f"{name}-{kind.lower()}", replicas["replicas"])
        yield from address_problems(replicas["template"], f"{name}-worker-0")


def main(paths: list[str]) -> int:
    found = [f"{path}: {line}" for path in paths for line in problems(Path(path).read_text())]
    print("\n".join(found) or "nothing wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
