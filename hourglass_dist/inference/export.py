"""Exports: a training checkpoint written as a self-contained folder, and read back as a model.

    exports/NAME/
        model.safetensors    fp32 weights under the model's own names
        config.json          the model's settings, the tokenizer's fingerprint, facts of the run
        tokenizer.json ...   the tokenizer

Reading the checkpoint needs neither deepspeed nor the same number of ranks. ``lucidrains`` is the
format for hourglass-transformer-pytorch 0.0.6: its parameter names, and its keyword arguments in
config.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hourglass_dist.checkpoint import save
from hourglass_dist.config import schema as settings
from hourglass_dist.config.model import parse_model
from hourglass_dist.config.schema import Config
from hourglass_dist.core.files import new_folder, replace, require_new
from hourglass_dist.data.tokenizer import Fingerprint, Tokenizer, load_tokenizer, require_same
from hourglass_dist.engine import sharded_state
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.lucidrains import lucidrains_kwargs, to_lucidrains
from hourglass_dist.model.settings import ModelConfig

FORMAT = 2
Format = Literal["hourglass", "lucidrains"]


def export(run: Path, out: Path, format: Format = "hourglass", step: int | None = None) -> int:
    """Write the newest checkpoint of ``run`` (or that of ``step``) to the new folder ``out`` and
    return the step.

    Raises ValueError when the run has no such checkpoint, the checkpoint is damaged, or ``out``
    exists.
    """
    require_new(out)
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run}: expected a run folder (with config.yaml), found none")
    config = settings.load(run / "config.yaml")
    saved_in = run / "checkpoints"
    path = save.latest(saved_in) if step is None else saved_in / save.tag(step)
    if path is None:
        raise ValueError(f"{saved_in}: no checkpoint has been saved yet")
    progress = save.verify(path)
    tokenizer = load_tokenizer(run / "tokenizer")
    saved = Fingerprint(**progress.tokenizer)
    require_same(saved, tokenizer.fingerprint, str(path), str(run / "tokenizer"))
    model = read_model(path, config.model)
    if format == "lucidrains":
        tensors, about = to_lucidrains(model), {"kwargs": lucidrains_kwargs(config.model)}
    else:
        tensors, about = dict(model.state_dict()), {"model": asdict(config.model)}
    about |= _origin(config, progress, tokenizer)
    with new_folder(out) as folder:
        sharded_state.write_tensors(
            folder / "model.safetensors",
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={"format": "pt"},
        )
        replace(folder / "config.json", json.dumps(about, indent=2) + "\n")
        tokenizer.save(folder)
    return progress.step


def _origin(
    config: Config, progress: save.TrainingProgress, tokenizer: Tokenizer
) -> dict[str, Any]:
    return {
        "model_type": "hourglass_lm",
        "architectures": ["HourglassLM"],
        "torch_dtype": "float32",
        "format": FORMAT,
        "hierarchy": config.model.hierarchy,
        "tokenizer": asdict(tokenizer.fingerprint),
        "trained": {
            "step": progress.step,
            "isolate_documents": config.data.isolate_documents,
            "tokens": config.data.tokens(progress.step),
            "data": progress.data,
        },
    }


def read_model(checkpoint_folder: Path, config: ModelConfig) -> HourglassLM:
    """Return a checkpoint of any ZeRO stage and world size as an fp32 model on the CPU."""
    reader = sharded_state.Reader(checkpoint_folder)
    frozen = set(reader.names("frozen"))
    weights = {
        name: reader.full("frozen" if name in frozen else "fp32", name).float()
        for name in reader.shapes
    }
    return _fill(config, weights, checkpoint_folder)


def load_export(folder: Path) -> tuple[HourglassLM, Tokenizer, dict[str, Any]]:
    """Return the model (fp32, CPU, evaluation mode), the tokenizer and config.json of an export.

    Raises ValueError when a file is missing, damaged, of another format version, or of another
    model or tokenizer.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: expected an export (with config.json), found none")
    try:
        about: dict[str, Any] = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
        saved = Fingerprint(**about["tokenizer"])
        version = about["format"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a readable export: {error}") from None
    if version != FORMAT:
        raise ValueError(f"{folder}: written by another version: format {version}, known {FORMAT}")
    if "model" not in about:
        raise ValueError(f"{folder}: exported for another package (--format lucidrains)")
    config = parse_model(about["model"], source=str(folder / "config.json"))
    tokenizer = load_tokenizer(folder)
    require_same(saved, tokenizer.fingerprint, f"{folder}/config.json", f"{folder}'s tokenizer")
    return _fill(config, weights, folder), tokenizer, about


class WarmStart:
    """Weights of an export that initialize a model module by module."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """Read the export. Raises ValueError as ``load_export`` does, and when parameter shapes
        differ from those of ``config``."""
        model, tokenizer, _ = load_export(folder)
        self.fingerprint = tokenizer.fingerprint
        self._folder, self._weights = folder, model.state_dict()
        with torch.device("meta"):
            wanted = {n: tuple(p.shape) for n, p in HourglassLM(config).named_parameters()}
        have = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        for name in sorted(wanted.keys() | have.keys()):
            if wanted.get(name) != have.get(name):
                raise ValueError(
                    f"train.init_from: {folder}: {name}: the run's model has shape "
                    f"{wanted.get(name)}, the export {have.get(name)}"
                )

    @torch.no_grad()
    def fill(self, name: str, module: nn.Module) -> None:
        """Overwrite ``module``'s own weights, not those of submodules; ``name`` is its name."""
        for short, parameter in module.named_parameters(recurse=False):
            parameter.copy_(self._weights[f"{name}.{short}"])


def _fill(config: ModelConfig, weights: dict[str, Tensor], source: Path) -> HourglassLM:
    with torch.device("meta"):
        model = HourglassLM(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{source}: {name}: the model has shape {expected.get(name)}, "
                f"the file {found.get(name)}"
            )
    model.load_state_dict(weights, assign=True)
    return model.eval()
