"""Tokenizers, text to ids and back: raw bytes and sentencepiece with one interface.

    folder/tokenizer.json     kind, vocabulary size, end-of-text id, both hashes
    folder/tokenizer.model    the sentencepiece model (kind "sentencepiece" only)

Every tokenizer is lossless: ``decode(encode(text)) == text``, and the byte lengths of the ids of a
text sum to its length in UTF-8. That makes bits per byte exact and comparable across tokenizers.

The fingerprint (hash of the model file, hash of what every id stands for) is stored in shards,
checkpoints and exports; ``require_same`` compares two fingerprints.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
from pydantic import ConfigDict

from hourglass_dist.config.loader import ConfigError, Section, parse
from hourglass_dist.core.files import replace

Ids = npt.NDArray[np.unsignedinteger[Any]]
"""Flat array of token ids: uint8 for bytes, uint32 for sentencepiece."""

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
STRETCH = 4096
"""Maximum number of characters that sentencepiece encodes at once. Longer texts would cost memory,
time (BPE) and precision, as it adds up scores in fp32."""


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a tokenizer: equal fingerprints give equal ids for every text."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_sha256: str
    """sha256 (hex) of the model file (for bytes, of the word ``bytes``)."""
    vocab_sha256: str
    """sha256 (hex) of the end-of-text id and the bytes that every id stands for."""


class Tokenizer(Protocol):
    """Interface of a tokenizer."""

    @property
    def name(self) -> str:
        """Kind of the tokenizer: ``bytes`` or ``sentencepiece``."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, which are 0 ... vocab_size - 1."""

    @property
    def eos_id(self) -> int:
        """Id that ends every document."""

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of this tokenizer."""

    def encode(self, text: str) -> Ids:
        """Return the ids of ``text``, without eos. Raises ValueError for lone surrogates."""

    def encode_utf8(self, data: bytes) -> Ids:
        """Return the ids of text given as UTF-8."""

    def encode_prompt(self, data: bytes) -> list[int]:
        """Return the ids of raw bytes. Raises ValueError for UTF-8 that is invalid but required."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; specials have none. Raises ValueError for an unknown id."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD."""

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of bytes of text of every id (0 for specials), of length vocab_size."""

    def save(self, folder: Path) -> None:
        """Write the files that ``load_tokenizer`` reads into an existing folder."""


def require_same(a: Fingerprint, b: Fingerprint, what_a: str, what_b: str) -> None:
    """Raise ValueError, naming both owners, when two fingerprints differ."""
    for field, kind in (("vocab_sha256", "vocabulary"), ("model_sha256", "model")):
        hash_a, hash_b = getattr(a, field), getattr(b, field)
        if hash_a != hash_b:
            raise ValueError(
                f"tokenizers differ: {what_a} has {kind} {hash_a[:12]}, {what_b} has {hash_b[:12]}"
            )


# --- the two kinds -------------------------------------------------------------------------------


