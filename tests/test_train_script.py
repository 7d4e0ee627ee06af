"""train.py: what a run leaves, stage by stage and all together, and what it says when it cannot go on."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import captioner_kind, earlier, load_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.training import pipeline
from hierarchical_diffusion_rlhf_caption_refinement.training.pipeline import Pipeline
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import STAGES, ConfigError, config_from_plain, load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.files import reserved
from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import RunLog, StageLog

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def summary(smoke: Path) -> dict[str, Any]:
    return json.loads((smoke / "results/smoke/training_summary.json").read_text())


def weights(path: Path) -> Any:
    return load_denoiser(path, captioner_kind(path))[1].state_dict()


def test_every_stage_leaves_its_checkpoint(smoke):
    kinds = {"alignment_model": "alignment", "best_base_model": "base", "best_reward_model": "reward", "best_rlhf_model": "rlhf"}
    for name, kind in kinds.items():
        assert checkpoint.kind_of(smoke / f"models/smoke/{name}.pt") == kind
    for stage in STAGES:
        assert checkpoint.load(smoke / f"models/smoke/last_{stage}.pt", "training")["done"]
    assert not list(smoke.rglob("*.tmp")) and {p.name for p in smoke.iterdir()} == {"models", "results", "cache"}


def test_the_summary_has_the_specified_columns(summary):
    columns = {
        "base": ["train_loss", "val_loss"],
        "reward": ["train_loss", "train_accuracy", "val_loss", "val_accuracy"],
        "rlhf": ["train_loss", "train_reward", "val_loss", "val_reward"],
    }
    assert list(summary["stages"]) == list(STAGES)
    for stage, names in columns.items():
        trained = [row for row in summary["stages"][stage] if row["epoch"] > 0]
        assert [row["epoch"] for row in trained] == list(range(1, {"base": 3, "reward": 2, "rlhf": 2}[stage] + 1))
        for row in trained:
            assert list(row)[: 2 + len(names)] == ["epoch", "step", *names]
            assert all(isinstance(row[name], float) for name in names)
    losses = [row["train_loss"] for row in summary["stages"]["base"]]
    assert losses[0] > losses[1] > losses[2]
    before = summary["stages"]["rlhf"][0]
    assert before["epoch"] == 0 and "train_loss" not in before and before["val_reward"] is not None


def test_the_summary_tells_hidden_quality_win_rate_and_time(smoke, summary):
    assert list(summary["gold"]) == ["data", "base", "rlhf"]
    for name, found in summary["gold"].items():
        assert set(found) == {"accuracy", "specificity", "fluency", "utility", "mean_words"}
        assert all(0 <= value <= 1 for key, value in found.items() if key != "mean_words"), name
    assert summary["gold"]["data"]["utility"] > max(0.6, summary["gold"]["base"]["utility"])
    win = summary["win_rate"]
    assert 0 <= win["low"] <= win["value"] <= win["high"] <= 1
    assert set(summary["seconds"]) == set(STAGES) and min(summary["seconds"].values()) > 0
    row = checkpoint.load(smoke / "models/smoke/alignment_model.pt", "alignment")["facts"]["row"]  # of the weights that were kept
    assert summary["alignment"].items() >= {name: value for name, value in row.items() if name.startswith("val_")}.items()
    assert 0 < summary["alignment"]["ceiling_r1"] <= 1
    assert summary["parameters"]["base"] == summary["parameters"]["rlhf"] > 1000
    report = summary["reward"]
    assert 0 <= report["accuracy"]["low"] <= report["accuracy"]["value"] <= report["accuracy"]["high"] <= 1
    assert {"rater_agreement", "length_only", "text_only", "image_shuffled", "by_gap", "calibration_error", "curve"} <= set(report)


def test_the_config_is_kept_beside_the_numbers(smoke, summary):
    kept = json.loads((smoke / "results/smoke/config.json").read_text())
    assert config_from_plain(kept) == config_from_plain(summary["config"]) == load_config([SMOKE])


def test_a_report_and_captions_of_fresh_images(smoke):
    page = (smoke / "results/smoke/report/report.html").read_text(encoding="utf-8")
    assert "Run smoke" in page and page.count("<img") > 12
    assert len(list((smoke / "results/smoke/fresh").glob("scene_*.png"))) == cli.FRESH


FINISH = cli.finish


@pytest.fixture
def copy(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run once more, to be changed, and the working directory; the evaluation at the end of commands is left out."""
    shutil.copytree(smoke, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "finish", lambda *args: None)
    return tmp_path


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "results/smoke/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_stage_by_stage_and_once_more_is_the_same_run(smoke, copy):
    for stage in STAGES:
        assert cli.train(["--config", str(SMOKE), "--stage", stage]) == 0
    for name in ("best_base_model.pt", "best_rlhf_model.pt"):
        one, other = (weights(folder / "models/smoke" / name) for folder in (smoke, copy))
        assert all((one[key] == other[key]).all() for key in one)
    assert rows(copy) == rows(smoke)
    assert set(json.loads((copy / "results/smoke/stages.json").read_text())) == set(STAGES)


