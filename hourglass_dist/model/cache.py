"""What generation remembers of the tokens read so far, at every level.

    Cache         one for a batch of rows
      LevelCache    one a level: keys and values of every layer, the bucket, the level inside
        KeyValues     keys and values of one attention
        BucketCache   the bucket that the level is filling, and what the last full one gave

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
    """Positions of each row's prompt."""
    window: int | None = None
    """C, where slots are a ring: position p lies in slot p % C. None: slots grow as needed."""
    keys_BHCK: Tensor = field(init=False)
    values_BHCK: Tensor = field(init=False)

    def fill(self, k_BHLK: Tensor, v_BHLK: Tensor) -> None:
        """Store the prompts' keys and values."""
        if self.window is not None:
            slots_C = torch.arange(self.window, device=k_BHLK.device)
            last_B1 = self.lengths_B[:, None] - 1
            index_BC = (last_B1 - (last_B1 - slots_C) % self.window).clamp(min=0)
            index = index_BC[:, None, :, None].expand(-1, k_BHLK.shape[1], -1, k_BHLK.shape[3])
            k_BHLK, v_BHLK = k_BHLK.gather(2, index), v_BHLK.gather(2, index)
        self.keys_BHCK, self.values_BHCK = k_BHLK.contiguous(), v_BHLK.contiguous()

    def append(self, rows_N: Tensor, position_N: Tensor, key: Tensor, value: Tensor) -> None:
        """Store (N, H, 1, K) of the newest positions of some rows."""
        slots_N = position_N if self.window is None else position_N % self.window
        missing = int(position_N.max()) + 1 - self.keys_BHCK.shape[2]
        if self.window is None and missing > 0:
            more = max(missing, self.keys_BHCK.shape[2], 16)
            self.keys_BHCK = _longer(self.keys_BHCK, more)
            self.values_BHCK = _longer(self.values_BHCK, more)
        self.keys_BHCK[rows_N, :, slots_N] = key[:, :, 0]
        self.values_BHCK[rows_N, :, slots_N] = value[:, :, 0]

    def attend(self, rows_N: Tensor, count_N: Tensor, query: Tensor, scale: float) -> Tensor:
        """Attention of queries (N, H, 1, K) to the first ``count_N`` positions of their rows."""
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
        """All that is kept."""
        yield self.keys_BHCK
        yield self.values_BHCK


def _longer(kept_BHCK: Tensor, more: int) -> Tensor:
    rows, heads, _, width = kept_BHCK.shape
    return torch.cat([kept_BHCK, kept_BHCK.new_zeros(rows, heads, more, width)], dim=2)


@dataclass
class BucketCache:
    """The bucket that a level is filling, and what the last full one gave."""

    lengths_B: Tensor
    """Positions of each row's prompt."""
    inner_lengths_B: Tensor
    """The same at the next level: the buckets that are full."""
    outside: KeyValues | None
    """Keys of all positions, for attention to everything earlier."""
    inside: KeyValues | None
    """Keys of all pooled tokens, for the same."""
    ring_BSD: Tensor = field(init=False)
    """``fixed``: the last S-1 positions, zeros before the first. ``spacelike``: the sum of those
    that the next bucket begins with."""
    size_B: Tensor = field(init=False)
    """``spacelike``: how many positions are in the sum."""
    block_BSD: Tensor = field(init=False)
    """What the last full bucket adds to a position: one for all, or one each."""

    def fill_ring(self, x_BLD: Tensor, rows: Rows, words: bool) -> None:
        """Keep the positions of the prompts that the next bucket begins with."""
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
        """Keep what the prompts' last full buckets add."""
        newest = (self.inner_lengths_B - 1)[:, None, None, None]
        self.block_BSD = block_BGSD.gather(1, newest.expand(-1, 1, *block_BGSD.shape[2:]))[:, 0]

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        yield from (self.ring_BSD, self.block_BSD)
        for known in (self.outside, self.inside):
            if known is not None:
                yield from known.tensors()


@dataclass
class LevelCache:
    """What one level, and all levels inside it, remember."""

    count_B: Tensor
    """Positions so far."""
    pre: list[KeyValues]
    post: list[KeyValues]
    bucket: BucketCache | None
    """None at the innermost level, as ``inner``."""
    inner: LevelCache | None

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        for known in (*self.pre, *self.post):
            yield from known.tensors()
        if self.bucket is not None and self.inner is not None:
            yield from self.bucket.tensors()
            yield from self.inner.tensors()


def empty_level(
    config: ModelConfig, layouts: Sequence[Rows], lengths_B: Tensor, index: int = 0
) -> LevelCache:
    """The cache of level ``index`` for prompts with these layouts (of all levels); ``lengths_B``
    are their positions at this level."""
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
    """What a batch of rows remembers, whatever their lengths."""

    def __init__(self, config: ModelConfig, lengths_B: Tensor) -> None:
        """Empty, for prompts of these lengths."""
        self.config = config
        self.lengths_B = lengths_B
        self.last_B: Tensor
        """The newest token of each row."""
        self.level: LevelCache

    def begin(self, tokens_BL: Tensor, layouts: Sequence[Rows]) -> LevelCache:
        """Make room for the prompts ``tokens_BL``, which the levels then fill in."""
        self.last_B = tokens_BL.gather(1, self.lengths_B[:, None] - 1)[:, 0]
        self.level = empty_level(self.config, layouts, self.lengths_B)
        return self.level

    @property
    def bytes(self) -> int:
        """Memory of keys, values and buckets."""
        return sum(t.numel() * t.element_size() for t in self.level.tensors())
