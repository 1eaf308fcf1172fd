"""Resampling without attention: gather, pool and widen buckets; spread them and lay them out.

Regular buckets are slices of the row; others are gathered and scattered by the tables of
``layout.Buckets``.

Legend: B rows, L positions outside, S positions in a bucket, G buckets (the positions inside),
D width outside, E width inside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass_dist.model.layout import Rows, cut
from hourglass_dist.model.linear import Linear


def gather_buckets(x_BLD: Tensor, rows: Rows) -> Tensor:
    """Return the S positions up to each boundary, (B, G, S, D), zeros before the document."""
    if rows.buckets is None or rows.position_BL is None:
        return cut(x_BLD, rows.shorten, causal=True)
    end_BG1 = rows.buckets.end_BG.unsqueeze(-1)
    back_S = torch.arange(1 - rows.shorten, 1, device=x_BLD.device)
    position_BG1 = rows.position_BL.gather(1, end_BG1[..., 0].clamp(max=rows.length - 1)).unsqueeze(
        -1
    )
    there_BGS = (position_BG1 + back_S >= 0) & (end_BG1 < rows.length)
    index_BGS = (end_BG1 + back_S).clamp(0, rows.length - 1)
    x_BND = take(x_BLD, index_BGS.flatten(1))
    x_BGSD = x_BND.view(*index_BGS.shape, x_BLD.shape[2])
    return x_BGSD.masked_fill(~there_BGS.unsqueeze(-1), 0.0)


def bucket_means(x_BLD: Tensor, rows: Rows) -> Tensor:
    """Return the means of buckets of any size, (B, G, D); zeros where there is no bucket."""
    assert rows.buckets is not None
    into_BL = rows.buckets.into_BL
    total_BGD = x_BLD.new_zeros(x_BLD.shape[0], rows.size + 1, x_BLD.shape[2])
    total_BGD = total_BGD.scatter_add(1, into_BL.unsqueeze(-1).expand_as(x_BLD), x_BLD)
    count_BG = into_BL.new_zeros(total_BGD.shape[:2])
    count_BG = count_BG.scatter_add(1, into_BL, torch.ones_like(into_BL)).clamp(min=1)
    return (total_BGD / count_BG.unsqueeze(-1))[:, : rows.size]


def take(x_BLD: Tensor, index_BN: Tensor) -> Tensor:
    """Return the positions ``index_BN`` of each row, (B, L, D) -> (B, N, D).

    ``gather`` would save all of ``x_BLD`` for the backward pass; this saves the indices only.
    """
    rows, length, _ = x_BLD.shape
    begin_B1 = torch.arange(rows, device=x_BLD.device)[:, None] * length
    taken_ND = x_BLD.flatten(0, 1).index_select(0, (index_BN + begin_B1).flatten())
    return taken_ND.view(rows, -1, x_BLD.shape[2])


class MeanPool(nn.Module):
    """Mean of a bucket over its present positions."""

    def forward(self, x_BGSD: Tensor, present_BGS: Tensor | None) -> Tensor:
        """Map (B, G, S, D) to (B, G, D). Positions that are not ``present_BGS`` hold zeros."""
        if present_BGS is None:
            return x_BGSD.mean(dim=2)
        count_BG1 = present_BGS.sum(dim=2).clamp(min=1).unsqueeze(-1)
        return x_BGSD.sum(dim=2) / count_BG1


class LinearPool(nn.Module):
    """Learned projection of the concatenated positions of a bucket."""

    def __init__(self, dim: int, shorten: int, bias: bool) -> None:
        super().__init__()
        self.proj = Linear(dim * shorten, dim, bias)

    @torch.no_grad()
    def init_as_mean(self) -> None:
        """Set the weight so that the output is the mean of the bucket (without the bias)."""
        dim, width = self.proj.weight.shape
        eye_DD = torch.eye(dim, dtype=self.proj.weight.dtype, device=self.proj.weight.device)
        self.proj.weight.copy_(eye_DD.repeat(1, width // dim) * (dim / width))

    def forward(self, x_BGSD: Tensor, present_BGS: Tensor | None) -> Tensor:
        """Map (B, G, S, D) to (B, G, D). Positions that are not ``present_BGS`` hold zeros."""
        pooled_BGD: Tensor = self.proj(x_BGSD.flatten(2))
        return pooled_BGD


class Pad(nn.Module):
    """Change to a larger width by a learned vector, the same at every position."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(wide - narrow))

    def forward(self, x_BGD: Tensor) -> Tensor:
        """Append the vector: (B, G, D) -> (B, G, E)."""
        return torch.cat([x_BGD, self.vector.expand(*x_BGD.shape[:-1], -1)], dim=-1)


class Gate(nn.Module):
    """Learned factor for each channel, 1 at initialization."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Scale the channels of (B, L, D)."""
        return x_BLD * self.weight


class LinearSpread(nn.Module):
    """Learned projection of a pooled token to the S positions of its bucket."""

    def __init__(self, dim: int, shorten: int, bias: bool) -> None:
        super().__init__()
        self.shorten = shorten
        self.proj = Linear(dim, dim * shorten, bias)

    @torch.no_grad()
    def init_as_repeat(self) -> None:
        """Set the weight so that every position gets the pooled token (without the bias)."""
        dim = self.proj.weight.shape[1]
        eye_DD = torch.eye(dim, dtype=self.proj.weight.dtype, device=self.proj.weight.device)
        self.proj.weight.copy_(eye_DD.repeat(self.shorten, 1))

    def forward(self, inner_BGD: Tensor) -> Tensor:
        """Map (B, G, D) to (B, G, S, D)."""
        spread_BGSD: Tensor = self.proj(inner_BGD).unflatten(-1, (self.shorten, -1))
        return spread_BGSD


def lay_out(block_BGSD: Tensor, rows: Rows) -> Tensor:
    """Give each position its part of its bucket, (B, G, S or 1, D) -> (B, L, D); zeros if none."""
    buckets = rows.buckets
    if buckets is None:
        block_BGSD = block_BGSD.expand(-1, -1, rows.shorten, -1)
        return block_BGSD.flatten(1, 2)[:, : rows.length]
    parts = block_BGSD.shape[2]
    nothing_B1SD = block_BGSD.new_zeros(block_BGSD.shape[0], 1, *block_BGSD.shape[2:])
    flat_BND = torch.cat([block_BGSD, nothing_B1SD], dim=1).flatten(1, 2)
    index_BL = buckets.out_BL * parts
    if parts > 1:
        begin_BL = F.pad(buckets.end_BG, (0, 1)).gather(1, buckets.out_BL)
        offset_BL = torch.arange(rows.length, device=block_BGSD.device) - begin_BL
        index_BL = index_BL + offset_BL.clamp(max=parts - 1)
    return take(flat_BND, index_BL)
