"""The layers of one level: self-attention and feed-forward, each with a norm and a residual.

Legend: B rows, L positions, D width of the residual stream, H heads, K width of one head
(``dim_head``), I = H*K, F hidden width (``ff_mult * dim``), P = K/2 frequencies.

Every module reads only its own parameters, or those of submodules through their ``forward``: ZeRO-3
gathers parameters around ``forward`` calls, so any other access would see empty tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass_dist.model.attention import AttentionMask, MaskRule, attend, self_attention_mask
from hourglass_dist.model.cache import KeyValues
from hourglass_dist.model.layout import Rows
from hourglass_dist.model.linear import Linear
from hourglass_dist.model.norms import RMSNorm, make_norm
from hourglass_dist.model.settings import LevelConfig, ModelConfig

ROTARY_BASE = 10_000
"""Base of the frequencies of rotary and relative positions."""


class RotaryTable(NamedTuple):
    """Sine and cosine of every position's angle at every frequency, (B or 1, 1, L, P)."""

    sin: Tensor
    cos: Tensor


class CrossLevelInputs(NamedTuple):
    """Masks and positions for attention between a level and the next one. A pooled token has the
    position of the boundary of its bucket."""

    down: MaskRule
    """Mask rule for pooled tokens that attend to positions."""
    up: MaskRule
    """Mask rule for positions that attend to pooled tokens."""
    outside: RotaryTable | None
    """Rotary table of the positions; None, as ``inside``, unless positions are relative."""
    inside: RotaryTable | None
    """Rotary table of the pooled tokens."""


class LevelInputs(NamedTuple):
    """Layout, masks and positions of one forward pass, for the modules of one level."""

    rows: Rows
    mask: AttentionMask
    rotary: RotaryTable | None
    """Rotary table of this level's positions; None where positions are learned."""
    cross: CrossLevelInputs | None
    """Inputs of attention to all earlier positions; None at the innermost level or without it."""


