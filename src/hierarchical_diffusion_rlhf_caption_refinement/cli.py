"""The commands: parse, call, print. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 some images (or arms) failed, 130 interrupted."""

import argparse
import heapq
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .ablate import ablate, ablate_parser
from .utils.command import AGAIN, ANEW, at_least, find_config, guarded, refuse
from .utils.config import STAGES, Config, ConfigError, Stage, load_config, to_plain
from .utils.files import reserved, write_json
from .utils.runlog import RunLog

DISTRIBUTION = "hierarchical-diffusion-rlhf-caption-refinement"
CACHE = Path("cache")
SETTLED = ("data.tokenizer", "data.min_count", "data.max_words", "data.ratings", "data.comparisons")
"""Settings of the data that only training reads."""
FRESH = 4
"""New images that `train` captions at its end."""
DRAWN = 0.5
"""Temperature at which `predict --candidates` draws: RLHF's own."""
SHOWN = 20
"""Captions that `predict --refine` shows when its rows go to a file, and that an audit lists."""


def _train_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Train the captioner, evaluate it, and write a report.")
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file, or the name of a shipped one; later ones win")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all", help="one stage only (default: all in order)")
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run, same data and settings; complete stages are kept"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="single settings, e.g. rlhf.fit.lr=1e-4")
    return parser


def train(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    args = _train_parser(prog).parse_intermixed_args(argv)
    return guarded(lambda: _train(args), "what was saved is kept, the same command with --resume goes on from there")


def _train(args: argparse.Namespace) -> int:
    config = load_config([find_config(name) for name in args.config or []], args.overrides)
    if config.start_from and args.stage == "all":
        raise ConfigError("start_from: which stage is to build on it? --stage says; a whole run makes its own models")
    from accelerate import DistributedDataParallelKwargs

    from .training.pipeline import Pipeline
    from .training.run import Run, start_accelerator
    from .utils.seeding import set_threads

    threads = set_threads(config.threads or (kept_threads(config) if args.resume else 0))
    trackers: dict[str, Any] = {"log_with": config.track, "project_dir": str(config.results)} if config.track else {}
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # RLHF never withholds the image, so `no_image` gets no gradient
    accelerator = start_accelerator(config, kwargs_handlers=[unused], **trackers)
    with reserved(config.results / "lock") if accelerator.is_main_process else nullcontext():
        if config.track:
            accelerator.init_trackers(config.run)
        log = RunLog(config.results, main=accelerator.is_main_process, track=accelerator.log if config.track else None)
        pipeline = Pipeline(Run(config, accelerator, log, args.resume, CACHE))
        stages: Sequence[Stage] = config.stages if args.stage == "all" else [args.stage]
        pipeline.check(stages)
        if accelerator.is_main_process:
            told = {"threads": threads, "mixed_precision": accelerator.mixed_precision}
            write_json(config.results / "config.json", to_plain(config) | told)
        pipeline.train(stages)
        if accelerator.is_main_process:
            finish(config, log, pipeline.times())
            if pipeline.first:
                tell_first_round(pipeline.first.run.config, pipeline.first.run.log)
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
    if "reward" in seconds:
        facts["reward"] = json.loads(report.read_text())
    rows = log.rows()
    summary, found = summarise(config, rows, facts, CACHE)
    write_json(config.results / "training_summary.json", summary)
    shown = samples(config, list(reversed(found.values()))) if found else []
    page = write_report(config.results / "report", f"Run {config.run}", rows, summary, shown)
    console = Console()
    if found:
        console.print(quality_table({name: e.metrics for name, e in found.items()}, summary.get("gold", {}).get("data")))
        if win := summary.get("win_rate"):
            console.print(won("the refined model", "the base model", win))
        if "rlhf" in found:
            caption_fresh_images(config, console)
    console.print(f"summary  {config.results / 'training_summary.json'}\nreport   {page}", soft_wrap=True)


def tell_first_round(config: Config, log: RunLog) -> None:
    """The curves of a refinement within another's run; that one's page has the captions and what they are worth."""
    from .evaluation.report import write_report

    if rows := log.rows():
        print(f"first    {write_report(config.results / 'report', f'Run {config.run}', rows, {'config': to_plain(config)}, [])}")


def won(name: str, other: str, win: dict[str, float]) -> str:
    return f"{name} beats {other} on {win['value']:.0%} of the test images, ties half (95 %: {win['low']:.0%} to {win['high']:.0%})"


def quality_table(found: dict[str, dict[str, Any]], data: dict[str, float] | None) -> Table:
    """A column per captioner: the scenes' truth or the reference metrics."""
    first = next(iter(found.values()))
    kind = "gold" if "gold" in first else "references"
    rows = ({"training data's own": data} if data else {}) | {name: metrics[kind] for name, metrics in found.items()}
    table = Table(title="test images", title_justify="left")
    table.add_column("")
    for name in rows:
        table.add_column(name, justify="right", overflow="fold")
    for measure in first[kind]:
        values = [values[measure] for values in rows.values()]
        table.add_row(measure.replace("_", " "), *(f"{v:.3f}" if abs(v) < 5 else f"{v:.1f}" for v in values))
    return table


def caption_fresh_images(config: Config, console: Console) -> None:
    """Render scenes that no split holds, save them as files, and caption the files as a user would."""
    from .captioner import Captioner
    from .data.scenes import render, sample_scene
    from .models.saved import OtherEyesError
    from .utils.seeding import usable_device

    if config.data.source != "scenes":
        return
    folder = config.results / "fresh"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"scene_{i}.png" for i in range(FRESH)]
    for i, path in enumerate(paths):
        render(sample_scene(config.seed, "test", config.data.test + i)).save(path)
    try:
        captioner = Captioner.from_pretrained(config.models, device=usable_device())
    except OtherEyesError as error:  # a stage before the last one was trained anew
        console.print(f"no captions of new images: {error}", highlight=False, soft_wrap=True)
        return
    for path, caption in zip(paths, captioner(paths), strict=True):
        console.print(f"{path}: {caption.text}", highlight=False, soft_wrap=True)


