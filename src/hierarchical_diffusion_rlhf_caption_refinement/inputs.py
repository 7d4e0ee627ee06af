"""What people hand to `predict`, as a list of images that are read one by one: files, folders, globs, lists, tables, tars, addresses."""

import os
import re
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from glob import glob
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

from PIL.Image import Image

from .data.images import SUFFIXES, ImageError, fetch_image, find_images, is_image, load_image
from .data.tables import load_pyarrow, read_table
from .utils.config import ConfigError

COLUMNS = ("image", "file_name", "filename", "file", "path", "image_path", "url", "image_url")
"""Columns of a table that may name the image; the first that is there does."""
CAPTIONS = ("caption", "text", "captions")
"""Columns of a table that may hold the image's caption, or several in a list; the first that is there does."""
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Item:
    """One image, not read yet."""

    name: str
    """What the user calls it; unique."""
    place: Path
    """Where it belongs in a folder of captions, suffix included."""
    file: Path | None
    """What tells by size and time whether it has changed: the file, or the tar or table it is in; None for an address."""
    load: Callable[[], Image]
    """RGB. Raises ImageError."""
    alone: bool = False
    """The image is a file of its own."""
    draft: str = ""
    """A caption to repair."""
    empty: bool = False
    """There is no image, nor a place for its caption; it only fails."""

    @property
    def key(self) -> tuple[str, str]:
        """An image may have several drafts."""
        return self.name, self.draft

    def identity(self) -> str:
        try:
            stat = self.file.stat() if self.file else None
        except (OSError, ValueError):  # ValueError: a null character in the name
            return "missing"
        draft = f" {self.draft}" if self.draft else ""
        return (f"{stat.st_size}-{stat.st_mtime_ns}" if stat else "") + draft


def is_address(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def missed(reason: str) -> Image:
    """What an image that cannot be had is loaded by."""
    raise ImageError(reason)


def _empty(name: str, file: Path, reason: str) -> Item:
    return Item(name, _inside(name), file, partial(missed, f"{name}: {reason}"), empty=True)


def _inside(name: str) -> Path:
    """A relative path that stays below the folder it is joined to, whatever a tar or an address says."""
    parts = [part for part in Path(name).parts if part not in ("..", Path(name).anchor)]
    return Path(*(parts or ["unnamed"]))


def _named(name: str, root: str | Path, base: Path | None = None) -> Item:
    """A file or an address; `root`: what `place` is relative to; `base`: what a relative name is relative to."""
    if is_address(name):
        return Item(name, _inside(quote(name.split("://", 1)[1], safe="/")), None, partial(fetch_image, name))
    path = str(base / name) if base else name
    place = os.path.relpath(os.path.abspath(path), os.path.abspath(root))
    return Item(path, _inside(place), Path(path), partial(load_image, path), alone=True)


def _listed(names: Sequence[str], base: Path | None = None) -> list[Item]:
    """Files are placed relative to the folder that holds them all."""
    folders = [os.path.dirname(os.path.abspath(base / n if base else n)) for n in names if not is_address(n)]
    root = os.path.commonpath(folders) if folders else "."
    return [_named(n, root, base) for n in names]


def read_lines(file: Path | None) -> list[str]:
    """Names of images, one per line of a file or of standard input; `#` begins a comment. Raises ConfigError if there is none."""
    where = str(file or "standard input")
    if file is None and sys.stdin is None:
        raise ConfigError(f"{where}: is closed")
    try:
        data = file.read_bytes() if file else sys.stdin.buffer.read()
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not a text file") from None
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}") from None
    if not (names := [line for line in lines if line and not line.startswith("#")]):
        raise ConfigError(f"{where}: names no image")
    return names


def _part(path: Path, offset: int, size: int, name: str) -> Image:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return load_image(file.read(size), name)
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from None


def _tar(path: Path) -> Iterator[Item]:
    try:
        with tarfile.open(path, "r:") as tar:
            for member in (m for m in tar if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES):
                name = f"{path}/{member.name}"
                load = partial(_part, path, member.offset_data, member.size, name)
                yield Item(name, path.stem / _inside(member.name), path, load)
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # a header, but torn: tarfile takes it for the end
                yield _empty(str(path), path, f"damaged or cut off after {end} bytes; what was behind them is missing")
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{path}: not an uncompressed tar: {' '.join(str(error).split())}") from None


_one_reads = Lock()
"""Threads that want the same rows wait for the first one to read them."""


@lru_cache(maxsize=2)
def _cells(path: Path, group: int, column: str) -> list[Any]:
    return load_pyarrow(path).ParquetFile(path).read_row_group(group, [column]).column(0).to_pylist()


def _cell(path: Path, group: int, column: str, row: int, name: str) -> Image:
    with _one_reads:
        cells = _cells(path, group, column)
    cell = cells[row] or {}
    cell = cell if isinstance(cell, dict) else {"bytes": cell}
    if cell.get("bytes"):
        return load_image(cell["bytes"], name)
    if cell.get("path"):
        return load_image(path.parent / cell["path"])
    raise ImageError(f"{name}: no image in this row")


def _column(names: Sequence[str], wanted: str, path: Path, usual: Sequence[str] = COLUMNS, kind: str = "image") -> str:
    found = next((c for c in ([wanted] if wanted else usual) if c in names), None)
    if found is None:
        raise ConfigError(f"{path}: no column {wanted or f'of {kind}s'} among {', '.join(names)}; --{kind}-column names it")
    return found


