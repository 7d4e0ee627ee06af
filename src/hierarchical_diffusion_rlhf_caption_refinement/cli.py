"""The commands: parse, call, print. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some images failed, 130 interrupted."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from .utils.config import STAGES, Config, ConfigError, SamplerConfig, Stage, load_config, to_plain
from .utils.interrupt import Interrupted
from .utils.runlog import RunLog, write_json

CACHE = Path("cache")
FRESH = 4
"""New images that `train` captions at its end."""


def guarded(command: Callable[[], int]) -> int:
    """Turn what can go wrong into one line on stderr and an exit code."""
    try:
        return command()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"{stopped}\ncontinue with the same command and --resume", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted; what was saved is kept, --resume continues from there", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("CAPREFINE_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _read_config(args: argparse.Namespace) -> Config:
    return load_config(args.config or [], args.overrides)


def train(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description="Train the captioner, evaluate it, and write a report.")
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file; several are laid over each other")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all", help="one stage only (default: all in order)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run; complete stages are kept")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="single settings, e.g. rlhf.fit.lr=1e-4")
    return guarded(lambda: _train(parser.parse_intermixed_args(argv)))


def _train(args: argparse.Namespace) -> int:
    config = _read_config(args)
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    from .training.pipeline import Pipeline
    from .training.run import Run
    from .utils.seeding import set_threads

    threads = set_threads(config.threads or (kept_threads(config) if args.resume else 0))
    trackers: dict[str, Any] = {"log_with": config.track, "project_dir": str(config.results)} if config.track else {}
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # RLHF never withholds the image, so `no_image` gets no gradient
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision, kwargs_handlers=[unused], **trackers
    )
    if config.track:
        accelerator.init_trackers(config.run)
    log = RunLog(config.results, main=accelerator.is_main_process, track=accelerator.log if config.track else None)
    if accelerator.is_main_process:
        write_json(config.results / "config.json", to_plain(config) | {"threads": threads})
    pipeline = Pipeline(Run(config, accelerator, log, args.resume, CACHE))
    pipeline.train(STAGES if args.stage == "all" else [cast(Stage, args.stage)])
    if accelerator.is_main_process:
        finish(config, log, pipeline.times())
    accelerator.end_training()
    return 0


def kept_threads(config: Config) -> int:
    """What the run began with: sums over other threads are other bits."""
    path = config.results / "config.json"
    return json.loads(path.read_text())["threads"] if path.exists() else 0


def finish(config: Config, log: RunLog, seconds: dict[str, float]) -> None:
    """Evaluate what there is, write summary and report, and show the essence."""
    from .evaluation.report import write_report
    from .evaluation.summary import samples, summarise

    report = config.results / "reward_report.json"
    facts: dict[str, Any] = {"seconds": seconds, "config": to_plain(config)}
    if report.exists():
        facts["reward"] = json.loads(report.read_text())
    rows = log.rows()
    summary, found = summarise(config, rows, facts, CACHE)
    write_json(config.results / "training_summary.json", summary)
    shown = samples(config, found) if found else []
    page = write_report(config.results / "report", f"Run {config.run}", rows, summary, shown)
    console = Console()
    if found:
        console.print(quality_table({name: e.metrics for name, e in found.items()}, summary.get("gold", {}).get("data")))
        if win := summary.get("win_rate"):
            console.print(won("the refined model", "the base model", win))
        caption_fresh_images(config, console)
    console.print(f"summary  {config.results / 'training_summary.json'}\nreport   {page}", soft_wrap=True)


def won(name: str, other: str, win: dict[str, float]) -> str:
    return f"{name} beats {other} on {win['value']:.0%} of the test images, ties half (95 %: {win['low']:.0%} to {win['high']:.0%})"


def quality_table(found: dict[str, dict[str, Any]], data: dict[str, float] | None) -> Table:
    """A row per captioner: the scenes' truth or the reference metrics."""
    first = next(iter(found.values()))
    kind = "gold" if "gold" in first else "references"
    columns = list(first[kind])
    table = Table(title="test images", title_justify="left")
    table.add_column("captions", overflow="fold")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    rows = ({"training data's own": data} if data else {}) | {name: metrics[kind] for name, metrics in found.items()}
    for name, values in rows.items():
        table.add_row(name, *(f"{values[c]:.3f}" if abs(values[c]) < 5 else f"{values[c]:.1f}" for c in columns))
    return table


def caption_fresh_images(config: Config, console: Console) -> None:
    """Render scenes that no split holds, save them as files, and caption the files as a user would."""
    from .captioner import Captioner
    from .data.scenes import render, sample_scene
    from .models.saved import FILES

    if config.data.source != "scenes" or not (config.models / FILES["rlhf"]).exists():
        return
    folder = config.results / "fresh"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scene_{i}.png" for i in range(FRESH)]
    for i, path in enumerate(paths):
        render(sample_scene(config.seed, "test", config.data.test + i)).save(path)
    for path, caption in zip(paths, Captioner.from_pretrained(config.models)(paths), strict=True):
        console.print(f"{path}: {caption.text}", highlight=False, soft_wrap=True)


