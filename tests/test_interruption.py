"""Ctrl-C saves and says how to go on; a run that is killed anywhere ends as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import STAGES
from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import StageLog

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "configs" / "smoke.yaml"
RESUME = "what was saved is kept, the same command with --resume goes on from there"
COMMAND = ["--config", str(SMOKE), "--resume"]


def timeless(value: Any) -> Any:
    """The same without seconds."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list | tuple) else value


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def differences(one: Path, other: Path) -> list[str]:
    """Checkpoints and rows that two finished runs do not share."""
    files = sorted((one / "models/smoke").glob("*.pt"))
    assert {p.name for p in files} == {p.name for p in (other / "models/smoke").glob("*.pt")}
    found = []
    for path in files:
        a, b = (timeless(torch.load(p, weights_only=True)) for p in (path, other / "models/smoke" / path.name))
        found += [] if same(a, b) else [path.name]
    rows = [timeless([json.loads(x) for x in (p / "results/smoke/metrics.jsonl").read_text().splitlines()]) for p in (one, other)]
    reports = [json.loads((p / "results/smoke/reward_report.json").read_text()) for p in (one, other)]
    return found + ([] if same(*rows) else ["metrics"]) + ([] if same(*reports) else ["reward report"])


@pytest.fixture
def copy(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(smoke, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "finish", lambda *args: None)
    return tmp_path


@pytest.mark.parametrize(("stage", "step"), [("alignment", 7), ("base", 9), ("reward", 3), ("rlhf", 5)])
def test_ctrl_c_saves_and_the_resumed_run_is_the_same(smoke, copy, capsys, stage, step):
    update = StageLog.update

    def pressed(self, row):
        update(self, row)
        if (self.stage, row["step"]) == (stage, step):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageLog, "update", pressed)
        assert cli.train(["--config", str(SMOKE), "--stage", stage]) == 130
    errors = capsys.readouterr().err
    where = f"stopped after update {step}; models/smoke/last_{stage}.pt holds all that is needed to go on from there"
    assert where in errors and errors.endswith(f"\n{RESUME}\n")
    assert torch.load(f"models/smoke/last_{stage}.pt", weights_only=True)["payload"]["step"] == step
    assert stage not in json.loads(Path("results/smoke/stages.json").read_text())
    assert cli.train(["--config", str(SMOKE), "--stage", stage, "--resume"]) == 0
    for name in {"alignment": ["alignment_model"], "reward": ["best_reward_model", "judge_model"]}.get(stage, [f"best_{stage}_model"]):
        a, b = (timeless(torch.load(folder / f"models/smoke/{name}.pt", weights_only=True)) for folder in (smoke, copy))
        assert same(a, b)
    rows = [timeless([json.loads(x) for x in (p / "results/smoke/metrics.jsonl").read_text().splitlines()]) for p in (smoke, copy)]
    a, b = ([row for row in found if row["stage"] == stage] for found in rows)
    assert same(a, b)


def test_ctrl_c_outside_of_training(copy, capsys, monkeypatch):
    def pressed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "finish", pressed)
    assert cli.train([*COMMAND]) == 130
    assert capsys.readouterr().err == f"interrupted; {RESUME}\n"


def run(folder: Path, *arguments: str, kill: tuple[str, float] | None = None) -> subprocess.CompletedProcess[str]:
    script = [str(Path(__file__).with_name("killed_train.py")), *map(str, kill)] if kill else [str(ROOT / "scripts/train.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, *script, *arguments], cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    done = run(whole, "--config", str(SMOKE))
    assert done.returncode == 0, done.stderr
    seconds = json.loads((whole / "results/smoke/stages.json").read_text())
    rng = random.Random(0)
    moments = [(stage, share * seconds[stage]) for stage in STAGES for share in (rng.uniform(0.1, 0.5), rng.uniform(0.1, 0.9))]
    moments[2:2] = [("before note", 0)]  # trained, but not yet recorded as complete
    moments[5:5] = [("after note", 0)]  # between two stages
    moments.append(("rlhf", rng.uniform(0, 0.5) * seconds["rlhf"]))
    inside = set()
    for number, moment in enumerate(moments):
        stopped = run(killed, *COMMAND[: 2 if number == 0 else 3], kill=moment)
        assert stopped.returncode == -signal.SIGKILL, (moment, stopped.stderr)
        inside |= {stage for stage in STAGES if f"killed inside {stage}\n" in stopped.stdout}
    assert inside == set(STAGES)
    done = run(killed, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert differences(whole, killed) == []
    assert not list(killed.rglob("*.tmp"))
