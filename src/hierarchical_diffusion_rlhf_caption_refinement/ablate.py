"""The command that runs a grid: one process per job, as many at a time as asked for; what is done stays done."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .utils.command import AGAIN, ANEW, at_least, find_config, guarded, refuse
from .utils.config import ConfigError
from .utils.files import write_json
from .utils.grid import Grid, Job, read_grid

CODES = """
Exit codes: 0 done, 1 failed (all arms that were to do), 2 wrong usage, 3 done but some arms failed, 130 interrupted.
"""


def ablate_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Train the arms of a grid, and compare them.", epilog=CODES)
    parser.add_argument("grid", type=Path, help="YAML file, for example configs/ablations/arms.yaml")
    parser.add_argument("--jobs", type=at_least(0), default=2, help="processes of one thread each (default: 2); 0: in this process")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="instead of the grid's")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="regime/arm/seed, e.g. 'few/*/0'; what they need is done, too")
    parser.add_argument("--base-from", default="", metavar="FOLDER", help="where it exists: alignment and base models; {seed} is the seed")
    parser.add_argument("--output", type=Path, help="records, tables, pictures (default: docs/results/ablation_GRID)")
    parser.add_argument("--report-only", action="store_true", help="make tables and pictures of the records that there are")
    return parser


def ablate(argv: Sequence[str] | None = None, prog: str = "ablate.py") -> int:
    parser = ablate_parser(prog)
    args = parser.parse_args(argv)
    if args.report_only:
        refuse(parser, args, "only base_from jobs", "is for training; --report-only reads all records that there are")
    return guarded(lambda: _ablate(args), ANEW if args.report_only else AGAIN)


def _ablate(args: argparse.Namespace) -> int:
    grid = read_grid(find_config(str(args.grid)), args.seeds)
    output, code = args.output or Path("docs/results") / f"ablation_{grid.name}", 0
    if not args.report_only:
        chosen = to_do(grid.jobs(), args.only, output)
        if args.jobs:
            grid.check()
            command = [sys.executable, "-m", __name__, str(args.grid), "--jobs", "0", "--output", str(output)]
            command += ["--seeds", *map(str, grid.seeds), *(["--base-from", args.base_from] if args.base_from else [])]
            code = exit_code(chosen, run_all(grid, chosen, command, args.jobs, output))
        else:
            from .training.ablation import run_job

            for job in chosen:
                run_job(grid, job, output, args.base_from)
            return 0
    from .evaluation.ablation import read_records, write_page

    if args.report_only and not read_records(output):
        raise ConfigError(f"--output {output}: no record of an arm, nothing to report")
    print(f"tables   {write_page(grid, output, args.grid)}")
    return code


def exit_code(jobs: Sequence[Job], failed: set[str]) -> int:
    """As of `predict`: 1 if all arms (or, where none was asked for, any job) failed, 3 if some did."""
    arms = {job.name for job in jobs if job.arm}
    return 0 if not failed else 1 if arms <= failed else 3


def done(job: Job, output: Path) -> bool:
    """Whether an arm has its record, or a shared job the times of its stages, with what is configured now."""
    path = job.record(output) if job.arm else job.results / "stages.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not job.arm:
        return set(job.stages) <= found.keys() and not job.outdated()
    return bool(found) and "error" not in found and found.get("config", {}).items() <= job.settings().items()


def to_do(jobs: Sequence[Job], pattern: str, output: Path) -> list[Job]:
    """Jobs that match and are not done, and those that they need, in order."""
    by_name = {job.name: job for job in jobs}
    wanted = [job.name for job in jobs if fnmatchcase(job.name, pattern) and not done(job, output)]
    if not wanted and not any(fnmatchcase(name, pattern) for name in by_name):
        raise ConfigError(f"--only {pattern}: none of the {len(jobs)} jobs, {jobs[-1].name} for example")
    for name in wanted:  # grows while it is read
        wanted += [need for need in by_name[name].needs if need not in wanted and not done(by_name[need], output)]
    return [job for job in jobs if job.name in wanted]


def run_all(grid: Grid, jobs: Sequence[Job], command: list[str], processes: int, output: Path) -> set[str]:
    """Each job in a process of its own, as soon as what it needs is done; one that fails is recorded, and the others go on.

    Returns the names of those that failed.
    """
    waiting, live, failed = list(jobs), list[tuple[Job, subprocess.Popen[bytes], float]](), set[str]()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the processes are told, too
    try:
        while waiting or live:
            unfinished = {job.name for job in (*waiting, *(job for job, _, _ in live))}
            ready = next((job for job in waiting if not unfinished & set(job.needs)), None)
            if ready and len(live) < processes:
                waiting.remove(ready)
                if missing := failed & set(ready.needs):
                    failed |= note_failure(grid, ready, f"{missing.pop()} failed", output)
                else:
                    live.append((ready, start(ready, command), time.monotonic()))
                continue
            time.sleep(0.2)
            for ended in [one for one in live if one[1].poll() is not None]:
                live.remove(ended)
                job, process, began = ended
                print(f"{len(jobs) - len(waiting) - len(live)} of {len(jobs)}  {job.name}  {time.monotonic() - began:.0f} s", flush=True)
                if process.returncode:
                    failed |= note_failure(grid, job, last_words(job, process.returncode), output)
    finally:
        for _, process, _ in live:
            process.terminate()
        for _, process, _ in live:
            process.wait()
    return failed


def log_of(job: Job) -> Path:
    return job.results / "log.txt"


def start(job: Job, command: list[str]) -> "subprocess.Popen[bytes]":
    log_of(job).parent.mkdir(parents=True, exist_ok=True)
    with log_of(job).open("ab") as log:
        return subprocess.Popen(
            [*command, "--only", job.name], stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def last_words(job: Job, code: int) -> str:
    lines = log_of(job).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"


def note_failure(grid: Grid, job: Job, reason: str, output: Path) -> set[str]:
    """The job's name, after it was printed and, of an arm, recorded: the next call tries it again."""
    print(f"failed: {job.name}: {reason}", flush=True)
    if job.arm:
        write_json(job.record(output), grid.facts(job) | {"error": reason})
    return {job.name}


if __name__ == "__main__":
    raise SystemExit(ablate())
