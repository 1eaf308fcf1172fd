"""Generation with a cache at every level: one step reads one token of every row.

    h = pre.step(x_t);  window = ring ++ h
    if t ends a bucket:  block = blocks(inner.step(pool(window)))
    y = post.step(combine(h, block[position in the bucket]));  ring = window[1:]

A causal bucket is complete at its boundary, so level l runs only there: once in ``stride`` tokens.
Rows of a batch may be at different positions; a level runs for those that complete a bucket.
Windowed levels keep a ring of W keys, the others keep all keys.

Legend: B rows, N rows of this step, L positions of a prompt, C slots of a cache, S positions in
a bucket, H heads, K width of a head, D width of a level, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hourglass_dist.model.cache import Cache, KeyValues, LevelCache
from hourglass_dist.model.hourglass import Hourglass, HourglassLM
from hourglass_dist.model.layers import Layer, RotaryTable, rotary_table
from hourglass_dist.model.layout import word_starts
from hourglass_dist.model.resample import Downsample, EarlierAttention, Upsample


@torch.no_grad()
def prefill(
    model: HourglassLM, tokens_BL: Tensor, lengths_B: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Read prompts and return (logits (B, V) after the last token of each row, the cache).

    Rows shorter than L are padded at the end; ``lengths_B`` are their lengths (None: L). Puts
    ``model`` into evaluation mode. Raises ValueError for an encoder, an empty prompt, or one longer
    than a learned position table.
    """
    if not model.config.causal:
        raise ValueError("decode: generation needs a causal model, given causal=false")
    model.eval()
    rows, length = tokens_BL.shape
    if lengths_B is None:
        lengths_B = torch.full((rows,), length, device=tokens_BL.device)
    if length < 1 or not bool(((lengths_B >= 1) & (lengths_B <= length)).all()):
        raise ValueError(
            f"decode: expected prompts of 1 to {length} tokens, given {lengths_B.tolist()}"
        )
    cache = Cache(model.config, lengths_B)
    logits_B1V: Tensor = model(tokens_BL, cache=cache)
    return logits_B1V[:, 0], cache


@torch.no_grad()
def step(model: HourglassLM, tokens_B: Tensor, cache: Cache) -> Tensor:
    """Read one more token in every row and return the logits (B, V) of the token after it.

    Updates ``cache``. Raises ValueError when it is of another model or number of rows, or a row has
    filled a learned position table.
    """
    config = model.config
    if cache.config != config:
        raise ValueError("decode: the cache was made by a model with other settings")
    if len(tokens_B) != len(cache.last_B):
        raise ValueError(
            f"decode: the cache holds {len(cache.last_B)} rows, given {len(tokens_B)} tokens"
        )
    position_B = cache.level.count_B
    if config.max_seq_len is not None and int(position_B.max()) >= config.max_seq_len:
        raise ValueError(
            f"decode: a row has max_seq_len={config.max_seq_len} tokens: positions are learned"
        )
    x_BD: Tensor = model.tokens(tokens_B)
    if model.positions is not None:
        x_BD = x_BD + model.positions(position_B)
    starts_B = None
    if any(level.pooling == "spacelike" for level in config.levels):
        starts_B = word_starts(torch.stack([cache.last_B, tokens_B], dim=1))[:, 1]
    rows_B = torch.arange(len(tokens_B), device=tokens_B.device)
    x_BD = _step(model.hourglass, cache.level, rows_B, x_BD, 1, starts_B)
    cache.last_B = tokens_B
    logits_BV: Tensor = model.head(x_BD[:, None])[:, 0]
    return logits_BV


def _step(
    module: Hourglass,
    cache: LevelCache,
    rows_N: Tensor,
    x_ND: Tensor,
    stride: int,
    starts_N: Tensor | None,
) -> Tensor:
    """Run one position of a level for the rows ``rows_N``: (N, D) -> (N, D)."""
    position_N = cache.count_B[rows_N]
    x_N1D = x_ND[:, None]
    rotary = _rotary(module, position_N, stride, x_ND)
    for layer, known in zip(module.pre, cache.pre, strict=True):
        x_N1D = _step_layer(layer, known, rows_N, position_N, x_N1D, rotary)
    if not module.is_innermost:
        if module.pre_norm is not None:
            x_N1D = module.pre_norm(x_N1D)
        x_N1D = _step_bucket(module, cache, rows_N, x_N1D, stride, starts_N)
    for layer, known in zip(module.post, cache.post, strict=True):
        x_N1D = _step_layer(layer, known, rows_N, position_N, x_N1D, rotary)
    cache.count_B[rows_N] = position_N + 1
    return (module.post_norm(x_N1D) if module.post_norm is not None else x_N1D)[:, 0]


def _rotary(module: Hourglass, position_N: Tensor, stride: int, like: Tensor) -> RotaryTable | None:
    config = module.config
    if config.positions == "learned":
        return None
    unit = stride if config.positions == "relative" else 1
    return rotary_table(position_N[:, None] * unit, config.levels[module.index].dim_head, like)


