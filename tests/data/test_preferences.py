import json
import random
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import (
    Comparison,
    PreferenceError,
    Rating,
    flip,
    from_trl,
    ratings_to_comparisons,
    read_comparisons,
    read_ratings,
    split_by_image,
    to_trl,
)

FULL = Comparison(
    "1", "dog.jpg", "a dog", "ein Häuschen, \"rot\"\nund blau", "b", "b", "ann", 3.5, ("accuracy", "fluency"),
    {"model": "base", "settings": {"steps": 8}}, {"model": "rlhf"}, -0.5, "2025-01-02T03:04:05+00:00",
)  # fmt: skip
BARE = Comparison("2", "cat.jpg", "a cat", "two cats", "both_bad")


def made(count: int, seed: int = 0) -> list[Comparison]:
    rng = random.Random(seed)
    return [
        Comparison(
            f"{i}", f"{rng.randrange(count // 3)}.jpg", f"caption {i}", f"other {i}", rng.choice(["a", "b", "tie", "both_bad", "skip"])
        )
        for i in range(count)
    ]


def rated(image: str, scores: dict[str, list[int]], scale: tuple[int, int] = (1, 4), origin: str = "human_other_image") -> list[Rating]:
    return [Rating(image, caption, tuple(ratings), scale, "people", origin) for caption, ratings in scores.items()]


# --- Files


def test_comparisons_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ann.jsonl"
    path.write_text("".join(json.dumps(asdict(c)) + "\n" for c in (FULL, BARE, flip(FULL))))
    assert read_comparisons(path) == [FULL, BARE, flip(FULL)]
    path.write_text(json.dumps(asdict(BARE) | {"id": None}))
    assert read_comparisons(path) == [replace(BARE, id="ann.jsonl:1")]


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "ann.jsonl"
    whole = [json.dumps(asdict(c)) for c in (FULL, BARE)]
    path.write_text(f'{whole[0]}\n{{"id": "2", "ima\n{whole[1]}\n')
    with pytest.raises(PreferenceError, match=r"ann\.jsonl:2: not a JSON object"):
        read_comparisons(path)
    path.write_bytes(b"".join(line for i, line in enumerate(path.read_bytes().splitlines(keepends=True)) if i != 1))
    assert read_comparisons(path) == [FULL, BARE]


def test_comparisons_from_a_spreadsheet(tmp_path: Path) -> None:
    path = tmp_path / "sheet.csv"
    path.write_text(
        "\ufeffimage,a,b,choice,annotator,seconds,reasons,remark\n"
        'dog.jpg,a dog,"a ""big"" dog, running",b,ann,2.5,accuracy; fluency,hm\n'
        "cat.jpg,a cat,two cats,tie,,,,\n",
        encoding="utf-8",
    )
    assert read_comparisons(path) == [
        Comparison("sheet.csv:2", "dog.jpg", "a dog", 'a "big" dog, running', "b", "a", "ann", 2.5, ("accuracy", "fluency")),
        Comparison("sheet.csv:3", "cat.jpg", "a cat", "two cats", "tie"),
    ]
    path.write_text("image,a,b,choice,seconds\nx.jpg,p,q,a,soon\n")
    with pytest.raises(PreferenceError, match=r"sheet\.csv:2: seconds must be a number, got 'soon'$"):
        read_comparisons(path)
    path.write_bytes(b"image,a,b,choice\nx.jpg,p,\xff,a\n")
    with pytest.raises(PreferenceError, match=r"sheet\.csv: .*utf-8"):
        read_comparisons(path)


