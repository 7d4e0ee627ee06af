import importlib.util
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "best_of_n.py"


@pytest.fixture
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("best_of_n", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_expectations_are_those_over_all_subsets(bench: Any, n: int):
    rng = np.random.default_rng(0)
    chooser, value = rng.random((2, 6)), rng.random((2, 6))
    expected = [np.mean([value[i, max(subset, key=lambda j: chooser[i, j])] for subset in combinations(range(6), n)]) for i in range(2)]
    np.testing.assert_allclose(bench.best_of(n, chooser, value), expected)


def test_the_curve_of_a_finished_run(bench: Any, smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        ["best_of_n.py", "--models", str(smoke / "models" / "smoke"), "--images", "10", "--candidates", "4", "--output", "o/b.json"],
    )
    bench.main()
    found = json.loads(Path("o/b.json").read_text())
    rewards = [row["reward"]["value"] for row in found["by_reward"]]
    assert [row["n"] for row in found["by_reward"]] == [1, 2, 4] and rewards == sorted(rewards) and rewards[2] > rewards[0]
    assert all(o["utility"]["value"] >= r["utility"]["value"] - 1e-9 for o, r in zip(found["by_gold"], found["by_reward"], strict=True))
    assert found["by_gold"][0]["utility"] == found["by_reward"][0]["utility"] and found["by_reward"][0]["kl"] == 0
    assert Path("o/b.png").read_bytes()[:4] == b"\x89PNG" and capsys.readouterr().out.count("\n") == 3
