"""Manifests: as they stand in launch/k8s, as they are filled, and as they must not be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_check import action_for, problems
from paths import ROOT
from ranks import hourglass

from hourglass_dist.config.loader import parse
from hourglass_dist.config.schema import load
from hourglass_dist.launch.cluster import ClusterConfig
from hourglass_dist.launch.kubernetes import manifest, run_name
from hourglass_dist.launch.targets import Request, node_environment

TEMPLATES = ROOT / "launch/k8s"
CONFIG = ROOT / "configs/quickstart.yaml"
KINDS = ("job", "jobset", "trainjob", "pytorchjob")
VOLUMES = [{"claim": "shared", "path": "/data"}]
LARGE = {
    "nodes": 64,
    "gpus_per_node": 8,
    "network_interface": "eth0",
    "save_seconds": 900,
    "environment": {"NCCL_IB_HCA": "mlx5", "NCCL_ODD": "1e5", "NCCL_ON": "y", "NCCL_NO": "no"},
    "kubernetes": {
        "namespace": "research",
        "image": "registry.example:5000/team/hourglass@sha256:0123",
        "volumes": [*VOLUMES, {"claim": "scratch", "path": "/scratch"}],
        "node_selector": {"gpu": "h100"},
    },
}
CLUSTERS: dict[str, dict[str, Any]] = {
    "two nodes": {"nodes": 2, "kubernetes": {"volumes": VOLUMES}},
    "elastic": {"nodes": 4, "min_nodes": 2, "kubernetes": {"volumes": VOLUMES}},
    "one node": {"kubernetes": {"volumes": VOLUMES}},
    "large": LARGE,
}


def filled(
    cluster: dict[str, Any],
    kind: str = "job",
    folder: Path = TEMPLATES,
    run: str = "/data/runs/Quick_Start.2",
    preflight: bool = False,
) -> str:
    """What kubectl would be given."""
    settings = {**cluster, "kubernetes": {**cluster["kubernetes"], "kind": kind}}
    machines = parse(ClusterConfig, settings, source="test")
    overrides = [f"run.dir={run}", "optim.lr=1e-3"]
    config = load(CONFIG, overrides)
    request = Request(machines, config, [str(CONFIG), *overrides], preflight)
    environment = node_environment(request)
    return manifest(folder, machines, config, request.arguments, environment)


def documents(text: str) -> dict[str, Any]:
    return {d["kind"]: d for d in yaml.safe_load_all(text)}


def pod(documents: dict[str, Any]) -> dict[str, Any]:
    """The pod of whatever kind there is."""

    def look(value: Any) -> Any:
        if isinstance(value, dict):
            if "containers" in value:
                return value
            value = list(value.values())
        found = [look(inner) for inner in value] if isinstance(value, list) else []
        return next((one for one in found if one), None)

    return look(documents)


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_are_right_as_they_stand(kind: str) -> None:
    assert problems((TEMPLATES / f"{kind}.yaml").read_text()) == []


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_manifests_are_right_when_filled(kind: str, name: str) -> None:
    text = filled(CLUSTERS[name], kind)
    assert problems(text) == []
    cluster, found = CLUSTERS[name], documents(text)
    assert {d["metadata"]["name"] for d in found.values()} == {"quick-start-2"}
    (container,) = pod(found)["containers"]
    assert [*container["command"], *container["args"]] == [
        *("bash", "launch/torchrun.sh", "/etc/hourglass/config.yaml"),
        *("run.dir=/data/runs/Quick_Start.2", "optim.lr=1e-3"),
    ]
    assert found["ConfigMap"]["data"] == {"config.yaml": CONFIG.read_text()}
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    nodes, fewest = cluster.get("nodes", 1), cluster.get("min_nodes")
    assert variables["NNODES"] == (f"{fewest}:{nodes}" if fewest else str(nodes))
    assert variables["JOB_ID"] == "quick-start-2"
    assert variables.items() >= cluster.get("environment", {}).items()
    assert pod(found)["terminationGracePeriodSeconds"] > int(variables["SHUTDOWN_TIMEOUT"])
    claims = [v["persistentVolumeClaim"]["claimName"] for v in pod(found)["volumes"][2:]]
    assert claims == [volume["claim"] for volume in cluster["kubernetes"]["volumes"]]
    spaces = {d["metadata"].get("namespace") for d in found.values()}
    assert spaces == {cluster["kubernetes"].get("namespace")}


def test_what_is_read_again_is_what_was_written() -> None:
    """A reader of YAML 1.1 takes y, no and 1e5 for something else than text."""
    lines = filled(LARGE).splitlines()
    for value in ("1e5", "y", "no", "64"):
        assert any(line.strip() in (f'value: "{value}"', f"value: '{value}'") for line in lines)


def test_gpus_are_asked_for_and_the_node_is_chosen() -> None:
    found = pod(documents(filled(LARGE)))
    assert found["containers"][0]["resources"] == {
        "requests": {"cpu": "8", "memory": "64Gi"},
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "8"},
    }
    assert found["nodeSelector"] == {"gpu": "h100"}
    without = pod(documents(filled(CLUSTERS["two nodes"])))
    assert "nvidia.com/gpu" not in without["containers"][0]["resources"]["limits"]


def test_exit_codes_mean_the_same_as_everywhere() -> None:
    policy = documents(filled(LARGE))["Job"]["spec"]["podFailurePolicy"]
    found = {code: action_for(policy, code) for code in (1, 2, 75, 137)}
    assert found == {1: "Count", 2: "FailJob", 75: "Ignore", 137: "Count"}
    assert action_for(policy, 137, ("DisruptionTarget",)) == "Ignore"


def test_a_preflight_is_a_job_beside_the_run() -> None:
    found = documents(filled(CLUSTERS["two nodes"], preflight=True))
    assert problems(filled(CLUSTERS["two nodes"], preflight=True)) == []
    assert found["Job"]["metadata"]["name"] == "quick-start-2-preflight"
    assert found["Job"]["spec"]["backoffLimitPerIndex"] == 0
    variables = {v["name"]: v["value"] for v in pod(found)["containers"][0]["env"]}
    assert variables["HOURGLASS_PROGRAM"] == "preflight"
    assert variables["MASTER_ADDR"] == "quick-start-2-preflight-0.quick-start-2-preflight"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/data/runs/base", "base"),
        ("/data/My Run_v1.2/", "my-run-v1-2"),
        ("/data/7b", "run-7b"),
        ("/data/...", "run"),
        ("/data/größe", "gr-e"),
    ],
)
def test_the_run_folder_gives_the_name(folder: str, name: str) -> None:
    assert run_name(load(CONFIG, [f"run.dir={folder}"])) == name


def test_long_names_stay_different() -> None:
    one, other = (run_name(load(CONFIG, [f"run.dir=/data/{'x' * 70}{i}"])) for i in (1, 2))
    assert one != other
    assert problems(filled(LARGE, "pytorchjob", run=f"/data/{'x' * 70}", preflight=True)) == []


def test_what_a_person_adds_to_a_manifest_stays(tmp_path: Path) -> None:
    text = (TEMPLATES / "job.yaml").read_text()
    for old, new in (
        ("env: []", "env: [{name: WANDB_MODE, value: offline}, {name: NNODES, value: '7'}]"),
        ("volumeMounts: []", "volumeMounts: [{name: nfs, mountPath: /nfs}]"),
        ("volumes: []", "volumes: [{name: nfs, nfs: {server: files, path: /}}]"),
        ("resources: {}", "resources: {limits: {rdma/ib: 1}}"),
    ):
        assert old in text
        text = text.replace(old, new)
    text += "---\napiVersion: v1\nkind: Secret\nmetadata: {name: keys}\n"
    (tmp_path / "job.yaml").write_text(text)
    cluster = {"nodes": 2, "kubernetes": {"namespace": "research"}}
    shown = filled(cluster, folder=tmp_path, run="/nfs/runs/mine")
    assert problems(shown) == []
    container = pod(documents(shown))["containers"][0]
    variables = [(variable["name"], variable["value"]) for variable in container["env"]]
    assert ("WANDB_MODE", "offline") in variables
    assert [value for name, value in variables if name == "NNODES"] == ["2"]
    assert container["resources"]["limits"] == {"rdma/ib": 1, "memory": "64Gi"}
    assert documents(shown)["Secret"]["metadata"] == {"name": "keys", "namespace": "research"}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kind: Job\n", "kind: CronJob\n", "has no document 'kind: Job' to fill"),
        ("env: []", "", "Job has no spec.template.spec.containers.0.env to fill"),
        ("- name: train", "- {}\n      - name: train", "containers.0.ports to fill"),
        ("kind: Job\n", "kind: Job\nkind: Job\n", "repeated key 'kind'"),
        ("spec:\n  completionMode", "spec\n  completionMode", "job.yaml:"),
    ],
)
def test_a_manifest_without_a_place_to_fill_is_one_line(
    old: str, new: str, words: str, tmp_path: Path
) -> None:
    text = (TEMPLATES / "job.yaml").read_text()
    assert old in text
    (tmp_path / "job.yaml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"job\.yaml") as caught:
        filled(LARGE, folder=tmp_path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/job.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("run", ["runs/quickstart", "/database/x", "/dev/shm/x", "/data/../x"])
def test_a_run_folder_that_goes_with_the_pod_is_refused(run: str) -> None:
    with pytest.raises(ValueError, match=r"^run.dir: .* would be gone with the pod: .* \(/data\)$"):
        filled(CLUSTERS["two nodes"], run=run)


def cluster_file(folder: Path, text: str) -> Path:
    (folder / "cluster.yaml").write_text(text)
    return folder / "cluster.yaml"


def test_print_shows_what_kubectl_is_given(tmp_path: Path) -> None:
    text = "nodes: 2\nkubernetes: {volumes: [{claim: shared, path: /data}]}"
    given = ("launch", "k8s", CONFIG, "run.dir=/data/q", "--cluster", cluster_file(tmp_path, text))
    done = hourglass(*given, "--print")
    assert done.returncode == 0, done.stderr
    assert problems(done.stdout) == []
    if not shutil.which("kubectl"):
        done = hourglass(*given)
        assert done.returncode == 2
        assert done.stderr.startswith("error: kubectl: not found on this machine")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{memory: 64 GB}", "kubernetes.memory: expected a quantity of memory such as 64Gi"),
        ("{namespace: My_Space}", "kubernetes.namespace: expected a name of a to z, 0 to 9 and -"),
        ("{volumes: [{claim: x, path: data}]}", "volumes.0.path: expected a path from the root"),
        ("{volumes: [{claim: x}]}", "kubernetes.volumes.0.path: missing"),
    ],
)
def test_a_mistake_in_the_cluster_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = cluster_file(tmp_path, f"kubernetes: {text}")
    done = hourglass("launch", "k8s", CONFIG, "--cluster", path, "--print")
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


GONE = object()
TRAINER = "spec.template.spec.containers.0"
BROKEN: list[tuple[str, str, str, object, str]] = [
    ("job", "Job", "spec.paralellism", 2, "spec.paralellism: V1JobSpec has no such field"),
    ("job", "Job", f"{TRAINER}.name", GONE, f"{TRAINER}.name: missing"),
    ("job", "Job", "spec.completions", "2", "spec.completions: expected int, given '2'"),
    ("job", "Job", f"{TRAINER}.args.0", 7, f"{TRAINER}.args.0: expected str, given 7"),
    ("job", "Job", f"{TRAINER}.env.0.value", 2, "env.0.value: expected str, given 2"),
    ("job", "Job", f"{TRAINER}.env.0.name", "A B", "'A B' is no name"),
    ("job", "Job", f"{TRAINER}.env.1.name", "NNODES", "'NNODES' is no name, or there twice"),
    ("job", "Job", f"{TRAINER}.resources.limits.memory", "64GB", "expected a quantity"),
    ("job", "Job", f"{TRAINER}.resources.limits.nvidia.com/gpu", "0.5", "expected whole nvidia"),
    ("job", "Job", f"{TRAINER}.volumeMounts.0.name", "confg", "no volume confg"),
    ("job", "Job", f"{TRAINER}.volumeMounts.1.mountPath", "/data", "or there twice"),
    ("job", "Job", f"{TRAINER}.command", "bash", "expected a list, given 'bash'"),
    ("job", "Job", "metadata.name", "Base_2", "expected a to z, 0 to 9 and -, given 'Base_2'"),
    ("job", "Job", "metadata.name", "x" * 62, "no pod has the labels"),
    ("job", "Job", "apiVersion", "batch/v2", "batch/v2 Job is not known"),
    ("job", "Job", "spec.parallelism", 1, "all pods must run at once"),
    ("job", "Job", "spec.completionMode", "NonIndexed", "ranks need Indexed"),
    ("job", "Job", "spec.completionMode", "indexed", "expected one of Indexed, NonIndexed"),
    ("job", "Job", "spec.backoffLimitPerIndex", GONE, "maxFailedIndexes: needs backoffLimitPerI"),
    ("job", "Job", "spec.podReplacementPolicy", "TerminatingOrFailed", "only Failed"),
    ("job", "Job", "spec.template.spec.restartPolicy", "OnFailure", "needs restartPolicy Never"),
    ("job", "Job", "spec.podFailurePolicy", GONE, "exit code 2 must be met with FailJob"),
    ("job", "Job", "spec.podFailurePolicy.rules.1", GONE, "exit code 75 must be met with Ignore"),
    ("job", "Job", "spec.podFailurePolicy.rules.2.onPodConditions.0.status", "no", "no status"),
    ("job", "Job", "spec.podFailurePolicy.rules.0.action", "Fail", "no action Fail"),
    ("job", "Job", "spec.podFailurePolicy.rules.0.onExitCodes.containerName", "x", "container x"),
    ("job", "Job", "spec.podFailurePolicy.rules.0.onExitCodes.values", [0, 2], "are not 0"),
    ("job", "Job", "spec.podFailurePolicy.rules.0.onPodConditions", [], "or onPodConditions"),
    ("job", "Job", "spec.template.spec.subdomain", "other", "no Service is called 'other'"),
    ("job", "Job", "spec.template.spec.terminationGracePeriodSeconds", 300, "may take as long"),
    ("job", "Job", "spec.template.spec.securityContext", {}, "runs as root"),
    ("job", "Job", "spec.template.spec.volumes.1.emptyDir.sizeLimit", "big", "expected a quant"),
    ("job", "Job", "spec.template.spec.volumes.0.configMap.name", "other", "no ConfigMap is"),
    ("job", "Service", "spec.selector", {"job-name": "x"}, "no pod has the labels"),
    ("job", "Service", "spec.clusterIP", "10.0.0.1", "by a headless Service"),
    ("job", "Service", "spec.publishNotReadyAddresses", False, "by a headless Service"),
    ("job", "ConfigMap", "data.config.yaml", {"run": 1}, "expected str"),
    ("jobset", "JobSet", "spec.replicatedJobs.0.name", "pod", "MASTER_ADDR: pod 0 is"),
    ("jobset", "JobSet", "spec.network.enableDNSHostnames", "yes", "expected bool"),
    ("jobset", "JobSet", "spec.network", {}, "find each other by host names"),
    ("jobset", "JobSet", "spec.failurePolicy.restarts", 3, "has no such field"),
    ("jobset", "JobSet", "spec.replicatedJobs.0.template", GONE, "template: missing"),
    ("trainjob", "TrainJob", "spec.runtimeRef.name", "other", "no TrainingRuntime other"),
    ("trainjob", "TrainJob", "spec.trainer.numNodes", 3, "the runtime has another number"),
    ("trainjob", "TrainJob", "spec.trainer.nodes", 3, "has no such field"),
    ("trainjob", "TrainJob", "spec.runtimeRef", GONE, "spec.runtimeRef: missing"),
    ("trainjob", "TrainingRuntime", "spec.mlPolicy.numNodes", 3, "another number"),
    (
        *("trainjob", "TrainingRuntime", "spec.template.spec.replicatedJobs.0.template.metadata"),
        *(GONE, "no job is labelled as the trainer's"),
    ),
    ("pytorchjob", "PyTorchJob", "spec.pytorchReplicaSpecs.Workers", {}, "of kind Workers"),
    ("pytorchjob", "PyTorchJob", "spec.runPolicy.cleanPods", "All", "has no such field"),
    ("pytorchjob", "PyTorchJob", "spec.elasticPolicy", {"minReplicas": 99}, "fewer at most than"),
    (
        *("pytorchjob", "PyTorchJob"),
        *("spec.pytorchReplicaSpecs.Worker.template.spec.containers.0.name", "train"),
        "a container called pytorch",
    ),
]


def broken(text: str, kind: str, path: str, value: object) -> str:
    """A manifest with one value changed or taken out."""
    found = documents(text)
    parts = path.replace("nvidia.com/gpu", "nvidia,com/gpu").replace("config.yaml", "config,yaml")
    *parents, last = [part.replace(",", ".") for part in parts.split(".")]
    target = found[kind]
    for part in parents:
        target = target[int(part) if part.isdecimal() else part]
    key = int(last) if last.isdecimal() else last
    if value is GONE:
        del target[key]
    else:
        target[key] = value
    return yaml.safe_dump_all(found.values())


@pytest.mark.parametrize("text", ["", "---\n", "a: [", "kind: Job\n", "- 1\n"])
def test_the_check_sees_what_is_no_manifest(text: str) -> None:
    assert problems(text)


@pytest.mark.parametrize(("file", "kind", "path", "value", "words"), BROKEN)
def test_the_check_sees_what_is_wrong(
    file: str, kind: str, path: str, value: object, words: str
) -> None:
    found = problems(broken(filled(LARGE, file), kind, path, value))
    assert any(words in line for line in found), found
