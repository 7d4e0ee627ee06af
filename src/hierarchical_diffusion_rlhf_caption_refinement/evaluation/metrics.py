"""What captions and scores are worth in numbers: agreement with references, faults of the text, calibration, and how sure we can be.

A caption is a list of tokens throughout, as `tokenize` makes them. Axes: n captions, images or pairs.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Shaped

Tokens = Sequence[str]
Ngram = tuple[str, ...]
BETA = 1.2
"""How much more recall counts than precision in ROUGE-L, as in the COCO caption evaluation."""

_CLITIC = r"(?:n't|'(?:s|m|d|re|ve|ll))\b"
_SPLIT = re.compile(rf"(?<=\w)(?={_CLITIC})|(?<=\bcan)(?=not\b)|(?<=\bgon)(?=na\b)|(?<=\bwan)(?=na\b)")
_TOKEN = re.compile(rf"{_CLITIC}|\b(?:mrs?|ms|dr|st|jr)\.|(?:\b[^\W_]\.){{2,}}|\w+(?:[-./:]\w+|(?<=\d),\d+)*|[()#&%$=+*]")
_BRACKET = {"(": "-lrb-", ")": "-rrb-"}

_ARTICLES_PREPOSITIONS = ("a", "an", "the", "of", "to", "with", "in", "at", "for", "from", "into", "onto", "as")
_LINKS = ("and", "or", "is", "are", "was", "were", "his", "its", "their", "that", "which", "while", "who")
DANGLING = frozenset({*_ARTICLES_PREPOSITIONS, *_LINKS})
"""Words that a finished English caption hardly ends in; people end 0.08 % of Flickr8k's so."""
FUNCTION_WORDS = DANGLING | {"on", "by", "it", "he", "she", "they", "her", "him", "this", "there", "be", "'s"}
"""Words that a caption may well say twice."""


def tokenize(caption: str) -> list[str]:
    """Lower-cased Penn Treebank tokens without punctuation, as the COCO caption evaluation's Java tokenizer makes them.

    It splits `dog's` and `can't` and keeps `t-shirt` whole; on all but 6 of 38,973 different sentences of Flickr8k they are equal.
    """
    tokens: list[str] = _TOKEN.findall(_SPLIT.sub(" ", caption.lower().replace("’", "'")))
    return [_BRACKET.get(token, token) for token in tokens]


def _ngrams(tokens: Tokens, n: int) -> list[Ngram]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


# --- Agreement with references


def rarity(references: Sequence[Sequence[Tokens]]) -> Callable[[Ngram], float]:
    """log(images / images whose references use it) of n-grams up to four words; as if one did, where none does."""
    frequency = Counter(g for refs in references for g in {g for ref in refs for n in range(1, 5) for g in _ngrams(ref, n)})
    idf, unseen = {g: math.log(len(references) / count) for g, count in frequency.items()}, math.log(max(len(references), 1))
    return lambda gram: idf.get(gram, unseen)


def cider_d(
    candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], idf: Callable[[Ngram], float] | None = None
) -> Float[np.ndarray, " n"]:
    """CIDEr-D (Vedantam et al. 2015) of each image; `idf` is the `rarity` in these references unless given.

    Ten times the mean over n = 1..4 of the clipped tf-idf cosine, with a Gaussian penalty on the difference in length: 0 to 10.
    With the set's own rarity it depends on the whole set, and a single image scores 0.
    """
    idf = idf or rarity(references)

    @cache  # many captions may share their references
    def vectors(tokens: tuple[str, ...]) -> list[tuple[dict[Ngram, float], float]]:
        weights = [{g: count * idf(g) for g, count in Counter(_ngrams(tokens, n)).items()} for n in range(1, 5)]
        return [(w, math.sqrt(sum(v * v for v in w.values()))) for w in weights]

    def similarity(candidate: Tokens, reference: Tokens, own: list[tuple[dict[Ngram, float], float]]) -> float:
        total = 0.0
        for (a, norm_a), (b, norm_b) in zip(own, vectors(tuple(reference)), strict=True):
            shared = sum(min(value, b[g]) * b[g] for g, value in a.items() if g in b)
            total += shared / (norm_a * norm_b) if shared else 0.0
        # lengths are counted in bigrams, as the reference code does
        delta = max(len(candidate) - 1, 0) - max(len(reference) - 1, 0)
        return total / 4 * math.exp(-(delta**2) / (2 * 6.0**2))

    def score(candidate: Tokens, refs: Sequence[Tokens]) -> float:
        own = vectors(tuple(candidate))
        return 10 * sum(similarity(candidate, ref, own) for ref in refs) / len(refs)

    return np.array([score(c, refs) for c, refs in zip(candidates, references, strict=True)])


