"""What goes wrong while a corpus is prepared: one line, nothing lost, nothing half-written."""

from __future__ import annotations

import base64
import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import zstandard
from corpora import FULL, all_texts, killing, run, settings, shard_hashes, texts, write_jsonl
from datasets import refusal
from ranks import environment

from data_tools.pipeline import executors
from data_tools.pipeline.prepare import prepare
from data_tools.pipeline.steps import STEPS
from hourglass_dist.config.loader import to_yaml

COMMAND = [str(Path(sys.executable).with_name("hourglass")), "data", "prepare"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = texts(260)
    folder = tmp_path_factory.mktemp("corpus")
    return write_jsonl(folder / "a.jsonl", [*documents, *documents[:20]])


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(folder, corpus, **FULL)
    return shard_hashes(folder / "out")


# --- damaged inputs ------------------------------------------------------------------------------


def test_what_is_no_text_is_put_aside_and_counted(tmp_path: Path) -> None:
    bad = [b'{"text": "\xff"}', b"{", b'{"text": null}', b'{"text": "a\\u0000"}', b'{"text": ""}']
    path = write_jsonl(tmp_path / "a.jsonl", texts(95))
    path.write_bytes(path.read_bytes() + b"\n".join(bad))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "\xe2\x80\xa8 one line"}\n'))
    inputs = [path, *(tmp_path / n for n in ("empty.jsonl", "empty.txt", "b.jsonl.gz"))]
    message = refusal(lambda: run(tmp_path, *inputs))
    assert message.startswith("4 of 102 records are no text (3.92%, max_quarantined is 0.10%)")
    assert f"the first: {path}" in message
    assert "invalid UTF-8" in message
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"].partition(":")[0] for line in lines] == [
        "invalid UTF-8", "bad JSON", "field 'text'", "NUL at character 1",
    ]  # fmt: skip
    data = path.read_bytes()
    for line, record in zip(lines, bad[:4], strict=True):
        at = json.loads(line)["position"]
        assert data[at : at + len(record)] == record
    shutil.rmtree(tmp_path / "out")
    report = run(tmp_path, *inputs, max_quarantined=0.04, executor={"workers": 2})
    assert report.documents == {"read": 102, "kept": 96, "dropped": 2, "quarantined": 4}
    assert report.dropped == {"empty": 2}
    assert "\u2028 one line" in all_texts(tmp_path / "out")


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.zst"])
def test_truncated_compression_fails_the_job(tmp_path: Path, name: str) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", texts(30))
    whole = gzip.compress if name.endswith("gz") else zstandard.compress
    data = whole(good.read_bytes())
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    wanted = settings(tmp_path, good, tmp_path / name, executor={"workers": 2})
    assert refusal(lambda: prepare(wanted)).startswith(f"{tmp_path / name}: truncated")
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert not list((tmp_path / "out").rglob("*unfinished*"))
    (tmp_path / name).write_bytes(data)
    assert "(input " in refusal(lambda: prepare(wanted))  # not silently with another input


def test_a_corpus_of_which_nothing_is_left(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["short", "", "short"])
    message = refusal(lambda: run(tmp_path, path, filters={"min_bytes": 100}))
    assert message == (
        "source 'corpus': no document is left for training: 3 records, dropped: "
        "1 empty, 2 too short"
    )
    assert not list((tmp_path / "out").rglob("index.json"))


@pytest.mark.slow
def test_a_long_document_without_white_space(tmp_path: Path) -> None:
    long = base64.b64encode(random.Random(0).randbytes(37_500_000)).decode()
    path = write_jsonl(tmp_path / "a.jsonl", [long, *texts(60)])
    report = run(
        tmp_path,
        path,
        task_bytes=2**26,
        shards={"block_tokens": 2**19},
        tokenizer={"kind": "bpe", "vocab_size": 330, "sample_bytes": 10_000},
        pii={"emails": True, "ips": True},
    )
    assert report.documents["kept"] == 61
    assert report.bytes["kept"] == len(long) + sum(len(text) for text in texts(60))


# --- killed workers ------------------------------------------------------------------------------


def test_a_worker_killed_in_every_stage_changes_nothing(
    tmp_path: Path, corpus: Path, expected: dict[str, str]
) -> None:
    with killing(tmp_path / "out" / "work", lambda stage, number: number == 0) as killed:
        report = run(tmp_path, corpus, **FULL | {"executor": {"workers": 2}})
    assert {"read", "bands", "tokenizer", "tokens", "shards"} <= set(killed)
    assert shard_hashes(tmp_path / "out") == expected
    assert report.documents["read"] == 280


@pytest.mark.slow
def test_a_task_that_kills_its_worker_every_time_is_named(
    tmp_path: Path, corpus: Path, expected: dict[str, str]
) -> None:
    wanted = settings(tmp_path, corpus, **FULL)
    with killing(tmp_path / "out" / "work", lambda stage, number: stage == "read") as killed:
        message = refusal(lambda: prepare(wanted))
    assert message.startswith(f"{corpus}: its worker was killed 3 times (out of memory?)")
    assert len(killed) >= 3
    assert prepare(wanted) is not None
    assert shard_hashes(tmp_path / "out") == expected


