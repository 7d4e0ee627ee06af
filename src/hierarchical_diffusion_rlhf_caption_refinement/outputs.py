"""Where the captions of `predict` go: text files beside the images or in a tree like theirs, and tables; each whole or not at all."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

from .data.images import SUFFIXES
from .data.tables import load_pyarrow
from .inputs import Item
from .utils.config import ConfigError
from .utils.files import whole

Format = Literal["txt", "json", "jsonl", "csv", "parquet", "metadata", "coco"]
FORMATS: tuple[Format, ...] = get_args(Format)
Existing = Literal["skip", "overwrite", "append", "prepend", "error"]
FIELDS = ("image", "caption", "confidence", "reward", "tokens", "seed", "error")
DRAFT_FIELDS = ("image", "caption", "draft", "suspicion", "reward", "draft_reward", "words", "seed", "error")
LISTS = ("tokens", "words")
"""Fields that a CSV has no place for."""
LOG_NAME = r"(\.\d+-of-\d+)?\.log\.jsonl$"
"""What follows a table's name in that of its log, or of a shard's."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Output:
    format: Format
    path: Path | None
    """The table, or the folder of text files; None: beside the images."""
    existing: Existing = "skip"
    """What happens to a text file, not empty, that `predict` did not write."""
    ext: str = ".txt"
    full_name: bool = False
    """a.jpg.txt instead of a.txt"""

    def __post_init__(self) -> None:
        if self.format != "txt" and self.path is None:
            raise ConfigError(f"--format {self.format} needs --output FILE")
        if self.format == "parquet" and self.path:
            load_pyarrow(self.path)  # what is missing is said before the work, not after it

    def sidecar(self, item: Item) -> Path:
        """The text file of an image."""
        if self.path is None and not item.alone:
            raise ConfigError(f"{item.name}: there is no place beside it for a text file; --output names a folder")
        place = item.file if self.path is None and item.file else (self.path or Path()) / item.place
        return place.with_name(place.name + self.ext) if self.full_name else place.with_suffix(self.ext)

    def log(self, items: Sequence[Item], shard: tuple[int, int]) -> Path:
        """The run log: beside the table, or in the folder that holds all text files."""
        part = "" if shard[1] == 1 else f".{shard[0]}-of-{shard[1]}"
        if self.format != "txt" and self.path:
            return self.path.with_name(f"{self.path.name}{part}.log.jsonl")
        folders = [os.path.abspath(self.sidecar(item).parent) for item in items if not item.empty] or [os.getcwd()]
        folder = self.path or Path(os.path.relpath(os.path.commonpath(folders)))
        return folder / f"captions{part}.log.jsonl"

    def keys(self, items: Sequence[Item]) -> dict[str, str]:
        """What the log knows each name by: the real path of its text file, however it is spelled; for a table, the name itself."""
        if self.format != "txt":
            return {item.name: item.name for item in items}
        texts = {item.name: Path(item.name) if item.empty else self.sidecar(item) for item in items}
        real = {folder: os.path.realpath(folder) for folder in {path.parent for path in texts.values()}}
        return {name: os.path.join(real[path.parent], path.name) for name, path in texts.items()}


def make_output(path: Path | None, form: str | None, existing: str, ext: str, full_name: bool, drafts: bool = False) -> Output | None:
    """From the command line; the format follows from the file's name. None: captions are printed. Raises ConfigError."""
    if ext.lower() in SUFFIXES or not re.fullmatch(r"\.[^/]+", ext):
        raise ConfigError(f"--ext {ext}: expected a suffix such as .txt that is not an image's")
    if form is None and path is None:
        return None
    if form is None and path is not None:
        form = "metadata" if path.name == "metadata.jsonl" else path.suffix.lower().removeprefix(".")
        if form not in FORMATS or form == "txt":
            raise ConfigError(f"{path}: --format says what to write, one of {', '.join(FORMATS)}")
    if form == "metadata" and path and path.suffix != ".jsonl":
        path = path / "metadata.jsonl"
    if drafts and form == "txt" and path is None:
        raise ConfigError("--refine --format txt needs --output FOLDER: drafts stay as they are")
    return Output(cast(Format, form), path, cast(Existing, existing), ext, full_name)


def check_places(output: Output, items: Sequence[Item]) -> None:
    """Raises ConfigError where captions would fall on each other or have no place, before anything is done."""
    taken: dict[Any, tuple[str, str]] = {}
    for item in (item for item in items if not item.empty):
        place = _place(output, item)
        if place is not None and (first := taken.setdefault(place, item.key)) != item.key:
            help_ = "; --sidecar-name full writes NAME.SUFFIX" + output.ext if output.format == "txt" and not output.full_name else ""
            both = f"{first[0]} and {item.name}" if first[0] != item.name else f"two captions of {item.name}"
            raise ConfigError(f"{both} would share {place}{help_}")


