"""What people said about captions: comparisons of two, and ratings turned into such; read, split by image, exchanged with TRL."""

import csv
import json
import random
import reprlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from ..utils.config import ConfigError
from ..utils.files import whole
from ..utils.seeding import seed_of
from .tables import read_table

Side = Literal["a", "b"]
Number = int | float
Choice = Literal["a", "b", "tie", "both_bad", "skip"]
OTHER: dict[str, Any] = {"a": "b", "b": "a"}
CSV = ("id", "image", "a", "b", "choice", "shown_left", "annotator", "seconds", "reasons", "gap", "created_at")
PROMPT = "Describe this image."
CROWD_MARGIN = 0.4
"""Yes/no ratings decide only above this difference in the share of yes: one answer of three is within the noise."""


OWN_CAPTION = "human_same_image"
"""Origin of a rated caption that is one of the image's own references."""


class PreferenceError(ValueError):
    """Preferences that cannot be used; the message is one line, `file:line: reason`."""


@dataclass(frozen=True)
class Comparison:
    """One look of one person, or the verdict of several raters, at two captions of an image."""

    id: str
    image: str
    """Key of the image in its data set, mostly a file name."""
    a: str
    b: str
    choice: Choice
    shown_left: Side = "a"
    annotator: str = ""
    seconds: Number | None = None
    """Time taken."""
    reasons: tuple[str, ...] = ()
    """What spoke for the choice: accuracy, fluency, specificity."""
    provenance_a: dict[str, Any] = field(default_factory=dict)
    """Where the caption comes from: model and settings; for ratings source, origin and the ratings."""
    provenance_b: dict[str, Any] = field(default_factory=dict)
    gap: Number | None = None
    """For ratings: mean of a minus mean of b as a share of the scale, in [-1, 1]."""
    created_at: str = ""
    """ISO 8601."""


@dataclass(frozen=True)
class Rating:
    """What one or more people thought of one caption of an image, on a scale from worst to best."""

    image: str
    caption: str
    ratings: tuple[Number, ...]
    scale: tuple[Number, Number]
    source: str = ""
    origin: str = ""

    @property
    def score(self) -> float:
        """Mean rating as a share of the scale, in [0, 1]."""
        low, high = self.scale
        return (sum(self.ratings) / len(self.ratings) - low) / (high - low)


Record = TypeVar("Record", Comparison, Rating)
Row = dict[str, Any]


def flip(comparison: Comparison) -> Comparison:
    """The same judgement with a and b exchanged."""
    c = comparison
    return replace(
        c, a=c.b, b=c.a, choice=OTHER.get(c.choice, c.choice), shown_left=OTHER[c.shown_left],
        provenance_a=c.provenance_b, provenance_b=c.provenance_a, gap=None if c.gap is None else -c.gap,
    )  # fmt: skip


def split_by_image(
    records: Iterable[Record], shares: tuple[float, float, float] = (0.8, 0.1, 0.1), seed: int = 0
) -> tuple[list[Record], list[Record], list[Record]]:
    """Train, val, test. A hash of the image alone decides: an image is in one split, and stays there when data are added."""
    splits: tuple[list[Record], list[Record], list[Record]] = ([], [], [])
    for record in records:
        place = seed_of(seed, "split", record.image) / 2**63 * sum(shares)
        splits[(place >= shares[0]) + (place >= shares[0] + shares[1])].append(record)
    return splits


def ratings_to_comparisons(ratings: Iterable[Rating], seed: int = 0, per_image: int = 10) -> list[Comparison]:
    """Pairs of captions of one image that one source rated, the sides at random; equal means are a tie, of yes/no votes close ones, too.

    At most `per_image` pairs of an image and source, ties at most a third of that number: more would drown the rest, where most are equal.
    The image's own references are left out: anything that compares with references prefers them for nothing.
    """
    groups: dict[tuple[str, str], list[Rating]] = defaultdict(list)
    for rating in ratings:
        if rating.origin != OWN_CAPTION:
            groups[rating.source, rating.image].append(rating)
    return [c for (source, image), group in groups.items() for c in _pairs(group, f"{source}/{image}", seed, per_image)]


