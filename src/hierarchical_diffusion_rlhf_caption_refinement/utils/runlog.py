"""What a run tells: one row of metrics per epoch in a file, and a progress bar or plain lines for whoever watches."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

from .files import parse_row, whole

Row = dict[str, Any]
SHOWN = ("loss", "reward", "kl")
"""Metrics beside the bar, the most important first; a narrow terminal shows as many as fit."""


class RunLog:
    """`metrics.jsonl` of a run's folder: a row per epoch, `{"stage", "step", "epoch", ...}`; numbers that are not finite become null."""

    def __init__(self, folder: Path, *, main: bool = True, track: Callable[..., None] | None = None, within: str = "") -> None:
        """Args: main: whether this process writes and shows anything; track: also gets the numbers, `accelerator.log` for example;
        within: what stages are called by before their own name, where they are shown and tracked."""
        self.path = folder / "metrics.jsonl"
        self.main = main
        self.track = track
        self.within = within

    def part(self, name: str, folder: Path) -> "RunLog":
        """The log of a part of the run, in a folder of its own."""
        return RunLog(folder, main=self.main, track=self.track, within=f"{self.within}{name}/")

    def rows(self, stage: str | None = None) -> list[Row]:
        """The rows written so far, oldest first; a line torn by a kill is left out."""
        if not self.path.exists():
            return []
        parsed = (parse_row(line, "stage", "step") for line in self.path.read_text(encoding="utf-8").splitlines())
        return [row for row in parsed if row is not None and stage in (None, row["stage"])]

    def write(self, stage: str, row: Row) -> None:
        if self.main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"stage": stage, **row}))
        if self.track:
            self.track({f"{self.within}{stage}/{k}": v for k, v in row.items() if isinstance(v, int | float)}, step=row["step"])

    def rewind(self, stage: str, step: int) -> None:
        """Drop what `stage` wrote after `step`, so that a resumed stage leaves the same rows as an uninterrupted one."""
        if self.main and self.path.exists():
            kept = [r for r in self.rows() if r["stage"] != stage or r["step"] <= step]
            with whole(self.path) as partial:
                partial.write_text("".join(map(_line, kept)), encoding="utf-8")

    @contextmanager
    def stage(self, name: str, total: int, resume_step: int = 0, console: Console | None = None) -> Iterator["StageLog"]:
        """Log and progress of one stage of `total` updates, of which `resume_step` are already done."""
        self.rewind(name, resume_step)
        log = StageLog(self, name, total, resume_step, console)
        with log.bar:
            yield log


class StageLog:
    """Rows of one stage; shown as a bar with metrics and the time left on a terminal, elsewhere as one line per epoch."""

    def __init__(self, run: RunLog, stage: str, total: int, done: int = 0, console: Console | None = None) -> None:
        self.run, self.stage, self.title = run, stage, run.within + stage
        self.console = console or Console(quiet=not run.main)
        wide = self.console.width >= 90
        middle: list[ProgressColumn] = [BarColumn(None), MofNCompleteColumn()] if wide else [TaskProgressColumn()]
        ending = TextColumn("{task.fields[metrics]}"), TextColumn("ETA"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), *middle, *ending
        self.room = self.console.width - len(self.title) - (44 if wide else 21)
        self.bar = Progress(*columns, console=self.console, expand=wide, disable=not (run.main and self.console.is_terminal))
        self.task = self.bar.add_task(self.title, total=total, completed=done, metrics="")

    def update(self, row: Row) -> None:
        """One update is over: the bar moves to `row["step"]` and shows the row's metrics."""
        self.bar.update(self.task, completed=row["step"], metrics=_brief(row, self.room))

    def __call__(self, row: Row) -> None:
        """One epoch is over: its row is kept, and a line stays with the metrics of the bar and every held-out one."""
        self.run.write(self.stage, row)
        numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and (k in SHOWN or k.startswith("val_"))]
        text = "  ".join([f"{self.title} epoch {row['epoch']}", *numbers, *([row["stopped"]] if row.get("stopped") else [])])
        self.console.print(text, soft_wrap=not self.console.is_terminal, markup=False, highlight=False)


def counter(what: str) -> Callable[[int, int], None]:
    """(done, total) -> shown on stderr: one line that counts on a terminal, elsewhere a line for every tenth; nothing below 500."""
    console, tenths = Console(stderr=True), -1

    def show(done: int, total: int) -> None:
        nonlocal tenths
        before, tenths = tenths, 10 * done // max(total, 1)
        if total >= 500 and (console.is_terminal or tenths > before):
            console.print(f"{what} {done} of {total}", end="\r" if console.is_terminal and done < total else "\n", highlight=False)

    return show


def _brief(row: Row, room: int) -> str:
    """As many of the metrics SHOWN as fit into `room` characters."""
    text = ""
    for part in (f"{name} {row[name]:.3g}" for name in SHOWN if name in row):
        if len(text) + len(part) + 1 > room:
            break
        text += f"{' ' if text else ''}{part}"
    return text


def _line(row: Row) -> str:
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}) + "\n"
