"""The resampling layers between two levels: downsampling by pooling, upsampling back.

    Downsample    x_BLD  ->  pool  ->  attention to the bucket, or to all before  ->  widen  ->  BGE
    Upsample   BGE  ->  narrow  ->  spread  ->  + the stream outside  ->  attention  ->  BLD

``layout.Rows`` holds the positions of the buckets.

Legend: B rows, L positions outside, S positions in a bucket, G buckets (the positions inside),
D width outside, E width inside, H heads, K width of one head, I = H*K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass_dist.model.attention import MaskRule, attend, takes_flex
from hourglass_dist.model.cache import BucketCache, KeyValues
from hourglass_dist.model.layers import FeedForward, Heads, LevelInputs, RotaryTable, drop
from hourglass_dist.model.layout import Rows, cut
from hourglass_dist.model.linear import Linear
from hourglass_dist.model.norms import make_norm
from hourglass_dist.model.pool import (
    Gate,
    LinearPool,
    LinearSpread,
    MeanPool,
    Pad,
    bucket_means,
    gather_buckets,
    lay_out,
)
from hourglass_dist.model.settings import LevelConfig, ModelConfig

MANY_KEYS = 8
"""Smallest bucket, in positions, for which the key projection is applied to the query instead of
every position. An early measurement found that slower at 2 positions and faster at 8; ``hourglass
bench model`` measures both."""


class HeadQueries(Linear):
    """Key projection (I, D) that can be applied to the query instead: q.(W x) = (W^T q).x."""

    def forward(self, x: Tensor, to_queries: bool = False) -> Tensor:
        """Project positions (B, G, S, D) to keys (B, G, S, I), or with ``to_queries`` queries
        (B, G, H, K) to (B, G, H, D)."""
        if not to_queries:
            return super().forward(x)
        weight_HKD = self.weight.view(*x.shape[-2:], -1)
        return torch.einsum("bghk,hkd->bghd", x, weight_HKD)


class HeadValues(Linear):
    """Value projection (I, D) that can follow the mixing: sum a_j (W x_j) = W (sum a_j x_j)."""

    def forward(self, x: Tensor, after_mixing: bool = False) -> Tensor:
        """Map positions (B, G, S, D) to (B, G, S, I), or mixed ones (B, G, H, D) to (B, G, I)."""
        if not after_mixing:
            return super().forward(x)
        weight_HKD = self.weight.view(x.shape[2], -1, x.shape[3])
        return torch.einsum("bghd,hkd->bghk", x, weight_HKD).flatten(2)


class BucketAttention(nn.Module):
    """Attention of pooled tokens to the positions of their own bucket (lucidrains).

    A bucket has one query and S keys. Where S is large, keys and values are never computed: the key
    projection is applied to the query, and the value projection to the mixed positions.
    """

    def __init__(self, config: ModelConfig, level: LevelConfig) -> None:
        super().__init__()
        self.heads = level.heads
        self.scale = level.dim_head**-0.5
        self.dropout = level.dropout
        self.norm = make_norm(config, level.dim)
        self.query = Linear(level.dim, level.inner, bias=False)
        self.key = HeadQueries(level.dim, level.inner, bias=False)
        self.value = HeadValues(level.dim, level.inner, bias=False)
        self.out = Linear(level.inner, level.dim, bias=config.bias)

    def forward(self, pooled_BGD: Tensor, x_BGSD: Tensor, present_BGS: Tensor | None) -> Tensor:
        """Map (B, G, D), (B, G, S, D) to (B, G, D). Only ``present_BGS`` positions are seen.

        An empty bucket holds zeros, which get equal weights.
        """
        many = x_BGSD.shape[2] >= MANY_KEYS
        query_BGI = self.query(self.norm(pooled_BGD)) * self.scale
        query_BGHK = query_BGI.unflatten(-1, (self.heads, -1))
        if many:
            scores_BGHS = self.key(query_BGHK, to_queries=True) @ x_BGSD.transpose(-1, -2)
        else:
            key_BGSHK = self.key(x_BGSD).unflatten(-1, (self.heads, -1))
            scores_BGHS = (query_BGHK.unsqueeze(2) * key_BGSHK).sum(-1).transpose(-1, -2)
        if present_BGS is not None:
            lowest = torch.finfo(scores_BGHS.dtype).min
            scores_BGHS = scores_BGHS.masked_fill(~present_BGS.unsqueeze(2), lowest)
        weights_BGHS = drop(scores_BGHS.softmax(dim=-1), self.dropout, self.training)
        if many:
            mixed_BGI = self.value(weights_BGHS @ x_BGSD, after_mixing=True)
        else:
            value_BGSHK = self.value(x_BGSD).unflatten(-1, (self.heads, -1))
            weights_BGSH1 = weights_BGHS.transpose(-1, -2).unsqueeze(-1)
            mixed_BGI = (weights_BGSH1 * value_BGSHK).sum(dim=2).flatten(2)
        out_BGD: Tensor = self.out(mixed_BGI)
        return pooled_BGD + out_BGD


class EarlierAttention(nn.Module):
    """Attention from one level to another, over all earlier positions (paper, section 3.3).

    Pooled tokens attend to outer positions, positions to inner pooled tokens. Queries and keys are
    normed by the caller; the output is added to the queries as given.
    """

    def __init__(self, config: ModelConfig, level: LevelConfig) -> None:
        super().__init__()
        self.query = Linear(level.dim, level.inner, bias=False)
        self.key_value = Linear(level.dim, 2 * level.inner, bias=False)
        self.heads = Heads(config, level)
        self.out = Linear(level.inner, level.dim, bias=config.bias)
        self.dropout = level.dropout
        self.branch_dropout = level.dropout if config.residual_dropout else 0.0

    def project(self, x_BQD: Tensor, rotary: RotaryTable | None) -> Tensor:
        """Return the queries of all heads, (B, H, Q, K or 2K)."""
        return self.heads.queries(self.query(x_BQD), rotary)

    def project_keys(self, x_BJD: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all heads, each (B, H, J, K or 2K)."""
        k_BJI, v_BJI = self.key_value(x_BJD).chunk(2, dim=-1)
        return self.heads.keys(k_BJI, rotary), self.heads.values(v_BJI)

    def finish(self, x_BQD: Tensor, mixed_BHQK: Tensor) -> Tensor:
        """Project the heads' output (B, H, Q, K or 2K) and add it to the queries (B, Q, D)."""
        out_BQD: Tensor = self.out(self.heads.join(mixed_BHQK))
        return x_BQD + drop(out_BQD, self.branch_dropout, self.training)

    def forward(
        self,
        x_BQD: Tensor,
        keys_BJD: Tensor,
        rule: MaskRule,
        rotary: tuple[RotaryTable | None, RotaryTable | None],
        known: KeyValues | None = None,
    ) -> Tensor:
        """Map (B, Q, D), (B, J, D) to (B, Q, D). ``rotary``: tables of queries and of keys;
        ``known``, if given, is filled with keys and values."""
        dropout = self.dropout if self.training else 0.0
        mask = rule.mask(x_BQD, takes_flex(x_BQD, self.dropout))
        k, v = self.project_keys(keys_BJD, rotary[1])
        if known is not None:
            known.fill(k, v)
        mixed = attend(self.project(x_BQD, rotary[0]), k, v, mask, self.heads.scale, dropout)
        return self.finish(x_BQD, mixed)


