"""Captioned images of any source, a list per split: each source says what its rows are, one loop checks, joins and reports them."""

import contextlib
import csv
import hashlib
import logging
import os
import posixpath
import random
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from PIL import Image

from ..utils.config import ConfigError, DataConfig
from ..utils.files import parse_row
from ..utils.seeding import seed_of
from .download import LOG, download, image_file, link_rot, logged
from .images import SUFFIXES, ImageError, find_images, image_error, load_image
from .scenes import Scene, Split, render, sample_scene, write_caption
from .tables import read_table

SPLITS: tuple[Split, ...] = ("train", "val", "test")
ALIASES: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
NAMES: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}
HELD_OUT = 0.05
"""Share of the training images that become the val or the test split where the source has none."""


class SourceError(ValueError):
    """A data source without anything to use; the message is one line with its name and the reason."""


@dataclass(frozen=True)
class Example:
    """An image, in a file, within one or as a scene to render, with at least one caption."""

    key: str
    captions: tuple[str, ...]
    path: Path | None = None
    scene: Scene | None = None
    read: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)
    """Gives the bytes of an image that is no file of its own. Raises OSError."""

    def content(self) -> bytes:
        """The image's bytes as they are stored; of a scene, its description. Raises OSError."""
        if self.scene is not None:
            return repr(self.scene).encode()
        return self.read() if self.read else (self.path or Path(self.key)).read_bytes()

    def image(self) -> Image.Image:
        """RGB. Raises ImageError."""
        if self.scene is not None:
            return render(self.scene)
        name = str(self.path or self.key)
        try:
            return load_image(self.content(), name)
        except OSError as error:
            raise image_error(name, error) from None


Found = tuple[Example, Split | None]
"""An example and the split that its source names."""


@dataclass(frozen=True)
class Row:
    """What a source says of one image, unchecked."""

    where: str
    """File and line, or what comes nearest, for the report."""
    key: Any = None
    captions: Any = None
    split: Any = None
    path: Path | None = None
    read: Callable[[], bytes] | None = None
    problem: str = ""
    """Why it cannot be used, if that is known already."""


def _scenes(config: DataConfig, seed: int) -> dict[str, list[Example]]:
    def example(split: Split, index: int) -> Example:
        scene, rng = sample_scene(seed, split, index), random.Random(seed_of(seed, split, index, "captions"))
        return Example(f"{split}/{index}", tuple(write_caption(scene, rng) for _ in range(config.captions_per_image)), scene=scene)

    if config.captions_per_image < 1 or min(config.train, config.val, config.test) < 1:
        raise SourceError("data.source=scenes: data.train, data.val, data.test and data.captions_per_image must be positive")
    return {split: [example(split, i) for i in range(getattr(config, split))] for split in SPLITS}


def _sentences(value: Any) -> tuple[str, ...]:
    """The captions of a row, a text or a list of texts, each perhaps as {"raw": text}; white space is normalised, empty ones dropped."""
    texts: list[Any] = [t.get("raw") if isinstance(t, dict) else t for t in (value if isinstance(value, list) else [value])]
    if not all(isinstance(t, str) for t in texts):
        raise SourceError("captions must be a list of texts")
    captions = tuple(text for t in texts if (text := " ".join(t.split())))
    if not captions:
        raise SourceError("no caption")
    return captions


def _check(row: Row) -> Found:
    if row.problem:
        raise SourceError(row.problem)
    split = ALIASES.get(str(row.split).lower())
    if row.split and not split:
        raise SourceError(f"unknown split {row.split!r}")
    example = Example(row.key, _sentences(row.captions), row.path, read=row.read)
    if row.path is not None and not row.path.is_file():
        raise SourceError(f"no image {row.key}")
    return example, split


def _gather(rows: Iterator[Row], errors: list[str]) -> list[Found]:
    """Examples in the order of their first rows; rows of the same image are joined, and the first one names it.

    A file under two names, one through a link for example, is one image: it must not be in training and in the test.
    """
    found: dict[str, Found] = {}
    names: dict[str, str] = {}
    for row in rows:
        try:
            example, split = _check(row)
            key = names.setdefault(os.path.realpath(example.path), example.key) if example.path else example.key
            before, first = found.get(key, (replace(example, captions=()), split))
            if first != split:
                raise SourceError(f"{key} is already in split {first}")
            found[key] = replace(before, captions=before.captions + example.captions), split
        except SourceError as error:
            errors.append(f"{row.where}: {error}")
    return list(found.values())


def _files(path: str, *patterns: str) -> list[Path]:
    """The file itself, all of a folder that match, or those of a glob, sorted. Raises SourceError if a folder has none."""
    root = Path(path)
    if root.is_dir():
        found = sorted(file for pattern in patterns for file in root.rglob(pattern))
        if not found:
            raise SourceError(f"{path}: expected a folder with {', '.join(patterns)}")
        return found
    return sorted(map(Path, glob(path, recursive=True))) if re.search(r"[*?[]", path) else [root]


def _split_in(name: str, separator: str = "[^a-z]+") -> Split | None:
    """The first split among the parts of a name: its words, as in captions_train2014.json, or its folders ("/")."""
    return next((ALIASES[part] for part in re.split(separator, name.lower()) if part in ALIASES), None)


def _top(path: str) -> Path:
    """The folder below which `_files` looks: the path itself, a glob's part before its first wildcard, or the file's folder."""
    return Path(path) if Path(path).is_dir() else Path(os.path.dirname(re.split(r"[*?[]", path)[0]))


def _name(path: Path, root: Path) -> str:
    return Path(os.path.relpath(path, root)).as_posix()


def _root(config: DataConfig) -> Path:
    """Of relative image names."""
    beside = Path(config.path).parent / "images"
    return Path(config.images) if config.images else beside if beside.is_dir() else beside.parent


def _table(path: Path, root: Path, image: str, captions: str) -> Iterator[Row]:
    """Of a file with these columns, and perhaps `split`."""
    try:
        for number, row in read_table(path):
            where = f"{path}:{number}"
            if row is None:
                yield Row(where, problem="not JSON in UTF-8, or no object")
            elif not isinstance(row.get(image), str) or not row[image]:
                yield Row(where, problem=f"expected an object with {image}, {captions} and perhaps split")
            else:
                yield Row(where, posixpath.normpath(row[image]), row.get(captions), row.get("split"), root / row[image])
    except ConfigError as error:
        raise SourceError(str(error)) from None
    except (ValueError, csv.Error) as error:
        raise SourceError(f"{path}: {error}") from None


def _folder(config: DataConfig) -> Iterator[Row]:
    """Images with a text file of the same name, one caption per line; folders named as a split set it."""
    root = Path(config.path)
    for path in find_images(root, recursive=True):
        key = path.relative_to(root).as_posix()
        names = path.with_suffix(".txt"), path.with_name(path.name + ".txt"), path.with_suffix(".caption")
        text = next((name for name in names if name.is_file()), None)
        try:
            if text is None:
                raise SourceError(f"no {names[0].name} beside it")
            yield Row(str(path), key, text.read_text(encoding="utf-8-sig").splitlines(), _split_in(key.rpartition("/")[0], "/"), path)
        except (ValueError, OSError) as error:
            yield Row(str(path), problem=str(error))


def _imagefolder(config: DataConfig) -> Iterator[Row]:
    """As `datasets` reads it: metadata files in the folder or below it name images relative to themselves, folders split them."""
    names = "metadata.jsonl", "metadata.csv", "metadata.parquet"
    if not Path(config.path).is_dir():
        raise SourceError(f"{config.path}: expected a folder with {', '.join(names)}")
    for row in (row for file in _files(config.path, *names) for row in _table(file, file.parent, "file_name", "text")):
        key = _name(row.path, Path(config.path)) if row.path else ""
        yield replace(row, key=key, split=row.split or _split_in(key.rpartition("/")[0], "/"))


def _coco(config: DataConfig) -> Iterator[Row]:
    """Karpathy's dataset_*.json, captions and split in each image, or COCO's captions_*.json with annotations, the split in its name."""
    for file in _files(config.path, "dataset_*.json", "captions_*.json"):
        content, captions, root = parse_row(file.read_bytes(), "images"), defaultdict(list), _root(config)
        if content is None or not isinstance(content["images"], list):
            raise SourceError(f"{file}: expected an object with images")
        if not isinstance(notes := content.get("annotations", []), list):
            raise SourceError(f"{file}: annotations: expected a list")
        for number, note in enumerate(notes):
            try:
                captions[note["image_id"]].append(note["caption"])
            except (LookupError, TypeError):
                yield Row(f"{file}:annotations[{number}]", problem="expected an object with image_id and caption")
        for number, image in enumerate(content["images"]):
            where, about = f"{file}:images[{number}]", image if isinstance(image, dict) else {}
            name, folder = about.get("file_name") or about.get("filename"), about.get("filepath") or ""
            if not (name and isinstance(name, str) and isinstance(folder, str) and isinstance(about.get("id"), Hashable)):
                yield Row(where, problem="expected an object with file_name or filename (texts) and perhaps id (a number)")
                continue
            places, tops = (folder, file.stem.removeprefix("captions_"), ""), (root, file.parent / "images", file.parent)
            found = ((top, path) for top in tops for place in places if (path := top / place / name).is_file())
            top, path = next(found, (root, root / folder / name))
            texts = captions.pop(about.get("id"), []) if "annotations" in content else about.get("sentences")
            yield Row(where, _name(path, top), texts, about.get("split") or _split_in(file.name), path)
        yield from (Row(f"{file}:annotations", problem=f"no image with id {image}") for image in captions)


def _part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _sample(file: Path, name: str, key: str, parts: dict[str, Callable[[], bytes]]) -> Row:
    """Of the members of a tar, here called `name`, whose names differ in the suffix alone."""
    facts = (parse_row(parts["json"]()) if "json" in parts else None) or {}
    text = parts["txt"]().decode(errors="replace") if "txt" in parts else facts.get("caption") or ""
    read = next((read for suffix, read in parts.items() if f".{suffix}" in SUFFIXES), None)
    told = [str(facts[name]) for name in ("status", "error_message") if facts.get(name)]
    problem = "" if read else ": ".join(["no image", *told])
    return Row(f"{file}:{key}", f"{name}/{key}", text, _split_in(name), read=read, problem=problem)


def _webdataset(config: DataConfig) -> Iterator[Row]:
    """Images stay within the tars, and shards of one name in two folders apart. What img2dataset counted in *_stats.json is reported."""
    links: Counter[str] = Counter()
    for file in _files(config.path, "*.tar"):
        samples: dict[str, dict[str, Callable[[], bytes]]] = defaultdict(dict)
        try:
            with tarfile.open(file, "r:") as tar:
                for member in tar:
                    folder, slash, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    if member.isfile() and member.offset_data + member.size <= file.stat().st_size:
                        samples[folder + slash + stem][suffix.lower()] = partial(_part, file, member.offset_data, member.size)
        except tarfile.TarError as error:
            yield Row(str(file), problem=f"{error}; what comes before is used")
        name = _name(file.with_suffix(""), _top(config.path))
        yield from (_sample(file, name, key, parts) for key, parts in samples.items())
        with contextlib.suppress(OSError, AttributeError):
            counted = (parse_row(file.with_name(f"{file.stem}_stats.json").read_bytes()) or {}).get("status_dict", {})
            links.update({"" if status == "success" else status: number for status, number in counted.items()})
    if links:
        logging.getLogger(__name__).warning("%s: %s", config.path, link_rot(links))


def _tsv(file: Path, split: Split, folder: Path) -> Iterator[Row]:
    """Caption, URL, as in Conceptual Captions 3M, or the other way round, as in 12M; further columns are ignored."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            fields = line.decode(errors="replace").strip("\r\n").split("\t")
            url = next((text for text in fields[:2] if text.startswith(("http://", "https://"))), "")
            if url and len(fields) > 1 and "\ufffd" not in fields[0] + fields[1]:
                yield Row(f"{file}:{number}", url, fields[fields[0] == url], split, image_file(folder, url))
            elif line.strip():
                yield Row(f"{file}:{number}", problem="expected a caption, a tab and a URL in UTF-8")


Parts = dict[Split, list[Callable[[], Iterator[Row]]]]
"""What names its rows, as often as it is called, per split."""


def _fetched(parts: Parts, config: DataConfig, folder: Path) -> Iterator[Row]:
    """Those of the first rows of each split whose image is there, after fetching as many as are needed; ends with a report of dead links.

    What has no part of its own comes out of train, as in `_split`.
    """
    links, dead = Counter[str](), set[str]()
    for split in parts:
        limits = [getattr(config, s) for s in SPLITS if s == split or (split == "train" and s not in parts)]
        usable = (row for part in parts[split] for row in part() if not row.problem)
        enough = sum(limits) if all(limits) else sum(not row.problem for part in parts[split] for row in part())
        reasons = download((row.key for row in usable), folder, enough, config.downloads)
        links.update(reasons.values())
        dead |= {url for url, reason in reasons.items() if reason}
        for row in (row for part in parts[split] for row in part()):
            if not row.problem and row.key not in reasons:
                break
            if row.problem or not reasons[row.key]:
                yield row
    message, log = f"{config.path}: {link_rot(links)}", folder / LOG
    if dead:
        noted = dead <= logged(folder)
        message += f"; all are in {log}" if noted else f"; {log} does not have them all, for no host answered: is there a network?"
    if links and not links[""]:
        raise SourceError(message)
    logging.getLogger(__name__).warning(message)


def _conceptual_captions(config: DataConfig) -> Iterator[Row]:
    folder = Path(config.images or re.sub(r"[*/]+$", "", config.path.removesuffix(".tsv")) + "_images")
    parts: Parts = defaultdict(list)
    for file in _files(config.path, "*.tsv"):
        split = _split_in(file.name) or "train"
        parts[split].append(partial(_tsv, file, split, folder))
    yield from _fetched(parts, config, folder)


def _cell(column: Any, index: int) -> bytes:
    """Of an image column that is not decoded."""
    cell = next(iter(column[index].values())) or {}
    if not cell.get("bytes") and not cell.get("path"):
        raise OSError("no image in this row")
    return cell["bytes"] or Path(cell["path"]).read_bytes()


def _hub_rows(where: str, part: Any, split: Split | None, folder: Path, first: dict[bytes, str]) -> Iterator[Row]:
    """Of one split of a Hugging Face data set. Images in it are read again when they are asked for; here their hashes tell equal ones.

    `first` has the name of the first row with each image, which is its key: a data set may have a row per caption.
    """
    from datasets import Image as Picture

    names = {name.lower(): name for name in reversed(part.column_names)}
    image = next((name for name, kind in part.features.items() if isinstance(kind, Picture)), None)
    url = next((names[name] for name in ("image_url", "url") if name in names), None)
    caption = next((names[name] for name in ("caption", "captions", "text", "sentences") if name in names), None)
    if caption is None or (image or url) is None:
        raise SourceError(f"{where}: no column of images (or image_url, url) and captions among {', '.join(part.column_names)}")
    pictures = part.select_columns([image]).cast_column(image, Picture(decode=False)) if image else None
    texts = part.select_columns([name for name in part.column_names if name in (caption, "split") or (name == url and not image)])
    for number, row in enumerate(texts):
        rest = {"where": f"{where}[{number}]", "captions": row[caption], "split": row.get("split") or split}
        if image:
            read = partial(_cell, pictures, number)
            try:
                digest = hashlib.sha256(read()).digest()
            except OSError as error:
                yield Row(rest["where"], problem=error.strerror or str(error))
                continue
            yield Row(key=first.setdefault(digest, f"{where.rpartition(':')[2]}/{number}"), read=read, **rest)
        else:
            yield Row(key=str(row[url]), path=image_file(folder, str(row[url])), **rest)


def _hub(config: DataConfig) -> Iterator[Row]:
    try:
        import datasets
    except ImportError:
        raise SourceError('data.source=hub needs datasets: pip install ".[data]"') from None
    try:
        parts = datasets.load_dataset(config.path)
    except Exception as error:  # whatever its readers, the hub's client and the network make of it
        raise SourceError(f"{config.path}: {' '.join(str(error).split())}") from None
    folder = Path(config.images or Path("cache") / f"{Path(config.path).name}_images")
    remote: Parts = defaultdict(list)
    first: dict[bytes, str] = {}
    for name, part in parts.items():
        split, where = _split_in(str(name)), f"{config.path}:{name}"
        if split is None and "split" not in part.column_names:
            yield Row(where, problem="unknown split")
        elif any(isinstance(kind, datasets.Image) for kind in part.features.values()):
            yield from _hub_rows(where, part, split, folder, first)
        else:
            remote[split or "train"].append(partial(_hub_rows, where, part, split, folder, first))
    if remote:
        yield from _fetched(remote, config, folder)


_READERS: dict[str, Callable[[DataConfig], Iterator[Row]]] = {
    "jsonl": lambda config: _table(Path(config.path), _root(config), "image", "captions"),
    "folder": _folder,
    "imagefolder": _imagefolder,
    "coco": _coco,
    "webdataset": _webdataset,
    "conceptual_captions": _conceptual_captions,
    "hub": _hub,
}


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
            keys = {e.key for e in held}
            splits[split], splits["train"] = held, [e for e in splits["train"] if e.key not in keys]
    return splits


def load_examples(config: DataConfig, seed: int) -> dict[str, list[Example]]:
    """Examples of train, val and test. Rows that cannot be used are logged, each with file, line and reason, and what the limits leave out.

    Raises SourceError if a split ends up without examples.
    """
    if config.source == "scenes":
        return _scenes(config, seed)
    errors: list[str] = []
    try:
        found = _gather(_READERS[config.source](config), errors)
    except (SourceError, ImageError) as error:
        raise SourceError(str(error)) from None
    except OSError as error:
        raise SourceError(f"{config.path}: {error.strerror or error}") from None
    if not found:
        raise SourceError(f"{config.path}: no captioned image" + (f"; first of {len(errors)} problems: {errors[0]}" if errors else ""))
    if errors:
        more = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
        logging.getLogger(__name__).warning("%d images or rows left out: %s%s", len(errors), "; ".join(errors[:5]), more)
    splits = _split(found)
    if empty := [split for split in SPLITS if not splits[split]]:
        raise SourceError(f"{config.path}: no example for {', '.join(empty)}; {len(found)} captioned images in all")
    used = {split: examples[: getattr(config, split) or None] for split, examples in splits.items()}
    cut = {s: f"{len(used[s])} of {len(splits[s])} {name} images (data.{s})" for s, name in NAMES.items() if len(used[s]) < len(splits[s])}
    if cut:
        logging.getLogger(__name__).warning("using %s", ", ".join(cut.values()))
    return used
