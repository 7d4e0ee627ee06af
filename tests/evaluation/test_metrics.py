import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from hierarchical_diffusion_rlhf_caption_refinement.evaluation import metrics
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.java_metrics import java_scores
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.metrics import Interval, tokenize

WORDS = "a the dog cat man woman red blue runs sits on in grass snow ball with is and two".split()  # noqa: SIM905


def random_captions(rng: random.Random, count: int, refs: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions over few words, so that n-grams meet and ties in length occur; one candidate is empty, one a copy of a reference."""

    def caption(least: int = 1) -> list[str]:
        return rng.choices(WORDS, k=rng.randint(least, 12))

    references = [[caption() for _ in range(rng.randint(1, refs))] for _ in range(count)]
    candidates = [caption() for _ in range(count)]
    candidates[0], candidates[1] = [], list(references[1][0])
    return candidates, references


def real_captions(folder: Path, count: int = 200) -> tuple[list[list[str]], list[list[list[str]]]]:
    """One caption of each image against the other four."""
    with (folder / "captions.jsonl").open(encoding="utf-8") as file:
        rows = [[tokenize(c) for c in json.loads(line)["captions"]] for _, line in zip(range(count), file, strict=False)]
    return [row[i % 5] for i, row in enumerate(rows)], [[c for j, c in enumerate(row) if j != i % 5] for i, row in enumerate(rows)]


def bleu(candidates: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    return metrics.bleu_of(metrics.bleu_counts(candidates, references).sum(0))


def assert_like_pycocoevalcap(candidates: list[list[str]], references: list[list[list[str]]]) -> None:
    theirs = pytest.importorskip("pycocoevalcap.bleu.bleu")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    res = {i: [" ".join(c)] for i, c in enumerate(candidates)}
    gts = {i: [" ".join(r) for r in refs] for i, refs in enumerate(references)}
    assert bleu(candidates, references) == pytest.approx(theirs.Bleu(4).compute_score(gts, res, verbose=0)[0], abs=1e-9)
    for measure, scorer in ((metrics.cider_d, cider.Cider()), (metrics.rouge_l, rouge.Rouge())):
        each, (expected, per_image) = measure(candidates, references), scorer.compute_score(gts, res)
        assert each.mean() == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(each, per_image, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_pycocoevalcap_on_random_captions(seed: int) -> None:
    rng = random.Random(seed)
    assert_like_pycocoevalcap(*random_captions(rng, rng.randint(2, 40), 5))


def test_scores_equal_pycocoevalcap_on_real_captions(flickr8k: Path) -> None:
    candidates, references = real_captions(flickr8k)
    assert_like_pycocoevalcap(candidates, references)
    assert metrics.cider_d(candidates, references).mean() > 0.5


def test_tokens_equal_the_java_tokenizer(flickr8k: Path) -> None:
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if not shutil.which("java"):
        pytest.skip("no java")
    with (flickr8k / "captions.jsonl").open(encoding="utf-8") as file:
        captions = [c for _, line in zip(range(400), file, strict=False) for c in json.loads(line)["captions"]]
    expected = ptb.PTBTokenizer().tokenize({i: [{"caption": c}] for i, c in enumerate(captions)})
    assert [" ".join(tokenize(c)) for c in captions] == [expected[i][0] for i in range(len(captions))]


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A Dog , running.", ["a", "dog", "running"]),
        ("The dog's tail isn't wagging; it can’t!", ["the", "dog", "'s", "tail", "is", "n't", "wagging", "it", "ca", "n't"]),
        ('The boys\' "t-shirts" cost $5.00 -- each...', ["the", "boys", "t-shirts", "cost", "$", "5.00", "each"]),
        ("Mr. Smith cannot see 1,000 U.S. flags", ["mr.", "smith", "can", "not", "see", "1,000", "u.s.", "flags"]),
        ("man,woman and (two) 10-year-old boys", ["man", "woman", "and", "-lrb-", "two", "-rrb-", "10-year-old", "boys"]),
        ("they're naïve, he'll go", ["they", "'re", "naïve", "he", "'ll", "go"]),
        (" . ", []),
    ],
)
def test_tokenize(caption: str, tokens: list[str]) -> None:
    assert tokenize(caption) == tokens


def test_a_copy_of_the_only_reference_scores_highest() -> None:
    texts = ["a dog runs in the snow", "two men sit on a red bench", "the woman throws a ball to her child"]
    captions = [tokenize(t) for t in texts]
    references = [[c] for c in captions]
    assert bleu(captions, references) == pytest.approx([1.0] * 4)
    assert metrics.cider_d(captions, references) == pytest.approx([10.0] * 3)
    assert metrics.rouge_l(captions, references) == pytest.approx([1.0] * 3)
    strangers = [["zebra"] * 7] * 3
    assert not metrics.cider_d(strangers, references).any() and not metrics.rouge_l(strangers, references).any()
    assert bleu(strangers, references)[0] < 1e-9


def test_rarity_of_a_larger_set_makes_one_image_worth_scoring() -> None:
    train = [[tokenize("a dog runs"), tokenize("a brown dog")], [tokenize("a cat sleeps")], [tokenize("a red bird")]]
    idf = metrics.rarity(train)
    grams = ("a",), ("dog",), ("a", "cat"), ("a", "brown", "dog"), ("zebra",), ("a", "dog", "runs", "away")
    assert [idf(gram) for gram in grams] == pytest.approx([0.0, *[math.log(3)] * 5])
    captions, references = [tokenize("a dog runs in the snow"), tokenize("a cat runs")], [train[0], train[1]]
    own, alone = metrics.cider_d(captions, references), metrics.cider_d(captions, references, metrics.rarity(references))
    assert own.mean() == alone.mean() > 0
    assert metrics.cider_d(captions[:1], references[:1])[0] == 0 < metrics.cider_d(captions[:1], references[:1], idf)[0]
    # "a dog" against "a dog runs": one of two words counts, and one of two bigrams; a bigram less, as long as its own
    expected = 10 * (1 / 2**0.5 + 1 / 2**0.5) / 4 * math.exp(-1 / 72)
    assert metrics.cider_d([tokenize("a dog")], [[tokenize("a dog runs")]], idf)[0] == pytest.approx(expected)


def test_bleu_by_hand() -> None:
    # the the the: clipped to 2 of 3 unigrams, no bigram; as long as the reference of length 3, which is nearer than the one of 7
    refs = [["the", "cat", "the"], ["there", "is", "a", "cat", "on", "the", "mat"]]
    assert bleu([["the", "the", "the"]], [refs])[0] == pytest.approx(2 / 3)
    # a perfect prefix of half the length pays exp(1 - 6/3)
    short = bleu([["a", "b", "c"]], [[["a", "b", "c", "d", "e", "f"]]])
    assert short[:3] == pytest.approx([math.exp(-1)] * 3) and short[3] < 0.02


def test_rouge_by_hand() -> None:
    # common: a, c, e = 3 of 3 and 3 of 5
    score = metrics.rouge_l([["a", "c", "e"]], [[["a", "b", "c", "d", "e"]]])[0]
    assert score == pytest.approx((1 + 1.44) * 1 * 0.6 / (0.6 + 1.44 * 1))


def test_statistics_of_the_text() -> None:
    captions = [tokenize(t) for t in ("a dog dog runs", "the cat in the", "a man with a hat and a man", "a red bird sings")]
    assert metrics.repetition(captions) == 0.5  # dog dog; man ... man
    assert metrics.repetition([tokenize("one of the dogs on one of the bikes")]) == 1  # of the ... of the
    assert metrics.repetition([tokenize("a boy in a hat")]) == 0  # function words may come again
    assert metrics.bad_endings([*captions, []]) == 0.4
    assert metrics.distinct_n([["a", "b", "a"], ["a", "b"]], 1) == 2 / 5
    assert metrics.distinct_n([["a", "b", "a"], ["a", "b"]], 2) == 2 / 3
    assert metrics.distinct_n([["a"]], 2) == metrics.repetition([]) == metrics.bad_endings([]) == 0


def test_specificity_counts_different_content_words_by_how_rare_they_are() -> None:
    references = [[["a", "dog"], ["the", "dog", "runs"]], [["a", "dog"]], [["a", "cat"]], [["a", "bird"]]]
    found = metrics.specificity([["a", "dog", "dog"], ["a", "cat", "runs"], ["the", "of"], ["unicorn"]], references)
    np.testing.assert_allclose(found, [math.log(2), 2 * math.log(4), 0, math.log(4)])
    assert metrics.specificity([["a"], []], references).tolist() == [0.0, 0.0]  # a model that says nothing


def test_intervals_of_a_set_measure_come_from_resampled_images() -> None:
    candidates, references = random_captions(random.Random(0), 200, 5)
    counts = metrics.bleu_counts(candidates, references)
    found = metrics.bootstrap_sums(counts, lambda total: metrics.bleu_of(total)[0])
    assert found.value == bleu(candidates, references)[0] and found.low < found.value < found.high
    ratio = metrics.bootstrap_sums(np.stack([np.arange(100.0), np.ones(100)], 1), lambda t: float(t[0] / t[1]))
    plain = metrics.bootstrap(np.arange(100.0))
    assert (ratio.value, ratio.high - ratio.low) == (plain.value, pytest.approx(plain.high - plain.low, rel=0.1))


@pytest.mark.slow
def test_meteor_is_there_with_java_and_silently_absent_without(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = [["a", "dog", "runs"], ["a", "man", "sits"]]
    references = [[["a", "dog", "runs"]], [["two", "cats", "sleep"]]]
    if shutil.which("java"):
        pytest.importorskip("pycocoevalcap")
        assert 0.3 < java_scores(candidates, references)["meteor"] < 0.9
        assert java_scores(candidates, [[c] for c in candidates])["meteor"] > 0.95
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert java_scores(candidates, references) == {}


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        image = rng.normal(size=40)  # five values of one image share most of their spread
        values = (image[:, None] + 0.3 * rng.normal(size=(40, 5))).ravel()
        found = metrics.bootstrap(values, np.arange(40).repeat(5).tolist(), draws=300, seed=trial)
        assert found.low <= found.value <= found.high and found.value == pytest.approx(values.mean())
        covered += found.low <= 0 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_clusters_widen_the_interval_and_seeds_repeat_it() -> None:
    values = np.repeat(np.random.default_rng(1).normal(size=50), 10)
    names = [f"{i // 10}.jpg" for i in range(500)]
    rows, images = metrics.bootstrap(values), metrics.bootstrap(values, names)
    assert images.high - images.low > 2.5 * (rows.high - rows.low)  # sqrt(10) in the limit
    assert images == metrics.bootstrap(values, iter(names)) != metrics.bootstrap(values, names, seed=1)
    assert metrics.bootstrap(np.full(7, 0.25)) == Interval(0.25, 0.25, 0.25)
    assert math.isnan(metrics.bootstrap(np.array([])).value)
    normal = metrics.bootstrap(np.random.default_rng(2).normal(size=4000))
    assert normal.high - normal.low == pytest.approx(2 * 1.96 / math.sqrt(4000), rel=0.1)


def test_win_rates_of_both_sides_add_up() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(3, size=300), rng.integers(3, size=300)
    ours, theirs = metrics.win_rate(a, b), metrics.win_rate(b, a)
    assert [ours.value + theirs.value, ours.low + theirs.high, ours.high + theirs.low] == pytest.approx([1, 1, 1])
    assert metrics.win_rate(a, a) == Interval(0.5, 0.5, 0.5)
    assert metrics.win_rate(np.array([2.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 1.0])).value == 0.5


def test_calibration_error() -> None:
    probability = np.array([0.1, 0.1, 0.9, 0.9, 1.0])
    outcome = np.array([0, 0, 1, 0, 1])
    # bin 0.1: gap 0.1 x 2; bin 0.9 and above: mean 2.8/3 against 2/3, gap 0.8/3 x 3
    assert metrics.expected_calibration_error(probability, outcome) == pytest.approx((0.2 + 0.8) / 5)
    certain = np.random.default_rng(0).random(100_000)
    honest = np.random.default_rng(1).random(100_000) < certain
    assert metrics.expected_calibration_error(certain, honest) < 0.01
    assert metrics.expected_calibration_error(certain**4, honest) > 0.1
