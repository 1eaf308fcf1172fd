"""The cleaning of single documents: repair, normalisation, filters, keys that find duplicates,
masking.

The filters and the masking are datatrove's, with words split at white space instead of by spaCy:
6 times as fast on English, with the same documents kept except 2 of 5,400.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.pipeline.filters.c4_filters import C4QualityFilter
from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter
from datatrove.pipeline.formatters.pii import PIIFormatter
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer

from data_tools.pipeline.settings import Filters, Language, MinHash, Normalise, Pii, Prepare

_SHINGLES_AT_ONCE = 4096
"""Shingles that are hashed at once: all of a long text would fill the memory."""
LONGEST_FOR_RULES = 1_000_000
"""Longest text that rules see, characters. They count n-grams: minutes and GB for longer ones."""


class Words(WordTokenizer):  # type: ignore[misc]
    """A datatrove tokenizer: words are split at white space, sentences after .!? marks."""

    def word_tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """Return the sentences of a text."""
        return [text[begin:end] for begin, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Return the (begin, end) of every sentence, in characters."""
        ends = [match.end() for match in re.finditer(r"[.!?]+[\"')\]]*(?=\s|$)", text)]
        if text[ends[-1] if ends else 0 :].strip():
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True))


class Cleaner:
    """The filters and changes of the settings, applied to each document independently."""

    def __init__(self, settings: Prepare) -> None:
        """Load the filters. Raises ValueError when the language model cannot be read."""
        self._normalise = _normaliser(settings.normalise)
        self._drop = _droppers(settings.filters)
        self._filters = settings.filters
        self._mask = _masker(settings.pii)
        minhash = settings.dedup.minhash
        self._signature = Signature(minhash, settings.seed) if minhash else None
        self.bands = minhash.bands if minhash else 0

    def clean(self, text: str, size: int) -> tuple[str, str]:
        """Return the cleaned text and the reason to drop it, "" when it is kept; ``size`` is the
        UTF-8 size of ``text`` in bytes."""
        if self._normalise:
            for change in self._normalise:
                text = change(text)
            size = len(text.encode())
        if not text:
            return text, "empty"
        if size < self._filters.min_bytes:
            return text, "too short"
        if size > self._filters.max_bytes:
            return text, "too long"
        for drop in self._drop:
            text, reason = drop(text)
            if reason:
                return text, reason
        return text, ""

    def keys(self, text: str, data: bytes) -> tuple[bytes, npt.NDArray[np.uint64] | None]:
        """Return the 128-bit hash of ``data``, the text's UTF-8, and the hashes of its bands."""
        digest = xxhash.xxh3_128_digest(data)
        return digest, self._signature(text) if self._signature else None

    def mask(self, text: str) -> str:
        """Return the text with personal data masked."""
        return self._mask(text) if self._mask else text


def _normaliser(settings: Normalise) -> list[Callable[[str], str]]:
    steps: list[Callable[[str], str]] = []
    if settings.repair:
        import ftfy

        config = ftfy.TextFixerConfig(
            unescape_html=False, uncurl_quotes=False, fix_character_width=False,
            fix_latin_ligatures=False, fix_line_breaks=False, remove_terminal_escapes=False,
            normalization=None,
        )  # fmt: skip
        steps.append(lambda text: ftfy.fix_text(text, config))
    if settings.unicode == "NFC":
        steps.append(lambda text: unicodedata.normalize("NFC", text))
    return steps


Dropper = Callable[[str], tuple[str, str]]


def _droppers(settings: Filters) -> list[Dropper]:
    makers: dict[str, Any] = {
        "gopher_repetition": GopherRepetitionFilter,
        "gopher_quality": GopherQualityFilter,
        "c4": C4QualityFilter,
        "fineweb": FineWebQualityFilter,
    }
    words = Words("white space")
    found = [_by_language(settings.language)] if settings.language else []
    return found + [_by_rule(name, makers[name](language=words)) for name in settings.rules]


def _by_rule(name: str, rule: Any) -> Dropper:
    def drop(text: str) -> tuple[str, str]:
        if len(text) > LONGEST_FOR_RULES:
            return text, f"{name}: longer than {LONGEST_FOR_RULES:,} characters"
        if not text.strip():
            return text, f"{name}: no words"
        document = Document(text=text, id="")
        result = rule.filter(document)
        kept, reason = result if isinstance(result, tuple) else (result, "")
        return document.text, "" if kept else f"{name}: {reason.removeprefix('gopher_')}"

    return drop


def _by_language(settings: Language) -> Dropper:
    import fasttext

    try:
        model = fasttext.load_model(settings.model)
    except (ValueError, OSError) as error:
        raise ValueError(f"{settings.model}: no fastText model: {error}") from None
    labels = {label.removeprefix("__label__") for label in model.get_labels()}
    for label in settings.keep:
        if label not in labels:
            few = ", ".join(sorted(labels)[:8])
            raise ValueError(
                f"filters.language.keep: {settings.model} does not know {label!r}; it knows {few}"
            )

    def drop(text: str) -> tuple[str, str]:
        found = model.f.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict")
        score, label = found[0] if found else (0.0, "__label__none")
        kept = label.removeprefix("__label__") in settings.keep and score >= settings.min_score
        return text, "" if kept else "language"

    return drop


def _masker(settings: Pii) -> Callable[[str], str] | None:
    if not (settings.emails or settings.ips):
        return None
    masking = PIIFormatter(
        remove_emails=settings.emails,
        remove_ips=settings.ips,
        email_replacement="email@example.com",  # a single one: independent of other documents
        ip_replacement="22.214.171.124",
    )

    def mask(text: str) -> str:
        if settings.emails and "@" not in text:  # the pattern is slow: quadratic without an @
            return masking.ip_replacer.replace(text) if settings.ips else text
        return str(masking.format(text))

    return mask


class Signature:
    """A function from text to the hashes of its bands; near duplicates share one of them."""

    def __init__(self, settings: MinHash, seed: int) -> None:
        self._words = settings.words
        self._hasher = MinhashDedupSignature(
            "/dev/null",
            MinhashConfig(settings.words, settings.bands, settings.rows, seed=seed + 1),
            language=Words("white space"),
        )

    def __call__(self, text: str) -> npt.NDArray[np.uint64] | None:
        """Return a hash for each band, or None for a text with fewer words than a shingle."""
        config = self._hasher.config
        words = simplify_text(text, config.norm_config).split()
        encoded = (" ".join(n_gram).encode() for n_gram in ngrams(words, self._words))
        shingles = np.fromiter(map(xxhash.xxh64_intdigest, encoded), np.uint64)
        if not len(shingles):
            return None
        least: npt.NDArray[np.uint64] | None = None
        for begin in range(0, len(shingles), _SHINGLES_AT_ONCE):
            part = shingles[begin : begin + _SHINGLES_AT_ONCE, None]
            hashes = np.array(self._hasher.get_signature(part), np.uint64)
            least = hashes if least is None else np.minimum(least, hashes)
        assert least is not None
        digests = [xxhash.xxh64_intdigest(band.tobytes()) for band in least]
        return np.array(digests, np.uint64)
