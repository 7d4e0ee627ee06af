"""The built-in benchmark: rendered scenes, captions of them as people write them, and the truth of any caption.

A scene is one to four objects on a 4x4 grid of 16-pixel cells over a plain background. All attributes are uniform and
independent, so no caption can be judged without its image. `check` judges any string: which facts it tells, which of them hold,
and how far it is from the grammar of `grammar.py`.
`python -m hierarchical_diffusion_rlhf_caption_refinement.data.scenes --show 16 sheet.png` draws examples.
"""

import argparse
import math
import random
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from ..utils.seeding import seed_of
from .grammar import (
    BACKGROUNDS,
    COLOURS,
    NUMBERS,
    OPPOSITES,
    PLURALS,
    SHAPES,
    SINGULARS,
    SIZES,
    Fact,
    Kind,
    Mention,
    Reading,
    fix_articles,
    read,
    words_of,
)

T = TypeVar("T")
Split = Literal["train", "val", "test"]
Group = tuple[int, ...]
"""Indices of the objects that one mention speaks of."""

GRID, CELL = 4, 16
"""Cells per side; pixels per cell."""
RGB = {
    "red": (214, 32, 38),
    "orange": (250, 128, 10),
    "yellow": (255, 222, 20),
    "green": (10, 128, 52),
    "blue": (28, 70, 220),
    "purple": (144, 46, 184),
    "pink": (250, 120, 190),
    "brown": (140, 82, 40),
}
GROUND = {"snow": (246, 248, 250), "sand": (228, 208, 170), "grass": (172, 208, 140), "water": (170, 212, 236), "slate": (38, 43, 50)}
DIAMETER = {"small": 8, "large": 14}
"""Diameter in pixels."""
MOST_FACTS = 12
"""Facts that count as a full description: as many as 18 words can tell of any scene."""


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str
    size: str
    cell: int
    """Row-major cell of the grid."""


@dataclass(frozen=True)
class Scene:
    background: str
    things: tuple[Thing, ...]
    """In the order of their cells."""


def split_of(scene: Scene) -> Split:
    """The one split that a scene can belong to, whatever the seed: 80 % train, 10 % val, 10 % test."""
    draw = seed_of(0, "split", scene.background, [(t.shape, t.colour, t.size, t.cell) for t in scene.things]) % 10
    return "val" if draw == 8 else "test" if draw == 9 else "train"


def _draw_scene(rng: random.Random) -> Scene:
    many = rng.choices((1, 2, 3, 4), (1, 3, 3, 3))[0]
    cells = sorted(rng.sample(range(GRID * GRID), many))
    things = [Thing(rng.choice(SHAPES), rng.choice(COLOURS), rng.choice(SIZES), cell) for cell in cells]
    return Scene(rng.choice(BACKGROUNDS), tuple(things))


def sample_scene(seed: int, split: Split, index: int) -> Scene:
    """The scene of this index; scenes of different splits never have the same content."""
    rng = random.Random(seed_of(seed, "scene", split, index))
    while split_of(scene := _draw_scene(rng)) != split:
        pass
    return scene


# Rendering


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners in [-1, 1], y downwards."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)]
    if shape == "diamond":
        return [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)]
    if shape == "heart":
        turns = [math.tau * k / 60 for k in range(60)]
        heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in turns]
        return [(math.sin(a) ** 3, -(h + 2.5) / 14.5) for a, h in zip(turns, heights, strict=True)]
    if shape == "star":
        radii = [(1.08 if k % 2 == 0 else 0.45, math.pi * k / 5) for k in range(10)]
        return [(r * math.sin(a), 0.06 - r * math.cos(a)) for r, a in radii]
    w, e = 0.34, 1.0  # half the width of the cross's bars, and half their length
    return [(-w, -e), (w, -e), (w, -w), (e, -w), (e, w), (w, w), (w, e), (-w, e), (-w, w), (-e, w), (-e, -w), (-w, -w)]


@cache
def _mask(shape: str, size: str, dx: int, dy: int) -> np.ndarray:
    """Coverage in [0, 1] of each pixel of a cell, (16, 16, 1), antialiased by 8x8 samples."""
    n = 8
    image = Image.new("L", (CELL * n, CELL * n))
    draw, r = ImageDraw.Draw(image), DIAMETER[size] * n / 2
    x, y = CELL * n / 2 + dx * n, CELL * n / 2 + dy * n
    if shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r - 1, y + r - 1), fill=255)
        if shape == "ring":
            draw.ellipse((x - r * 0.55, y - r * 0.55, x + r * 0.55 - 1, y + r * 0.55 - 1), fill=0)
    else:
        draw.polygon([(x + r * px, y + r * py) for px, py in _polygon(shape)], fill=255)
    return np.asarray(image, np.float32).reshape(CELL, n, CELL, n).mean((1, 3))[:, :, None] / 255


