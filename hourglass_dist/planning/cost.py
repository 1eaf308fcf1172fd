"""What a model costs, in closed form: parameters, floating-point operations, memory.

The formulas stand in ``cost_parts.py``, module by module, and a test holds them to what PyTorch
counts. Operations are those of matrix products (a multiply-add is two), as is usual for model FLOPs
utilisation; norms, softmax and pooling are left out. Memory is that of the kernels on a CPU in
training without dropout; FlexAttention on a GPU keeps no masks, and less for windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from hourglass_dist.model.settings import LevelConfig, ModelConfig
from hourglass_dist.planning import cost_parts as parts
from hourglass_dist.planning.cost_units import Between, Part, Size

AUTOMATIC = ("none", "selective", "full")
"""What ``auto`` chooses from."""


@dataclass(frozen=True)
class LevelCost:
    """One level with the ways to the next one and back, or what lies around all levels."""

    name: str
    stride: int
    """Tokens under one position."""
    parameters: int
    frozen_parameters: int
    """How many of ``parameters`` have no gradient."""
    flops: int
    """Forward pass of one row."""
    recompute_flops: int
    """What activation checkpointing adds to the backward pass of one row."""
    activation_bytes: int
    """Kept from the forward pass of all rows for the backward pass."""
    offloaded_bytes: int
    """The same, where it waits in CPU memory."""
    transient_bytes: int
    """On top for a moment: of the largest recomputed module, or of the logits in the loss."""
    cache_bytes: int
    """What generation remembers of one row of this length."""
    cache_bytes_per_token: float
    """What one more token adds to that; 0 where a window is full."""


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model on rows of one length: of its levels, outermost first, and its ends."""

    length: int
    """Tokens in a row."""
    levels: tuple[LevelCost, ...]
    ends: LevelCost
    """Embeddings, final norm, output layer and loss."""

    @property
    def parts(self) -> tuple[LevelCost, ...]:
        """All levels, then the ends."""
        return (*self.levels, self.ends)

    @property
    def parameters(self) -> int:
        """All parameters, frozen ones too."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained_parameters(self) -> int:
        """Parameters that have a gradient."""
        return self.parameters - sum(part.frozen_parameters for part in self.parts)

    @property
    def flops_per_token(self) -> float:
        """Forward pass, for one token at full resolution."""
        return sum(part.flops for part in self.parts) / self.length

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward pass without recomputation: the numerator of MFU."""
        return 3 * self.flops_per_token

    @property
    def recompute_flops(self) -> int:
        """What activation checkpointing adds to the backward pass of one row."""
        return sum(part.recompute_flops for part in self.parts)

    @property
    def hardware_flops_per_token(self) -> float:
        """Forward and backward pass with recomputation: the numerator of HFU."""
        return self.training_flops_per_token + self.recompute_flops / self.length

    @property
    def activation_bytes(self) -> int:
        """The most that is kept for the backward pass at one time."""
        kept = sum(part.activation_bytes for part in self.parts)
        return kept + max(part.transient_bytes for part in self.parts)

    @property
    def offloaded_bytes(self) -> int:
        """Kept for the backward pass in CPU memory."""
        return sum(part.offloaded_bytes for part in self.parts)

    @property
    def cache_bytes(self) -> int:
        """What generation remembers of one row of this length."""
        return sum(part.cache_bytes for part in self.parts)

    @property
    def cache_bytes_per_token(self) -> float:
        """What one more token adds to that, on average."""
        return sum(part.cache_bytes_per_token for part in self.parts)