def test_a_killed_pipeline_goes_on_and_leaves_no_worker(
    tmp_path: Path, corpus: Path, expected: dict[str, str]
) -> None:
    config = tmp_path / "pipeline.yaml"
    wanted = settings(tmp_path, corpus, **FULL)
    config.write_text(to_yaml(wanted))
    draw = random.Random(0)
    for stage in ("read", "bands", "shards"):
        process = subprocess.Popen([*COMMAND, str(config)], env=environment())
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / "work" / stage).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
    done = subprocess.run(
        [*COMMAND, str(config)], env=environment(), capture_output=True, text=True, check=True
    )
    assert "documents 280 = kept" in done.stdout
    assert done.stderr == ""
    assert shard_hashes(tmp_path / "out") == expected


# --- the folder ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_second_of_two_runs_into_one_folder_is_refused(tmp_path: Path, corpus: Path) -> None:
    config = tmp_path / "pipeline.yaml"
    config.write_text(to_yaml(settings(tmp_path, corpus)))
    first = subprocess.Popen([*COMMAND, str(config)], env=environment(), stdout=subprocess.PIPE)
    try:
        while not (tmp_path / "out" / "work" / "read").exists():
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run(
            [*COMMAND, str(config)], env=environment(), capture_output=True, text=True, check=False
        )
        assert second.returncode == 2
        assert second.stderr == (
            f"error: {tmp_path / 'out'}: another process is preparing this folder\n"
        )
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate()
    assert first.returncode == 0


@pytest.mark.slow
def test_other_settings_and_inputs_are_refused_and_named(tmp_path: Path, corpus: Path) -> None:
    data = tmp_path / "data"
    write_jsonl(data / "a.jsonl", texts(30))
    write_jsonl(data / "b.jsonl", texts(30, seed=1))
    prepare(settings(tmp_path, data), only="read")

    def message(**changes: object) -> str:
        return refusal(lambda: prepare(settings(tmp_path, data, **changes)))

    assert 'held_out: "hash:0.1" -> "hash:0.2"' in message(held_out="hash:0.2")
    assert "filters.min_bytes: 0 -> 7" in message(filters={"min_bytes": 7})
    assert "task_bytes: 20000 -> 30000" in message(task_bytes=30_000)
    write_jsonl(data / "c.jsonl", texts(1, seed=2))
    assert f"new input {data / 'c.jsonl'}" in message()
    (data / "c.jsonl").unlink()
    (data / "b.jsonl").rename(tmp_path / "b.jsonl")
    assert f"input {data / 'b.jsonl'} is gone" in message()
    (tmp_path / "b.jsonl").rename(data / "b.jsonl")
    write_jsonl(data / "b.jsonl", texts(31, seed=1))
    assert f"input {data / 'b.jsonl'} changed (" in message()
    shutil.rmtree(tmp_path / "out")
    prepare(settings(tmp_path, data), only="read")
    said: list[str] = []
    report = prepare(settings(tmp_path, data, executor={"workers": 3}), say=said.append)
    assert report is not None
    assert "of them done before" in said[0]
    write_jsonl(data / "b.jsonl", texts(32, seed=1))
    assert f"input {data / 'b.jsonl'} changed (" in message()  # of a finished folder, too


def test_an_input_that_changes_while_it_is_read(tmp_path: Path) -> None:
    """Found by the task that reads it, not only by the next run."""
    path = write_jsonl(tmp_path / "a.jsonl", texts(30))
    wanted = settings(tmp_path, path)

    class Late(executors._Local):
        def run(self, *arguments: object) -> None:
            path.write_text(path.read_text() + '{"text": "late"}\n')
            super().run(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "_Local", Late)
        assert "changed since this was begun" in refusal(lambda: prepare(wanted))


def test_a_full_disk(tmp_path: Path, expected: dict[str, str], corpus: Path) -> None:
    """One line; with room the same command goes on."""
    small = tmp_path / "small"
    small.mkdir()
    config = tmp_path / "pipeline.yaml"
    plain = settings(tmp_path, corpus, **FULL)
    config.write_text(to_yaml(plain.model_copy(update={"out": str(small / "out")})))
    script = (
        'mount -t tmpfs -o size=100k tmpfs "$1" && shift && '
        '{ "$@"; code=$?; mount -o remount,size=100m "$0" && "$@" >&2 || exit 99; '
        'cp -r "$0" "$0.copy"; exit $code; }'
    )
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script, str(small), str(small),
         *COMMAND, str(config)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert "No space left on device" in first
    assert "documents 280 = kept" in "\n".join(rest)
    assert shard_hashes(tmp_path / "small.copy" / "out") == expected


def test_every_stage_has_its_kill() -> None:
    assert [stage.name for stage in STEPS] == [
        "read", "exact", "bands", "clusters", "tokenizer", "tokens", "shards",
    ]  # fmt: skip