def evaluate(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Evaluate a trained captioner on its test images.")
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--model-type", choices=["base", "rlhf"], default="rlhf")
    parser.add_argument("--compare", type=Path, metavar="CHECKPOINT", help="another captioner on the same images; its type is its file's")
    parser.add_argument("--output", type=Path, help="folder for evaluation.json and report.html (default: results/evaluation_TYPE)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. sampler.steps=4")
    return guarded(lambda: _evaluate(parser.parse_intermixed_args(argv)))


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluation.report import write_report
    from .evaluation.summary import evaluate_checkpoint, samples, win_rate
    from .models.saved import captioner_kind, load_denoiser
    from .utils.config import with_overrides

    config = with_overrides(load_denoiser(args.checkpoint, args.model_type)[0].config, args.overrides)
    main = evaluate_checkpoint(args.checkpoint, args.model_type, config, CACHE)
    names = {str(args.checkpoint): main}
    summary: dict[str, Any] = {"run": config.run, "checkpoint": str(args.checkpoint), "type": args.model_type}
    if args.compare:
        other = evaluate_checkpoint(args.compare, captioner_kind(args.compare), config, CACHE)
        names[str(args.compare)] = other
        summary["win_rate"] = win_rate(main, other)
    summary |= {
        "evaluation": {name: e.metrics for name, e in names.items()},
        "captions": {e.key: c for e, c in zip(main.corpus.examples, main.captions, strict=True)},
    }
    kind = "gold" if main.gold else "references"
    summary[kind] = {("rlhf", "base")[i]: e.metrics[kind] for i, e in enumerate(names.values())}
    folder = args.output or config.results / f"evaluation_{args.model_type}"
    write_json(folder / "evaluation.json", summary)
    found = {("rlhf", "base")[i]: e for i, e in enumerate(names.values())}
    page = write_report(folder, f"{args.checkpoint}", [], summary, samples(config, found))
    console = Console()
    console.print(quality_table({name: e.metrics for name, e in names.items()}, None))
    if win := summary.get("win_rate"):
        console.print(won(str(args.checkpoint), str(args.compare), win))
    console.print(f"numbers  {folder / 'evaluation.json'}\nreport   {page}", soft_wrap=True)
    return 0


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def predict(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="predict.py", description="Caption images.")
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--model-type", choices=["base", "rlhf"], help="default: the checkpoint's own")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image-url", help="path or http(s) URL of one image")
    source.add_argument("--image-list", type=Path, metavar="FILE", help="text file with a path or URL per line")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: print")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="sampler settings, e.g. steps=4 max_words=8 candidates=8 temperature=0.8"
    )
    return guarded(lambda: _predict(parser.parse_intermixed_args(argv)))


def _predict(args: argparse.Namespace) -> int:
    from .captioner import Captioner
    from .models.saved import captioner_kind
    from .utils.config import with_overrides

    names = [args.image_url] if args.image_url else read_list(args.image_list)
    captioner = Captioner.from_pretrained(args.checkpoint, args.model_type or captioner_kind(args.checkpoint))
    plan = with_overrides(captioner.eyes.config, [f"sampler.{o}" for o in args.overrides]).sampler
    rows: list[dict[str, Any]] = []
    for start in range(0, len(names), args.batch_size):
        rows += caption_batch(captioner, names[start : start + args.batch_size], plan, args.seed)
    failed = [row for row in rows if row["error"]]
    if args.output:
        write_json(args.output, rows)
        print(f"{len(rows) - len(failed)} captions in {args.output}")
    else:
        show_captions(rows, detail=bool(args.image_url))
    for row in failed:
        print(f"failed: {row['error']}", file=sys.stderr)
    return 0 if not failed else 1 if len(failed) == len(rows) else 3


def read_list(path: Path) -> list[str]:
    """Lines of a list file that name an image. Raises ConfigError if there is none."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip() and not line.startswith("#")]
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not names:
        raise ConfigError(f"{path}: names no image")
    return names


def caption_batch(captioner: Any, names: Sequence[str], plan: SamplerConfig, seed: int) -> list[dict[str, Any]]:
    """A row per name: the caption with its tokens and reward, or the error."""
    from .data.images import ImageError, fetch_image, load_image

    pictures, errors = {}, {}
    for name in names:
        try:
            pictures[name] = fetch_image(name) if name.startswith(("http://", "https://")) else load_image(name)
        except ImageError as error:
            errors[name] = str(error)
    captions = dict(zip(pictures, captioner.caption(list(pictures.values()), plan, seed) if pictures else [], strict=True))
    empty = {"caption": None, "confidence": None, "reward": None, "tokens": [], "seed": seed}

    def row(name: str) -> dict[str, Any]:
        if name in errors:
            return {"image": name, **empty, "error": errors[name]}
        found = asdict(captions[name])
        return {"image": name, "caption": found.pop("text"), **found, "error": None}

    return [row(name) for name in names]


def show_captions(rows: Sequence[dict[str, Any]], detail: bool) -> None:
    console = Console()
    for row in (r for r in rows if not r["error"]):
        console.print(f"{row['image']}: {row['caption']}", highlight=False, soft_wrap=True)
        if detail:
            reward = "" if row["reward"] is None else f", reward {row['reward']:+.2f}"
            console.print(f"confidence {row['confidence']:.2f}{reward}", highlight=False)
            console.print("  ".join(f"{t['token']} {t['confidence']:.2f}" for t in row["tokens"]), style="dim", highlight=False)
