"""Every knob is documented, every shipped file loads, and whatever cannot be used is refused in one line."""

import dataclasses
import json
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import yaml

from hierarchical_diffusion_rlhf_caption_refinement.utils.config import (
    STAGES,
    Config,
    ConfigError,
    FitConfig,
    SamplerConfig,
    config_from_plain,
    load_config,
    to_plain,
    with_overrides,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    groups = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in tree.items()]
    return {key: value for group in groups for key, value in group.items()}


def differences(one: Config, other: Config) -> set[str]:
    a, b = flat(to_plain(one)), flat(to_plain(other))
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads_and_names_its_run(path):
    config = load_config([path])
    assert config.run == path.stem
    assert config == config_from_plain(to_plain(config))


def test_default_yaml_spells_out_every_knob_with_its_default():
    written = flat(yaml.safe_load((CONFIGS / "default.yaml").read_text(encoding="utf-8")))
    known = flat(json.loads(json.dumps(to_plain(Config()))))  # tuples as lists
    assert set(written) == set(known) - {"run"}
    assert {key: value for key, value in written.items() if value != known[key]} == {}
    assert load_config([CONFIGS / "default.yaml"]) == load_config() == Config()


def test_the_ablation_turns_one_knob():
    ablation = load_config([CONFIGS / "ablation.yaml"])
    assert differences(ablation, load_config([CONFIGS / "default.yaml"])) == {"run", "shaping.clip_weight"}
    assert (ablation.run, ablation.shaping.clip_weight) == ("ablation", 0)


@pytest.mark.parametrize("name", ["references", "self_critical"])
def test_references_change_the_reward_and_need_no_reward_stage(name):
    plain, config = load_config([CONFIGS / "flickr8k.yaml"]), load_config([CONFIGS / "flickr8k.yaml", CONFIGS / f"{name}.yaml"])
    assert (config.rlhf.method, config.rlhf.first) == ("distil" if name == "references" else "policy_gradient", "")
    changed = differences(config, plain)
    assert {"run", "rlhf.sparse"} < changed and all(key.split(".")[0] in ("run", "rlhf", "shaping") for key in changed)
    assert plain.stages == STAGES and config.stages == ("alignment", "base", "rlhf")


def test_folders_follow_from_the_run():
    assert (Config().models, Config().results) == (Path("models"), Path("results"))
    other = load_config([], ["run=other"])
    assert (other.models, other.results) == (Path("models/other"), Path("results/other"))


