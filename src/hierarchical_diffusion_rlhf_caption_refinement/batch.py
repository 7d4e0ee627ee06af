"""A batch of images to caption that can be killed at any moment and started again: what is done is in its log, and is not done twice."""

import fcntl
import json
import os
import re
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .captioner import Caption, Captioner, Seen, Wishes
from .data.images import ImageError
from .inputs import Item, missed
from .outputs import DRAFT_FIELDS, FIELDS, LISTS, LOG_NAME, Output, Row, beside, joined, logs_of, read_text, write_table, write_text
from .repair import Repair
from .utils.config import ConfigError, SamplerConfig
from .utils.files import alone, parse_row
from .utils.interrupt import deferred_interrupts

AHEAD = 4
"""Images that are read while others are captioned; no more pictures than these are in memory."""


@dataclass(frozen=True)
class Task:
    """An image to caption, and what its text file keeps beside the caption."""

    item: Item
    identity: str
    before: str = ""


@dataclass(frozen=True)
class Work:
    """How to caption: everything that a caption depends on besides its image."""

    captioner: Captioner
    plan: SamplerConfig
    wishes: Wishes
    seed: int
    run: str
    """Fingerprint of the model's files and the settings."""
    fields: ClassVar = FIELDS

    def rows(self, tasks: Iterable[Task], batch_size: int) -> Iterator[list[tuple[Task, Row]]]:
        """A row per task, in batches; each is a caption with its tokens and reward, or an error."""
        looked = ((task, self.look(task.item, picture)) for task, picture in ahead(tasks))
        while some := list(islice(looked, batch_size)):
            yield self.write(some)

    def look(self, item: Item, picture: "Future[Image]") -> Seen | str:
        """What the model sees, or why it sees nothing."""
        try:
            return self.captioner.look(picture.result())
        except ImageError as error:
            return str(error)
        except Exception as error:  # one image must not end the batch
            return f"{item.name}: cannot be captioned: {' '.join(str(error).split()) or type(error).__name__}"

    def write(self, some: Sequence[tuple[Task, Seen | str]]) -> list[tuple[Task, Row]]:
        captions = iter(self.captioner.write([s for _, s in some if isinstance(s, Seen)], self.plan, self.seed, self.wishes))
        return [(task, self.row(task.item, next(captions) if isinstance(seen, Seen) else seen)) for task, seen in some]

    def row(self, item: Item, found: Caption | Repair | Exception | str) -> Row:
        empty = {field: [] if field in LISTS else None for field in self.fields} | {"image": item.name, "seed": self.seed}
        if isinstance(found, str | Exception):
            return empty | {"error": found if isinstance(found, str) else f"{item.name}: {found}"}
        told = asdict(found)
        return empty | {"caption": told.pop("text"), **told}


@dataclass(frozen=True)
class Review(Work):
    """How to judge drafts, and to repair them."""

    weak: float | None
    report_only: bool
    fields: ClassVar = DRAFT_FIELDS

    def write(self, some: Sequence[tuple[Task, Seen | str]]) -> list[tuple[Task, Row]]:
        return [(task, self.row(task.item, self.review(task.item.draft, seen))) for task, seen in some]

    def review(self, draft: str, seen: Seen | str) -> Repair | Exception | str:
        if isinstance(seen, str):
            return seen
        try:
            if self.report_only:
                return self.captioner.editor.audit(draft, seen.tokens, seen.joint)
            return self.captioner.editor.repair(draft, seen.tokens, seen.joint, seen.key, self.seed, self.weak)
        except ValueError as error:
            return error


def ahead(tasks: Iterable[Task]) -> Iterator[tuple[Task, "Future[Image]"]]:
    """Tasks in order, with their pictures, of which a few are read in advance."""
    waiting: deque[tuple[Task, Future[Image]]] = deque()
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(AHEAD) as pool:  # the loader's own filters are not safe in threads
        for task in tasks:
            waiting.append((task, pool.submit(task.item.load)))
            if len(waiting) == AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()


