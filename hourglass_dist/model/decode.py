"""Generation with a cache at every level: a token costs the same wherever it stands.

    h = pre.step(x_t);  window = ring ++ h
    if t ends a bucket:  block = blocks(inner.step(pool(window)))
    y = post.step(combine(h, block[place in the bucket]));  ring = window[1:]

A causal bucket is complete at its boundary, so level l runs only there: once in ``stride`` tokens.
Rows of a batch may be at different places; those that are due are picked out. Windowed levels keep
a ring of W keys, the others all of them.

Legend: B rows, N rows that are due now, L positions of a prompt, C slots of a cache, S positions in
a bucket, H heads, K width of a head, D width of a level, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hourglass_dist.model.attention import Sight, additive, attend
from hourglass_dist.model.hourglass import Hourglass, HourglassLM, Stage
from hourglass_dist.model.layers import Layer, Waves, make_waves
from hourglass_dist.model.layout import Rows, word_starts
from hourglass_dist.model.pool import take
from hourglass_dist.model.resample import EarlierAttention, Lengthen, Shorten
from hourglass_dist.model.settings import ModelConfig


@dataclass
class KeyValues:
    """Keys and values of one attention."""

    keys_BHCK: Tensor
    values_BHCK: Tensor
    window: int | None
    """C, where slots are a ring: position p lies in slot p % C."""

    def append(self, rows_N: Tensor, place_N: Tensor, key: Tensor, value: Tensor) -> None:
        """Store (N, H, 1, K) of the positions ``place_N`` of some rows."""
        slots_N = place_N if self.window is None else place_N % self.window
        if (
            self.window is None
            and (missing := int(place_N.max()) + 1 - self.keys_BHCK.shape[2]) > 0
        ):
            self._grow(missing)
        self.keys_BHCK[rows_N, :, slots_N] = key[:, :, 0]
        self.values_BHCK[rows_N, :, slots_N] = value[:, :, 0]

    def _grow(self, missing: int) -> None:
        for name in ("keys_BHCK", "values_BHCK"):
            old = getattr(self, name)
            more = max(missing, old.shape[2], 16)
            room = old.new_zeros(*old.shape[:2], more, old.shape[3])
            setattr(self, name, torch.cat([old, room], dim=2))

    def look(self, rows_N: Tensor, count_N: Tensor, query: Tensor, scale: float) -> Tensor:
        """What queries (N, H, 1, K) find among the first ``count_N`` positions of their rows."""
        used = min(int(count_N.max()), self.keys_BHCK.shape[2])
        keys, values = self.keys_BHCK[:, :, :used], self.values_BHCK[:, :, :used]
        if len(rows_N) < len(keys):
            keys, values = keys[rows_N], values[rows_N]
        mask = None
        if len(rows_N) > 1:
            mask = additive(torch.arange(used, device=query.device) < count_N[:, None], query)
            mask = mask[:, None, None]
        return attend(query, keys, values, Sight(False, None, mask), scale)


@dataclass
class BucketCache:
    """The bucket that a level is filling, and what the last full one gave."""

    ring_BSD: Tensor
    """``fixed``: the last S-1 positions, zeros before the first. ``spacelike``: their sum."""
    size_B: Tensor
    """``spacelike``: how many positions are in the sum."""
    block_BSD: Tensor
    """What the positions of the bucket get: one for all, or one each."""
    outside: KeyValues | None
    """Attention over all earlier positions: their keys."""
    inside: KeyValues | None
    """Attention over all earlier pooled tokens: their keys."""


@dataclass
class LevelCache:
    """All that one level remembers."""

    count_B: Tensor
    """Positions so far."""
    pre: list[KeyValues]
    post: list[KeyValues]
    bucket: BucketCache | None
    inner: LevelCache | None


@dataclass
class Cache:
    """All that a batch of rows remembers, whatever their lengths."""

    config: ModelConfig
    """Of the model that made it."""
    last_B: Tensor
    """The newest token of each row."""
    level: LevelCache

    @property
    def bytes(self) -> int:
        """Memory of keys, values and buckets."""
        return sum(t.numel() * t.element_size() for t in _tensors(self.level))


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    parts = part if isinstance(part, list) else vars(part).values() if part is not None else ()
    found = [_tensors(p) for p in parts if isinstance(p, (Tensor, list)) or hasattr(p, "__dict__")]
    return [tensor for some in found for tensor in some]


# --- the prompt: one forward pass ----------------------------------------------------------------


@torch.no_grad()
def prefill(
    model: HourglassLM, tokens_BL: Tensor, lengths_B: Tensor | None = None
) -> tuple[Tensor, Cache]:
    """Read prompts: (logits (B, V) after the last token of each row, the cache).

    Rows shorter than L are padded behind; ``lengths_B`` says how long they are (None: L). Puts
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
    model.check(tokens_BL)
    x_BLD = model.embed(tokens_BL)
    stages = model.stages(x_BLD, tokens_BL)
    x_BLD, level = _read(model.hourglass, stages, x_BLD, lengths_B)
    last_B1 = lengths_B[:, None] - 1
    logits_BV: Tensor = model.head(take(x_BLD, last_B1))[:, 0]
    return logits_BV, Cache(model.config, tokens_BL.gather(1, last_B1)[:, 0], level)


