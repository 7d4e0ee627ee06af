import json
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import (
    OWN_CAPTION,
    Comparison,
    Rating,
    flip,
    to_trl,
)
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import check
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import write_captions
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.metrics import repeats, tokenize
from hierarchical_diffusion_rlhf_caption_refinement.training import comparisons
from hierarchical_diffusion_rlhf_caption_refinement.training.comparisons import (
    agreement,
    drawn_pairs,
    fact_pairs,
    judged,
    rated,
    rating_agreement,
    recorded,
    repeating,
    simulated,
    to_pairs,
)


def comparison(index: int, choice: str, image: str = "val/0", a: str = "a red star", b: str = "a star", **more: object) -> Comparison:
    return replace(Comparison(str(index), image, a, b, "a"), choice=choice, **more)


def test_comparisons_become_ids_and_labels(world: Any) -> None:
    corpus = world.corpora["val"]
    rows = [
        comparison(0, "a", reasons=("fluency",)),
        comparison(1, "b", image="val/3"),
        comparison(2, "tie"),
        comparison(3, "both_bad", a="", reasons=("accuracy", "specificity")),
        comparison(4, "skip"),
        comparison(5, "a", image="elsewhere"),
    ]
    pairs = to_pairs(rows, corpus)
    assert pairs.label.tolist() == [0, 1, 2, 2] and pairs.rows == [0, 3, 0, 0] and len(pairs) == 4
    assert pairs.reasons.int().tolist() == [[1, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]]
    ids = corpus.tokenizer.encode("a red star", add_special_tokens=False).ids
    assert pairs.a[0][0].tolist() == ids + [0] * 9 and pairs.a[1].tolist() == [3, 3, 3, 1] and pairs.b[1].tolist() == [2] * 4
    head = pairs.some(range(2))
    assert len(head) == 2 and head.rows == [0, 3] and len(head.comparisons) == len(head.label) == len(head.a[0]) == 2
    assert len(to_pairs([], corpus)) == 0


def test_agreement_by_hand(world: Any) -> None:
    def rows(*choices: tuple[str, str]) -> list[Comparison]:
        return [comparison(i, c, a=f"a {'red ' * i}star") for i, pair in enumerate(choices) for c in pair]

    corpus, asked = world.corpora["val"], [("a", "a"), ("b", "b"), ("a", "b"), ("a", "tie"), ("tie", "tie")]
    assert agreement(to_pairs(rows(*asked * 10), corpus)) == pytest.approx(2 / 3)
    twice = [replace(c, annotator="one and the same") for c in rows(*asked * 10)]
    few = [agreement(to_pairs(found, corpus)) for found in ([comparison(0, "a")], rows(*asked * 6), twice)]
    assert all(rate != rate for rate in few)  # nan: 18 decided pairs say little, somebody's second look nothing


def test_drawn_pairs_differ_and_cover_the_images_first(world: Any) -> None:
    model, corpus = world.denoiser(), world.corpora["train"]
    pairs = drawn_pairs(model, corpus, 20, seed=1)
    assert len(pairs) == 20 == len({row for row, _, _ in pairs}) and all(a != b for _, a, b in pairs)
    assert pairs == drawn_pairs(model, corpus, 20, seed=1) != drawn_pairs(model, corpus, 20, seed=2)
    many = drawn_pairs(model, corpus, 60, seed=1)
    assert len(many) == len(set(many)) == 60 and {row for row, _, _ in many} == set(range(24))