def _values(rows: Sequence[dict[str, Any]], wanted: str, path: Path, usual: Sequence[str] = COLUMNS, kind: str = "image") -> list[Any]:
    """What each row of a table has in its column, None where it lacks it. Raises ConfigError if all rows do."""
    if rows:
        _column(list(dict.fromkeys(name for row in rows for name in row if name)), wanted, path, usual, kind)
    return [next((row[c] for c in ([wanted] if wanted else usual) if c in row), None) for row in rows]


def _parquet(path: Path, wanted: str) -> list[Item]:
    """Images that the file holds, as Hugging Face data sets do; none if it only names them."""
    file = load_pyarrow(path).ParquetFile(path)
    column = _column(file.schema_arrow.names, wanted, path)
    if not str(file.schema_arrow.field(column).type).startswith(("struct", "binary", "large_binary")):
        return []
    places = ((g, r) for g in range(file.num_row_groups) for r in range(file.metadata.row_group(g).num_rows))
    rows = [(f"{path}/{i}", i, g, r) for i, (g, r) in enumerate(places)]
    return [Item(name, Path(path.stem, f"{i}.png"), path, partial(_cell, path, g, column, r, name)) for name, i, g, r in rows]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, row in read_table(path):
        if row is None:
            raise ConfigError(f"{path}: line {number} is not a JSON object")
        yield row


def _table(path: Path, wanted: str, captions: str | None = None) -> list[Item]:
    """The images that a table names, relative to its folder, or holds; with `captions`, that column's (\"\": a usual one's) as drafts."""
    try:
        items, rows = _parquet(path, wanted) if path.suffix.lower() == ".parquet" else [], list(_records(path))
        if not items:
            names = [str(value or "") for value in _values(rows, wanted, path)]
            listed = iter(_listed([name for name in names if name], path.parent))
            items = [next(listed) if name else _empty(f"{path}/{i}", path, "no image in this row") for i, name in enumerate(names)]
        if captions is None:
            return items
        told = _values(rows, captions, path, CAPTIONS, "caption")
        several = [[str(text or "").strip() for text in (cell if isinstance(cell, list) and cell else [cell])] for cell in told]
        return [replace(item, draft=text) for item, texts in zip(items, several, strict=True) for text in texts]
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # of json, csv and pyarrow
        raise ConfigError(f"{path}: not a readable table: {' '.join(str(error).split())[:200]}") from None


def _one(text: str, recursive: bool, column: str) -> list[Item]:
    """The images of one argument. Raises ConfigError if it has none."""
    path = Path(text)
    if not text:  # an unset variable, not the folder where we are
        raise ConfigError("an empty image name")
    if text == "-" or text.startswith("@"):
        return _listed(read_lines(None if text == "-" else Path(text[1:])))
    if text.endswith((".log.jsonl", ".failures.jsonl")):
        raise ConfigError(f"{text}: predict's own record, not a table of images")
    if is_address(text):
        return [_named(text, Path())]
    if os.path.isdir(path):
        found = [_named(str(p), path) for p in find_images(path, recursive)]
        deeper = " (-r looks into folders in it, too)" if not recursive else ""
    elif re.search(r"[*?[]", text) and not os.path.exists(path):
        root = Path(*(part for part in Path(re.split(r"[*?[]", text)[0] + "x").parts[:-1]))
        files = sorted(p for p in glob(text, recursive=True) if is_image(Path(p)))
        found, deeper = [_named(name, root) for name in files], ""
    elif path.suffix.lower() == ".tar":
        found, deeper = list(_tar(path)), ""
    elif path.suffix.lower() in TABLES:
        found, deeper = _table(path, column), ""
    else:
        return [_named(text, path.parent)]
    if not found:
        raise ConfigError(f"{text}: no image in it{deeper}")
    return found


def find_items(
    arguments: Sequence[str], image: str = "", listing: Path | None = None, recursive: bool = False, column: str = ""
) -> list[Item]:
    """All images of the arguments, of `--image-url` and of `--image-list`, in their order, repetitions included. Raises ConfigError."""
    items = [item for text in arguments for item in _one(text, recursive, column)]
    if image:
        items.append(_named(image, Path(image).parent))
    return items + (_listed(read_lines(listing)) if listing else [])


def _lost(text: str) -> bool:
    return not (os.path.exists(text) or is_address(text) or text == "-" or re.search(r"^@|[*?[]", text))


def find_drafts(text: str, recursive: bool, column: str, captions: str, ext: str) -> list[Item]:
    """Images with captions to repair: the rows of a table, or those of a folder beside which their captions lie, one a line.

    Raises ConfigError.
    """
    if Path(text).suffix.lower() in TABLES and not os.path.isdir(text):
        items = _table(Path(text), column, captions)
    else:
        told = ((item, item.file.with_suffix(ext)) for item in _one(text, recursive, column) if item.alone and item.file)
        items = [
            replace(item, draft=line.strip())
            for item, path in told if path.is_file()
            for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()
        ]  # fmt: skip
    if not items:
        raise ConfigError(f"{text}: no such file" if _lost(text) else f"{text}: no caption in it")
    return items