def render(scene: Scene) -> Image.Image:
    """64x64 RGB picture: each object in its own cell, off-centre by at most a pixel, with faint noise; the same each time."""
    noise = np.random.Generator(np.random.PCG64(seed_of(0, "render", scene)))
    pixels = np.full((GRID * CELL, GRID * CELL, 3), GROUND[scene.background], np.float32)
    pixels += noise.integers(-5, 6, pixels.shape, dtype=np.int8)
    for thing in scene.things:
        dx, dy = random.Random(seed_of(0, "jitter", thing)).choices((-1, 0, 1), k=2)
        row, col = divmod(thing.cell, GRID)
        cell = pixels[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL]
        cell += _mask(thing.shape, thing.size, dx, dy) * (np.asarray(RGB[thing.colour], np.float32) - cell)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# Judging captions


@dataclass(frozen=True)
class Quality:
    """All but `told` in [0, 1]."""

    accuracy: float
    """Share of the told facts that hold; 0 if none is told."""
    specificity: float
    """True facts told, over those of a full description."""
    fluency: float
    """1 for a grammatical caption; each slip (a word to insert, delete or replace, a mention made twice) costs 40 % or more."""
    utility: float
    told: int


@lru_cache(maxsize=100_000)
def _matches(mention: Mention, thing: Thing) -> dict[Kind, bool]:
    """Which attributes hold of an object; the size counts only where shape or colour tell which object is meant."""
    shape, colour = mention.shape == thing.shape, mention.colour == thing.colour
    return {"shape": shape, "colour": colour, "size": mention.size == thing.size and (shape or colour)}


@lru_cache(maxsize=100_000)
def _holds(relation: str, some: tuple[Thing, ...], others: tuple[Thing, ...]) -> bool:
    """Whether every object of the first group stands so to every object of the second; never of an empty group."""
    if relation in ("below", "right"):
        some, others = others, some
    part = 0 if relation in ("above", "below") else 1
    return bool(some and others) and max(divmod(t.cell, GRID)[part] for t in some) < min(divmod(t.cell, GRID)[part] for t in others)


def _assign(reading: Reading, scene: Scene) -> list[tuple[Thing, ...]]:
    """The objects each mention speaks of: no object twice, at most `count` per mention, as many facts true as possible."""
    relations: list[list[str]] = [[] for _ in reading.mentions]
    for fact in reading.facts:
        if fact.kind == "relation":
            relations[fact.subject].append(fact.value)
    scores = [[sum(_matches(m, t).values()) for t in scene.things] for m in reading.mentions]

    # forward over the mentions; what comes next depends only on which objects are free and on the last group
    paths: dict[tuple[Group, Group], tuple[int, tuple[Group, ...]]] = {(tuple(range(len(scene.things))), ()): (0, ())}
    for i, mention in enumerate(reading.mentions):
        longer: dict[tuple[Group, Group], tuple[int, tuple[Group, ...]]] = {}
        for (free, before), (score, groups) in paths.items():
            known = [k for k in free if scores[i][k]]
            for group in (g for n in range(min(mention.count, len(known)) + 1) for g in combinations(known, n)):
                some, others = tuple(scene.things[k] for k in before), tuple(scene.things[k] for k in group)
                true = sum(scores[i][k] for k in group) + sum(_holds(r, some, others) for r in (relations[i - 1] if i else ()))
                state = tuple(k for k in free if k not in group), group
                if state not in longer or longer[state][0] < score + true:
                    longer[state] = score + true, (*groups, group)
        paths = longer
    best = max(paths.values(), key=lambda path: path[0])
    return [tuple(scene.things[k] for k in group) for group in best[1]]


def _count(mention: Mention, scene: Scene) -> int:
    told = [(k, v) for k in ("shape", "colour", "size") if (v := getattr(mention, k))]
    return sum(all(getattr(t, k) == v for k, v in told) for t in scene.things)


