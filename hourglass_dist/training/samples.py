"""Samples of text during training: short continuations, with a random generator of their own.

The main rank generates with a second model that uses the weights of the engine, so the modes and
hooks of the trained model are not touched. At ZeRO-3 the rank holds all weights during that time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor

from hourglass_dist.data.batch import Batch
from hourglass_dist.data.tokenizer import Tokenizer
from hourglass_dist.inference.generate import generate
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.settings import ModelConfig

PROMPT_TOKENS = 64
"""Length of a prompt of held-out text, tokens."""
NEW_TOKENS = 128
"""Largest length of a continuation, tokens; an end-of-text id ends it."""
TEMPERATURE = 0.8


class Sample(NamedTuple):
    """Prompt and its continuation by the model."""

    prompt: str
    text: str


def prompts_of_text(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Return the ids of the user's prompts, each after an end-of-text id as in training text.

    Raises ValueError when one is not valid for the tokenizer.
    """
    return [[tokenizer.eos_id, *tokenizer.encode_prompt(text.encode())] for text in texts]


def prompts_of_rows(batches: Iterable[Batch], count: int) -> list[list[int]]:
    """Return the first ``PROMPT_TOKENS`` tokens of the first ``count`` rows."""
    rows = (row for b in batches for row, n in zip(b.tokens_BL, b.row_ids, strict=True) if n >= 0)
    return [row[:PROMPT_TOKENS].tolist() for row in islice(rows, count)]


def write_samples(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    count: int,
    seed: int,
) -> list[Sample]:
    """Return ``count`` continuations of the prompts in turn; equal weights and seed repeat them."""
    with torch.device("meta"):
        model = HourglassLM(config.with_checkpointing("none"))
    model.load_state_dict(dict(weights), assign=True)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for prompt in islice(cycle(prompts), count):
        new = generate(
            model,
            prompt,
            NEW_TOKENS,
            eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
            temperature=TEMPERATURE,
            generator=generator,
        )
        samples.append(Sample(tokenizer.decode(prompt), tokenizer.decode(list(new))))
    return samples