@pytest.mark.slow
def test_later_stages_take_the_base_model_as_it_is(copy):
    assert cli.train(["--config", str(SMOKE), "--stage", "base", "base.layers=3", "base.fit.epochs=1"]) == 0
    assert len([key for key in weights(copy / "models/smoke/best_base_model.pt") if key.endswith("mlp.c_fc.weight")]) == 3
    assert cli.train(["--config", str(SMOKE), "--stage", "reward", "reward.comparisons=12", "reward.curve=[12]"]) == 0
    assert cli.train(["--config", str(SMOKE), "--stage", "rlhf", "rlhf.fit.epochs=1"]) == 0
    assert weights(copy / "models/smoke/best_rlhf_model.pt").keys() == weights(copy / "models/smoke/best_base_model.pt").keys()


def test_a_finished_run_is_left_alone_when_resumed(copy):
    before = {path: path.read_bytes() for path in sorted((copy / "models").rglob("*.pt"))}
    log = (copy / "results/smoke/metrics.jsonl").read_text()
    assert cli.train(["--config", str(SMOKE), "--resume"]) == 0
    assert {path: path.read_bytes() for path in sorted((copy / "models").rglob("*.pt"))} == before
    assert (copy / "results/smoke/metrics.jsonl").read_text() == log


def test_a_stage_that_starts_over_unmakes_what_was_built_on_it(copy, monkeypatch):
    monkeypatch.setattr(cli, "finish", FINISH)
    assert cli.train(["--config", str(SMOKE), "--stage", "base", "seed=1", "base.fit.epochs=1"]) == 0
    assert set(json.loads((copy / "results/smoke/stages.json").read_text())) == {"alignment", "base"}
    assert {path.name for path in (copy / "models/smoke").glob("last_*.pt")} == {"last_alignment.pt", "last_base.pt"}
    assert [(row["stage"], row["epoch"]) for row in rows(copy) if row["stage"] != "alignment"] == [("base", 1)]
    summary = json.loads((copy / "results/smoke/training_summary.json").read_text())  # and nothing is told of what is stale
    assert set(summary["gold"]) == {"data", "base"} and "reward" not in summary and "win_rate" not in summary


def test_new_eyes_leave_no_captioner_of_the_old_ones(copy, monkeypatch):
    monkeypatch.setattr(cli, "finish", FINISH)
    assert cli.train(["--config", str(SMOKE), "--stage", "alignment", "seed=3", "alignment.fit.epochs=1"]) == 0
    assert "gold" not in json.loads((copy / "results/smoke/training_summary.json").read_text())


def test_a_finished_stage_whose_model_is_gone_is_trained_again(copy):
    lost = copy / "models/smoke/best_rlhf_model.pt"
    before = weights(lost)
    lost.unlink()
    assert cli.train(["--config", str(SMOKE), "--resume"]) == 0
    assert all((before[key] == value).all() for key, value in weights(lost).items())


