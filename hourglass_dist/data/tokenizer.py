"""Text to ids and back: raw bytes and sentencepiece behind one small interface.

    folder/tokenizer.json     kind, vocabulary size, end-of-text id, both hashes
    folder/tokenizer.model    the sentencepiece model (kind "sentencepiece" only)

Every tokenizer is lossless: ``decode(encode(text)) == text``, and the byte lengths of the ids of a
text sum to its length in UTF-8. That makes bits per byte exact and comparable across tokenizers.

The fingerprint (hash of the model file, hash of what every id stands for) travels in shards,
checkpoints and exports; ``require_same`` compares two of them wherever they meet.
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
"""Token ids, flat: uint8 for bytes, uint32 for sentencepiece."""

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"
STRETCH = 4096
"""Characters that sentencepiece encodes at once, at most. Long texts would cost memory, time (BPE)
and precision: it adds up scores in fp32."""


@dataclass(frozen=True)
class Fingerprint:
    """What makes two tokenizers the same: equal fingerprints give equal ids for every text."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    model_sha256: str
    """Of the model file (bytes have none: of a fixed word)."""
    vocab_sha256: str
    """Of the end-of-text id and the bytes that every id stands for."""


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer."""

    @property
    def name(self) -> str:
        """``bytes`` or ``sentencepiece``."""

    @property
    def vocab_size(self) -> int:
        """Ids are 0 ... vocab_size - 1."""

    @property
    def eos_id(self) -> int:
        """Ends every document."""

    @property
    def fingerprint(self) -> Fingerprint:
        """The identity of this tokenizer."""

    def encode(self, text: str) -> Ids:
        """The ids of ``text``, without an end-of-text id. Raises ValueError for lone surrogates."""

    def encode_utf8(self, data: bytes) -> Ids:
        """The ids of text given as UTF-8."""

    def encode_prompt(self, data: bytes) -> list[int]:
        """The ids of raw bytes. Raises ValueError when they are no UTF-8 and have to be."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for; specials are none. Raises ValueError for an unknown id."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """How many bytes of text each id stands for (0 for specials), of length vocab_size."""

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
    """What both kinds share: everything that follows from a table of id -> bytes."""

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
        """The bytes that ids stand for; specials are none. Raises ValueError for an unknown id."""
        listed = [int(i) for i in ids]
        for i in listed:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id: expected 0 to {self.vocab_size - 1}, given {i}")
        return b"".join(self._table[i] for i in listed)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> npt.NDArray[np.int64]:
        """How many bytes of text each id stands for (0 for specials), of length vocab_size."""
        return np.array([len(entry) for entry in self._table], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json into an existing folder."""
        about = {"kind": self.name, "vocab_size": self.vocab_size, "eos_id": self.eos_id}
        text = json.dumps(about | asdict(self.fingerprint), indent=2) + "\n"
        replace(folder / DESCRIPTION_FILE, text)


class ByteTokenizer(_TableTokenizer):
    """Ids are the bytes of UTF-8. Of those that UTF-8 never uses, 0xFF ends a document."""

    name = "bytes"

    def __init__(self) -> None:
        eos_id = 0xFF
        table = [b"" if i == eos_id else bytes([i]) for i in range(256)]
        super().__init__(table, eos_id, model=b"bytes")

    def encode(self, text: str) -> Ids:
        """The UTF-8 of ``text`` as uint8. Raises ValueError for lone surrogates."""
        return np.frombuffer(_utf8(text), dtype=np.uint8)

    def encode_utf8(self, data: bytes) -> Ids:
        """The bytes themselves."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes, without end-of-text ids. Raises ValueError for an unknown id."""
        if isinstance(ids, np.ndarray) and ids.dtype == np.uint8:  # many times as fast
            return bytes(ids[ids != self.eos_id].data)
        return super().decode_bytes(ids)

    def encode_prompt(self, data: bytes) -> list[int]:
        """Any bytes, as they are."""
        return list(data)


class SentencePieceTokenizer(_TableTokenizer):
    """A sentencepiece model with byte fallback, no dummy prefix and no normalisation.

    U+2581 goes past the model: it is how sentencepiece writes a space, so a real one would come
    back as a space, and is spelled in its three bytes. Other text is encoded in stretches of whole
    lines; no piece spans two lines. A line longer than a stretch is cut, before a space if it can
    be.
    """

    name = "sentencepiece"

    def __init__(self, model: bytes, source: str) -> None:
        """``source`` names the model in messages. Raises ValueError for a model that loses text."""
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
        """The ids of ``text`` as uint32. Raises ValueError for lone surrogates."""
        _utf8(text)
        ids: list[npt.NDArray[np.int32]] = []
        for number, part in enumerate(text.split("\u2581")):
            ids += [self._spelled] * bool(number)
            ids += map(self._processor.encode_as_numpy, _stretches(part))
        return np.concatenate(ids).view(np.uint32) if ids else np.zeros(0, np.uint32)

    def encode_utf8(self, data: bytes) -> Ids:
        """The ids of text given as UTF-8."""
        return self.encode(str(data, "utf-8"))

    def encode_prompt(self, data: bytes) -> list[int]:
        """The ids of UTF-8 bytes. Raises ValueError naming the first byte that is none."""
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
    """``text`` in stretches that are encoded one by one."""
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
    """Byte -> the id of its fallback piece ``<0x..>``."""
    ids = (i for i in range(processor.vocab_size()) if processor.is_byte(i))
    return {int(processor.id_to_piece(i)[1:-1], 16): i for i in ids}


def _piece_bytes(processor: Any, bytes_at: dict[int, int]) -> list[bytes]:
    """The bytes of text that every id stands for."""
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
    """The content of tokenizer.json."""

    kind: Literal["bytes", "sentencepiece"]
    vocab_size: int
    eos_id: int
    model_sha256: str
    vocab_sha256: str


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a folder (of a dataset, an export, or 'hourglass data tokenizer').

    Raises ValueError when it is missing, unreadable, or not the one that its hashes describe.
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
    """Ids in, text out, one by one: a character appears when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """U+FFFD when the ids so far end inside a character, else nothing."""
        return self._decoder.decode(b"", final=True)
