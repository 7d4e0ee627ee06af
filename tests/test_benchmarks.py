"""The benchmarks are called as they say, and run to their end on the smoke run."""

import argparse
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

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
@pytest.mark.parametrize("peer", ["reveal", "bidirectional", "autoregressive"])
def test_peers_learn_and_are_judged(bench, peer):
    bench("peers.py", "--config", SMOKE, "--peer", peer, "--minutes", "0.02", "--output", "found.json")
    found = json.loads(Path("found.json").read_text())
    assert found["peer"] == peer and found["steps"] > 0 and 1 <= len(found["curve"]) <= 6
    assert all({"accuracy", "utility", "repetition"} <= row.keys() for row in found["test"].values())
    assert ("greedy" in found["test"]) == (peer == "autoregressive")


@pytest.mark.slow
def test_repairs_are_measured(bench):
    bench("repair.py", "scenes", "models/smoke", "--most", "3", "--output", "found.json")
    found = json.loads(Path("found.json").read_text())["scenes"]
    assert found["repair"]["captions"] == 3 and found["repair"]["correct_damaged"]["value"] <= found["repair"]["correct_changed"]["value"]
    assert [row["weight"] for row in found["specificity"]] == sorted(row["weight"] for row in found["specificity"])
