"""Global shuffle: documents in sorted runs on disk, and the shards cut from their merge.

    write_run     documents of one task, sorted by their shuffle keys: KEYS, HASHES, STARTS, IDS
    plan_runs     how many tokens have keys below each of 4096 edges, over all runs
    gather        the tokens [begin, end) of the merge of all runs: one shard, on its own

All documents in the order of their keys, each followed by an eos, make one long sequence of tokens;
a shard is a stretch of it. A shard reads only one stretch of every run, so shards can be made in
any order, by any number of processes. How documents were divided among runs makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hourglass_dist.data.manifest import dtype_name, dtype_of
from hourglass_dist.data.tokenizer import Tokenizer
from hourglass_dist.data.write import require_ids

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]
_PIECE_BYTES = 1 << 20
"""Bytes per write. Linux takes up to ten times as long for one write of many megabytes."""
_EDGE_BITS = 12
_EDGES = np.arange(2**_EDGE_BITS, dtype=np.uint64) << np.uint64(64 - _EDGE_BITS)


def write_run(
    base: Path,
    keys: UInt64s,
    documents: Sequence[npt.NDArray[Any]],
    hashes: UInt64s,
    tokenizer: Tokenizer,
) -> None:
    """Write BASE.keys.npy, BASE.hashes.npy, BASE.starts.npy and BASE.ids; ``hashes`` are the
    content hashes of the documents.

    Raises ValueError for ids that the tokenizer does not know and for end-of-text ids.
    """
    order = np.argsort(keys, kind="stable")
    ids = np.concatenate([documents[i] for i in order]) if len(order) else np.zeros(0, np.uint8)
    require_ids(ids, tokenizer)
    lengths = np.fromiter((len(documents[i]) for i in order), np.int64, len(order))
    np.save(f"{base}.keys.npy", keys[order])
    np.save(f"{base}.hashes.npy", hashes[order])
    np.save(f"{base}.starts.npy", np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
    data = ids.astype(dtype_of(dtype_name(tokenizer.vocab_size)), copy=False).view(np.uint8).data
    with Path(f"{base}.ids").open("wb") as file:
        for begin in range(0, len(data), _PIECE_BYTES):
            file.write(data[begin : begin + _PIECE_BYTES])


@dataclass(frozen=True)
class Run:
    """Documents of one sorted run on disk."""

    base: Path

    @cached_property
    def keys(self) -> UInt64s:
        """Shuffle keys of its documents, sorted."""
        return _load(Path(f"{self.base}.keys.npy"))

    @cached_property
    def hashes(self) -> UInt64s:
        """Content hashes of its documents."""
        return _load(Path(f"{self.base}.hashes.npy"))

    @cached_property
    def starts(self) -> Int64s:
        """Positions where the ids of every document begin, and where the last document ends."""
        return _load(Path(f"{self.base}.starts.npy"))

    def at(self, edge: int) -> int:
        """Return the number of documents with keys below an edge."""
        below = edge < len(_EDGES)
        return int(np.searchsorted(self.keys, _EDGES[edge])) if below else len(self.keys)

    def ids(self, first: int, end: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return the ids of documents ``first`` to ``end``."""
        begin, stop = int(self.starts[first]), int(self.starts[end])
        path = Path(f"{self.base}.ids")
        found = np.fromfile(path, dtype, stop - begin, offset=begin * dtype.itemsize)
        if len(found) != stop - begin:
            raise ValueError(f"{path}: truncated: expected {stop - begin} ids, read {len(found)}")
        return found


