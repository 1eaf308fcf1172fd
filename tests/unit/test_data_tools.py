"""The data tools: what is held out, shuffled and written, and what their commands say."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xxhash
from datasets import make, refusal, words
from paths import ROOT
from ranks import environment

from data_tools.datasets.inspect import documents
from data_tools.datasets.verify import verify
from data_tools.shard import count, find_finished, make_dataset, plan_dataset
from data_tools.sources.held_out_rule import parse_rule
from data_tools.train_tokenizer import train_tokenizer
from hourglass_dist.cli import main
from hourglass_dist.data.manifest import Manifest
from hourglass_dist.data.tokenizer import ByteTokenizer, load_tokenizer

SHAKESPEARE = ROOT / "data_tools" / "corpora" / "tinyshakespeare.txt.gz"
COMMAND = [Path(sys.executable).with_name("hourglass"), "data"]


def hourglass_data(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``hourglass data ...`` in a folder, on a terminal of 80 columns."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, env=environment() | {"COLUMNS": "80"}, check=False,
    )  # fmt: skip


# --- what is held out ----------------------------------------------------------------------------


def parts(rule: str, text: str, source: Path = Path("a.txt")) -> list[tuple[str, str]]:
    found = parse_rule(rule).parts(text.encode(), source)
    return [(split, part.decode()) for split, part in found]


def test_the_last_tenth_is_nano_gpts_split() -> None:
    text = gzip.decompress(SHAKESPEARE.read_bytes()).decode()
    (_, train), (_, held_out) = parts("last:0.1", text)
    assert train == text[: int(len(text) * 0.9)]
    assert train + held_out == text
    assert len(held_out) == 111_540


def test_characters_are_never_cut() -> None:
    assert parts("last:0.5", "\u4f60\u597d\u4f60") == [
        ("train", "\u4f60"),
        ("heldout", "\u597d\u4f60"),
    ]


def test_held_out_by_hash_is_by_content() -> None:
    texts = words(4000)
    held_out = [text for text in texts if parts("hash:0.1", text)[0][0] == "heldout"]
    assert 320 < len(held_out) < 480
    assert set(held_out) <= {t for t in texts if parts("hash:0.2", t)[0][0] == "heldout"}


def test_held_out_by_input_is_by_file_however_it_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    monkeypatch.chdir(tmp_path)
    rule = f"input:{tmp_path}/sub/../b.txt"
    job = plan_dataset([Path(".")], ByteTokenizer(), held_out=rule, block_tokens=16)
    manifest = make_dataset(job, tmp_path / "dataset")
    texts = {s: list(documents(manifest, s, ByteTokenizer())) for s in ("train", "heldout")}
    assert texts["heldout"] == ["text of b"]
    assert sorted(texts["train"]) == ["text of a", "text of sub/c"]


@pytest.mark.parametrize(
    "rule", ["", "hash", "hash:0", "hash:1", "hash:x", "last:-1", "last:1/0", "input:", "some:0.1"]
)
def test_bad_rules(rule: str) -> None:
    assert refusal(lambda: parse_rule(rule)).startswith("--held-out: expected")


def test_rules_that_leave_a_split_empty(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    for rule, left in (("hash:0.000001", "heldout"), (f"input:{tmp_path}", "train")):
        message = refusal(lambda rule=rule: make(tmp_path, ["abc"], held_out=rule))  # type: ignore[misc]
        assert f"no text is left for split '{left}'" in message
        assert not (tmp_path / "dataset").exists()


# --- making --------------------------------------------------------------------------------------


def test_the_shuffle_does_not_depend_on_the_memory_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path, words(200))
    monkeypatch.setattr("data_tools.datasets.write.RUN_BYTES", 500)
    (tmp_path / "other").mkdir()
    assert make(tmp_path / "other", words(200)).dataset_id == whole.dataset_id


def test_a_dry_run_counts_what_a_real_one_writes(tmp_path: Path) -> None:
    manifest = make(tmp_path, [*words(100), "", ""])
    job = plan_dataset([tmp_path / "corpus.jsonl"], ByteTokenizer(), held_out="hash:0.3")
    progress = count(job)
    assert progress.empty_documents == manifest.empty_documents == 2
    for split_name, counts in progress.splits.items():
        found = manifest.split(split_name)
        assert counts.tokens == sum(s.tokens for s in found)
        assert counts.text_bytes == sum(s.text_bytes for s in found)
        assert counts.documents == sum(s.documents for s in found)


def test_finished_work_is_recognised_and_other_work_refused(tmp_path: Path) -> None:
    manifest = make(tmp_path, words(100))
    sizes = {"block_tokens": 64, "shard_blocks": 3}
    inputs = [tmp_path / "corpus.jsonl"]
    out = tmp_path / "dataset"

    def again(held_out: str = "hash:0.3", **changed: int) -> Manifest | None:
        job = plan_dataset(inputs, ByteTokenizer(), held_out=held_out, **sizes | changed)
        return find_finished(job, out)

    assert again() == manifest
    assert "held_out: " in refusal(lambda: again("hash:0.2"))
    assert "block_tokens: 64 -> 32" in refusal(lambda: again(block_tokens=32))
    tokenizer = train_tokenizer(inputs, tmp_path / "bpe", kind="bpe", vocab_size=300)
    job = plan_dataset(inputs, tokenizer, held_out="hash:0.3", **sizes)
    assert "another tokenizer" in refusal(lambda: find_finished(job, out))
    (out / "train-000001.tar").unlink()
    assert "missing shard" in refusal(again)
    inputs[0].write_bytes(inputs[0].read_bytes() + b"\n")
    assert "inputs_sha256: " in refusal(again)
    (out / "index.json").unlink()
    assert "already exists and is no dataset" in refusal(again)


def _sharding(folder: Path, repeats: int) -> list[str]:
    """The arguments that shard 200 documents, ``repeats`` times over."""
    path = folder / f"{repeats}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in words(200)) * repeats)
    return ["shard", str(path), "--out", str(folder / "dataset"), "--block-tokens", "256"]


def test_a_killed_run_leaves_no_dataset_and_the_next_one_succeeds(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, *_sharding(tmp_path, 2000)], env=environment(), start_new_session=True
    )
    hidden = tmp_path / ".dataset.unfinished"
    try:
        deadline = time.monotonic() + 60
        while not any(hidden.glob("runs/*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGSTOP)  # in the middle of its work
        second = hourglass_data(*_sharding(tmp_path, 1), cwd=tmp_path)
        assert second.returncode == 2
        assert "another process is writing" in second.stderr
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert any(hidden.glob("runs/*"))
    assert not (tmp_path / "dataset").exists()
    third = hourglass_data(*_sharding(tmp_path, 1), cwd=tmp_path)
    assert third.returncode == 0, third.stderr
    assert not hidden.exists()
    verify(tmp_path / "dataset")


# --- verifying -----------------------------------------------------------------------------------


def rewrite(manifest: Manifest, change: Callable[[bytearray, int], object], **fields: Any) -> Path:
    """Change the first shard from inside, given its bytes and where its first ids begin, and write
    a manifest that fits the new file: damage that no size and no hash can show."""
    first, *others = manifest.shards
    data = bytearray((manifest.folder / first.path).read_bytes())
    change(data, first.offsets[0])
    (manifest.folder / first.path).write_bytes(data)
    fields = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | fields
    same = ("tokenizer", "eos_id", "dtype", "recipe", "empty_documents")
    kept = {name: getattr(manifest, name) for name in same}
    shards = (first.model_copy(update=fields), *others)
    Manifest.make(manifest.folder, **kept, shards=shards).save()
    return manifest.folder


def with_crc(data: bytearray, at: int) -> None:
    """Put the crc32c of the first 64 ids into their json."""
    ids = bytes(data[at : at + 64])
    begin = data.index(b'"tokens.u8": "') + len(b'"tokens.u8": "')
    data[begin : begin + 8] = f"{google_crc32c.value(ids):08x}".encode()


def without_crc(data: bytearray, at: int) -> None:
    begin = data.index(b'"crc32c"')
    data[begin : begin + 8] = b'"crc32x"'


def extra_eos(data: bytearray, at: int) -> None:
    data[at + 3] = 255 if data[at + 3] != 255 else 65
    with_crc(data, at)


@pytest.mark.parametrize(
    ("change", "fields", "expected"),
    [
        (lambda data, at: data.__setitem__(at, data[at] ^ 1), {}, "crc32c of tokens.u8"),
        (extra_eos, {}, "document ends"),
        (without_crc, {}, "not a shard of blocks: KeyError('crc32c')"),
        (lambda data, at: None, {"tokens": 7}, "tokens: expected 7, found"),
        (lambda data, at: None, {"documents": 7777}, "documents: expected 7777, found"),
        (lambda data, at: None, {"text_bytes": 7}, "text_bytes: expected 7, found"),
        (lambda data, at: None, {"offsets": (512, 1024, 2048)}, "offsets: expected (512"),
        (lambda data, at: data.__setitem__(slice(0, 512), b"x" * 512), {}, "not a shard of blocks"),
        (lambda data, at: data.__setitem__(slice(at + 64, None), b""), {}, "not a shard of blocks"),
    ],
)
def test_verify_finds_what_hashes_cannot(
    tmp_path: Path, change: Callable[[bytearray, int], object], fields: Any, expected: str
) -> None:
    manifest = make(tmp_path, words(60))
    assert verify(manifest.folder) == manifest
    folder = rewrite(manifest, change, **fields)
    message = refusal(lambda: verify(folder))
    assert expected in message
    assert str(folder / "train-000000.tar") in message


def test_verify_compares_documents_with_their_tables(tmp_path: Path) -> None:
    manifest = make(tmp_path, words(60))
    shard = manifest.shards[0]
    path = manifest.folder / shard.table
    table = np.fromfile(path, "<u8").reshape(-1, 2)
    texts = documents(manifest, "train", ByteTokenizer())
    hashes = [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]
    assert table[:, 1].tolist() == hashes[: shard.documents]
    for column, expected in ((0, "document ends"), (1, "document 2: content hash: expected")):
        damaged = table.copy()
        damaged[2, column] += 1
        damaged.tofile(path)
        assert "altered table of documents" in refusal(lambda: verify(manifest.folder))
        sums = (hashlib.sha256(path.read_bytes()).hexdigest(), *manifest.documents_sha256[1:])
        manifest.model_copy(update={"documents_sha256": sums}).save()
        assert expected in refusal(lambda: verify(manifest.folder))
        manifest.save()
    path.unlink()
    assert "expected" in refusal(lambda: verify(manifest.folder))


def test_verify_compares_the_tokenizer(tmp_path: Path) -> None:
    manifest = make(tmp_path, words(60))
    train_tokenizer([tmp_path / "corpus.jsonl"], tmp_path / "bpe", kind="bpe", vocab_size=300)
    load_tokenizer(tmp_path / "bpe").save(manifest.folder)
    message = refusal(lambda: verify(manifest.folder))
    assert message.startswith("tokenizers differ: the shards has vocabulary")


# --- the command ---------------------------------------------------------------------------------


def examples() -> list[list[str]]:
    """The example of every data command's --help, as it can be pasted."""
    found = []
    for name in (
        *("tokenizer", "shard", "inspect", "verify", "stats", "diff", "reshard", "merge"),
        *("prepare", "split", "export-text"),
    ):
        done = hourglass_data(name, "--help", cwd=ROOT)
        help_text = done.stdout.partition("Example:")[2]
        found.append(shlex.split(re.findall(r"(hourglass data .*[^ ]) *\n", help_text)[0]))
    return found