def test_comparisons_from_other_tables(tmp_path: Path) -> None:
    import pyarrow.parquet

    row = {"image": "dog.jpg", "a": "a dog", "b": "a cat", "choice": "a", "seconds": 2.5, "reasons": ["accuracy"]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "t.parquet")
    (tmp_path / "t.TSV").write_text("image\ta\tb\tchoice\tseconds\treasons\ndog.jpg\ta dog\ta cat\ta\t2.5\taccuracy\n")
    for name, line in (("t.parquet", 1), ("t.TSV", 2)):
        expected = Comparison(f"{name}:{line}", "dog.jpg", "a dog", "a cat", "a", seconds=2.5, reasons=("accuracy",))
        assert read_comparisons(tmp_path / name) == [expected]
    (tmp_path / "t.parquet").write_bytes(b"nonsense")
    with pytest.raises(PreferenceError, match=r"t\.parquet: .*[Pp]arquet"):
        read_comparisons(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"choice": None}, "no choice"),
        ({"choice": "left"}, "choice must be one of a, b, tie, both_bad, skip, got 'left'"),
        ({"choice": ["a"]}, "choice must be one of"),
        ({"a": " "}, "a must be a text that is not blank, got ' '"),
        ({"b": ""}, "no b"),
        ({"image": 7}, "image must be a text that is not blank, got 7"),
        ({"seconds": float("nan")}, "seconds must be a number, got nan"),
        ({"seconds": True}, "seconds must be a number, got True"),
        ({"reasons": "accuracy"}, "reasons must be a list of texts, got 'accuracy'"),
        ({"provenance_a": []}, r"provenance_a must be an object, got \[\]"),
        ({"shown_left": "left"}, "shown_left must be a or b, got 'left'"),
    ],
)
def test_a_malformed_comparison_is_named(tmp_path: Path, fault: dict[str, object], reason: str) -> None:
    good = {"image": "x.jpg", "a": "p", "b": "q", "choice": "a"}
    path = tmp_path / "c.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(good | fault)}\n")
    with pytest.raises(PreferenceError, match=rf"^{path}:3: {reason}[^\n]*$"):
        read_comparisons(path)


@pytest.mark.parametrize("line", [b"[1]", b"{", b"null", b'"text"', b'{"a": "\xff"}'])
def test_lines_that_are_no_objects_are_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(line + b"\n")
    for read in (read_comparisons, read_ratings, from_trl):
        with pytest.raises(PreferenceError, match=r"c\.jsonl:1: not a JSON object in UTF-8$"):
            read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PreferenceError, match=r"none\.jsonl: No such file or directory$"):
        read_comparisons(tmp_path / "none.jsonl")


# --- Flipping and splitting


def test_flip() -> None:
    other = flip(FULL)
    assert (other.a, other.b, other.choice, other.shown_left, other.gap) == (FULL.b, FULL.a, "a", "a", 0.5)
    assert (other.provenance_a, other.provenance_b) == (FULL.provenance_b, FULL.provenance_a)
    for c in (FULL, BARE, *made(30)):
        assert flip(flip(c)) == c
        assert flip(c).choice == {"a": "b", "b": "a"}.get(c.choice, c.choice)


def test_an_image_is_in_one_split_and_stays_there() -> None:
    few, many = made(300), made(300) + [replace(c, image=f"new {c.image}") for c in made(900)]
    parts = split_by_image(many, seed=3)
    images = [{c.image for c in part} for part in parts]
    assert sum(map(len, parts)) == len(many) and sum(map(len, images)) == len(set.union(*images))
    for part, larger in zip(split_by_image(few, seed=3), parts, strict=True):
        assert part == [c for c in larger if not c.image.startswith("new")]
    assert split_by_image(many, seed=4) != parts


def test_splits_have_their_shares() -> None:
    records = [Rating(f"{i}.jpg", "x", (1,), (0, 1)) for i in range(5000)]
    assert [len(p) / 5000 for p in split_by_image(records)] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert [len(p) / 5000 for p in split_by_image(records, (3.0, 0.0, 1.0))] == pytest.approx([0.75, 0, 0.25], abs=0.02)


