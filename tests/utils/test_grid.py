from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError, load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.grid import read_grid, spelled

GRIDS = Path(__file__).resolve().parents[2] / "configs" / "ablations"
TEXT = """
baseline: plain
seeds: [3, 4]
settings: {rlhf.group: 5}
regimes: {few: {reward.comparisons: 30}, many: {}}
arms:
  plain:
  steps: {shaping.dense: step_potential, shaping.credit: potential}
  alone: {reward.members: 1}
"""


def grid_of(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return path


def test_jobs_come_after_what_they_need_and_know_their_settings(tmp_path):
    jobs = read_grid(grid_of(tmp_path)).jobs()
    of = {job.name: job for job in jobs}
    assert len(jobs) == len(of) == 2 * (1 + 2 * (1 + 3)) and [job.name for job in jobs[:3]] == ["base/3", "few/reward/3", "few/plain/3"]
    place = {job.name: i for i, job in enumerate(jobs)}
    assert all(place[need] < place[job.name] for job in jobs for need in job.needs)
    steps, alone = of["few/steps/4"], of["many/alone/3"]
    assert (steps.needs, steps.stages, steps.regime, steps.arm) == (("base/4", "few/reward/4"), ("rlhf",), "few", "steps")
    assert steps.config == load_config([], [
        "run=ablation/toy/few/steps/4", "seed=4", "threads=1", "start_from=models/ablation/toy/few/reward/4", "rlhf.group=5",
        "reward.comparisons=30", "shaping.dense=step_potential", "shaping.credit=potential",
    ])  # fmt: skip
    assert (alone.needs, alone.stages, alone.config.start_from) == (("base/3",), ("reward", "rlhf"), "")  # a reward of its own
    assert alone.config.reward.comparisons == load_config().reward.comparisons and not of["many/reward/3"].arm
    assert {job.seed for job in read_grid(grid_of(tmp_path), [8]).jobs()} == {8}
    assert read_grid(grid_of(tmp_path), [8, 5, 8]).seeds == (8, 5)


def test_settings_may_be_nested_as_in_config_files(tmp_path):
    nested = TEXT.replace("{reward.members: 1}", "{reward: {members: 1}, rlhf: {fit: {epochs: 2}}}")
    nested = nested.replace("{reward.comparisons: 30}", "{reward: {comparisons: 30}}").replace("{rlhf.group: 5}", "{rlhf: {group: 5}}")
    plain = TEXT.replace("{reward.members: 1}", "{reward.members: 1, rlhf.fit.epochs: 2}")
    grid, same = read_grid(grid_of(tmp_path, nested)), read_grid(grid_of(tmp_path, plain))
    assert grid == same and grid.jobs() == same.jobs()
    alone = next(job for job in grid.jobs() if job.name == "few/alone/3")
    assert alone.stages == ("reward", "rlhf") and alone.config.reward.members == 1  # not measured with the shared ensemble of four


def test_facts_tell_all_settings_as_arguments(tmp_path):
    grid = read_grid(grid_of(tmp_path))
    steps = next(job for job in grid.jobs() if job.arm == "steps")
    told = ["rlhf.group=5", "reward.comparisons=30", "shaping.dense=step_potential", "shaping.credit=potential"]
    assert grid.facts(steps) == {"regime": "few", "arm": "steps", "seed": 3, "settings": told}
    assert spelled({"reward.curve": [], "shaping.shuffle_alpha": True}) == ["reward.curve=[]", "shaping.shuffle_alpha=true"]


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_grid_is_one(path):
    read_grid(path).check()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: plain", "baseline: best", "the baseline 'best' is none of the arms"),
        ("seeds:", "sedes:", "sedes: a grid has arms and a baseline, and may have config, regimes, seeds, settings"),
        ("baseline: plain", "", "baseline: a grid has"),
        ("  alone:", "  a/b:", "'a/b' is no name"),
        ("  alone:", "  reward:", "'reward' is no name"),
        ("{rlhf.group: 5}", "[rlhf.group=5]", "settings: expected key: value pairs"),
        ("rlhf.group: 5", "rlhf.groups: 5", "unknown key 'rlhf.groups'; did you mean 'rlhf.group'"),
        ("reward.members: 1", "rlhf.kl: much", "rlhf.kl"),
        ("reward.members: 1", "base.width: 64", "alone: base.width: all arms of a seed share its data, alignment and base model"),
        ("many: {}", "many: {data: {train: 9}}", "many: data.train: all arms of a seed share"),
        ("{reward.members: 1}", "[1]", "alone: expected key: value pairs"),
        ("rlhf.group: 5", "seed: 5", "settings: seed: a grid sets that itself"),
        ("[3, 4]", "3", "seeds: expected a list of whole numbers, got 3"),
        ("[3, 4]", "[]", "seeds: expected a list of whole numbers"),
        ("seeds: [3, 4]", "config: [1]", "config: expected a list of texts"),
    ],
)
def test_what_is_no_grid_is_refused_before_hours_of_work(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_grid(grid_of(tmp_path, TEXT.replace(old, new))).check()
    assert "\n" not in str(caught.value)
