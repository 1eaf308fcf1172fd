"""The cache of generation: what each level keeps of the tokens read so far.

    Cache         one for a batch of rows
      LevelCache    one a level: keys and values of every layer, the bucket, the inner level's cache
        KeyValues     keys and values of one attention
        BucketCache   the bucket that is being filled, and the output of the last full one

The forward pass fills an empty cache with a prompt; ``decode.step`` adds to it token by token.

Legend: B rows, N rows that read a position now, L positions of a prompt, C slots of a cache, S
positions in a bucket, G buckets, H heads, K width of a head, D width of a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hourglass_dist.model.attention import AttentionMask, additive, attend
from hourglass_dist.model.layout import Rows
from hourglass_dist.model.pool import take
from hourglass_dist.model.settings import ModelConfig


@dataclass
class KeyValues:
    """Keys and values of one attention."""

    lengths_B: Tensor
    """Length of each row's prompt, in positions of the level."""
    window: int | None = None
    """Slots C of a ring buffer: position p lies in slot p % C. None: slots are added as needed."""
    keys_BHCK: Tensor = field(init=False)
    values_BHCK: Tensor = field(init=False)

    def fill(self, k_BHLK: Tensor, v_BHLK: Tensor) -> None:
        """Store the keys and values of the prompts, or the last C of each row in a ring."""
        if self.window is not None:
            slots_C = torch.arange(self.window, device=k_BHLK.device)
            last_B1 = self.lengths_B[:, None] - 1
            index_BC = (last_B1 - (last_B1 - slots_C) % self.window).clamp(min=0)
            index = index_BC[:, None, :, None].expand(-1, k_BHLK.shape[1], -1, k_BHLK.shape[3])
            k_BHLK, v_BHLK = k_BHLK.gather(2, index), v_BHLK.gather(2, index)
        self.keys_BHCK, self.values_BHCK = k_BHLK.contiguous(), v_BHLK.contiguous()

    def append(self, rows_N: Tensor, position_N: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values (N, H, 1, K) of positions ``position_N`` of the rows ``rows_N``."""
        slots_N = position_N if self.window is None else position_N % self.window
        missing = int(position_N.max()) + 1 - self.keys_BHCK.shape[2]
        if self.window is None and missing > 0:
            more = max(missing, self.keys_BHCK.shape[2], 16)
            self.keys_BHCK = _longer(self.keys_BHCK, more)
            self.values_BHCK = _longer(self.values_BHCK, more)
        self.keys_BHCK[rows_N, :, slots_N] = key[:, :, 0]
        self.values_BHCK[rows_N, :, slots_N] = value[:, :, 0]

    def attend(self, rows_N: Tensor, count_N: Tensor, query: Tensor, scale: float) -> Tensor:
        """Attend with queries (N, H, 1, K) to what is stored of their rows' first ``count_N``."""
        used = min(int(count_N.max()), self.keys_BHCK.shape[2])
        keys, values = self.keys_BHCK[:, :, :used], self.values_BHCK[:, :, :used]
        if len(rows_N) < len(keys):
            keys, values = keys[rows_N], values[rows_N]
        mask = None
        if len(rows_N) > 1:
            mask = additive(torch.arange(used, device=query.device) < count_N[:, None], query)
            mask = mask[:, None, None]
        return attend(query, keys, values, AttentionMask(False, None, mask), scale)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the stored keys and values."""
        yield self.keys_BHCK
        yield self.values_BHCK


def _longer(kept_BHCK: Tensor, more: int) -> Tensor:
    rows, heads, _, width = kept_BHCK.shape
    return torch.cat([kept_BHCK, kept_BHCK.new_zeros(rows, heads, more, width)], dim=2)


@dataclass
class BucketCache:
    """The bucket that a level is filling, and the output of the last full one."""

    lengths_B: Tensor
    """Length of each row's prompt, in positions of the level."""
    inner_lengths_B: Tensor
    """Length of each row's prompt at the next level: the number of full buckets."""
    outside: KeyValues | None
    """Keys and values of all positions; None without attention to all earlier positions."""
    inside: KeyValues | None
    """Keys and values of all pooled tokens; None without that attention."""
    ring_BSD: Tensor = field(init=False)
    """Start of the next bucket. ``fixed``: the last S-1 positions, zeros before the first.
    ``spacelike``: the sum of its positions so far, (B, 1, D)."""
    size_B: Tensor = field(init=False)
    """Number of positions in that sum (``spacelike``)."""
    block_BSD: Tensor = field(init=False)
    """Vectors that the last full bucket adds to positions: one for all, (B, 1, D), or one each."""

    def fill_ring(self, x_BLD: Tensor, rows: Rows, words: bool) -> None:
        """Store the last positions of the prompts (B, L, D), with which the next bucket begins."""
        lengths_B, length = self.lengths_B, x_BLD.shape[1]
        if words:
            newest_B1 = (self.inner_lengths_B - 1)[:, None]
            index_L = torch.arange(length, device=x_BLD.device)
            ends_BG = rows.ends(x_BLD.device).expand(len(x_BLD), -1)
            after_BL = (index_L > ends_BG.gather(1, newest_B1)) & (index_L < lengths_B[:, None])
            self.ring_BSD = (x_BLD * after_BL.unsqueeze(-1)).sum(dim=1, keepdim=True)
            self.size_B = after_BL.sum(dim=1)
            return
        index_BS = lengths_B[:, None] - torch.arange(rows.shorten - 1, 0, -1, device=x_BLD.device)
        ring_BSD = take(x_BLD, index_BS.clamp(min=0))
        self.ring_BSD = ring_BSD.masked_fill((index_BS < 0).unsqueeze(-1), 0.0)
        self.size_B = torch.zeros_like(lengths_B)

    def fill_block(self, block_BGSD: Tensor) -> None:
        """Store the vectors of the prompts' last full buckets, of (B, G, S or 1, D)."""
        newest = (self.inner_lengths_B - 1)[:, None, None, None]
        self.block_BSD = block_BGSD.gather(1, newest.expand(-1, 1, *block_BGSD.shape[2:]))[:, 0]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the stored activations, keys and values."""
        yield from (self.ring_BSD, self.block_BSD)
        for known in (self.outside, self.inside):
            if known is not None:
                yield from known.tensors()


@dataclass
class LevelCache:
    """The cache of one level and of all levels inside it."""

    count_B: Tensor
    """Number of positions that each row has read at this level."""
    pre: list[KeyValues]
    post: list[KeyValues]
    bucket: BucketCache | None
    """State of the bucket; None, as ``inner``, at the innermost level."""
    inner: LevelCache | None

    def tensors(self) -> Iterator[Tensor]:
        """Yield the stored tensors of this level and of those inside it."""
        for known in (*self.pre, *self.post):
            yield from known.tensors()
        if self.bucket is not None and self.inner is not None:
            yield from self.bucket.tensors()
            yield from self.inner.tensors()


def empty_level(
    config: ModelConfig, layouts: Sequence[Rows], lengths_B: Tensor, index: int = 0
) -> LevelCache:
    """Return an empty cache of level ``index`` for prompts with these layouts (of all levels);
    ``lengths_B`` are their lengths in positions of this level."""
    own, rows = config.levels[index], layouts[index]
    level = LevelCache(
        lengths_B.clone(),
        [KeyValues(lengths_B, own.window) for _ in range(own.pre)],
        [KeyValues(lengths_B, own.window) for _ in range(own.post)],
        None,
        None,
    )
    if index + 1 < len(config.levels):
        inner_B = (rows.ends(lengths_B.device) < lengths_B[:, None]).sum(dim=1)
        outside = inside = None
        if config.attention_resampling == "earlier":
            outside, inside = KeyValues(lengths_B), KeyValues(inner_B)
        level.bucket = BucketCache(lengths_B, inner_B, outside, inside)
        level.inner = empty_level(config, layouts, inner_B, index + 1)
    return level


class Cache:
    """The cache of a batch of rows, which may differ in length."""

    def __init__(self, config: ModelConfig, lengths_B: Tensor) -> None:
        """Make an empty cache for prompts of ``lengths_B`` tokens."""
        self.config = config
        self.lengths_B = lengths_B
        self.last_B: Tensor
        """Newest token of each row."""
        self.level: LevelCache

    def begin(self, tokens_BL: Tensor, layouts: Sequence[Rows]) -> LevelCache:
        """Return the empty caches of the levels for the prompts ``tokens_BL``."""
        self.last_B = tokens_BL.gather(1, self.lengths_B[:, None] - 1)[:, 0]
        self.level = empty_level(self.config, layouts, self.lengths_B)
        return self.level

    @property
    def bytes(self) -> int:
        """Memory of keys, values and buckets, bytes."""
        return sum(t.numel() * t.element_size() for t in self.level.tensors())
