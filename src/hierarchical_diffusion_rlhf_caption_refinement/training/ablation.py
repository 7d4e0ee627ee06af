"""One job of a grid: its stages, and what is kept of an arm: the curve, and the hidden quality of every test scene."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..evaluation.summary import evaluate_checkpoint, win_rate
from ..models.saved import FILES
from ..utils.grid import Grid, Job
from ..utils.runlog import RunLog, write_json
from ..utils.seeding import set_threads
from .pipeline import Pipeline
from .run import Run

CACHE = Path("cache")
CURVE = ("gold_utility", "gold_accuracy", "gold_fluency", "gold_mean_words", "kl", "entropy", "reward", "judge", "alarms")
"""What an epoch's row keeps of the held-out measures."""


def take(files: list[Path], folder: Path) -> None:
    """Copy checkpoints that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def run_job(grid: Grid, job: Job, output: Path, base_from: str = "") -> None:
    """Do what is still to do of the job's stages; an arm then leaves its record.

    `base_from`: folder, {seed} in it standing for the seed, with the first stages' checkpoints, which are then taken from there.
    Raises ValueError or OSError where something is missing.
    """
    config = job.config
    if base_from and not job.needs:
        take([Path(base_from.format(seed=config.seed)) / FILES[stage] for stage in job.stages], config.models)
        write_json(config.results / "stages.json", dict.fromkeys(job.stages, 0.0))
        return
    set_threads(config.threads)
    if job.needs and not config.start_from:
        built_on = Path("models/ablation") / grid.name / job.needs[-1]
        take([built_on / FILES["alignment"], built_on / FILES["base"]], config.models)
    log = RunLog(config.results)
    pipeline = Pipeline(Run(config, Accelerator(cpu=not torch.cuda.is_available()), log, True, CACHE))
    pipeline.train(job.stages)
    if job.arm:
        write_json(record_path(output, job), record(grid, job, log, pipeline.times()), indent=None)
        for stage in job.stages:
            pipeline.run.last(stage).unlink(missing_ok=True)


def record_path(output: Path, job: Job) -> Path:
    return output / f"{job.name}.json"


def record(grid: Grid, job: Job, log: RunLog, seconds: dict[str, float]) -> dict[str, Any]:
    """The learning curve on held-out images, and the kept weights on the test images next to the base model."""
    config = job.config
    refined, base = (evaluate_checkpoint(path, kind, config, CACHE) for path, kind in (
        (config.models / FILES["rlhf"], "rlhf"), (config.sources / FILES["base"], "base")))  # fmt: skip
    if refined.gold is None or base.gold is None:
        raise ValueError("an ablation needs captions whose true quality is known: data.source=scenes")
    rows = [
        {k: row[k] for k in ("epoch", "step", "stopped") if k in row} | {k: row[f"val_{k}"] for k in CURVE if f"val_{k}" in row}
        for row in log.rows("rlhf")
    ]
    rewarded = Path("results/ablation") / grid.name / (job.needs[-1] if config.start_from else job.name)
    accuracy = json.loads((rewarded / "reward_report.json").read_text(encoding="utf-8"))["accuracy"]
    means = {name: float(values.mean()) for name, values in refined.gold.items()}
    return grid.facts(job) | {
        "captions_per_update": config.rlhf.fit.batch_size * config.rlhf.group,
        "seconds": seconds, "rows": rows, "reward_accuracy": accuracy, "test": means, "test_reward": refined.metrics["reward"]["value"],
        "win_rate": win_rate(refined, base), "base_utility": base.gold["utility"].round(4).tolist(),
        "utility": refined.gold["utility"].round(4).tolist(),
    }  # fmt: skip