def test_a_base_model_keeps_the_words_of_its_alignment_model_and_says_so(copy, caplog):
    command = ["--config", str(SMOKE), "--stage", "base", "base.fit.epochs=1"]
    assert cli.train(command) == 0 and "which stays" not in caplog.text
    assert cli.train([*command, "data.max_words=5"]) == 0
    assert "models/smoke/alignment_model.pt: was trained with data.max_words=20, which stays (now it is 5); --stage" in caplog.text


def test_a_data_set_that_is_not_there_takes_nothing_away(copy, capsys):
    before = {path: path.read_bytes() for path in sorted((copy / "models").rglob("*.pt"))}
    stages = (copy / "results/smoke/stages.json").read_text()
    assert cli.train(["--config", str(SMOKE), "--stage", "base", "data.source=folder", "data.path=typo"]) == 1
    assert "typo" in capsys.readouterr().err and (copy / "results/smoke/stages.json").read_text() == stages
    assert {path: path.read_bytes() for path in sorted((copy / "models").rglob("*.pt"))} == before


def test_what_is_kept_was_made_with_these_settings(copy, capsys):
    told = (copy / "results/smoke/config.json").read_text()
    assert cli.train(["--config", str(SMOKE), "--resume", "base.width=64", "rlhf.fit.lr=0.01"]) == 2
    assert capsys.readouterr().err == (
        "error: models/smoke/best_base_model.pt: was trained with base.width=32, now it is 64; without --resume it is trained anew\n"
    )
    assert cli.train(["--config", str(SMOKE), "--stage", "rlhf", "--resume", "rlhf.fit.lr=0.01"]) == 2
    assert "best_rlhf_model.pt: was trained with rlhf.fit.lr=" in capsys.readouterr().err
    assert (copy / "results/smoke/config.json").read_text() == told


@pytest.mark.parametrize(
    ("stage", "settings", "refused"),
    [
        ("base", ["data.comparisons=taste.csv", "data.test=7", "data.max_words=9"], ""),  # none of which the base model goes by
        ("reward", ["data.comparisons=taste.csv"], "data.comparisons=, now it is taste.csv"),
        ("reward", ["start_from=models/other"], "start_from=, now it is models/other"),
        ("alignment", ["data.max_words=9"], "data.max_words=20, now it is 9"),
        ("alignment", ["start_from=models/other"], ""),
    ],
)
def test_a_kept_stage_is_held_to_what_it_goes_by(copy, stage, settings, refused):
    config = load_config([SMOKE], settings)
    pipeline = Pipeline(Run(config, Accelerator(cpu=True), RunLog(config.results), True, Path("cache")))
    with pytest.raises(ConfigError, match=refused) if refused else nullcontext():
        pipeline.check_settings(stage)


def test_distilling_is_resumed_on_the_images_that_it_searched_captions_for(copy, monkeypatch):
    """They are kept in the order of the images: with one more, as where links answer again, all would be another's."""
    monkeypatch.setattr(pipeline, "FETCHED", ("scenes",))
    held = []
    monkeypatch.setattr(pipeline, "train_rlhf", lambda run, *_: held.append(set(run.given)))
    for method in ("distil", "policy_gradient"):
        config = load_config([SMOKE], [f"rlhf.method={method}"])
        Pipeline(Run(config, Accelerator(cpu=True), RunLog(config.results), True, Path("cache"))).rlhf()
    assert held[0] - held[1] == {"the training images"} and "the data set" not in held[0]


