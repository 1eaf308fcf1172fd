"""Weights to and from ``hourglass-transformer-pytorch`` 0.0.6 (``HourglassTransformerLM``).

Both models compute the same, so only names and the joining of matrices differ: here self-attention
has one ``qkv`` matrix (rows of q, k, v) and the other two attentions have three; there every
attention has ``to_q`` and ``to_kv``. Both directions are exact copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hourglass_dist.model.hourglass import Hourglass, HourglassLM
from hourglass_dist.model.layers import Attention, FeedForward, Layer
from hourglass_dist.model.resample import BucketAttention, EarlierAttention, SingleKeyAttention
from hourglass_dist.model.settings import ModelConfig


def to_lucidrains(model: HourglassLM) -> dict[str, Tensor]:
    """Return a state_dict for ``HourglassTransformerLM(**lucidrains_kwargs(model.config))``.

    Raises ValueError for a model that cannot be built there.
    """
    lucidrains_kwargs(model.config)
    return {name: _join(sources) for name, sources in _names(model).items()}


@torch.no_grad()
def from_lucidrains(state_dict: Mapping[str, Tensor], model: HourglassLM) -> None:
    """Copy a state_dict of ``HourglassTransformerLM`` into ``model``.

    Raises ValueError, naming the key, when one is missing, unknown or of another shape; then
    ``model`` is unchanged.
    """
    lucidrains_kwargs(model.config)
    targets = _names(model)
    for name in state_dict:
        if name not in targets:
            raise ValueError(f"lucidrains weights: {name}: no such weight in this model")
    for name, parts in targets.items():
        if name not in state_dict:
            raise ValueError(f"lucidrains weights: {name}: missing")
        expected = (sum(len(part) for part in parts), *parts[0].shape[1:])
        given = tuple(state_dict[name].shape)
        if given != expected:
            raise ValueError(
                f"lucidrains weights: {name}: expected shape {expected}, given {given}"
            )
    for name, parts in targets.items():
        pieces = torch.split(state_dict[name], [len(part) for part in parts])
        for part, piece in zip(parts, pieces, strict=True):
            part.copy_(piece)


def lucidrains_kwargs(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of ``HourglassTransformerLM`` that make this model.

    Dropout, activation checkpointing and masks have no weights and are left out.
    Raises ValueError, naming the setting, when the model cannot be built there.
    """
    for name, theirs in _MODEL.items():
        _require(name, theirs, getattr(config, name))
    _require("upsampling", _SAMPLING[config.downsampling], config.upsampling)
    if config.attention_resampling == "earlier":
        _require("attention_resampling", "bucket", "earlier")
    outermost = config.levels[0]
    for index, level in enumerate(config.levels):
        same = {name: getattr(outermost, name) for name in ("dim", "heads", "dim_head")}
        for name, theirs in (_LEVEL | same).items():
            _require(f"levels.{index}.{name}", theirs, getattr(level, name))
    *outer, inner = config.levels
    depth: Any = inner.pre
    for level in reversed(outer):
        depth = (level.pre, depth, level.post)
    return {
        "num_tokens": config.vocab_size,
        "dim": outermost.dim,
        "max_seq_len": config.max_seq_len,
        "depth": depth,
        "shorten_factor": tuple(level.shorten for level in config.levels[1:]) or None,
        "heads": outermost.heads,
        "dim_head": outermost.dim_head,
        "attn_resampling": config.attention_resampling != "none",
        "updown_sample_type": "linear" if config.downsampling == "linear" else "naive",
        "causal": config.causal,
    }


_MODEL = {
    "positions": "learned",
    "norm": "layer",
    "stack_norms": False,
    "feed_forward": "gelu",
    "bias": True,
    "qk_norm": False,
    "z_loss": 0.0,
    "skip": "plain",
}
"""Settings that a model must have for the reference to build it."""
_LEVEL = {"pooling": "fixed", "shorten_choices": (), "ff_mult": 4, "window": None}
"""Settings that each of its levels must have."""
_SAMPLING = {"mean": "repeat", "linear": "linear"}
"""Upsampling that the reference pairs with each downsampling."""


def _require(setting: str, theirs: object, ours: object) -> None:
    if ours != theirs:
        raise ValueError(
            "hourglass-transformer-pytorch cannot build this model: "
            f"model.{setting}: {theirs} -> {ours}"
        )


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.detach() for part in parts]).clone()


Names = dict[str, list[Tensor]]
"""Map from a key of the reference to our rows that it joins, top to bottom (parameter views)."""


def _names(model: HourglassLM) -> Names:
    is_flat = model.hourglass.is_innermost
    return {
        **_module("token_emb", model.tokens),
        **_module("pos_emb", _there(model.positions)),
        **_level("transformer", model.hourglass),
        **_module("transformer.norm" if is_flat else "transformer.norm_out", model.head.norm),
        **_module("to_logits", model.head.output),
    }


def _level(prefix: str, level: Hourglass) -> Names:
    if level.is_innermost:
        return _stack(prefix, level.pre)
    names = {
        **_stack(f"{prefix}.pre_transformer", level.pre),
        **_level(f"{prefix}.valley_transformer", level.inner),
        **_stack(f"{prefix}.post_transformer", level.post),
    }
    for there, here in (("downsample", level.shorten.pool), ("upsample", level.lengthen.spread)):
        if isinstance(proj := getattr(here, "proj", None), nn.Linear):
            names |= _module(f"{prefix}.{there}.proj", proj)
    for there, resample in (("pre", level.shorten), ("post", level.lengthen)):
        if resample.attends == "bucket":
            block = f"{prefix}.attn_resampling_{there}_valley.layers.0"
            assert not isinstance(resample.attention, EarlierAttention)
            names |= _layer(block, resample.attention, resample.feed_forward)
    return names


def _stack(prefix: str, layers: nn.ModuleList) -> Names:
    names: Names = {}
    for index, layer in enumerate(layers):
        assert isinstance(layer, Layer)
        names |= _layer(f"{prefix}.layers.{index}", layer.attention, layer.feed_forward)
    return names


def _layer(
    prefix: str,
    attention: Attention | BucketAttention | SingleKeyAttention,
    feed_forward: FeedForward,
) -> Names:
    if isinstance(attention, Attention):
        q, k, v = attention.qkv.weight.detach().chunk(3)
    else:
        weights = (attention.query.weight, attention.key.weight, attention.value.weight)
        q, k, v = (weight.detach() for weight in weights)
    return {
        **_module(f"{prefix}.0.norm", attention.norm),
        f"{prefix}.0.fn.to_q.weight": [q],
        f"{prefix}.0.fn.to_kv.weight": [k, v],
        **_module(f"{prefix}.0.fn.to_out", attention.out),
        **_module(f"{prefix}.1.norm", feed_forward.norm),
        **_module(f"{prefix}.1.fn.0", feed_forward.hidden),
        **_module(f"{prefix}.1.fn.3", feed_forward.out),
    }


def _there(module: nn.Module | None) -> nn.Module:
    assert module is not None, "lucidrains_kwargs asks for learned positions"
    return module


def _module(prefix: str, module: nn.Module) -> Names:
    return {
        f"{prefix}.{name}": [parameter.detach()] for name, parameter in module.named_parameters()
    }
