"""The hourglass language model: each level runs its layers around the next, shorter level.

    tokens -> embeddings -> pre -> shorten -> (inner level) -> lengthen -> post -> norm -> logits

Legend: B rows, L positions of a level, G positions of the next one, D width, E width of the next
level, V vocabulary. With the settings of ``configs/lucidrains.yaml`` the model computes what
``hourglass-transformer-pytorch`` 0.0.6 computes, at less cost and without its faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from hourglass_dist.model.cache import Cache, KeyValues, LevelCache
from hourglass_dist.model.checkpointing import Recompute
from hourglass_dist.model.head import Head
from hourglass_dist.model.layers import (
    Attention,
    FeedForward,
    Layer,
    LevelInputs,
    RelativePositions,
    drop,
    level_inputs,
)
from hourglass_dist.model.layout import Rows, check_documents, document_positions, row_layouts
from hourglass_dist.model.norms import RMSNorm, make_norm
from hourglass_dist.model.pool import Gate, LinearPool, LinearSpread, Pad, take
from hourglass_dist.model.resample import (
    BucketAttention,
    Downsample,
    EarlierAttention,
    SingleKeyAttention,
    Upsample,
)
from hourglass_dist.model.settings import ModelConfig

INIT_STD = 0.02

Made = AbstractContextManager[None]


def _as_they_are(_: nn.Module) -> Made:
    return nullcontext()


class Hourglass(nn.Module):
    """Level ``index`` of the model and all levels inside it: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ModelConfig, index: int = 0) -> None:
        super().__init__()
        self.config, self.index = config, index
        own = config.levels[index]
        draws = any(level.dropout > 0 for level in config.levels)
        self.run = Recompute(own.activation_checkpointing, draws)
        self.pre = nn.ModuleList(Layer(config, own) for _ in range(own.pre))
        self.is_innermost = index == len(config.levels) - 1
        ends = config.stack_norms
        self.pre_norm = make_norm(config, own.dim) if ends and not self.is_innermost else None
        if not self.is_innermost:
            self.shorten = Downsample(config, index)
            self.inner = Hourglass(config, index + 1)
            self.lengthen = Upsample(config, index)
        self.post = nn.ModuleList(Layer(config, own) for _ in range(own.post))
        # the last stack of level 0 ends in the norm before the logits
        self.post_norm = make_norm(config, own.dim) if ends and index > 0 else None

    def forward(
        self, x_BLD: Tensor, inputs: list[LevelInputs], cache: LevelCache | None = None
    ) -> Tensor:
        """Map (B, L, D) to (B, L, D), with the inputs of all levels; fill ``cache``, if given."""
        own = inputs[self.index]
        known: Iterator[KeyValues | None] = repeat(None)
        bucket = inner = None
        if cache is not None:
            known, bucket, inner = iter([*cache.pre, *cache.post]), cache.bucket, cache.inner
        for number, layer in enumerate(self.pre):
            x_BLD = self.run(number, layer, x_BLD, own, next(known))
        if not self.is_innermost:
            if self.pre_norm is not None:
                x_BLD = self.pre_norm(x_BLD)
            pooled_BGE = self.run(0, self.shorten, x_BLD, own, bucket)
            inner_BGE = self.inner(pooled_BGE, inputs, inner)
            x_BLD = self.run(0, self.lengthen, inner_BGE, x_BLD, own, bucket)
        for number, layer in enumerate(self.post, start=len(self.pre)):
            x_BLD = self.run(number, layer, x_BLD, own, next(known))
        return self.post_norm(x_BLD) if self.post_norm is not None else x_BLD


