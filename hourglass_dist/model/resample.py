"""Between two levels: cut into buckets, pool, let pooled tokens attend to their bucket; and back.

Legend: B rows, L positions outside, S = ``shorten`` positions in a bucket, G = ceil(L / S) buckets
(the positions inside), D width, H heads, K width of one head, I = H*K.

A causal bucket i holds positions i*S-S+1 .. i*S, so that what comes out of it may be added to
positions i*S .. i*S+S-1 and nothing sees the future. Bucket 0 begins with S-1 zeros. A bucket that
is not causal holds positions i*S .. i*S+S-1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass_dist.config import ModelConfig
from hourglass_dist.model.layers import FeedForward
from hourglass_dist.model.linear import Linear


def bucket_count(length: int, shorten: int) -> int:
    """G, the buckets that ``length`` positions need, causal (i*S < L) or not."""
    return -(-length // shorten)


def to_buckets(x_BL: Tensor, shorten: int, causal: bool, before: float = 0.0) -> Tensor:
    """(B, L, ...) -> (B, G, S, ...), filled with ``before`` in front and with 0 (False) behind."""
    length = x_BL.shape[1]
    buckets = bucket_count(length, shorten)
    if causal:
        used = (buckets - 1) * shorten + 1
        front = x_BL.new_full((x_BL.shape[0], shorten - 1, *x_BL.shape[2:]), before)
        x_BL = torch.cat([front, x_BL[:, :used]], dim=1)
    elif length != buckets * shorten:
        missing = buckets * shorten - length
        back = x_BL.new_zeros((x_BL.shape[0], missing, *x_BL.shape[2:]))
        x_BL = torch.cat([x_BL, back], dim=1)
    return x_BL.reshape(x_BL.shape[0], buckets, shorten, *x_BL.shape[2:])


class MeanPool(nn.Module):
    """The mean of a bucket over the positions that are there."""

    def forward(self, x_BGSD: Tensor, present_BGS: Tensor | None) -> Tensor:
        """(B, G, S, D) -> (B, G, D). Positions that are not ``present_BGS`` hold zeros."""
        if present_BGS is None:
            return x_BGSD.mean(dim=2)
        count_BG1 = present_BGS.sum(dim=2).clamp(min=1).unsqueeze(-1)
        return x_BGSD.sum(dim=2) / count_BG1


class LinearPool(nn.Module):
    """A learned projection of the positions of a bucket, side by side."""

    def __init__(self, dim: int, shorten: int) -> None:
        super().__init__()
        self.proj = Linear(dim * shorten, dim)

    @torch.no_grad()
    def init_as_naive(self) -> None:
        """Become the mean of the bucket."""
        dim, width = self.proj.weight.shape
        eye_DD = torch.eye(dim, dtype=self.proj.weight.dtype, device=self.proj.weight.device)
        self.proj.weight.copy_(eye_DD.repeat(1, width // dim) * (dim / width))
        self.proj.bias.zero_()

    def forward(self, x_BGSD: Tensor, present_BGS: Tensor | None) -> Tensor:
        """(B, G, S, D) -> (B, G, D). Positions that are not ``present_BGS`` hold zeros."""
        pooled_BGD: Tensor = self.proj(x_BGSD.flatten(2))
        return pooled_BGD


class HeadQueries(nn.Linear):
    """A key projection (I, D) that is applied to the query instead: q.(W x) = (W^T q).x."""

    def forward(self, q_BGHK: Tensor) -> Tensor:
        """(B, G, H, K) -> (B, G, H, D): for each head, the direction in which it looks."""
        weight_HKD = self.weight.view(*q_BGHK.shape[-2:], -1)
        return torch.einsum("bghk,hkd->bghd", q_BGHK, weight_HKD)


class HeadValues(nn.Linear):
    """A value projection (I, D) applied after the mixing: sum_j a_j (W x_j) = W (sum_j a_j x_j)."""

    def forward(self, mixed_BGHD: Tensor) -> Tensor:
        """(B, G, H, D) -> (B, G, I)."""
        weight_HKD = self.weight.view(mixed_BGHD.shape[2], -1, mixed_BGHD.shape[3])
        return torch.einsum("bghd,hkd->bghk", mixed_BGHD, weight_HKD).flatten(2)


class BucketAttention(nn.Module):
    """Pooled tokens attend to the positions of their own bucket.

    A bucket has one query and S keys, so keys and values are never made at full resolution: the
    query is taken through the key projection, and the mixed positions through the value projection.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = config.dim_head**-0.5
        self.dropout = config.attn_dropout
        inner = config.heads * config.dim_head
        self.norm = nn.LayerNorm(config.dim)
        self.query = Linear(config.dim, inner, bias=False)
        self.key = HeadQueries(config.dim, inner, bias=False)
        self.value = HeadValues(config.dim, inner, bias=False)
        self.out = Linear(inner, config.dim)

    def forward(self, pooled_BGD: Tensor, x_BGSD: Tensor, present_BGS: Tensor | None) -> Tensor:
        """(B, G, D), (B, G, S, D) -> (B, G, D). Only positions that are ``present_BGS`` are seen.

        A bucket with nothing in it holds zeros, and mixes them evenly.
        """
        query_BGI = self.query(self.norm(pooled_BGD)) * self.scale
        looks_BGHD = self.key(query_BGI.unflatten(-1, (self.heads, -1)))
        scores_BGHS = looks_BGHD @ x_BGSD.transpose(-1, -2)
        if present_BGS is not None:
            lowest = torch.finfo(scores_BGHS.dtype).min
            scores_BGHS = scores_BGHS.masked_fill(~present_BGS.unsqueeze(2), lowest)
        weights_BGHS = scores_BGHS.softmax(dim=-1)
        if self.dropout:
            weights_BGHS = F.dropout(weights_BGHS, self.dropout, self.training)
        out_BGD: Tensor = self.out(self.value(weights_BGHS @ x_BGSD))
        return pooled_BGD + out_BGD