class Downsample(nn.Module):
    """Downsampling from level ``index`` to the next: (B, L, D) -> (B, G, E)."""

    attention: BucketAttention | EarlierAttention

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        outer, inner = config.levels[index], config.levels[index + 1]
        self.causal = config.causal
        self.legacy = config.legacy_mask
        self.words = inner.pooling == "spacelike"
        self.attends = config.attention_resampling
        linear = config.downsampling == "linear"
        self.pool = LinearPool(outer.dim, inner.shorten, config.bias) if linear else MeanPool()
        if self.attends == "earlier":
            self.key_norm = make_norm(config, outer.dim)
            self.query_norm = make_norm(config, outer.dim)
            self.attention = EarlierAttention(config, outer)
        elif self.attends == "bucket":
            self.attention = BucketAttention(config, outer)
        if self.attends != "none":
            self.feed_forward = FeedForward(config, outer)
        self.widen: nn.Module | None = None
        if inner.dim != outer.dim:
            pads = config.width_change == "pad"
            self.widen = (
                Pad(outer.dim, inner.dim) if pads else Linear(outer.dim, inner.dim, config.bias)
            )

    def forward(
        self,
        x_BLD: Tensor,
        inputs: LevelInputs,
        bucket: BucketCache | None = None,
    ) -> Tensor:
        """Map (B, L, D) to (B, G, E). ``bucket``, if given, keeps the start of the next bucket."""
        rows, cross = inputs.rows, inputs.cross
        x_BLD = self.prepare(x_BLD)
        if bucket is not None:
            bucket.fill_ring(x_BLD, rows, self.words)
        if self.attends == "earlier":
            assert cross is not None
            pooled_BGD = self.query_norm(self._pool(x_BLD, rows)[0])
            rotary = cross.inside, cross.outside
            known = None if bucket is None else bucket.outside
            pooled_BGD = self.attention(pooled_BGD, x_BLD, cross.down, rotary, known)
        else:
            pooled_BGD, x_BGSD, present_BGS = self._pool(x_BLD, rows)
            if self.attends == "bucket":
                pooled_BGD = self.attention(pooled_BGD, x_BGSD, present_BGS)
        return self.finish(pooled_BGD)

    def prepare(self, x_BLD: Tensor) -> Tensor:
        """Return the positions (B, L, D) to pool and attend to: normed for attention to earlier."""
        if self.attends == "earlier":
            x_BLD = self.key_norm(x_BLD)
        return x_BLD

    def finish(self, pooled_BGD: Tensor) -> Tensor:
        """Apply the feed-forward layer and the change of width: (B, G, D) -> (B, G, E)."""
        if self.attends != "none":
            pooled_BGD = self.feed_forward(pooled_BGD)
        return self.widen(pooled_BGD) if self.widen is not None else pooled_BGD

    def _pool(self, x_BLD: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return (pooled tokens, the buckets if they have one size, which of their positions count;
        None: all do, zeros before a document too)."""
        if self.words:
            return bucket_means(x_BLD, rows), None, None
        if self.causal and not self.legacy:
            x_BGSD = gather_buckets(x_BLD, rows)
            return self.pool(x_BGSD, None), x_BGSD, None
        x_BGSD = cut(x_BLD, rows.shorten, self.causal)
        valid_BL = rows.mask_BL
        if valid_BL is None and (self.causal or rows.length % rows.shorten == 0):
            return self.pool(x_BGSD, None), x_BGSD, None
        if valid_BL is None:
            valid_BL = x_BLD.new_ones(x_BLD.shape[:2], dtype=torch.bool)
        present_BGS = cut(valid_BL, rows.shorten, self.causal)
        if self.legacy:
            return self.pool(x_BGSD, None), x_BGSD, present_BGS
        x_BGSD = x_BGSD.masked_fill(~present_BGS.unsqueeze(-1), 0.0)
        return self.pool(x_BGSD, present_BGS), x_BGSD, present_BGS


class SingleKeyAttention(nn.Module):
    """Attention of positions to the pooled token of their bucket: one key, so every weight is 1.

    The result is W_o W_v v + b_o for every query, computed once for each pooled token. The query
    side (``norm``, ``query``, ``key``) has no effect and no gradient; it is kept frozen, so that
    weights of the reference can be imported and exported completely.
    """

    def __init__(self, config: ModelConfig, level: LevelConfig) -> None:
        super().__init__()
        self.heads = level.heads
        self.dropout = level.dropout
        self.norm = make_norm(config, level.dim)
        self.query = Linear(level.dim, level.inner, bias=False)
        self.key = Linear(level.dim, level.inner, bias=False)
        self.value = Linear(level.dim, level.inner, bias=False)
        self.out = Linear(level.inner, level.dim, bias=config.bias)
        for unused in (self.norm, self.query, self.key):
            unused.requires_grad_(False)

    def forward(self, inner_BGD: Tensor, shorten: int) -> Tensor:
        """Map (B, G, D) to (B, G, 1, D), the same for all positions; with dropout (B, G, S, D)."""
        value_BG1I = self.value(inner_BGD).unsqueeze(2)
        if self.dropout and self.training:  # each position drops whole heads: its only weight
            value_BG1I = value_BG1I * self._kept(value_BG1I, shorten)
        out: Tensor = self.out(value_BG1I)
        return out

    def _kept(self, value_BG1I: Tensor, shorten: int) -> Tensor:
        rows, buckets, _, inner = value_BG1I.shape
        ones_BGSH = value_BG1I.new_ones(rows, buckets, shorten, self.heads)
        return F.dropout(ones_BGSH, self.dropout).repeat_interleave(inner // self.heads, dim=-1)


class Upsample(nn.Module):
    """Upsampling to level ``index``: (B, G, E) and its positions (B, L, D) -> (B, L, D)."""

    attention: SingleKeyAttention | EarlierAttention

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        outer, inner = config.levels[index], config.levels[index + 1]
        self.dim = outer.dim
        self.narrow: nn.Module | None = None
        if inner.dim != outer.dim and config.width_change == "projection":
            self.narrow = Linear(inner.dim, outer.dim, config.bias)
        linear = config.upsampling == "linear"
        self.spread = LinearSpread(outer.dim, inner.shorten, config.bias) if linear else None
        self.attends = config.attention_resampling
        if self.attends == "earlier":
            self.key_norm = make_norm(config, outer.dim)
            self.query_norm = make_norm(config, outer.dim)
            self.attention = EarlierAttention(config, outer)
        elif self.attends == "bucket":
            self.attention = SingleKeyAttention(config, outer)
        if self.attends != "none":
            self.feed_forward = FeedForward(config, outer)
        normed = config.stack_norms and self.attends != "bucket"  # that one ends in a feed-forward
        self.branch_norm = make_norm(config, outer.dim) if normed else None
        self.gate = Gate(outer.dim) if config.skip == "gated" else None

    def forward(
        self,
        inner_BGE: Tensor,
        x_BLD: Tensor,
        inputs: LevelInputs,
        bucket: BucketCache | None = None,
    ) -> Tensor:
        """Map (B, G, E), (B, L, D) to (B, L, D). ``bucket``, if given, keeps the newest block."""
        rows, cross = inputs.rows, inputs.cross
        keys_BGD, block_BGSD = self.blocks(inner_BGE, rows.shorten)
        if bucket is not None:
            bucket.fill_block(block_BGSD)
        added_BLD = lay_out(block_BGSD, rows)
        if self.attends == "earlier":
            assert cross is not None
            rotary = cross.outside, cross.inside
            known = None if bucket is None else bucket.inside
            added_BLD = self.attention(x_BLD + added_BLD, keys_BGD, cross.up, rotary, known)
        return self.combine(x_BLD, added_BLD)

    def blocks(self, inner_BGE: Tensor, shorten: int) -> tuple[Tensor, Tensor]:
        """Return (keys (B, G, D) for attention, blocks (B, G, S or 1, D) to add to the positions of
        each bucket)."""
        inner_BGD = inner_BGE[..., : self.dim] if self.narrow is None else self.narrow(inner_BGE)
        if self.attends == "earlier":
            inner_BGD = self.key_norm(inner_BGD)
        block = inner_BGD.unsqueeze(2) if self.spread is None else self.spread(inner_BGD)
        if self.attends == "earlier":
            block = self.query_norm(block)
        elif self.attends == "bucket":
            block = block + self.attention(inner_BGD, shorten)
        elif self.branch_norm is not None:
            block = self.branch_norm(block)
        return inner_BGD, block

    def combine(self, x_BLD: Tensor, added_BLD: Tensor) -> Tensor:
        """Add the branch to the outer stream, both (B, L, D), with gate and feed-forward layer."""
        skipped_BLD = x_BLD if self.gate is None else self.gate(x_BLD)
        if self.attends == "bucket":
            out: Tensor = self.feed_forward(skipped_BLD + added_BLD)
            return out
        if self.attends == "earlier":
            added_BLD = self.feed_forward(added_BLD)
            if self.branch_norm is not None:
                added_BLD = self.branch_norm(added_BLD)
        return skipped_BLD + added_BLD