def test_a_stage_is_resumed_on_the_data_and_models_that_it_began_with(copy, capsys):
    stages = copy / "results/smoke/stages.json"
    stages.write_text(json.dumps({"alignment": 1.0}))
    kept = Path("models/smoke/alignment_model.pt")
    payload = checkpoint.load(kept, "alignment")
    payload["config"]["data"]["captions_per_image"] = 1
    checkpoint.save(kept, "alignment", payload)
    assert cli.train(["--config", str(SMOKE), "--resume", "data.captions_per_image=1"]) == 1
    assert "models/smoke/last_base.pt: was trained with the data set=" in capsys.readouterr().err
    stages.write_text(json.dumps(dict.fromkeys(["alignment", "base", "reward"], 1.0)))
    reward = Path("models/smoke/best_reward_model.pt")
    payload = checkpoint.load(reward, "reward")
    payload["model"]["linear"].mul_(-1.0)
    checkpoint.save(reward, "reward", payload)
    assert cli.train(["--config", str(SMOKE), "--stage", "rlhf", "--resume"]) == 1
    assert "models/smoke/last_rlhf.pt: was trained with best_reward_model.pt=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "setting"), [("alignment", "vision.heads=1"), ("rlhf", "sampler.steps=1"), ("rlhf", "base.left_to_right=0.9")]
)
def test_a_resumed_stage_is_held_to_all_that_it_reads(copy, capsys, stage, setting):
    """Another sampler would choose the best weights among figures that cannot be compared."""
    path = copy / "results/smoke/stages.json"
    path.write_text(json.dumps(dict.fromkeys(STAGES[: STAGES.index(stage)], 1.0)))
    assert cli.train(["--config", str(SMOKE), "--stage", stage, "--resume", setting]) == 1
    key, value = setting.split("=")
    assert f"models/smoke/last_{stage}.pt: was trained with {key}=" in (told := capsys.readouterr().err) and f"now it is {value}" in told


def test_an_unfinished_alignment_is_finished_before_the_base_model_begins(copy):
    (copy / "results/smoke/stages.json").write_text("{}")
    (copy / "models/smoke/last_alignment.pt").unlink()
    before = (copy / "models/smoke/alignment_model.pt").stat().st_mtime_ns
    assert cli.train(["--config", str(SMOKE), "--stage", "base", "--resume", "base.fit.epochs=3"]) == 0
    assert (copy / "models/smoke/alignment_model.pt").stat().st_mtime_ns > before
    assert set(json.loads((copy / "results/smoke/stages.json").read_text())) == {"alignment", "base"}


def test_a_resumed_stage_is_held_to_its_settings(copy, capsys):
    (copy / "results/smoke/stages.json").write_text(json.dumps({"alignment": 1.0}))
    assert cli.train(["--config", str(SMOKE), "--resume", "base.fit.lr=0.5"]) == 1
    assert capsys.readouterr().err == (
        "error: models/smoke/last_base.pt: was trained with lr=0.003, now it is 0.5; remove it to start over\n"
    )
    assert cli.train(["--config", str(SMOKE), "--resume", "base.left_to_right=0.9"]) == 1
    assert "was trained with base.left_to_right=0.3, now it is 0.9; remove it" in capsys.readouterr().err
    assert cli.train(["--config", str(SMOKE), "--resume", "base.layers=3"]) == 1
    assert "models/smoke/last_base.pt: is of another model" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_threads(copy, monkeypatch):
    chosen = []
    monkeypatch.setattr("hierarchical_diffusion_rlhf_caption_refinement.utils.seeding.set_threads", lambda n: chosen.append(n) or n)
    path = copy / "results/smoke/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 7}))
    for arguments in (["--resume", "threads=0"], ["--resume", "threads=3"]):
        assert cli.train(["--config", str(SMOKE), *arguments]) == 0
    assert chosen == [7, 3] and json.loads(path.read_text())["threads"] == 3


@pytest.mark.parametrize(("stage", "missing"), [("reward", "base"), ("rlhf", "base"), ("rlhf", "reward")])
def test_a_stage_without_what_it_needs_names_the_command(smoke, tmp_path, monkeypatch, capsys, stage, missing):
    monkeypatch.chdir(tmp_path)
    if missing == "reward":
        shutil.copytree(smoke / "models", tmp_path / "models", ignore=shutil.ignore_patterns("best_reward*", "*rlhf*"))
    assert cli.train(["--config", str(SMOKE), "--stage", stage]) == 1
    assert capsys.readouterr().err == (
        f"error: models/smoke/best_{missing}_model.pt does not exist; the same command with --stage {missing} makes it\n"
    )


def test_start_from_a_folder_without_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.train(["--config", str(SMOKE), "--stage", "rlhf", "run=zz", "start_from=nowhere"]) == 1
    assert capsys.readouterr().err == (
        "error: nowhere/best_base_model.pt does not exist; start_from is the folder of another run's checkpoints, as models/RUN\n"
    )
    assert cli.train(["--config", ""]) == 2
    assert capsys.readouterr().err == "error: '' is no name of a file\n"