def model_cost(
    config: ModelConfig,
    length: int,
    *,
    rows: int = 1,
    bytes_per_number: int = 4,
    dense_attention: bool = False,
    packed: bool = False,
) -> ModelCost:
    """The cost of one micro batch of ``rows`` rows of ``length`` tokens.

    Attention counts the pairs that causality and windows need; with ``dense_attention`` all that
    are computed without a causal kernel, as PyTorch counts. ``bytes_per_number`` is the size of an
    activation: 4 in fp32, 2 in bf16. ``packed`` rows hold several documents, kept apart: pairs
    needed depend on these, and are counted as those of one document. Levels with
    ``shorten_choices`` cost what they cost with ``shorten``. Raises ValueError for ``auto``
    checkpointing, which ``choose_checkpointing`` settles.
    """
    size = Size(config, rows, bytes_per_number, dense_attention, packed)
    levels = tuple(_level(size, each) for each in _shapes(size, length))
    return ModelCost(length, levels, _ends(size, length))


def choose_checkpointing(
    config: ModelConfig,
    length: int,
    *,
    rows: int,
    bytes_per_number: int,
    budget: int,
    packed: bool = False,
) -> ModelConfig:
    """``config`` with one of none, selective and full for every level that says ``auto``: what
    recomputes least of all that keeps within ``budget`` bytes of activations.

    Raises ValueError naming the least that is possible when nothing fits.
    """
    choices = [
        AUTOMATIC if level.activation_checkpointing == "auto" else (level.activation_checkpointing,)
        for level in config.levels
    ]
    if all(len(choice) == 1 for choice in choices):
        return config
    found: list[tuple[int, int, ModelConfig]] = []
    least = None
    for policies in product(*choices):
        settled = config.with_checkpointing(policies)
        cost = model_cost(
            settled, length, rows=rows, bytes_per_number=bytes_per_number, packed=packed
        )
        needed = cost.activation_bytes
        least = needed if least is None else min(least, needed)
        if needed <= budget:  # of equal products, what keeps more recomputes fewer other operations
            found.append((cost.recompute_flops, -needed, settled))
    if not found:
        raise ValueError(
            "model.levels.activation_checkpointing: auto: activations of a micro batch of "
            f"{rows} x {length} tokens take {least:,} bytes or more, given {budget:,}"
        )
    return min(found, key=lambda candidate: candidate[:2])[2]


# --- one level -----------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """A level and the way to the next one."""

    number: int
    own: LevelConfig
    n: int
    """Positions."""
    stride: int
    between: Between | None
    """None at the innermost level."""


class _Module(NamedTuple):
    """What is checkpointed as a whole."""

    part: Part
    inputs: int
    """Bytes of its input, where that is not the stream that both ways between levels read."""
    number: int
    """The module's number in the level: every K-th one is recomputed."""


def _shapes(size: Size, length: int) -> Iterator[_Shape]:
    config, n, stride = size.config, length, 1
    for index, own in enumerate(config.levels):
        if index + 1 == len(config.levels):
            yield _Shape(index, own, n, stride, None)
            return
        inner = config.levels[index + 1]
        g, regular = parts.next_positions(size, inner, n)
        yield _Shape(index, own, n, stride, Between(own, inner, n, g, regular))
        n, stride = g, stride * inner.shorten


def _level(size: Size, shape: _Shape) -> LevelCost:
    modules, policy = _modules(size, shape), shape.own.activation_checkpointing
    recomputed = [module for module in modules if _is_recomputed(policy, module.number)]
    rest = [module for module in modules if not _is_recomputed(policy, module.number)]
    kept = sum(module.part.kept for module in rest)
    kept += sum(_kept_anyway(policy, module) for module in recomputed)
    kept += _shared(size, shape, [module.number for module in recomputed])
    norms = _stack_norms(size, shape)
    offloads = policy == "offload"
    return LevelCost(
        name=f"level {shape.number}",
        stride=shape.stride,
        parameters=sum(module.part.parameters for module in modules) + norms.parameters,
        frozen_parameters=sum(module.part.frozen for module in modules),
        flops=sum(module.part.flops for module in modules),
        recompute_flops=sum(m.part.flops for m in recomputed if policy != "selective"),
        activation_bytes=norms.kept + (0 if offloads else kept),
        offloaded_bytes=kept if offloads else 0,
        transient_bytes=max((m.part.kept - _kept_anyway(policy, m) for m in recomputed), default=0),
        cache_bytes=_cache(size, shape),
        cache_bytes_per_token=_cache_growth(size, shape),
    )


