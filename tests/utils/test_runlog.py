"""Rows survive kills and resumes; the progress fits the terminal it is in."""

import io
import json
import re

import pytest
from rich.console import Console

from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import RunLog, counter


def row(step, **numbers):
    return {"step": step, "epoch": step // 10, "loss": 1 / step, **numbers}


def test_rows_round_trip_by_stage(tmp_path):
    log = RunLog(tmp_path / "results")
    assert log.rows() == []
    log.write("base", row(10))
    log.write("rlhf", row(5, reward=0.5))
    assert log.rows("rlhf") == [{"stage": "rlhf", "step": 5, "epoch": 0, "loss": 0.2, "reward": 0.5}]
    assert [r["stage"] for r in log.rows()] == ["base", "rlhf"]


def test_a_row_is_on_disk_at_once_and_is_strict_json(tmp_path):
    log = RunLog(tmp_path)
    log.write("base", row(10, kl=float("nan"), worst=float("inf")))
    assert '"kl": null, "worst": null' in log.path.read_text()
    json.loads(log.path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_resume_drops_later_rows_of_the_stage_only(tmp_path):
    log = RunLog(tmp_path)
    for stage, step in [("base", 10), ("base", 20), ("rlhf", 40), ("base", 30)]:
        log.write(stage, row(step))
    with log.stage("base", 40, resume_step=20, console=Console(quiet=True)) as stage:
        stage(row(30))
    assert [(r["stage"], r["step"]) for r in log.rows()] == [("base", 10), ("base", 20), ("rlhf", 40), ("base", 30)]
    with log.stage("base", 40, console=Console(quiet=True)):
        assert [(r["stage"], r["step"]) for r in log.rows()] == [("rlhf", 40)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_file_equals_the_uninterrupted_one(tmp_path):
    whole, killed = RunLog(tmp_path / "whole"), RunLog(tmp_path / "killed")
    for log, steps in [(whole, (10, 20, 30)), (killed, (10, 20))]:
        with log.stage("base", 30, console=Console(quiet=True)) as stage:
            for step in steps:
                stage(row(step))
    with killed.path.open("a") as file:
        file.write('{"stage": "base", "st')  # killed while writing
    assert len(killed.rows()) == 2
    with killed.stage("base", 30, resume_step=10, console=Console(quiet=True)) as stage:
        for step in (20, 30):
            stage(row(step))
    assert killed.path.read_bytes() == whole.path.read_bytes()


def test_only_the_main_process_writes_but_all_may_track(tmp_path, capsys):
    tracked = []
    log = RunLog(tmp_path, main=False, track=lambda values, step: tracked.append((step, values)))
    with log.stage("base", 10) as stage:
        stage.update(row(5))
        stage(row(10, stopped="enough"))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
    assert tracked == [(10, {"base/step": 10, "base/epoch": 1, "base/loss": 0.1})]
    log.part("first", tmp_path / "first").write("base", row(20))
    assert tracked[1:] == [(20, {"first/base/step": 20, "first/base/epoch": 2, "first/base/loss": 0.05})]


def terminal(width):
    return Console(width=width, force_terminal=True, color_system=None, file=io.StringIO())


def shown(console):
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", console.file.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("width", [48, 60, 89, 90, 120, 200])
@pytest.mark.parametrize("stage", ["rlhf", "alignment"])
def test_bar_fits_the_terminal(width, stage, tmp_path):
    console = terminal(width)
    with RunLog(tmp_path).stage(stage, 120_000, console=console) as progress:
        for step in (6000, 12000):
            progress.update({"step": step, "loss": -0.012345, "reward": -1.23456, "kl": 12.345, "other": 7.7})
    last = shown(console)[-1]
    assert max(map(len, shown(console))) <= width
    assert re.search(r"loss -0\.0123.* ETA (\d+:\d\d:\d\d|-:--:--)", last) and "…" not in last and "other" not in last
    assert ("10%" if width < 90 else "12000/120000") in last
    if stage == "rlhf" and width >= 60:
        assert "loss -0.0123 reward -1.23 kl 12.3" in last


def test_resumed_bar_starts_where_it_left(tmp_path):
    console = terminal(60)
    with RunLog(tmp_path).stage("base", 100, 70, console):
        pass
    assert "70%" in shown(console)[-1]


def test_epoch_lines_stay_on_a_terminal(tmp_path):
    console = terminal(60)
    with RunLog(tmp_path).stage("base", 20, console=console) as progress:
        progress.update(row(10))
        progress(row(10, val_loss=0.25))
        progress.update(row(20))
    assert any(line.rstrip().endswith("base epoch 1  loss 0.1  val_loss 0.25") for line in shown(console))


def test_plain_lines_elsewhere(tmp_path):
    console = Console(width=40, force_terminal=False, file=io.StringIO())
    with RunLog(tmp_path).stage("rlhf", 20, console=console) as progress:
        for step in (5, 10, 15, 20):
            progress.update(row(step))
            if step % 10 == 0:
                progress(
                    row(
                        step,
                        reward=0.5,
                        kl=1.25,
                        lr=1e-3,
                        seconds=2.0,
                        alpha=0.3,
                        val_reward=0.75,
                        stopped="KL [20] nats" if step == 20 else "",
                    )
                )
    assert console.file.getvalue().splitlines() == [
        "rlhf epoch 1  loss 0.1  reward 0.5  kl 1.25  val_reward 0.75",
        "rlhf epoch 2  loss 0.05  reward 0.5  kl 1.25  val_reward 0.75  KL [20] nats",
    ]


def test_long_work_is_counted_on_stderr_and_short_work_is_not(capsys):
    show = counter("image features:")
    for done in range(0, 1001, 50):
        show(done, 1000)
        show(done // 10, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[0] == "image features: 0 of 1000" and lines[-1] == "image features: 1000 of 1000"