class Log:
    """JSON lines of all that was captioned, synced after every batch; a torn last line is ignored. Shards write their own, and read all.

    Text files have theirs in the folder that holds all of a run, and another run may reach further or less far: of them, all logs are read
    that lie beside one or above it. Rows are about a text file then, whose place they tell relative to their log, or about a name.
    """

    def __init__(self, output: Output, items: Sequence[Item], shard: tuple[int, int]) -> None:
        self.path = path = output.log(items, shard)
        self.keys, self.texts = output.keys(items), output.format == "txt"
        self.old = {os.path.abspath(name): key for name, key in self.keys.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when this process dies
        except OSError:
            self.file.close()
            raise ConfigError(f"{path}: another run is writing it") from None
        self.file.seek(0)
        self.file.truncate(sum(len(line) for line in self.file if line.endswith(b"\n")))
        self.read()

    def read(self) -> None:
        """Find out where every row is."""
        self.files = self._files()
        self.known: dict[tuple[str, str, str], tuple[bool, float, int, int]] = {}
        self.captions: dict[str, list[tuple[float, int, int]]] = {}
        wanted = set(self.keys.values())
        for i, path in enumerate(self.files):
            folder = os.path.realpath(path.parent)
            with path.open("rb") as file:
                offset = 0
                for line in file:
                    row = parse_row(line, "image", "identity", "run", "time", "error")
                    if row and (key := self._key(row, folder)) in wanted:
                        self._note(key, row, i, offset)
                    offset += len(line)

    def _files(self) -> list[Path]:
        if not self.texts:
            return logs_of(self.path.with_name(re.sub(LOG_NAME, "", self.path.name)))
        beside, found = {self.path.parent.resolve(), *(Path(text).parent for text in self.keys.values())}, list[Path]()
        for folder in sorted(beside.union(*(below.parents for below in beside))):
            with suppress(OSError):  # one that may not be looked into, or is none
                found += [log for log in logs_of(folder / "captions") if os.access(log, os.R_OK)]
        return found

    def _key(self, row: Row, folder: str) -> str | None:
        if not self.texts:
            return row["image"]
        if "text_file" in row:
            return os.path.normpath(os.path.join(folder, row["text_file"]))
        return self.old.get(os.path.abspath(row["image"]))  # from before rows told it

    def _note(self, key: str, row: Row, file: int, offset: int) -> None:
        state, place = (key, row["identity"], row["run"]), (row["time"], file, offset)
        self.known[state] = max(self.known.get(state, (False, 0.0, 0, 0)), (not row["error"], *place))
        if not row["error"]:
            self.captions.setdefault(key, []).append(place)

    def _row(self, file: int, offset: int) -> Row:
        with self.files[file].open("rb") as lines:
            lines.seek(offset)
            return json.loads(lines.readline())

    def find(self, item: Item, identity: str, run: str) -> Row | None:
        """What came of an image as it is, by this model and these settings; a caption comes before a failure."""
        found = self.known.get((self.keys[item.name], identity, run))
        return self._row(*found[2:]) if found else None

    def captions_of(self, item: Item) -> Iterator[Row]:
        """All captions of an image, whatever it or the model was, the newest first."""
        return (self._row(*place[1:]) for place in sorted(self.captions.get(self.keys[item.name], ()), reverse=True))

    def close(self) -> None:
        self.file.close()

    def append(self, rows: Sequence[tuple[Item, Row]]) -> None:
        folder, lines = os.path.realpath(self.path.parent), list[str]()
        for item, row in rows:
            place = {"text_file": os.path.relpath(self.keys[item.name], folder)} if self.texts else {}
            lines.append(json.dumps({**row, **place, "time": time.time()}) + "\n")
        self.file.write("".join(lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())


@dataclass(frozen=True)
class Result:
    captions: int
    before: int
    """Of them, done by an earlier run."""
    kept: int
    """Images whose text files are somebody else's, and were left alone."""
    errors: list[str]
    stopped: bool


class Batch:
    """Images, where their captions go, and what is done already."""

    def __init__(self, work: Work, output: Output, items: Sequence[Item], shard: tuple[int, int] = (1, 1)) -> None:
        """`shard` (i, n): only the i-th of every n images, in the order of their names, numbers in these by size as a table's rows are."""
        self.work, self.output, self.items = work, output, items
        unique = {item.key: item for item in items}
        self.mine = [unique[key] for key in sorted(unique, key=by_number)[shard[0] - 1 :: shard[1]]]
        self.log = Log(output, items, shard)
        self.identity = {key: item.identity() for key, item in unique.items()}
        self.kept: set[str] = set()

    def close(self) -> None:
        self.log.close()

    def todo(self) -> list[Task]:
        """What remains to be captioned; text files that an earlier run did not get to write are written. Raises ConfigError."""
        tasks: list[Task] = []
        for item in self.mine:
            identity = self.identity[item.key]
            done = self.log.find(item, identity, self.work.run)
            caption = done["caption"] if done else None
            if self.output.format != "txt" or item.empty:
                tasks += [] if caption else [Task(item, identity)]
                continue
            path = self.output.sidecar(item)
            try:
                current = read_text(path)
            except OSError as error:  # a name that is too long, for example: the other images go on
                tasks.append(Task(replace(item, load=partial(missed, f"{item.name}: its text file: {error.strerror}")), identity))
                continue
            # Of any row, not only the newest: a run that was killed may have logged what it did not get to write.
            ours = next((row for row in self.log.captions_of(item) if current == row["file"] != ""), None)
            if not ours and current.strip() and self.output.existing == "error":
                raise ConfigError(f"{path}: is there already (--existing skip, overwrite, append or prepend)")
            before = beside(self.output.existing, current, bool(ours), ours["before"] if ours else "")
            if before is None:
                self.kept.add(item.name)
            elif done is None or not caption:
                tasks.append(Task(item, identity, before))
            elif not (ours and ours["caption"] == caption) and (content := joined(self.output.existing, before, caption)) != current:
                if (before, content) != (done["before"], done["file"]):  # else it was killed before it wrote the file
                    self.log.append([(item, {**done, "before": before, "file": content})])
                write_text(path, content)
        return tasks

    def save(self, rows: Sequence[tuple[Task, Row]]) -> None:
        """First into the log, so that a text file is never there without its row, and is written later if it is missing."""
        txt, facts = self.output.format == "txt", []
        for task, row in rows:
            content = joined(self.output.existing, task.before, row["caption"]) if txt and not row["error"] else ""
            facts.append({**row, "identity": task.identity, "run": self.work.run, "before": task.before, "file": content})
        self.log.append([(task.item, fact) for (task, _), fact in zip(rows, facts, strict=True)])
        for (task, _), fact in zip(rows, facts, strict=True):
            if fact["file"]:
                write_text(self.output.sidecar(task.item), fact["file"])

    def run(self, batch_size: int, show: bool = True) -> Result:
        """Caption what remains; SIGINT and SIGTERM stop it after the batch in hand. The table is made in any case."""
        tasks = self.todo()
        total, before = len(self.mine), len(self.mine) - len(tasks) - len(self.kept)
        with deferred_interrupts() as signals, progress(total, total - len(tasks), show) as tell:
            for rows in self.work.rows(tasks, batch_size):
                self.save(rows)
                tell(len(rows), sum(bool(row["error"]) for _, row in rows))
                if signals:
                    break
        return self.finish(before, self.mine, bool(signals))

    def finish(self, before: int, counted: Sequence[Item], stopped: bool = False) -> Result:
        """Make the table, and the list of failures, of what all shards have so far; tell about these images."""
        keys, good, errors, failures = {item.key for item in counted}, 0, [], []
        with alone(self.log.path.parent):  # so that the last one to come here sees all rows
            self.log.read()
            if self.output.format != "txt":
                write_table(self.output, self.work.fields, self.rows())
            for item, row in self.rows():
                failures += [json.dumps({"image": item.name, "error": row["error"]}) + "\n"] if row["error"] else []
                if item.key in keys and item.name not in self.kept:
                    good += not row["error"]
                    errors += [row["error"]] if row["error"] else []
            self._list_failures(failures)
        return Result(good, before, len(self.kept), errors, stopped)

    def rows(self) -> Iterator[tuple[Item, Row]]:
        """All that is done, in the items' order; a report begins with the most suspicious captions."""
        found = ((item, self.log.find(item, self.identity[item.key], self.work.run)) for item in self.items)
        done = ((item, row) for item, row in found if row)
        if not (isinstance(self.work, Review) and self.work.report_only):
            return done
        suspicion = [(-(row["suspicion"] or 0.0), i, item) for i, (item, row) in enumerate(done)]
        return ((item, self.log.find(item, self.identity[item.key], self.work.run) or {}) for _, _, item in sorted(suspicion))

    def _list_failures(self, lines: Sequence[str]) -> None:
        """In a file of their own where the captions' files have no place for them."""
        path = self.log.path.with_name(re.sub(LOG_NAME, ".failures.jsonl", self.log.path.name))
        if lines and self.output.format in ("txt", "metadata", "coco"):
            write_text(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)


def by_number(key: tuple[str, str]) -> tuple[str, tuple[str, str]]:
    """For sorting: t.parquet/9 comes before t.parquet/10, so rows are read as they lie in the file."""
    return re.sub("[0-9]+", lambda digits: digits[0].zfill(20), key[0]), key


@contextmanager
def progress(total: int, done: int, show: bool) -> Iterator[Any]:
    """Call with (images, failures) of each batch. A bar with images/s, failures and time left; without a terminal a line per tenth."""
    console = Console(stderr=True, quiet=not show or total - done < 2)
    columns = (BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("ETA"), TimeRemainingColumn())
    start, first, failed, tenths = time.monotonic(), done, 0, 10 * done // max(total, 1)
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("captions", total=total, completed=done, rate="")

        def tell(images: int, failures: int) -> None:
            nonlocal done, failed, tenths
            done, failed = done + images, failed + failures
            speed = (done - first) / max(time.monotonic() - start, 1e-9)
            rate = f"{speed:.1f} images/s, {failed} failed"
            bar.update(task, completed=done, rate=rate)
            if not console.is_terminal and total >= 500 and 10 * done // total > tenths:
                tenths = 10 * done // total
                console.print(f"captions {done} of {total}, {rate}, {(total - done) / speed:.0f} s left", highlight=False, soft_wrap=True)

        yield tell