class Shorten(nn.Module):
    """One level in: (B, L, D) -> (B, G, D)."""

    def __init__(self, config: ModelConfig, shorten: int) -> None:
        super().__init__()
        self.shorten = shorten
        self.causal = config.causal
        linear = config.resampling == "linear"
        self.pool = LinearPool(config.dim, shorten) if linear else MeanPool()
        self.attends = config.attention_resampling
        if self.attends:
            self.attention = BucketAttention(config)
            self.feed_forward = FeedForward(config)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, G, D). ``valid_BL`` is True at real tokens; None: all of them are."""
        x_BGSD = to_buckets(x_BLD, self.shorten, self.causal)
        present_BGS = self._present(x_BLD, valid_BL)
        if present_BGS is not None:
            x_BGSD = x_BGSD.masked_fill(~present_BGS.unsqueeze(-1), 0.0)
        pooled_BGD: Tensor = self.pool(x_BGSD, present_BGS)
        if self.attends:
            pooled_BGD = self.feed_forward(self.attention(pooled_BGD, x_BGSD, present_BGS))
        return pooled_BGD

    def _present(self, x_BLD: Tensor, valid_BL: Tensor | None) -> Tensor | None:
        """Which positions of a bucket count; None: all. The zeros in front of a causal row do."""
        if valid_BL is None:
            if self.causal or x_BLD.shape[1] % self.shorten == 0:
                return None
            valid_BL = x_BLD.new_ones(x_BLD.shape[:2], dtype=torch.bool)
        return to_buckets(valid_BL, self.shorten, self.causal, before=True)

    def shorten_mask(self, valid_BL: Tensor | None) -> Tensor | None:
        """(B, L) -> (B, G): buckets with at least one real token."""
        if valid_BL is None:
            return None
        return to_buckets(valid_BL, self.shorten, self.causal, before=False).any(dim=2)


class LinearSpread(nn.Module):
    """A learned projection of a pooled token to the S positions of its bucket."""

    def __init__(self, dim: int, shorten: int) -> None:
        super().__init__()
        self.shorten = shorten
        self.proj = Linear(dim, dim * shorten)

    @torch.no_grad()
    def init_as_naive(self) -> None:
        """Become a repeat."""
        dim = self.proj.weight.shape[1]
        eye_DD = torch.eye(dim, dtype=self.proj.weight.dtype, device=self.proj.weight.device)
        self.proj.weight.copy_(eye_DD.repeat(self.shorten, 1))
        self.proj.bias.zero_()

    def forward(self, valley_BGD: Tensor) -> Tensor:
        """(B, G, D) -> (B, G, S, D)."""
        spread_BGSD: Tensor = self.proj(valley_BGD).unflatten(-1, (self.shorten, -1))
        return spread_BGSD


class ValleyAttention(nn.Module):
    """Positions attend to the pooled token of their bucket: one key, so every weight is 1.

    The result is W_o W_v v + b_o whatever the query, and is made once for each pooled token. The
    query side (``norm``, ``query``, ``key``) has no influence and no gradient; it is kept frozen,
    so that weights of the reference go in and come out whole.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attn_dropout
        inner = config.heads * config.dim_head
        self.norm = nn.LayerNorm(config.dim)
        self.query = Linear(config.dim, inner, bias=False)
        self.key = Linear(config.dim, inner, bias=False)
        self.value = Linear(config.dim, inner, bias=False)
        self.out = Linear(inner, config.dim)
        for unused in (self.norm, self.query, self.key):
            unused.requires_grad_(False)

    def forward(self, valley_BGD: Tensor, shorten: int) -> Tensor:
        """(B, G, D) -> (B, G, 1, D), alike for all positions; with dropout (B, G, S, D)."""
        value_BG1I = self.value(valley_BGD).unsqueeze(2)
        if self.dropout and self.training:  # each position drops whole heads: its only weight
            value_BG1I = value_BG1I * self._kept(value_BG1I, shorten)
        out: Tensor = self.out(value_BG1I)
        return out

    def _kept(self, value_BG1I: Tensor, shorten: int) -> Tensor:
        rows, buckets, _, inner = value_BG1I.shape
        ones_BGSH = value_BG1I.new_ones(rows, buckets, shorten, self.heads)
        return F.dropout(ones_BGSH, self.dropout).repeat_interleave(inner // self.heads, dim=-1)


class Lengthen(nn.Module):
    """One level out: (B, G, D) and the positions outside -> (B, L, D)."""

    def __init__(self, config: ModelConfig, shorten: int) -> None:
        super().__init__()
        self.shorten = shorten
        self.spread = LinearSpread(config.dim, shorten) if config.resampling == "linear" else None
        self.attends = config.attention_resampling
        if self.attends:
            self.attention = ValleyAttention(config)
            self.feed_forward = FeedForward(config)

    def forward(self, valley_BGD: Tensor, x_BLD: Tensor) -> Tensor:
        """(B, G, D), (B, L, D) -> (B, L, D)."""
        added = valley_BGD.unsqueeze(2) if self.spread is None else self.spread(valley_BGD)
        if self.attends:
            added = added + self.attention(valley_BGD, self.shorten)
        added_BGSD = added.expand(-1, -1, self.shorten, -1)
        x_BLD = x_BLD + added_BGSD.flatten(1, 2)[:, : x_BLD.shape[1]]
        if self.attends:
            x_BLD = self.feed_forward(x_BLD)
        return x_BLD