def test_images_with_one_caption_alone_are_made_up_for_by_others(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other image has the same caption twice: fewer pairs than images, and still as many as asked for."""

    def written(model: Any, corpus: Any, rows: list[int], plan: Any, seed: int) -> Any:
        return SimpleNamespace(texts=[f"a {plan.temperature if row % 2 else 'star'} of {row}" for row in rows])

    monkeypatch.setattr(comparisons, "write_captions", written)
    monkeypatch.setattr(comparisons, "PLANS", (SimpleNamespace(temperature=1), SimpleNamespace(temperature=2)))
    corpus = world.corpora["train"]
    assert len(drawn_pairs(world.denoiser(), replace(corpus, examples=corpus.examples * 17), 70, seed=1)) == 70


def test_every_pair_is_shown_to_different_raters_with_the_sides_at_random(world: Any) -> None:
    corpus = world.corpora["val"]
    shown = [(i % 8, corpus.examples[i % 8].captions[0], "star") for i in range(80)]
    found = judged(shown, corpus, seed=0, judges=2)
    assert len(found) == 160 and all(
        x.annotator != y.annotator and (x.a, x.b) == (y.a, y.b) for x, y in zip(found[::2], found[1::2], strict=True)
    )
    assert len({c.id for c in found}) == 160 and len({c.annotator for c in found}) == 8
    assert 20 < sum(c.a == "star" for c in found[::2]) < 60
    decided = [c for c in found if c.choice in ("a", "b")]
    assert sum(getattr(c, c.choice) != "star" for c in decided) > 0.8 * len(decided)  # a whole caption is liked better
    assert found == judged(shown, corpus, seed=0, judges=2)


def test_raters_can_be_told_to_like_longer_captions(world: Any) -> None:
    corpus = world.corpora["val"]
    shown = [(i % 8, corpus.examples[i % 8].captions[0], corpus.examples[i % 8].captions[0] + " and a star") for i in range(160)]

    def longer(found: list[Comparison]) -> float:
        return sum(getattr(c, c.choice).endswith("and a star") for c in found if c.choice in ("a", "b")) / len(found)

    assert longer(judged(shown, corpus, seed=0, length_bias=0.2)) > 2 * longer(judged(shown, corpus, seed=0))
    config = replace(world.config, reward=replace(world.config.reward, length_bias=0.2))
    plain, biased = (simulated(c, world.denoiser(), world.corpora) for c in (world.config, config))
    assert plain.train.comparisons != biased.train.comparisons and plain.test.comparisons != biased.test.comparisons
    assert [(c.image, c.a, c.b) for c in plain.train.comparisons] == [(c.image, c.a, c.b) for c in biased.train.comparisons]


def test_fact_pairs_differ_in_one_word_that_only_the_image_tells(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = world.corpora["test"]
    texts = [example.captions[0] for example in corpus.examples]
    monkeypatch.setattr(comparisons, "write_captions", lambda *args: SimpleNamespace(texts=texts))
    pairs = fact_pairs(world.denoiser(), corpus, world.config, seed=0)
    assert len(pairs) >= 5
    for row, text, swapped in pairs:
        scene = corpus.examples[row].scene
        assert text != swapped and len(text.split()) == len(swapped.split())
        assert check(text, scene).accuracy > check(swapped, scene).accuracy
        assert check(text, scene).fluency == pytest.approx(check(swapped, scene).fluency)


def test_simulated_judgements_keep_images_apart(world: Any) -> None:
    config = replace(world.config, reward=replace(world.config.reward, comparisons=15, curve=(5,)))
    found = simulated(config, world.denoiser(), world.corpora)
    assert len(found.train) == 15 and len(found.val) == 30 and len(found.test) == 30
    assert {found.train.corpus.examples[0].key[:5], found.val.corpus.examples[0].key[:3]} == {"train", "val"}
    assert found.test.corpus is world.corpora["test"] and found.facts is not None
    assert found.rater_agreement != found.rater_agreement  # nan: fifteen pairs cannot tell
    again = simulated(config, world.denoiser(), world.corpora)
    assert again.train.comparisons == found.train.comparisons and torch.equal(again.test.label, found.test.label)


def test_of_captions_that_repeat_themselves_and_others_the_others_win(world: Any) -> None:
    config = replace(world.config, sampler=replace(world.config.sampler, order="left_to_right", beams=2))
    corpus, model = world.corpora["test"], world.denoiser()
    found = repeating(model, corpus, [e.key for e in corpus.examples[:6]], config, 9)
    assert 0 < len(found) <= 9 and {c.choice for c in found} == {"a", "b"}
    for c in found:
        won, lost = (c.a, c.b) if c.choice == "a" else (c.b, c.a)
        assert repeats(tokenize(lost)) and not repeats(tokenize(won)) and c.image in {e.key for e in corpus.examples[:6]}
    assert found == repeating(model, corpus, [e.key for e in corpus.examples[:6]], config, 9)
    assert repeating(model, corpus, [], config, 9) == repeating(model, corpus, ["test/0"], config, 0) == []


def test_rating_agreement_of_unanimous_and_of_guessing_raters() -> None:
    unanimous = [Rating("i", f"c{n}", (n, n, n), (0, 4)) for n in range(4)]
    assert rating_agreement(unanimous, 0) == 1
    tied = [Rating("i", f"c{n}", (2, 2, 2), (0, 4)) for n in range(3)]
    none = rating_agreement(tied, 0)
    assert none != none
    rng = random.Random(0)
    guesses = [Rating(str(i), c, tuple(rng.randrange(100) for _ in range(3)), (0, 99)) for i in range(400) for c in "xy"]
    assert rating_agreement(guesses, 0) == pytest.approx(0.5, abs=0.1)
    too_few = [Rating("i", "c", (1, 2), (0, 4)), Rating("i", "d", (3, 4), (0, 4))]
    assert rating_agreement(too_few, 0) != rating_agreement(too_few, 0)


def test_ratings_of_an_images_own_captions_say_nothing_of_how_far_raters_agree(world: Any, tmp_path: Path) -> None:
    """All agree about own captions, nobody about the others."""
    rng, own, others = random.Random(0), list[Rating](), list[Rating]()
    for example in world.examples["test"]:
        own += [Rating(example.key, f"a {'red ' * n}star", (n, n, n), (0, 9), origin=OWN_CAPTION) for n in range(9)]
        others += [Rating(example.key, f"a {'red ' * n}cross", tuple(rng.sample(range(10), 3)), (0, 9)) for n in range(6)]
    path = tmp_path / "ratings.jsonl"
    path.write_text("".join(json.dumps(asdict(rating)) + "\n" for rating in own + others))
    found = rated(replace(world.config, data=replace(world.config.data, ratings=str(path))), world.denoiser(), world.corpora["test"])
    assert found.rater_agreement == rating_agreement(others, 0) == pytest.approx(0.5, abs=0.15) and rating_agreement(own + others, 0) > 0.7
    assert {c.a.split()[-1] for c in found.train.comparisons} == {"cross"}


def test_what_is_said_of_no_image_of_the_data_set_is_counted(world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus, model = world.corpora["val"], world.denoiser()
    asked = ["val/0", "./val/0", "val/../val/1", "val/2", "elsewhere", "val/none"]

    def images(found: comparisons.Judgements) -> Counter[str]:
        return Counter(c.image for part in (found.train, found.val, found.test) for c in part.comparisons)

    said = [comparison(i, "a", image=image) for i, image in enumerate(asked)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in said))
    config = replace(world.config, data=replace(world.config.data, comparisons=str(tmp_path / "c.jsonl")))
    assert images(recorded(config, model, {"val": corpus})) == {"val/0": 2, "val/1": 1, "val/2": 1}
    assert caplog.messages == ["2 of 6 comparisons name no image of the data set"]
    ratings = [Rating(image, caption, (len(caption),), (0, 9)) for image in asked for caption in ("a star", "star")]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(asdict(rating)) + "\n" for rating in ratings))
    config = replace(world.config, data=replace(world.config.data, ratings=str(tmp_path / "r.jsonl")))
    assert images(rated(config, model, corpus)).keys() == {"val/0", "val/1", "val/2"}
    assert caplog.messages[1:] == ["4 of 12 ratings name no test image of the data set"]


def test_a_choice_between_captions_that_are_one_to_the_model_is_left_out(
    world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Equal, equal without marks, with other unknown words, and beyond data.max_words; such a tie stays."""
    corpus, same = world.corpora["val"], [("a star", "a star"), ("a star", "A star ."), ("a zebu", "a gnu")]
    same.append(("star " * corpus.max_words + "a", "star " * corpus.max_words + "red"))
    rows = [comparison(i, choice, a=a, b=b) for i, (a, b) in enumerate(same) for choice in ("a", "b", "tie")]
    different = [comparison(i, "a", image=f"val/{i}") for i in range(8)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in [*rows, *different]))
    data, reward = replace(world.config.data, comparisons=str(tmp_path / "c.jsonl")), replace(world.config.reward, comparisons=0)
    found = recorded(replace(world.config, data=data, reward=reward), world.denoiser(), {"val": corpus})
    kept = [c for part in (found.train, found.val, found.test) for c in part.comparisons]
    assert Counter(c.choice for c in kept) == {"a": 8, "tie": 4}
    reason = "both captions are the same in the model's words (data.max_words at most)"
    assert caplog.messages == [f"8 of 20 comparisons left out: {reason}"]
    ratings = [Rating("val/0", text, (n,), (0, 9)) for n, text in enumerate(("a star", "A star .", "a cross"))]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(asdict(rating)) + "\n" for rating in ratings))
    data = replace(world.config.data, ratings=str(tmp_path / "r.jsonl"))
    found = rated(replace(world.config, data=data, reward=reward), world.denoiser(), corpus)
    assert sum(map(len, (found.train, found.val, found.test))) == 2 and caplog.messages[1:] == [f"1 of 3 comparisons left out: {reason}"]


