"""Layout of documents and buckets in the rows of every level: integer tables, no weights.

    tokens, document ids, mask  ->  row_layouts  ->  one Rows for each level

A bucket ends at a *boundary*: a position at which it is complete. Its output is added from there
on, so that no position sees a later one. It holds the positions after the previous boundary, its
own boundary included. ``fixed`` pooling has boundaries at positions 0, s, 2s, ... of each document;
its buckets reach back s positions, with zeros before the start of the document. ``spacelike``
pooling has them at word starts. Rows without documents and words need no tables: there bucket i
ends at position i*s.

Legend: B rows, L positions of a level, G positions of the next one (buckets), S = shorten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hourglass_dist.model.settings import LevelConfig, ModelConfig


class Buckets(NamedTuple):
    """Tables between positions and the buckets of a row, where buckets are not regular."""

    end_BG: Tensor
    """Boundary of each bucket, a position; L where a row has fewer buckets."""
    into_BL: Tensor
    """Bucket that pools each position; G: none, as no boundary follows in its document."""
    out_BL: Tensor
    """Bucket whose output each position gets; G: none, as the row had no more room."""
    wanted: Tensor
    """Number of buckets of all rows if there were room for every boundary."""


class Rows(NamedTuple):
    """The layout of the rows of one level."""

    length: int
    """Length L of a row, in positions of this level."""
    position_BL: Tensor | None
    """Position from the start of the document; None: 0, 1, 2, ... in every row."""
    document_BL: Tensor | None
    """Document id of each position, not decreasing; None: one document in each row."""
    mask_BL: Tensor | None
    """True at keys that may be seen; only for encoders and ``legacy_mask``, else None."""
    shorten: int
    """Shorten factor S to the next level; 1 at the innermost."""
    size: int
    """Number G of positions of the next level."""
    buckets: Buckets | None
    """Tables of irregular buckets; None: bucket i ends at position i*S."""

    def ends(self, device: torch.device) -> Tensor:
        """Return the boundary of each bucket, (B or 1, G)."""
        if self.buckets is not None:
            return self.buckets.end_BG
        return torch.arange(0, self.length, self.shorten, device=device)[None]


def bucket_count(length: int, shorten: int) -> int:
    """Return G, the number of buckets for ``length`` positions of one document."""
    return -(-length // shorten)


def row_layouts(
    config: ModelConfig,
    tokens_BL: Tensor,
    documents_BL: Tensor | None = None,
    mask_BL: Tensor | None = None,
    shortens: Sequence[int] | None = None,
) -> list[Rows]:
    """Return the layout of every level, outermost first.

    ``documents_BL`` numbers the documents of packed rows. ``mask_BL`` (encoders and
    ``legacy_mask`` only) is True at real tokens. ``shortens`` replaces every level's ``shorten``,
    level 0's first.
    """
    position_BL = None
    if documents_BL is not None:
        position_BL = document_positions(documents_BL)
    factors = [*(shortens or [level.shorten for level in config.levels]), 1]
    layouts: list[Rows] = []
    length, words_BL = tokens_BL.shape[1], None
    for index, inner in enumerate([*config.levels[1:], None]):
        shorten = factors[index + 1]
        if inner is not None and inner.pooling == "spacelike":
            words_BL = word_starts(tokens_BL)
        rows = _rows(length, position_BL, documents_BL, mask_BL, shorten, inner, words_BL)
        layouts.append(rows)
        if inner is None:
            return layouts
        length, words_BL = rows.size, None
        position_BL, documents_BL = _inside(rows)
        if mask_BL is not None:
            mask_BL = cut(mask_BL, shorten, config.causal).any(dim=2)
    raise AssertionError("the innermost level ends the loop")


def missed_buckets(
    config: ModelConfig, tokens_BL: Tensor, documents_BL: Tensor | None = None
) -> tuple[int, int]:
    """Return (boundaries that got no bucket, all that wanted one), summed over all levels."""
    missed = wanted = 0
    for rows in row_layouts(config, tokens_BL, documents_BL):
        if rows.buckets is not None:
            wanted += int(rows.buckets.wanted)
            missed += int(rows.buckets.wanted - (rows.buckets.end_BG < rows.length).sum())
    return missed, wanted


def check_documents(documents_BL: Tensor, tokens_BL: Tensor) -> None:
    """Raise ValueError unless ids have the tokens' shape and do not decrease. The order is checked
    on the CPU only, where batches are made: elsewhere that would wait for the device."""
    if documents_BL.shape != tokens_BL.shape:
        raise ValueError(
            f"documents: expected shape {tuple(tokens_BL.shape)} as the tokens, "
            f"given {tuple(documents_BL.shape)}"
        )
    if documents_BL.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((documents_BL.diff(dim=1) < 0).any()):
        row = int((documents_BL.diff(dim=1) < 0).any(dim=1).nonzero()[0])
        raise ValueError(
            f"documents: row {row}: document ends out of order: ids must not decrease along a row"
        )


def document_positions(documents_BL: Tensor) -> Tensor:
    """Return positions counted from the start of each document, 0, 1, 2, ..., (B, L)."""
    index_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    return index_L - _first_of_document(documents_BL, index_L)


def _first_of_document(documents_BL: Tensor, index_L: Tensor) -> Tensor:
    begins_BL = documents_BL != documents_BL.roll(1, dims=1)
    begins_BL[:, 0] = True
    return torch.where(begins_BL, index_L, 0).cummax(dim=1).values


def word_starts(bytes_BL: Tensor) -> Tensor:
    """Return (B, L) bool, True where a byte of another kind follows a space-like byte.

    All bytes are space-like but ASCII letters, digits and the continuation bytes of UTF-8
    (SpaceByte). So English words, and each character of scripts written in longer UTF-8 sequences,
    begin a bucket. A position depends only on its own byte and the previous one.
    """
    table_V = torch.ones(256, dtype=torch.bool, device=bytes_BL.device)
    for first, last in ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0x80, 0xBF)):
        table_V[first : last + 1] = False
    spacelike_BL = table_V[bytes_BL]
    return F.pad(spacelike_BL[:, :-1], (1, 0), value=True) & ~spacelike_BL


def cut(x_BL: Tensor, shorten: int, causal: bool) -> Tensor:
    """Cut rows (B, L, ...) into regular buckets (B, G, S, ...), padded with zeros (False).

    A causal bucket i holds positions i*S-S+1 .. i*S, otherwise i*S .. i*S+S-1.
    """
    length = x_BL.shape[1]
    buckets = bucket_count(length, shorten)
    if causal:
        used = (buckets - 1) * shorten + 1
        front = x_BL.new_zeros((x_BL.shape[0], shorten - 1, *x_BL.shape[2:]))
        x_BL = torch.cat([front, x_BL[:, :used]], dim=1)
    elif length != buckets * shorten:
        missing = buckets * shorten - length
        back = x_BL.new_zeros((x_BL.shape[0], missing, *x_BL.shape[2:]))
        x_BL = torch.cat([x_BL, back], dim=1)
    return x_BL.reshape(x_BL.shape[0], buckets, shorten, *x_BL.shape[2:])


# --- buckets that are not regular ----------------------------------------------------------------


def _rows(
    length: int,
    position_BL: Tensor | None,
    document_BL: Tensor | None,
    mask_BL: Tensor | None,
    shorten: int,
    inner: LevelConfig | None,
    words_BL: Tensor | None,
) -> Rows:
    size, buckets = bucket_count(length, shorten), None
    if inner is not None and (document_BL is not None or words_BL is not None):
        size += inner.extra_buckets
        if position_BL is None:
            assert words_BL is not None
            position_BL = torch.arange(length, device=words_BL.device)[None]
        wanted_BL = position_BL % shorten == 0
        kept_BL = wanted_BL
        if words_BL is not None:
            wanted_BL = words_BL | (position_BL == 0)
            kept_BL = keep_boundaries(wanted_BL, position_BL, shorten, inner.extra_buckets)
        buckets = _buckets(kept_BL, document_BL, size, wanted_BL.sum())
        position_BL = None if document_BL is None else position_BL
    return Rows(length, position_BL, document_BL, mask_BL, shorten, size, buckets)


def keep_boundaries(wanted_BL: Tensor, position_BL: Tensor, shorten: int, extra: int) -> Tensor:
    """Return (B, L) bool, True at wanted boundaries that have room.

    Up to position p of a document there are at most p // S + 1 + ``extra``; further ones are left
    out until there is room again. The rule depends only on earlier positions of the document, not
    on the length of the row, so generation keeps the same ones.

    The number kept is k_t = min(k_{t-1} + wanted_t, room_t), from 0 on in each document. Without
    the recursion: wanted so far + min(0, min over earlier t of (room_t - wanted so far)).
    """
    length = wanted_BL.shape[1]
    index_L = torch.arange(length, device=position_BL.device)
    so_far_BL = wanted_BL.cumsum(dim=1)
    first_BL = (index_L - position_BL).expand_as(so_far_BL)
    so_far_BL = so_far_BL - so_far_BL.gather(1, first_BL) + 1  # a document begins with a boundary
    room_BL = position_BL // shorten + 1 + extra
    # each document is lowered by more than any room, so minima do not cross documents
    depth_BL = (position_BL == 0).cumsum(dim=1) * (2 * length + extra + 2)
    lowest_BL = (room_BL - so_far_BL - depth_BL).cummin(dim=1).values + depth_BL
    kept_so_far_BL = so_far_BL + lowest_BL.clamp(max=0)
    before_BL = F.pad(kept_so_far_BL[:, :-1], (1, 0)).masked_fill(position_BL == 0, 0)
    return kept_so_far_BL > before_BL


def _buckets(kept_BL: Tensor, document_BL: Tensor | None, size: int, wanted: Tensor) -> Buckets:
    rows, length = (document_BL if document_BL is not None else kept_BL).shape
    kept_BL = kept_BL.expand(rows, -1)
    after_BL = kept_BL.cumsum(dim=1)
    index_L = torch.arange(length, device=kept_BL.device)
    slot_BL = torch.where(kept_BL, (after_BL - 1).clamp(max=size), size)
    end_BG = index_L.new_full((rows, size + 1), length)
    end_BG = end_BG.scatter(1, slot_BL, index_L.expand(rows, -1))[:, :size]
    into_BL = (after_BL - kept_BL.long()).clamp(max=size)
    out_BL = (after_BL - 1).clamp(max=size - 1)
    end_of_none = end_BG.new_full((rows, 1), length)
    ends_BG = torch.cat([end_BG, end_of_none], dim=1)
    into_BL = torch.where(ends_BG.gather(1, into_BL) < length, into_BL, size)
    if document_BL is not None:
        into_BL = _same_document(document_BL, ends_BG, into_BL, size)
        out_BL = _same_document(document_BL, ends_BG, out_BL, size)
    return Buckets(end_BG, into_BL, out_BL, wanted)


def _same_document(document_BL: Tensor, ends_BG: Tensor, bucket_BL: Tensor, none: int) -> Tensor:
    """Return ``bucket_BL``, with ``none`` where the bucket belongs to another document."""
    end_BL = ends_BG.gather(1, bucket_BL)
    theirs_BL = document_BL.gather(1, end_BL.clamp(max=document_BL.shape[1] - 1))
    same_BL = (theirs_BL == document_BL) & (end_BL < document_BL.shape[1])
    return torch.where(same_BL, bucket_BL, none)


def _inside(rows: Rows) -> tuple[Tensor | None, Tensor | None]:
    """Return (position in the document, document id) of the positions of the next level.

    Slots that a row does not use come last. They belong to the last document, at a position that
    is no boundary, and no query sees them.
    """
    if rows.buckets is None or rows.document_BL is None:
        return None, None
    end_BG = rows.buckets.end_BG
    last_BG = end_BG.clamp(max=rows.length - 1)
    document_BG = rows.document_BL.gather(1, last_BG)
    position_BG = document_positions(document_BG)
    return torch.where(end_BG < rows.length, position_BG, 1), document_BG
