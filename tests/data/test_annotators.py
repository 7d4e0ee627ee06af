import random
from collections import Counter
from statistics import mean

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.data.annotators import Annotator, Choice, panel
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import Scene, Thing, check, describe, sample_scene, swap_fact, write_caption

SCENE = Scene("snow", (Thing("star", "red", "large", 0), Thing("ring", "blue", "small", 10)))
GOOD = describe(SCENE)
SURE = Annotator("sure", noise=0.0, lapse=0.0)


def _pairs(n: int) -> list[tuple[Scene, str, str]]:
    """Captions of moderate quality: two people's, some of them with one more mistake."""
    pairs = []
    for i in range(n):
        scene, rng = sample_scene(0, "val", i), random.Random(i)
        a, b = ((swap_fact(c, scene, rng) if rng.random() < 0.3 else None) or c for c in (write_caption(scene, rng) for _ in range(2)))
        pairs.append((scene, a, b))
    return pairs


PAIRS = _pairs(700)


def _choices(raters: list[Annotator], seed: int) -> list[Choice]:
    rng = random.Random(seed)
    return [rng.choice(raters).compare(*pair, rng) for pair in PAIRS]


def test_panel_replays_and_its_members_differ():
    assert panel(0) == panel(0)
    assert panel(0) != panel(1)
    assert len({rater.noise for rater in panel(0)}) == 8
    assert panel(0)[0].compare(*PAIRS[0], random.Random(5)) == panel(0)[0].compare(*PAIRS[0], random.Random(5))


@pytest.mark.parametrize(
    ("a", "b", "choice", "reasons"),
    [
        (GOOD, "a red star and a blue star", "a", ("accuracy", "specificity")),
        ("a blue star", GOOD, "b", ("accuracy", "specificity")),
        (GOOD, "a large star", "a", ("specificity",)),
        ("a red star above above a blue ring", "a red star above a blue ring", "b", ("fluency",)),
        (GOOD, GOOD, "tie", ()),
        ("a green heart", "a small circle", "both_bad", ("accuracy",)),
    ],
)
def test_choice_of_a_rater_without_noise(a: str, b: str, choice: str, reasons: tuple[str, ...]):
    result = SURE.compare(SCENE, a, b, random.Random(0))
    assert result.choice == choice
    assert set(result.reasons) == set(reasons)


def test_raters_agree_with_each_other_and_with_the_truth_as_people_do():
    raters = panel(0)
    first, second = _choices(raters[:4], 1), _choices(raters[4:], 2)
    truth = [check(a, s).utility - check(b, s).utility for s, a, b in PAIRS]
    right = [(c.choice == "a") == (t > 0) for c, t in zip(first, truth, strict=True) if c.choice in ("a", "b") and t != 0]
    sides = [(c.choice, o.choice) for c, o in zip(first, second, strict=True) if {c.choice, o.choice} <= {"a", "b"}]
    assert 0.67 <= mean(c == o for c, o in sides) <= 0.77
    assert 0.78 <= mean(right) <= 0.87
    share = Counter(c.choice for c in first)
    assert 0.08 <= share["tie"] / len(first) <= 0.16
    assert abs(share["a"] - share["b"]) < 0.1 * len(first)


def test_length_bias_prefers_longer_captions():
    def longer(length_bias: float) -> float:
        rng = random.Random(0)
        won = [rng.choice(panel(0, length_bias=length_bias)).compare(*pair, rng).choice for pair in PAIRS[:300]]
        gaps = [len(a.split()) - len(b.split()) for _, a, b in PAIRS[:300]]
        return mean((c == "a") == (gap > 0) for c, gap in zip(won, gaps, strict=True) if c in ("a", "b") and gap)

    assert longer(0.1) > longer(0.0) + 0.15