def _verdict(fact: Fact, reading: Reading, groups: Sequence[tuple[Thing, ...]], scene: Scene) -> bool:
    if fact.kind == "background":
        return fact.value == scene.background
    mention, group = reading.mentions[fact.subject], groups[fact.subject]
    if fact.kind == "relation":
        return _holds(fact.value, group, groups[fact.subject + 1])
    if fact.kind == "count":
        return _count(mention, scene) == mention.count
    return fact.copy < len(group) and _matches(mention, group[fact.copy])[fact.kind]


def verdicts(caption: str, scene: Scene) -> list[tuple[Fact, bool]]:
    """Every fact that the caption tells, and whether it holds."""
    reading = read(caption)
    groups = _assign(reading, scene)
    return [(fact, _verdict(fact, reading, groups, scene)) for fact in reading.facts]


def tellable(scene: Scene) -> int:
    """Facts of a full description: three per object, a relation per further kind of object, the background; at most MOST_FACTS."""
    kinds = {(t.shape, t.colour, t.size) for t in scene.things}
    return min(3 * len(scene.things) + len(kinds), MOST_FACTS)


@lru_cache(maxsize=100_000)
def check(caption: str, scene: Scene) -> Quality:
    """The hidden truth about a caption, any string: utility = fluency * accuracy * (0.4 + 0.6 * sqrt(specificity)).

    The product leaves nothing to gain from word lists (fluency), from guessing (accuracy) or from saying little (specificity).
    """
    told = verdicts(caption, scene)
    accuracy = sum(ok for _, ok in told) / max(len(told), 1)
    specificity = min(1.0, sum(ok for fact, ok in told if fact.kind != "count") / tellable(scene))
    fluency = read(caption).fluency
    return Quality(accuracy, specificity, fluency, fluency * accuracy * (0.4 + 0.6 * math.sqrt(specificity)), len(told))


def retrieval_ceiling(scenes: Sequence[Scene], captions: Sequence[str]) -> float:
    """R@1 of one who knows the truth: rank scenes by the share of the caption's facts that hold, ties at random."""
    total = 0.0
    for truth, caption in enumerate(captions):
        shares = [check(caption, scene).accuracy for scene in scenes]
        best = max(shares)
        total += (shares[truth] == best) / shares.count(best)
    return total / len(captions)


# Writing captions

CARELESS, ERROR, SLIP = 0.3, 0.48, 0.05
"""Share of careless writers; chance that one fact they tell is wrong; chance that a caption has a word dropped or doubled."""
MAX_WORDS = 18


def _phrase(shape: str, colour: str | None, size: str | None, count: int = 1) -> str:
    number = next((w for w, n in NUMBERS.items() if n == count), "a")
    return " ".join(w for w in (number, size, colour, shape if count == 1 else PLURALS[shape]) if w)


def _relations(some: Sequence[Thing], others: Sequence[Thing]) -> list[str]:
    return [r for r in OPPOSITES if _holds(r, tuple(some), tuple(others))]


def _joint(relation: str | None, rng: random.Random | None = None) -> str:
    if relation in ("left", "right"):
        return f"to the {relation} of" if rng and rng.random() < 0.5 else f"{relation} of"
    return relation or "and"


def _maybe_other(value: T, values: Iterable, error: float, rng: random.Random) -> T:
    """The value, or with probability `error` one of the others."""
    return rng.choice([v for v in values if v != value]) if rng.random() < error else value


def _slip(words: list[str], rng: random.Random) -> list[str]:
    at = rng.randrange(len(words))
    return words[:at] + [words[at]] * (2 if rng.random() < 0.5 else 0) + words[at + 1 :]


def describe(scene: Scene) -> str:
    """A full and correct caption of at most 18 words; of four different objects it leaves out the background, or the last object."""
    kinds: dict[tuple[str, str, str], list[Thing]] = {}
    for t in scene.things:
        kinds.setdefault((t.shape, t.colour, t.size), []).append(t)
    words: list[str] = []
    before: list[Thing] = []
    for kind, group in list(kinds.items())[:3]:
        joint = _joint(next(iter(_relations(before, group)), None)).split() if before else []
        words += [*joint, *_phrase(*kind, len(group)).split()]
        before = group
    tail = ["and", "a", scene.things[3].shape] if len(kinds) > 3 and len(words) + 3 <= MAX_WORDS else ["on", scene.background]
    return " ".join(fix_articles(words + tail))


