"""Several sources, phases, skipped shards: through the settings, the stream and real runs."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import local, make, refusal, words
from paths import CONFIGS, HELPERS
from ranks import torchrun

from data_tools.train_tokenizer import train_tokenizer
from hourglass_dist import train
from hourglass_dist.config.data import DataConfig
from hourglass_dist.config.loader import ConfigError
from hourglass_dist.config.schema import Config, load
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.mixture import Dataset, make_plan, open_mixture
from hourglass_dist.data.order import locate
from hourglass_dist.data.shards import ShardReader
from hourglass_dist.data.stream import Stream
from hourglass_dist.data.tokenizer import load_tokenizer

NAMES = ("web", "books")
WORLDS = [w for w in range(1, 49) if 48 % w == 0]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    made = []
    for seed, name in enumerate(NAMES):
        folder = tmp_path_factory.mktemp(name)
        made.append(local(make(folder, words(60 + 60 * seed, seed)), name))
    return made


def settings(datasets: list[Dataset], **changes: object) -> DataConfig:
    sources = [
        {"name": d.name, "path": d.where, "weight": w}
        for d, w in zip(datasets, (3, 1), strict=False)
    ]
    usual = {"sources": sources, "seq_len": 16, "batch_size": 48}
    return DataConfig.model_validate_json(json.dumps(usual | changes))


PHASES = [
    {"until_step": 8, "batch_size": 24, "seq_len": 8},
    {"until_step": 16, "seq_len": 8, "weights": {"books": 9}},
]


def test_the_rows_are_those_of_the_order(datasets: list[Dataset]) -> None:
    """Lengths and sizes of the phases, and every row where ``locate`` says."""
    plan = make_plan(datasets, settings(datasets, phases=PHASES), seed=3, steps=30)
    readers = {
        length: [ShardReader(d.manifest, "train", length) for d in datasets] for length in (8, 16)
    }
    for step, batch in enumerate(islice(Stream(datasets, plan).batches(), 30)):
        shape = (24 if step < 8 else 48, 8 if step < 16 else 16)
        assert batch.tokens_BL.shape == shape
        first = plan.first_row(step)
        assert batch.row_ids.tolist() == list(range(first, first + shape[0]))
        for n, tokens, targets in zip(
            batch.row_ids.tolist(), batch.tokens_BL, batch.targets_BL, strict=True
        ):
            at = locate(plan, n)
            inputs_L, targets_L = readers[shape[1]][at.source].row(at.shard, at.row)
            assert tokens.tolist() == inputs_L.tolist()
            assert targets.tolist() == targets_L.tolist()


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_size_reads_the_same_batches_from_a_cold_start(
    datasets: list[Dataset], world: int
) -> None:
    data = settings(datasets, batch_size=48, phases=[PHASES[1]])
    plan = make_plan(datasets, data, seed=3, steps=10**6)
    for start in (0, 15, 987_654):
        whole = next(Stream(datasets, plan).batches(start))
        parts = [next(Stream(datasets, plan, r, world).batches(start)) for r in range(world)]
        assert torch.equal(torch.cat([part.targets_BL for part in parts]), whole.targets_BL)
        assert torch.equal(torch.cat([part.tokens_BL for part in parts]), whole.tokens_BL)
        assert np.concatenate([p.row_ids for p in parts]).tolist() == whole.row_ids.tolist()


def test_short_rows_and_long_rows_read_every_token_once(datasets: list[Dataset]) -> None:
    """One source, read for an epoch in rows of 8, then of 16: together every token once."""
    [web, _] = datasets
    data = DataConfig(dataset=web.where, seq_len=16, batch_size=8)
    chunks = sum(web.manifest.rows("train", 16))
    steps_of_8 = 2 * (chunks // 2 // 8)
    data = DataConfig.model_validate(
        data.model_dump() | {"phases": [{"until_step": steps_of_8, "seq_len": 8}]}
    )
    steps = steps_of_8 + -(-(chunks - steps_of_8 * 8 // 2) // 8)
    plan = make_plan([web], data, seed=1, steps=steps)
    found = Counter[int]()
    rows = 0
    for batch in islice(Stream([web], plan).batches(), steps):
        pieces = 16 // batch.targets_BL.shape[1]
        for targets in batch.targets_BL:
            if rows < chunks * 2:
                found.update(targets[targets >= 0].tolist())
            rows += 2 // pieces
    reader = ShardReader(web.manifest, "train", 16)
    every = Counter[int]()
    for shard, count in enumerate(reader.rows_per_shard):
        for row in range(count):
            targets_L = reader.row(shard, row)[1]
            every.update(targets_L[targets_L >= 0].tolist())
    assert found == every


def test_held_out_rows_of_all_sources(datasets: list[Dataset]) -> None:
    for world in (1, 3):
        found = Counter[int]()
        for rank in range(world):
            for batch in held_out_rows(datasets, 8, 5, rank, world):
                found.update(batch.targets_BL[batch.targets_BL >= 0].tolist())
        assert found.total() == sum(
            shard.tokens for d in datasets for shard in d.manifest.split("heldout")
        )


def test_the_wait_for_data_is_measured(datasets: list[Dataset]) -> None:
    plan = make_plan(datasets, settings(datasets), seed=3, steps=5)
    assert next(Stream(datasets, plan).batches()).waited_s > 0


# --- skipped shards ------------------------------------------------------------------------------


def test_skipped_rows_are_blank_and_all_others_stay(datasets: list[Dataset]) -> None:
    lost = datasets[1].manifest.split("train")[2]
    plan = make_plan(datasets, settings(datasets), seed=3, steps=60)
    usual = islice(Stream(datasets, plan).batches(), 60)
    with_skip = islice(Stream(datasets, plan, skip=[f"books/{lost.path}"]).batches(), 60)
    blank = 0
    for before, after in zip(usual, with_skip, strict=True):
        for n, old, new in zip(before.row_ids, before.targets_BL, after.targets_BL, strict=True):
            at = locate(plan, int(n))
            if (at.source, at.shard) == (1, 2):
                assert set(new.tolist()) == {-100}
                blank += 1
            else:
                assert old.tolist() == new.tolist()
    assert blank > 5


def test_a_skip_is_recorded_and_cannot_be_forgotten(datasets: list[Dataset]) -> None:
    plan = make_plan(datasets, settings(datasets), seed=3, steps=60)
    one, two = (f"books/{shard.path}" for shard in datasets[1].manifest.split("train")[:2])
    first = Stream(datasets, plan, skip=[one])
    assert first.state(4)["skipped"] == [[0, [one]]]
    second = Stream(datasets, plan, skip=[two, one])
    second.resume(json.loads(json.dumps(first.state(4))), 4)
    assert second.state(9)["skipped"] == [[0, [one]], [4 * 48, sorted([one, two])]]
    message = refusal(lambda: Stream(datasets, plan, skip=[one]).resume(second.state(9), 9))
    assert message == f"data.skip_shards: {two} has been left out since row 192: name it again"


@pytest.mark.parametrize("name", ["books/train-000099.tar", "train-000000.tar", "x/y"])
def test_unknown_shards_are_not_skipped(datasets: list[Dataset], name: str) -> None:
    plan = make_plan(datasets, settings(datasets), seed=3, steps=6)
    message = refusal(lambda: Stream(datasets, plan, skip=[name]))
    assert f"no training shard '{name}'; expected SOURCE/FILE such as web/train-0" in message
    every = [f"web/{shard.path}" for shard in datasets[0].manifest.split("train")]
    assert "leaves nothing of source web" in refusal(lambda: Stream(datasets, plan, skip=every))


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "x"}, "data: expected dataset or sources, given both"),
        ({"sources": []}, "data: expected dataset or sources, given neither"),
        ({"phases": [{"until_step": 5}] * 2}, "until_step: expected more than 5, where it begins"),
        ({"phases": [{"until_step": 5, "weights": {"x": 1}}]}, "no source 'x'; there are web"),
    ],
)
def test_settings_that_contradict_each_other(
    datasets: list[Dataset], changes: dict[str, object], expected: str
) -> None:
    assert expected in refusal_of_settings(datasets, changes)


def refusal_of_settings(datasets: list[Dataset], changes: dict[str, object]) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        settings(datasets, **changes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.sources.0.weight=-1", "data.sources.0.weight: expected at least 0, given -1"),
        ("data.sources.0.weight=.nan", "data.sources.0.weight: expected a finite number"),
        ("data.phases.0.weights.web=-1", "data.phases.0.weights.web: expected at least 0"),
        ("data.sources.1.name=web", "data.sources: name 'web' is given 2 times"),
        ("data.sources.1.name=A/B", "data.sources.1.name: "),
        ("data.phases.0.batch_size=31", "does not divide data.batch_size=31"),
        ("data.phases.0.untl_step=3", "did you mean data.phases.0.until_step?"),
    ],
)
def test_mistakes_in_the_settings_are_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(CONFIGS / "mixture.yaml", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_phase_longer_than_the_position_table(tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.seq_len: 128 is longer than the position table"):
        load(tiny_config, ["data.phases=[{until_step: 3, seq_len: 128}]"])


def test_weights_and_sources_that_do_not_last(datasets: list[Dataset]) -> None:
    none = settings(datasets, phases=[{"until_step": 3, "weights": {"web": 0, "books": 0}}])
    assert "weights of web, books: all are 0" in refusal(lambda: make_plan(datasets, none, 0, 9))
    capped = settings(datasets)
    sources = [source.model_copy(update={"max_epochs": 2}) for source in capped.sources]
    capped = capped.model_copy(update={"sources": sources})
    message = refusal(lambda: make_plan(datasets, capped, 0, 5000))
    assert "source web: 5000 steps read it " in message
    lasts = int(message.rsplit(" ", 2)[1])
    make_plan(datasets, capped, 0, lasts)
    refusal(lambda: make_plan(datasets, capped, 0, lasts + 1))


def test_sources_of_different_tokenizers(datasets: list[Dataset], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(words(80)))
    bpe = train_tokenizer([tmp_path / "text.txt"], tmp_path / "bpe", kind="bpe", vocab_size=300)
    other = local(make(tmp_path, words(80), bpe), "books")
    message = refusal(lambda: open_mixture(settings([datasets[0], other])))
    assert f"tokenizers differ: the shards of {other.where} has vocabulary" in message
    assert load_tokenizer(datasets[0].manifest.folder).name == "bytes"


# --- runs ----------------------------------------------------------------------------------------


def mixed_run(config: Path, datasets: list[Dataset], run: Path, *overrides: str) -> list[str]:
    sources = ", ".join(f"{{name: {d.name}, path: {d.where}}}" for d in datasets)
    text = config.read_text().replace(
        "dataset: data/tiny, seq_len: 64, batch_size: 8",
        f"sources: [{sources}], seq_len: 32, batch_size: 8, phases: "
        "[{until_step: 4, batch_size: 4}, {until_step: 8, seq_len: 16}]",
    )
    path = run.parent / "mixed.yaml"
    path.write_text(text)
    return [str(path), f"run.dir={run}", "train.steps=12", *overrides]


def records(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
def test_ranks_that_see_other_data(
    tiny_config: Path, datasets: list[Dataset], tmp_path: Path
) -> None:
    """As on two nodes with a folder of the same name and other shards."""
    for rank, dataset in enumerate(datasets):
        (tmp_path / f"{rank}").mkdir()
        (tmp_path / f"{rank}" / "words").symlink_to(dataset.where)
    settings = ["data.dataset=words", "data.seq_len=16", f"run.dir={tmp_path / 'run'}"]
    worker = str(HELPERS / "elsewhere_worker.py")
    done = torchrun(2, worker, str(tmp_path), str(tiny_config), *settings)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line == "error: ranks disagree: dataset data is another one on rank 1 than on rank 0"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_phases_and_a_lost_shard(
    tiny_config: Path, datasets: list[Dataset], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One rank and two have the same losses; a recorded skip must be named again."""
    alone = mixed_run(tiny_config, datasets, tmp_path / "alone")
    assert torchrun(1, "-m", "hourglass_dist.train", *alone).returncode == 0
    both = mixed_run(tiny_config, datasets, tmp_path / "both")
    done = torchrun(2, "-m", "hourglass_dist.train", *both)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = records(tmp_path / "alone"), records(tmp_path / "both")
    assert [r["train/loss"] for r in one] == pytest.approx([r["train/loss"] for r in two], abs=2e-5)
    assert 0 < one[-1]["train/data_wait"] < 1
    config: Config = load(alone[0], alone[1:])
    plan = make_plan(datasets, config.data, config.run.seed, 12)
    read = {name: one[-1][f"data/{name}/epochs"] for name in NAMES}
    chunks = sum(read[d.name] * sum(d.manifest.rows("train", 32)) for d in datasets)
    assert round(chunks) == 4 * 4 + 4 * 8 // 2 + 4 * 8
    # the checkpoint after step 10 goes on without a shard
    (tmp_path / "alone" / "checkpoints" / "latest").write_text("step_00000010\n")
    name = f"web/{datasets[0].manifest.split('train')[0].path}"
    again = torchrun(1, "-m", "hourglass_dist.train", *alone, f"data.skip_shards=[{name}]")
    assert again.returncode == 0, again.stderr[-3000:]
    manifest = json.loads(
        (tmp_path / "alone" / "checkpoints" / "step_00000012" / "manifest.json").read_text()
    )
    assert manifest["progress"]["data"]["skipped"] == [[plan.first_row(10), [name]]]
    capsys.readouterr()
    assert train.main(alone) == 2
    assert f"data.skip_shards: {name} has been left out since" in capsys.readouterr().err