def _pairs(group: list[Rating], name: str, seed: int, limit: int) -> list[Comparison]:
    rng = random.Random(seed_of(seed, "rated pairs", name))
    scored = sorted(((r.score, r) for r in group), key=lambda s: (s[1].caption, s[0]))
    pairs = [rng.sample(pair, 2) for pair in combinations(scored, 2) if pair[0][1].caption != pair[1][1].caption]
    rng.shuffle(pairs)
    votes = all(r.scale == (0, 1) and set(r.ratings) <= {0, 1} for r in group)
    margin = CROWD_MARGIN if votes else 1e-9
    ties = [pair for pair in pairs if abs(pair[0][0] - pair[1][0]) <= margin][: limit // 3]
    decided = [pair for pair in pairs if abs(pair[0][0] - pair[1][0]) > margin][: limit - len(ties)]
    return [_compared(f"{name}/{i}", a, b, p - q, margin) for i, ((p, a), (q, b)) in enumerate(decided + ties)]


def _compared(name: str, a: Rating, b: Rating, gap: float, margin: float) -> Comparison:
    choice: Choice = "tie" if abs(gap) <= margin else "a" if gap > 0 else "b"
    of_a, of_b = ({"source": r.source, "origin": r.origin, "ratings": list(r.ratings), "scale": list(r.scale)} for r in (a, b))
    return Comparison(name, a.image, a.caption, b.caption, choice, annotator=a.source, provenance_a=of_a, provenance_b=of_b, gap=gap)


# --- Files


def read_comparisons(path: Path) -> list[Comparison]:
    """Comparisons of a table with at least image, a, b and choice; other columns may be there. Raises PreferenceError.

    In CSV and TSV an empty cell counts as absent, reasons are separated by semicolons, and provenance is left out.
    """
    return _read(path, lambda place, row: Comparison(**_fields(Comparison, row | {"id": row.get("id") or place})))


def read_ratings(path: Path) -> list[Rating]:
    """Ratings of a JSONL file: image, caption, ratings, scale, and perhaps source and origin. Raises PreferenceError."""
    return _read(path, _rating)


def to_trl(comparisons: Iterable[Comparison], path: Path, prompt: str = PROMPT) -> int:
    """Write the decided comparisons as the `metadata.jsonl` of a Hugging Face imagefolder, as TRL's DPO reads it; returns their number.

    Image keys must be file names relative to the folder of `path`.
    """
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    won = [c if c.choice == "a" else flip(c) for c in comparisons if c.choice in OTHER]
    said = [[[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in (c.a, c.b)] for c in won]
    rows = ({"file_names": [c.image], "prompt": asked, "chosen": a, "rejected": b, "id": c.id} for c, (a, b) in zip(won, said, strict=True))
    with whole(path) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(won)


def from_trl(path: Path) -> list[Comparison]:
    """Comparisons of such a file: file_names, chosen, rejected; a hash decides which of the two is a. Raises PreferenceError."""
    return _read(path, _trl)


def _rows(path: Path) -> Iterator[tuple[int, Row | None]]:
    """Line number and row; the cells of a CSV or TSV in JSON's types."""
    for number, row in read_table(path):
        if row and path.suffix.lower() in (".csv", ".tsv"):
            row = {name: _cell(name, text) for name, text in row.items() if name in CSV and text}
        yield number, row


def _cell(name: str, text: str) -> Any:
    if name == "reasons":
        return [part.strip() for part in text.split(";")]
    try:
        return float(text) if name in ("seconds", "gap") else text
    except ValueError:
        return text  # _fields says what is wrong


def _read(path: Path, parse: Callable[[str, Row], Record]) -> list[Record]:
    records: list[Record] = []
    try:
        for number, row in _rows(path):
            try:
                if row is None:
                    raise PreferenceError("not a JSON object in UTF-8")
                records.append(parse(f"{path.name}:{number}", row))
            except PreferenceError as error:
                raise PreferenceError(f"{path}:{number}: {error}") from None
    except (PreferenceError, ConfigError):
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise PreferenceError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return records


# --- From a row to a record


def _number(value: Any) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


_KINDS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    str: (lambda v: isinstance(v, str) and bool(v.strip()), "a text that is not blank"),
    Choice: (get_args(Choice).__contains__, f"one of {', '.join(get_args(Choice))}"),
    Side: (get_args(Side).__contains__, "a or b"),
    Number | None: (_number, "a number"),
    tuple[str, ...]: (_list_of(lambda v: isinstance(v, str)), "a list of texts"),
    tuple[Number, ...]: (_list_of(_number), "a list of numbers"),
    tuple[Number, Number]: (lambda v: _list_of(_number)(v) and len(v) == 2 and v[0] < v[1], "[lowest, highest]"),
    dict[str, Any]: (lambda v: isinstance(v, dict), "an object"),
}
"""By the type of a field: what fits it, in JSON's types, and how to say so."""


def _fields(record: type, row: Row) -> Row:
    """The row's values for the fields of a dataclass; null and the empty text count as absent."""
    values: Row = {}
    for f in fields(record):
        value, (fits, what) = row.get(f.name), _KINDS[f.type]
        if value is None or value == "":
            if f.default is MISSING and f.default_factory is MISSING:
                raise PreferenceError(f"no {f.name}")
        elif not fits(value):
            raise PreferenceError(f"{f.name} must be {what}, got {reprlib.repr(value)}")
        else:
            values[f.name] = tuple(value) if isinstance(value, list) else value
    return values


def _rating(place: str, row: Row) -> Rating:
    rating = Rating(**_fields(Rating, row))
    low, high = rating.scale
    if not rating.ratings or min(rating.ratings) < low or max(rating.ratings) > high:
        raise PreferenceError(f"ratings must be numbers from {low:g} to {high:g}, got {reprlib.repr(row['ratings'])}")
    return rating


def _trl(place: str, row: Row) -> Comparison:
    images = row.get("file_names")
    if not isinstance(images, list) or len(images) != 1:
        raise PreferenceError("file_names must be a list of one image")
    a, b = (_last_text(row, name) for name in ("chosen", "rejected"))
    found = Comparison(**_fields(Comparison, {"id": row.get("id") or place, "image": images[0], "a": a, "b": b, "choice": "a"}))
    return flip(found) if seed_of(0, found.image, *sorted((found.a, found.b))) % 2 == (found.a < found.b) else found


def _last_text(row: Row, name: str) -> str:
    """A caption given as a text, or as messages of which the last is a text or ends in one."""
    value = row.get(name)
    for step in ("content", "text"):
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            value = value[-1].get(step)
    if not isinstance(value, str) or not value.strip():
        raise PreferenceError(f"no text in {name}")
    return value
