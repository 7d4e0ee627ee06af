import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hierarchical_diffusion_rlhf_caption_refinement.evaluation.ablation import (
    alarmed,
    budget_shares,
    captions_until,
    comparable,
    difference_over_seeds,
    kept_row,
    nested_bootstrap,
    of_peak,
    paired_difference,
    spell_shares,
    student,
    write_page,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.grid import Grid


def record(arm: str, seed: int, gold: list[float], utility: np.ndarray, **more: Any) -> dict[str, Any]:
    rows = [
        {"epoch": i, "step": 5 * i, "seconds": 6.0 * i, "kl": float(i), "alarms": 0.0}
        | {"gold_utility": g, "gold_accuracy": g, "judge": g, "reward": g}
        for i, g in enumerate(gold)
    ]
    facts = {"regime": "few", "arm": arm, "seed": seed, "settings": [], "captions_per_update": 10, "rows": rows, "seconds": {"rlhf": 1.0}}
    test = {"accuracy": 0.9, "fluency": 0.8, "mean_words": 9.0, "utility": float(utility.mean())}
    return facts | {"test": test, "win_rate": {"value": 0.7}, "reward_accuracy": {"value": 0.71}, "utility": utility.tolist()} | more


def test_nested_intervals_are_as_wide_as_the_seeds_and_the_scenes_are_apart():
    rng = np.random.default_rng(0)
    seeds, scenes = rng.normal(0, 0.1, 200), rng.normal(0, 1, (200, 50))
    found = nested_bootstrap(list(0.5 + seeds[:, None] + scenes), 500)
    assert found.value == pytest.approx((0.5 + seeds[:, None] + scenes).mean())
    width = 2 * 1.96 * math.sqrt((0.1**2 + 2 / 50) / 200)  # within: once among seeds, once more among the scenes drawn
    assert found.high - found.low == pytest.approx(width, rel=0.15)
    single = nested_bootstrap([scenes[0]], 500)
    assert single.high - single.low == pytest.approx(2 * 1.96 * scenes[0].std() / math.sqrt(50), rel=0.15)
    assert nested_bootstrap([np.full(9, 0.3)] * 3, 20).low == nested_bootstrap([np.full(9, 0.3)] * 3, 20).high == pytest.approx(0.3)


def test_differences_are_paired_by_seed_and_scene():
    rng = np.random.default_rng(0)
    scenes = rng.random((3, 40))
    base = [record("a", s, [0.1], scenes[s]) for s in (0, 1, 2)]
    arm = [record("b", s, [0.1], scenes[s % 3] + 0.05) for s in (1, 2, 7)]  # seed 7 has no partner
    found = paired_difference(arm, base)
    assert found and (found.value, found.low, found.high) == pytest.approx((0.05, 0.05, 0.05))
    assert paired_difference(arm[2:], base) is None


def test_curves_are_of_the_same_seeds():
    base = [record("a", s, [0.1], np.ones(3)) for s in (0, 1)]
    arms = {"a": base, "b": [record("b", s, [0.1], np.ones(3)) for s in (0, 1, 2)], "c": [record("c", 1, [0.1], np.ones(3))]}
    assert list(comparable(arms, base)) == ["a", "b"]


def test_differences_over_seeds_are_students():
    assert [student(n) for n in (1, 2, 4, 8)] == pytest.approx([12.706, 4.303, 2.776, 2.306], rel=0.01)  # any printed table
    base = [record("a", s, [0.1], np.full(4, 0.5)) for s in (0, 1, 2)]
    arm = [record("b", s, [0.1], np.full(4, 0.5 + gap)) for s, gap in ((0, 0.01), (1, 0.02), (2, 0.06))]
    found = difference_over_seeds(arm, base)
    half = 4.303 * 0.026458 / math.sqrt(3)  # sample deviation of .01, .02, .06
    assert found and (found.value, found.low, found.high) == pytest.approx((0.03, 0.03 - half, 0.03 + half), rel=0.01)
    assert difference_over_seeds(arm[:1], base) is None


def test_captions_until_a_target_by_hand():
    one = record("a", 0, [0.5, 0.6, 0.55, 0.8], np.ones(3))  # at 0, 50, 100, 150 captions
    assert [captions_until(one, g) for g in (0.5, 0.55, 0.6, 0.7, 0.81)] == pytest.approx([0, 25, 50, 130, math.inf])
    slow = [record("s", seed, [0.5, 0.6, 0.7], np.ones(3)) for seed in (0, 1, 2)]
    fast = [record("f", 0, [0.5, 0.7], np.ones(3)), record("f", 1, [0.5, 0.6], np.ones(3)), record("f", 2, [0.5, 0.9], np.ones(3))]
    assert budget_shares(slow, slow) == pytest.approx([1.0] * 3) and spell_shares(budget_shares(slow, slow)) == "1.00 (3 of 3)"
    assert sorted(budget_shares(fast, slow)) == pytest.approx([0.25, 0.5, math.inf])
    assert spell_shares(budget_shares(fast, slow)) == "0.50 (2 of 3)"
    assert (
        spell_shares([math.inf, 0.7]) == "0.70 (1 of 2)" and spell_shares([math.inf]) == "not reached (0 of 1)" and spell_shares([]) == "–"
    )
    assert of_peak(one) == 1 and of_peak(record("a", 0, [0.5, 0.8, 0.6], np.ones(3))) == pytest.approx(0.75)


def test_the_judge_keeps_no_weights_with_an_alarm():
    one = record("a", 0, [0.5, 0.6, 0.9], np.ones(3))
    one["rows"][2]["alarms"] = 1.0
    del one["rows"][0]["alarms"]  # the base model's row
    assert kept_row(one)["epoch"] == 1
    assert alarmed([one, record("a", 1, [0.5], np.ones(3))]) == "1 of 2"
    one["rows"][2]["alarm_entropy_floor"] = 1.0
    assert alarmed([one]) == "1 of 1: entropy floor"


def test_the_page_has_a_line_per_arm_with_its_command_and_pictures(tmp_path: Path):
    rng = np.random.default_rng(0)
    for arm, gain in (("sparse_only", 0.0), ("hierarchical", 0.04)):
        for seed in (0, 1):
            utility = np.random.default_rng(seed).random(30) + gain
            path = tmp_path / "few" / arm / f"{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record(arm, seed, [0.5, 0.6 + rng.random() / 9, 0.7 + gain], utility)))
    (tmp_path / "few" / "hierarchical" / "2.json").write_text(
        json.dumps({"regime": "few", "arm": "hierarchical", "seed": 2, "settings": [], "error": "exit code 1: the disk is full"})
    )
    gone = tmp_path / "few" / "of_old" / "0.json"
    gone.parent.mkdir()
    gone.write_text(json.dumps({"regime": "few", "arm": "of_old", "seed": 0, "settings": [], "error": "no luck"}))
    arms = {"sparse_only": {"shaping.clip_weight": 0.0}, "hierarchical": {}, "not_yet_run": {}}
    grid = Grid("toy", "sparse_only", arms, {"few": {"reward.comparisons": 300}, "many": {}}, (0, 1), (), {})
    text = write_page(grid, tmp_path, Path("configs/toy.yaml")).read_text()
    lines = [line for line in text.splitlines() if "`--only" in line]
    assert len(lines) == 2 and lines[1].startswith("| hierarchical | 2 |") and "--only 'few/hierarchical/*'" in lines[1]
    assert "+0.040 (+0.040 to +0.040)" in lines[1] and "+0.000 (+0.000 to +0.000)" in lines[0]
    assert "python scripts/ablate.py configs/toy.yaml --report-only" in text and "`reward.comparisons=300`" in text
    assert "few/hierarchical/2: exit code 1: the disk is full" in text and "## many" not in text
    assert "no luck" not in text  # the grid has no such arm any more
    for name in ("learning_few.png", "distance_few.png"):
        assert f"({name})" in text and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
