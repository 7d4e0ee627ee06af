"""The grid's command: what it trains, keeps, skips, and survives. Arms are trained in this process, on the smoke run's first stages."""

import json
import sys
from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.ablate import ablate, exit_code, run_all, to_do
from hierarchical_diffusion_rlhf_caption_refinement.training import ablation
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError
from hierarchical_diffusion_rlhf_caption_refinement.utils.files import reserved, write_json
from hierarchical_diffusion_rlhf_caption_refinement.utils.grid import read_grid

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"
GRID = f"""
config: {SMOKE}
baseline: sparse_only
settings: {{rlhf.fit.epochs: 1, reward.curve: []}}
regimes: {{few: {{reward.comparisons: 60, reward.reader: false}}}}
arms:
  sparse_only: {{shaping.clip_weight: 0.0}}
  one_member: {{reward.members: 1}}
"""


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(GRID)
    return tmp_path / "toy.yaml"


@pytest.mark.slow
def test_arms_are_trained_on_shared_stages_recorded_once_and_compared(grid: Path, smoke: Path, capsys: pytest.CaptureFixture[str]):
    command = [str(grid), "--jobs", "0", "--output", "out"]
    assert ablate([*command, "--only", "few/*", "--base-from", str(smoke / "models" / "smoke")]) == 0
    base = Path("models/ablation/toy/base/0/best_base_model.pt")
    assert base.read_bytes() == (smoke / "models" / "smoke" / base.name).read_bytes()  # taken, not trained
    records = {arm: json.loads(Path(f"out/few/{arm}/0.json").read_text()) for arm in ("sparse_only", "one_member")}
    for arm, found in records.items():
        assert (found["regime"], found["arm"], found["seed"]) == ("few", arm, 0) and "rlhf.fit.epochs=1" in found["settings"]
        assert [row["epoch"] for row in found["rows"]] == [0, 1] and {"gold_utility", "kl", "judge", "reward"} <= found["rows"][1].keys()
        assert len(found["utility"]) == len(found["base_utility"]) == 32 and found["captions_per_update"] == 16
        assert sum(found["utility"]) / 32 == pytest.approx(found["test"]["utility"], abs=1e-4)
        assert 0 < found["reward_accuracy"]["value"] < 1
    assert records["sparse_only"]["base_utility"] == records["one_member"]["base_utility"]
    alone = Path("models/ablation/toy/few/one_member/0")
    assert (alone / "best_reward_model.pt").exists() and not (alone / "last_rlhf.pt").exists()
    assert not Path("models/ablation/toy/few/sparse_only/0/best_reward_model.pt").exists()

    with reserved(Path("results/ablation/toy/few/sparse_only/0/lock")):  # another grid's process is at it
        Path("out/few/sparse_only/0.json").rename("record.json")
        assert ablate([*command, "--only", "few/sparse_only/0"]) == 1
        assert "error: another run is writing results/ablation/toy/few/sparse_only/0" in capsys.readouterr().err
        Path("record.json").rename("out/few/sparse_only/0.json")
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.json")}
    assert ablate(command) == 0 and {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.json")} == before
    grid.write_text(GRID.replace("rlhf.fit.epochs: 1", "rlhf.fit.epochs: 1, shaping.fade: 0.7"))  # as a new default would do
    assert [job.name for job in to_do(read_grid(grid).jobs(), "few/*/0", Path("out"))] == ["few/sparse_only/0", "few/one_member/0"]
    grid.write_text(GRID.replace("reward.comparisons: 60", "reward.comparisons: 40"))
    assert ablate([*command, "--only", "few/sparse_only/0"]) == 0  # on a reward model of forty comparisons, not the old one with a new name
    report = json.loads(Path("results/ablation/toy/few/reward/0/reward_report.json").read_text())
    again = json.loads(Path("out/few/sparse_only/0.json").read_text())
    assert report["comparisons"]["train"] == 40 == again["config"]["reward.comparisons"] and again["rows"] != records["sparse_only"]["rows"]
    grid.write_text(GRID)
    grid.write_text(GRID)
    capsys.readouterr()
    assert ablate([str(grid), "--output", "out", "--report-only"]) == 0
    assert capsys.readouterr().out.strip().endswith("out/README.md") and "| one member | 1 |" in Path("out/README.md").read_text()


def test_what_other_settings_trained_takes_its_first_round_along(grid: Path, monkeypatch: pytest.MonkeyPatch):
    Path("before.yaml").write_text("shaping: {clip_weight: 0.2}")
    grid.write_text(GRID.replace("  one_member:", "  two_rounds: {rlhf.first: before.yaml}\n  one_member:"))
    loaded = read_grid(grid)
    job = next(job for job in loaded.jobs() if job.name == "few/two_rounds/0")
    monkeypatch.setattr(ablation.Pipeline, "train", lambda self, stages: None)
    monkeypatch.setattr(ablation, "record", lambda *args: {})
    reward = Path("models/ablation/toy/few/reward/0/best_reward_model.pt")  # looked for, not read
    reward.parent.mkdir(parents=True)
    reward.touch()
    told, kept = job.results / "first/stages.json", Path("models/ablation/toy/few/two_rounds/0/first/last_rlhf.pt")
    for settings, left in ((job.settings(), True), (job.settings() | {"rlhf.fit.lr": 0.5}, False)):
        write_json(told, {"rlhf": 1.0})
        write_json(job.kept_settings, settings)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.touch()
        ablation.run_job(loaded, job, Path("out"))
        assert kept.exists() == left and json.loads(told.read_text()) == ({"rlhf": 1.0} if left else {})


def test_only_what_is_missing_is_done_in_order(grid: Path):
    jobs, out = read_grid(grid, [0, 1]).jobs(), Path("out")
    assert to_do(jobs, "*", out) == jobs
    assert [job.name for job in to_do(jobs, "few/sparse_only/1", out)] == ["base/1", "few/reward/1", "few/sparse_only/1"]
    assert [job.name for job in to_do(jobs, "few/one_member/*", out)] == ["base/0", "few/one_member/0", "base/1", "few/one_member/1"]
    done = Path("results/ablation/toy/base/1/stages.json")
    done.parent.mkdir(parents=True)
    done.write_text('{"alignment": 1.0}')
    assert "base/1" in [job.name for job in to_do(jobs, "*/1", out)]  # half of it is not enough
    done.write_text('{"alignment": 1.0, "base": 2.0}')
    failed = out / "few" / "one_member" / "1.json"
    failed.parent.mkdir(parents=True)
    failed.write_text('{"error": "killed"}')
    assert [job.name for job in to_do(jobs, "*/one_member/1", out)] == ["few/one_member/1"]
    failed.write_text('{"utility": [1.0]}')
    assert to_do(jobs, "*/one_member/1", out) == []
    with pytest.raises(ConfigError, match="--only many"):
        to_do(jobs, "many/*", out)


def test_a_failure_is_recorded_takes_along_what_needs_it_and_no_more(grid: Path, capsys: pytest.CaptureFixture[str]):
    """The jobs' processes here write down their names; one of them fails."""
    code = "import sys; name = sys.argv[-1]; open('order.txt', 'a').write(name + '\\n'); sys.exit('no luck' if %r in name else 0)"
    loaded, out = read_grid(grid, [0, 1]), Path("out")
    failed = run_all(loaded, loaded.jobs(), [sys.executable, "-c", code % "reward/0"], 2, out)
    assert failed == {"few/reward/0", "few/sparse_only/0"} and exit_code(loaded.jobs(), failed) == 3
    ran = Path("order.txt").read_text().split()
    assert sorted(ran) == sorted(job.name for job in loaded.jobs() if job.name != "few/sparse_only/0")
    assert all(ran.index(need) < ran.index(job.name) for job in loaded.jobs() if job.name in ran for need in job.needs)
    assert [str(path) for path in out.rglob("*.json")] == ["out/few/sparse_only/0.json"]
    assert json.loads((out / "few/sparse_only/0.json").read_text())["error"] == "few/reward/0 failed"
    assert "failed: few/reward/0: exit code 1: no luck" in capsys.readouterr().out


def test_the_exit_code_tells_whether_all_or_some_failed(grid: Path, monkeypatch: pytest.MonkeyPatch):
    command, names = [str(grid), "--output", "out"], ["base/0", "few/reward/0", "few/sparse_only/0", "few/one_member/0"]
    for failing, code in ((names, 1), (names[1:3], 3), ([], 0)):
        monkeypatch.setattr(f"{ablate.__module__}.run_all", lambda *args, failing=failing: set(failing))
        assert ablate(command) == code
    assert exit_code([job for job in read_grid(grid).jobs() if not job.arm], {"base/0"}) == 1


def test_without_a_record_there_is_nothing_to_report(grid: Path, capsys: pytest.CaptureFixture[str]):
    assert ablate([str(grid), "--report-only", "--output", "nothing"]) == 2
    assert capsys.readouterr().err == "error: --output nothing: no record of an arm, nothing to report\n" and not Path("nothing").exists()


def test_there_is_no_negative_number_of_processes(grid: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        ablate([str(grid), "--jobs", "-1"])
    assert stopped.value.code == 2 and "argument --jobs: must be 0 or more" in capsys.readouterr().err


def test_what_cannot_be_is_one_line(grid: Path, capsys: pytest.CaptureFixture[str]):
    assert ablate(["absent.yaml"]) == 2 and "absent.yaml: No such file" in capsys.readouterr().err
    assert ablate([str(grid), "--only", "many/*"]) == 2 and "--only many/*: none of the 4 jobs" in capsys.readouterr().err