def _evaluate_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Evaluate a trained captioner on its test images.")
    parser.add_argument("--checkpoint", required=True, type=Path, help="of a run: its base or its refined model")
    parser.add_argument("--model-type", choices=["base", "rlhf"], default="rlhf", help="what the checkpoint is (default: rlhf)")
    parser.add_argument("--compare", type=Path, metavar="CHECKPOINT", help="another captioner on the same images; its type is its file's")
    parser.add_argument("--output", type=Path, help="folder for evaluation.json and report.html (default: results/evaluation_TYPE)")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. sampler.steps=4")
    return parser


def evaluate(argv: Sequence[str] | None = None, prog: str = "evaluate.py") -> int:
    args = _evaluate_parser(prog).parse_intermixed_args(argv)
    return guarded(lambda: _evaluate(args), ANEW)


def refuse_settled(overrides: Sequence[str]) -> None:
    """Raises ConfigError for a setting that a trained model no longer reads."""
    for text in overrides:
        key = text.partition("=")[0]
        if key.split(".")[0] not in ("run", "seed", "data", "sampler", "shaping") or key in SETTLED:
            raise ConfigError(f"{text}: is for training; for an evaluation run, seed, data, sampler and shaping can be set")


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluation.java_metrics import java_scores
    from .evaluation.metrics import tokenize
    from .evaluation.report import write_report
    from .evaluation.summary import evaluate_checkpoint, samples, win_rate
    from .models.saved import captioner_kind, load_denoiser
    from .utils.config import with_overrides

    config = with_overrides(load_denoiser(args.checkpoint, args.model_type)[0].config, args.overrides)
    refuse_settled(args.overrides)
    main = evaluate_checkpoint(args.checkpoint, args.model_type, config, CACHE)
    names, roles = {str(args.checkpoint): main}, {args.model_type: main}
    summary: dict[str, Any] = {"run": config.run, "checkpoint": str(args.checkpoint), "type": args.model_type}
    if args.compare:
        kind = captioner_kind(args.compare)
        other = evaluate_checkpoint(args.compare, kind, config, CACHE)
        names[str(args.compare)] = other
        roles = {"checkpoint": main, "compare": other} if kind == args.model_type else {args.model_type: main, kind: other}
        summary |= {"compare": str(args.compare), "compare_type": kind, "win_rate": win_rate(main, other)}
    for found in (e for e in roles.values() if not e.gold):
        references = [[tokenize(r) for r in example.captions] for example in found.corpus.examples]
        found.metrics["references"] |= java_scores([tokenize(c) for c in found.captions], references)
    summary |= {
        "evaluation": {name: e.metrics for name, e in names.items()},
        "captions": {e.key: c for e, c in zip(main.corpus.examples, main.captions, strict=True)},
    }
    measured = "gold" if main.gold else "references"
    summary[measured] = {role: e.metrics[measured] for role, e in roles.items()}
    folder = args.output or config.results / f"evaluation_{args.model_type}"
    write_json(folder / "evaluation.json", summary)
    shown = samples(config, list(roles.values()))
    page = write_report(folder, f"{args.checkpoint}", [], summary, shown)
    console = Console()
    console.print(quality_table({name: e.metrics for name, e in names.items()}, None))
    if win := summary.get("win_rate"):
        console.print(won(str(args.checkpoint), str(args.compare), win))
    console.print(f"numbers  {folder / 'evaluation.json'}\nreport   {page}", soft_wrap=True)
    return 0


