"""Reading of a corpus: files -> documents as text. What is no text is an error, never skipped.

    .txt                one document per file, or cut at a separator
    .jsonl              one JSON object per line, the text in one of its fields
    .txt.gz .txt.zst .jsonl.gz .jsonl.zst    the same, compressed

Files are read in pieces, so memory holds one document at a time. Lines end at ``\\n`` only: JSON
text may contain U+2028, at which ``str.splitlines`` would cut a line.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson
import zstandard

from hourglass_dist.config.loader import show

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHUNK = 1 << 20


def find_inputs(paths: Sequence[Path], suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Return the files in ``paths`` and below its folders, in that order, without duplicates.

    The bare name of a shipped corpus, ``tinyshakespeare``, stands for its file. Raises ValueError
    when a path is missing, a file is of an unknown kind or a folder has no input.
    """
    found: dict[Path, Path] = {}  # by resolved path
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if _is_input(file, suffixes))
            if not files:
                raise ValueError(f"{path}: no input files here: expected {', '.join(suffixes)}")
        elif not path.exists() and len(path.parts) == 1 and _shipped(path).exists():
            files = [_shipped(path)]
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        elif not _is_input(path, suffixes):
            raise ValueError(f"{path}: unknown kind of file: expected {', '.join(suffixes)}")
        else:
            files = [path]
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _shipped(name: Path) -> Path:
    return Path(__file__).parents[1] / "corpora" / f"{name}.txt.gz"


def _is_input(path: Path, suffixes: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(suffixes) and path.is_file()


@dataclass(frozen=True)
class Problem:
    """Input record that is no text: its position and what is wrong with it."""

    path: Path
    position: int
    """Offset of its first byte in the decompressed file, or its row in a file of rows."""
    line: int | None
    """Line number from 1; None unless the file was read by lines from its beginning."""
    what: str
    excerpt: bytes = b""
    """Beginning of the record, as raw bytes."""

    def __str__(self) -> str:
        return f"{self.path}{f':{self.line}' if self.line else ''}: {self.what}"


Records = Iterator[tuple[int, "str | Problem"]]
"""Iterator of (position in the file, text or Problem) of every record."""


def read_documents(path: Path, separator: str | None, text_field: str) -> Iterator[str]:
    """Yield the documents of a file. ``separator`` is for text, ``text_field`` for JSON lines.

    Raises ValueError with file and byte or line for invalid UTF-8, bad JSON, a missing text and
    damaged compression.
    """
    is_json = ".jsonl" in path.name.lower()
    records = read_json_lines(path, text_field) if is_json else read_text(path, separator)
    for _, text in records:
        if isinstance(text, Problem):
            raise ValueError(str(text))
        yield text


def read_text(path: Path, separator: str | None) -> Records:
    """Yield the documents of a text file: the whole file, or the parts between separators."""
    if separator is None:
        yield 0, _decode(b"".join(chunks(path)), path, 0)
        return
    for offset, piece in _pieces(path, separator.encode()):
        yield offset, _decode(piece, path, offset)


def read_json_lines(path: Path, text_field: str, begin: int = 0, end: int | None = None) -> Records:
    """Yield the documents of the lines that begin at byte ``begin`` or later and before ``end``."""
    for number, (offset, line) in enumerate(_pieces(path, b"\n", begin, end), 1):
        if end is not None and offset >= end:
            return
        if not line.isspace() and line:
            text = _text_of(line, text_field)
            if isinstance(text, Wrong):
                problem = Problem(path, offset, None if begin else number, text, line[:200])
                yield offset, problem
            else:
                yield offset, text


class Wrong(str):
    """Description of what is wrong with a record; a plain str is the record's text."""

    __slots__ = ()


def _text_of(line: bytes, text_field: str) -> str:
    """Return the text of one JSON line, or what is wrong as Wrong."""
    try:
        text = orjson.loads(line)[text_field]
        if type(text) is str:
            return text
    except (ValueError, TypeError, LookupError):
        pass  # json below names the mistake, and reads what orjson refuses: NaN, long numbers
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Wrong(
            f"invalid UTF-8: byte 0x{line[error.start]:02x} at byte {error.start} of the line"
        )
    except json.JSONDecodeError as error:
        return Wrong(f"bad JSON: {error.msg} at character {error.pos}")
    except ValueError:
        return Wrong("bad JSON: a number too long")
    except RecursionError:
        return Wrong("bad JSON: too deep")
    if not isinstance(record, dict):
        return Wrong(f"expected a JSON object, given {show(record)}")
    if text_field not in record:
        fields = ", ".join(map(str, record)) or "none"
        return Wrong(f"no field {text_field!r} (--text-field); its fields: {fields}")
    return text_or_wrong(record[text_field], f"field {text_field!r}")


def text_or_wrong(value: object, name: str) -> str:
    """Return a value that should be text, or what is wrong with it as Wrong."""
    if not isinstance(value, str):
        return Wrong(f"{name}: expected text, given {show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(value[error.start]):04X} at character {error.start}"
        return Wrong(f"{name}: lone surrogate {surrogate}")
    return value


def _decode(data: bytes, path: Path, offset: int) -> str | Problem:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, at = data[error.start], offset + error.start
        what = f"invalid UTF-8: byte 0x{byte:02x} at byte {at}"
        return Problem(path, offset, None, what, data[max(0, error.start - 100) :][:200])


def _pieces(
    path: Path, separator: bytes, start: int = 0, limit: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the parts between separators, with their offsets in the (decompressed) file.

    With ``start``, only parts that begin there or later, and the separator is one byte. Stops early
    when no part can begin before ``limit``.
    """
    buffer, offset, searched = bytearray(), max(0, start - 1), 0
    content = chunks(path, offset)
    if start:
        for chunk in content:
            if (found := chunk.find(separator)) >= 0:
                buffer += chunk[found + 1 :]
                offset += found + 1
                break
            offset += len(chunk)
            if limit is not None and offset >= limit:
                return
    for chunk in itertools.chain([b""], content):
        buffer += chunk
        begin = 0
        while (end := buffer.find(separator, searched)) >= 0:
            yield offset + begin, bytes(buffer[begin:end])
            begin = searched = end + len(separator)
        del buffer[:begin]
        offset += begin
        searched = max(0, len(buffer) - len(separator) + 1)  # it may lie across two chunks
    if buffer:
        yield offset, bytes(buffer)


# --- compression ---------------------------------------------------------------------------------


def chunks(path: Path, start: int = 0) -> Iterator[bytes]:
    """Yield the content of a file, decompressed. Raises ValueError for damaged compressed data."""
    with path.open("rb") as file:
        file.seek(start)
        try:
            if path.suffix.lower() == ".gz":
                with gzip.GzipFile(fileobj=file) as unzipped:
                    yield from iter(lambda: unzipped.read(_CHUNK), b"")
            elif path.suffix.lower() == ".zst":
                yield from _zstd_chunks(file)
            else:
                yield from iter(lambda: file.read(_CHUNK), b"")
        except EOFError:
            raise ValueError(f"{path}: truncated: the compressed data end too early") from None
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise ValueError(f"{path}: damaged compressed data: {error}") from None


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of all frames. Raises EOFError when the file ends inside one.

    The readers of ``zstandard`` accept that as a normal end.
    """
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    while data := file.read(_CHUNK // 8):
        while data:
            frame = frame or context.decompressobj()
            if out := frame.decompress(data):
                yield out
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError
