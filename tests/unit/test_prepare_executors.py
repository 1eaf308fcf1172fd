"""Ray and Slurm make the shards that local processes make, also when their workers are killed."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpora import killing, run, settings, shard_hashes, texts, write_jsonl
from datasets import refusal

from data_tools.pipeline.prepare import prepare

SMALL = {"tokenizer": {"kind": "bpe", "vocab_size": 330, "sample_bytes": 10_000}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", texts(150))


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards that local processes make."""
    folder = tmp_path_factory.mktemp("local")
    run(folder, corpus, **SMALL)
    return shard_hashes(folder / "out")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two nodes of one core, on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    made = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    made.add_node(**node)
    yield made.address
    made.shutdown()


@pytest.mark.slow
def test_ray_with_a_worker_killed_in_every_stage(
    tmp_path: Path, corpus: Path, expected: dict[str, str], cluster: str
) -> None:
    executor = {"kind": "ray", "ray_address": cluster}
    with killing(tmp_path / "out" / "work", lambda stage, number: number == 0) as killed:
        run(tmp_path, corpus, **SMALL, executor=executor)
    assert {"read", "tokenizer", "tokens", "shards"} <= set(killed)
    assert shard_hashes(tmp_path / "out") == expected


def test_a_task_that_fails_on_ray_fails_the_job(tmp_path: Path, cluster: str) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    wanted = settings(
        tmp_path, tmp_path / "a.jsonl.gz", executor={"kind": "ray", "ray_address": cluster}
    )
    assert "a.jsonl.gz: damaged compressed data" in refusal(lambda: prepare(wanted))


SBATCH = """#!{python}
# What of sbatch, squeue and scancel the executor uses, for a machine without Slurm: the elements of
# an array job are processes of their own, and a job is over when none of them is left.
import os, pathlib, re, signal, subprocess, sys
here = pathlib.Path(sys.argv[0])
jobs = here.parent / "jobs"
if here.name == "sbatch":
    if sys.argv[1] == "--version":
        sys.exit()
    jobs.mkdir(exist_ok=True)
    options = " ".join(sys.argv[1:])
    last = int(re.search(r"--array=0-([0-9]+)", options)[1])
    log = re.search("--output=([^ ]+)", options)[1]
    script = sys.stdin.read()
    number = len(list(jobs.iterdir())) + 1
    path = here.parent / f"script-{{number}}"
    path.write_text(script)
    pids = []
    for i in range(last + 1):
        environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(i)}}
        with open(log.replace("%a", str(i)), "w") as out:
            pids.append(subprocess.Popen(["sh", path], env=environment, stdout=out, stderr=out,
                                         start_new_session=True).pid)
    (jobs / str(number)).write_text(" ".join(map(str, pids)))
    print(number)
else:
    number = re.findall("[0-9]+", " ".join(sys.argv[1:]))[0]
    for pid in (jobs / number).read_text().split():
        try:
            state = pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            continue
        if state != "Z":
            os.kill(int(pid), signal.SIGKILL) if here.name == "scancel" else print("RUNNING")
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of Slurm on the PATH; the pipelines of a real one are in docs/LOG.md."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (folder / name).write_text(SBATCH.format(python=sys.executable))
        (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.usefixtures("slurm")
def test_slurm_with_a_worker_killed_in_every_stage(
    tmp_path: Path, corpus: Path, expected: dict[str, str]
) -> None:
    executor = {"kind": "slurm", "workers": 2}
    with killing(tmp_path / "out" / "work", lambda stage, number: number == 0) as killed:
        run(tmp_path, corpus, **SMALL, executor=executor)
    assert {"read", "tokenizer", "tokens", "shards"} <= set(killed)
    assert shard_hashes(tmp_path / "out") == expected


def test_executors_that_are_not_there(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    wanted = settings(tmp_path, corpus, executor={"kind": "slurm"})
    assert "sbatch does not run on this machine" in refusal(lambda: prepare(wanted))
    wanted = settings(tmp_path, corpus, executor={"kind": "ray", "ray_address": "127.0.0.1:1"})
    assert "executor.ray_address: 127.0.0.1:1: no Ray there" in refusal(lambda: prepare(wanted))