def rotary_table(position_BL: Tensor, dim_head: int, like: Tensor) -> RotaryTable:
    """Return the table of ``position_BL`` (B or 1, L; any unit) in the dtype of ``like``."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponent_P = torch.arange(0, dim_head, 2, device=position_BL.device, dtype=wide) / dim_head
    angle_B1LP = position_BL[:, None, :, None] * ROTARY_BASE**-exponent_P
    return RotaryTable(angle_B1LP.sin().to(like.dtype), angle_B1LP.cos().to(like.dtype))


def level_inputs(config: ModelConfig, layouts: Sequence[Rows], x_BLD: Tensor) -> list[LevelInputs]:
    """Return the inputs of every level, outermost first; ``x_BLD`` gives dtype and device."""
    inputs, stride = [], 1
    for index, (level, rows) in enumerate(zip(config.levels, layouts, strict=True)):
        rotary = cross = None
        if config.positions != "learned":
            unit = stride if config.positions == "relative" else 1
            index_1L = torch.arange(rows.length, device=x_BLD.device)[None]
            rotary = rotary_table(index_1L * unit, level.dim_head, x_BLD)  # only distances matter
        mask = self_attention_mask(
            rows,
            level.window,
            x_BLD,
            causal=config.causal,
            legacy=config.legacy_mask,
            dropout=level.dropout,
        )
        if config.attention_resampling == "earlier" and index + 1 < len(layouts):
            cross = _cross_level_inputs(config, level, stride, rows, x_BLD)
        inputs.append(LevelInputs(rows, mask, rotary, cross))
        stride *= rows.shorten
    return inputs


def _cross_level_inputs(
    config: ModelConfig, level: LevelConfig, stride: int, rows: Rows, x_BLD: Tensor
) -> CrossLevelInputs:
    index_1L = torch.arange(rows.length, device=x_BLD.device)[None]
    end_BG, documents_BG = rows.ends(x_BLD.device), None
    if rows.document_BL is not None:
        documents_BG = rows.document_BL.gather(1, end_BG.clamp(max=rows.length - 1))
    outside = inside = None
    if config.positions == "relative":
        outside = rotary_table(index_1L * stride, level.dim_head, x_BLD)
        inside = rotary_table(end_BG * stride, level.dim_head, x_BLD)
    return CrossLevelInputs(
        MaskRule(end_BG, index_1L, documents_BG, rows.document_BL),
        MaskRule(index_1L, end_BG, rows.document_BL, documents_BG),
        outside,
        inside,
    )


def rotate(x_BHLK: Tensor, rotary: RotaryTable) -> Tensor:
    """Rotate (B, H, L, K) by position; the two halves of a head are the coordinates of P planes."""
    one, two = x_BHLK.chunk(2, dim=-1)
    return torch.cat(
        [one * rotary.cos - two * rotary.sin, two * rotary.cos + one * rotary.sin], dim=-1
    )


class RelativePositions(nn.Module):
    """Transformer-XL's relative positions (Dai et al. 2019, arXiv 1901.02860) as dot products.

    The score of a query at position i and a key at position j is (q + u).k + (q + v).W r(i-j), with
    r the sines and cosines of the distance. By the addition theorems the second term is the product
    of a vector of the query and its position with the sines and cosines of the key's position. So
    fused kernels can be used, without a table of distances. Distances are in tokens: positions
    times the stride. r is as wide as a head (in the paper: as the model), and each attention has
    its own u and v.
    """

    def __init__(self, level: LevelConfig) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.zeros(level.inner))
        self.place = nn.Parameter(torch.zeros(level.inner))
        self.weight = nn.Parameter(torch.zeros(level.heads, level.dim_head, level.dim_head))

    def forward(self, q_BHLK: Tensor, rotary: RotaryTable) -> Tensor:
        """Map queries (B, H, L, K) to (B, H, L, 2K), to be multiplied with ``with_rotary`` keys."""
        position_H1K, content_H1K = (
            vector.view(len(self.weight), 1, -1) for vector in (self.place, self.content)
        )
        on_sin, on_cos = ((q_BHLK + position_H1K) @ self.weight).chunk(2, dim=-1)
        turned = (
            on_cos * rotary.sin - on_sin * rotary.cos,
            on_sin * rotary.sin + on_cos * rotary.cos,
        )
        return torch.cat([q_BHLK + content_H1K, *turned], dim=-1)


def with_rotary(k_BHLK: Tensor, rotary: RotaryTable) -> Tensor:
    """Return (B, H, L, 2K): each key, then the sines and cosines of its position."""
    rows, heads = k_BHLK.shape[:2]
    beside = (table.expand(rows, heads, -1, -1) for table in rotary)
    return torch.cat([k_BHLK, *beside], dim=-1)


class Heads(nn.Module):
    """Norms and positions for the queries and keys of all heads; values padded to their width."""

    def __init__(self, config: ModelConfig, level: LevelConfig) -> None:
        super().__init__()
        self.heads = level.heads
        self.scale = level.dim_head**-0.5
        self.rope = config.positions == "rope"
        self.q_norm = RMSNorm(level.dim_head) if config.qk_norm else None
        self.k_norm = RMSNorm(level.dim_head) if config.qk_norm else None
        self.relative = RelativePositions(level) if config.positions == "relative" else None

    def split(self, x_BLI: Tensor) -> Tensor:
        """Split the heads: (B, L, I) -> (B, H, L, K)."""
        return rearrange(x_BLI, "b l (h k) -> b h l k", h=self.heads)

    def queries(self, q_BLI: Tensor, rotary: RotaryTable | None) -> Tensor:
        """Return the queries, (B, L, I) -> (B, H, L, K), or 2K with relative positions."""
        q_BHLK = self.split(q_BLI)
        if self.q_norm is not None:
            q_BHLK = self.q_norm(q_BHLK)
        if rotary is not None and self.relative is not None:
            out: Tensor = self.relative(q_BHLK, rotary)
            return out
        return rotate(q_BHLK, rotary) if rotary is not None and self.rope else q_BHLK

    def keys(self, k_BLI: Tensor, rotary: RotaryTable | None) -> Tensor:
        """Return the keys, (B, L, I) -> (B, H, L, K), or 2K with relative positions."""
        k_BHLK = self.split(k_BLI)
        if self.k_norm is not None:
            k_BHLK = self.k_norm(k_BHLK)
        if rotary is not None and self.relative is not None:
            return with_rotary(k_BHLK, rotary)
        return rotate(k_BHLK, rotary) if rotary is not None and self.rope else k_BHLK

    def values(self, v_BLI: Tensor) -> Tensor:
        """Return the values, (B, L, I) -> (B, H, L, K), zero-padded to 2K where keys have 2K."""
        v_BHLK = self.split(v_BLI)
        return F.pad(v_BHLK, (0, v_BHLK.shape[-1])) if self.relative is not None else v_BHLK

    def join(self, mixed_BHLK: Tensor) -> Tensor:
        """Join the heads, without padding: (B, H, L, K or 2K) -> (B, L, I)."""
        if self.relative is not None:
            mixed_BHLK = mixed_BHLK.chunk(2, dim=-1)[0]
        return rearrange(mixed_BHLK, "b h l k -> b l (h k)")


class Attention(nn.Module):
    """Self-attention: x + W_o softmax(Q K^T / sqrt(K)) V + b_o, with Q, K and V of norm(x)."""

    def __init__(self, config: ModelConfig, level: LevelConfig) -> None:
        super().__init__()
        self.norm = make_norm(config, level.dim)
        self.qkv = Linear(level.dim, 3 * level.inner, bias=False)
        self.heads = Heads(config, level)
        self.out = Linear(level.inner, level.dim, bias=config.bias)
        self.dropout = level.dropout
        self.branch_dropout = level.dropout if config.residual_dropout else 0.0

    def forward(self, x_BLD: Tensor, inputs: LevelInputs, known: KeyValues | None = None) -> Tensor:
        """Map (B, L, D) to (B, L, D). ``known``, if given, is filled with the keys and values."""
        dropout = self.dropout if self.training else 0.0
        q, k, v = self.project(x_BLD, inputs.rotary)
        if known is not None:
            known.fill(k, v)
        return self.finish(x_BLD, attend(q, k, v, inputs.mask, self.heads.scale, dropout))

    def project(self, x_BLD: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values with positions applied, each (B, H, L, K or 2K)."""
        q_BLI, k_BLI, v_BLI = self.qkv(self.norm(x_BLD)).chunk(3, dim=-1)
        heads = self.heads
        return heads.queries(q_BLI, rotary), heads.keys(k_BLI, rotary), heads.values(v_BLI)

    def finish(self, x_BLD: Tensor, mixed_BHLK: Tensor) -> Tensor:
        """Project the heads' output (B, H, L, K or 2K) and add it to the stream (B, L, D)."""
        out_BLD: Tensor = self.out(self.heads.join(mixed_BHLK))
        return x_BLD + drop(out_BLD, self.branch_dropout, self.training)


