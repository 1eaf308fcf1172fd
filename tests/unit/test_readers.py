"""Inputs of every kind: what goes in comes out; what is no text is named, with its place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import zstandard
from datasets import NASTY, refusal, words
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from data_tools.sources.readers import ALL_SUFFIXES, read_records
from data_tools.sources.text_files import Problem, find_inputs, read_json_lines

TEXTS = [text for text in NASTY if "\0" not in text and text] + words(40)


def read(path: Path) -> list[str]:
    """The texts of a file without problems."""
    found = [text for _, text in read_records(path)]
    assert not [text for text in found if isinstance(text, Problem)]
    return found  # type: ignore[return-value]


def problems(path: Path) -> list[tuple[int, str]]:
    """(position, what is wrong) of a file's bad records."""
    records = read_records(path)
    return [(at, text.what) for at, text in records if isinstance(text, Problem)]


def write_warc(path: Path, texts: list[str]) -> None:
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=path.suffix == ".gz")
        for i, text in enumerate(texts):
            data = io.BytesIO(text.encode("utf-8", "surrogateescape"))
            uri = f"http://example.com/{i}"
            writer.write_record(writer.create_warc_record(uri, "conversion", payload=data))


def write_tar(path: Path, texts: list[str]) -> None:
    with webdataset.TarWriter(str(path)) as tar:
        for i, text in enumerate(texts):
            member = {"txt": text} if i % 2 else {"json": json.dumps({"text": text}).encode()}
            tar.write({"__key__": f"sub/{i:04d}", **member, "cls": b"3"})


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(texts))


def write_arrow(path: Path, texts: list[str]) -> None:
    table = pa.table({"text": texts, "n": range(len(texts))})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "a.parquet": lambda path, texts: pq.write_table(pa.table({"text": texts}), path),
    "a.arrow": write_arrow,
    "a.csv": write_csv,
    "a.warc": write_warc,
    "a.warc.gz": write_warc,
    "a.tar": write_tar,
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_goes_in_comes_out(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS)
    assert read(tmp_path / name) == TEXTS
    assert find_inputs([tmp_path], ALL_SUFFIXES) == [tmp_path / name]


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files_fail_as_a_whole(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS * 3)
    data = (tmp_path / name).read_bytes()
    quoted = data.find(b'"') + 3  # a CSV that is cut between rows is a CSV
    (tmp_path / name).write_bytes(data[: quoted if name == "a.csv" else len(data) * 2 // 3])
    message = refusal(lambda: list(read_records(tmp_path / name)))
    assert str(tmp_path / name) in message


def test_web_pages_become_their_main_text(tmp_path: Path) -> None:
    body = "<p>" + "</p><p>".join(f"This is sentence {i} of the page." * 3 for i in range(9))
    page = f"<html><head><title>t</title></head><body><nav>Menu</nav><article>{body}</p></article>"
    with (tmp_path / "a.warc.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
        payload = io.BytesIO(page.encode())
        record = writer.create_warc_record(
            "http://example.com/", "response", payload=payload, http_headers=headers
        )
        writer.write_record(record)
    (text,) = read(tmp_path / "a.warc.gz")
    assert "This is sentence 8 of the page." in text
    assert "<p>" not in text
    assert "Menu" not in text


def test_bad_records_of_every_kind(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good \xe2\x80\xa8 line"}', b'{"text": "\xff"}', b'{"text": ', b'["text"]',
        b'{"body": "a"}', b'{"text": 3}', b'{"text": "ab\\ud800"}', b'{"text": "a\\u0000b"}', b"",
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = problems(path)
    begins = [sum(len(line) + 1 for line in lines[:i]) for i in range(len(lines))]
    assert [position for position, _ in found] == begins[1:8]
    starts = ["invalid UTF-8", "bad JSON", "expected a JSON object", "no field 'text'",
              "field 'text': expected text, given 3", "field 'text': lone surrogate U+D800",
              "NUL at character 1"]  # fmt: skip
    for (_, what), start in zip(found, starts, strict=True):
        assert what.startswith(start)
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,"good\nline"\n2,bad\xff\n3\n4,nul\0\n')
    assert problems(tmp_path / "a.csv") == [
        (2, "column 'text': invalid UTF-8"), (3, "expected 2 fields, found 1"),
        (4, "NUL at character 3"),
    ]  # fmt: skip
    offsets, validity = pa.py_buffer(struct.pack("<4i", 0, 4, 5, 5)), pa.py_buffer(b"\x03")
    binary = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"good\xff"), validity)
    pq.write_table(pa.table({"text": binary}), tmp_path / "a.parquet")
    assert problems(tmp_path / "a.parquet") == [
        (1, "row 1: column 'text': invalid UTF-8: byte 0 of the value"),
        (2, "row 2: column 'text': expected text, given null"),
    ]
    write_warc(tmp_path / "a.warc", ["good", "\udcff"])
    ((position, what),) = problems(tmp_path / "a.warc")
    assert (position, what) == (1, "record 1 (http://example.com/1): invalid UTF-8: byte 0")


def test_bad_samples_of_tars(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as tar:
        for i, member in enumerate(
            [{"txt": b"good"}, {"txt": b"\xff"}, {"json": b"{"}, {"json": b"[]"}, {"png": b"x"},
             {"json": b'{"text": null}'}]
        ):  # fmt: skip
            tar.write({"__key__": f"{i:02d}", **member})
    whats = [what for _, what in problems(tmp_path / "a.tar")]
    assert [what.partition(": ")[0] for what in whats] == [f"sample '0{i}'" for i in range(1, 6)]
    assert "expected a member .txt or .json, found png" in whats[3]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.arrow"])
def test_missing_columns_are_named(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS)
    assert "no column 'body'; its columns: " in refusal(
        lambda: list(read_records(tmp_path / name, "body"))
    )


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(st.sampled_from(["", "a", "bb", "\u4f60\u2028", "x" * 40]), max_size=12),
    size=st.integers(1, 50),
    newline=st.booleans(),
)
def test_parts_of_a_file_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], size: int, newline: bool
) -> None:
    path = tmp_path_factory.mktemp("parts") / "a.jsonl"
    data = "\n".join(json.dumps({"text": t}, ensure_ascii=False) if t else "" for t in lines)
    path.write_text(data + "\n" * newline)
    length = path.stat().st_size
    parts = [
        record
        for begin in range(0, length, size)
        for record in read_json_lines(path, "text", begin, min(begin + size, length))
    ]
    assert parts == list(read_json_lines(path, "text"))
    assert [text for _, text in parts] == [text for text in lines if text]