INPUTS = """
Images: files, folders (-r: with theirs), quoted globs, http(s) addresses, uncompressed .tar, lists of names (@FILE; - is standard input),
tables (.jsonl .csv .tsv .parquet; names relative to the table). What looks like key=value and is no file is a setting of the sampler,
everything else is an image: write ./a=b*.jpg for a glob that looks like a setting.

Repeating a command does what is missing, and redoes what changed: image, model or settings. A log beside the captions, *.log.jsonl, knows;
delete it, with its table, to start afresh: a table without a log is somebody else's, and is not overwritten.
Several processes: torchrun --nproc-per-node 4 scripts/predict.py ..., or --shard 1/4 to 4/4 anywhere.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but some images failed, 130 interrupted (torchrun turns any but 0 into 1).
"""


def _predict_parser(prog: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description="Caption images.", epilog=INPUTS, formatter_class=raw)
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="IMAGES|key=value",
        help="see below; settings are e.g. steps=4 max_words=8 candidates=8 temperature=0.8",
    )
    add("--checkpoint", required=True, type=Path, help="of a run, or an exported folder, or a hub id")
    add("--model-type", choices=["base", "rlhf"], help="default: the checkpoint's own")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image-url", help="path or http(s) URL of one image")
    source.add_argument("--image-list", type=Path, metavar="FILE", help="text file with a path or URL per line")
    add("-r", "--recursive", action="store_true", help="folders with all that is in them, behind links, too; hidden ones not")
    add("--image-column", default="", metavar="NAME", help="of tables; default: image, file_name, path, url, ...")
    add("--output", type=Path, help="file (.json .jsonl .csv .parquet metadata.jsonl), or with --format txt a folder; default: print")
    add("--format", choices=["txt", "json", "jsonl", "csv", "parquet", "metadata", "coco"], help="txt: a text file beside each image")
    policies = ["skip", "overwrite", "append", "prepend", "error"]
    add(
        "--existing",
        choices=policies,
        default="skip",
        help="text files that predict did not write (default: skip); append: as one more line",
    )
    add("--ext", default=".txt", help="suffix of text files (default: .txt)")
    add("--sidecar-name", choices=["stem", "full"], default="stem", help="a.txt or a.jpg.txt")
    add("--shard", metavar="I/N", help="only every N-th image, beginning with the I-th: 1/4, ..., 4/4")
    add("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    add("--batch-size", type=at_least(1), default=32, help="images captioned together: speed for memory")
    add("--steps", type=at_least(1), help="denoising steps")
    add("--threshold", type=float, help="reveal every token that is at least this confident at once")
    add(
        "--candidates",
        type=at_least(1),
        metavar="N",
        help=f"captions drawn per image, at temperature={DRAWN} unless set; the best by reward stays",
    )
    add("--min-words", type=at_least(1), default=1, help="whole sentences of at least so many words (min_words= counts tokens)")
    add("--max-words", type=at_least(1), default=0, help="whole sentences of at most so many words")
    add("--must-include", action="append", default=[], metavar="WORDS", help="a phrase that every caption contains; repeatable")
    add("--ban", action="append", default=[], metavar="WORDS", help="a word or phrase that no caption contains; repeatable")
    add("--template", default="", help="'a photo of [MASK] on [MASK]': each [MASK] becomes one or more words, as many as are likeliest")
    add("--prefix", default="", help="text before every caption, as it is")
    add("--suffix", default="", help="text after every caption, as it is")
    for quality in ("accuracy", "fluency", "specificity"):
        add(
            f"--{quality}",
            type=float,
            default=1.0,
            metavar="X",
            help=f"how much {quality} counts with --candidates and --refine; 1: as learned",
        )
    add("--refine", metavar="DRAFTS", help="repair captions: of a table of images and captions, or of a folder with a text file per image")
    add("--report-only", action="store_true", help="with --refine: list the most suspicious words and captions, change nothing")
    add("--weak", type=float, help="with --refine: suspicion (nats) from which a word may be replaced (default: the model's own)")
    add("--caption-column", default="", metavar="NAME", help="of --refine's table; default: caption, text, captions")
    return parser


def predict(argv: Sequence[str] | None = None, prog: str = "predict.py") -> int:
    parser = _predict_parser(prog)
    args = parser.parse_intermixed_args(argv)
    settings = [text for text in args.inputs if re.fullmatch(r"[\w.]+=.*", text, re.DOTALL) and not os.path.exists(text)]
    args.images = [text for text in args.inputs if text not in settings]
    if not (args.images or args.image_url or args.image_list or args.refine):
        parser.error("no images: name files, folders, ... or use --image-url or --image-list")
    if args.refine and (args.images or args.image_url or args.image_list):
        parser.error("--refine brings its own images")
    refuse_ignored(parser, args, settings)
    flags = {"steps": args.steps, "threshold": args.threshold, "candidates": args.candidates}
    if (args.candidates or 1) > 1 and not any(text.startswith("temperature=") for text in settings):
        flags |= {"temperature": DRAWN, "beams": 1, "lengths": 1, "clip": 0.0, "consensus": 0.0, "both_ways": False}
    args.settings = [f"sampler.{key}={value}" for key, value in flags.items() if value is not None] + [
        f"sampler.{text}" for text in settings
    ]
    return guarded(lambda: _predict(args), AGAIN if args.output or args.format else ANEW)


def refuse_ignored(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: Sequence[str]) -> None:
    """Wrong usage where something was asked for that would not be done."""
    from .inputs import TABLES

    if args.refine:
        writing = "steps threshold candidates min_words max_words must_include ban template prefix suffix"
        refuse(parser, args, writing, "is for new captions, --refine repairs those that are there")
        if settings:
            parser.error(f"{settings[0]} is for new captions, --refine repairs those that are there")
    else:
        refuse(parser, args, "report_only weak caption_column", "goes with --refine")
    if args.report_only:
        refuse(parser, args, "weak", "decides what is replaced; --report-only replaces nothing")
    if not any(Path(text).suffix.lower() in TABLES for text in (*args.images, args.refine or "")):
        refuse(parser, args, "image_column caption_column", f"is for tables: {' '.join(TABLES)}")
    if args.format != "txt":
        reads_text = bool(args.refine) and Path(args.refine).is_dir()
        refuse(parser, args, "existing sidecar_name" + ("" if reads_text else " ext"), "is for text files: --format txt")


def shard_of(text: str | None) -> tuple[int, int]:
    """(i, n) of `--shard`, else of torchrun's environment, counted from 1. Raises ConfigError."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if text is None:
        return int(os.environ.get("RANK", "0")) + 1, world
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]) or world > 1:
        raise ConfigError(f"--shard {text}: expected I/N with I from 1 to N" + ("; torchrun shards already" if world > 1 else ""))
    return int(found[1]), int(found[2])


def _predict(args: argparse.Namespace) -> int:
    from .inputs import find_drafts, find_items
    from .outputs import check_places, check_table, make_output

    shard = shard_of(args.shard)
    output = make_output(args.output, args.format, args.existing, args.ext, args.sidecar_name == "full", bool(args.refine))
    if args.refine:
        items = find_drafts(args.refine, args.recursive, args.image_column, args.caption_column, args.ext)
    else:
        items = find_items(args.images, args.image_url or "", args.image_list, args.recursive, args.image_column)
    if output:
        check_places(output, items)
    if output and output.format != "txt" and output.path:
        named = [text.removeprefix("@") for text in (*args.images, args.image_url, str(args.image_list or ""), args.refine) if text]
        check_table(output.path, [*named, *(item.file for item in items if item.file)])
    from .batch import Batch, Task

    work = read_work(args)
    if output is None:
        one = bool(args.image_url) or (len(items) == 1 and args.images)
        mine = items[shard[0] - 1 :: shard[1]]
        return print_captions(work.rows((Task(item, "") for item in mine), args.batch_size), bool(one), args.report_only)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    with closing(Batch(work, output, items, shard)) as batch:
        result = batch.run(args.batch_size, show=shard[0] == 1)
        if ranks > 1 and not result.stopped:
            meet(ranks)
            if shard[0] > 1:
                return 0
            result = batch.finish(result.before, items)
        if args.refine:
            show_review((row for _, row in batch.rows() if not row["error"]), args.report_only)
    return tell(result, output.path or "text files")


def read_work(args: argparse.Namespace) -> Any:
    """The model and the settings, checked. Raises ConfigError, CheckpointError."""
    from .batch import Review, Work
    from .captioner import Captioner, Wishes
    from .models.reward import EVEN, Dials
    from .utils.config import with_overrides
    from .utils.files import fingerprint
    from .utils.seeding import usable_device

    if not -(2**63) <= args.seed < 2**63:
        raise ConfigError(f"--seed {args.seed}: must fit into 64 bits")
    if not math.isfinite(args.weak or 0):
        raise ConfigError(f"--weak {args.weak}: must be a finite number")
    texts = tuple(args.must_include), tuple(args.ban), args.template
    wishes = Wishes(*texts, args.min_words, args.max_words, args.prefix, args.suffix)
    captioner = Captioner.from_pretrained(args.checkpoint, args.model_type, usable_device())
    plan = with_overrides(captioner.eyes.config, args.settings).sampler
    captioner.write([], plan, args.seed, wishes)  # says what it cannot do
    if (
        plan.beams * plan.lengths > 1
        and not (args.template or args.must_include)
        and any(text.startswith("sampler.steps=") for text in args.settings)
    ):
        raise ConfigError("a beam search takes a step for every word; beams=1 lengths=1 turns it off, and steps count")
    captioner.dials = Dials(args.accuracy, args.fluency, args.specificity)
    if captioner.dials != EVEN and plan.candidates == 1 and not args.refine:
        raise ConfigError("--accuracy, --fluency and --specificity count where captions are chosen: with --candidates or --refine")
    if captioner.reward is None and (captioner.dials != EVEN or (args.refine and not args.report_only)):
        raise ConfigError(f"{args.checkpoint}: no reward model beside it, by which captions could be chosen")
    files = captioner.parts.files
    settings = [plan, wishes, args.seed, *([captioner.dials] if captioner.dials != EVEN else [])]
    if not args.refine:
        return Work(captioner, plan, wishes, args.seed, fingerprint(files, *settings))
    run = fingerprint(files, *settings, args.weak, args.report_only)
    return Review(captioner, plan, wishes, args.seed, run, args.weak, args.report_only)


def meet(ranks: int) -> None:
    """Wait until all processes of torchrun are done: it ends the others when one ends with a code."""
    from datetime import timedelta

    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=30), world_size=ranks)
    distributed.barrier()
    distributed.destroy_process_group()


def tell(result: Any, where: object) -> int:
    """What came out, and the exit code."""
    more = [f"{result.before} done before"] if result.before else []
    more += [f"{result.kept} text files left as they were"] if result.kept else []
    print(f"{result.captions} captions in {where}" + (f" ({', '.join(more)})" if more else ""))
    return 130 if result.stopped else failed(result.errors, result.captions + result.kept)


def failed(errors: Sequence[str], good: int) -> int:
    for error in errors:
        print(f"failed: {error}", file=sys.stderr)
    return 0 if not errors else 3 if good else 1


def print_captions(batches: Iterator[Any], detail: bool, report_only: bool) -> int:
    errors, good, worst = [], 0, []
    for batch in batches:
        rows = [row for _, row in batch]
        if report_only:
            worst = most_suspicious([*worst, *(row for row in rows if not row["error"])])
        else:
            show_captions(rows, detail)
        errors += [row["error"] for row in rows if row["error"]]
        good += sum(not row["error"] for row in rows)
    if report_only:
        show_review(worst, report_only)
    return failed(errors, good)


def show_captions(rows: Sequence[dict[str, Any]], detail: bool) -> None:
    from .repair import diff

    console = Console()
    for row in (r for r in rows if not r["error"]):
        name = row["image"].encode("utf-8", "replace").decode()
        caption = diff(row["draft"], row["caption"]) if "draft" in row else row["caption"]
        console.print(f"{name}: {caption}", highlight=False, markup=False, soft_wrap=True)
        if detail:
            reward = "" if row["reward"] is None else f", reward {row['reward']:+.2f}"
            console.print(f"confidence {row['confidence']:.2f}{reward}", highlight=False)
            console.print("  ".join(f"{t['token']} {t['confidence']:.2f}" for t in row["tokens"]), style="dim", highlight=False)


def most_suspicious(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return heapq.nlargest(SHOWN, rows, key=lambda row: row["suspicion"])


def show_review(rows: Iterable[dict[str, Any]], report_only: bool) -> None:
    """The first repairs, or the captions with the most suspicious words and what the model would rather say."""
    if not report_only:
        repaired = [row for row in rows if row["caption"] != row["draft"]]
        show_captions(repaired[:SHOWN], False)
        print(f"{len(repaired)} captions repaired" + (f", {SHOWN} of them above" if len(repaired) > SHOWN else ""))
        return
    table = Table(title="most suspicious captions", title_justify="left")
    for name in ("suspicion", "word", "rather", "caption", "image"):
        table.add_column(name, justify="right" if name == "suspicion" else "left", overflow="fold")
    for row in most_suspicious(rows):
        word = max(row["words"], key=lambda word: word["suspicion"])
        texts = (word["word"], word["instead"], row["draft"], row["image"])
        table.add_row(f"{row['suspicion']:.1f}", *(escape(text.encode("utf-8", "replace").decode()) for text in texts))
    Console().print(table)


def _export_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Write a captioner, or comparisons, as Hugging Face's libraries read them.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="base or refined, with the reward model beside it and a model card")
    what.add_argument("--preferences", type=Path, metavar="FILE", help="recorded comparisons, as an imagefolder for TRL's DPOTrainer")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="of the comparisons (default: their file's)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where the files go")
    return parser


def export(argv: Sequence[str] | None = None, prog: str = "caprefine export") -> int:
    parser = _export_parser(prog)
    args = parser.parse_args(argv)
    if not args.preferences:
        refuse(parser, args, "images", "goes with --preferences; a captioner brings what it needs")
    return guarded(lambda: _export(args), f"{args.output} may be incomplete, {ANEW}")


def _export(args: argparse.Namespace) -> int:
    if args.preferences:
        from .adapters.trl import export_preferences

        pairs = export_preferences(args.preferences, args.images or args.preferences.parent, args.output)
        print(f"{pairs} pairs in {args.output}")
        return 0
    from .captioner import Captioner

    Captioner.from_pretrained(args.checkpoint).save_pretrained(args.output)
    print("\n".join(str(path) for path in sorted(args.output.rglob("*")) if path.is_file()))
    return 0


PARSERS = {
    "train": _train_parser, "evaluate": _evaluate_parser, "predict": _predict_parser, "export": _export_parser, "ablate": ablate_parser,
}  # fmt: skip
COMMANDS = {"train": train, "evaluate": evaluate, "predict": predict, "export": export, "ablate": ablate}


def main(argv: Sequence[str] | None = None) -> int:
    """`caprefine COMMAND ...`: the installed command."""
    commands = "\n".join(f"  {name:10}{parser(name).description}" for name, parser in PARSERS.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="caprefine", epilog=f"commands:\n{commands}", formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"caprefine {version(DISTRIBUTION)}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below; COMMAND --help tells more")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    args = parser.parse_args(argv)
    return COMMANDS[args.command](args.arguments, f"caprefine {args.command}")
