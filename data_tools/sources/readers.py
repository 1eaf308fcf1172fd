"""Readers of all kinds of input, record by record; a record that is no text becomes a Problem.

    .txt .jsonl (.gz .zst)    text_files.py
    .csv (.gz .zst)           a header row; rows may contain line breaks
    .parquet .arrow           one column (.arrow: the files of a Hugging Face dataset on disk)
    .warc .wet (.gz)          text records as they are, web pages through trafilatura
    .tar                      WebDataset, webdataset_tar.py

A file that is damaged as a whole (truncated compression, no such column) raises ValueError: then
the job fails and nothing of the file is used.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_tools.sources.text_files import (
    SUFFIXES,
    Problem,
    Records,
    Wrong,
    chunks,
    read_json_lines,
    read_text,
    text_or_wrong,
)
from data_tools.sources.webdataset_tar import read_tar

_CSV = (".csv", ".csv.gz", ".csv.zst")
_WARC = (".warc", ".warc.gz", ".wet", ".wet.gz")
ALL_SUFFIXES = (*SUFFIXES, *_CSV, ".parquet", ".arrow", *_WARC, ".tar")


def can_be_cut(path: Path) -> bool:
    """Return whether parts of a file can be read on their own."""
    return path.name.lower().endswith(".jsonl")


def read_records(
    path: Path,
    text_field: str = "text",
    separator: str | None = None,
    begin: int = 0,
    end: int | None = None,
) -> Records:
    """Yield the records of a file, or of those that begin at bytes ``begin`` to ``end``."""
    name = path.name.lower()
    if ".jsonl" in name:
        records = read_json_lines(path, text_field, begin, end)
    elif name.endswith(_CSV):
        records = _read_csv(path, text_field)
    elif name.endswith((".parquet", ".arrow")):
        records = _read_column(path, text_field)
    elif name.endswith(_WARC):
        records = _read_warc(path)
    elif name.endswith(".tar"):
        records = read_tar(path, text_field)
    else:
        records = read_text(path, separator)
    for position, text in records:
        if isinstance(text, str) and "\0" in text:
            at = text.index("\0")
            excerpt = text[max(0, at - 100) : at + 100].encode()
            yield position, Problem(path, position, None, f"NUL at character {at}", excerpt)
        else:
            yield position, text


def _read_csv(path: Path, field: str) -> Records:
    csv.field_size_limit(2**31 - 1)
    raw = io.BufferedReader(_Raw(chunks(path)))
    lines = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(lines, strict=True)
    header = next(rows, None)
    if header is None:
        return
    header[0] = header[0].removeprefix("\ufeff")
    if field not in header:
        raise ValueError(f"{path}: no column {field!r}; its columns: {', '.join(header)}")
    column = header.index(field)
    for number in itertools.count(1):
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{line}: damaged CSV: {error}") from None
        if row is None:
            return
        if not row:
            continue
        what: str
        if len(row) != len(header):
            what = Wrong(f"expected {len(header)} fields, found {len(row)}")
        else:
            what = text_or_wrong(row[column], f"column {field!r}")
        if isinstance(what, Wrong):
            if "surrogate" in what:
                what = Wrong(f"column {field!r}: invalid UTF-8")
            excerpt = ",".join(row).encode("utf-8", "surrogateescape")[:200]
            yield number, Problem(path, number, line, str(what), excerpt)
        else:
            yield number, what


class _Raw(io.RawIOBase):
    """Raw file made of chunks of bytes."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces, self._rest = iter(pieces), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or next(self._pieces, b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _read_column(path: Path, field: str) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if path.name.lower().endswith(".parquet"):
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            batches = file.iter_batches(1024, columns=[field]) if field in names else iter(())
        else:
            file = _open_arrow(path)
            names = file.schema.names
            batches = (batch.select([field]) for batch in file) if field in names else iter(())
        if field not in names:
            raise ValueError(f"{path}: no column {field!r}; its columns: {', '.join(names)}")
        row = 0
        for batch in batches:
            for value in batch.column(0):
                yield row, _cell(path, row, value, field)
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged: {str(error).splitlines()[0]}") from None


def _open_arrow(path: Path) -> Any:
    """Open an Arrow stream as Hugging Face datasets writes it."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(str(path)))


def _cell(path: Path, row: int, value: Any, field: str) -> str | Problem:
    try:
        text = text_or_wrong(value.as_py(), f"column {field!r}")
        excerpt = b""
    except UnicodeDecodeError as error:
        text = Wrong(f"column {field!r}: invalid UTF-8: byte {error.start} of the value")
        excerpt = error.object[:200]
    if isinstance(text, Wrong):
        return Problem(path, row, None, f"row {row}: {text}", excerpt)
    return text


def _read_warc(path: Path) -> Records:
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4))
            if file.read() not in (b"", b"\r\n\r\n"):  # warcio accepts half a header as the end
                raise ValueError(f"{path}: truncated: the last record does not end")
    stream = io.BufferedReader(_Raw(chunks(path)))
    try:
        for number, record in enumerate(ArchiveIterator(stream, no_record_parse=False)):
            if record.rec_type in ("response", "conversion", "resource"):
                yield number, _page(path, number, record)
    except ArchiveLoadFailed as error:
        raise ValueError(f"{path}: damaged WARC: {' '.join(str(error).split())}") from None


def _page(path: Path, number: int, record: Any) -> str | Problem:
    """Return the text of a record: the main text of a web page, or plain text unchanged."""
    import trafilatura

    raw = record.raw_stream
    data = record.content_stream().read()
    raw.read()
    if getattr(raw, "limit", 0) > 0:
        raise ValueError(f"{path}: truncated inside record {number}")
    url = record.rec_headers.get_header("WARC-Target-URI") or "?"
    kind = record.http_headers.get_header("Content-Type", "") if record.http_headers else ""
    if record.rec_type == "response" and "html" in kind:
        return trafilatura.extract(data, include_comments=False) or ""
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        what = f"record {number} ({url}): invalid UTF-8: byte {error.start}"
        return Problem(path, number, None, what, data[:200])