def _modules(size: Size, shape: _Shape) -> list[_Module]:
    own, n, between = shape.own, shape.n, shape.between
    layer = parts.layer(size, own, n)
    stream = size.numbers(n * own.dim)
    modules = [_Module(layer, stream, number) for number in range(own.pre + own.post)]
    if between is not None:
        valley = size.numbers(between.g * between.inner.dim)
        modules.append(_Module(parts.shorten(size, between), 0, 0))
        modules.append(_Module(parts.lengthen(size, between), valley, 0))
    return modules


def _is_recomputed(policy: str, number: int) -> bool:
    if policy == "auto":
        raise ValueError(
            "model.levels.activation_checkpointing: auto has no cost before it is settled"
        )
    every = int(policy.split()[1]) if policy.startswith("every") else 1
    return policy not in ("none", "offload") and (number + 1) % every == 0


def _kept_anyway(policy: str, module: _Module) -> int:
    return module.inputs + (module.part.products if policy == "selective" else 0)


def _shared(size: Size, shape: _Shape, recomputed: list[int]) -> int:
    """What several modules of a level share: masks, waves, tables, and the stream between pre and
    post layers, which both ways between levels read."""
    own, n, between = shape.own, shape.n, shape.between
    kept = parts.view(size, own, n) if own.pre + own.post else 0
    kept += parts.tables(size, n, between, bool(recomputed))
    if between is None:
        return kept
    config = size.config
    reads = config.skip == "gated" or config.attention_resampling == "earlier" or 0 in recomputed
    return kept + parts.crossing_waves(size, between) + (size.numbers(n * own.dim) if reads else 0)


def _stack_norms(size: Size, shape: _Shape) -> Part:
    norms = Part()
    if shape.between is not None:
        norms += parts.stack_norm(size, shape.n, shape.own.dim)
    if shape.number > 0:
        norms += parts.stack_norm(size, shape.n, shape.own.dim)
    return norms


def _cache(size: Size, shape: _Shape) -> int:
    """Keys and values, the positions of the bucket that fills, and what the last one gave."""
    own, between = shape.own, shape.between
    positions = shape.n if own.window is None else own.window
    numbers = (own.pre + own.post) * positions * parts.key_value_width(size, own)
    if between is not None:
        words = between.inner.pooling == "spacelike"
        numbers += own.dim * (1 if words else between.s - 1)
        numbers += own.dim * (between.s if size.config.upsampling == "linear" else 1)
        if size.config.attention_resampling == "earlier":
            numbers += (between.n + between.g) * parts.key_value_width(size, own)
    return numbers * size.number_bytes


def _cache_growth(size: Size, shape: _Shape) -> float:
    """Bytes per token at full resolution."""
    own, between = shape.own, shape.between
    width = parts.key_value_width(size, own) * size.number_bytes
    growth = 0.0 if own.window is not None else (own.pre + own.post) * width / shape.stride
    if between is not None and size.config.attention_resampling == "earlier":
        growth += width / shape.stride * (1 + 1 / between.s)
    return growth


def _ends(size: Size, length: int) -> LevelCost:
    head, embeddings = parts.head(size, length), parts.embeddings(size, length)
    both = head + embeddings
    return LevelCost(
        name="ends",
        stride=1,
        parameters=both.parameters,
        frozen_parameters=0,
        flops=both.flops,
        recompute_flops=0,
        activation_bytes=both.kept,
        offloaded_bytes=0,
        transient_bytes=parts.loss_chunk(size, length),
        cache_bytes=0,
        cache_bytes_per_token=0.0,
    )
