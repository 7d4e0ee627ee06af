"""What a run tells: one row of metrics per epoch in a file, and a progress bar or plain lines for whoever watches."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from .files import parse_row, whole

Row = dict[str, Any]
SHOWN = ("loss", "reward", "kl")
"""Metrics beside the bar, the most important first; a narrow terminal shows as many as fit."""


class RunLog:
    """`metrics.jsonl` of a run's folder: a row per epoch, `{"stage", "step", "epoch", ...}`; numbers that are not finite become null."""

    def __init__(self, folder: Path, *, main: bool = True, track: Callable[..., None] | None = None) -> None:
        """Args: main: whether this process writes and shows anything; track: also gets the numbers, `accelerator.log` for example."""
        self.path = folder / "metrics.jsonl"
        self.main = main
        self.track = track

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
            self.track({f"{stage}/{k}": v for k, v in row.items() if isinstance(v, int | float)}, step=row["step"])

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
        with Progress(name, total, resume_step, console=console, main=self.main) as progress:
            yield StageLog(self, name, progress)


@dataclass(frozen=True)
class StageLog:
    run: RunLog
    name: str
    progress: "Progress"

    def __call__(self, row: Row) -> None:
        """One epoch is over."""
        self.run.write(self.name, row)
        self.progress.epoch(row)

    def update(self, row: Row) -> None:
        """One update is over."""
        self.progress.update(row)


class Progress:
    """A bar with metrics and the time left on a terminal; elsewhere one line per epoch. Silent unless `main`."""

    def __init__(
        self, stage: str, total: int, done: int = 0, *, shown: Sequence[str] = SHOWN, console: Console | None = None, main: bool = True
    ) -> None:
        self.stage, self.shown = stage, shown
        self.console = console or Console(quiet=not main)
        wide = self.console.width >= 90
        middle: list[ProgressColumn] = [BarColumn(None), MofNCompleteColumn()] if wide else [TaskProgressColumn()]
        ending = TextColumn("{task.fields[metrics]}"), TextColumn("ETA"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), *middle, *ending
        self.room = self.console.width - len(stage) - (44 if wide else 21)
        self.bar = Bar(*columns, console=self.console, expand=wide, disable=not (main and self.console.is_terminal))
        self.task = self.bar.add_task(stage, total=total, completed=done, metrics="")

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def update(self, row: Row) -> None:
        """Move the bar to `row["step"]` and show the row's metrics."""
        self.bar.update(self.task, completed=row["step"], metrics=_brief(row, self.shown, self.room))

    def epoch(self, row: Row) -> None:
        """Print a line that stays: the shown metrics and every held-out one."""
        numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and (k in self.shown or k.startswith("val_"))]
        text = "  ".join([f"{self.stage} epoch {row['epoch']}", *numbers, *([row["stopped"]] if row.get("stopped") else [])])
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


def _brief(row: Row, shown: Sequence[str], room: int) -> str:
    """As many of the `shown` metrics as fit into `room` characters."""
    text = ""
    for part in (f"{name} {row[name]:.3g}" for name in shown if name in row):
        if len(text) + len(part) + 1 > room:
            break
        text += f"{' ' if text else ''}{part}"
    return text


def _line(row: Row) -> str:
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}) + "\n"
