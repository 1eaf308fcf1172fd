"""``hourglass bench decode``: times the next token with a cache and with a whole forward pass.

The weights are random and the text is words of five letters, so that any 48 consecutive tokens
complete the same number of buckets, with every kind of pooling.

Legend: B rows (one), L tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hourglass_dist.bench.model import README
from hourglass_dist.bench.shared import (
    headline,
    interleave,
    machine,
    prepare,
    ratio,
    reference,
    seconds,
    show,
)
from hourglass_dist.config import schema as settings
from hourglass_dist.config.model import lucidrains_config
from hourglass_dist.model.decode import prefill, step
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.lucidrains import lucidrains_kwargs, to_lucidrains

TOKENS = 48
"""Number of tokens that are timed after each context."""
CONTEXTS = (64, 512, 1024, 2048)
"""Numbers of tokens before the timed ones."""


def bench_decode(
    repeats: int, threads: int | None, device_name: str, quick: bool, config_file: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure, print the tables and return (machine, rows of all tables). Raises ValueError when
    the reference or the device is missing, or ``config_file`` is wrong."""
    device = prepare(device_name, threads)
    package = reference()
    modern = settings.load(config_file).model.with_checkpointing("none")
    contexts = (16, 32) if quick else CONTEXTS
    readme: dict[str, Any] = {**README, "max_seq_len": contexts[-1] + TOKENS}
    size = {"dim": 64, "heads": 2, "dim_head": 32} if quick else {"dim": 512}
    small = lucidrains_config(num_tokens=256, **(readme | size))
    facts = machine(device)
    print(headline(facts), flush=True)

    ours = HourglassLM(small)
    theirs = package.HourglassTransformerLM(**lucidrains_kwargs(small))
    theirs.load_state_dict(to_lucidrains(ours))
    wrapper = package.autoregressive_wrapper.AutoregressiveWrapper(theirs).to(device).eval()
    title = f"readme, {small.hierarchy}, positions up to {small.max_seq_len}"
    found = bench_contexts(title, ours.to(device), wrapper, contexts, repeats)
    title = f"{config_file}, {modern.hierarchy}"
    found += bench_contexts(title, HourglassLM(modern).to(device), None, contexts, repeats)
    return facts, found


def text(length: int, device: torch.device) -> Tensor:
    """Return (1, L) bytes: words of five random letters."""
    letters = torch.randint(97, 123, (1, length), generator=torch.Generator().manual_seed(2))
    letters[:, 5::6] = 32
    return letters.to(device)


def bench_contexts(
    title: str,
    model: HourglassLM,
    wrapper: Any,
    contexts: tuple[int, ...],
    repeats: int,
) -> list[dict[str, Any]]:
    """Measure and print one table, tokens/s after each context, and return its rows."""
    device = model.tokens.weight.device
    tokens_BL = text(contexts[-1] + TOKENS, device)

    def with_cache(context: int) -> Callable[[], float]:
        def run() -> float:
            _, cache = prefill(model, tokens_BL[:, : context - 1])
            step(model, tokens_BL[:, context - 1], cache)  # the cache grows here, before the timing
            rest = tokens_BL[:, context : context + TOKENS].unbind(dim=1)
            return (
                seconds(lambda: [step(model, token_B, cache) for token_B in rest], device) / TOKENS
            )

        return run

    def whole(context: int) -> Callable[[], float]:
        @torch.no_grad()
        def run() -> float:
            return seconds(lambda: model(tokens_BL[:, :context]), device)

        return run

    def generate(context: int) -> Callable[[], float]:
        def run() -> float:
            return seconds(lambda: wrapper.generate(tokens_BL[:, :context], 1), device)

        return run

    model.eval()
    kinds = {"step": with_cache, "forward": whole}
    if wrapper is not None:
        kinds["reference"] = generate
    variants = {f"{kind} {c}": make(c) for c in contexts for kind, make in kinds.items()}
    times = interleave(variants, repeats, title)
    found = [_row(title, context, contexts[0], times) for context in contexts]
    columns = {
        "tokens before": "{context}",
        "ms a token": "{ms:.2f}",
        f"time / after {contexts[0]}": "{slower:.2f}",
        "tokens/s": "{step:,.1f}",
        "forward each: tokens/s": "{forward:,.2f}",
        "faster": "{over_forward:,.1f}",
    }
    if wrapper is not None:
        columns |= {
            "reference: tokens/s": "{reference:,.2f}",
            "x reference": "{over_reference:,.1f}",
        }
    show(title, found, columns)
    return found


def _row(title: str, context: int, first: int, times: dict[str, list[float]]) -> dict[str, Any]:
    mine = times[f"step {context}"]
    row: dict[str, Any] = {"case": title, "context": context}
    row |= {"ms": 1e3 * statistics.median(mine), "slower": ratio(mine, times[f"step {first}"])}
    for kind in ("step", "forward", "reference"):
        if taken := times.get(f"{kind} {context}"):
            row |= {kind: 1 / statistics.median(taken), f"over_{kind}": ratio(taken, mine)}
    return row