def _load(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    return array


@dataclass(frozen=True)
class RunPlan:
    """Numbers of tokens and documents below every edge, over all runs."""

    tokens: Int64s
    """Number of tokens, one eos per document included; the last entry is the total."""
    documents: Int64s

    def save(self, path: Path) -> None:
        """Write the plan as a .npy file."""
        np.save(path, np.stack([self.tokens, self.documents]))

    @classmethod
    def load(cls, path: Path) -> RunPlan:
        """Return the plan that ``save`` wrote."""
        tokens, documents = np.load(path)
        return cls(tokens, documents)

    def shards(self, shard_tokens: int) -> int:
        """Return the number of shards of at most ``shard_tokens`` tokens."""
        return -(-int(self.tokens[-1]) // shard_tokens)


def plan_runs(runs: Sequence[Run]) -> RunPlan:
    """Return the numbers of tokens and documents below every edge."""
    tokens, documents = (np.zeros(len(_EDGES) + 1, np.int64) for _ in range(2))
    for run in runs:
        at = np.append(np.searchsorted(run.keys, _EDGES), len(run.keys))
        documents += at
        tokens += run.starts[at] + at
    return RunPlan(tokens, documents)


@dataclass(frozen=True)
class Stretch:
    """Consecutive tokens of the merge of all runs, and their documents."""

    tokens: npt.NDArray[Any]
    ends: Int64s
    """Positions in ``tokens`` after every eos."""
    hashes: UInt64s
    """Content hashes of the documents that end there."""
    first_document: int
    """Number of the document of the first token."""


def gather(
    runs: Sequence[Run], plan: RunPlan, begin: int, end: int, tokenizer: Tokenizer
) -> Stretch:
    """Return the tokens [begin, end) of the merge of all runs. Documents with equal keys keep the
    order of the runs, and of the run."""
    low = int(np.searchsorted(plan.tokens, begin, side="right")) - 1
    high = int(np.searchsorted(plan.tokens, end, side="left"))
    ranges = [(run.at(low), run.at(high)) for run in runs]
    keys = np.concatenate([run.keys[a:b] for run, (a, b) in zip(runs, ranges, strict=True)])
    sizes = np.concatenate(
        [np.diff(run.starts[a : b + 1]) + 1 for run, (a, b) in zip(runs, ranges, strict=True)]
    )
    order = np.argsort(keys, kind="stable")
    last = np.empty(len(order), np.int64)  # where every document ends in the merge
    last[order] = plan.tokens[low] + np.cumsum(sizes[order])
    first = last - sizes
    dtype = dtype_of(dtype_name(tokenizer.vocab_size))
    tokens = np.full(end - begin, tokenizer.eos_id, dtype)
    inside = (first < end) & (last > begin)
    place = 0
    for run, (a, b) in zip(runs, ranges, strict=True):
        here = slice(place, place + b - a)
        _copy(run, a, inside[here], first[here] - begin, last[here] - begin, tokens)
        place = here.stop
    hashes = np.concatenate([run.hashes[a:b] for run, (a, b) in zip(runs, ranges, strict=True)])
    ending = np.flatnonzero(inside & (last <= end))
    ending = ending[np.argsort(last[ending])]
    before = int(np.count_nonzero(last <= begin))
    return Stretch(tokens, last[ending] - begin, hashes[ending], int(plan.documents[low]) + before)


def _copy(
    run: Run, a: int, inside: npt.NDArray[np.bool_], first: Int64s, last: Int64s,
    tokens: npt.NDArray[Any],
) -> None:  # fmt: skip
    """Copy a run's documents that lie inside the stretch to their positions in it."""
    wanted = np.flatnonzero(inside)
    if not len(wanted):
        return
    begin, end = a + int(wanted[0]), a + int(wanted[-1]) + 1  # neighbours: sorted by key
    ids = run.ids(begin, end, tokens.dtype)
    starts = (run.starts[begin:end] - run.starts[begin]).tolist()
    for start, lo, hi in zip(starts, first[wanted].tolist(), last[wanted].tolist(), strict=True):
        cut = max(0, -lo)
        stop = min(hi - 1, len(tokens))  # the eos is there already
        if stop > lo + cut:
            tokens[lo + cut : stop] = ids[start + cut : start + stop - lo]