# --- Ratings


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_follows_the_gap(seed: int) -> None:
    rng = random.Random(seed)
    ratings = [r for i in range(20) for r in rated(f"{i}.jpg", {f"c{j}": rng.choices([1, 2, 3, 4], k=3) for j in range(5)})]
    score = {(r.image, r.caption): sum(r.ratings) / 3 for r in ratings}
    found = ratings_to_comparisons(ratings, seed)
    for c in found:
        assert c.gap == pytest.approx((score[c.image, c.a] - score[c.image, c.b]) / 3)
        assert c.choice == ("tie" if abs(c.gap or 0) < 1e-9 else "a" if (c.gap or 0) > 0 else "b")
        assert c.annotator == "people" and c.provenance_a["scale"] == [1, 4] and sum(c.provenance_a["ratings"]) / 3 == score[c.image, c.a]
    assert len({c.id for c in found}) == len({(c.image, frozenset((c.a, c.b))) for c in found}) == len(found)
    sides = Counter(c.choice for c in found)
    assert 0.35 < sides["a"] / (sides["a"] + sides["b"]) < 0.65
    rng.shuffle(ratings)
    again = ratings_to_comparisons(ratings, seed)
    assert sorted(again, key=lambda c: c.id) == sorted(found, key=lambda c: c.id) and ratings_to_comparisons(ratings, seed + 1) != again


def test_pairs_stay_within_image_and_source_and_under_their_cap() -> None:
    scores = {f"c{i}": [i % 2 * 3 + 1] for i in range(12)}
    ratings = [*rated("x.jpg", scores), *rated("y.jpg", {"only": [3]}), Rating("y.jpg", "other", (2,), (1, 4), "elsewhere")]
    found = ratings_to_comparisons(ratings)
    assert {c.image for c in found} == {"x.jpg"} and Counter(c.choice == "tie" for c in found) == {False: 7, True: 3}
    assert len(ratings_to_comparisons(ratings, per_image=1000)) == 66
    equal = ratings_to_comparisons(rated("x.jpg", {f"c{i}": [2] for i in range(12)}))
    assert [c.choice for c in equal] == ["tie"] * 3


def test_own_captions_are_dropped() -> None:
    ratings = [*rated("x.jpg", {"own": [4]}, origin="human_same_image"), *rated("x.jpg", {"other": [2], "third": [1]})]
    assert [{c.a, c.b} for c in ratings_to_comparisons(ratings)] == [{"other", "third"}]


@pytest.mark.parametrize(
    ("one", "two", "tie"),
    [([0, 0, 0], [1, 0, 0], True), ([0, 0, 0], [1, 1, 0], False), ([1, 1, 1], [1, 1, 0, 0], False), ([1, 1, 1], [1, 1, 1, 0], True)],
)
def test_one_crowd_vote_does_not_decide(one: list[int], two: list[int], tie: bool) -> None:
    (found,) = ratings_to_comparisons(rated("x.jpg", {"one": one, "two": two}, scale=(0, 1)))
    assert (found.choice == "tie") is tie and found.gap != 0


@pytest.mark.parametrize(("one", "two"), [(0.9, 0.55), (1, 0.7)])
def test_shares_on_the_scale_of_votes_are_no_votes(one: float, two: float) -> None:
    ratings = [Rating("x.jpg", caption, (value,), (0, 1)) for caption, value in {"one": one, "two": two}.items()]
    (found,) = ratings_to_comparisons(ratings)
    assert getattr(found, found.choice) == "one"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"ratings": [1, 5]}, r"ratings must be numbers from 1 to 4, got \[1, 5\]"),
        ({"ratings": []}, "ratings must be numbers from 1 to 4"),
        ({"ratings": [1, "2"]}, "ratings must be a list of numbers"),
        ({"ratings": None}, "no ratings"),
        ({"ratings": [10**400]}, "ratings must be a list of numbers"),
        ({"scale": [4, 1]}, r"scale must be \[lowest, highest\], got \[4, 1\]"),
        ({"scale": [1]}, r"scale must be \[lowest, highest\]"),
        ({"caption": None}, "no caption"),
    ],
)
def test_a_malformed_rating_is_named(tmp_path: Path, fault: dict[str, object], reason: str) -> None:
    path = tmp_path / "r.jsonl"
    good = {"image": "x.jpg", "caption": "a dog", "ratings": [1, 4], "scale": [1, 4]}
    path.write_text(json.dumps(good) + "\n")
    assert read_ratings(path) == [Rating("x.jpg", "a dog", (1, 4), (1, 4))]
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | fault)}\n")
    with pytest.raises(PreferenceError, match=rf"^{path}:2: {reason}[^\n]*$"):
        read_ratings(path)


