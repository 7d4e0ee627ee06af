"""The benchmarks are called as they say, and run to their end on the smoke run."""

import argparse
import json
import math
import re
import runpy
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "configs/smoke.yaml"


@pytest.fixture
def bench(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A benchmark, run as a program where the smoke run's models lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where Python looks when it runs one
    Path("models").symlink_to(smoke / "models")
    shutil.copytree(smoke / "cache", "cache")

    def call(name: str, *arguments: object) -> None:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "benchmarks" / name), run_name="__main__")

    return call


def parts(name: str) -> dict[str, Any]:
    """What a benchmark defines, without running it."""
    return runpy.run_path(str(ROOT / "benchmarks" / name))


def documented() -> list[str]:
    """Command lines in the benchmarks themselves and with the figures."""
    lines = [
        line
        for script in sorted((ROOT / "benchmarks").glob("*.py"))
        for line in re.findall(r"^ +python benchmarks/(.*)", script.read_text(), re.M)
    ]
    told = (
        text
        for file in sorted((ROOT / "docs/results").rglob("*.json"))
        for text in re.findall(r"python benchmarks/([^;\"(]*)", file.read_text())
    )
    return sorted({line.strip() for line in (*lines, *told)})


@pytest.mark.parametrize("line", documented())
def test_commands_are_as_documented(bench, line, monkeypatch):
    class Parsed(Exception):
        pass

    def parse(parser: argparse.ArgumentParser, *args: object) -> None:
        real(parser, *args)
        raise Parsed

    real = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    line = re.sub(r"\bPEER\b(?!\.)", "reveal", line).replace("--minutes M", "--minutes 1")
    with pytest.raises(Parsed):
        bench(*line.split())


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "open_end"), [("reveal", 0.0), ("reveal", 0.5), ("bidirectional", 0.0), ("autoregressive", 0.0)])
def test_peers_learn_and_are_judged(bench, peer, open_end):
    bench("peers.py", "--config", SMOKE, "--peer", peer, "--minutes", "0.02", "--output", "found.json", f"base.open_end={open_end}")
    found = json.loads(Path("found.json").read_text())
    assert found["peer"] == peer and found["steps"] > 0 and 1 <= len(found["curve"]) <= 6
    assert all({"accuracy", "utility", "repetition"} <= row.keys() for row in found["test"].values())
    assert ("greedy" in found["test"]) == (peer == "autoregressive" or open_end > 0)


@pytest.mark.slow
def test_repairs_are_measured(bench):
    bench("repair.py", "scenes", "models/smoke", "--most", "3", "--output", "found.json")
    found = json.loads(Path("found.json").read_text())["scenes"]
    assert found["repair"]["captions"] == 3 and found["repair"]["correct_damaged"]["value"] <= found["repair"]["correct_changed"]["value"]
    assert [row["weight"] for row in found["specificity"]] == sorted(row["weight"] for row in found["specificity"])


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    chooser, value = rng.random((2, 6)), rng.random((2, 6))
    expected = [np.mean([value[i, max(subset, key=lambda j: chooser[i, j])] for subset in combinations(range(6), n)]) for i in range(2)]
    np.testing.assert_allclose(parts("best_of_n.py")["best_of"](n, chooser, value), expected)


def test_best_of_n_of_a_finished_run(bench, capsys):
    bench("best_of_n.py", "--models", "models/smoke", "--images", "10", "--candidates", "4", "--output", "o/b.json")
    found = json.loads(Path("o/b.json").read_text())
    rewards = [row["reward"]["value"] for row in found["by_reward"]]
    assert [row["n"] for row in found["by_reward"]] == [1, 2, 4] and rewards == sorted(rewards) and rewards[2] > rewards[0]
    assert all(o["utility"]["value"] >= r["utility"]["value"] - 1e-9 for o, r in zip(found["by_gold"], found["by_reward"], strict=True))
    assert found["by_gold"][0]["utility"] == found["by_reward"][0]["utility"] and found["by_reward"][0]["kl"] == 0
    assert Path("o/b.png").read_bytes()[:4] == b"\x89PNG" and capsys.readouterr().out.count("\n") == 3


def test_noise_does_not_count_as_length_of_the_mean_gradient_and_does_of_an_update():
    cosines, g = parts("credit.py")["cosines"], torch.Generator().manual_seed(0)
    gold, other = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([3.0, -4.0, 0.0])  # cosine -7 / 25
    noise = torch.randn(2, 20000, 3, generator=g)
    for direction, cosine in ((gold, 1.0), (other, -0.28)):
        found = cosines(direction + noise[0], gold + noise[1], 25 + 3 * 10)
        assert found["of the mean"] == pytest.approx(cosine, abs=0.01)
        assert found["of 10 updates"] == pytest.approx(cosine * 5 / (25 + 3) ** 0.5, abs=0.01)
        assert found["of one update"] == pytest.approx(cosine * 5 / 55**0.5, abs=0.01)
    assert math.isnan(cosines(torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1), 1.0)["of the mean"])


@pytest.mark.slow
def test_twice_the_batch_is_twice_the_work(bench):
    bench("step_rate.py", "--config", "smoke", "--size", "tiny", "--times", "1", "2", "--updates", "8", "--output", "rate.json")
    once, twice = (row["stages"] for row in json.loads(Path("rate.json").read_text())["times"].values())
    assert once.keys() == twice.keys() == {"base", "reward", "rlhf"}
    assert twice["reward"]["flops_per_update"] == 2 * once["reward"]["flops_per_update"] > 0


@pytest.mark.slow
def test_the_credit_of_a_finished_run(bench, capsys):
    bench("credit.py", "--models", "models/smoke", "--rollouts", "20", "--output", "o/credit.json")
    found = json.loads(Path("o/credit.json").read_text())["cosine with the gradient of gold"]
    assert 0 < found["gold"]["of one update"] < found["gold"]["of 10 updates"] <= 1.0
    assert {"sparse", "caption", "step_potential local", "sparse and 0.3 of step_potential local"} <= found.keys()
    assert "sparse and 0.3 of step_potential local" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench("credit.py", "--rollouts", "25", "--output", "x.json")
