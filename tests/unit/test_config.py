"""Settings: what is accepted, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import CONFIGS

from hourglass_dist.config.describe import describe
from hourglass_dist.config.loader import ConfigError, differences, paths, to_yaml
from hourglass_dist.config.model import lucidrains_config, parse_model
from hourglass_dist.config.schema import Config, load
from hourglass_dist.model.settings import ModelConfig

QUICKSTART = CONFIGS / "quickstart.yaml"


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(QUICKSTART, overrides)
    return str(caught.value).splitlines()


def test_resolved_settings_read_back_equal(tmp_path: Path) -> None:
    config = load(QUICKSTART, ["model.levels.1.layers=3", "deepspeed.zero_optimization.stage=3"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "resolved.yaml") == config
    assert config.model.levels[1].layers == 3
    assert config.deepspeed.stage == 3


def test_override_keeps_the_siblings() -> None:
    before, after = load(QUICKSTART), load(QUICKSTART, ["model.levels.1.layers=9"])
    assert [d.split(":")[0] for d in differences(before, after)] == ["model.levels.1.layers"]


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("1E-3", 1e-3), ("0.5", 0.5), (".5", 0.5), ("2", 2.0)]
)
def test_every_way_to_write_a_number(text: str, value: float) -> None:
    assert load(QUICKSTART, [f"optim.lr={text}"]).optim.lr == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.dmi=3", "model.dmi: unknown key (given 3); did you mean model.dim?"),
        ("optim.steps=3", "optim.steps: unknown key (given 3); did you mean train.steps?"),
        ("model.levels.0.shortn=2", "did you mean model.levels.0.shorten?"),
        ("optim.lr=fast", 'optim.lr: expected a number, given "fast"'),
        ("optim.lr=-1", "optim.lr: expected more than 0, given -1"),
        ("optim.lr=.nan", "optim.lr: expected a finite number, given NaN"),
        ("train.steps=yes", 'train.steps: expected a whole number, given "yes"'),
        ("train.steps=1.5", "train.steps: expected a whole number, given 1.5"),
        ("train.steps=012", 'train.steps: expected a whole number, given "012"'),
        ("model.causal=no", 'model.causal: expected true or false, given "no"'),
        ("train.precision=fp8", 'train.precision: expected fp32, bf16 or fp16, given "fp8"'),
        ("model.levels.1.layers=[2,2]", "the innermost level takes one number, given [2, 2]"),
        ("model.levels.0.layers=2", "takes [pre, post], given 2"),
        ("model.levels.1.shorten=1", "model.levels.1.shorten: expected 2 or more, given 1"),
        ("model.levels.5.layers=1", "expected an index from 0 to 1, or 2 to append a whole item"),
        ("data.seq_len=100000", "longer than the position table, model.max_seq_len="),
        ("train.micro_batch_size=7", "train.micro_batch_size: 7 does not divide data.batch_size"),
        ("eval.context=64", "eval.context: goes with eval.stride, which is not given"),
        ("eval.stride=48", "eval.stride: 48 does not divide the context of 128 tokens"),
        ("eval={every: 9, batch_size: 9, stride: 64, context: 4096}",
         "eval.context: 4096 is longer than the position table, model.max_seq_len=128"),
        ("deepspeed.zero_optimization.stage=4", "expected 0, 1, 2 or 3, given 4"),
        ("deepspeed.zero_optimization.stagge=3", "did you mean deepspeed.zero_optimization.stage?"),
        ("deepspeed.zero_optimization.round_robin_gradients=true", "unknown key (given true)"),
        ("deepspeed.zero_optimization={stage: 3, offload_optimizer: nvme}",
         "offload_optimizer: nvme needs stage 3 and offload_folder, given stage 3 and None"),
        ("deepspeed.zero_optimization={stage: 2, offload_optimizer: nvme, offload_folder: /ssd}",
         "offload_optimizer: nvme needs stage 3 and offload_folder, given stage 2 and /ssd"),
        ("model.heads=5", "model.heads: 5 heads do not divide model.dim=128"),
        ("model.levels.1.dim=100", "model.levels.1.dim: 100 is narrower than the level outside"),
        ("model.levels.1.heads=5", "heads: 5 heads do not divide model.levels.1.dim=128"),
        ("model.levels.0.window=0", "model.levels.0.window: expected at least 1, given 0"),
        ("model.levels.0.shorten=2", "level 0 is full resolution: expected 1"),
        ("model.levels.0.activation_checkpointing=some", "expected none, full, selective, offload"),
        ("model.levels.1.pooling=spacelike", "buckets of spacelike have no fixed size"),
        ("model.levels.1.shorten_choices=[2,3]", "a linear projection has one size of bucket"),
        ("model.max_seq_len=null", "learned positions need the length of their table"),
        ("model.causal=false", "training and generation need a causal model, given false"),
        ("model.hierarchy=4@1", "give either hierarchy or levels, not both"),
        ("deepspeed.train_batch_size=3", "deepspeed.train_batch_size: unknown key (given 3)"),
        ("optim=3", "optim: expected a mapping, given 3"),
        ("model=null", "model: expected a mapping, given null"),
        ("train.steps", "expected key=value such as train.steps=100, given 'train.steps'"),
        ("train.steps=[1", "command line: train.steps"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line(override: str, expected: str) -> None:
    [line] = mistakes(override)
    assert line.startswith("command line: ")
    assert expected in line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.levels.0.activation_checkpointing=auto", "auto needs a budget in GiB"),
        ("model.positions=rope", "model.max_seq_len: rope positions have no table; leave it out"),
    ],
)
def test_a_mistake_that_shows_elsewhere_names_that_place(override: str, expected: str) -> None:
    [line] = mistakes(override)
    assert expected in line


def test_a_key_given_twice_is_refused() -> None:
    assert mistakes("train.steps=3", "train.steps=4") == [
        "command line: train.steps: given 2 times"
    ]


def test_the_width_of_a_head_follows_from_the_width() -> None:
    def heads_of(*overrides: str) -> list[int]:
        return [level.dim_head for level in load(QUICKSTART, overrides).model.levels]

    assert heads_of("model.dim=96", "model.heads=3") == [32, 32]
    assert heads_of("model.heads=3", "model.dim_head=20") == [20, 20]
    assert heads_of("model.levels.1.dim=192", "model.levels.1.heads=2") == [32, 96]


def test_all_mistakes_are_reported_at_once() -> None:
    assert len(mistakes("model.dmi=3", "optim.lr=fast", "train.precision=fp8")) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: {dir: a}\nrun: {dir: b}\n", "bad.yaml:2: repeated key 'run'"),
        ("run: {dir: a, dir: b}\n", "bad.yaml:1: repeated key 'dir'"),
        ("run: [\n", "bad.yaml:2: "),
        ("- a\n- b\n", "expected sections such as 'model:'"),
        ("", "expected sections such as 'model:'"),
        ("run: !!python/object:os.system {}\n", "bad.yaml:1: "),
        ("1: 2\n", "expected a name as key, given 1"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "bad.yaml")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"run: \xff\n")
    with pytest.raises(ConfigError, match="expected UTF-8 text: byte 5"):
        load(tmp_path / "bytes.yaml")


def test_a_missing_setting_says_what_it_is_for(tmp_path: Path) -> None:
    text = QUICKSTART.read_text().replace("  dir: runs/quickstart\n", "  seed: 3\n")
    (tmp_path / "no_dir.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"no_dir\.yaml: run\.dir: missing: Run folder"):
        load(tmp_path / "no_dir.yaml")


def test_the_index_past_the_end_appends_a_whole_item() -> None:
    added = load(
        QUICKSTART, ["model.levels.2={layers: 2, shorten: 2}", "model.levels.1.layers=[1,1]"]
    )
    assert added.model.hierarchy == "1@1 1@2 2@4 1@2 1@1"


def test_describe_says_type_default_and_meaning() -> None:
    said = describe(Config)
    for path, meaning in paths(Config):
        assert f"\n{path}: " in f"\n{said}", path
        assert describe(Config, path).startswith(f"{path}: ")
        assert meaning.replace("``", "").split()[0] in describe(Config, path)
    for schedule in ("optim.schedule", "optim.warmup_steps"):
        assert describe(Config, schedule) in describe(Config, "optim") in said
    first, second = describe(Config, "optim.decay_fraction").splitlines()
    assert first == "optim.decay_fraction: number more than 0 and at most 1; default 0.2"
    assert second.startswith("    ")
    assert "wsd" in second
    assert describe(Config, "model.levels.1.layers") in describe(Config, "model.levels")


@pytest.mark.parametrize(
    ("key", "nearest"), [("optim.lrr", "optim.lr"), ("levels", "model.levels"), ("lr", "optim.lr")]
)
def test_an_unknown_key_to_describe_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: unknown key; did you mean {nearest}\?$"):
        describe(Config, key)


def test_every_setting_is_documented() -> None:
    undocumented = [path for path, description in paths(Config) if not description]
    assert undocumented == []


def of_hierarchy(notation: object, **more: object) -> ModelConfig:
    settings = {"dim": 64, "max_seq_len": 64, "hierarchy": notation, **more}
    return parse_model(settings, source="test")


@pytest.mark.parametrize("notation", ["3@1", "4@1 8@3 4@1", "4@1 2@2 8@6 2@2 4@1"])
def test_the_papers_notation_is_read_and_printed(notation: str) -> None:
    assert of_hierarchy(notation).hierarchy == notation


@pytest.mark.parametrize(
    ("notation", "expected"),
    [
        ("4@1 8@3 2@1", "is no palindrome; for other shapes give model.levels"),
        ("4@1 8@3", "is no palindrome"),
        ("4@1 8@3 8@3 4@1", "is no palindrome"),
        ("4@2 8@4 4@2", "level 0 is full resolution: expected stride 1, given 2"),
        ("4@1 2@2 8@3 2@2 4@1", "level 2: stride 3 is no multiple of the stride outside, 2"),
        ("4@1 8@1 4@1", "level 1: stride 1 is no multiple of the stride outside, 1"),
        ("4x1", "expected layers@stride, outermost first, such as '4@1 8@3 4@1', given '4x1'"),
        (4, "expected layers@stride"),
    ],
)
def test_a_wrong_hierarchy_is_one_clear_line(notation: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_hierarchy(notation)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"positions": "rope", "max_seq_len": None, "attention_resampling": "earlier"}, "earlier"),
        ({"positions": "relative", "max_seq_len": None, "dim_head": 7}, "need an even width"),
        ({"causal": False, "attention_resampling": "earlier"}, "model.causal: an encoder takes"),
        ({"legacy_mask": True, "attention_resampling": "earlier"}, "only for what lucidrains has"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    more: dict[str, object], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        of_hierarchy("2@1 4@2 2@1", **more)


def test_the_papers_notation() -> None:
    nested = lucidrains_config(
        num_tokens=256, dim=64, max_seq_len=64, depth=(4, [2, 8, 2], 4), shorten_factor=(2, 4)
    )
    assert nested.hierarchy == "4@1 2@2 8@8 2@2 4@1"
    assert nested.strides == [1, 2, 8]
    flat = lucidrains_config(num_tokens=256, dim=64, max_seq_len=64, depth=3)
    assert flat.hierarchy == "3@1"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"depth": (1, 2)}, "expected (pre, inner, post)"),
        ({"depth": (1, (1, 2, 1), 1), "shorten_factor": (2,)}, "fewer numbers than depth"),
        ({"shorten_factor": (2, 4)}, "more numbers than depth"),
        ({"updown_sample_type": "cubic"}, "updown_sample_type: expected naive or linear"),
        ({"dim": "wide"}, "model.dim: expected a whole number"),
    ],
)
def test_reference_arguments_that_do_not_fit(change: dict[str, object], expected: str) -> None:
    arguments = {"num_tokens": 9, "dim": 8, "max_seq_len": 9, "depth": (1, 1, 1), **change}
    with pytest.raises(ConfigError) as caught:
        lucidrains_config(**arguments)  # type: ignore[arg-type]
    assert expected in str(caught.value)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1)])
def test_accumulation_follows_from_the_batch(world: int, accumulation: int) -> None:
    config = load(QUICKSTART, ["data.batch_size=8", "train.micro_batch_size=4"])
    assert config.accumulation_steps(world) == accumulation


def test_a_world_that_does_not_divide_the_batch_is_told_which_do() -> None:
    config = load(QUICKSTART, ["data.batch_size=12", "train.micro_batch_size=2"])
    with pytest.raises(ConfigError, match="world sizes that can: 1, 2, 3, 6"):
        config.accumulation_steps(5)
