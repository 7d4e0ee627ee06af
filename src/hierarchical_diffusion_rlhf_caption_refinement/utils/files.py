"""Files that are there whole or not at all, and lines that may be torn."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that replaces `path` in one go, or is removed; a kill leaves a hidden file that the next attempt replaces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Nobody else can have `path` reserved meanwhile; the system frees it when this process dies. Raises ValueError if it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {path.parent}") from None
        yield


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time has this file, which is made, or this folder; others wait. The system frees it when the process dies."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def fingerprint(files: Iterable[Path], *values: object) -> str:
    """Of the content of files and of values, as they are printed."""
    digest = hashlib.sha256(repr(values).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """What is not finite becomes null, as JSON has no word for it."""
    finite = json.loads(json.dumps(content, default=float), parse_constant=lambda _: None)
    with whole(path) as partial:
        partial.write_text(json.dumps(finite, indent=indent) + "\n", encoding="utf-8")


def parse_row(line: str | bytes, *keys: str) -> dict[str, Any] | None:
    """The object of a line of JSON; None if a kill cut it short, or a key is missing."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row.keys() >= set(keys) else None