def test_later_layers_win(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("seed: 1\nbase: {layers: 5, heads: 2, fit: {lr: 0.1}}\n")
    second.write_text("seed: 2\nbase: {layers: 6}\n")
    config = load_config([first, second], ["base.layers=7", "seed=3", "base.layers=8"])
    assert (config.run, config.seed, config.base.layers, config.base.heads, config.base.fit.lr) == ("second", 3, 8, 2, 0.1)
    assert load_config([second, first]).base.layers == 5
    assert config.base.fit.ema_decay == Config().base.fit.ema_decay  # a partial group keeps its own defaults


def test_values_have_the_types_of_the_schema(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: 12\nbase: {fit: {lr: 3e-4}}\nreward: {curve: [5, 10]}\n")  # YAML reads 12 as a number and 3e-4 as a text
    config = load_config([path], ["reward.reader=false", "sampler.temperature=1"])
    assert (config.run, config.base.fit.lr, list(config.reward.curve), config.reward.reader) == ("12", 3e-4, [5, 10], False)
    assert config.sampler.temperature == 1.0 and isinstance(config.sampler.temperature, float)
    assert isinstance(config.reward.curve, tuple | list) and dataclasses.is_dataclass(config.base.fit)


@pytest.mark.parametrize("spelled", ["no", '"no"'])
def test_no_is_a_precision_though_yaml_reads_false(tmp_path, spelled):
    (tmp_path / "own.yaml").write_text(f"mixed_precision: {spelled}\n")
    before = ["mixed_precision=bf16"]
    assert load_config([tmp_path / "own.yaml"]).mixed_precision == "no"
    assert load_config([], [*before, f"mixed_precision={spelled}"]).mixed_precision == "no"


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert differences(load_config([tmp_path / "empty.yaml"]), Config()) == {"run"}


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("rlhf.fit.learning_rate=1", "rlhf.fit.lr"),
        ("shaping.clip_wieght=0", "shaping.clip_weight"),
        ("sead=1", "seed"),
        ("base.fit.epoch=3", "base.fit.epochs"),
        ("sampler.step=4", "sampler.steps"),
        ("data.trian=10", "data.train"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(override, near):
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert str(caught.value) == f"{override}: unknown key '{override.split('=')[0]}'; did you mean '{near}'?"


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base:\n  width: 64\n  lyers: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    assert str(caught.value) == f"{path}: unknown key 'base.lyers'; did you mean 'base.layers'?"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=blue", "seed"),
        ("base.layers=2.5", "base.layers"),
        ("base.fit.lr=fast", "base.fit.lr"),
        ("sampler.order=backwards", "sampler.order"),
        ("data.source=zip", "data.source"),
        ("reward.reader=perhaps", "reward.reader"),
        ("reward.curve=[1,x]", "reward.curve"),
        ("base.fit=3", "base.fit"),
        ("seed=null", "seed"),
        ("seed", "expected key.sub=value"),
        ("rlhf.steps.more=1", "rlhf.steps.more"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_key(override, named):
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["base.fit.epochs=0"], "fit.epochs=0: must be at least 1"),
        (["reward.fit.batch_size=-1"], "fit.batch_size=-1: must be at least 1"),
        (["rlhf.fit.grad_accum=0"], "fit.grad_accum=0: must be at least 1"),
        (["base.fit.lr=0"], "fit.lr=0.0: must be positive"),
        (["base.fit.warmup=1"], "fit.warmup=1.0: must be in [0, 1)"),
        (["base.fit.warmup=-0.1"], "fit.warmup=-0.1: must be in [0, 1)"),
        (["base.fit.ema_decay=1"], "fit.ema_decay=1.0: must be in [0, 1)"),
        (["base.fit.save_every=0"], "fit.save_every=0: must be at least 1"),
        (["data.source=jsonl"], "data.path is needed for data.source=jsonl"),
        (["data.source=folder"], "data.path is needed for data.source=folder"),
        (["data.max_words=0"], "data.max_words=0: must be at least 1"),
        (["vision.width=33"], "vision.width must be a multiple of vision.heads"),
        (["vision.patch_size=15"], "vision.image_size must be a multiple of vision.patch_size"),
        (["alignment.width=33"], "alignment.width must be a multiple of alignment.heads"),
        (["base.heads=5"], "base.width must be a multiple of base.heads"),
        (["sampler.min_words=0"], "sampler.min_words=0: must be at least 1"),
        (["sampler.min_words=6", "sampler.max_words=5"], "sampler.max_words must not be less than sampler.min_words"),
        (["sampler.min_words=30"], "sampler.min_words must not be more than data.max_words"),
        (["sampler.steps=0"], "sampler.steps=0: must be at least 1"),
        (["sampler.candidates=0"], "sampler.candidates=0: must be at least 1"),
        (["sampler.temperature=-1"], "sampler.temperature=-1.0: must be at least 0"),
        (["sampler.candidates=4"], "sampler.candidates > 1 needs sampler.temperature > 0"),
        (["sampler.top_p=0"], "sampler.top_p is in (0, 1], sampler.threshold in [0, 1]"),
        (["sampler.threshold=1.5"], "sampler.top_p is in (0, 1], sampler.threshold in [0, 1]"),
        (["shaping.clip_weight=-1"], "shaping.clip_weight=-1.0: must be at least 0"),
        (
            ["shaping.clip_weight=0", "shaping.preference_weight=0"],
            "one of shaping.clip_weight and shaping.preference_weight must be positive",
        ),
        (["shaping.preference_weight=0"], "shaping.preference_weight=0 needs shaping.fade=0: nothing would be left"),
        (["shaping.fade=-1"], "shaping.fade=-1.0: must be at least 0"),
        (["shaping.alpha_min=0.95"], "0 <= shaping.alpha_min <= shaping.alpha_max <= 1 must hold"),
        (["shaping.credit=potential", "shaping.dense=caption"], "shaping.credit=potential needs shaping.dense=step_potential"),
        (["rlhf.group=1"], "rlhf.group must be at least 2: captions are compared within it"),
        (
            ["rlhf.order=confidence"],
            "rlhf.order=confidence has no closed-form probability; use random, spread, left_to_right, open_end or plackett_luce",
        ),
        (["base.open_end=1.5"], "base.open_end=1.5: must be in [0, 1]"),
        (["sampler.order=open_end"], "sampler.order=open_end needs base.open_end: a model that was told all lengths cannot end"),
        (
            ["sampler.order=open_end", "sampler.remask=1"],
            "sampler.order=open_end knows no length: lengths=1, remask=0 and threshold=0 go with it",
        ),
        (
            ["sampler.order=open_end", "base.open_end=0.5", "data.max_words=9"],
            "sampler.steps=8: order=open_end takes one for each of up to 9 tokens, spread can do with few",
        ),
        (
            ["rlhf.order=open_end", "base.open_end=0.5", "rlhf.steps=30"],
            "shaping.dense=step_potential needs drafts, and these a length: rlhf.order=open_end has none",
        ),
        (["rlhf.temperature=0"], "rlhf.temperature must be positive: a greedy policy does not explore"),
        (["rlhf.inner_updates=3"], "rlhf.fit.save_every must be a multiple of rlhf.inner_updates"),
    ],
)
def test_an_impossible_combination_is_refused_with_its_reason(overrides, reason):
    with pytest.raises(ConfigError) as caught:
        load_config([], overrides)
    assert str(caught.value) == reason


FLOATS = [key for key, value in flat(to_plain(Config())).items() if isinstance(value, float)]


@pytest.mark.parametrize(("key", "value"), list(zip(FLOATS, cycle(["nan", "inf", "-inf"]))))
def test_no_setting_of_any_group_is_infinite_or_no_number(key, value):
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"{key}=.{value}".replace(".-", "-.")])
    assert str(caught.value) == f"{'.'.join(key.split('.')[-2:])}={value}: must be a finite number, and not beyond 1e+12"


