"""One job of a grid: its stages, and what is kept of an arm: the curve, and the hidden quality of every test scene."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..evaluation.summary import evaluate_checkpoint, win_rate
from ..models.saved import FILES, earlier
from ..utils.files import reserved, write_json
from ..utils.grid import Grid, Job
from ..utils.runlog import RunLog
from ..utils.seeding import set_threads
from .pipeline import Pipeline
from .run import Run, start_accelerator

CACHE = Path("cache")
CURVE = ("gold_utility", "gold_accuracy", "gold_fluency", "gold_mean_words", "kl", "entropy", "reward", "judge", "alarms")
"""What an epoch's row keeps of the held-out measures."""


def take(start: Path, folder: Path) -> None:
    """Copy the checkpoints of the first two stages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (FILES["alignment"], FILES["base"]):
        shutil.copyfile(start / name, folder / name)


def run_job(grid: Grid, job: Job, output: Path, base_from: str = "") -> None:
    """Do what is still to do of the job's stages; an arm then leaves its record.

    `base_from`: folder, {seed} in it standing for the seed; where there is one, the first two stages are taken from it.
    Raises ValueError or OSError where something is missing, or another process does this job.
    """
    with reserved(job.results / "lock"):
        _run_job(grid, job, output, base_from)


def _run_job(grid: Grid, job: Job, output: Path, base_from: str) -> None:
    config, start = job.config, Path(base_from.format(seed=job.seed))
    if base_from and not job.needs and start.is_dir():
        take(start, config.models)
        write_json(config.results / "stages.json", dict.fromkeys(job.stages, 0.0))
        write_json(job.kept_settings, job.settings())
        return
    set_threads(config.threads)
    if job.needs and not config.start_from:
        take(Path("models/ablation") / grid.name / job.needs[-1], config.models)
    log = RunLog(config.results)
    pipeline = Pipeline(Run(config, start_accelerator(config), log, True, CACHE))
    if job.outdated():  # what other settings trained is not gone on with, nor taken for finished
        for path in (path for stage in job.stages for path in (config.models / FILES[stage], pipeline.run.last(stage))):
            path.unlink(missing_ok=True)
        if pipeline.first:
            pipeline.first.begin("alignment")
    pipeline.check(job.stages)
    write_json(job.kept_settings, job.settings())
    pipeline.train(job.stages)
    if job.arm:
        write_json(job.record(output), record(grid, job, log, pipeline.times()), indent=None)
        for stage in job.stages:
            pipeline.run.last(stage).unlink(missing_ok=True)


def record(grid: Grid, job: Job, log: RunLog, seconds: dict[str, float]) -> dict[str, Any]:
    """The learning curve on held-out images, and the kept weights on the test images next to the base model."""
    config = job.config
    refined = evaluate_checkpoint(config.models / FILES["rlhf"], "rlhf", config, CACHE)
    base = evaluate_checkpoint(earlier(config, "base"), "base", config, CACHE)
    if not (refined.gold and base.gold):
        raise ValueError("an ablation needs captions whose true quality is known: data.source=scenes")
    rows = [
        {k: row[k] for k in ("epoch", "step", "seconds", "stopped") if k in row}
        | {k[4:]: v for k, v in row.items() if k.startswith("val_alarm_") or (k.startswith("val_") and k[4:] in CURVE)}
        for row in log.rows("rlhf")
    ]
    rewarded = Path("results/ablation") / grid.name / (job.needs[-1] if config.start_from else job.name)
    accuracy = json.loads((rewarded / "reward_report.json").read_text(encoding="utf-8"))["accuracy"]
    means = {name: float(values.mean()) for name, values in refined.gold.items()}
    return grid.facts(job) | {
        "captions_per_update": config.rlhf.fit.batch_size * config.rlhf.fit.grad_accum * config.rlhf.group / config.rlhf.inner_updates,
        "seconds": seconds, "rows": rows, "reward_accuracy": accuracy, "test": means, "test_reward": refined.metrics["reward"]["value"],
        "win_rate": win_rate(refined, base), "base_utility": base.gold["utility"].round(4).tolist(),
        "utility": refined.gold["utility"].round(4).tolist(), "config": job.settings(),
    }  # fmt: skip
