"""Frozen vision features of a list of examples: computed once, memory-mapped, found again by what the images contain.

Axes: N examples, P image tokens, D width.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..utils.files import alone
from ..utils.runlog import counter
from .images import ImageError
from .sources import Example

CHUNK = 64
"""Examples between two writes: what a kill can cost."""
NAMED = 20
"""Unreadable images that an error names."""


class FeatureError(ValueError):
    """Images whose features cannot be computed; the message is one line that names them, up to NAMED."""


def read_all(examples: Sequence[Example], start: int = 0) -> Iterator[Image.Image]:
    """The images from `start` on; from the first that cannot be read the rest is only looked through, to name all that are bad at once.

    Raises FeatureError.
    """
    problems: list[str] = []
    for example in examples[start:]:
        try:
            image = example.image()
        except ImageError as error:
            problems.append(str(error))
            continue
        if not problems:
            yield image
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise FeatureError(f"{len(problems)} of {len(examples)} images cannot be read: {'; '.join(problems[:NAMED])}{more}")


def _opens(example: Example) -> bool:
    """Whether the file begins as an image does."""
    try:
        file = io.BytesIO(example.content()) if example.read else example.path or example.key
        with warnings.catch_warnings(action="ignore"), Image.open(file):
            return True
    except Exception:  # decoders raise whatever a damaged file makes them trip over
        return False


def check_images(examples: Sequence[Example]) -> None:
    """A quick look before long work: if one file is no image, all are read to name those that cannot be used. Raises FeatureError."""
    if not all(example.scene is not None or _opens(example) for example in examples):
        for _ in read_all(examples):
            pass


def cache_name(examples: Sequence[Example], fingerprint: str) -> str:
    """File name for these images, in this order, seen by the encoder of this fingerprint."""
    digest = hashlib.sha256(fingerprint.encode())
    for example in examples:
        try:
            content = example.content()
        except OSError:
            content = f"unreadable: {example.path or example.key}".encode()
        digest.update(hashlib.sha256(content).digest())
    return f"{digest.hexdigest()[:24]}.npy"


def _resume(file: BinaryIO, examples: int) -> int:
    """Rows that an interrupted run left behind; the file is cut after the last whole one."""
    file.seek(0)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            return 0
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except ValueError:
        return 0
    header, row = file.tell(), dtype.itemsize * int(np.prod(shape[1:]))
    done = min((file.seek(0, os.SEEK_END) - header) // row, examples)
    file.truncate(header + done * row)
    return done


def _append(file: BinaryIO, features: np.ndarray, done: int, examples: int) -> None:
    if done == 0:
        file.seek(0)
        file.truncate()
        header = {"descr": "<f2", "fortran_order": False, "shape": (examples, *features.shape[1:])}
        np.lib.format.write_array_header_1_0(file, header)
    file.seek(0, os.SEEK_END)
    file.write(features.tobytes())
    file.flush()


def _compute(
    partial: Path, examples: Sequence[Example], encode: Callable[[list[Image.Image]], Tensor], on_progress: Callable[[int, int], None]
) -> None:
    partial.touch()
    with partial.open("r+b") as file:
        done = _resume(file, len(examples))
        on_progress(done, len(examples))
        images = read_all(examples, done)
        while done < len(examples):
            chunk = examples[done : done + CHUNK]
            features = encode(list(islice(images, CHUNK))).to(torch.float16).cpu().numpy()
            if not np.isfinite(features).all():
                raise FeatureError(f"features of {chunk[0].key} to {chunk[-1].key} are not finite in 16 bits")
            _append(file, features, done, len(examples))
            done += len(chunk)
            on_progress(done, len(examples))
        os.fsync(file.fileno())


def load_features(
    examples: Sequence[Example],
    encode: Callable[[list[Image.Image]], Tensor],
    fingerprint: str,
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Features (N, P, D) float16, read-only and memory-mapped; `encode` maps images to (B, P, D) and `fingerprint` identifies it.

    A run that was killed goes on where it stopped, and of two processes one computes while the other waits.
    `on_progress` gets (examples done, N); the default shows them. Raises FeatureError naming unreadable images.
    """
    if not examples:
        raise FeatureError("no images to compute features of")
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / cache_name(examples, fingerprint)
    if not final.exists():
        with alone(final.with_suffix(".lock")):
            if not final.exists():
                _compute(final.with_suffix(".partial"), examples, encode, on_progress or counter("image features:"))
                os.replace(final.with_suffix(".partial"), final)
    return np.load(final, mmap_mode="r")