@pytest.mark.parametrize(
    "override",
    [
        "base.heads=0", "alignment.heads=0", "vision.heads=0", "vision.patch_size=0", "base.width=0", "alignment.embed=0", "base.layers=-1",
        "reward.members=0", "rlhf.steps=0", "rlhf.inner_updates=0",
    ],
)  # fmt: skip
def test_what_must_be_there_at_least_once(override):
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert str(caught.value) == f"{override}: must be at least 1"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.train=-1", "must be at least 0"),
        ("sampler.remask=-1", "must be at least 0"),
        ("reward.comparisons=-4", "must be at least 0"),
        ("reward.pessimism=-0.5", "must be at least 0"),
        ("fit.patience=-1", "must be at least 0"),
        ("reward.l2=0.0", "must be positive"),
        ("reward.even_sources=1.5", "must be between 0 and 1"),
        ("reward.l2=-1.0", "must be positive"),
        ("reward.curve=[100, 0]", "must be positive numbers"),
        ("rlhf.clip=0.0", "must be positive"),
        ("base.dropout=1.0", "must be in [0, 1)"),
        ("alignment.dropout=-0.1", "must be in [0, 1)"),
        ("base.left_to_right=1.5", "must be in [0, 1]"),
        ("base.image_dropout=1.0", "must be in [0, 1)"),
        ("base.patch_dropout=1.0", "must be in [0, 1)"),
        ("base.crops=6", "must be from 0 to 5"),
        ("sampler.steps=10001", "must be at most 10000; a token takes no more than one"),
        ("rlhf.steps=10001", "must be at most 10000; a token takes no more than one"),
        ("sampler.steps=99999999999999999999", "must be a finite number, and not beyond 1e+12"),
    ],
)
def test_a_setting_out_of_its_range_is_named_with_the_range(override, reason):
    with pytest.raises(ConfigError) as caught:
        load_config([], [override if not override.startswith("fit.") else f"rlhf.{override}"])
    assert str(caught.value) == f"{override}: {reason}"


def test_an_empty_override_is_an_empty_text():
    config = load_config([], ["data.comparisons=x", "data.comparisons=", "data.path=a="])
    assert (config.data.comparisons, config.data.path) == ("", "a=")
    with pytest.raises(ConfigError, match=r"^seed=: seed: Value '' of type 'str' could not be converted to Integer$"):
        load_config([], ["seed="])


def test_a_frozen_backbone_may_keep_its_own_width():
    assert load_config([], ["vision.backbone=some/model", "vision.width=0"]).vision.width == 0


def test_a_value_that_omegaconf_would_take_for_missing_is_refused():
    with pytest.raises(ConfigError) as caught:
        load_config([], ["sampler.steps=???"])
    assert str(caught.value) == "sampler.steps=???: 'sampler.steps' has no value"


def test_code_that_builds_a_config_is_held_to_the_same_rules():
    with pytest.raises(ConfigError, match="epochs"):
        FitConfig(epochs=0)
    with pytest.raises(ConfigError, match="temperature"):
        dataclasses.replace(SamplerConfig(), candidates=2)
    with pytest.raises(ConfigError, match=r"sampler\.guidance=nan"):
        dataclasses.replace(SamplerConfig(), guidance=float("nan"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("a: [1", "not valid YAML"),
        ("- a\n- b\n", "expected key: value pairs"),
        ("just text\n", ""),
        ("a: 1\n\tb: 2\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config_is_named_in_one_line(tmp_path, content, reason):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config([path])
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and reason in message and "\n" not in message


def test_a_config_survives_plain_values_and_yaml(tmp_path):
    config = load_config([CONFIGS / "smoke.yaml"], ["shaping.kappa=0.25", "data.source=folder", "data.path='a b: #c'", "rlhf.fit.lr=1e-5"])
    assert config_from_plain(to_plain(config)) == config
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(to_plain(config)))
    assert load_config([path]) == config  # its own run name wins over the file's
    assert to_plain(load_config([path])) == to_plain(config)


@pytest.mark.parametrize("text", ["", "it's", '"quoted"', "a=b", "null", "3", "with space", "{a}", "[1]", "a,b: c", "\\n"])
def test_overrides_keep_every_other_value(text):
    config = dataclasses.replace(Config(), run=text, start_from=text)
    changed = with_overrides(config, ["sampler.steps=3"])
    assert changed.sampler.steps == 3
    assert dataclasses.replace(changed, sampler=config.sampler) == config
    assert with_overrides(config, []) is config


def test_overrides_of_a_config_are_checked():
    with pytest.raises(ConfigError, match=r"did you mean 'sampler.steps'\?"):
        with_overrides(Config(), ["sampler.stepz=3"])
    with pytest.raises(ConfigError, match="must be at least 1"):
        with_overrides(Config(), ["sampler.steps=0"])
