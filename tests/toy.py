"""A small model, its data and settings, shared by the engine tests and their worker."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hourglass_dist.config import Config
from hourglass_dist.sections import parse

VOCAB, DIM, LENGTH = 61, 24, 16


class ToyModel(nn.Module):
    """Embedding, a residual feed-forward, a norm, an output layer, and a frozen matrix beside them.

    Odd sizes, so that no ZeRO partition falls on the edge of a tensor.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.up = nn.Linear(DIM, 37)
        self.down = nn.Linear(37, DIM)
        self.mix = nn.Linear(DIM, DIM, bias=False)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB)
        self.mix.weight.requires_grad = False

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x_BLD = self.embedding(tokens_BL)
        x_BLD = x_BLD + self.down(F.gelu(self.up(x_BLD))) + self.mix(x_BLD)
        return self.head(self.norm(x_BLD))


def toy_loss(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    loss = F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="sum")
    return loss, (targets_BL != -100).sum()


def make_config(stage: int, precision: str = "fp32") -> Config:
    zero: dict[str, object] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # or a model this small is not partitioned
    settings = {
        "run": {"dir": "unused", "seed": 5},
        "data": {"dataset": "unused", "seq_len": LENGTH, "batch_size": 16},
        "model": {"dim": DIM, "levels": [{"layers": 1}], "max_seq_len": LENGTH},
        "optim": {"lr": 1e-2, "warmup_steps": 3, "weight_decay": 0.1, "clip_grad_norm": 0.5},
        "train": {"steps": 20, "micro_batch_size": 4, "precision": precision},
        "eval": {"every": 10, "batch_size": 4},
        "checkpoint": {"every": 10},
        "deepspeed": {"zero_optimization": zero},
    }
    return parse(Config, settings, source="test")


def make_batch(step: int, config: Config) -> tuple[Tensor, Tensor]:
    """The global batch of a step: the next token is a fixed function of this one, with noise."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (config.data.batch_size, LENGTH), generator=generator)
    targets = (tokens * 7 + 3 + torch.randint(2, tokens.shape, generator=generator)) % VOCAB
    targets[0, -3:] = -100  # some positions do not count
    return tokens, targets
