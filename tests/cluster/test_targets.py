"""``hourglass launch``: the cluster file, and what each target makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT
from ranks import hourglass
from slow_cases import every

from hourglass_dist.config.loader import paths, read_yaml
from hourglass_dist.launch.cluster import ClusterConfig, load_cluster, seconds_of

CONFIG = ROOT / "configs/quickstart.yaml"
LARGE = ROOT / "configs/large_zero3.yaml"


def cluster_file(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_the_example_says_every_setting_and_its_default() -> None:
    example = ROOT / "launch/cluster.yaml"
    assert load_cluster(example) == ClusterConfig()
    written = read_yaml(example)
    for path, _ in paths(ClusterConfig):
        *parents, last = path.split(".")
        section = written
        for parent in parents:
            section = section[parent] if parent != "0" else {"claim": 0, "path": 0}
        assert last in section or "volumes" in parents, path


@pytest.mark.parametrize(
    ("text", "words"),
    every(
        4,
        [
            ("nodse: 2", "nodse: unknown key (given 2); did you mean nodes?"),
            ("slurm: {partitoin: x}", "did you mean slurm.partition?"),
            ("nodes: 2\nmin_nodes: 3", "min_nodes: expected at most nodes (2), given 3"),
            ("port: 80", "port: expected at least 1024, given 80"),
            ("environment: {A B: c}", "environment: expected names of variables, given 'A B'"),
            ("slurm: {time: 1h}", "slurm.time: expected such as 23:30:00 or 2-00:00:00, given 1h"),
            ("slurm: {time: '0:07:00'}", "slurm.time: expected more than 420 seconds"),
            ("kubernetes: {kind: pod}", "kubernetes.kind: expected"),
        ],
    ),
)
def test_a_mistake_in_the_cluster_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    path = cluster_file(tmp_path, text)
    done = hourglass("launch", "torchrun", CONFIG, "--cluster", path, "--print")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_numbers_of_nodes_that_cannot_share_the_batch_are_refused(tmp_path: Path) -> None:
    path = cluster_file(tmp_path, "nodes: 8\nmin_nodes: 6\ngpus_per_node: 8")
    done = hourglass("launch", "slurm", LARGE, "--cluster", path, "--print")
    assert done.returncode == 2
    assert "6 nodes of 8 ranks: data.batch_size: 512 rows" in done.stderr
    assert "16, 32, 64" in done.stderr


def test_a_mistake_in_the_settings_is_found_before_anything_starts() -> None:
    done = hourglass("launch", "slurm", CONFIG, "model.dmi=3")
    assert done.returncode == 2
    assert "did you mean model.dim?" in done.stderr


def test_a_program_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = hourglass("launch", "slurm", CONFIG, "--cluster", ROOT / "launch/cluster.yaml")
    assert done.returncode == 2
    assert "sbatch: not found on this machine; --print" in done.stderr


def test_print_shows_what_slurm_is_told(tmp_path: Path) -> None:
    text = "nodes: 2\nmin_nodes: 1\ngpus_per_node: 8\nslurm: {partition: gpu, time: '23:30:00'}"
    path = cluster_file(tmp_path, text)
    done = hourglass("launch", "slurm", LARGE, "run.dir=runs/x", "--cluster", path, "--print")
    assert done.returncode == 0, done.stderr
    assert "NNODES=1:2" in done.stdout
    assert "sbatch --nodes=1-2 --partition=gpu --time=23:30:00 --gpus-per-node=8" in done.stdout
    assert "--job-name=x --output=runs/x/slurm-%j.out --signal=USR1@360" in done.stdout
    assert "--no-kill" in done.stdout
    assert "MASTER_PORT" not in done.stdout
    assert done.stdout.endswith(f"launch/slurm.sbatch {LARGE} run.dir=runs/x\n")


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("7:30", 450), ("1:00:00", 3600), ("2-1", 176400), ("1-0:30:5", 88205)],
)
def test_a_time_limit_is_read_as_slurm_does(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds
