"""Captioned images of any source, a list per split: the built-in scenes, JSON lines, or a folder with text files beside its images."""

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..utils.config import DataConfig
from ..utils.seeding import seed_of
from .images import ImageError, find_images, load_image
from .scenes import Scene, Split, render, sample_scene, write_caption

SPLITS: tuple[Split, ...] = ("train", "val", "test")
ALIASES: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
HELD_OUT = 0.05
"""Share of the training images that become the val or the test split where the source has none."""


class SourceError(ValueError):
    """A data source without anything to use; the message is one line with its name and the reason."""


@dataclass(frozen=True)
class Example:
    """An image, in a file or as a scene to render, with at least one caption."""

    key: str
    captions: tuple[str, ...]
    path: Path | None = None
    scene: Scene | None = None

    def image(self) -> Image.Image:
        """RGB. Raises ImageError."""
        return render(self.scene) if self.scene is not None else load_image(self.path or self.key)


Found = tuple[Example, Split | None]
"""An example and the split that its source names."""


def _scenes(config: DataConfig, seed: int) -> dict[str, list[Example]]:
    def example(split: Split, index: int) -> Example:
        scene, rng = sample_scene(seed, split, index), random.Random(seed_of(seed, split, index, "captions"))
        return Example(f"{split}/{index}", tuple(write_caption(scene, rng) for _ in range(config.captions_per_image)), scene=scene)

    if config.captions_per_image < 1 or min(config.train, config.val, config.test) < 1:
        raise SourceError("data.source=scenes: data.train, data.val, data.test and data.captions_per_image must be positive")
    return {split: [example(split, i) for i in range(getattr(config, split))] for split in SPLITS}


def _sentences(value: Any) -> tuple[str, ...]:
    """The captions of one row, a text or a list of texts; white space is normalised, empty ones are dropped."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise SourceError("captions must be a list of texts")
    captions = tuple(text for t in texts if (text := " ".join(t.split())))
    if not captions:
        raise SourceError("no caption")
    return captions


def _row(line: bytes, root: Path) -> Found:
    try:
        row = json.loads(line)
    except ValueError:
        raise SourceError("not JSON in UTF-8") from None
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
        raise SourceError("expected an object with image, captions and perhaps split")
    split = row.get("split")
    if split is not None and split not in ALIASES:
        raise SourceError(f"unknown split {split!r}")
    example = Example(row["image"], _sentences(row.get("captions")), root / row["image"])
    if not (root / row["image"]).is_file():
        raise SourceError(f"no image {row['image']}")
    return example, ALIASES[split] if split is not None else None


def _read_jsonl(config: DataConfig, errors: list[str]) -> Iterator[Found]:
    """Examples in the order of the file; rows of the same image are joined."""
    path = Path(config.path)
    beside = path.parent / "images"
    root = Path(config.images) if config.images else beside if beside.is_dir() else path.parent
    found: dict[str, Found] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    example, split = _row(line, root)
                    before, first = found.get(example.key, (None, split))
                    if first != split:
                        raise SourceError(f"{example.key} is already in split {first}")
                    captions = before.captions + example.captions if before else example.captions
                    found[example.key] = Example(example.key, captions, example.path), split
            except SourceError as error:
                errors.append(f"{path}:{number}: {error}")
    yield from found.values()


def _read_folder(config: DataConfig, errors: list[str]) -> Iterator[Found]:
    """Images with a text file of the same name, one caption per line; folders named as a split set it."""
    root = Path(config.path)
    for path in find_images(root, recursive=True):
        key = path.relative_to(root).as_posix()
        names = path.with_suffix(".txt"), path.with_name(path.name + ".txt"), path.with_suffix(".caption")
        text = next((name for name in names if name.is_file()), None)
        try:
            if text is None:
                raise SourceError(f"no {names[0].name} beside it")
            captions = _sentences(text.read_text(encoding="utf-8-sig").splitlines())
            yield Example(key, captions, path), ALIASES.get(key.split("/")[0].lower()) if "/" in key else None
        except (ValueError, OSError) as error:
            errors.append(f"{path}: {error}")


def _share(example: Example) -> float:
    """A number in [0, 1) that depends on the name alone, so that new images never move old ones to another split."""
    return int.from_bytes(hashlib.sha256(example.key.encode()).digest()[:6], "big") / 2**48


def _split(found: list[Found]) -> dict[str, list[Example]]:
    """As the source says; what it leaves open is training, of which a missing val or test gets HELD_OUT, at least one."""
    splits = {split: [example for example, named in found if (named or "train") == split] for split in SPLITS}
    for number, split in enumerate(("val", "test")):
        if not splits[split] and len(splits["train"]) > 1:
            low, high = number * HELD_OUT, (number + 1) * HELD_OUT
            held = [e for e in splits["train"] if low <= _share(e) < high] or [min(splits["train"], key=_share)]
            splits[split], splits["train"] = held, [e for e in splits["train"] if e not in held]
    return splits


def load_examples(config: DataConfig, seed: int) -> dict[str, list[Example]]:
    """Examples of train, val and test. Rows that cannot be used are logged, each with file, line and reason.

    Raises SourceError if a split ends up without examples.
    """
    if config.source == "scenes":
        return _scenes(config, seed)
    errors: list[str] = []
    try:
        found = list((_read_jsonl if config.source == "jsonl" else _read_folder)(config, errors))
    except OSError as error:
        raise SourceError(f"{config.path}: {error.strerror or error}") from None
    except ImageError as error:
        raise SourceError(str(error)) from None
    if not found:
        raise SourceError(f"{config.path}: no captioned image" + (f"; first of {len(errors)} problems: {errors[0]}" if errors else ""))
    if errors:
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        logging.getLogger(__name__).warning("%d images or rows left out: %s%s", len(errors), "; ".join(errors[:5]), more)
    splits = _split(found)
    if empty := [split for split in SPLITS if not splits[split]]:
        raise SourceError(f"{config.path}: no example for {', '.join(empty)}; {len(found)} captioned images in all")
    caps = {"train": config.train, "val": config.val, "test": config.test}
    return {split: examples[: caps[split] or None] for split, examples in splits.items()}
