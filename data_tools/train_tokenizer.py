"""Reproducible training of a lossless sentencepiece tokenizer.

    inputs -> documents -> lines of at most 4,192 bytes -> a draw of them -> sentencepiece
    -> tokenizer.json, tokenizer.model

Byte fallback encodes what no piece covers; there is no dummy prefix and no normalisation. The
result depends on the order of the input and on the number of threads, so both are fixed. Lines are
drawn here: sentencepiece (0.2.3) draws others in every process, whatever seed it is given.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Literal

import sentencepiece

from data_tools.live_line import Show, silent
from data_tools.sources.text_files import find_inputs, read_documents
from hourglass_dist.core.files import new_folder, require_new
from hourglass_dist.data.tokenizer import SentencePieceTokenizer, Tokenizer

Kind = Literal["unigram", "bpe"]

MAX_LINE_BYTES = 4192
"""Maximum bytes of a line: longer ones, which sentencepiece leaves out, are cut."""
_BETWEEN = re.compile("[\n\t\0\u2581\u2585]")
"""Characters that never occur inside a piece: two are reserved by sentencepiece."""


def train_tokenizer(
    inputs: Sequence[Path],
    out: Path,
    *,
    kind: Kind,
    vocab_size: int,
    separator: str | None = None,
    text_field: str = "text",
    max_lines: int = 1_000_000,
    seed: int = 0,
    show: Show = silent,
) -> Tokenizer:
    """Train on ``inputs``, write the new folder ``out`` and return the tokenizer.

    At most ``max_lines`` lines are used, drawn at random by ``seed``. Raises ValueError when
    ``out`` exists, the inputs are damaged or have no text, or sentencepiece cannot make
    ``vocab_size`` pieces of them.
    """
    require_new(out)
    files = find_inputs(inputs)
    documents = (text for file in files for text in read_documents(file, separator, text_field))
    with new_folder(out) as folder:
        every_line = (line for document in documents for line in lines_of(document))
        lines = _draw(every_line, max_lines, seed, show)
        if not lines:
            raise ValueError(f"{files[0]}: empty corpus: {len(files)} input files without any text")
        show(f"training on {len(lines):,} lines")
        tokenizer = SentencePieceTokenizer(train_on(lines, kind, vocab_size), str(out))
        tokenizer.save(folder)
    return tokenizer


def train_on(
    lines: Sequence[str], kind: Kind, vocab_size: int, option: str = "--vocab-size"
) -> bytes:
    """Return a sentencepiece model of exactly these lines, none of them empty.

    Raises ValueError, naming the ``option`` that gave ``vocab_size``, when the lines are too few or
    too many for it.
    """
    if not lines:
        raise ValueError("the tokenizer has no text to be trained on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            input_sentence_size=max(len(lines), 1000),  # must exceed 100
            shuffle_input_sentence=False,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,
            byte_fallback=True,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(error, vocab_size, len(lines), option)) from None
    return model.getvalue()


def lines_of(document: str) -> Iterator[str]:
    """Yield the non-empty lines of a document, cut to at most ``MAX_LINE_BYTES`` bytes."""
    longest = MAX_LINE_BYTES // 4  # characters: none has more than four bytes
    for line in _BETWEEN.split(document):
        for begin in range(0, len(line), longest):
            yield line[begin : begin + longest]


def _draw(lines: Iterable[str], size: int, seed: int, show: Show) -> list[str]:
    """Return ``size`` of the lines in their order, each equally likely (reservoir sampling)."""
    random = Random(seed)
    drawn: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        if number % 10_000 == 0:
            show(f"{number:,} lines")
        if number < size:
            drawn.append((number, line))
        elif (place := random.randrange(number + 1)) < size:
            drawn[place] = (number, line)
    return [line for _, line in sorted(drawn)]


def _explain(error: RuntimeError, vocab_size: int, lines: int, option: str) -> str:
    """Return sentencepiece's error as a message about the option that the user gave."""
    message = str(error)
    if limit := re.search(r"set it to a value <= (\d+)", message):
        return f"{option}: expected at most {limit[1]} for this corpus, given {vocab_size}"
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{option}: expected at least {limit[1]} for this corpus, given {vocab_size}"
    return f"sentencepiece failed on {lines} lines of text: {' '.join(message.split())}"