def test_how_many_of_peoples_comparisons_are_used_is_told(world: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = [comparison(i, "a", image=f"train/{i}") for i in range(24)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in said))
    config = replace(world.config, data=replace(world.config.data, comparisons=str(tmp_path / "c.jsonl")))
    for most in (0, 24, 5):
        found = recorded(replace(config, reward=replace(config.reward, comparisons=most)), world.denoiser(), world.corpora)
    assert 5 < len(found.train) < 24 and caplog.messages == [f"using 5 of {len(found.train)} comparisons for training (reward.comparisons)"]


def recordings(world: Any) -> list[Comparison]:
    """Two raters of a pair of every image of every split, the second with the sides exchanged; three of an image that is not there."""
    found = [comparison(0, "a", image="elsewhere")] * 3
    for i, key in enumerate(example.key for examples in world.examples.values() for example in examples):
        one = comparison(i, "b" if i % 3 else "tie", image=key, a=f"a {'red ' * (1 + i % 2)}star", annotator="one")
        found += [one, flip(replace(one, id=f"{i}'", annotator="two"))]
    return found


def test_recorded_comparisons_are_of_images_of_any_split_and_split_by_image(world: Any, tmp_path: Path) -> None:
    path, rows = tmp_path / "comparisons.jsonl", recordings(world)
    path.write_text("".join(json.dumps(asdict(c)) + "\n" for c in rows))
    config = replace(world.config, data=replace(world.config.data, comparisons=str(path)))
    found = recorded(config, world.denoiser(), world.corpora)
    parts = [found.train, found.val, found.test]
    images = [{c.image for c in part.comparisons} for part in parts]
    assert sum(map(len, images)) == len(set().union(*images)) == 42 and [len(p) for p in parts] == [2 * len(i) for i in images]
    assert min(map(len, images)) > 0 and len(images[0]) > 15 and "elsewhere" not in set().union(*images)
    assert {key.split("/")[0] for key in images[0]} == {"train", "val", "test"}
    assert found.facts is None and found.rater_agreement == 1
    assert (order := [int(c.id.strip("'")) for c in found.train.comparisons]) != sorted(order)  # the first ones are of all ages
    for part in parts:  # every pair goes with its own image
        for row, c in zip(part.rows, part.comparisons, strict=True):
            split, index = c.image.split("/")
            assert part.corpus.examples[row] is world.corpora[split].examples[int(index)]
            assert torch.equal(part.corpus.image([row]), world.corpora[split].image([int(index)]))
            assert torch.equal(part.corpus.joint[row], world.corpora[split].joint[int(index)])