def _read(
    module: Hourglass, stages: list[Stage], x_BLD: Tensor, lengths_B: Tensor
) -> tuple[Tensor, LevelCache]:
    view, crossing = stages[module.index]
    window = module.config.levels[module.index].window

    def run(layer: nn.Module, x_BLD: Tensor, kept: list[KeyValues]) -> Tensor:
        assert isinstance(layer, Layer)
        q, k, v = layer.attention.project(x_BLD, view.waves)
        kept.append(_keep(k, v, lengths_B, window))
        mixed = attend(q, k, v, view.sight, layer.attention.heads.scale)
        out: Tensor = layer.feed_forward(layer.attention.finish(x_BLD, mixed))
        return out

    cache = LevelCache(lengths_B.clone(), [], [], None, None)
    for layer in module.pre:
        x_BLD = run(layer, x_BLD, cache.pre)
    if not module.is_innermost:
        if module.pre_norm is not None:
            x_BLD = module.pre_norm(x_BLD)
        ends_BG = view.rows.ends(x_BLD.device)
        inside_B = (ends_BG < lengths_B[:, None]).sum(dim=1)
        pooled_BGE = module.shorten(x_BLD, view.rows, crossing)
        valley_BGE, cache.inner = _read(module.inner, stages, pooled_BGE, inside_B)
        cache.bucket = _read_bucket(module, stages, x_BLD, valley_BGE, lengths_B, inside_B)
        x_BLD = module.lengthen(valley_BGE, x_BLD, view.rows, crossing)
    for layer in module.post:
        x_BLD = run(layer, x_BLD, cache.post)
    return (module.post_norm(x_BLD) if module.post_norm is not None else x_BLD), cache


def _read_bucket(
    module: Hourglass,
    stages: list[Stage],
    x_BLD: Tensor,
    valley_BGE: Tensor,
    lengths_B: Tensor,
    inside_B: Tensor,
) -> BucketCache:
    view, crossing = stages[module.index]
    z_BLD = module.shorten.prepare(x_BLD)
    keys_BGD, block_BGSD = module.lengthen.blocks(valley_BGE, view.rows.shorten)
    newest = (inside_B - 1)[:, None, None, None].expand(-1, -1, *block_BGSD.shape[2:])
    ring_BSD, size_B = _unfinished(module.shorten, z_BLD, view.rows, lengths_B, inside_B)
    outside = inside = None
    if crossing is not None:
        k, v = _earlier(module.shorten).project_keys(z_BLD, crossing.outside)
        outside = _keep(k, v, lengths_B, None)
        k, v = _earlier(module.lengthen).project_keys(keys_BGD, crossing.inside)
        inside = _keep(k, v, inside_B, None)
    return BucketCache(ring_BSD, size_B, block_BGSD.gather(1, newest)[:, 0], outside, inside)


