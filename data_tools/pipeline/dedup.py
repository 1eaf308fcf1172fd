"""The search for documents that repeat earlier ones.

    exact      sort the hashes of each bucket; of equal ones the first document stays
    bands      sort each band's hashes of the rest; equal ones make pairs with the first document
    clusters   pairs -> connected groups; the first document of each group stays

A document's number is task << 32 | row, so that numbers follow the order of the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.pipeline.documents import Documents
from data_tools.pipeline.inputs import Inputs
from data_tools.pipeline.workspace import Counts, Spec, Tick, Work

BUCKET_DOCUMENTS = 1 << 23
"""Approximate number of documents that one task sorts."""
_ROW_BITS = 32
Int64s = npt.NDArray[np.int64]


def _buckets(work: Work) -> int:
    documents: int = sum(counts["kept"] for counts in work.counts("read"))
    return -(-documents // BUCKET_DOCUMENTS)


def exact_specs(work: Work, inputs: Inputs) -> list[Spec]:
    """Return a task for each bucket of hashes."""
    count = _buckets(work) if work.settings.dedup.exact else 0
    return [{"bucket": bucket, "of": count} for bucket in range(count)]


def find_exact(work: Work, spec: Spec, folder: Path, tick: Tick) -> Counts:
    """Write the numbers of documents whose hash equals that of an earlier one, and count them."""
    numbers, hashes = [], []
    for task in range(len(work.tasks("read"))):
        digests = Documents(work.folder("read", task)).digests
        rows = np.flatnonzero(digests[:, 0] % np.uint64(spec["of"]) == spec["bucket"])
        numbers.append(rows + (task << _ROW_BITS))
        hashes.append(digests[rows])
        tick(documents=sum(map(len, numbers)))
    number, digest = np.concatenate(numbers), np.concatenate(hashes)
    order = np.lexsort((number, digest[:, 1], digest[:, 0]))
    digest = digest[order]
    same = np.concatenate([[False], (digest[1:] == digest[:-1]).all(axis=1)])
    np.save(folder / "duplicates.npy", np.sort(number[order[same]]))
    return {"duplicates": int(same.sum()), "groups": _sizes(np.cumsum(~same))}


def _sizes(group_of: Int64s) -> dict[str, int]:
    """Return the number of groups of each size above one."""
    sizes, counts = np.unique(np.unique(group_of, return_counts=True)[1], return_counts=True)
    pairs = zip(sizes.tolist(), counts.tolist(), strict=True)
    return {str(size): count for size, count in pairs if size > 1}


def band_specs(work: Work, inputs: Inputs) -> list[Spec]:
    """Return a task for each bucket of each band."""
    minhash = work.settings.dedup.minhash
    count = _buckets(work)
    return [
        {"band": band, "bucket": bucket, "of": count}
        for band in range(minhash.bands if minhash else 0)
        for bucket in range(count)
    ]


def find_pairs(work: Work, spec: Spec, folder: Path, tick: Tick) -> Counts:
    """Write the pairs (first, other) of documents that share the hash of a band, and count them."""
    numbers, hashes = [], []
    for task in range(len(work.tasks("read"))):
        documents = Documents(work.folder("read", task))
        rows, band = documents.band(spec["band"])
        new = ~_duplicates(work, "exact", task, len(documents))[rows]
        rows, band = rows[new], band[new]
        here = band % np.uint64(spec["of"]) == spec["bucket"]
        numbers.append(rows[here] + (task << _ROW_BITS))
        hashes.append(band[here])
        tick(documents=sum(map(len, numbers)))
    number, band = np.concatenate(numbers), np.concatenate(hashes)
    order = np.lexsort((number, band))
    number, band = number[order], band[order]
    begins = np.concatenate([[True], band[1:] != band[:-1]])[: len(band)]
    first = number[begins][np.cumsum(begins) - 1] if len(band) else number
    np.save(folder / "pairs.npy", np.stack([first[~begins], number[~begins]], axis=1))
    return {"pairs": int((~begins).sum())}


def cluster_specs(work: Work, inputs: Inputs) -> list[Spec]:
    """Return one task, or none without MinHash."""
    return [{}] if work.settings.dedup.minhash else []


def find_clusters(work: Work, spec: Spec, folder: Path, tick: Tick) -> Counts:
    """Connect pairs into groups, and write the numbers of all but the first of each group."""
    tick(pairs=0)
    tables = [np.load(path) for path in _outputs(work, "bands", "pairs.npy")]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *tables])
    numbers, flat = np.unique(pairs, return_inverse=True)
    first, other = flat.reshape(-1, 2).T
    group = np.arange(len(numbers))
    while True:  # in every round at least one group takes the number of an earlier one
        before = group.copy()
        np.minimum.at(group, first, before[other])
        np.minimum.at(group, other, before[first])
        np.minimum.at(group, before, group.copy())
        group = group[group]
        if np.array_equal(group, before):
            break
        tick(pairs=len(pairs))
    np.save(folder / "duplicates.npy", numbers[group != np.arange(len(group))])
    return {"duplicates": int((group != np.arange(len(group))).sum()), "groups": _sizes(group)}


def _outputs(work: Work, step: str, name: str) -> Iterator[Path]:
    for task in range(len(work.tasks(step))):
        yield work.folder(step, task) / name


def _duplicates(work: Work, step: str, task: int, size: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the ``size`` documents of a task that a step found to be duplicates."""
    found = np.zeros(size, bool)
    for path in _outputs(work, step, "duplicates.npy"):
        numbers: Any = np.load(path, mmap_mode="r")
        low, high = np.searchsorted(numbers, [task << _ROW_BITS, (task + 1) << _ROW_BITS])
        found[np.asarray(numbers[low:high]) - (task << _ROW_BITS)] = True
    return found


def parted(work: Work, task: int, size: int) -> dict[str, Int64s]:
    """Return the rows of a task's ``size`` documents by reason to drop them, "" for the kept."""
    exact = _duplicates(work, "exact", task, size)
    near = _duplicates(work, "clusters", task, size)
    reasons = {"": ~(exact | near), "exact duplicate": exact, "near duplicate": near}
    return {reason: np.flatnonzero(mask) for reason, mask in reasons.items()}
