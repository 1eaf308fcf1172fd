"""Reading a corpus: what goes in comes out, or one line says what and where it is not text."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from datasets import NASTY, refusal, words
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.shard import make_dataset, plan_dataset
from data_tools.sources import text_files
from data_tools.sources.text_files import find_inputs, read_documents
from data_tools.train_tokenizer import train_tokenizer
from hourglass_dist.data.tokenizer import ByteTokenizer


def compress(data: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(data[:100]) + gzip.compress(data[100:])  # two members
    if suffix.endswith(".zst"):
        one, two = (zstandard.ZstdCompressor().compress(part) for part in (data[:100], data[100:]))
        return one + two  # two frames
    return data


def read(path: Path, separator: str | None = None) -> list[str]:
    return list(read_documents(path, separator, "text"))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    texts = [*NASTY, "\u2028 is no end of a line \u2029\u0085\x0b\x0c"]
    lines = [json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress("\r\n".join(lines).encode() + b"\n\n", suffix))
    assert read(path) == texts


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst", ".TXT"])
def test_text(tmp_path: Path, suffix: str) -> None:
    text = "first\n\nsecond\u2028\n" + "x" * 200
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(text.encode(), suffix))
    assert read(path) == [text]
    assert read(path, "\n\n") == ["first", text[7:]]


@settings(deadline=None)
@given(
    data=st.lists(st.sampled_from(["a", "--", "-", "\u4f60", "b--c"])).map("".join),
    chunk=st.integers(1, 7),
)
def test_separators_may_lie_across_two_reads(
    tmp_path_factory: pytest.TempPathFactory, data: str, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(data)
    before = text_files._CHUNK
    text_files._CHUNK = chunk
    try:
        found = read(path, "--")
    finally:
        text_files._CHUNK = before
    expected = data.split("--")
    assert found == (expected if expected[-1] else expected[:-1])


def test_inputs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "notes.md", "sub/c.txt.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    found = find_inputs([tmp_path / "b.txt", tmp_path, tmp_path / "sub" / ".." / "a.jsonl"])
    assert [path.name for path in found] == ["b.txt", "a.jsonl", "c.txt.gz"]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]


LINES = "".join(json.dumps({"text": t}) + "\n" for t in words(50)).encode()
BAD_INPUTS: dict[str, tuple[str, bytes, str]] = {
    "invalid UTF-8": ("a.txt", b"abc\xff", "a.txt: invalid UTF-8: byte 0xff at byte 3"),
    "cut UTF-8": ("a.txt", "abc\u4f60".encode()[:-1], "a.txt: invalid UTF-8: byte 0xe4 at byte 3"),
    "UTF-8 in a line": ("a.jsonl", LINES + b'{"text": "\xff"}', "a.jsonl:51: invalid UTF-8"),
    "bad JSON": ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: bad JSON"),
    "deep JSON": ("a.jsonl", b'{"text": ' + b"[" * 200_000, "a.jsonl:1: bad JSON"),
    "no object": ("a.jsonl", b'["text"]', "a.jsonl:1: expected a JSON object, given"),
    "no text": (
        "a.jsonl",
        b'{"body": "a", "id": 1}',
        "'text' (--text-field); its fields: body, id",
    ),
    "text is a number": (
        "a.jsonl",
        b'{"text": 3}',
        "a.jsonl:1: field 'text': expected text, given 3",
    ),
    "surrogate": ("a.jsonl", b'{"text": "ab\\ud800"}', "lone surrogate U+D800 at character 2"),
    "cut gz": ("a.jsonl.gz", _half(gzip.compress(LINES)), "a.jsonl.gz: truncated"),
    "cut zst": ("a.jsonl.zst", _half(zstandard.compress(LINES)), "a.jsonl.zst: truncated"),
    "one byte of zst": ("a.jsonl.zst", zstandard.compress(LINES)[:1], "a.jsonl.zst: truncated"),
    "altered gz": ("a.jsonl.gz", _flipped(gzip.compress(LINES)), "a.jsonl.gz: damaged"),
    "no gz": ("a.txt.gz", b"plain text", "a.txt.gz: damaged compressed data"),
    "no zst": ("a.txt.zst", b"plain text", "a.txt.zst: damaged compressed data"),
    "empty": ("a.txt", b"", "a.txt: empty corpus"),
    "empty lines": ("a.jsonl", b'\n{"text": ""}\n\n', "a.jsonl: empty corpus"),
    "unknown kind": ("a.csv", b"a,b", "a.csv: unknown kind of file: expected .txt"),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_bad_inputs_are_one_line_and_leave_nothing(tmp_path: Path, what: str) -> None:
    name, data, expected = BAD_INPUTS[what]
    path = tmp_path / name
    path.write_bytes(data)

    def shard() -> None:
        job = plan_dataset([path], ByteTokenizer(), held_out="none")
        make_dataset(job, tmp_path / "deep" / "er" / "dataset")

    def train() -> None:
        train_tokenizer([path], tmp_path / "tokenizer", kind="bpe", vocab_size=300)

    for call in (shard, train):
        message = refusal(call)
        assert expected in message
        assert str(path) in message
        assert os.listdir(tmp_path) == [name]
