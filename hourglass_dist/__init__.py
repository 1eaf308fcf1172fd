"""Hourglass language models from Python. Nothing is imported before it is used, torch included.

import hourglass_dist

model = hourglass_dist.load("exports/quickstart")     # a folder made by hourglass export
[text] = model.generate(["ROMEO:"], max_new_tokens=200)
[score] = model.score(["To be, or not to be"])        # score.bits_per_byte
logits_LV = model.logits("ROMEO:")                    # the last row predicts what comes next

config = hourglass_dist.parse_model({"dim": 64, "hierarchy": "1@1 2@4 1@1", "max_seq_len": 256})
module = hourglass_dist.HourglassLM(config)           # a torch.nn.Module with new weights
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hourglass_dist.core.version import __version__

if TYPE_CHECKING:
    from hourglass_dist.config.model import parse_model
    from hourglass_dist.inference.api import Model, load
    from hourglass_dist.model.hourglass import HourglassLM
    from hourglass_dist.model.settings import ModelConfig

__all__ = ["HourglassLM", "Model", "ModelConfig", "__version__", "load", "parse_model"]

_HOMES = {
    "HourglassLM": "hourglass_dist.model.hourglass",
    "Model": "hourglass_dist.inference.api",
    "ModelConfig": "hourglass_dist.model.settings",
    "load": "hourglass_dist.inference.api",
    "parse_model": "hourglass_dist.config.model",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the names above, without importing them."""
    return sorted([*globals(), *_HOMES])