def _unfinished(
    shorten: Shorten, z_BLD: Tensor, rows: Rows, lengths_B: Tensor, inside_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The positions that the next bucket of each row begins with: (ring, size of the sum)."""
    length = z_BLD.shape[1]
    if shorten.words:
        newest_B1 = (inside_B - 1)[:, None]
        index_L = torch.arange(length, device=z_BLD.device)
        after_BL = index_L > rows.ends(z_BLD.device).expand(len(z_BLD), -1).gather(1, newest_B1)
        after_BL &= index_L < lengths_B[:, None]
        return (z_BLD * after_BL.unsqueeze(-1)).sum(dim=1, keepdim=True), after_BL.sum(dim=1)
    index_BS = lengths_B[:, None] - torch.arange(rows.shorten - 1, 0, -1, device=z_BLD.device)
    ring_BSD = take(z_BLD, index_BS.clamp(min=0))
    return ring_BSD.masked_fill((index_BS < 0).unsqueeze(-1), 0.0), torch.zeros_like(lengths_B)


def _keep(k_BHLK: Tensor, v_BHLK: Tensor, lengths_B: Tensor, window: int | None) -> KeyValues:
    if window is None:
        return KeyValues(k_BHLK.contiguous(), v_BHLK.contiguous(), None)
    slots_C = torch.arange(window, device=k_BHLK.device)
    last_B1 = lengths_B[:, None] - 1
    index_BC = (last_B1 - (last_B1 - slots_C) % window).clamp(min=0)
    index = index_BC[:, None, :, None].expand(-1, *k_BHLK.shape[1:2], -1, k_BHLK.shape[3])
    return KeyValues(k_BHLK.gather(2, index), v_BHLK.gather(2, index), window)


# --- one token -----------------------------------------------------------------------------------


@torch.no_grad()
def step(model: HourglassLM, tokens_B: Tensor, cache: Cache) -> Tensor:
    """Read one more token in every row: logits (B, V) of the token after it.

    Changes ``cache``. Raises ValueError when it is of another model or number of rows, or a row has
    filled a learned position table.
    """
    config = model.config
    if cache.config != config:
        raise ValueError("decode: the cache was made by a model with other settings")
    if len(tokens_B) != len(cache.last_B):
        raise ValueError(
            f"decode: the cache holds {len(cache.last_B)} rows, given {len(tokens_B)} tokens"
        )
    place_B = cache.level.count_B
    if config.max_seq_len is not None and int(place_B.max()) >= config.max_seq_len:
        raise ValueError(
            f"decode: a row has max_seq_len={config.max_seq_len} tokens: positions are learned"
        )
    x_BD: Tensor = model.tokens(tokens_B)
    if model.positions is not None:
        x_BD = x_BD + model.positions(place_B)
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
    """One position of a level, for some of the rows: (N, D) -> (N, D)."""
    place_N = cache.count_B[rows_N]
    x_N1D = x_ND[:, None]
    waves = _waves(module, place_N, stride, x_ND)
    for layer, known in zip(module.pre, cache.pre, strict=True):
        x_N1D = _step_layer(layer, known, rows_N, place_N, x_N1D, waves)
    if not module.is_innermost:
        if module.pre_norm is not None:
            x_N1D = module.pre_norm(x_N1D)
        x_N1D = _step_bucket(module, cache, rows_N, x_N1D, stride, starts_N)
    for layer, known in zip(module.post, cache.post, strict=True):
        x_N1D = _step_layer(layer, known, rows_N, place_N, x_N1D, waves)
    cache.count_B[rows_N] = place_N + 1
    return (module.post_norm(x_N1D) if module.post_norm is not None else x_N1D)[:, 0]


def _waves(module: Hourglass, place_N: Tensor, stride: int, like: Tensor) -> Waves | None:
    config = module.config
    if config.positions == "learned":
        return None
    unit = stride if config.positions == "relative" else 1
    return make_waves(place_N[:, None] * unit, config.levels[module.index].dim_head, like)


def _step_layer(
    layer: nn.Module,
    known: KeyValues,
    rows_N: Tensor,
    place_N: Tensor,
    x_N1D: Tensor,
    waves: Waves | None,
) -> Tensor:
    assert isinstance(layer, Layer)
    attention = layer.attention
    q, k, v = attention.project(x_N1D, waves)
    known.append(rows_N, place_N, k, v)
    mixed = known.look(rows_N, place_N + 1, q, attention.heads.scale)
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
    """The way in, where a bucket is complete, and the way out."""
    bucket, inner, shorten = cache.bucket, cache.inner, module.shorten
    assert bucket is not None
    assert inner is not None
    level = module.config.levels[module.index + 1]
    place_N = cache.count_B[rows_N]
    z_N1D = shorten.prepare(x_N1D)
    waves = None
    if shorten.attends == "earlier":
        waves = _waves(module, place_N, stride, x_N1D)
        assert bucket.outside is not None
        bucket.outside.append(rows_N, place_N, *_earlier(shorten).project_keys(z_N1D, waves))
    if shorten.words:
        assert starts_N is not None
        wanted_N = (starts_N | (place_N == 0)).long()
        room_N = place_N // level.shorten + 1 + level.extra_buckets
        due_N = (inner.count_B[rows_N] + wanted_N).minimum(room_N) > inner.count_B[rows_N]
    else:
        due_N = place_N % level.shorten == 0
    window_NSD = torch.cat([bucket.ring_BSD[rows_N], z_N1D], dim=1)
    if bool(due_N.any()):
        pooled = _pool(shorten, window_NSD[due_N], bucket.size_B[rows_N[due_N]])
        _enter(module, cache, rows_N[due_N], pooled, stride)
    if shorten.words:
        bucket.ring_BSD[rows_N] = window_NSD.sum(dim=1, keepdim=True) * ~due_N[:, None, None]
        bucket.size_B[rows_N] = (bucket.size_B[rows_N] + 1) * ~due_N
    else:
        bucket.ring_BSD[rows_N] = window_NSD[:, 1:]
    part_N = place_N % level.shorten if bucket.block_BSD.shape[1] > 1 else place_N * 0
    added_N1D = bucket.block_BSD[rows_N, part_N][:, None]
    if module.lengthen.attends == "earlier":
        assert bucket.inside is not None
        count_N, query_N1D = inner.count_B[rows_N], x_N1D + added_N1D
        added_N1D = _look(module.lengthen, bucket.inside, rows_N, count_N, query_N1D, waves)
    out: Tensor = module.lengthen.combine(x_N1D, added_N1D)
    return out


def _pool(shorten: Shorten, window_NSD: Tensor, size_N: Tensor) -> Tensor:
    """(N, 1, D) the pooled tokens, before attention over earlier positions."""
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
    """Take pooled tokens through the inner levels; what comes out is the new block."""
    bucket, inner, shorten = cache.bucket, cache.inner, module.shorten
    assert bucket is not None
    assert inner is not None
    place_N, number_N = cache.count_B[rows_N], inner.count_B[rows_N]
    waves = None
    if shorten.attends == "earlier":
        assert bucket.outside is not None
        waves = _waves(module, place_N, stride, pooled_N1D)
        pooled_N1D = shorten.query_norm(pooled_N1D)
        pooled_N1D = _look(shorten, bucket.outside, rows_N, place_N + 1, pooled_N1D, waves)
    size = module.config.levels[module.index + 1].shorten
    pooled_NE = shorten.finish(pooled_N1D)[:, 0]
    valley_NE = _step(module.inner, inner, rows_N, pooled_NE, stride * size, None)
    keys_N1D, block_N1SD = module.lengthen.blocks(valley_NE[:, None], size)
    bucket.block_BSD[rows_N] = block_N1SD[:, 0]
    if bucket.inside is not None:
        k, v = _earlier(module.lengthen).project_keys(keys_N1D, waves)
        bucket.inside.append(rows_N, number_N, k, v)


def _look(
    way: Shorten | Lengthen,
    known: KeyValues,
    rows_N: Tensor,
    count_N: Tensor,
    x_N1D: Tensor,
    waves: Waves | None,
) -> Tensor:
    attention = _earlier(way)
    q = attention.project(x_N1D, waves)
    return attention.finish(x_N1D, known.look(rows_N, count_N, q, attention.heads.scale))


def _earlier(way: Shorten | Lengthen) -> EarlierAttention:
    assert isinstance(way.attention, EarlierAttention)
    return way.attention
