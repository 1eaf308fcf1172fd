"""What the modules of a model cost, one by one: the closed forms behind ``cost.py``.

Each function is one module of ``layers.py``, ``resample.py`` or ``head.py`` and follows it line by
line: every operation says what it keeps for the backward pass. A tensor is counted where it is
consumed; views of one storage count once, with the whole storage.

In names: n positions of a level, g those of the next one, s in a bucket.
"""

from __future__ import annotations

from hourglass_dist.model.head import CHUNK_LOGITS
from hourglass_dist.model.layout import bucket_count
from hourglass_dist.model.resample import MANY_KEYS
from hourglass_dist.model.settings import LevelConfig
from hourglass_dist.planning.cost_units import INDEX_BYTES, WIDE_BYTES, Between, Pairs, Part, Size


def self_pairs(size: Size, level: LevelConfig, n: int) -> Pairs:
    """What the positions of a level see of each other."""
    if not size.config.causal:
        return Pairs(n, n, n * n)
    if level.window is None or level.window >= n:
        return Pairs(n, n, n * (n + 1) // 2)
    window = level.window
    return Pairs(n, n, window * n - window * (window - 1) // 2, window)


# --- what everything is made of ------------------------------------------------------------------


def norm(size: Size, n: int, dim: int) -> Part:
    """A norm over ``n`` vectors; keeps them."""
    rms = size.config.norm == "rms"
    return Part(
        parameters=dim if rms or not size.config.bias else 2 * dim,
        kept=size.numbers(n * dim) + size.wide(n if rms else 2 * n),
    )


def linear(
    size: Size, n: int, dim: int, out: int, *, bias: bool = False, keeps: bool = True
) -> Part:
    """A linear layer on ``n`` vectors; keeps them unless somebody else does."""
    return Part(
        parameters=dim * out + (out if bias else 0),
        flops=2 * n * dim * out,
        kept=size.numbers(n * dim) if keeps else 0,
        products=size.numbers(n * out),
    )


def heads(size: Size, level: LevelConfig, pairs: Pairs, *, fused: bool) -> Part:
    """Queries, keys and values from their projections to what attention keeps of them.

    The projections lie in one tensor (``fused``) or in two, of queries and of keys with values. A
    tensor stays as long as one of its views is kept.
    """
    config, inner = size.config, level.inner
    moved = pairs.window is not None
    raw_values = not size.relative and not moved
    raw_queries = config.qk_norm or (raw_values and not size.waves)
    n, m = pairs.queries, pairs.keys
    if fused:
        kept = size.numbers(3 * n * inner) if raw_queries or raw_values else 0
    else:
        kept = size.numbers(n * inner) if raw_queries else 0
        kept += size.numbers(2 * m * inner) if raw_queries or raw_values else 0
    if pairs.window is not None:
        kept += _blocks(size, inner * (2 if size.relative else 1), pairs)
    elif size.relative:
        kept += size.numbers(2 * inner * (n + 2 * m))
    elif config.qk_norm or size.waves:
        kept += size.numbers(inner * (n + m))
    parameters = 0
    if config.qk_norm:
        parameters += 2 * level.dim_head
        kept += size.wide(level.heads * (n + m))
    part = Part(parameters=parameters, kept=kept)
    return part + relative_positions(size, level, n) if size.relative else part


def _blocks(size: Size, width: int, pairs: Pairs) -> int:
    """Bytes of queries, keys and values in blocks. A key lies in two; in one row these overlap."""
    assert pairs.window is not None
    keys = 2 * pairs.blocks if size.rows > 1 else pairs.blocks + 1
    return size.numbers(width * pairs.window * (pairs.blocks + 2 * keys))


def relative_positions(size: Size, level: LevelConfig, n: int) -> Part:
    """Keeps the queries with v added, and a copy of the matrices for each row."""
    matrices = level.inner * level.dim_head
    return Part(
        parameters=2 * level.inner + matrices,
        flops=2 * n * matrices,
        kept=size.numbers(n * level.inner + (matrices if size.rows > 1 else 0)),
        products=size.numbers(n * level.inner),
    )


def mix(size: Size, level: LevelConfig, pairs: Pairs) -> Part:
    """softmax(q k) v, joined: keeps the result and its normalisers."""
    wide = 2 if size.relative else 1
    queries = pairs.queries if pairs.window is None else pairs.blocks * pairs.window
    out = size.numbers(queries * level.inner * wide) + size.wide(queries * level.heads)
    apart = size.waves or pairs.window is not None  # head by head as the queries, so joining copies
    joined = size.numbers(pairs.queries * level.inner) if apart else 0
    return Part(
        flops=4 * (pairs.dense if size.dense else pairs.needed) * level.inner * wide,
        kept=out + joined,
        products=out,
    )


# --- layers.py -----------------------------------------------------------------------------------


def layer(size: Size, level: LevelConfig, n: int) -> Part:
    """Self-attention and feed-forward on ``n`` positions."""
    return attention(size, level, n) + feed_forward(size, level, n)


def attention(size: Size, level: LevelConfig, n: int) -> Part:
    """Self-attention."""
    dim, pairs = level.dim, self_pairs(size, level, n)
    return (
        norm(size, n, dim)
        + linear(size, n, dim, 3 * level.inner)
        + heads(size, level, pairs, fused=True)
        + mix(size, level, pairs)
        + linear(size, n, level.inner, dim, bias=size.config.bias, keeps=False)
    )


def feed_forward(size: Size, level: LevelConfig, n: int) -> Part:
    """GELU keeps what it reads, SwiGLU also the gate after its function."""
    bias, gated = size.config.bias, size.config.feed_forward == "swiglu"
    return (
        norm(size, n, level.dim)
        + linear(size, n, level.dim, level.hidden * (2 if gated else 1), bias=bias)
        + Part(kept=size.numbers(n * level.hidden * (3 if gated else 1)))
        + linear(size, n, level.hidden, level.dim, bias=bias)
    )


def view(size: Size, level: LevelConfig, n: int) -> int:
    """Bytes of masks and waves, which all layers of a level share."""
    pairs = self_pairs(size, level, n)
    masked = pairs.window is not None or size.packed
    mask = size.numbers(pairs.dense) if masked else 0
    waves = n * level.dim_head * size.number_bytes if size.waves else 0
    return mask + waves


# --- resample.py ---------------------------------------------------------------------------------


def shorten(size: Size, between: Between) -> Part:
    """The way in. Keeps the positions outside only with attention over earlier ones; these are
    left out here, as the way out may keep them, too."""
    outer, g, dim = between.outer, between.g, between.outer.dim
    part = pool(size, between)
    if size.config.attention_resampling == "earlier":
        part += norm(size, between.n, dim) + norm(size, g, dim)
        part += Part(kept=-size.numbers(between.n * dim))
        part += earlier_attention(size, between, between.pairs_down())
    elif size.config.attention_resampling == "bucket":
        part += bucket_attention(size, between)
    if size.config.attention_resampling != "none":
        part += feed_forward(size, outer, g)
    if between.inner.dim == dim:
        return part
    if size.config.width_change == "pad":
        return part + Part(parameters=between.inner.dim - dim)
    return part + linear(size, g, dim, between.inner.dim, bias=size.config.bias)


def pool(size: Size, between: Between) -> Part:
    """Buckets, cut out, are kept where a product reads them."""
    g, s, dim = between.g, between.s, between.outer.dim
    config = size.config
    linear_pool = config.downsampling == "linear"
    reads = linear_pool or config.attention_resampling == "bucket"
    part = Part(kept=size.numbers(g * s * dim) if reads else 0)
    if size.packed and between.inner.pooling == "fixed":
        part += Part(kept=size.indices(g * s) + size.rows * g * s)  # where from, and whether
    if linear_pool:
        part += linear(size, g, s * dim, dim, bias=config.bias, keeps=False)
    return part


def bucket_attention(size: Size, between: Between) -> Part:
    """Pooled tokens look at the positions of their bucket. Keeps the query, the result of the
    softmax, and keys and values or what stands for them."""
    level, g, s = between.outer, between.g, between.s
    dim, inner, kinds = level.dim, level.inner, level.heads * level.dim
    common = (
        norm(size, g, dim)
        + linear(size, g, dim, inner)
        + Part(kept=size.numbers(g * (inner + level.heads * s)))
        + linear(size, g, inner, dim, bias=size.config.bias)
    )
    if s < MANY_KEYS:
        key = linear(size, g * s, dim, inner, keeps=False)
        return common + key + key + Part(kept=size.numbers(2 * g * s * inner))
    key = Part(parameters=dim * inner, flops=2 * g * dim * inner)
    mixing = Part(
        flops=4 * g * s * kinds,
        kept=size.numbers(2 * g * kinds),
        products=size.numbers(g * (2 * kinds + level.heads * s + inner)),
    )
    return common + key + key + mixing


def earlier_attention(size: Size, between: Between, pairs: Pairs) -> Part:
    """Attention from one level to another. Keeps its mask, one for all rows where these are
    alike."""
    level = between.outer
    masks = 1 if between.regular else size.rows
    return (
        linear(size, pairs.queries, level.dim, level.inner)
        + linear(size, pairs.keys, level.dim, 2 * level.inner)
        + heads(size, level, pairs, fused=False)
        + mix(size, level, pairs)
        + Part(kept=masks * pairs.queries * pairs.keys * size.number_bytes)
        + linear(size, pairs.queries, level.inner, level.dim, bias=size.config.bias, keeps=False)
    )


def lengthen(size: Size, between: Between) -> Part:
    """The way out, without the positions outside."""
    config, n, g = size.config, between.n, between.g
    outer, dim = between.outer, between.outer.dim
    part = spread(size, between)
    if config.attention_resampling == "earlier":
        part += earlier_attention(size, between, between.pairs_up()) + feed_forward(size, outer, n)
        if config.stack_norms:
            part += norm(size, n, dim)
    elif config.attention_resampling == "bucket":
        part += valley_attention(size, outer, g) + feed_forward(size, outer, n)
    if config.skip == "gated":
        part += Part(parameters=dim)
    return part


def spread(size: Size, between: Between) -> Part:
    """Narrow, and make of a pooled token what the positions of its bucket get."""
    config, g, s, dim = size.config, between.g, between.s, between.outer.dim
    wide, way = between.inner.dim, size.config.attention_resampling
    projects = wide != dim and config.width_change == "projection"
    is_linear = config.upsampling == "linear"
    valley = size.numbers(g * (dim if projects else wide))  # a view of all that is cut off
    part = Part()
    if projects:
        part += linear(size, g, wide, dim, bias=config.bias)
    if way == "earlier":
        part += Part(norm(size, g, dim).parameters, kept=_statistics(size, g))
    if is_linear:
        part += linear(size, g, dim, s * dim, bias=config.bias, keeps=False)
    normed = way == "earlier" or (config.stack_norms and way == "none")
    if normed:
        made = size.numbers(g * s * dim) if is_linear else 0
        parts = g * s if is_linear else g
        part += Part(norm(size, g, dim).parameters, kept=made + _statistics(size, parts))
    return part + Part(kept=valley if is_linear or normed or way == "bucket" else 0)


def _statistics(size: Size, n: int) -> int:
    return norm(size, n, 0).kept


def valley_attention(size: Size, level: LevelConfig, g: int) -> Part:
    """One key for each position: values and output only; the query side is there, and frozen."""
    unused = norm(size, g, level.dim).parameters + 2 * level.dim * level.inner
    return (
        Part(parameters=unused, frozen=unused)
        + linear(size, g, level.dim, level.inner, keeps=False)
        + linear(size, g, level.inner, level.dim, bias=size.config.bias)
    )


def crossing_waves(size: Size, between: Between) -> int:
    """Bytes of the waves of attention between levels, which both ways share."""
    if size.config.attention_resampling != "earlier" or not size.relative:
        return 0
    inside = between.g * (1 if between.regular else size.rows)
    return (between.n + inside) * between.outer.dim_head * size.number_bytes


def tables(size: Size, n: int, between: Between | None, recomputed: bool) -> int:
    """Bytes of the tables that say where documents and buckets lie: whole where modules are
    ``recomputed``, else what gathering and scattering keep of them."""
    count = 2 * n if size.packed and recomputed else 0
    if between is not None and not between.regular:
        words = between.inner.pooling == "spacelike"
        count += 2 * n + between.g if recomputed or words else n
    return size.indices(count)


def stack_norm(size: Size, n: int, dim: int) -> Part:
    """The norm that ends a stack of layers, where there is one."""
    return norm(size, n, dim) if size.config.stack_norms else Part()


# --- head.py and the embeddings ------------------------------------------------------------------


def head(size: Size, n: int) -> Part:
    """Norm, output layer and loss, which keeps its gradients: of positions, and in fp32 of the
    weights."""
    config, dim = size.config, size.config.levels[0].dim
    out = linear(size, n, dim, config.vocab_size, bias=config.bias)
    return norm(size, n, dim) + out + Part(kept=WIDE_BYTES * (out.parameters + 1))


def loss_chunk(size: Size, n: int) -> int:
    """Bytes of the logits that are there at a time, and of their logarithms."""
    vocabulary = size.config.vocab_size
    positions = min(size.rows * n, max(1, CHUNK_LOGITS // vocabulary))
    return 2 * WIDE_BYTES * positions * vocabulary


def embeddings(size: Size, n: int) -> Part:
    """Tokens, and places where these are learned; keeps the numbers of the places."""
    config = size.config
    table = config.max_seq_len or 0
    places = INDEX_BYTES * n * (size.rows if size.packed else 1) if table else 0
    return Part((config.vocab_size + table) * config.levels[0].dim, kept=places)


# --- generation ----------------------------------------------------------------------------------


def key_value_width(size: Size, level: LevelConfig) -> int:
    """Numbers that one attention remembers of one position."""
    return 2 * level.inner * (2 if size.relative else 1)


def next_positions(size: Size, inner: LevelConfig, n: int) -> tuple[int, bool]:
    """(positions of the next level, whether its buckets are regular)."""
    regular = inner.pooling == "fixed" and not size.packed
    return bucket_count(n, inner.shorten) + (0 if regular else inner.extra_buckets), regular
