import random
from statistics import mean

import numpy as np
import pytest

from hierarchical_diffusion_rlhf_caption_refinement.data.grammar import CLASSES, PLURALS, read
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import (
    CELL,
    Scene,
    Thing,
    check,
    contact_sheet,
    describe,
    render,
    retrieval_ceiling,
    sample_scene,
    split_of,
    swap_fact,
    tellable,
    verdicts,
    write_caption,
)

SCENE = Scene("sand", (Thing("circle", "red", "large", 1), Thing("star", "green", "small", 6), Thing("star", "green", "large", 12)))
"""    . O . .      O a large red circle
    . . s .      s a small green star
    . . . .
    S . . .      S a large green star, on sand: 12 tellable facts
"""
SCENES = [sample_scene(0, "train", i) for i in range(500)]
VOCABULARY = sorted(set().union(*CLASSES.values()))
CAPTIONS = [write_caption(scene, random.Random(i)) for i, scene in enumerate(SCENES)]
QUALITIES = [check(caption, scene) for caption, scene in zip(CAPTIONS, SCENES, strict=True)]


def test_scenes_replay():
    assert sample_scene(0, "train", 7) == SCENES[7]
    assert sample_scene(1, "train", 7) != SCENES[7]
    assert write_caption(SCENES[7], random.Random(7)) == CAPTIONS[7]
    assert np.array_equal(render(SCENES[7]), render(SCENES[7]))


def test_splits_share_no_scene_across_seeds():
    for split in ("train", "val", "test"):
        assert {split_of(sample_scene(seed, split, i)) for seed in (0, 1) for i in range(50)} == {split}


def test_attributes_are_uniform_and_independent():
    things = [thing for scene in SCENES for thing in scene.things]
    pairs = np.zeros((8, 8))
    shapes, colours = sorted({t.shape for t in things}), sorted({t.colour for t in things})
    for t in things:
        pairs[shapes.index(t.shape), colours.index(t.colour)] += 1
    expected = len(things) / 64
    assert ((pairs - expected) ** 2 / expected).sum() < 104  # chi-square of 63 degrees of freedom, p > 0.001


@pytest.mark.parametrize(
    ("caption", "accuracy", "specificity", "fluency"),
    [
        ("a large red circle above a small green star on sand", 1, 8 / 12, 1),
        ("A large red circle above a small green star on sand.", 1, 8 / 12, 1),
        ("a red circle", 1, 2 / 12, 1),
        ("a blue circle", 1 / 2, 1 / 12, 1),
        ("a circle to the left of a small star", 1, 4 / 12, 1),
        ("a circle below a small star", 3 / 4, 3 / 12, 1),
        ("two green stars", 1, 4 / 12, 1),
        ("three green stars", 4 / 7, 4 / 12, 1),
        ("two large stars", 3 / 5, 3 / 12, 1),  # one star is small, so not two stars are large
        ("a large red heart below a green star", 4 / 6, 4 / 12, 1),  # the size counts: the colour tells which object is meant
        ("a large heart", 0, 0, 1),  # the size alone does not
        ("a large purple heart above a green star", 2 / 6, 2 / 12, 1),  # nor does a relation of nothing
        ("a green star on snow", 2 / 3, 2 / 12, 1),
        ("a red circle and a circle", 2 / 3, 2 / 12, 1),  # two mentions cannot claim one object
        ("a red circle and a red circle", 2 / 4, 2 / 12, 0.6),
        ("a red circle above above a green star", 1, 5 / 12, 0.6),
        ("a red circle above green star", 1, 5 / 12, 0.6),
        ("an red circle", 1, 2 / 12, 0.6),
        ("a red circle to the left of", 1, 2 / 12, 0.36),
        ("there is two green stars", 1, 4 / 12, 0.6),
        ("a red", 0, 0, 0.5),
        ("red circle star", 1, 3 / 12, 1 / 3),
    ],
)
def test_check_by_hand(caption: str, accuracy: float, specificity: float, fluency: float):
    quality = check(caption, SCENE)
    assert (quality.accuracy, quality.specificity, quality.fluency) == pytest.approx((accuracy, specificity, fluency))
    assert quality.utility == pytest.approx(fluency * accuracy * (0.4 + 0.6 * specificity**0.5))


def test_a_mention_is_one_object_throughout():
    row = Scene("snow", (Thing("star", "red", "small", 0), Thing("ring", "blue", "small", 5), Thing("star", "red", "large", 10)))
    told = verdicts("a large star above a ring", row)  # the large star is below the ring: either the size or the relation is wrong
    assert [ok for _, ok in told].count(False) == 1
    assert check("a star above a ring above a star", row).accuracy == 1