def bleu_counts(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Float[np.ndarray, "n 10"]:
    """Of each caption: matched n-grams for n = 1..4, guessed ones, its length, and that of the closest reference, the shorter of two."""
    rows = []
    for candidate, refs in zip(candidates, references, strict=True):
        correct, guessed = [], []
        for n in range(1, 5):
            most: Counter[Ngram] = Counter()
            for ref in refs:
                most |= Counter(_ngrams(ref, n))
            correct.append((Counter(_ngrams(candidate, n)) & most).total())
            guessed.append(max(len(candidate) - n + 1, 0))
        rows.append([*correct, *guessed, len(candidate), min((abs(len(r) - len(candidate)), len(r)) for r in refs)[1]])
    return np.array(rows, dtype=float).reshape(-1, 10)


def bleu_of(total: Float[np.ndarray, " 10"]) -> list[float]:
    """BLEU-1 to BLEU-4 (Papineni et al. 2002) of a set from the sum of its captions' counts."""
    length, target = total[8], total[9]
    precision = (total[:4] + 1e-15) / (total[4:8] + 1e-9)
    brevity = min(1.0, math.exp(1 - (target + 1e-9) / (length + 1e-15))) if length else 0.0
    return [float(np.prod(precision[:n]) ** (1 / n)) * brevity for n in range(1, 5)]


def _common_subsequence(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Float[np.ndarray, " n"]:
    """ROUGE-L (Lin 2004) of each image: F of the best precision and the best recall of the longest common subsequence."""

    def score(candidate: Tokens, refs: Sequence[Tokens]) -> float:
        common = [_common_subsequence(candidate, ref) for ref in refs]
        if not max(common):
            return 0.0
        precision = max(common) / len(candidate)
        recall = max(c / len(ref) for c, ref in zip(common, refs, strict=True) if ref)
        return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)

    return np.array([score(c, refs) for c, refs in zip(candidates, references, strict=True)])


# --- The text alone


def distinct_n(captions: Sequence[Tokens], n: int) -> float:
    """Different n-grams per n-gram of all captions together (Li et al. 2016); 0 without any. It falls as the set grows."""
    grams = [g for caption in captions for g in _ngrams(caption, n)]
    return len(set(grams)) / max(len(grams), 1)


def repeats(caption: Tokens) -> bool:
    pairs = _ngrams(caption, 2)
    content = [word for word in caption if word not in FUNCTION_WORDS]
    return any(a == b for a, b in pairs) or len(set(pairs)) < len(pairs) or len(set(content)) < len(content)


def repetition(captions: Sequence[Tokens]) -> float:
    """Share of captions with a word twice in a row, a bigram twice, or a content word twice.

    Not each is a fault (`a red shirt and a red hat`): people do it in 9.5 % of Flickr8k. Compare with the references' own share.
    """
    return sum(map(repeats, captions)) / max(len(captions), 1)


def bad_endings(captions: Sequence[Tokens]) -> float:
    """Share of captions that break off: they are empty or end in one of `DANGLING`."""
    return sum(not c or c[-1] in DANGLING for c in captions) / max(len(captions), 1)


def specificity(captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> Float[np.ndarray, " n"]:
    """Nats that each caption tells: the sum over its different content words of log(images / images whose references use the word)."""
    used = Counter(word for refs in references for word in {word for ref in refs for word in ref})
    told = (sum(math.log(len(references) / max(used[w], 1)) for w in set(c) - FUNCTION_WORDS) for c in captions)
    return np.fromiter(told, float)


# --- How sure we can be


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


def bootstrap(values: Shaped[np.ndarray, " n"], groups: Iterable[Hashable] | None = None, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean with its 95 % percentile interval. Values of one group (an image) are drawn together; without groups each is its own.

    All three are nan for no values.
    """
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    names = list(range(len(values)) if groups is None else groups)
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    member = [number[name] for name in names]
    sums, sizes = np.bincount(member, values.astype(float)), np.bincount(member)
    rng = np.random.default_rng(seed)
    picks = (rng.integers(len(sizes), size=len(sizes)) for _ in range(draws))
    means = [sums[pick].sum() / sizes[pick].sum() for pick in picks]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_sums(rows: Float[np.ndarray, "n k"], statistic: Callable[[Float[np.ndarray, " k"]], float], draws: int = 500) -> Interval:
    """A statistic of the sum of all images' rows, such as BLEU, with its 95 % percentile interval over resampled images."""
    rng = np.random.default_rng(0)
    values = [statistic(rows[rng.integers(len(rows), size=len(rows))].sum(0)) for _ in range(draws)]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(statistic(rows.sum(0)), float(low), float(high))


def win_rate(a: Shaped[np.ndarray, " n"], b: Shaped[np.ndarray, " n"]) -> Interval:
    """Share of the rows on which a scores above b, ties counted half, with its interval."""
    return bootstrap((a > b) + 0.5 * (a == b))


# --- Predicted probabilities


def expected_calibration_error(probability: Float[np.ndarray, " n"], outcome: Shaped[np.ndarray, " n"]) -> float:
    """Mean over all n of |mean probability - share of outcomes| in ten equally wide bins of probability (Naeini et al. 2015)."""
    at = np.minimum((probability * 10).astype(int), 9)
    gaps = np.bincount(at, probability - outcome.astype(float))
    return float(np.abs(gaps).sum() / len(probability))