@pytest.mark.parametrize("repeats", [0, 5])  # pairs that nobody was asked about prefer nothing either
def test_comparisons_that_are_all_ties_teach_nothing(copy, capsys, repeats):
    keys = [example.key for split in load_examples(load_config([SMOKE]).data, 0).values() for example in split]
    rows = [{"image": key, "a": "a red circle", "b": "a blue square", "choice": "tie"} for key in keys]
    Path("ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.train(["--config", str(SMOKE), "--stage", "reward", "data.comparisons=ties.jsonl", f"reward.repeats={repeats}"]) == 1
    assert capsys.readouterr().err == (
        "error: ties.jsonl: nobody preferred a caption to another in what would be for train, val: all ties\n"
    )


@pytest.mark.slow
def test_a_run_without_a_stage_of_its_own_builds_on_another(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = [f"start_from={smoke / 'models/smoke'}", "run=sparse", "shaping.clip_weight=0"]
    assert cli.train(["--config", str(SMOKE), *source, "--stage", "rlhf", "rlhf.fit.epochs=1"]) == 0
    found = json.loads(Path("results/sparse/training_summary.json").read_text())
    assert {"base", "rlhf"} <= set(found["gold"]) and "reward" in found["evaluation"]["rlhf"] and found["win_rate"]["value"] >= 0
    assert found["stages"]["rlhf"][-1]["alpha"] == 0
    assert not (smoke / "models/sparse").exists()
    few = [*source, "reward.comparisons=40", "reward.curve=[]"]
    assert cli.train(["--config", str(SMOKE), *few, "--stage", "reward"]) == 0
    own = Pipeline(Run(load_config([SMOKE], few), Accelerator(cpu=True), RunLog(Path("results/sparse")), False, Path("cache")))
    assert own.find("reward") == Path("models/sparse/best_reward_model.pt")  # what this run trained itself comes first
    assert own.find("base") == smoke / "models/smoke/best_base_model.pt"
    other = replace(own.run.config, start_from="elsewhere")
    assert earlier(replace(own.run.config, start_from=f"{smoke / 'models/smoke'}/"), "reward") == Path("models/sparse/best_reward_model.pt")
    assert earlier(other, "reward") == Path("elsewhere/best_reward_model.pt")  # what it made before, of another start, does not count
    assert earlier(replace(other, start_from=""), "reward") == Path("models/sparse/best_reward_model.pt")


def test_candidates_wait_for_a_reward_model(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["run=one", f"start_from={smoke / 'models/smoke'}", "base.fit.epochs=1", "sampler.candidates=2", "sampler.temperature=0.7"]
    assert cli.train(["--config", str(SMOKE), "--stage", "base", *settings]) == 0
    assert set(json.loads(Path("results/one/training_summary.json").read_text())["gold"]) == {"data", "base"}


@pytest.mark.slow
def test_a_copied_base_model_is_told_of(smoke, tmp_path, monkeypatch):
    """A captioner is taught another taste in a folder of its own: models copied there are as good as trained there."""
    monkeypatch.chdir(tmp_path)
    Path("models/taste").mkdir(parents=True)
    for name in ("alignment_model.pt", "best_base_model.pt"):
        shutil.copy(smoke / "models/smoke" / name, Path("models/taste") / name)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "finish", lambda *args: None)
        assert cli.train(["--config", str(SMOKE), "run=taste", "--stage", "reward", "reward.comparisons=40", "reward.curve=[]"]) == 0
    assert cli.train(["--config", str(SMOKE), "run=taste", "--stage", "rlhf", "rlhf.fit.epochs=1"]) == 0
    told = json.loads(Path("results/taste/training_summary.json").read_text())
    assert set(told["gold"]) == {"data", "base", "rlhf"} and 0 <= told["win_rate"]["value"] <= 1
    assert told["alignment"]["val_text_to_image_r10"] > 0


@pytest.mark.slow
def test_a_second_round_begins_with_the_first_ones_captioner(smoke, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source, refined = ["--config", str(SMOKE), f"start_from={smoke / 'models/smoke'}"], smoke / "models/smoke/best_rlhf_model.pt"
    rows = [
        row for line in (smoke / "results/smoke/metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["stage"] == "rlhf"
    ]
    kept = max(rows, key=lambda row: row.get("val_judge_unalarmed", row["val_judge"]))
    assert kept["step"] > 0
    assert cli.train([*source, "run=again", "--stage", "rlhf", f"rlhf.start={refined}"]) == 0
    begun = json.loads(Path("results/again/metrics.jsonl").read_text().splitlines()[0])
    assert (begun["step"], begun["val_kl"]) == (0, pytest.approx(0, abs=1e-5))
    assert [begun[name] for name in ("val_judge", "val_gold_utility")] == pytest.approx([kept["val_judge"], kept["val_gold_utility"]])
    other = [*source[:2], "run=other", "seed=1", "data.train=64", "alignment.fit.epochs=1", "base.fit.epochs=1"]
    assert cli.train([*other, "--stage", "base"]) == 0
    capsys.readouterr()
    assert cli.train([*source, "run=mixed", "--stage", "rlhf", "rlhf.start=models/other/best_base_model.pt"]) == 2
    alignment = smoke / "models/smoke/alignment_model.pt"
    assert capsys.readouterr().err == (f"error: models/other/best_base_model.pt: has other eyes or another vocabulary than {alignment}\n")
    Path("models/judged").mkdir()
    for name in ("alignment_model.pt", "best_base_model.pt"):
        shutil.copy(Path("models/other") / name, Path("models/judged") / name)
    for name in ("best_reward_model.pt", "judge_model.pt"):
        shutil.copy(smoke / "models/smoke" / name, Path("models/judged") / name)
    assert cli.train([*other, "run=judged", "--stage", "rlhf"]) == 2
    assert capsys.readouterr().err.endswith(
        "error: models/judged/best_reward_model.pt: has other eyes or another vocabulary than models/judged/alignment_model.pt; "
        "--stage reward trains it anew\n"
    )


@pytest.mark.slow
def test_a_run_whose_first_round_is_another_refinement(copy, capsys, monkeypatch):
    """A run within the run: resumed bit for bit, kept when done, held to its settings, gone with the base model that it was built on."""
    Path("first.yaml").write_text("shaping: {clip_weight: 0}")
    command = ["--config", str(SMOKE), "--stage", "rlhf", "rlhf.first=first.yaml", "rlhf.fit.epochs=1"]
    assert cli.train(command) == 0
    assert "Run smoke/first" in Path("results/smoke/first/report/report.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert out.startswith("first/rlhf epoch 1  loss") and "\nrlhf epoch 1  loss" in out
    first, rlhf = Path("models/smoke/first/best_rlhf_model.pt"), Path("models/smoke/best_rlhf_model.pt")
    lines = [json.loads(line) for line in Path("results/smoke/first/metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["epoch"]) for row in lines] == [("rlhf", 0), ("rlhf", 1)]
    kept, begun = checkpoint.load(first, "rlhf"), next(row for row in rows(copy) if row["stage"] == "rlhf")
    assert kept["config"]["shaping"]["clip_weight"] == 0 and kept["facts"]["row"]["step"] > 0
    assert (begun["step"], begun["val_kl"]) == (0, pytest.approx(0, abs=1e-5))
    assert begun["val_loss"] == pytest.approx(kept["facts"]["row"]["val_loss"], abs=1e-6) != pytest.approx(lines[0]["val_loss"], abs=1e-3)
    own = load_denoiser(first, "rlhf")[0].config
    assert (own.run, own.start_from, own.rlhf.first) == ("smoke/first", "models/smoke", "")
    uninterrupted, update = weights(rlhf), StageLog.update

    def pressed(self, row):
        update(self, row)
        if (self.title, row["step"]) in (("first/rlhf", 3), ("rlhf", 2)):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StageLog, "update", pressed)
        assert cli.train(command) == 130
        assert "stopped after update 3; models/smoke/first/last_rlhf.pt holds all that is needed" in capsys.readouterr().err
        assert cli.train([*command, "--resume"]) == 130
        assert "stopped after update 2; models/smoke/last_rlhf.pt holds" in capsys.readouterr().err
    before = first.stat().st_mtime_ns
    assert cli.train([*command, "--resume"]) == 0
    assert first.stat().st_mtime_ns == before and all((uninterrupted[key] == value).all() for key, value in weights(rlhf).items())
    Path("first.yaml").write_text("shaping: {clip_weight: 0.1}")
    assert cli.train([*command, "--resume"]) == 2
    assert "models/smoke/first/best_rlhf_model.pt: was trained with shaping.clip_weight=0.0, now it is 0.1" in capsys.readouterr().err
    assert cli.train([*command[:3], "base", "rlhf.first=first.yaml", "base.fit.epochs=1"]) == 0
    assert json.loads(Path("results/smoke/first/stages.json").read_text()) == {}
    assert not Path("models/smoke/first/last_rlhf.pt").exists() and not Path("results/smoke/first/metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("shaping.clip_wieght=0", "error: shaping.clip_wieght=0: unknown key 'shaping.clip_wieght'; did you mean 'shaping.clip_weight'?\n"),
        ("rlhf.group=1", "error: rlhf.group must be at least 2: captions are compared within it\n"),
        ("run=../escape", "error: run=../escape: names folders inside models/ and results/, none outside\n"),
        ("run=/escape", "error: run=/escape: names folders inside models/ and results/, none outside\n"),
        ("base.heads=0", "error: base.heads=0: must be at least 1\n"),
        ("epochs", "error: epochs: expected key.sub=value\n"),
        ("start_from=models", "error: start_from: which stage is to build on it? --stage says; a whole run makes its own models\n"),
    ],
)
def test_wrong_settings_exit_with_2_and_one_line(tmp_path, monkeypatch, capsys, argument, line):
    monkeypatch.chdir(tmp_path)
    assert cli.train(["--config", str(SMOKE), argument]) == 2
    assert capsys.readouterr().err == line and list(tmp_path.iterdir()) == []


def test_a_second_run_of_the_same_name_waits_for_nobody(copy, capsys):
    before = {path: path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file()}
    with reserved(Path("results/smoke/lock")):
        assert cli.train(["--config", str(SMOKE), "--stage", "rlhf"]) == 1
        assert capsys.readouterr().err == "error: another run is writing results/smoke\n"
        assert {path: path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file()} == before
    assert cli.train(["--config", str(SMOKE), "--resume"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["vision.width=33"], 2, "vision.width must be a multiple of vision.heads"),
        (["vision.backbone=nowhere/at-all"], 1, "nowhere/at-all: not a usable vision backbone"),
        (["data.source=jsonl", "data.path=missing.jsonl", "--stage", "base"], 1, "missing.jsonl: No such file or directory"),
        (["data.source=jsonl", "data.path=missing.jsonl"], 2, "the reward stage needs data.ratings or data.comparisons"),
        (["rlhf.first=nothing.yaml"], 2, "nothing.yaml: No such file or directory"),
        (["rlhf.first=configs/smoke.yaml"], 2, "smoke.yaml: 'alignment' does not belong here: rlhf.first shares the run's models and data"),
        (["rlhf.sparse=references", "rlhf.first=first.yaml"], 1, "models/smoke/best_reward_model.pt does not exist; the same command with"),
        (["steps=4"], 2, "steps=4: unknown key 'steps'; did you mean 'sampler.steps'?"),
        (["data.train=0"], 1, "data.source=scenes: data.train, data.val, data.test and data.captions_per_image must be positive"),
        (["alignment.fit.lr=1e12", "data.train=64"], 1, "the gradient is not finite"),
    ],
)
def test_what_cannot_be_trained_ends_in_one_line(tmp_path, monkeypatch, capsys, arguments, code, reason):
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text("rlhf: {sparse: preference}")
    assert cli.train(["--config", str(SMOKE), *arguments]) == code
    errors = capsys.readouterr().err
    assert reason in errors and errors.count("\n") == 1
