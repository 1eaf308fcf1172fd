"""The layers of one level: self-attention and feed-forward, each with its norm and its residual.

Legend: B rows, L positions, D width of the residual stream (``dim``), H heads, K width of one head
(``dim_head``), I = H*K, F hidden width (``ff_mult * dim``).

Every module reads only parameters of its own or of submodules through their ``forward``: ZeRO-3
gathers parameters around ``forward`` calls, so anything else would see empty tensors.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass_dist.config import ModelConfig
from hourglass_dist.model.linear import Linear


def visible_pairs(valid_BL: Tensor | None, causal: bool) -> Tensor | None:
    """Which key each query may see, as bool (B, 1, L, L); None when nothing is masked.

    ``valid_BL`` is True at real tokens. Padding is never seen by other positions, but every
    position sees itself: a row with nothing to see would turn into NaN, and one that falls back to
    seeing everything would leak the future.
    """
    if valid_BL is None:
        return None
    length = valid_BL.shape[1]
    visible_B1LL = valid_BL[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        visible_B1LL = visible_B1LL.tril()
    return visible_B1LL | torch.eye(length, dtype=torch.bool, device=valid_BL.device)


class Attention(nn.Module):
    """Self-attention in one level: x + W_o softmax(Q K^T / sqrt(K)) V + b_o, of LayerNorm(x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.causal = config.causal
        self.dropout = config.attn_dropout
        inner = config.heads * config.dim_head
        self.norm = nn.LayerNorm(config.dim)
        self.qkv = Linear(config.dim, 3 * inner, bias=False)
        self.out = Linear(inner, config.dim)

    def forward(self, x_BLD: Tensor, visible_B1LL: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). ``visible_B1LL`` comes from ``visible_pairs``."""
        qkv_BLI = self.qkv(self.norm(x_BLD)).chunk(3, dim=-1)
        q_BHLK, k_BHLK, v_BHLK = (
            rearrange(part, "b l (h k) -> b h l k", h=self.heads) for part in qkv_BLI
        )
        mixed_BHLK = F.scaled_dot_product_attention(
            q_BHLK,
            k_BHLK,
            v_BHLK,
            attn_mask=visible_B1LL,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and visible_B1LL is None,
        )
        out_BLD: Tensor = self.out(rearrange(mixed_BHLK, "b h l k -> b l (h k)"))
        return x_BLD + out_BLD


class FeedForward(nn.Module):
    """x + W_2 GELU(W_1 LayerNorm(x) + b_1) + b_2, position by position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.hidden = Linear(config.dim, config.ff_mult * config.dim)
        self.out = Linear(config.ff_mult * config.dim, config.dim)
        self.dropout = config.ff_dropout

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        hidden_BLF = F.gelu(self.hidden(self.norm(x_BLD)))
        if self.dropout:
            hidden_BLF = F.dropout(hidden_BLF, self.dropout, self.training)
        out_BLD: Tensor = self.out(hidden_BLF)
        return x_BLD + out_BLD


class Layer(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BLD: Tensor, visible_B1LL: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x_BLD = self.attention(x_BLD, visible_B1LL)
        out_BLD: Tensor = self.feed_forward(x_BLD)
        return out_BLD
