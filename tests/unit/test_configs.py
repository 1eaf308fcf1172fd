"""Each file in configs/ loads, survives a round trip, fits its ranks, and builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from paths import CONFIGS

from hourglass_dist.config.loader import to_yaml
from hourglass_dist.config.schema import load
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.planning.plan import settle_checkpointing

FILES = sorted(CONFIGS.glob("*.yaml"))

# Name: the ranks that its header promises, the paper's notation, the parameters in millions.
PROMISES = {
    "quickstart": ((1, 2), "1@1 4@2 1@1", (1, 6)),
    "tiny_bpe": ((1, 2), "1@1 4@2 1@1", (1, 6)),
    "lucidrains": ((1, 2, 4), "4@1 2@2 4@1", (38, 39)),
    "paper": ((1, 2, 4, 8), "4@1 8@3 4@1", (120, 140)),
    "modern": ((1, 2, 4, 8), "2@1 14@4 2@1", (190, 195)),
    "vanilla": ((1, 2, 4, 8), "12@1", (85, 90)),
    "base_zero2": ((1, 2, 4, 8), "2@1 2@2 24@8 2@2 2@1", (340, 360)),
    "mixture": ((1, 2, 4, 8), "2@1 2@2 24@8 2@2 2@1", (340, 360)),
    "large_zero3": ((64,), "2@1 2@2 28@8 2@2 2@1", (6000, 8000)),
    "offload_nvme": ((8,), "2@1 2@2 28@8 2@2 2@1", (6000, 8000)),
    "warm_start": ((8,), "2@1 2@2 28@8 2@2 2@1", (6000, 8000)),
}


def test_every_file_is_covered() -> None:
    assert [file.stem for file in FILES] == sorted(PROMISES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_the_same_after_a_round_trip(file: Path, tmp_path: Path) -> None:
    config = load(file)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load(copy) == config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_keeps_the_promises_of_its_header(file: Path) -> None:
    config = load(file)
    ranks, hierarchy, (least, most) = PROMISES[file.stem]
    for world_size in ranks:
        assert config.accumulation_steps(world_size) >= 1
    assert config.model.hierarchy == hierarchy
    with torch.device("meta"):
        model = HourglassLM(settle_checkpointing(config, "cuda").model)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert least <= millions <= most
    assert model(torch.zeros(1, config.data.seq_len, dtype=torch.int64, device="meta")).shape == (
        1, config.data.seq_len, config.model.vocab_size,
    )  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_header_gives_the_command_that_runs_it(file: Path) -> None:
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    commands = [
        f"launch/torchrun.sh configs/{file.name}",
        f"launch/slurm.sbatch configs/{file.name}",
    ]
    if file.stem == "quickstart":
        commands.append("launch/quickstart.sh")
    assert any(command in line for command in commands for line in header)
