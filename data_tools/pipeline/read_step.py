"""The first step: inputs -> records -> kept documents, each cleaned independently.

A record that is not text is quarantined: a line of quarantine.jsonl has file, position and reason.
A document that a filter drops is counted by reason. Records read = kept + dropped + quarantined.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_tools.datasets.stats import bins_of
from data_tools.datasets.write import describe_input, hash_inputs
from data_tools.pipeline.clean import Cleaner
from data_tools.pipeline.documents import DocumentWriter
from data_tools.pipeline.inputs import InputFile
from data_tools.pipeline.settings import Source
from data_tools.pipeline.workspace import Counts, Spec, Tick, Work
from data_tools.sources.readers import read_records
from data_tools.sources.text_files import Problem

QUARANTINE_FILE = "quarantine.jsonl"


def read(work: Work, spec: Spec, folder: Path, tick: Tick) -> Counts:
    """Read the parts of a task and return the counts. Raises ValueError for a damaged file."""
    source = next(s for s in work.settings.sources if s.name == spec["source"])
    reader = _Reader(work, source, folder, tick)
    inputs = []  # the files that end in this task
    for number, about, begin, end in spec["parts"]:
        file = InputFile(**about)
        file.require_unchanged()
        reader.read_part(number, Path(file.path), begin, end)
        if end in (None, file.bytes):
            inputs.append(describe_input(Path(file.path)))
        file.require_unchanged()
    return reader.finish() | {"source": source.name, "inputs": inputs}


class _Reader:
    def __init__(self, work: Work, source: Source, folder: Path, tick: Tick) -> None:
        self._work, self._source, self._folder, self._tick = work, source, folder, tick
        self._format = source.text_field, source.separator
        self._cleaner = Cleaner(work.settings)
        self._documents = DocumentWriter(folder, self._cleaner.bands)
        self._quarantine = (folder / QUARANTINE_FILE).open("w")
        self._samples = Samples()
        self._dropped: Counter[str] = Counter()
        self._dropped_bytes: Counter[str] = Counter()
        self._records = self._kept = self._quarantined = self._bytes = self._kept_bytes = 0
        self._sizes: list[int] = []

    def read_part(self, number: int, path: Path, begin: int, end: int | None) -> None:
        """Read a file or a part of it."""
        for position, text in read_records(path, *self._format, begin, end):
            self._records += 1
            if isinstance(text, Problem):
                self._put_aside(text)
            else:
                self._take(number, position, text)
            if self._records % 32 == 0:
                self._tick(
                    documents=self._records, bytes=self._bytes, kept=self._kept,
                    dropped=self._dropped.total(), quarantined=self._quarantined,
                )  # fmt: skip

    def _take(self, number: int, position: int, text: str) -> None:
        data = text.encode()
        size = len(data)
        self._bytes += size
        self._sizes.append(size)
        cleaned, reason = self._cleaner.clean(text, size)
        if reason:
            self._dropped[reason] += 1
            self._dropped_bytes[reason] += size
            name = f"{self._source.name} {number} {position}".encode()
            key = xxhash.xxh64_intdigest(name, self._work.settings.seed)
            self._samples.add(key, self._source.name, reason, number, position, text)
            return
        if cleaned is not text:
            data = cleaned.encode()
        digest, bands = self._cleaner.keys(cleaned, data)
        masked = self._cleaner.mask(cleaned)
        if masked is not cleaned:
            data = masked.encode()
        self._documents.add((number, position, self._records - 1), data, digest, bands)
        self._kept += 1
        self._kept_bytes += len(data)

    def _put_aside(self, problem: Problem) -> None:
        self._quarantined += 1
        line = {
            "source": self._source.name,
            "file": str(problem.path),
            "position": problem.position,
            "line": problem.line,
            "reason": problem.what,
            "excerpt": problem.excerpt.decode("utf-8", "backslashreplace"),
        }
        self._quarantine.write(json.dumps(line) + "\n")

    def finish(self) -> Counts:
        """Write the remaining outputs and return the counts."""
        self._documents.close()
        self._quarantine.close()
        self._samples.write(self._folder)
        return {
            "records": self._records,
            "bytes": self._bytes,
            "kept": self._kept,
            "kept_bytes": self._kept_bytes,
            "quarantined": self._quarantined,
            "dropped": dict(sorted(self._dropped.items())),
            "dropped_bytes": dict(sorted(self._dropped_bytes.items())),
            "sizes": bins_of(np.array(self._sizes, np.int64)),
        }


def hash_of_inputs(work: Work, source: str) -> str:
    """Return the hash of the name, size and content of every input file of a source, in order."""
    read = (counts for counts in work.counts("read") if counts["source"] == source)
    return hash_inputs(file for counts in read for file in counts["inputs"])


class Samples:
    """The documents with the smallest keys, for the report: independent of the cut into tasks."""

    KEPT = 20
    CHARACTERS = 600

    def __init__(self) -> None:
        self._found: dict[bool, list[tuple[int, dict[str, Any]]]] = {True: [], False: []}

    def add(
        self, key: int, source: str, reason: str, number: int, position: int, text: str
    ) -> None:
        """Offer a document that was dropped for ``reason``, or kept if that is empty."""
        found = self._found[not reason]
        if len(found) < 4 * self.KEPT or key < found[self.KEPT - 1][0]:
            about = {"key": key, "source": source, "reason": reason, "file": number}
            about |= {"position": position, "characters": len(text)}
            about["text"] = text[: self.CHARACTERS].encode("utf-8", "replace").decode()
            found.append((key, about))
            if len(found) > 8 * self.KEPT:
                found.sort(key=lambda each: each[0])
                del found[self.KEPT :]

    def write(self, folder: Path) -> None:
        """Write ``KEPT`` kept and as many dropped documents into samples.json."""
        for found in self._found.values():
            found.sort(key=lambda each: each[0])
        chosen = [about for found in self._found.values() for _, about in found[: self.KEPT]]
        (folder / "samples.json").write_text(json.dumps(chosen))
