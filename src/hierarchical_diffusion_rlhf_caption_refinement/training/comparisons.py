"""Comparisons for the reward stage: simulated raters judge the base model's captions of scenes, or people's are read, or their ratings.

Axes: n pairs, T caption length.
"""

import logging
import math
import posixpath
import random
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..data.annotators import panel
from ..data.corpus import Corpus
from ..data.preferences import (
    OTHER,
    OWN_CAPTION,
    Comparison,
    Rating,
    Record,
    flip,
    from_trl,
    ratings_to_comparisons,
    read_comparisons,
    read_ratings,
    split_by_image,
)
from ..data.scenes import swap_fact
from ..data.text import encode, pad
from ..evaluation.evaluate import write_captions
from ..evaluation.metrics import repeats, tokenize
from ..models.denoiser import DiffusionCaptionModel
from ..utils.config import Config, SamplerConfig
from ..utils.seeding import seed_of

HELD_OUT_PAIRS, TEST_PAIRS, SWAPS = 400, 1400, 3
"""Comparisons of scenes for choosing and calibrating, and for the report, each shown to two raters (at most as many as for training or
its learning curve); facts swapped per test scene."""
SHARES = (0.6, 0.2, 0.2)
"""Shares of the images that people's judgements of are for training, for choosing, and for the report."""
REPEAT_GROUP, REPEAT_TURNS = 4, 8
"""Captions drawn of an image in search of one that repeats itself and one that does not, and how many times at most."""
FEW_PAIRS = 20
"""Pairs that two people must have decided before how often they agree means anything."""
LABELS = {"a": 0, "b": 1, "tie": 2, "both_bad": 2}
PLANS = (SamplerConfig(steps=8, temperature=0.7), SamplerConfig(steps=8, temperature=0.2))
"""The two ways in which the captions of a pair are drawn. Both are close to what rollouts and readers will see: among hotter captions the
long ones are the wrong ones, and a reward model that learns this makes RLHF collapse to a few words."""


@dataclass(frozen=True)
class Pairs:
    """Comparisons as ids over one corpus."""

    corpus: Corpus
    comparisons: list[Comparison]
    rows: list[int]
    a: tuple[Int[Tensor, "n T"], Int[Tensor, " n"]]
    b: tuple[Int[Tensor, "n T"], Int[Tensor, " n"]]
    label: Int[Tensor, " n"]
    """0: a was preferred, 1: b, 2: neither."""
    reasons: Bool[Tensor, "n Q"]
    """Which quality spoke for the choice, in the order total (always), accuracy, fluency, specificity."""
    made: int = 0
    """The last so many are of captions that repeat themselves; nobody was asked about them."""

    @property
    def asked(self) -> int:
        return len(self) - self.made

    def __len__(self) -> int:
        return len(self.rows)

    def weights(self, even_sources: float) -> Float[Tensor, " n"]:
        """How much each counts, see `reward.even_sources`; 1 where there is one source."""
        sources = [c.provenance_a.get("source", "") for c in self.comparisons]
        size = Counter(sources)
        return torch.tensor([(len(sources) / len(size) / size[source]) ** even_sources for source in sources])

    def some(self, index: Sequence[int]) -> "Pairs":
        rows = list(index)
        a, b = ((x0[rows], length[rows]) for x0, length in (self.a, self.b))
        comparisons, images = [self.comparisons[i] for i in rows], [self.rows[i] for i in rows]
        return Pairs(self.corpus, comparisons, images, a, b, self.label[rows], self.reasons[rows], sum(i >= self.asked for i in rows))


@dataclass(frozen=True)
class Judgements:
    """All comparisons of the reward stage; no image is in two of train, val and test."""

    train: Pairs
    val: Pairs
    test: Pairs
    facts: Pairs | None
    """Pairs of test images that differ in one fact; only scenes have them."""
    rater_agreement: float
    """Rate at which a second rater makes the same choice, both having chosen a side."""
    smoothing: float
    """Share of flipped choices that explains it, by the images that are not for the report."""
    repeats: Pairs | None = None
    """Pairs of test images of which one caption repeats itself."""


