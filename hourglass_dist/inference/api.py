"""Python interface to exports: ``hourglass_dist.load(path)`` returns a ``Model``.

In training an end-of-text id precedes every document, so one is put in front of every text here,
too.

Legend: B = 1 row, L tokens of a text and the end-of-text id before them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hourglass_dist.data.tokenizer import Tokenizer
from hourglass_dist.inference.export import load_export
from hourglass_dist.inference.generate import continue_text
from hourglass_dist.inference.score import Score
from hourglass_dist.model.hourglass import HourglassLM


class Model:
    """A trained model with its tokenizer."""

    def __init__(self, module: HourglassLM, tokenizer: Tokenizer, about: dict[str, Any]) -> None:
        self.module = module
        """Model as a ``torch.nn.Module`` in evaluation mode."""
        self.tokenizer = tokenizer
        self.about = about
        """Contents of the export's config.json: settings of the model, origin of the weights."""

    @torch.no_grad()
    def logits(self, text: str) -> Tensor:
        """Return fp32 logits (L, V): row t predicts the token after the first t of ``text``."""
        logits_BLV: Tensor = self.module(self._row(self._ids(text)))
        return logits_BLV[0, :, : self.tokenizer.vocab_size].float()

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 400,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Return the continuation of each prompt, as ``hourglass generate`` writes it.

        Prompt number i is sampled with ``seed + i``. Raises ValueError for settings out of range.
        """
        return [
            "".join(
                continue_text(
                    self.module,
                    self.tokenizer,
                    prompt.encode(),
                    max_new_tokens,
                    temperature,
                    top_k,
                    top_p,
                    seed + number,
                )
            )
            for number, prompt in enumerate(_several(prompts))
        ]

    @torch.no_grad()
    def score(self, texts: Sequence[str]) -> list[Score]:
        """Return the score of each text: nats, tokens, bytes and bits per byte.

        Texts longer than a training row are scored row by row, as ``hourglass evaluate`` does. The
        end-of-text id is not scored.
        """
        return [self._score(text) for text in _several(texts)]

    def _score(self, text: str) -> Score:
        ids, length = self._ids(text), int(self.about["trained"]["data"]["seq_len"])
        nats = 0.0
        for begin in range(0, len(ids) - 1, length):
            row = ids[begin : begin + length + 1]
            inputs_BL, targets_BL = self._row(row[:-1]), self._row(row[1:])
            nats_BL = self.module(inputs_BL, targets_BL=targets_BL, each_target=True)[0]
            nats += float(nats_BL.double().sum())
        return Score(nats, len(ids) - 1, len(text.encode()))

    def _ids(self, text: str) -> list[int]:
        return [self.tokenizer.eos_id, *self.tokenizer.encode_prompt(text.encode())]

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([ids], device=self.module.tokens.weight.device)


def load(path: str | Path, device: str = "cpu") -> Model:
    """Load an export, a folder made by ``hourglass export``, in fp32 onto a device.

    Raises ValueError when a file is missing, damaged or of another model or tokenizer.
    """
    module, tokenizer, about = load_export(Path(path))
    return Model(module.to(device), tokenizer, about)


def _several(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise ValueError(f"expected a list of texts, given one text: write [{texts[:20]!r}]")
    return texts
