"""Shards behind a web server and in S3: the same batches; every fault ends well or in a line."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import servers
import torch
from datasets import assert_same, local, make, refusal, stream_of, words
from paths import HELPERS
from ranks import environment, torchrun
from servers import Fault, WebServer, s3_server, status, web_server

from hourglass_dist.config.data import CacheConfig
from hourglass_dist.data import remote
from hourglass_dist.data.batch import Batch
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.manifest import Manifest
from hourglass_dist.data.mixture import Dataset, open_dataset, simple_plan
from hourglass_dist.data.stream import Stream
from hourglass_dist.data.tokenizer import load_tokenizer

STEPS = 40


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make(tmp_path_factory.mktemp("remote"), words(80))


@pytest.fixture
def server(manifest: Manifest) -> Iterator[WebServer]:
    with web_server(manifest.folder) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> CacheConfig:
    return CacheConfig(dir=str(tmp_path / "cache"), timeout_s=2.0, deadline_s=120.0)


def batches(dataset: Dataset, steps: int = STEPS, start: int = 0) -> list[Batch]:
    stream = Stream([dataset], simple_plan(dataset, 8, 12, 5))
    running = stream.batches(start)
    found = list(islice(running, steps))
    running.close()
    return found


def cached(cache: CacheConfig) -> set[str]:
    return {path.name for path in (Path(cache.dir) / "shards").iterdir()}


# --- the same as local files ---------------------------------------------------------------------


def test_the_same_batches_as_from_local_files(
    manifest: Manifest, server: WebServer, cache: CacheConfig
) -> None:
    expected = batches(local(manifest))
    assert_same(batches(open_dataset(server.url, cache=cache)), expected)
    once = {shard.path: 1 for shard in manifest.split("train")}
    assert server.sent_whole == once
    assert cached(cache) == {shard.sha256 for shard in manifest.split("train")}
    assert_same(batches(open_dataset(server.url, cache=cache)), expected)  # now from the cache
    assert server.sent_whole == once
    rows = held_out_rows([open_dataset(server.url, cache=cache)], 8, 5)
    assert_same(list(rows), list(held_out_rows([local(manifest)], 8, 5)))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_begins_before_its_shards_are_there(
    manifest: Manifest, server: WebServer, cache: CacheConfig, damaged: bool
) -> None:
    """With single blocks; one that is not what the manifest says waits for its shard."""
    server.whole_files.clear()
    if damaged:
        server.faults = {s.path: [servers.other_content] for s in manifest.split("train")}
    plan = simple_plan(local(manifest), 8, 12, 5)
    running = Stream([open_dataset(server.url, cache=cache)], plan).batches()
    near = Stream([local(manifest)], plan).batches()
    if damaged:
        threading.Timer(1.0, server.whole_files.set).start()
    first = next(running)
    assert_same([first], [next(near)])
    assert damaged or not server.sent_whole
    server.whole_files.set()
    assert_same(list(islice(running, STEPS)), list(islice(near, STEPS)))
    assert damaged or server.sent_whole == {s.path: 1 for s in manifest.split("train")}


@pytest.mark.slow
def test_a_training_run_from_s3_has_the_losses_of_local_files(
    manifest: Manifest, tiny_config: Path, tmp_path: Path
) -> None:
    """Two ranks, an empty cache, and a server that checks signatures."""
    with s3_server(tmp_path / "s3") as found:
        system = fsspec.filesystem("s3", skip_instance_cache=True)
        system.put(f"{manifest.folder}/", "corpora/words", recursive=True)
        runs = {"local": str(manifest.folder), "s3": "s3://corpora/words"}
        for name, where in runs.items():
            command = [
                *("-m", "hourglass_dist.train", str(tiny_config), f"data.dataset={where}"),
                *("data.seq_len=16", "train.steps=10", f"run.dir={tmp_path / name}"),
                f"data.cache.dir={tmp_path / 'cache'}",
            ]
            done = torchrun(2, *command)
            assert done.returncode == 0, done.stderr[-3000:]
        losses = [
            [r["train/loss"] for r in map(json.loads, lines) if "train/loss" in r]
            for lines in ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in runs)
        ]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 10
        message = refusal(lambda: open_dataset("s3://corpora/none", cache=quick(tmp_path)))
        assert message == "s3://corpora/none/index.json: not found"
        os.environ["AWS_SECRET_ACCESS_KEY"] = "wrong"
        message = refusal(lambda: open_dataset("s3://corpora/words", cache=quick(tmp_path)))
        assert message.startswith("s3://corpora/words/index.json: forbidden")
        os.environ["AWS_SECRET_ACCESS_KEY"] = found["AWS_SECRET_ACCESS_KEY"]


def quick(folder: Path) -> CacheConfig:
    return CacheConfig(dir=str(folder / "quick"), timeout_s=5.0, deadline_s=5.0)


# --- faults that pass ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        servers.cut,
        servers.stall,
        servers.error_page,
        servers.short,
        servers.other_content,
        servers.ignore_range,
        status(429),
        status(503),
        status(500),
    ],
)
def test_faults_that_pass_are_outlived(
    manifest: Manifest, server: WebServer, cache: CacheConfig, fault: Fault
) -> None:
    server.faults = {shard.path: [fault] for shard in manifest.split("train")[:3]}
    assert_same(batches(open_dataset(server.url, cache=cache)), batches(local(manifest)))
    assert not any(server.faults.values()), "every fault was met"


def test_a_file_of_many_parts(
    manifest: Manifest, server: WebServer, cache: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PART_BYTES", 1000)
    for shard in manifest.split("train"):
        server.faults[shard.path] = [servers.cut, servers.ignore_range, status(503)]
    assert_same(batches(open_dataset(server.url, cache=cache)), batches(local(manifest)))


# --- faults that stay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected", "at_once"),
    [
        (status(403), ": status 403 (forbidden)", True),
        (status(404), ": not found", True),
        (status(503), "tries in", False),
        (servers.error_page, " bytes, got 26", False),
        (servers.other_content, ": altered shard: expected sha256", True),
    ],
)
def test_faults_that_stay_are_one_line(
    manifest: Manifest,
    server: WebServer,
    cache: CacheConfig,
    fault: Fault,
    expected: str,
    at_once: bool,
) -> None:
    lost = manifest.split("train")[1].path
    server.faults = {lost: [fault] * 1000}
    quick = cache.model_copy(update={"deadline_s": 6.0})
    message = refusal(lambda: batches(open_dataset(server.url, cache=quick)))
    assert message.startswith(f"{server.url}/{lost}")
    assert expected in message
    assert ("tries in" in message) != at_once, message
    wait_for_fetchers()
    assert not [name for name in cached(cache) if name.endswith(".part")], "nothing half-written"


def wait_for_fetchers() -> None:
    deadline = time.monotonic() + 60
    while any(thread.name == "hourglass-fetch" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_lost_shard_is_left_out_by_name(
    manifest: Manifest, server: WebServer, cache: CacheConfig
) -> None:
    lost = manifest.split("train")[1].path
    server.faults = {lost: [status(404)] * 1000}
    name = f"data/{lost}"
    far, near = open_dataset(server.url, cache=cache), local(manifest)
    plan = simple_plan(near, 8, 12, 5)
    found, expected = (
        list(islice(Stream([dataset], plan, skip=[name]).batches(), STEPS))
        for dataset in (far, near)
    )
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("file", "fault", "expected"),
    [
        ("index.json", servers.error_page, "/index.json: damaged: not valid JSON"),
        ("index.json", status(404), "/index.json: not found"),
        ("index.json", status(403), "/index.json: status 403 (forbidden)"),
        ("tokenizer.json", servers.error_page, "tokenizer"),
    ],
)
def test_an_index_that_is_none(
    server: WebServer, cache: CacheConfig, file: str, fault: Fault, expected: str
) -> None:
    server.faults = {file: [fault] * 1000}

    def load() -> None:
        remote_dataset = open_dataset(server.url, cache=cache)
        load_tokenizer(remote_dataset.manifest.folder)

    assert expected in refusal(load)


def test_addresses_that_are_none(cache: CacheConfig) -> None:
    assert "expected a folder, s3://, gs://" in refusal(lambda: open_dataset("ftp://a/b"))
    message = refusal(lambda: open_dataset("http://127.0.0.1:9/x", cache=cache))
    assert message.startswith("http://127.0.0.1:9/x/index.json: gave up after ")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """As on a machine that has none of the extras."""
    program = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from hourglass_dist.data.mixture import open_dataset\n"
        "open_dataset('gs://bucket/words')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stderr.splitlines()[-1] == (
        "ValueError: gs://bucket/words: needs the package gcsfs: pip install 'hourglass_dist[gcs]'"
    )


# --- the cache -----------------------------------------------------------------------------------


def test_a_damaged_file_of_the_cache_is_fetched_again(
    manifest: Manifest, server: WebServer, cache: CacheConfig
) -> None:
    expected = batches(local(manifest))
    batches(open_dataset(server.url, cache=cache))
    files = sorted((Path(cache.dir) / "shards").iterdir())
    files[0].write_bytes(bytes(files[0].stat().st_size))
    os.truncate(files[1], 100)
    files[2].unlink()
    assert_same(batches(open_dataset(server.url, cache=cache)), expected)


def test_two_jobs_share_a_cache_and_fetch_each_shard_once(
    manifest: Manifest, server: WebServer, cache: CacheConfig
) -> None:
    command = [sys.executable, str(HELPERS / "remote_worker.py"), server.url, cache.dir, str(STEPS)]
    jobs = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        for _ in range(3)
    ]
    outputs = {job.communicate(timeout=120)[0] for job in jobs}
    assert len(outputs) == 1
    assert [job.returncode for job in jobs] == [0, 0, 0]
    for shard in manifest.split("train"):
        assert server.sent_whole[shard.path] == 1


def test_a_killed_downloader_leaves_no_harm(
    manifest: Manifest, server: WebServer, cache: CacheConfig
) -> None:
    """Another process waits for the lock and takes over."""
    stuck = threading.Event()

    def hang(handler: servers.Handler, data: bytes) -> None:
        stuck.set()
        time.sleep(1.5)
        handler.send(data)

    server.faults = {shard.path: [hang] for shard in manifest.split("train")}
    command = [sys.executable, str(HELPERS / "remote_worker.py"), server.url, cache.dir, str(STEPS)]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    assert stuck.wait(60)
    job.kill()
    job.communicate()
    assert_same(batches(open_dataset(server.url, cache=cache)), batches(local(manifest)))
    wait_for_fetchers()
    assert not [name for name in cached(cache) if name.endswith(".part")]


def test_a_small_cache_drops_what_is_not_needed(
    manifest: Manifest, server: WebServer, cache: CacheConfig
) -> None:
    """Rows of one lane: two shards at a time are enough for all of them, twice over."""
    small = cache.model_copy(update={"max_gb": 4 * 10240 / 1e9})
    dataset, near = open_dataset(server.url, cache=small), local(manifest)
    assert len(manifest.split("train")) > 8
    plan = simple_plan(near, 8, 1, 5)
    steps = 2 * plan.sources[0].rows
    seen = 0
    with (
        contextlib.closing(Stream([near], plan).batches()) as expected,
        contextlib.closing(Stream([dataset], plan).batches()) as running,
    ):
        for batch in islice(running, steps):
            assert torch.equal(batch.targets_BL, next(expected).targets_BL)
            with (Path(cache.dir) / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # nothing is added, renamed or dropped now
                files = list((Path(cache.dir) / "shards").iterdir())
                seen = max(
                    seen, sum(path.stat().st_size for path in files if ".lock" not in path.name)
                )
    assert 0 < seen <= 4 * 10240


def test_a_cache_that_cannot_hold_what_is_read_side_by_side(
    server: WebServer, cache: CacheConfig
) -> None:
    small = cache.model_copy(update={"max_gb": 4 * 10240 / 1e9})
    message = refusal(lambda: batches(open_dataset(server.url, cache=small)))
    assert message.startswith("data.cache.max_gb: 1 ranks of this machine read ")


@pytest.mark.parametrize(
    ("options", "expected"),
    [("size=40k", "No space left on device"), ("ro", "Read-only file system")],
)
def test_a_full_disk_and_one_that_cannot_be_written(
    manifest: Manifest, server: WebServer, tmp_path: Path, options: str, expected: str
) -> None:
    """On a small tmpfs of a process of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    worker = f"{sys.executable} {HELPERS / 'remote_worker.py'} {server.url} {disk}/cache {STEPS}"
    script = f"mount -t tmpfs -o {options} tmpfs {disk} && exec {worker}"
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert expected in line
    assert str(disk) in line


def test_local_streams_ask_nobody(manifest: Manifest) -> None:
    before = set(threading.enumerate())
    with contextlib.closing(stream_of(manifest, 8, 12, 5).batches()) as running:
        next(running)
        assert len(set(threading.enumerate()) - before) == 1