def to_pairs(comparisons: Sequence[Comparison], corpus: Corpus) -> Pairs:
    """Comparisons that somebody answered, of images of this corpus."""
    kept = [c for c in comparisons if c.choice in LABELS and c.image in corpus.row_of]
    sides = (pad(encode(corpus.tokenizer, [getattr(c, side) for c in kept]), corpus.max_words) for side in ("a", "b"))
    a, b = ((x0, length.clamp(min=1)) for x0, length in sides)
    reasons = [[True, *(q in c.reasons for q in ("accuracy", "fluency", "specificity"))] for c in kept]
    label = torch.tensor([LABELS[c.choice] for c in kept], dtype=torch.long)
    return Pairs(corpus, kept, [corpus.row_of[c.image] for c in kept], a, b, label, torch.tensor(reasons, dtype=torch.bool).view(-1, 4))


def smoothing_from(agreement: float) -> float:
    """Share of flipped choices that explains how often two raters agree: p = (1 - e)^2 + e^2."""
    return 0.0 if math.isnan(agreement) else (1 - math.sqrt(max(2 * agreement - 1, 0.0))) / 2


def drawn_pairs(model: DiffusionCaptionModel, corpus: Corpus, count: int, seed: int) -> list[tuple[int, str, str]]:
    """(row, caption, other caption) of `count` pairs of different captions; several of an image once all images have one."""
    order = random.Random(seed_of(seed, "pairs")).sample(range(len(corpus)), len(corpus))
    pairs: list[tuple[int, str, str]] = []
    for turn in range(4 + 4 * count // len(corpus)):  # few images have only one caption
        rows = order[: max(count - len(pairs), 0) + 16]
        texts = [write_captions(model, corpus, rows, plan, seed_of(seed, turn, i)).texts for i, plan in enumerate(PLANS)]
        pairs += [(row, a, b) for row, a, b in zip(rows, *texts, strict=True) if a != b]
        if len(pairs) >= count:
            break
        order = order[len(rows) :] + order[: len(rows)]
    return pairs[:count]


def judged(pairs: Sequence[tuple[int, str, str]], corpus: Corpus, seed: int, judges: int = 1, length_bias: float = 0.0) -> list[Comparison]:
    """Each pair shown to `judges` different simulated raters, the sides at random; the truth itself is not recorded."""
    people, found = panel(seed, length_bias=length_bias), []
    for i, (row, first, second) in enumerate(pairs):
        rng = random.Random(seed_of(seed, "judge", i))
        a, b = (first, second) if rng.random() < 0.5 else (second, first)
        example = corpus.examples[row]
        assert example.scene is not None
        for person in rng.sample(people, judges):
            choice = person.compare(example.scene, a, b, rng)
            left: Literal["a", "b"] = "a" if rng.random() < 0.5 else "b"
            found.append(
                Comparison(
                    f"{i}-{person.name}", example.key, a, b, choice.choice, shown_left=left, annotator=person.name, reasons=choice.reasons
                )
            )
    return found


def fact_pairs(model: DiffusionCaptionModel, corpus: Corpus, config: Config, seed: int) -> list[tuple[int, str, str]]:
    """A caption and its copy with one true fact made false: the same grammar, the same length, only the image can tell."""
    written = write_captions(model, corpus, range(len(corpus)), config.sampler, seed)
    pairs = []
    for row, text in enumerate(written.texts):
        scene = corpus.examples[row].scene
        swapped = swap_fact(text, scene, random.Random(seed_of(seed, "swap", row))) if scene else None
        if swapped:
            pairs.append((row, text, swapped))
    return pairs


def agreement(pairs: Pairs) -> float:
    """Rate at which two raters of the same pair who both chose a side chose the same; nan where hardly a pair has two.

    A rater without a name is taken for another one each time.
    """
    by_pair: dict[tuple[str, str, str], dict[str, int]] = {}
    for i, (c, label) in enumerate(zip(pairs.comparisons, pairs.label.tolist(), strict=True)):
        by_pair.setdefault((c.image, c.a, c.b), {}).setdefault(c.annotator or str(i), label)
    first_two = [list(labels.values())[:2] for labels in by_pair.values() if len(labels) > 1]
    decided = [labels for labels in first_two if max(labels) < 2]
    return sum(x == y for x, y in decided) / len(decided) if len(decided) >= FEW_PAIRS else float("nan")


def repeating(model: DiffusionCaptionModel, corpus: Corpus, keys: Iterable[str], config: Config, count: int) -> list[Comparison]:
    """Up to `count` pairs of captions that rollouts would draw of these images: one says something twice, the other does not, and wins.

    People do not write such captions, so nobody rates them, and a reward model that has never seen one likes them for what they name twice.
    """
    rows, plan = sorted({corpus.row_of[key] for key in keys}), replace(config.sampler.plain, temperature=config.rlhf.temperature)
    found: list[Comparison] = []
    for turn in range(REPEAT_TURNS):
        if len(found) >= count or not rows:
            break
        texts = write_captions(model, corpus, rows, plan, seed_of(config.seed, "repeating", turn), group=REPEAT_GROUP).texts
        for i, row in enumerate(rows):
            drawn = texts[i * REPEAT_GROUP : (i + 1) * REPEAT_GROUP]
            once, twice = ([t for t in drawn if repeats(tokenize(t)) is again] for again in (False, True))
            if once and twice:
                key = corpus.examples[row].key
                pair = Comparison(f"{key}/{turn}", key, once[0], twice[0], "a", annotator="repetition", reasons=("fluency",))
                found.append(flip(pair) if len(found) % 2 else pair)
    return found[:count]


def simulated(config: Config, base: DiffusionCaptionModel, corpora: dict[str, Corpus]) -> Judgements:
    """Simulated raters compare the base model's captions of scenes; held-out pairs are shown to two of them."""
    seed, bias, most = config.seed, config.reward.length_bias, max(config.reward.comparisons, *config.reward.curve, 1)
    counts = {"train": (most, 1), "val": (min(HELD_OUT_PAIRS, most), 2), "test": (min(TEST_PAIRS, most), 2)}
    pairs: dict[str, Pairs] = {}
    for split, (count, judges) in counts.items():
        shown = drawn_pairs(base, corpora[split], count, seed_of(seed, "pairs", split))
        pairs[split] = to_pairs(judged(shown, corpora[split], seed_of(seed, "raters", split), judges, bias), corpora[split])
    swapped = [pair for swap in range(SWAPS) for pair in fact_pairs(base, corpora["test"], config, seed_of(seed, "swap", swap))]
    facts = to_pairs(judged(swapped, corpora["test"], seed_of(seed, "fact raters"), length_bias=bias), corpora["test"])
    noise = smoothing_from(agreement(pairs["val"]))
    return Judgements(pairs["train"], pairs["val"], pairs["test"], facts, agreement(pairs["test"]), noise)


def about(images: Container[str], records: Sequence[Record], what: str) -> list[Record]:
    """Ratings or comparisons of these images, ./a.png being a.png as in the data set's own rows; how many are of none of them is logged."""
    named = [r if r.image in images else replace(r, image=posixpath.normpath(r.image)) for r in records]
    kept = [r for r in named if r.image in images]
    if len(kept) < len(records):
        logging.getLogger(__name__).warning("%d of %d %s", len(records) - len(kept), len(records), what)
    return kept


def told_apart(comparisons: Sequence[Comparison], corpus: Corpus) -> list[Comparison]:
    """Without choices between captions that are one to the model, as far as it reads them; how many these are is logged."""
    texts = ([getattr(c, side) for c in comparisons] for side in ("a", "b"))
    a, b = ([ids[: corpus.max_words] for ids in encode(corpus.tokenizer, side)] for side in texts)
    kept = [c for c, x, y in zip(comparisons, a, b, strict=True) if x != y or c.choice not in OTHER]
    if same := len(comparisons) - len(kept):
        reason = "both captions are the same in the model's words (data.max_words at most)"
        logging.getLogger(__name__).warning("%d of %d comparisons left out: %s", same, len(comparisons), reason)
    return kept


def split_pairs(
    comparisons: Sequence[Comparison], base: DiffusionCaptionModel, corpus: Corpus, config: Config, agreed: Callable[[set[str]], float]
) -> Judgements:
    """Train (shuffled), val and test by image; captions that repeat themselves come last in train and val, and apart for the report.

    `agreed`: how often two raters of these images agree.
    """
    parts = split_by_image([c for c in comparisons if c.image in corpus.row_of], SHARES, config.seed)
    again = [repeating(base, corpus, (c.image for c in part), config, round(config.reward.repeats * len(part))) for part in parts]
    shuffled = random.Random(config.seed).sample(parts[0], len(parts[0]))
    train, val = (replace(to_pairs([*part, *made], corpus), made=len(made)) for part, made in ((shuffled, again[0]), (parts[1], again[1])))
    if 0 < (most := config.reward.comparisons) < train.asked:
        logging.getLogger(__name__).warning("using %d of %d comparisons for training (reward.comparisons)", most, train.asked)
    seen, unseen = ({c.image for part in some for c in part} for some in (parts[:2], parts[2:]))
    return Judgements(
        train, val, to_pairs(parts[2], corpus), None, agreed(seen | unseen), smoothing_from(agreed(seen)), to_pairs(again[2], corpus)
    )


def rated(config: Config, base: DiffusionCaptionModel, corpus: Corpus) -> Judgements:
    """Human ratings of captions of this corpus's images as comparisons, split by image; own captions of an image are left out."""
    ratings = about(corpus.row_of, read_ratings(Path(config.data.ratings)), "ratings name no test image of the data set")

    def agreed(images: set[str]) -> float:
        return rating_agreement([r for r in ratings if r.origin != OWN_CAPTION and r.image in images], config.seed)

    return split_pairs(told_apart(ratings_to_comparisons(ratings, config.seed), corpus), base, corpus, config, agreed)


def recorded(config: Config, base: DiffusionCaptionModel, corpora: dict[str, Corpus]) -> Judgements:
    """Comparisons that people made of captions of any of the data set's images, split by image, whatever split of the captions it is in."""
    path = Path(config.data.comparisons)
    found = from_trl(path) if path.name == "metadata.jsonl" else read_comparisons(path)
    keys = {key for corpus in corpora.values() for key in corpus.row_of}
    found = about(keys, found, "comparisons name no image of the data set")
    corpus = of_images(corpora, {c.image for c in found})
    found = told_apart(found, corpus)
    one_way = [c if c.a <= c.b else flip(c) for c in found]  # a second rater may have had them the other way round
    return split_pairs(found, base, corpus, config, lambda images: agreement(to_pairs([c for c in one_way if c.image in images], corpus)))


def of_images(corpora: dict[str, Corpus], keys: set[str]) -> Corpus:
    """One corpus of the images with these keys, from all splits."""
    parts = [(corpus, [row for key, row in corpus.row_of.items() if key in keys]) for corpus in corpora.values()]
    return replace(
        parts[0][0],
        examples=[corpus.examples[row] for corpus, rows in parts for row in rows],
        tokens=np.concatenate([corpus.tokens[rows] for corpus, rows in parts]),
        joint=torch.cat([corpus.joint[rows] for corpus, rows in parts]),
    )


def rating_agreement(ratings: Sequence[Rating], seed: int) -> float:
    """Rate at which one rater, drawn at random, orders two captions of an image as the mean of the others does, neither being tied."""
    rng = random.Random(seed_of(seed, "rating agreement"))
    by_image: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in ratings:
        if len(r.ratings) > 2:
            one, *others = rng.sample(r.ratings, len(r.ratings))
            by_image.setdefault((r.image, r.source), []).append((one, sum(others) / len(others)))
    signs = [((p[0] - q[0]) * (p[1] - q[1])) for found in by_image.values() for p, q in combinations(found, 2)]
    decided = [s > 0 for s in signs if s]
    return sum(decided) / len(decided) if decided else float("nan")