def _told(scene: Scene, error: float, rng: random.Random) -> dict[tuple[str, str | None, str | None], list[Thing]]:
    """What a writer says of some of the objects, in any order: (shape, colour, size), possibly wrong; like objects together."""
    many = rng.choices((1, 2, 3), (0.05, 0.75, 0.2))[0]
    told: dict[tuple[str, str | None, str | None], list[Thing]] = {}
    for thing in rng.sample(scene.things, min(many, len(scene.things))):
        shape = _maybe_other(thing.shape, SHAPES, error, rng)
        colour = _maybe_other(thing.colour, COLOURS, error, rng) if rng.random() < 0.9 else None
        size = _maybe_other(thing.size, SIZES, error, rng) if rng.random() < 0.55 else None
        told.setdefault((shape, colour, size), []).append(thing)
    return told


def _write(scene: Scene, rng: random.Random) -> list[str]:
    error = ERROR if rng.random() < CARELESS else 0.0
    words: list[str] = []
    before: list[Thing] = []
    for (shape, colour, size), group in _told(scene, error, rng).items():
        count = _maybe_other(len(group), NUMBERS.values(), error, rng) if len(group) > 1 else 1
        relations = _relations(before, group)
        relation = rng.choice(relations) if relations and rng.random() < 0.7 else None
        if before:
            words += _joint(_maybe_other(relation, (relation, OPPOSITES[relation]), error, rng) if relation else None, rng).split()
        elif rng.random() < 0.1:
            words += ["there", "are" if count > 1 else "is"]
        words += _phrase(shape, colour, size, count).split()
        before = group
    if rng.random() < 0.45:
        words += ["on", _maybe_other(scene.background, BACKGROUNDS, error, rng)]
    words = fix_articles(words)
    return _slip(words, rng) if rng.random() < SLIP else words


def write_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as found on the web, of at most 18 words: it leaves out objects, sizes, colours and places, and now and then stumbles.

    Most writers get everything right that they tell; the careless ones err on half of it.
    """
    while len(words := _write(scene, rng)) > MAX_WORDS:
        pass
    return " ".join(words)


def swap_fact(caption: str, scene: Scene, rng: random.Random) -> str | None:
    """The caption with one true fact made false by another word of the same kind, all else alike; None if there is no such fact."""
    words, before = words_of(caption), check(caption, scene)
    true = [fact for fact, ok in verdicts(caption, scene) if ok]
    for fact in rng.sample(true, len(true)):
        others = [w for w in _alternatives(words[fact.at]) if w != words[fact.at]]
        for word in rng.sample(others, len(others)):
            swapped = " ".join(fix_articles([*words[: fact.at], word, *words[fact.at + 1 :]]))
            after = check(swapped, scene)
            alike = after.told == before.told and after.fluency == before.fluency and _different(swapped) == _different(caption)
            if after.accuracy < before.accuracy and alike:
                return swapped
    return None


def _different(caption: str) -> int:
    """Different words: a caption that says one twice can be told from its copy without the image."""
    return len(set(words_of(caption)) - {"a", "an"})


def _alternatives(word: str) -> list[str]:
    if word in OPPOSITES:
        return [OPPOSITES[word]]
    return next(list(t) for t in (SHAPES, SINGULARS, COLOURS, SIZES, NUMBERS, BACKGROUNDS) if word in t)


# Looking at it


def contact_sheet(scenes: Sequence[Scene], captions: Sequence[str], path: str, columns: int = 4) -> None:
    """PNG of scenes with a caption each and its quality."""
    from matplotlib import pyplot as plt

    rows = math.ceil(len(scenes) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 3.5 * rows), squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, wspace=0.03, hspace=0.03)
    for axis in axes.flat:
        axis.axis("off")
    for axis, scene, caption in zip(axes.flat, scenes, captions, strict=False):
        axis.imshow(render(scene), interpolation="nearest")
        q = check(caption, scene)
        axis.text(0, -2, f"accuracy {q.accuracy:.2f}   utility {q.utility:.2f}", fontsize=9, color="#777")
        axis.text(-0.5, 66, "\n".join(textwrap.wrap(caption, 31)), va="top", fontsize=10)
        axis.set(xlim=(-2, 66), ylim=(84, -8))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw scenes with captions and their truth.")
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("--show", type=int, default=16, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    args = parser.parse_args()
    scenes = [sample_scene(args.seed, args.split, i) for i in range(args.show)]
    captions = [write_caption(scene, random.Random(seed_of(args.seed, "caption", i))) for i, scene in enumerate(scenes)]
    contact_sheet(scenes, captions, args.out)


if __name__ == "__main__":
    main()
