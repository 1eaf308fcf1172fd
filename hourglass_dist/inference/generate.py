"""Text generation from an export: prompt bytes -> ids -> one pass over the prompt -> one sampled
token per step -> text.

Legend: V vocabulary, K ids that may be drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hourglass_dist.data.tokenizer import StreamDecoder, Tokenizer
from hourglass_dist.inference.export import load_export
from hourglass_dist.model.cache import Cache
from hourglass_dist.model.decode import prefill, step
from hourglass_dist.model.hourglass import HourglassLM


def generate_text(
    export: Path,
    prompt: bytes,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the text that continues ``prompt``, piece by piece; the same seed gives the same text.

    Raises ValueError before the first piece when the export is not readable, the prompt is not
    valid for its tokenizer, or a sampling setting is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    model, tokenizer, _ = load_export(export)
    yield from continue_text(
        model, tokenizer, prompt, max_new_tokens, temperature, top_k, top_p, seed
    )


def continue_text(
    model: HourglassLM,
    tokenizer: Tokenizer,
    prompt: bytes,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> Iterator[str]:
    """Yield the text that continues ``prompt``, as ``generate_text`` does, for a loaded model."""
    context = [tokenizer.eos_id, *tokenizer.encode_prompt(prompt)]
    generator = torch.Generator().manual_seed(seed)
    decoder = StreamDecoder(tokenizer)
    for token in generate(
        model,
        context,
        max_new_tokens,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
    ):
        if piece := decoder.feed([token]):
            yield piece
    if rest := decoder.flush():
        yield rest


def generate(
    model: HourglassLM,
    context: Sequence[int],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield up to ``max_new_tokens`` ids that continue ``context``; stop before ``eos_id``.

    ``context`` has one id or more and should begin with the end-of-text id, as training text does.
    Ids from ``vocab_size`` on are never drawn: a model may have more rows than the tokenizer has
    ids. A model with a position table drops the older half of a text that fills the table.
    Sets ``model`` to evaluation mode. Raises ValueError for an empty context.
    """
    if not context:
        raise ValueError("generate: expected at least one token of context, given none")
    room, stride = model.config.max_seq_len, model.config.strides[-1]
    device = model.tokens.weight.device
    ids = list(context)

    def read(start: int) -> tuple[Tensor, Cache]:
        return prefill(model, torch.tensor([ids[start:]], device=device))

    begin = 0 if room is None else context_start(len(ids), room, stride)
    logits_1V, cache = read(begin)
    for left in range(max_new_tokens, 0, -1):
        token = sample(logits_1V[0, :vocab_size], temperature, top_k, top_p, generator)
        if token == eos_id:
            return
        yield token
        if left == 1:
            return
        ids.append(token)
        if room is not None and len(ids) - begin > room:  # the table is full: keep half of the text
            begin = context_start(len(ids), max(1, room // 2), stride)
            logits_1V, cache = read(begin)
        else:
            logits_1V = step(model, torch.tensor([token], device=device), cache)


def context_start(length: int, room: int, stride: int) -> int:
    """Return how many of ``length`` tokens to drop so that the rest fits into ``room``.

    It is a multiple of ``stride``, the tokens under one position of the innermost level, so that
    every token keeps its offset in its bucket; but at least one token is left.
    """
    excess = max(0, length - room)
    return min(-(-excess // stride) * stride, length - 1)


def sample(
    logits_V: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """Draw an id from softmax(logits / temperature), restricted to the most likely ids.

    Temperature 0 takes the most likely id. ``top_k`` keeps that many ids (0: all), ``top_p`` the
    fewest ids whose probabilities, after ``top_k``, sum to at least ``top_p`` (nucleus sampling;
    Holtzman et al. 2020, arXiv 1904.09751). ``generator`` is on the CPU. Raises ValueError for
    settings out of range.
    """
    check_sampling(temperature, top_k, top_p)
    logits_V = logits_V.detach().double().cpu()
    if temperature == 0:
        return int(logits_V.argmax())
    kept_K, ids_K = logits_V.topk(min(top_k, len(logits_V)) if top_k else len(logits_V))
    probabilities_K = ((kept_K - kept_K[0]) / temperature).softmax(dim=0)
    before_K = probabilities_K.cumsum(dim=0) - probabilities_K
    probabilities_K = probabilities_K.masked_fill(before_K >= top_p, 0.0)
    return int(ids_K[torch.multinomial(probabilities_K, 1, generator=generator)])


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise ValueError when a sampling setting is out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a number of 0 or more, given {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: expected 0 (all) or more, given {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, given {top_p}")