def test_descriptions_are_perfect():
    for scene in SCENES:
        text = describe(scene)
        quality = check(text, scene)
        assert len(text.split()) <= 18
        assert (quality.accuracy, quality.fluency) == (1, 1)
        assert quality.utility >= 0.95
        assert quality.specificity <= 1 <= tellable(scene) / 4


def test_written_captions_are_like_those_of_the_web():
    assert 0.82 <= mean(q.accuracy for q in QUALITIES) <= 0.87
    assert 0.97 <= mean(q.fluency for q in QUALITIES) <= 0.99
    assert 0.68 <= mean(q.utility for q in QUALITIES) <= 0.75
    assert 8 <= mean(len(c.split()) for c in CAPTIONS) <= 10
    assert max(len(c.split()) for c in CAPTIONS) <= 18
    assert retrieval_ceiling(SCENES[:60], CAPTIONS[:60]) >= 0.6


def test_vocabulary_covers_all_captions():
    assert set(" ".join([*CAPTIONS, *map(describe, SCENES)]).split()) <= set(VOCABULARY)
    assert len(VOCABULARY) == 48


@pytest.mark.parametrize(
    "garbage", ["", " ", ".", "☃ 图 é", "\x00\n", "a" * 10_000, "of of of", "two", "star " * 3000, "four stars above " * 500, "on"]
)
def test_any_string_can_be_judged(garbage: str):
    quality = check(garbage, SCENE)
    assert quality.utility <= 0.05
    assert quality.told == len(read(garbage).facts)


def test_tricks_do_not_pay():
    rng, words = random.Random(0), VOCABULARY

    def worth(trick) -> float:
        return mean(check(trick(scene), scene).utility for scene in SCENES[:200])

    honest, perfect = mean(q.utility for q in QUALITIES), worth(describe)
    assert worth(lambda s: " ".join(rng.choices(words, k=8))) < 0.03
    assert worth(lambda s: " ".join(f"{t.size} {t.colour} {t.shape}" for t in s.things)) < 0.55 * perfect  # keywords
    assert worth(lambda s: " and ".join(f"a {t.colour} {t.shape}" for t in (s.things[0],) * 3)) < 0.2  # repetition
    assert worth(lambda s: " and ".join(f"a {shape}" for shape in PLURALS)) < 0.35  # everything
    assert worth(lambda s: f"a {s.things[0].shape}") < honest - 0.05  # very short
    assert mean(check(c, s).utility for c, s in zip(CAPTIONS[1:], SCENES[:200], strict=False)) < 0.25  # another scene's caption


def test_swapped_fact_is_worse_and_nothing_else_changes():
    rng, swapped = random.Random(0), 0
    for caption, scene, before in zip(CAPTIONS[:200], SCENES, QUALITIES, strict=False):
        other = swap_fact(caption, scene, rng)
        if other is None:
            continue
        after = check(other, scene)
        assert after.accuracy < before.accuracy
        assert (after.told, after.fluency, len(other.split())) == (before.told, before.fluency, len(caption.split()))
        assert len({*other.split()} - {"a", "an"}) == len({*caption.split()} - {"a", "an"})
        assert 1 <= sum(a != b for a, b in zip(caption.split(), other.split(), strict=True)) <= 2  # 2: the article follows
        swapped += 1
    assert swapped > 180


def test_objects_stay_in_their_cells_and_can_be_seen():
    for scene in SCENES[:100]:
        full = np.asarray(render(scene), int)
        for i, thing in enumerate(scene.things):
            changed = Scene(scene.background, scene.things[:i] + scene.things[i + 1 :])
            bare = np.asarray(render(changed), int)
            row, col = divmod(thing.cell, 4)
            difference = np.abs(full - bare).max(-1) > 12  # beyond the noise
            inside = difference[row * CELL : (row + 1) * CELL, col * CELL : (col + 1) * CELL]
            assert inside.sum() == difference.sum()
            assert inside.sum() > (12 if thing.size == "small" else 55)


def test_every_pair_of_attributes_looks_different():
    def cell(shape: str, colour: str, size: str) -> np.ndarray:
        return np.asarray(render(Scene("slate", (Thing(shape, colour, size, 0),))), int)[:CELL, :CELL]

    looks = [cell(s, c, z) for s in PLURALS for c in ("red", "orange", "brown", "purple", "pink") for z in ("small", "large")]
    for i, a in enumerate(looks):
        assert all((np.abs(a - b).max(-1) > 25).sum() >= 8 for b in looks[:i])


def test_contact_sheet_is_written(tmp_path):
    contact_sheet(SCENES[:3], CAPTIONS[:3], str(tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").stat().st_size > 5_000