class FeedForward(nn.Module):
    """Feed-forward layer: x + W_2 f(W_1 norm(x) + b_1) + b_2; f is GELU or SwiGLU."""

    def __init__(self, config: ModelConfig, level: LevelConfig) -> None:
        super().__init__()
        self.gated = config.feed_forward == "swiglu"
        self.norm = make_norm(config, level.dim)
        self.hidden = Linear(level.dim, level.hidden * (2 if self.gated else 1), bias=config.bias)
        self.out = Linear(level.hidden, level.dim, bias=config.bias)
        self.dropout = level.dropout
        self.branch_dropout = level.dropout if config.residual_dropout else 0.0

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        hidden_BLF = self.hidden(self.norm(x_BLD))
        if self.gated:
            gate_BLF, up_BLF = hidden_BLF.chunk(2, dim=-1)
            hidden_BLF = F.silu(gate_BLF) * up_BLF
        else:
            hidden_BLF = F.gelu(hidden_BLF)
        out_BLD: Tensor = self.out(drop(hidden_BLF, self.dropout, self.training))
        return x_BLD + drop(out_BLD, self.branch_dropout, self.training)


def drop(x: Tensor, probability: float, training: bool) -> Tensor:
    """Apply dropout; return ``x`` itself where none applies."""
    return F.dropout(x, probability, training) if probability and training else x


class Layer(nn.Module):
    """A transformer layer: self-attention, then feed-forward."""

    def __init__(self, config: ModelConfig, level: LevelConfig) -> None:
        super().__init__()
        self.attention = Attention(config, level)
        self.feed_forward = FeedForward(config, level)

    def forward(self, x_BLD: Tensor, inputs: LevelInputs, known: KeyValues | None = None) -> Tensor:
        """Map (B, L, D) to (B, L, D). ``known``, if given, is filled with keys and values."""
        x_BLD = self.attention(x_BLD, inputs, known)
        out_BLD: Tensor = self.feed_forward(x_BLD)
        return out_BLD
