"""Statistics and plots of a dataset: lengths of documents, bytes per token, how often ids occur."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_tools.datasets.blocks import read_samples
from data_tools.live_line import Show, silent
from hourglass_dist.core.files import replace
from hourglass_dist.data.manifest import Manifest, Split
from hourglass_dist.data.tokenizer import load_tokenizer
from hourglass_dist.pages.plots import histogram_plot, rank_plot, save


def bins_of(values: np.ndarray) -> dict[str, int]:
    """Return the counts of values by their first four binary digits, bins 1/16 to 1/8 wide."""
    exponents = np.maximum(np.frexp(np.maximum(values, 0).astype(np.float64))[1] - 4, 0)
    bins, counts = np.unique((values >> exponents) << exponents, return_counts=True)
    return {str(low): count for low, count in zip(bins.tolist(), counts.tolist(), strict=True)}


def stats(folder: Path, split: Split, out: Path, show: Show = silent) -> list[str]:
    """Write plots (PNG) and stats.json into the folder ``out`` and return lines to print."""
    manifest, tokenizer = Manifest.load(folder), load_tokenizer(folder)
    lengths_V = tokenizer.byte_lengths()
    counts_V = np.zeros(len(lengths_V), np.int64)
    tokens_D, bytes_D = [], []
    carried = np.zeros(2, np.int64)  # tokens and bytes of the document that is not at its end yet
    for number, shard in enumerate(manifest.split(split)):
        for sample in read_samples(folder / shard.path, manifest.dtype):
            ids = sample.tokens_T[: sample.tokens]
            counts_V += np.bincount(ids, minlength=len(lengths_V))
            text = np.concatenate([[0], np.cumsum(lengths_V[ids])])
            ends = np.concatenate([[0], sample.ends.astype(np.int64)])
            here = np.stack([np.diff(ends), np.diff(text[ends])])
            rest = np.array([len(ids) - ends[-1], text[-1] - text[ends[-1]]])
            if here.shape[1]:
                here[:, 0] += carried
                carried = rest
            else:
                carried = carried + rest
            tokens_D.append(here[0])
            bytes_D.append(here[1])
        show(f"{number + 1:,} shards")
    tokens, text_bytes = np.concatenate(tokens_D), np.concatenate(bytes_D)
    numbers = {
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
        "bytes": int(text_bytes.sum()),
        "median_tokens": int(np.median(tokens)),
        "longest_tokens": int(tokens.max()),
        "ids_used": int((counts_V > 0).sum()),
        "vocab_size": len(counts_V),
    }
    ratio = bins_of(text_bytes * 4096 // np.maximum(tokens - 1, 1))
    out.mkdir(parents=True, exist_ok=True)
    of_text = histogram_plot("bytes per token", {split: ratio}, scale=1 / 4096)
    save(
        histogram_plot("tokens", {split: bins_of(tokens)}),
        "Length of documents",
        out / "lengths.png",
    )
    save(of_text, "Bytes per token", out / "bytes_per_token.png")
    save(rank_plot(counts_V), "How often ids occur", out / "ids.png")
    replace(out / "stats.json", json.dumps(numbers, indent=1) + "\n")
    lines = [f"{name:<15} {value:,}" for name, value in numbers.items()]
    return [*lines, f"plots           {out}/lengths.png bytes_per_token.png ids.png"]
