import random

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.data.grammar import GRAMMAR, fix_articles, read, words_of


def test_facts_of_a_caption():
    told = read("two green stars above a small ring on sand").facts
    assert [(f.kind, f.value, f.subject, f.copy) for f in told] == [
        ("shape", "star", 0, 0),
        ("colour", "green", 0, 0),
        ("shape", "star", 0, 1),
        ("colour", "green", 0, 1),
        ("count", "two", 0, 0),
        ("relation", "above", 0, 0),
        ("shape", "ring", 1, 0),
        ("size", "small", 1, 0),
        ("background", "sand", -1, 0),
    ]
    words = words_of("two green stars above a small ring on sand")
    assert [words[f.at] for f in told] == ["stars", "green", "stars", "green", "two", "above", "ring", "small", "sand"]


def test_an_adjective_belongs_to_the_noun_right_after_it():
    assert [f.value for f in read("red a blue star").facts] == ["star", "blue"]
    assert read("a small red").facts == ()


@pytest.mark.parametrize(
    ("caption", "slips"),
    [
        ("a star", 0),
        ("there are two large orange hearts to the right of an orange heart", 0),
        ("Two stars, and a ring.", 0),
        ("a ring on on sand", 1),
        ("a ring on", 1),
        ("a orange ring", 1),
        ("a large ring and and small ring", 1),
        ("a red small ring", 1),
        ("a nice ring", 1),
        ("a ring a star", 1),
        ("two ring", 1),
        ("a ring and a ring and a ring", 2),
    ],
)
def test_each_slip_costs_forty_percent(caption: str, slips: int):
    n = len(words_of(caption))
    assert read(caption).fluency == pytest.approx(min(0.6**slips, 1 - slips / n))


def test_every_state_of_the_grammar_is_reached_and_leads_on():
    reached = {"start"} | {target for edges in GRAMMAR.values() for target in edges.values()}
    assert reached == set(GRAMMAR)
    assert [state for state, edges in GRAMMAR.items() if not edges] == ["done"]


def test_order_matters():
    rng, words = random.Random(0), ["a", "large", "red", "circle", "above", "a", "small", "green", "star", "on", "sand"]
    shuffled = [" ".join(rng.sample(words, len(words))) for _ in range(50)]
    assert sum(read(s).fluency for s in shuffled) / 50 < 0.15


def test_articles_follow_the_next_word():
    assert fix_articles(["an", "red", "star", "above", "a", "orange", "ring"]) == ["a", "red", "star", "above", "an", "orange", "ring"]
