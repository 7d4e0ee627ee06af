"""Checkpoint files: written whole or not at all, and read without running anything that is in them."""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import whole

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or used; the message is one line that names the file and the reason."""


class Payload(dict[str, Any]):
    """What `load` returns; a part that is asked for and not there raises CheckpointError."""

    path: Path

    def __missing__(self, key: str) -> Any:
        raise CheckpointError(f"{self.path}: damaged or made by another version: it has no '{key}'")


def save(path: str | Path, kind: str, payload: dict[str, Any]) -> None:
    """Write a payload of tensors, dicts, lists, text and numbers; until it is on the disk, whole, the old file stays.

    Raises CheckpointError if the file cannot be written, for example because the disk is full.
    """
    try:
        with whole(Path(path)) as partial, partial.open("wb") as file:
            torch.save({"format": FORMAT, "kind": kind, "payload": dict(payload)}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch reports a failed write as a RuntimeError of its own
        if not isinstance(cause, OSError):
            raise
        raise CheckpointError(f"{path}: cannot be written: {cause.strerror or cause}") from None


def load(path: str | Path, kind: str) -> Payload:
    """The payload that `save` wrote, its tensors on the CPU.

    Raises CheckpointError for a file that is missing, empty, damaged, of another kind or of a newer format, and for one that holds Python
    objects: those are refused, because unpickling them can run any code.
    """
    saved = _read(Path(path))
    if saved["format"] > FORMAT:
        raise CheckpointError(f"{path}: has format {saved['format']}, this version reads up to {FORMAT}; update the package")
    if saved["kind"] != kind:
        raise CheckpointError(f"{path}: is a {saved['kind']} checkpoint, expected {kind}")
    payload = Payload(saved["payload"])
    payload.path = Path(path)
    return payload


def digest(tensors: Iterable[tuple[str, Tensor]], *more: str) -> str:
    """Hash of named tensors and texts."""
    found = hashlib.sha256(json.dumps(more).encode())
    for name, tensor in tensors:
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def weights_digest(path: str | Path) -> str:
    """Of a checkpoint's weights alone, not of the times and figures beside them. Raises CheckpointError."""
    parts = [(name, part) for name, part in _read(Path(path))["payload"].items() if isinstance(part, dict)]
    return digest((f"{name}.{key}", value) for name, part in parts for key, value in part.items() if isinstance(value, Tensor))[:16]


def kind_of(path: str | Path) -> str:
    """What kind of checkpoint a file is. Raises CheckpointError."""
    return _read(Path(path))["kind"]


def _read(path: Path) -> dict[str, Any]:
    refused = CheckpointError(f"{path}: refused: it holds Python objects, which can run code when loaded; none of it was run")
    damaged = CheckpointError(f"{path}: damaged or cut short")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; expected a file such as best_rlhf_model.pt in it")
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if not start:
            raise CheckpointError(f"{path}: empty file")
        if not zipfile.is_zipfile(path):
            if start[0] == 0x80:  # first byte of a bare pickle
                raise refused
            raise damaged if start.startswith(b"PK") else CheckpointError(f"{path}: not a checkpoint")
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            if archive.testzip() is not None:
                raise damaged
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise damaged from None
    except pickle.UnpicklingError:
        raise refused from None
    except RuntimeError:  # an archive, but not one of torch's
        raise CheckpointError(f"{path}: not a checkpoint") from None
    if not isinstance(saved, dict) or not {"format", "kind", "payload"} <= saved.keys() or not isinstance(saved["payload"], dict):
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    return saved
