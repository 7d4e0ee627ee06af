"""The language of the scenes' captions: what any string says, and how far it is from good grammar.

caption  = ["there is" | "there are"] mention {("and" | relation) mention} ["on" background]
mention  = ("a" | "an" | number) [size] [colour] shape
relation = "above" | "below" | ["to the"] "left of" | ["to the"] "right of"
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np

Kind = Literal["shape", "colour", "size", "count", "relation", "background"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
SIZES = ("small", "large")
BACKGROUNDS = ("snow", "sand", "grass", "water", "slate")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
PLURALS = {s: s + ("es" if s.endswith("s") else "s") for s in SHAPES}
SINGULARS = {p: s for s, p in PLURALS.items()}
NUMBERS = {"two": 2, "three": 3, "four": 4}
OPPOSITES = {"above": "below", "below": "above", "left": "right", "right": "left"}


@dataclass(frozen=True)
class Mention:
    count: int
    shape: str
    colour: str | None
    size: str | None
    at: int
    """Index of the shape's word; the words of colour, size and count stand before it."""
    start: int


@dataclass(frozen=True)
class Fact:
    """One thing that a caption says: `value` of the `subject`-th mention (of each of its copies), or of the scene (-1)."""

    kind: Kind
    value: str
    subject: int = -1
    copy: int = 0
    at: int = 0
    """Index of the word that says it."""


@dataclass(frozen=True)
class Reading:
    mentions: tuple[Mention, ...]
    facts: tuple[Fact, ...]
    fluency: float


def words_of(caption: str) -> list[str]:
    """Lower-case words; a full stop, commas and the like around them are dropped."""
    return [w for raw in caption.lower().split() if (w := raw.strip(".,;:!?\"'"))]


def _mention(words: Sequence[str], at: int, floor: int) -> Mention:
    """The mention whose noun stands at `at`, with the adjectives right before it, after index `floor`."""
    found: dict[str, str] = {}
    start = at
    for table, kind in ((COLOURS, "colour"), (SIZES, "size"), (NUMBERS, "count")):
        if start > floor and words[start - 1] in table:
            start -= 1
            found[kind] = words[start]
    count = NUMBERS[found["count"]] if "count" in found else 1
    return Mention(count, SINGULARS.get(words[at], words[at]), found.get("colour"), found.get("size"), at, start)


def _facts(words: Sequence[str], mentions: Sequence[Mention]) -> Iterator[Fact]:
    for i, m in enumerate(mentions):
        sized = m.at - 1 - (m.colour is not None)
        for copy in range(m.count):
            yield Fact("shape", m.shape, i, copy, m.at)
            if m.colour:
                yield Fact("colour", m.colour, i, copy, m.at - 1)
            if m.size:
                yield Fact("size", m.size, i, copy, sized)
        if m.count > 1:
            yield Fact("count", words[m.start], i, 0, m.start)
        following = mentions[i + 1].start if i + 1 < len(mentions) else m.at
        told = {words[at]: at for at in range(m.at + 1, following) if words[at] in OPPOSITES}
        for relation, at in told.items():
            yield Fact("relation", relation, i, 0, at)
    for place in sorted(set(words) & set(BACKGROUNDS)):
        yield Fact("background", place, at=words.index(place))


@lru_cache(maxsize=100_000)
def read(caption: str) -> Reading:
    """Mentions, facts and fluency of any string. An adjective without a noun tells nothing."""
    words = words_of(caption)
    mentions: list[Mention] = []
    for at, word in enumerate(words):
        if word in PLURALS or word in SINGULARS:
            mentions.append(_mention(words, at, mentions[-1].at + 1 if mentions else 0))
    kinds = [(m.count, m.shape, m.colour, m.size) for m in mentions]
    slips = _edits(words) + len(kinds) - len(set(kinds))
    fluency = min(0.6**slips, max(0.0, 1 - slips / len(words))) if words else 0.0
    return Reading(tuple(mentions), tuple(_facts(words, mentions)), fluency)


# The grammar as an automaton: state -> {word class: next state}

VOWEL = {c for c in COLOURS if c[0] in "aeiou"}
CLASSES: dict[str, set[str]] = {
    "size": set(SIZES),
    "colour": set(COLOURS) - VOWEL,
    "vowel": VOWEL,
    "shape": set(SHAPES),
    "shapes": set(SINGULARS),
    "number": set(NUMBERS),
    "vertical": {"above", "below"},
    "side": {"left", "right"},
    "background": set(BACKGROUNDS),
} | {w: {w} for w in ("a", "an", "and", "there", "is", "are", "on", "to", "the", "of")}
ONE, MANY = {"a": "a", "an": "an"}, {"number": "number"}
GRAMMAR: dict[str, dict[str, str]] = {
    "start": {"there": "there", **ONE, **MANY},
    "there": {"is": "is", "are": "are"},
    "is": ONE,
    "are": MANY,
    "a": {"size": "one size", "colour": "one colour", "shape": "end"},
    "an": {"vowel": "one colour"},
    "one size": {"colour": "one colour", "vowel": "one colour", "shape": "end"},
    "one colour": {"shape": "end"},
    "number": {"size": "many size", "colour": "many colour", "vowel": "many colour", "shapes": "end"},
    "many size": {"colour": "many colour", "vowel": "many colour", "shapes": "end"},
    "many colour": {"shapes": "end"},
    "end": {"and": "joined", "vertical": "joined", "side": "side", "to": "to", "on": "on"},
    "to": {"the": "the"},
    "the": {"side": "side"},
    "side": {"of": "joined"},
    "joined": {**ONE, **MANY},
    "on": {"background": "done"},
    "done": {},
}
STATES = {s: i for i, s in enumerate(GRAMMAR)}
ACCEPTING = [STATES["end"], STATES["done"]]


@cache
def _moves() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Cost of each move between states: by reading a word (0, or 1 if it is another's place) and by inserting missing words."""
    step = np.full((len(STATES), len(STATES)), np.inf)
    for state, edges in GRAMMAR.items():
        step[STATES[state], [STATES[t] for t in edges.values()]] = 1
    insert = step.copy()
    np.fill_diagonal(insert, 0)
    for k in range(len(STATES)):
        insert = np.minimum(insert, insert[:, [k]] + insert[[k]])
    stay = np.where(np.eye(len(STATES)) > 0, 1.0, step)  # a word is deleted, or read as another
    moves = {"": stay}
    for name, members in CLASSES.items():
        cost = stay.copy()
        for state, edges in GRAMMAR.items():
            if name in edges:
                cost[STATES[state], STATES[edges[name]]] = 0
        moves |= dict.fromkeys(members, cost)
    return moves, insert


def _edits(words: Sequence[str]) -> int:
    """Fewest words to insert, delete or replace until the caption is grammatical."""
    moves, insert = _moves()
    cost = insert[STATES["start"]]
    for word in words:
        cost = (cost[:, None] + moves.get(word, moves[""])).min(0)
        cost = (cost[:, None] + insert).min(0)
    return int(cost[ACCEPTING].min())


def fix_articles(words: list[str]) -> list[str]:
    """The same words with each "a" or "an" as the next word wants it."""
    return [("an" if nxt in VOWEL else "a") if w in ("a", "an") else w for w, nxt in zip(words, [*words[1:], ""], strict=True)]