@pytest.mark.slow
def test_the_examples_of_the_help_work(tmp_path: Path) -> None:
    outputs = []
    commands = examples()
    for example in commands:
        done = hourglass_data(*example[2:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert not [line for line in done.stderr.splitlines() if ": taking the shipped" not in line]
        outputs.append(done.stdout)
    tokenizer, shard, inspected, verified, stats, diff, *others = outputs
    reshard, merge, prepared, split, exported = others
    assert "unigram, 2,048 ids" in tokenizer
    assert "train 1,003,855 tokens (1,003,854 bytes)" in shard
    assert "heldout 111,541 tokens (111,540 bytes)" in shard
    assert "held out   last:0.1" in inspected
    assert "First Citizen:\nBefore we proceed any further, hear me speak." in inspected
    assert verified.startswith("whole: data/try: train 1,003,855")
    assert "median_tokens   1,003,855" in stats
    assert {path.name for path in (tmp_path / "plots" / "try").glob("*.png")} == {
        "lengths.png", "bytes_per_token.png", "ids.png",
    }  # fmt: skip
    assert diff == "data/try and data/try are the same\n"
    assert "train 1,003,855 tokens" in reshard
    assert "train 2,007,710 tokens" in merge
    assert "documents 7,222 = kept" in prepared
    assert split.count("tokens") == 4
    assert exported == "try.jsonl: 1 documents\n"
    again = hourglass_data(*commands[1][2:], cwd=tmp_path)
    assert again.stdout.startswith("already there: data/try")


def test_the_shipped_corpus_is_the_known_one() -> None:
    data = gzip.decompress(SHAKESPEARE.read_bytes())
    assert len(data) == 1_115_394
    assert hashlib.sha256(data).hexdigest() in (SHAKESPEARE.parent / "README.md").read_text()


MISTAKES = [
    (["shard", "missing.txt", "--out", "new"], "missing.txt: no such file or folder"),
    (["shard", ".", "--out", "new", "--held-out", "all"], "--held-out: expected hash:0.01"),
    (["shard", ".", "--out", "new", "--tokenizer", "missing"], "expected a tokenizer"),
    (["shard", ".", "--out", "folder"], "folder: already exists and is no dataset"),
    (["tokenizer", ".", "--out", "folder"], "folder: already exists"),
    (["tokenizer", ".", "--out", "new"], "--vocab-size: expected at most"),
    (
        ["tokenizer", ".", "--out", "new", "--vocab-size", "9"],
        "--vocab-size: expected at least",
    ),
    (["verify", "folder"], "folder: no dataset here"),
    (["inspect", "missing"], "missing: expected a dataset folder, found none"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    (tmp_path / "a.txt").write_text("some text that is there\n" * 20)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hourglass", "data", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "folder"]
    assert not os.listdir(tmp_path / "folder")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    arguments = ["shard", SHAKESPEARE, "--out", "new", "--held-out", "last:0.1", "--dry-run"]
    done = hourglass_data(*arguments, cwd=tmp_path)
    assert done.returncode == 0
    assert "heldout: 1 documents, 111,540 bytes, 111,541 tokens" in done.stdout
    assert not os.listdir(tmp_path)