def _step_layer(
    layer: nn.Module,
    known: KeyValues,
    rows_N: Tensor,
    position_N: Tensor,
    x_N1D: Tensor,
    rotary: RotaryTable | None,
) -> Tensor:
    assert isinstance(layer, Layer)
    attention = layer.attention
    q, k, v = attention.project(x_N1D, rotary)
    known.append(rows_N, position_N, k, v)
    mixed = known.attend(rows_N, position_N + 1, q, attention.heads.scale)
    out: Tensor = layer.feed_forward(attention.finish(x_N1D, mixed))
    return out


def _step_bucket(
    module: Hourglass,
    cache: LevelCache,
    rows_N: Tensor,
    x_N1D: Tensor,
    stride: int,
    starts_N: Tensor | None,
) -> Tensor:
    """Add x to the bucket, run the inner levels where it is complete, and upsample."""
    bucket, inner, shorten = cache.bucket, cache.inner, module.shorten
    assert bucket is not None
    assert inner is not None
    level = module.config.levels[module.index + 1]
    position_N = cache.count_B[rows_N]
    z_N1D = shorten.prepare(x_N1D)
    rotary = None
    if shorten.attends == "earlier":
        rotary = _rotary(module, position_N, stride, x_N1D)
        assert bucket.outside is not None
        bucket.outside.append(rows_N, position_N, *_earlier(shorten).project_keys(z_N1D, rotary))
    if shorten.words:
        assert starts_N is not None
        wanted_N = (starts_N | (position_N == 0)).long()
        room_N = position_N // level.shorten + 1 + level.extra_buckets
        due_N = (inner.count_B[rows_N] + wanted_N).minimum(room_N) > inner.count_B[rows_N]
    else:
        due_N = position_N % level.shorten == 0
    window_NSD = torch.cat([bucket.ring_BSD[rows_N], z_N1D], dim=1)
    if bool(due_N.any()):
        pooled = _pool(shorten, window_NSD[due_N], bucket.size_B[rows_N[due_N]])
        _enter(module, cache, rows_N[due_N], pooled, stride)
    if shorten.words:
        bucket.ring_BSD[rows_N] = window_NSD.sum(dim=1, keepdim=True) * ~due_N[:, None, None]
        bucket.size_B[rows_N] = (bucket.size_B[rows_N] + 1) * ~due_N
    else:
        bucket.ring_BSD[rows_N] = window_NSD[:, 1:]
    part_N = position_N % level.shorten if bucket.block_BSD.shape[1] > 1 else position_N * 0
    added_N1D = bucket.block_BSD[rows_N, part_N][:, None]
    if module.lengthen.attends == "earlier":
        assert bucket.inside is not None
        count_N, query_N1D = inner.count_B[rows_N], x_N1D + added_N1D
        added_N1D = _look(module.lengthen, bucket.inside, rows_N, count_N, query_N1D, rotary)
    out: Tensor = module.lengthen.combine(x_N1D, added_N1D)
    return out


def _pool(shorten: Downsample, window_NSD: Tensor, size_N: Tensor) -> Tensor:
    """Return the pooled tokens (N, 1, D), before attention to earlier positions."""
    if shorten.words:
        return window_NSD.sum(dim=1, keepdim=True) / (size_N + 1)[:, None, None]
    window_N1SD = window_NSD[:, None]
    pooled_N1D: Tensor = shorten.pool(window_N1SD, None)
    if shorten.attends == "bucket":
        pooled_N1D = shorten.attention(pooled_N1D, window_N1SD, None)
    return pooled_N1D


def _enter(
    module: Hourglass, cache: LevelCache, rows_N: Tensor, pooled_N1D: Tensor, stride: int
) -> None:
    """Run pooled tokens (N, 1, D) through the inner levels and store their output as the block."""
    bucket, inner, shorten = cache.bucket, cache.inner, module.shorten
    assert bucket is not None
    assert inner is not None
    position_N, number_N = cache.count_B[rows_N], inner.count_B[rows_N]
    rotary = None
    if shorten.attends == "earlier":
        assert bucket.outside is not None
        rotary = _rotary(module, position_N, stride, pooled_N1D)
        pooled_N1D = shorten.query_norm(pooled_N1D)
        pooled_N1D = _look(shorten, bucket.outside, rows_N, position_N + 1, pooled_N1D, rotary)
    size = module.config.levels[module.index + 1].shorten
    pooled_NE = shorten.finish(pooled_N1D)[:, 0]
    inner_NE = _step(module.inner, inner, rows_N, pooled_NE, stride * size, None)
    keys_N1D, block_N1SD = module.lengthen.blocks(inner_NE[:, None], size)
    bucket.block_BSD[rows_N] = block_N1SD[:, 0]
    if bucket.inside is not None:
        k, v = _earlier(module.lengthen).project_keys(keys_N1D, rotary)
        bucket.inside.append(rows_N, number_N, k, v)


def _look(
    way: Downsample | Upsample,
    known: KeyValues,
    rows_N: Tensor,
    count_N: Tensor,
    x_N1D: Tensor,
    rotary: RotaryTable | None,
) -> Tensor:
    attention = _earlier(way)
    q = attention.project(x_N1D, rotary)
    return attention.finish(x_N1D, known.attend(rows_N, count_N, q, attention.heads.scale))


def _earlier(way: Downsample | Upsample) -> EarlierAttention:
    assert isinstance(way.attention, EarlierAttention)
    return way.attention