def test_made_pairs_come_last_and_no_rater_of_the_report_s_images_is_learned_from(world: Any, tmp_path: Path) -> None:
    rows = recordings(world)
    config = replace(world.config, data=replace(world.config.data, comparisons=str(tmp_path / "c.jsonl")))
    config = replace(config, reward=replace(config.reward, repeats=0.2))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in rows))
    found = recorded(config, world.denoiser(), world.corpora)
    for part in (found.train, found.val):
        who = [c.annotator for c in part.comparisons]
        assert who[part.asked :] == ["repetition"] * part.made and "repetition" not in who[: part.asked]
    assert found.train.made == round(0.2 * found.train.asked) > 0 == found.test.made and found.repeats is not None
    assert found.rater_agreement == 1 and found.smoothing == 0
    reported = {c.image for c in found.test.comparisons}
    (tmp_path / "c.jsonl").unlink()
    other = {"a": "b", "b": "a", "tie": "tie"}
    contrary = [replace(c, choice=other[c.choice]) if c.annotator == "two" and c.image in reported else c for c in rows]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in contrary))
    found = recorded(config, world.denoiser(), world.corpora)
    assert found.rater_agreement < 0.9 and found.smoothing == 0 and {c.image for c in found.test.comparisons} == reported


def test_recorded_comparisons_may_be_a_data_set_of_trl(world: Any, tmp_path: Path) -> None:
    rows = recordings(world)
    count = to_trl(rows, tmp_path / "metadata.jsonl")
    data = replace(world.config.data, comparisons=str(tmp_path / "metadata.jsonl"))
    found = recorded(replace(world.config, data=data), world.denoiser(), world.corpora)
    decided = sum(map(len, (found.train, found.val, found.test)))
    assert 0 < decided == count - 3 == sum(c.choice in ("a", "b") for c in rows) - 3 and found.rater_agreement == 1
    assert {label for part in (found.train, found.val) for label in part.label.tolist()} == {0, 1}


def test_the_captions_of_a_pair_come_from_the_model(world: Any) -> None:
    model, corpus = world.denoiser(), world.corpora["val"]
    texts = write_captions(model, corpus, [0], replace(world.config.sampler, temperature=1.0), 0).texts
    words = {w for _, a, b in drawn_pairs(model, corpus, 8, seed=0) for w in (a + " " + b).split()}
    vocabulary = set(corpus.tokenizer.get_vocab()) - {"<pad>", "<unk>"}
    assert set(texts[0].split()) | words <= vocabulary