class _TableTokenizer:
    """Base of both kinds: everything that follows from a table of id -> bytes."""

    name: str

    def __init__(self, table: list[bytes], eos_id: int, model: bytes) -> None:
        self._table = table
        self.vocab_size = len(table)
        self.eos_id = eos_id
        vocabulary = hashlib.sha256(f"eos {eos_id}\n".encode())
        for entry in table:
            vocabulary.update(len(entry).to_bytes(4, "little") + entry)
        self.fingerprint = Fingerprint(hashlib.sha256(model).hexdigest(), vocabulary.hexdigest())

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; specials have none. Raises ValueError for an unknown id."""
        listed = [int(i) for i in ids]
        for i in listed:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id: expected 0 to {self.vocab_size - 1}, given {i}")
        return b"".join(self._table[i] for i in listed)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of bytes of text of every id (0 for specials), of length vocab_size."""
        return np.array([len(entry) for entry in self._table], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into an existing folder."""
        about = {"kind": self.name, "vocab_size": self.vocab_size, "eos_id": self.eos_id}
        text = json.dumps(about | asdict(self.fingerprint), indent=2) + "\n"
        replace(folder / DESCRIPTION_FILE, text)


class ByteTokenizer(_TableTokenizer):
    """Tokenizer whose ids are the bytes of UTF-8; 0xFF, which UTF-8 never uses, ends a document."""

    name = "bytes"

    def __init__(self) -> None:
        eos_id = 0xFF
        table = [b"" if i == eos_id else bytes([i]) for i in range(256)]
        super().__init__(table, eos_id, model=b"bytes")

    def encode(self, text: str) -> Ids:
        """Return the UTF-8 of ``text`` as uint8. Raises ValueError for lone surrogates."""
        return np.frombuffer(_utf8(text), dtype=np.uint8)

    def encode_utf8(self, data: bytes) -> Ids:
        """Return the bytes as uint8 ids."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes, without end-of-text ids. Raises ValueError for an unknown id."""
        if isinstance(ids, np.ndarray) and ids.dtype == np.uint8:  # many times as fast
            return bytes(ids[ids != self.eos_id].data)
        return super().decode_bytes(ids)

    def encode_prompt(self, data: bytes) -> list[int]:
        """Return the bytes as ids; any bytes are allowed."""
        return list(data)


class SentencePieceTokenizer(_TableTokenizer):
    """Sentencepiece model with byte fallback, no dummy prefix and no normalisation.

    U+2581 is encoded as its three bytes, without the model: sentencepiece writes a space that way,
    so a real U+2581 would come back as a space. Other text is encoded in stretches of whole lines;
    no piece spans two lines. A line longer than a stretch is cut, before a space if possible.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, source: str) -> None:
        """Load ``model``, called ``source`` in messages. Raises ValueError if it loses text."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError):
            raise ValueError(f"{source}: not a sentencepiece model") from None
        self._model = model
        bytes_at = _byte_pieces(self._processor)
        if len(bytes_at) != 256 or self._processor.eos_id() < 0:
            raise ValueError(
                f"{source}: expected a sentencepiece model with byte_fallback and an end-of-text id"
                " (as 'hourglass data tokenizer' makes them)"
            )
        self._spelled = np.array([bytes_at[b] for b in "\u2581".encode()], dtype=np.int32)
        table = _piece_bytes(self._processor, bytes_at)
        super().__init__(table, self._processor.eos_id(), model)
        self._require_lossless(source)

    def encode(self, text: str) -> Ids:
        """Return the ids of ``text`` as uint32. Raises ValueError for lone surrogates."""
        _utf8(text)
        ids: list[npt.NDArray[np.int32]] = []
        for number, part in enumerate(text.split("\u2581")):
            ids += [self._spelled] * bool(number)
            ids += map(self._processor.encode_as_numpy, _stretches(part))
        return np.concatenate(ids).view(np.uint32) if ids else np.zeros(0, np.uint32)

    def encode_utf8(self, data: bytes) -> Ids:
        """Return the ids of text given as UTF-8."""
        return self.encode(str(data, "utf-8"))

    def encode_prompt(self, data: bytes) -> list[int]:
        """Return the ids of UTF-8 bytes. Raises ValueError naming the first invalid byte."""
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompt: expected UTF-8 for a sentencepiece tokenizer, "
                f"given byte 0x{data[error.start]:02x} at offset {error.start}"
            ) from None
        return [int(i) for i in self.encode(text)]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer.model into an existing folder."""
        replace(folder / MODEL_FILE, self._model)
        super().save(folder)

    def _require_lossless(self, source: str) -> None:
        """Raise ValueError for a model trained with normalisation or a dummy prefix."""
        probe = " a  \ufb01\u00bd\tB \n\nc "
        if self.decode(self.encode(probe)) != probe:
            raise ValueError(
                f"{source}: this sentencepiece model changes text; expected one trained with"
                " add_dummy_prefix=false, remove_extra_whitespaces=false, identity normalisation"
            )


def _stretches(text: str) -> Iterator[str]:
    """Yield ``text`` in stretches that are encoded one by one."""
    begin = 0
    while len(text) - begin > STRETCH:
        end = text.rfind("\n", begin, begin + STRETCH) + 1
        end = end or max(begin, text.rfind(" ", begin, begin + STRETCH))
        end = end if end > begin else begin + STRETCH
        yield text[begin:end]
        begin = end
    if begin < len(text):
        yield text[begin:]


def _byte_pieces(processor: Any) -> dict[int, int]:
    """Return byte -> the id of its fallback piece ``<0x..>``."""
    ids = (i for i in range(processor.vocab_size()) if processor.is_byte(i))
    return {int(processor.id_to_piece(i)[1:-1], 16): i for i in ids}


def _piece_bytes(processor: Any, bytes_at: dict[int, int]) -> list[bytes]:
    """Return the bytes of text that every id stands for."""
    table = []
    for i in range(processor.vocab_size()):
        special = processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
        piece = "" if special else processor.id_to_piece(i)
        table.append(piece.replace("\u2581", " ").encode())
    for byte, i in bytes_at.items():
        table[i] = bytes([byte])
    return table


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from None


# --- reading and streaming -----------------------------------------------------------------------


class _Description(Section):
    """Content of tokenizer.json."""

    kind: Literal["bytes", "sentencepiece"]
    vocab_size: int
    eos_id: int
    model_sha256: str
    vocab_sha256: str


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer saved in a folder (of a dataset, export, or 'hourglass data tokenizer').

    Raises ValueError when it is missing, unreadable, or does not match its hashes.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: expected a tokenizer ({DESCRIPTION_FILE}), found none")
    try:
        settings = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path}: not valid JSON") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: expected a mapping")
    about = parse(_Description, settings, source=str(path))
    tokenizer: Tokenizer = ByteTokenizer()
    if about.kind == "sentencepiece":
        model_path = folder / MODEL_FILE
        if not model_path.is_file():
            raise ValueError(f"{model_path}: missing, though {DESCRIPTION_FILE} describes it")
        model = model_path.read_bytes()
        if hashlib.sha256(model).hexdigest() != about.model_sha256:
            raise ValueError(f"{model_path}: altered: it is not the model of {DESCRIPTION_FILE}")
        tokenizer = SentencePieceTokenizer(model, str(model_path))
    described = Fingerprint(about.model_sha256, about.vocab_sha256)
    require_same(described, tokenizer.fingerprint, str(path), f"the {about.kind} tokenizer")
    for name in ("vocab_size", "eos_id"):
        if getattr(about, name) != getattr(tokenizer, name):
            expected, given = getattr(tokenizer, name), getattr(about, name)
            raise ValueError(f"{path}: {name}: expected {expected}, given {given}")
    return tokenizer


class StreamDecoder:
    """Incremental decoder of ids: a character is returned once its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that ``ids`` complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """Return U+FFFD when the ids so far end inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
