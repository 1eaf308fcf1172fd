"""Reading a corpus: files -> documents, as text. What is no text is an error, never skipped.

    .txt                one document per file, or cut at a separator
    .jsonl              one JSON object per line, the text in one of its fields
    .txt.gz .txt.zst .jsonl.gz .jsonl.zst    the same, compressed

Files are read in pieces, so memory holds one document at a time. Lines end at ``\\n`` only: JSON
text may contain U+2028, which ``str.splitlines`` takes for the end of a line.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import zstandard

from hourglass_dist.sections import show

SUFFIXES = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst")
_CHUNK = 1 << 20


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """The files among ``paths`` and below the folders among them, in that order, none twice.

    Raises ValueError when a path is missing, a file is of an unknown kind or a folder has no input.
    """
    found: dict[Path, Path] = {}  # by resolved path
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if _is_input(file))
            if not files:
                raise ValueError(f"{path}: no input files here: expected {', '.join(SUFFIXES)}")
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        elif not _is_input(path):
            raise ValueError(f"{path}: unknown kind of file: expected {', '.join(SUFFIXES)}")
        else:
            files = [path]
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _is_input(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def read_documents(path: Path, separator: str | None, text_field: str) -> Iterator[str]:
    """The documents of a file. ``separator`` is for text, ``text_field`` for JSON lines.

    Raises ValueError with file and byte or line for invalid UTF-8, bad JSON, a missing text and
    damaged compression.
    """
    if ".jsonl" in path.name.lower():
        yield from _read_json_lines(path, text_field)
        return
    if separator is None:
        yield _decode(b"".join(_chunks(path)), path, 0)
        return
    for offset, piece in _pieces(path, separator.encode()):
        yield _decode(piece, path, offset)


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, (_, line) in enumerate(_pieces(path, b"\n"), 1):
        if line.strip():
            yield _text_of(line, f"{path}:{number}", text_field)


def _text_of(line: bytes, where: str, text_field: str) -> str:
    """The text of one JSON line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: invalid UTF-8: byte 0x{line[error.start]:02x} "
            f"at byte {error.start} of the line"
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: bad JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError(f"{where}: bad JSON: too deep") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, given {show(record)}")
    if text_field not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise ValueError(f"{where}: no field {text_field!r} (--text-field); its fields: {fields}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_field!r}: expected text, given {show(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {text_field!r}: lone surrogate U+{ord(text[error.start]):04X} "
            f"at character {error.start}"
        ) from None
    return text


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: invalid UTF-8: byte 0x{data[error.start]:02x} at byte {offset + error.start}"
        ) from None


def _pieces(path: Path, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """What stands between separators, with its offset in the (decompressed) file."""
    buffer, offset, searched = bytearray(), 0, 0
    for chunk in _chunks(path):
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


def _chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, decompressed. Raises ValueError when compressed data is damaged."""
    with path.open("rb") as file:
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
    """Frames one after another. Raises EOFError when the file ends inside one.

    (The readers of ``zstandard`` take that for a normal end.)
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
