import json
import logging
from pathlib import Path

import pytest
from PIL import Image

from hierarchical_diffusion_rlhf_caption_refinement.data.sources import SourceError, load_examples
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import DataConfig


def save_images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(folder / name)


def save_rows(path: Path, *rows: object) -> DataConfig:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(source="jsonl", path=str(path), train=0, val=0, test=0)


def test_scenes_are_the_same_every_time_and_differ_by_seed() -> None:
    config = DataConfig(train=6, val=2, test=3, captions_per_image=2)
    splits = load_examples(config, seed=1)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 6, "val": 2, "test": 3}
    assert splits == load_examples(config, seed=1) != load_examples(config, seed=2)
    assert all(len(e.captions) == 2 and e.image().size == (64, 64) for examples in splits.values() for e in examples)
    more = load_examples(DataConfig(train=8, val=2, test=3, captions_per_image=2), seed=1)
    assert more["train"][:6] == splits["train"]


def test_scenes_need_a_number_of_images() -> None:
    with pytest.raises(SourceError, match="must be positive"):
        load_examples(DataConfig(train=0), seed=0)


def test_jsonl(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path / "images", "a.png", "b.png", "c.png")
    config = save_rows(
        tmp_path / "captions.jsonl",
        {"image": "a.png", "captions": ["a  dog .", " "], "split": "train"},
        {"image": "b.png", "captions": ["a cat ."], "split": "validation"},
        {"image": "c.png", "captions": "a bird .", "split": "test"},
        {"image": "a.png", "captions": ["the dog ."], "split": "train"},
        "",
        {"image": "a.png", "captions": ["leak"], "split": "test"},
        "{broken",
        {"image": "none.png", "captions": ["x"]},
        {"image": "b.png", "captions": [""], "split": "val"},
        {"image": "b.png", "captions": ["x"], "split": "extra"},
        ["a.png"],
    )
    with caplog.at_level(logging.WARNING):
        splits = load_examples(config, seed=0)
    assert [(e.key, e.captions) for e in splits["train"]] == [("a.png", ("a dog .", "the dog ."))]
    assert [e.key for e in splits["val"]] == ["b.png"] and [e.captions for e in splits["test"]] == [("a bird .",)]
    assert splits["train"][0].image().getpixel((0, 0)) == (255, 0, 0)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("6 images or rows left out")
    for problem in (
        ":6: a.png is already in split train",
        ":7: not JSON",
        ":8: no image none.png",
        ":9: no caption",
        ":10: unknown split 'extra'",
    ):
        assert f"captions.jsonl{problem}" in caplog.messages[0]


def test_missing_splits_come_from_training_and_stay_when_images_are_added(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(60)]
    save_images(tmp_path, *names)
    rows = [{"image": name, "captions": ["x"]} for name in names]
    few = load_examples(save_rows(tmp_path / "few.jsonl", *rows[:40]), seed=0)
    many = load_examples(save_rows(tmp_path / "many.jsonl", *rows), seed=0)
    for splits, total in ((few, 40), (many, 60)):
        keys = [{e.key for e in examples} for examples in splits.values()]
        assert all(keys) and sum(map(len, keys)) == total == len(set.union(*keys))
    assert len(few["val"]) + len(few["test"]) <= 8
    assert {e.key for e in few["val"]} <= {e.key for e in many["val"]} or len(few["val"]) == 1


def test_numbers_are_upper_limits(tmp_path: Path) -> None:
    save_images(tmp_path, *[f"{i}.png" for i in range(9)])
    rows = [{"image": f"{i}.png", "captions": ["x"], "split": ("train", "val", "test")[i % 3]} for i in range(9)]
    path = save_rows(tmp_path / "rows.jsonl", *rows).path
    splits = load_examples(DataConfig(source="jsonl", path=path, train=2, val=0, test=5), seed=0)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [2, 3, 3]


def test_folder_with_text_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, "train/a.png", "train/b.jpg", "val/c.png", "test/d.png", "train/lonely.png", "train/latin.png")
    for name, text in {
        "train/a.txt": "one\ntwo\n\n",
        "train/b.jpg.txt": "\ufeffthree",
        "val/c.caption": "four",
        "test/d.txt": "five",
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "train/latin.txt").write_bytes("café".encode("latin-1"))
    splits = load_examples(DataConfig(source="folder", path=str(tmp_path), train=0, val=0, test=0), seed=0)
    assert {e.key: e.captions for e in splits["train"]} == {"train/a.png": ("one", "two"), "train/b.jpg": ("three",)}
    assert splits["val"][0].captions == ("four",) and splits["test"][0].captions == ("five",)
    assert "lonely.png: no lonely.txt beside it" in caplog.text and "latin.png: 'utf-8'" in caplog.text


@pytest.mark.parametrize("source", ["jsonl", "folder"])
def test_nothing_usable_is_one_clear_line(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError, match=r"nowhere: (No such file|no such folder)"):
        load_examples(DataConfig(source=source, path=str(tmp_path / "nowhere")), seed=0)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match=r"rows\.jsonl: no captioned image; first of 1 problems: .*rows\.jsonl:1: not JSON"):
        load_examples(save_rows(tmp_path / "rows.jsonl", "nonsense"), seed=0)
    save_images(tmp_path, "a.png")
    with pytest.raises(SourceError, match="no example for val, test; 1 captioned images in all"):
        load_examples(save_rows(tmp_path / "rows.jsonl", {"image": "a.png", "captions": ["x"]}), seed=0)


def test_flickr8k(flickr8k: Path) -> None:
    splits = load_examples(DataConfig(source="jsonl", path=str(flickr8k / "captions.jsonl"), train=0, val=0, test=50), seed=0)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [6000, 1000, 50]
    assert all(len(e.captions) == 5 for e in splits["train"]) and splits["test"][0].image().size == (224, 224)