# --- hostile tars --------------------------------------------------------------------------------


def member(name: str, data: bytes = b"text", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


PICKLE = b"cposix\nsystem\n(S'touch executed'\ntR."
HOSTILE: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    **{
        f"a {suffix}": ([member("a.txt"), member(f"b{suffix}", PICKLE)], "refused: not a text")
        for suffix in (".pickle", ".pkl", ".pyd", ".pth", ".npy", ".x.PKL")
    },
    "a path upwards": ([member("../a.txt")], "refused: its path leaves"),
    "a path upwards inside": ([member("a/../../b.txt")], "refused: its path leaves"),
    "an absolute path": ([member("/etc/a.txt")], "refused: its path leaves"),
    "a pipe": ([member("pipe:touch executed.txt")], "refused: not a text"),
    "a symbolic link": (
        [member("a.txt", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        "expected a plain file, found a link",
    ),
    "a hard link": (
        [member("a.txt", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
        "expected a plain file, found a link",
    ),
    "a device": ([member("a.txt", b"", type=tarfile.CHRTYPE)], "found a device"),
    "a pipe file": ([member("a.txt", b"", type=tarfile.FIFOTYPE)], "found a"),
    "one key in two places": (
        [member("a.txt"), member("b.txt"), member("a.json", b"{}")],
        "is in two places of the tar",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tars_are_refused(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, expected = HOSTILE[what]
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: list(read_records(path)))
    assert message.startswith(f"{path}: member ")
    assert expected in message
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]  # nothing ran, nothing was unpacked


@pytest.mark.parametrize("size", [10**6, 10**12, 2**62, 2**63 - 1])
def test_headers_that_claim_too_much_are_refused(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("a.txt")
    info.size = size
    header = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + b"x" * 4096)
    message = refusal(lambda: list(read_records(tmp_path / "a.tar")))
    assert "its header claims" in message or "damaged tar" in message


def test_every_damaged_header_is_seen(tmp_path: Path) -> None:
    """tarfile takes a broken header in the middle for the end of the file."""
    path = tmp_path / "a.tar"
    write_tar(path, TEXTS[:6])
    data = path.read_bytes()
    headers = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    assert len(headers) >= 12
    for at in headers:
        for offset in (0, 100, 124, 148, 156, 257):
            broken = bytearray(data)
            broken[at + offset] ^= 0x55
            path.write_bytes(broken)
            assert str(path) in refusal(lambda: list(read_records(path)))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_csv(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    write_csv(tmp_path / "a.csv", TEXTS)
    data = (tmp_path / "a.csv").read_bytes()
    path = tmp_path / ("a.csv.gz" if compress is gzip.compress else "a.csv.zst")
    path.write_bytes(compress(data))
    assert read(path) == TEXTS


def test_endings_choose_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.py", "b.md.gz", "c.tar", "d.txt"):
        (tmp_path / name).write_bytes(gzip.compress(b"text") if name.endswith("gz") else b"text")
    found = find_inputs([tmp_path], (".py", ".md.gz"))
    assert [path.name for path in found] == ["a.py", "b.md.gz"]
    assert [text for path in found for _, text in read_records(path)] == ["text"] * 2
