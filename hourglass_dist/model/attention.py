"""Attention masks, and the kernel that computes attention under each of them.

    causal, one document a row       scaled_dot_product_attention with is_causal, without a mask
    a window, one document a row     the same in blocks: a block of queries sees its own keys and
                                     those of the block before, so cost and memory grow with L*W
    anything else on a GPU           FlexAttention with a block mask, compiled
    anything else on a CPU           scaled_dot_product_attention with one mask for each level

A query sees a key at its own or an earlier position, in the same document and in the window.
Queries that see no key get zeros.

Legend: B rows, L positions, Q queries, J keys, H heads, K width of a head, W window, N blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hourglass_dist.model.layout import Rows


class AttentionMask(NamedTuple):
    """Mask of one attention, in the form that its kernel takes."""

    causal: bool
    """Whether the mask is plain causal attention, the kernel's ``is_causal``."""
    window: int | None
    """Window W, in positions, where attention is computed in blocks; else None."""
    bias: Tensor | BlockMask | None
    """Terms added to the scores, 0 or -inf: (B or 1, 1, Q, J), in blocks (B*N, 1, W, 2W); or
    FlexAttention's BlockMask."""


class MaskRule(NamedTuple):
    """Rule that a query sees keys at or before its position, in its document and in the window."""

    queries: Tensor
    """Position of each query in the row, (B or 1, Q)."""
    keys: Tensor
    """Position of each key in the row, (B or 1, J)."""
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    window: int | None = None

    def sees(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether query ``query`` of ``row`` sees its key ``key``; the indices broadcast."""
        row_of_queries, row_of_keys = (row if len(t) > 1 else 0 for t in (self.queries, self.keys))
        distance = self.queries[row_of_queries, query] - self.keys[row_of_keys, key]
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance < self.window)
        if self.query_documents is not None and self.key_documents is not None:
            seen = seen & (self.query_documents[row, query] == self.key_documents[row, key])
        return seen

    def mask(self, like: Tensor, flex: bool) -> AttentionMask:
        """Return the rule as a mask, in the dtype and on the device of ``like``."""
        documents = self.query_documents
        rows = max(len(self.queries), len(self.keys), 1 if documents is None else len(documents))
        sizes = self.queries.shape[1], self.keys.shape[1]
        if flex:
            mask = create_block_mask(
                lambda row, _, query, key: self.sees(row, query, key),
                rows if rows > 1 else None,
                None,
                *sizes,
                device=str(like.device),
            )
            return AttentionMask(False, None, mask)
        row_B11, query_Q1, key_J = (
            torch.arange(size, device=like.device) for size in (rows, *sizes)
        )
        seen_BQJ = self.sees(row_B11[:, None, None], query_Q1[:, None], key_J).expand(rows, *sizes)
        return AttentionMask(False, None, additive(seen_BQJ[:, None], like))


def additive(seen: Tensor, like: Tensor) -> Tensor:
    """Return the terms to add to scores: 0 where ``seen`` is True, else -inf."""
    return like.new_zeros(seen.shape).masked_fill(~seen, float("-inf"))


class Stub(NamedTuple):
    """Replacement of the fused kernels while a model is counted on the meta device."""

    device: str
    """Type of the device whose kernels are counted."""
    kernel: Callable[[Tensor, Tensor, Tensor, Tensor | BlockMask | None], Tensor]
    """Function of queries, keys, values and mask that returns the attention output."""


_stub: Stub | None = None


@contextmanager
def stubbed(stub: Stub) -> Iterator[None]:
    """Replace every fused attention kernel with ``stub`` in this context."""
    global _stub
    before, _stub = _stub, stub
    try:
        yield
    finally:
        _stub = before


def takes_flex(x: Tensor, dropout: float) -> bool:
    """Return whether FlexAttention runs: its backward needs a GPU, and it has no dropout."""
    return (_stub.device if _stub else x.device.type) == "cuda" and not dropout


def self_attention_mask(
    rows: Rows,
    window: int | None,
    x_BLD: Tensor,
    *,
    causal: bool = True,
    legacy: bool = False,
    dropout: float = 0.0,
) -> AttentionMask:
    """Return the self-attention mask of a level, in the dtype and on the device of ``x_BLD``."""
    if rows.mask_BL is not None:
        return AttentionMask(False, None, _masked(rows.mask_BL, causal, legacy, x_BLD))
    if not causal:
        return AttentionMask(False, None, None)
    window = window if window is not None and window < rows.length else None
    if rows.document_BL is None and window is None:
        return AttentionMask(True, None, None)
    flex = takes_flex(x_BLD, dropout)
    if window is not None and not flex:
        return AttentionMask(False, window, _block_masks(rows, window, x_BLD))
    index_1L = torch.arange(rows.length, device=x_BLD.device)[None]
    documents_BL = rows.document_BL
    return MaskRule(index_1L, index_1L, documents_BL, documents_BL, window).mask(x_BLD, flex)


def _masked(mask_BL: Tensor, causal: bool, legacy: bool, like: Tensor) -> Tensor:
    """Return key padding masks, of encoders or as in lucidrains (there finite, so that a fully
    masked query sees every key)."""
    seen = mask_BL[:, None, None, :]
    if not legacy:
        return additive(seen, like)
    if causal:
        seen = seen.expand(-1, -1, mask_BL.shape[1], -1).tril()
    return like.new_zeros(seen.shape).masked_fill(~seen, -torch.finfo(like.dtype).max)


def _block_masks(rows: Rows, window: int, like: Tensor) -> Tensor:
    """Return masks (B*N, 1, W, 2W): query i of block n sees keys i+1 .. i+W of blocks n-1 and n
    together, in its own document."""
    blocks = -(-rows.length // window)
    query_W1 = torch.arange(window, device=like.device)[:, None]
    key_J = torch.arange(2 * window, device=like.device)
    seen_NWJ = ((key_J > query_W1) & (key_J <= query_W1 + window)).expand(blocks, -1, -1)
    is_there_NJ = torch.arange(blocks, device=like.device)[:, None] * window + key_J >= window
    seen_NWJ = seen_NWJ & is_there_NJ[:, None]
    if rows.document_BL is None:
        return additive(seen_NWJ[:, None], like).repeat(len(like), 1, 1, 1)
    documents_BL = F.pad(rows.document_BL, (window, blocks * window - rows.length), value=-1)
    theirs_BNJ = documents_BL.unfold(1, 2 * window, window)
    mine_BNW = theirs_BNJ[..., window:]
    seen_BNWJ = seen_NWJ & (mine_BNW[..., None] == theirs_BNJ[:, :, None])
    return additive(seen_BNWJ.flatten(0, 1)[:, None], like)


def attend(
    q_BHQK: Tensor,
    k_BHJK: Tensor,
    v_BHJK: Tensor,
    mask: AttentionMask,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(q.k * scale) v over the keys that each query sees, (B, H, Q, K)."""
    if mask.window is not None:
        return _attend_in_blocks(q_BHQK, k_BHJK, v_BHJK, mask, scale, dropout)
    return _kernel(q_BHQK, k_BHJK, v_BHJK, mask, scale, dropout)


def _kernel(
    q_BHQK: Tensor,
    k_BHJK: Tensor,
    v_BHJK: Tensor,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> Tensor:
    if _stub and not (dropout and _stub.device == "cpu"):  # CPU dropout has no fused kernel
        return _stub.kernel(q_BHQK, k_BHJK, v_BHJK, mask.bias)
    if isinstance(mask.bias, BlockMask):
        out: Tensor = _flex()(q_BHQK, k_BHJK, v_BHJK, block_mask=mask.bias, scale=scale)
        return out
    return F.scaled_dot_product_attention(
        q_BHQK,
        k_BHJK,
        v_BHJK,
        attn_mask=mask.bias,
        dropout_p=dropout,
        is_causal=mask.causal,
        scale=scale,
    )


def _attend_in_blocks(
    q_BHLK: Tensor,
    k_BHLK: Tensor,
    v_BHLK: Tensor,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> Tensor:
    assert mask.window is not None
    assert isinstance(mask.bias, Tensor)
    rows, _, length, _ = q_BHLK.shape
    window = mask.window
    blocks = -(-length // window)
    behind = blocks * window - length
    q_BHLK = F.pad(q_BHLK, (0, 0, 0, behind))
    q_NHWK = rearrange(q_BHLK, "b h (n w) k -> (b n) h w k", w=window)
    k_NHJK, v_NHJK = (
        # K must be last in memory, too, for the fused kernel of the CPU
        rearrange(
            F.pad(t, (0, 0, window, behind)).unfold(2, 2 * window, window),
            "b h n k j -> (b n) h j k",
        )
        for t in (k_BHLK, v_BHLK)
    )
    mixed_NHWK = _kernel(q_NHWK, k_NHJK, v_NHJK, mask, scale, dropout)
    mixed_BHLK = rearrange(mixed_NHWK, "(b n) h w k -> b h (n w) k", b=rows)
    return mixed_BHLK[:, :, :length]


@functools.cache
def _flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