class HourglassLM(nn.Module):
    """The language model: embeddings, an hourglass, a norm and the output layer.

    Its weights come from ``init_weights(0)``; under ``torch.device("meta")`` they are not drawn.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        own = config.levels[0]
        self.tokens = nn.Embedding(config.vocab_size, own.dim)
        self.positions = (
            nn.Embedding(config.max_seq_len, own.dim) if config.max_seq_len is not None else None
        )
        self.dropout = own.dropout if config.residual_dropout else 0.0
        self.hourglass = Hourglass(config)
        self.head = Head(config, own.dim)
        if not self.tokens.weight.is_meta:
            self.init_weights(0)

    def forward(
        self,
        tokens_BL: Tensor,
        mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
        targets_BL: Tensor | None = None,
        each_target: bool = False,
        cache: Cache | None = None,
    ) -> Any:
        """Map tokens, int64 (B, L), to logits (B, L, V); with targets to (summed nats, number of
        scored targets); with ``each_target`` to (nats (B, L), that number), without gradient.

        With an empty ``cache``, rows are prompts of ``cache.lengths_B`` tokens, padded at the end:
        they fill the cache, and the logits are those after their last tokens, (B, 1, V).

        ``mask_BL`` is True at real tokens: padding has no effect on them, and the logits at its
        positions are meaningless. ``documents_BL`` numbers the documents of packed rows: no
        document affects another. Raises ValueError for an empty row, one longer than the position
        table, or documents out of order.
        """
        self.check(tokens_BL, documents_BL)
        assert cache is None or mask_BL is None
        order_BL = None
        real_BL = mask_BL
        if mask_BL is not None and not self.config.legacy_mask:
            # padding goes to the end of the row, where no real token sees it
            order_BL = (~mask_BL).to(torch.uint8).argsort(dim=1, stable=True)
            tokens_BL = tokens_BL.gather(1, order_BL)
            if documents_BL is not None:
                documents_BL = _padding_last(documents_BL, mask_BL, order_BL)
            real_BL = None if self.config.causal else _real_first(mask_BL)
        x_BLD = self.embed(tokens_BL, documents_BL)
        layouts = self.layouts(tokens_BL, documents_BL, real_BL)
        inputs = level_inputs(self.config, layouts, x_BLD)
        level_cache = None if cache is None else cache.begin(tokens_BL, layouts)
        x_BLD = self.hourglass(x_BLD, inputs, level_cache)
        if cache is not None:
            x_BLD = take(x_BLD, cache.lengths_B[:, None] - 1)
        if order_BL is not None:
            back_BL = order_BL.argsort(dim=1)
            x_BLD = x_BLD.gather(1, back_BL.unsqueeze(-1).expand_as(x_BLD))
        return self.head(x_BLD, targets_BL, each_target)

    def check(self, tokens_BL: Tensor, documents_BL: Tensor | None = None) -> None:
        """Raise ValueError for rows of a wrong length or with documents that cannot be used."""
        length, longest = tokens_BL.shape[1], self.config.max_seq_len
        if length < 1:
            raise ValueError("model: expected at least 1 token in a row, given 0")
        if longest is not None and length > longest:
            raise ValueError(
                f"model: expected 1 to max_seq_len={longest} tokens, given {length}: "
                "positions are learned"
            )
        if documents_BL is not None:
            check_documents(documents_BL, tokens_BL)
            if not self.config.causal:
                raise ValueError("model: packed documents need a causal model, given causal=false")

    def embed(self, tokens_BL: Tensor, documents_BL: Tensor | None = None) -> Tensor:
        """Return the embeddings of tokens and learned positions, (B, L) -> (B, L, D)."""
        x_BLD: Tensor = self.tokens(tokens_BL)
        if self.positions is not None:
            if documents_BL is None:
                position = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
            else:
                position = document_positions(documents_BL)
            x_BLD = x_BLD + self.positions(position)
        return drop(x_BLD, self.dropout, self.training)

    def layouts(
        self,
        tokens_BL: Tensor,
        documents_BL: Tensor | None = None,
        mask_BL: Tensor | None = None,
    ) -> list[Rows]:
        """Return the layout of these rows at every level. In training, a level with
        ``shorten_choices`` draws its factor anew."""
        shortens = [
            level.shorten_choices[int(torch.randint(len(level.shorten_choices), ()))]
            if self.training and level.shorten_choices
            else level.shorten
            for level in self.config.levels
        ]
        return row_layouts(self.config, tokens_BL, documents_BL, mask_BL, shortens)

    def compile_layers(self) -> None:
        """Compile each layer and each resampling layer to one graph, for training passes only."""
        for module in self.modules():
            if isinstance(module, Hourglass):
                module.run.compile()

    @torch.no_grad()
    def init_weights(self, seed: int, made: Callable[[nn.Module], Made] = _as_they_are) -> None:
        """Draw every weight; the same seed gives the same weights on the same kind of device.

        ================================  ====================================================
        embeddings, output layer          normal, std 0.02
        matrices                          normal, std 0.02
        last matrix of a residual branch  normal, std 0.02 / sqrt(number of residual branches)
        linear resampling                 pooling: the mean of a bucket; spreading: a repeat
        norms, gates                      ones
        vectors that pad the width        normal, std 0.02
        relative positions                matrices: normal, std 0.02; u and v: zeros
        biases, everywhere                zeros
        ================================  ====================================================

        A residual branch is one attention or one feed-forward; those of all levels count together
        (the rule of GPT-2, Radford et al. 2019). The context ``made(module)`` is entered before a
        module's own weights are drawn and left after: a caller that cannot hold all weights at once
        allocates them on entry and partitions them on exit.
        """
        branches = [m for m in self.modules() if isinstance(m, BRANCHES)]
        last = {id(branch.out) for branch in branches}
        small = INIT_STD / math.sqrt(max(1, len(branches)))
        resampling = {
            id(m.proj): m for m in self.modules() if isinstance(m, (LinearPool, LinearSpread))
        }
        generator = torch.Generator()
        for module in self.modules():
            with made(module):
                if module is self.tokens:
                    generator = torch.Generator(device=self.tokens.weight.device)
                    generator.manual_seed(seed)
                std = small if id(module) in last else INIT_STD
                _draw(module, std, generator)
                pool = resampling.get(id(module))
                if isinstance(pool, LinearPool):
                    pool.init_as_mean()
                elif isinstance(pool, LinearSpread):
                    pool.init_as_repeat()


def _draw(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw the module's own weights, without those of submodules."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        module.weight.normal_(0.0, std, generator=generator)
    elif isinstance(module, (nn.LayerNorm, RMSNorm, Gate)):
        module.weight.fill_(1.0)
    elif isinstance(module, Pad):
        module.vector.normal_(0.0, INIT_STD, generator=generator)
    elif isinstance(module, RelativePositions):
        module.weight.normal_(0.0, INIT_STD, generator=generator)
        module.content.zero_()
        module.place.zero_()
    if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
        module.bias.zero_()


BRANCHES = (Attention, FeedForward, BucketAttention, EarlierAttention, SingleKeyAttention)
"""Classes of modules that add to the residual stream; the last matrix of each is ``out``."""


def _padding_last(documents_BL: Tensor, mask_BL: Tensor, order_BL: Tensor) -> Tensor:
    """Return the document ids (B, L) in the order ``order_BL``; padding is one more document."""
    after = documents_BL.amax() + 1
    return torch.where(mask_BL, documents_BL, after).gather(1, order_BL)


def _real_first(mask_BL: Tensor) -> Tensor:
    """Return the mask (B, L), real tokens first; a row of padding alone keeps one visible key."""
    index_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    return index_L < mask_BL.sum(dim=1, keepdim=True).clamp(min=1)
