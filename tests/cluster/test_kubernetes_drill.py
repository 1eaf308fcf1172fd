"""The Indexed Job's own command as two pods, and what a cluster does to them: pods.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hosts
import pytest
import torch
from paths import ROOT
from pods import IndexedJob
from ranks import hourglass
from safetensors.torch import load as load_weights

from hourglass_dist.config.loader import parse
from hourglass_dist.config.schema import load
from hourglass_dist.launch.cluster import ClusterConfig
from hourglass_dist.launch.kubernetes import manifest
from hourglass_dist.launch.targets import Request, node_environment

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(hosts.missing()), reason=f"two hosts: {hosts.missing()}"),
]
STEPS = 24


@pytest.fixture
def two() -> Iterator[hosts.Hosts]:
    with hosts.Hosts(2, name="ku", subnet="10.93.0") as found:
        yield found


def job(
    two: hosts.Hosts, folder: Path, config: Path, *overrides: str, **cluster: object
) -> IndexedJob:
    """A run of two pods with a rank each, started."""
    settings = {
        "nodes": 2,
        "environment": {"NPROC_PER_NODE": "1"},
        "join_minutes": 3,
        "save_seconds": 60,
        "kubernetes": {"volumes": [{"claim": "shared", "path": str(folder)}]},
        **cluster,
    }
    machines = parse(ClusterConfig, settings, source="test")
    arguments = [f"run.dir={folder}/run", f"train.steps={STEPS}", "eval.every=1000", *overrides]
    request = Request(machines, load(config, arguments), [str(config), *arguments])
    text = manifest(
        *(ROOT / "launch/k8s", machines, request.config, request.arguments),
        node_environment(request),
    )
    return IndexedJob(two, text, folder)


def weights(run: Path) -> bytes:
    done = hourglass("export", run, run.parent / "export")
    assert done.returncode == 0, done.stderr
    return (run.parent / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, dataset: Path
) -> bytes:
    """The weights of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with hosts.Hosts(2, name="ku", subnet="10.93.0") as two:
        running = job(two, folder, tiny_config, f"data.dataset={dataset}")
        try:
            assert running.wait(400) == "Complete", running.story()
        finally:
            running.close()
    return weights(folder / "run")


@pytest.mark.parametrize("index", [1, 0])
def test_a_killed_pod_is_made_again_and_nothing_is_lost(
    index: int,
    two: hosts.Hosts,
    tmp_path: Path,
    tiny_config: Path,
    dataset: Path,
    undisturbed: bytes,
) -> None:
    running = job(two, tmp_path, tiny_config, f"data.dataset={dataset}")
    try:
        running.wait_for_step(tmp_path / "run", 8, 240)
        running.kill(index)
        assert running.wait(450) == "Complete", running.story()
    finally:
        running.close()
    assert weights(tmp_path / "run") == undisturbed


def test_a_node_that_does_not_come_back_is_done_without(
    two: hosts.Hosts, tmp_path: Path, tiny_config: Path, dataset: Path, undisturbed: bytes
) -> None:
    running = job(two, tmp_path, tiny_config, f"data.dataset={dataset}", min_nodes=1)
    try:
        running.wait_for_step(tmp_path / "run", 8, 240)
        running.kill(1, "DisruptionTarget", for_good=True)
        assert running.wait(450) == "Complete", running.story()
    finally:
        running.close()
    found, expected = load_weights(weights(tmp_path / "run")), load_weights(undisturbed)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-5), name


def test_an_evicted_pod_saves_and_is_made_again(
    two: hosts.Hosts, tmp_path: Path, tiny_config: Path, dataset: Path, undisturbed: bytes
) -> None:
    running = job(two, tmp_path, tiny_config, f"data.dataset={dataset}", restarts=0)
    try:
        running.wait_for_step(tmp_path / "run", 8, 240)
        running.evict(1, "DisruptionTarget")
        assert running.wait(450) == "Complete", running.story()
    finally:
        running.close()
    ends = [line for line in running.events if "exit code" in line]
    assert len(ends) == 2, running.story()
    assert all("exit code 75: Ignore" in line for line in ends), running.story()
    assert weights(tmp_path / "run") == undisturbed


def test_a_mistake_ends_the_job_at_once(
    two: hosts.Hosts, tmp_path: Path, tiny_config: Path
) -> None:
    running = job(two, tmp_path, tiny_config, f"data.dataset={tmp_path}/nowhere")
    try:
        assert running.wait(240) == "Failed: PodFailurePolicy", running.story()
    finally:
        running.close()
    assert [pod.attempts for pod in running.pods] == [1, 1]
    assert f"{tmp_path}/nowhere" in running.log(0).read_text() + running.log(1).read_text()
