"""The hourglass language model: a level runs its layers around the next, shorter level.

    tokens -> embeddings -> pre -> shorten -> (inner level) -> lengthen -> post -> norm -> logits

Legend: B rows, L positions of a level, G positions of the next one, D width, V vocabulary.
The function is that of ``hourglass-transformer-pytorch`` 0.0.6, for less and without its faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hourglass_dist.config import ModelConfig
from hourglass_dist.model.layers import Attention, FeedForward, Layer, visible_pairs
from hourglass_dist.model.linear import Linear
from hourglass_dist.model.resample import (
    BucketAttention,
    Lengthen,
    LinearPool,
    LinearSpread,
    Shorten,
    ValleyAttention,
)

INIT_STD = 0.02
IGNORED_TARGET = -100


class Hourglass(nn.Module):
    """Level ``level`` of the model and all levels inside it: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: ModelConfig, level: int = 0) -> None:
        super().__init__()
        own = config.levels[level]
        self.causal = config.causal
        self.recompute = own.activation_checkpointing == "full"
        self.draws = config.attn_dropout > 0 or config.ff_dropout > 0
        self.pre = nn.ModuleList(Layer(config) for _ in range(own.pre))
        self.is_innermost = level == len(config.levels) - 1
        if not self.is_innermost:
            shorten = config.levels[level + 1].shorten
            self.shorten = Shorten(config, shorten)
            self.inner = Hourglass(config, level + 1)
            self.lengthen = Lengthen(config, shorten)
        self.post = nn.ModuleList(Layer(config) for _ in range(own.post))

    def forward(self, x_BLD: Tensor, valid_BL: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D). ``valid_BL`` is True at real tokens; None: all of them are."""
        visible_B1LL = visible_pairs(valid_BL, self.causal)
        for layer in self.pre:
            x_BLD = self._run(layer, x_BLD, visible_B1LL)
        if not self.is_innermost:
            pooled_BGD = self._run(self.shorten, x_BLD, valid_BL)
            valley_BGD = self.inner(pooled_BGD, self.shorten.shorten_mask(valid_BL))
            x_BLD = self._run(self.lengthen, valley_BGD, x_BLD)
        for layer in self.post:
            x_BLD = self._run(layer, x_BLD, visible_B1LL)
        return x_BLD

    def _run(self, module: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """``module(*inputs)``; under activation checkpointing only the inputs are kept."""
        if self.recompute and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(
                module, *inputs, use_reentrant=False, preserve_rng_state=self.draws
            )
            return out
        return module(*inputs)


class HourglassLM(nn.Module):
    """Token and position embeddings, an hourglass, a norm and the output layer.

    The weights are those of ``init_weights(0)``; under ``torch.device("meta")`` there are none yet.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_seq_len, config.dim)
        self.hourglass = Hourglass(config)
        self.norm = nn.LayerNorm(config.dim)
        self.logits = Linear(config.dim, config.vocab_size)
        if not self.tokens.weight.is_meta:
            self.init_weights(0)

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """int64 (B, L), 1 <= L <= max_seq_len, to logits (B, L, V).

        ``mask_BL`` is True at real tokens. Logits at padding mean nothing, and those at real tokens
        do not depend on what the padding holds. Raises ValueError for any other length.
        """
        length = tokens_BL.shape[1]
        if not 1 <= length <= self.config.max_seq_len:
            raise ValueError(
                f"model: expected 1 to max_seq_len={self.config.max_seq_len} tokens, given {length}"
            )
        places_L = torch.arange(length, device=tokens_BL.device)
        x_BLD = self.tokens(tokens_BL) + self.positions(places_L)
        logits_BLV: Tensor = self.logits(self.norm(self.hourglass(x_BLD, mask_BL)))
        return logits_BLV

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every weight anew; the same seed gives the same weights on the same kind of device.

        ================================  ====================================================
        embeddings, output layer          normal, std 0.02
        matrices                          normal, std 0.02
        last matrix of a residual branch  normal, std 0.02 / sqrt(number of residual branches)
        linear resampling                 the naive one: the mean of a bucket in, a repeat out
        norms                             ones
        biases, everywhere                zeros
        ================================  ====================================================

        A residual branch is one attention or one feed-forward, and all levels add to one stream
        (the rule of GPT-2, Radford et al. 2019).
        """
        generator = torch.Generator(device=self.tokens.weight.device).manual_seed(seed)
        branches = [m for m in self.modules() if isinstance(m, BRANCHES)]
        last = {id(branch.out) for branch in branches}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = INIT_STD / math.sqrt(len(branches)) if id(module) in last else INIT_STD
                module.weight.normal_(0.0, std, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
            if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
                module.bias.zero_()
        for module in self.modules():
            if isinstance(module, (LinearPool, LinearSpread)):
                module.init_as_naive()


BRANCHES = (Attention, FeedForward, BucketAttention, ValleyAttention)
"""Modules that add to the residual stream; the last matrix of each is its ``out``."""


def sum_loss(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """(nats summed in fp32 over the targets that are not -100, how many those are)."""
    nll = F.cross_entropy(
        logits_BLV.flatten(0, 1).float(),
        targets_BL.flatten(),
        ignore_index=IGNORED_TARGET,
        reduction="sum",
    )
    return nll, (targets_BL != IGNORED_TARGET).sum()