def test_flickr8k_ratings(flickr8k: Path) -> None:
    ratings = read_ratings(flickr8k / "human_ratings.jsonl")
    assert Counter(r.source for r in ratings) == {"flickr8k_expert": 2193, "flickr8k_cf": 18093, "composite_8k": 1784}
    found = ratings_to_comparisons(ratings)
    assert not any(c.provenance_a["origin"] == "human_same_image" or c.provenance_b["origin"] == "human_same_image" for c in found)
    most = Counter((c.annotator, c.image) for c in found)
    assert max(most.values()) == 10 and len({c.image for c in found}) == 600
    by_source = {s: [c for c in found if c.annotator == s] for s in ("flickr8k_expert", "flickr8k_cf", "composite_8k")}
    assert all(len(cs) > 350 for cs in by_source.values())
    # the yardstick of the data: a shorter caption wins about as often as a longer one
    expert = [c for c in by_source["flickr8k_expert"] if c.choice != "tie"]
    shorter = [((len(c.a) < len(c.b)) == (c.choice == "a")) for c in expert if len(c.a) != len(c.b)]
    assert 0.45 < sum(shorter) / len(shorter) < 0.6


# --- TRL


def test_trl_round_trip(tmp_path: Path) -> None:
    comparisons = made(300)
    path = tmp_path / "images" / "metadata.jsonl"
    decided = [c for c in comparisons if c.choice in ("a", "b")]
    assert to_trl(comparisons, path, "What is this?") == len(decided)
    row = json.loads(path.read_text().splitlines()[0])
    assert row["file_names"] == [decided[0].image]
    assert row["prompt"] == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    winner, loser = (decided[0].a, decided[0].b) if decided[0].choice == "a" else (decided[0].b, decided[0].a)
    assert row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": winner}]}]
    assert row["rejected"][0]["content"][0]["text"] == loser
    back = from_trl(path)
    for c, read in zip(decided, back, strict=True):
        assert replace(read, shown_left="a") in (c, replace(flip(c), shown_left="a"))  # the side shown does not travel
    assert 0.35 < sum(c.choice == "a" for c in back) / len(back) < 0.65
    assert from_trl(path) == back


def test_trl_variants_and_faults(tmp_path: Path) -> None:
    path = tmp_path / "metadata.jsonl"
    for said in (
        "a dog",
        [{"role": "assistant", "content": "a dog"}],
        [{"content": [{"type": "image"}, {"type": "text", "text": "a dog"}]}],
    ):
        path.write_text(json.dumps({"file_names": ["x.jpg"], "prompt": "?", "chosen": said, "rejected": "a cat"}) + "\n")
        (found,) = from_trl(path)
        assert (found.a if found.choice == "a" else found.b) == "a dog" and found.image == "x.jpg" and found.id == "metadata.jsonl:1"
    for fault, reason in (({"chosen": []}, "no text in chosen"), ({"file_names": ["x", "y"]}, "file_names must be a list of one image")):
        path.write_text(json.dumps({"file_names": ["x.jpg"], "chosen": "p", "rejected": "q"} | fault) + "\n")
        with pytest.raises(PreferenceError, match=rf"metadata\.jsonl:1: {reason}$"):
            from_trl(path)