def check_table(path: Path, read: Iterable[str | Path]) -> None:
    """Raises ConfigError where a table would take the place of a file that is to be read, or that `predict` did not write."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; --output names the file")
    if not path.exists():
        return
    if any(os.path.exists(file) and path.samefile(file) for file in read):
        raise ConfigError(f"{path}: is to be read, so it cannot be written; --output names another file")
    if not (path.is_file() and path.stat().st_size == 0) and not logs_of(path):
        raise ConfigError(
            f"{path}: is there already, and predict did not write it (it has no log beside it): name another file, or move this one away"
        )


def logs_of(path: Path) -> list[Path]:
    """The logs of a table, or of a folder's `captions`; shards have one each."""
    name = re.compile(re.escape(path.name) + LOG_NAME)
    return sorted(p for p in path.parent.iterdir() if name.fullmatch(p.name))


def _place(output: Output, item: Item) -> Any:
    """What no two images may share: their text file, their COCO id, their file name."""
    if output.format == "txt":
        return output.sidecar(item)
    if output.format == "coco":
        return f"the COCO id {coco_id(item)}"
    if output.format == "metadata":
        return file_name(output, item), item.draft
    return None


def coco_id(item: Item) -> int:
    if not (digits := re.search(r"(\d+)$", item.place.stem)):
        raise ConfigError(f"{item.name}: its name does not end in a number, the COCO id")
    return int(digits[1])


def file_name(output: Output, item: Item) -> str:
    name = os.path.relpath(item.file, (output.path or Path()).parent) if item.alone and item.file else ".."
    if name.startswith(".."):
        raise ConfigError(f"{item.name}: not a file in the folder of {output.path}")
    return Path(name).as_posix()


def beside(existing: Existing, current: str, ours: bool, before: str) -> str | None:
    """What a text file keeps next to the new caption; None: it is left alone. `before`: what it kept when we wrote it."""
    if ours or not current.strip():
        return before if ours else ""
    return {"overwrite": "", "append": current, "prepend": current}.get(existing)


def joined(existing: Existing, before: str, caption: str) -> str:
    """The text file's content, a caption per line, none that is there already once more."""
    if caption in before.splitlines():
        return before
    if before and not before.endswith("\n"):
        before += "\n"
    return f"{caption}\n{before}" if existing == "prepend" else f"{before}{caption}\n"


def read_text(path: Path) -> str:
    """Content of a text file, empty if there is none."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return ""


def write_text(path: Path, content: str) -> None:
    with whole(path) as partial:
        partial.write_bytes(content.encode("utf-8", "surrogateescape"))


def write_table(output: Output, fields: Sequence[str], rows: Iterable[tuple[Item, Row]]) -> None:
    """Rows go through one by one; `metadata` and `coco` have no place for a failure and leave it out."""
    path = cast(Path, output.path)
    with whole(path) as partial:
        if output.format == "parquet":
            _write_parquet(partial, fields, ({f: row[f] for f in fields} for _, row in rows))
            return
        with partial.open("w", encoding="utf-8", errors="replace", newline="") as file:
            if output.format == "csv":
                flat = [field for field in fields if field not in LISTS]
                file.write(_csv_line(flat))
                file.writelines(_csv_line([row[f] for f in flat]) for _, row in rows)
                return
            shown = ((item, row) for item, row in rows if not row["error"] or output.format in ("json", "jsonl"))
            lines = (json.dumps(_shaped(output, fields, item, row)) for item, row in shown)
            if output.format in ("json", "coco"):
                file.write("[")
                file.writelines(f"{',' if i else ''}\n{line}" for i, line in enumerate(lines))
                file.write("\n]\n")
            else:
                file.writelines(f"{line}\n" for line in lines)


def _csv_line(cells: Sequence[Any]) -> str:
    """Ended as on Unix; csv quotes a carriage return in a cell only where it ends lines with one itself."""
    line = io.StringIO(newline="")
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _shaped(output: Output, fields: Sequence[str], item: Item, row: Row) -> Row:
    if output.format == "metadata":
        return {"file_name": file_name(output, item), "text": row["caption"]}
    if output.format == "coco":
        return {"image_id": coco_id(item), "caption": row["caption"]}
    return {field: row[field] for field in fields}


def _write_parquet(path: Path, fields: Sequence[str], rows: Iterator[Row]) -> None:
    parquet = load_pyarrow(path)
    import pyarrow

    text, number, whole_number = pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    token = pyarrow.struct([("token", text), ("confidence", number), ("step", whole_number)])
    word = pyarrow.struct([("word", text), ("confidence", number), ("suspicion", number), ("instead", text), ("credit", number)])
    types = dict.fromkeys(("image", "caption", "draft", "error"), text)
    types |= dict.fromkeys(("confidence", "reward", "draft_reward", "suspicion"), number)
    types |= {"tokens": pyarrow.list_(token), "words": pyarrow.list_(word), "seed": whole_number}
    schema = pyarrow.schema([(field, types[field]) for field in fields])
    with parquet.ParquetWriter(path, schema) as writer:
        clean = ({k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()} for row in rows)
        while some := list(islice(clean, 1000)):
            writer.write_table(pyarrow.Table.from_pylist(some, schema))
