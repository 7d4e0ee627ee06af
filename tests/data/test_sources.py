import csv
import io
import json
import logging
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hierarchical_diffusion_rlhf_caption_refinement.data import download, sources
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import SourceError, load_examples
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError, DataConfig


def save_images(folder: Path, *names: str, colour: str = "red") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), colour).save(folder / name)


def save_rows(path: Path, *rows: object) -> DataConfig:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(source="jsonl", path=str(path), train=0, val=0, test=0)


def load(source: Any, path: Path | str, **settings: Any) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Keys and captions per split; every image must be there and of 4 x 4 pixels."""
    splits = load_examples(DataConfig(source=source, path=str(path), **({"train": 0, "val": 0, "test": 0} | settings)), seed=0)
    assert all(example.image().size == (4, 4) for examples in splits.values() for example in examples)
    return {split: [(e.key, e.captions) for e in examples] for split, examples in splits.items()}


def write_json(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def encoded(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


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


def test_numbers_are_upper_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, *[f"{i}.png" for i in range(9)])
    rows = [{"image": f"{i}.png", "captions": ["x"], "split": ("train", "val", "test")[i % 3]} for i in range(9)]
    path = save_rows(tmp_path / "rows.jsonl", *rows).path
    splits = load_examples(DataConfig(source="jsonl", path=path, train=2, val=0, test=5), seed=0)
    assert [len(splits[s]) for s in ("train", "val", "test")] == [2, 3, 3]
    assert caplog.messages == ["using 2 of 3 training images (data.train)"]
    load_examples(DataConfig(source="jsonl", path=path, train=1, val=3, test=2), seed=0)
    assert caplog.messages[1:] == ["using 1 of 3 training images (data.train), 2 of 3 test images (data.test)"]


def test_a_file_spelled_in_two_ways_is_one_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, "a.png", "b/c.png", "d.png", "e.png")
    whole = str(tmp_path / "e.png")
    rows = ("a.png", "train"), ("./a.png", "train"), ("b//c.png", "val"), ("b/../d.png", "test"), (whole, "test"), ("./a.png", "test")
    path = save_rows(tmp_path / "rows.jsonl", *({"image": name, "captions": [name], "split": split} for name, split in rows)).path
    assert load("jsonl", path) == {
        "train": [("a.png", ("a.png", "./a.png"))],
        "val": [("b/c.png", ("b//c.png",))],
        "test": [("d.png", ("b/../d.png",)), (whole, (whole,))],
    }
    assert caplog.messages == [f"1 images or rows left out: {path}:6: a.png is already in split train"]


def test_a_file_under_two_names_is_one_image_of_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Absolute and relative, or through a link; without splits one of the two could land in train and the other in test."""
    names = [f"{i}.png" for i in range(60)]
    save_images(tmp_path / "kept", *names)
    (tmp_path / "images").symlink_to(tmp_path / "kept")
    spelled = [names, [str(tmp_path / "images" / name) for name in names], [str(tmp_path / "kept" / name) for name in names]]
    found = load("jsonl", save_rows(tmp_path / "rows.jsonl", *({"image": n, "captions": [n]} for some in spelled for n in some)).path)
    joined = sorted(example for examples in found.values() for example in examples)
    assert joined == sorted((name, (name, *others)) for name, *others in zip(*spelled, strict=True))
    rows = [{"image": n, "captions": ["x"], "split": s} for n, s in (("0.png", "train"), ("1.png", "val"), ("2.png", "test"))]
    path = save_rows(tmp_path / "more.jsonl", *rows, rows[0] | {"image": spelled[2][0], "split": "test"}).path
    assert [key for examples in load("jsonl", path).values() for key, _ in examples] == names[:3]
    assert caplog.messages == [f"1 images or rows left out: {path}:4: 0.png is already in split train"]


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


ROWS = {
    "": [{"file_name": "test/c.png", "text": "in the test folder"}, {"file_name": "d.png", "text": "named", "split": "validation"}],
    "train": [{"file_name": "a.png", "text": "one"}, {"file_name": "a.png", "text": "two"}, {"file_name": "none.png", "text": "x"}],
}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_imagefolder(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    save_images(tmp_path, "train/a.png", "train/unlisted.png", "test/c.png", "d.png")
    for folder, rows in ROWS.items():
        file = tmp_path / folder / f"metadata.{kind}"
        if kind == "jsonl":
            save_rows(file, *rows)
        elif kind == "csv":
            with file.open("w", encoding="utf-8-sig", newline="") as lines:
                writer = csv.DictWriter(lines, ["file_name", "text", "split"])
                writer.writeheader()
                writer.writerows(rows)
        else:
            import pyarrow.parquet

            texts = [{"split": None} | row | {"text": [row["text"], " "]} for row in rows]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), file)
    assert load("imagefolder", tmp_path) == {
        "train": [("train/a.png", ("one", "two"))],
        "val": [("d.png", ("named",))],
        "test": [("test/c.png", ("in the test folder",))],
    }
    line = {"jsonl": 3, "csv": 4, "parquet": 3}[kind]
    assert caplog.messages == [f"1 images or rows left out: {tmp_path / 'train' / f'metadata.{kind}'}:{line}: no image train/none.png"]


def test_imagefolder_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"expected a folder with metadata\.jsonl, metadata\.csv, metadata\.parquet$"):
        load("imagefolder", tmp_path)
    (tmp_path / "metadata.parquet").write_bytes(b"nonsense")
    with pytest.raises(SourceError, match=r"metadata\.parquet: .*[Pp]arquet"):
        load("imagefolder", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SourceError, match=r"metadata\.parquet: parquet needs pyarrow: pip install"):
        load("imagefolder", tmp_path)
    (tmp_path / "metadata.parquet").unlink()
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,café\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"metadata\.csv: 'utf-8' codec"):
        load("imagefolder", tmp_path)


def test_karpathy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path / "images", "val2014/a.png", "b.png", "c.png", "d.png")
    images = [
        {"filename": "a.png", "filepath": "val2014", "split": "restval", "sentences": [{"raw": "one ."}, {"raw": "two ."}]},
        {"filename": "b.png", "split": "val", "sentences": [{"raw": "three"}]},
        {"filename": "c.png", "filepath": "left/out", "split": "test", "sentences": [{"raw": "four"}]},
        {"filename": "d.png", "split": "train", "sentences": []},
        {"filename": "none.png", "split": "train", "sentences": [{"raw": "x"}]},
        {"split": "train"},
    ]
    path = write_json(tmp_path / "dataset_tiny.json", {"images": images, "dataset": "tiny"})
    assert load("coco", path) == {
        "train": [("val2014/a.png", ("one .", "two ."))],
        "val": [("b.png", ("three",))],
        "test": [("c.png", ("four",))],
    }
    for number, problem in {3: "no caption", 4: "no image none.png", 5: "expected an object with file_name or filename"}.items():
        assert f"dataset_tiny.json:images[{number}]: {problem}" in caplog.text
    assert caplog.messages[0].startswith("3 images or rows left out")


def test_coco(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, "train2017/1.png", "train2017/2.png", "val2017/3.png")
    write_json(tmp_path / "annotations" / "instances_train2017.json", {"images": [{"id": 1, "file_name": "1.png"}], "annotations": []})
    train = {
        "images": [{"id": 1, "file_name": "1.png"}, {"id": 2, "file_name": "2.png"}, {"id": 3, "file_name": "9.png"}],
        "annotations": [
            {"image_id": 1, "caption": "one\n"},
            {"image_id": 2, "caption": "two"},
            {"image_id": 1, "caption": "uno"},
            {"image_id": 7, "caption": "x"},
            {"caption": "x"},
        ],
    }
    val = {"images": [{"id": 1, "file_name": "3.png"}], "annotations": [{"image_id": 1, "caption": "three"}]}
    for name, content in {"train": train, "val": val}.items():
        write_json(tmp_path / "annotations" / f"captions_{name}2017.json", content)
    found = load("coco", tmp_path / "annotations", images=str(tmp_path))
    assert found.pop("val") == [("val2017/3.png", ("three",))]
    assert sorted(found["train"] + found["test"]) == [("train2017/1.png", ("one", "uno")), ("train2017/2.png", ("two",))]
    for problem in (
        "images[2]: no caption",
        "annotations: no image with id 7",
        "annotations[4]: expected an object with image_id and caption",
    ):
        assert f"captions_train2017.json:{problem}" in caplog.text
    with pytest.raises(SourceError, match=r"list\.json: expected an object with images$"):
        load("coco", write_json(tmp_path / "list.json", []))


def test_coco_folder_with_its_images_inside(tmp_path: Path) -> None:
    """Keys are those of the file named alone: ratings and comparisons name images by them."""
    images, notes = [{"id": i, "file_name": f"{i}.png"} for i in range(3)], [{"image_id": i, "caption": "x"} for i in range(3)]
    save_images(tmp_path / "c" / "images", *(f"{i}.png" for i in range(3)))
    path = write_json(tmp_path / "c" / "captions_all.json", {"images": images, "annotations": notes})
    assert load("coco", tmp_path / "c") == load("coco", path) and {key for some in load("coco", path).values() for key, _ in some} == {
        "0.png", "1.png", "2.png"
    }  # fmt: skip
    path.rename(tmp_path / "c" / "notes.json")
    with pytest.raises(SourceError, match=r"c: expected a folder with dataset_\*\.json, captions_\*\.json$"):
        load("coco", tmp_path / "c")
    assert load("coco", tmp_path / "c" / "notes.json")
    with pytest.raises(SourceError, match=r"c: expected a folder with \*\.tar$"):
        load("webdataset", tmp_path / "c")


def test_coco_with_values_of_other_types(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, *(f"{i}.png" for i in range(9)))
    images: list[Any] = [{"id": i, "file_name": f"{i}.png"} for i in range(9)]
    images[1:4] = [{"id": 1, "file_name": 1}, {"id": [2], "file_name": "2.png"}, {"id": 3, "file_name": "3.png", "filepath": 3}]
    notes = [{"image_id": i, "caption": "x"} for i in (0, *range(4, 9))]
    path = write_json(tmp_path / "captions_all.json", {"images": images, "annotations": [*notes, {"image_id": [2], "caption": "x"}]})
    found = load("coco", path)
    assert sorted(key for examples in found.values() for key, _ in examples) == [f"{i}.png" for i in (0, *range(4, 9))]
    assert caplog.messages[0].startswith("4 images or rows left out: ")
    for number in (1, 2, 3):
        assert f"captions_all.json:images[{number}]: expected an object with file_name or filename (texts)" in caplog.text
    with pytest.raises(SourceError, match=r"captions_all\.json: annotations: expected a list$"):
        load("coco", write_json(path, {"images": images, "annotations": None}))


def save_tar(path: Path, members: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else json.dumps(content).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_webdataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failed = {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found", "caption": "x"}
    first = {
        "000000000.jpg": encoded("red"), "000000000.txt": "a  red square\n", "000000000.json": {"caption": "other", "status": "success"},
        "000000001.png": encoded("blue"), "000000001.json": {"caption": "a blue square"},
        "000000002.txt": "x", "000000002.json": failed,
        "000000003.png": encoded(), "000000003.txt": " ", "deep/000000004.json": b"{broken", "deep/000000004.PNG": encoded(),
    }  # fmt: skip
    save_tar(tmp_path / "train" / "00000.tar", first)
    save_tar(tmp_path / "cc3m-validation-0000.tar", {"0.png": encoded(), "0.txt": "val"})
    save_tar(tmp_path / "cc3m-test-0000.tar", {"0.png": encoded(), "0.txt": "test", "1.png": encoded("green") * 20, "1.txt": "cut"})
    torn = tmp_path / "cc3m-test-0000.tar"
    torn.write_bytes(torn.read_bytes()[: 512 * 6])
    write_json(tmp_path / "train" / "00000_stats.json", {"count": 9, "status_dict": {"success": 5, "HTTP Error 404: Not Found": 4}})
    assert load("webdataset", tmp_path) == {
        "train": [("train/00000/000000000", ("a red square",)), ("train/00000/000000001", ("a blue square",))],
        "val": [("cc3m-validation-0000/0", ("val",))],
        "test": [("cc3m-test-0000/0", ("test",))],
    }
    assert caplog.messages[0] == f"{tmp_path}: 5 of 9 links gave an image; dead: 4 HTTP Error 404: Not Found"
    for problem in (
        "00000.tar:000000002: no image: failed_to_download: HTTP Error 404: Not Found",
        "00000.tar:000000003: no caption",
        "00000.tar:deep/000000004: no caption",
        "cc3m-test-0000.tar: unexpected end of data; what comes before is used",
    ):
        assert problem in caplog.text, problem
    glob = load_examples(DataConfig(source="webdataset", path=str(tmp_path / "**" / "*.tar")), seed=0)
    assert [example.image().getpixel((0, 0)) for example in glob["train"]] == [(255, 0, 0), (0, 0, 255)]
    assert [example.content() for example in glob["train"]] == [encoded("red"), encoded("blue")]
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.jpg"))
    (tmp_path / "bad.tar").write_bytes(b"x" * 2000)
    with pytest.raises(SourceError, match=r"no captioned image; first of 1 problems: .*bad\.tar: "):
        load("webdataset", tmp_path / "bad.tar")


@pytest.mark.parametrize("path", ["", "*/*.tar", "**/0*.tar"])
def test_shards_of_one_name_in_two_folders_are_apart(tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture) -> None:
    """As img2dataset leaves them, called once per split."""
    for split in ("train", "val", "test"):
        save_tar(tmp_path / split / "00000.tar", {"0.png": encoded(), "0.txt": f"of {split}"})
    folders = {split: [(f"{split}/00000/0", (f"of {split}",))] for split in ("train", "val", "test")}
    assert load("webdataset", tmp_path / path) == folders and not caplog.messages


@pytest.mark.parametrize("path", ["", "*.tar", "cc-*.tar"])
def test_shards_of_one_folder_are_called_by_their_names(tmp_path: Path, path: str) -> None:
    for split in ("train", "val", "test"):
        save_tar(tmp_path / f"cc-{split}.tar", {"deep/0.png": encoded(), "deep/0.txt": "x"})
    found = load("webdataset", tmp_path / path)
    assert [key for examples in found.values() for key, _ in examples] == ["cc-train/deep/0", "cc-val/deep/0", "cc-test/deep/0"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Counter[str]]]:
    """Its address, and a counter of what it is asked; all but /none and /page are images."""
    monkeypatch.setattr(download, "PAUSE_S", 0.005)
    asked: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked[self.path] += 1
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            self.wfile.write(b"<html>" if self.path == "/page" else encoded())

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def test_conceptual_captions(tmp_path: Path, server: tuple[str, Counter[str]], caplog: pytest.LogCaptureFixture) -> None:
    url, asked = server
    lines = [f"number {i}\t{url}/{i}" for i in range(8)]
    lines[1:3] = [f"dead\t{url}/none", f"dead\t{url}/page", "no address", "", f"{url}/swapped\tthe other way\tignored"]
    tsv = tmp_path / "cc.tsv"
    tsv.write_bytes("\n".join(lines).encode() + f"\nlatin\xe9\t{url}/x".encode("latin-1"))
    splits = load("conceptual_captions", tsv)
    keys = {f"{url}/{i}": (f"number {i}",) for i in (0, 3, 4, 5, 6, 7)} | {f"{url}/swapped": ("the other way",)}
    assert {key: captions for examples in splits.values() for key, captions in examples} == keys
    folder = tmp_path / "cc_images"
    report = "7 of 9 links gave an image; dead: 1 HTTP 404, 1 not an image; all are in"
    assert f"{tsv}: {report} {folder / 'downloads.jsonl'}" in caplog.messages
    expected = "expected a caption, a tab and a URL in UTF-8"
    assert f"2 images or rows left out: {tsv}:4: {expected}; {tsv}:12: {expected}" in caplog.messages
    assert len(list(folder.glob("??/*"))) == 7
    asked.clear()
    assert load("conceptual_captions", tsv) == splits and not asked
    tsv.write_text(f"a\t{url}/none\n")
    with pytest.raises(SourceError, match=r"cc\.tsv: 0 of 1 links gave an image; dead: 1 HTTP 404"):
        load("conceptual_captions", tsv)


def test_without_a_network_the_log_is_not_said_to_have_the_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE_S", 0.005)
    monkeypatch.setattr(download, "fetch_bytes", lambda *args: (_ for _ in ()).throw(ConnectionError()))
    tsv, log = tmp_path / "cc.tsv", tmp_path / "cc_images" / "downloads.jsonl"
    tsv.write_text("".join(f"x\thttp://host/{i}\n" for i in range(3)))
    with pytest.raises(SourceError) as error:
        load("conceptual_captions", tsv)
    why = f"{log} does not have them all, for no host answered: is there a network?"
    assert str(error.value) == f"{tsv}: 0 of 3 links gave an image; dead: 3 connection failed; {why}" and log.read_bytes() == b""
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty: expected a folder with \*\.tsv$"):
        load("conceptual_captions", tmp_path / "empty")


def test_no_more_is_fetched_than_the_splits_need(tmp_path: Path, server: tuple[str, Counter[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = server
    connections = []
    monkeypatch.setattr(sources, "download", lambda *args: (connections.append(args[-1]), download.download(*args))[1])
    for name, letter in {"Train_GCC-training": "t", "Validation_GCC-1.1.0-Validation": "v"}.items():
        (tmp_path / f"{name}.tsv").write_text("".join(f"{letter} {i}\t{url}/{letter}{i}\n" for i in range(60)))
    splits = load("conceptual_captions", tmp_path, train=9, val=3, test=2, images=str(tmp_path / "kept"), downloads=2)
    assert [key for key, _ in splits["val"]] == [f"{url}/v{i}" for i in range(3)]
    assert {key for split in ("train", "test") for key, _ in splits[split]} <= {f"{url}/t{i}" for i in range(11)}
    assert set(asked) == {*(f"/t{i}" for i in range(11)), *(f"/v{i}" for i in range(3))} and connections == [2, 2]
    assert len(list((tmp_path / "kept").glob("??/*"))) == 14
    with pytest.raises(ConfigError, match=r"data\.downloads=0: must be at least 1"):
        DataConfig(downloads=0)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library, with its cache in a folder of the test."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")
    datasets.disable_progress_bars()
    return datasets


def test_hub_with_images(tmp_path: Path, hub: Any, caplog: pytest.LogCaptureFixture) -> None:
    for split, colours in {"train": ["red", "green"], "validation": ["blue"], "test": ["white"]}.items():
        rows = {"image": [{"bytes": encoded(c), "path": None} for c in colours], "caption": [[f"a {c} square", " "] for c in colours]}
        rows["caption"][-1:] = [[" "]] if split == "train" else rows["caption"][-1:]
        features = hub.Features({"image": hub.Image(), "caption": hub.List(hub.Value("string"))})
        hub.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert load("hub", tmp_path / "data") == {
        "train": [("train/0", ("a red square",))],
        "val": [("validation/0", ("a blue square",))],
        "test": [("test/0", ("a white square",))],
    }
    assert caplog.messages == [f"1 images or rows left out: {tmp_path / 'data'}:train[1]: no caption"]
    splits = load_examples(DataConfig(source="hub", path=str(tmp_path / "data")), seed=0)
    assert splits["val"][0].content() == encoded("blue") and splits["val"][0].image().getpixel((0, 0)) == (0, 0, 255)


def test_a_hub_row_without_image_is_named(tmp_path: Path, hub: Any, caplog: pytest.LogCaptureFixture) -> None:
    cells = [None if c is None else {"bytes": encoded(c), "path": None} for c in ("red", None, "green", "blue")]
    rows = hub.Dataset.from_dict({"image": cells, "TEXT": list("abcd"), "split": ["train", "train", "val", "test"]})
    rows.cast_column("image", hub.Image()).to_parquet(tmp_path / "data" / "train.parquet")
    assert load("hub", tmp_path / "data") == {"train": [("train/0", ("a",))], "val": [("train/2", ("c",))], "test": [("train/3", ("d",))]}
    assert caplog.messages == [f"1 images or rows left out: {tmp_path / 'data'}:train[1]: no image in this row"]


def test_hub_rows_of_one_image_are_joined_and_stay_in_one_split(tmp_path: Path, hub: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A data set may have a row per caption."""
    greys = [encoded(f"rgb({i}, {i}, {i})") for i in range(40)]
    for split, images in {"train": [*greys, *greys], "test": [encoded("red"), greys[0]]}.items():
        rows = {"image": [{"bytes": data, "path": None} for data in images], "text": [f"{split} {i}" for i in range(len(images))]}
        hub.Dataset.from_dict(rows).cast_column("image", hub.Image()).to_parquet(tmp_path / "data" / f"{split}.parquet")
    splits = load("hub", tmp_path / "data")
    assert splits["test"] == [("test/0", ("test 0",))] and 0 < len(splits["val"]) < 10
    joined = [(f"train/{i}", (f"train {i}", f"train {i + 40}")) for i in range(40)]
    assert sorted(splits["train"] + splits["val"]) == sorted(joined)
    assert caplog.messages == [f"1 images or rows left out: {tmp_path / 'data'}:test[1]: train/0 is already in split train"]


def test_hub_with_files_and_a_column_of_splits(tmp_path: Path, hub: Any) -> None:
    for name, colour in zip("abc", ("red", "green", "blue"), strict=True):
        save_images(tmp_path / "data" / "test", f"{name}.png", colour=colour)
    rows = [{"file_name": f"{name}.png", "text": name, "split": split} for name, split in zip("abc", ("train", "val", "test"), strict=True)]
    save_rows(tmp_path / "data" / "test" / "metadata.jsonl", *rows)
    assert load("hub", tmp_path / "data") == {"train": [("test/0", ("a",))], "val": [("test/1", ("b",))], "test": [("test/2", ("c",))]}


def test_hub_with_addresses(tmp_path: Path, hub: Any, server: tuple[str, Counter[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = server
    monkeypatch.chdir(tmp_path)
    for split, count in {"train": 30, "validation": 3}.items():
        rows = {"image_url": [f"{url}/none", *(f"{url}/{split}{i}" for i in range(count))], "caption": ["x"] * (count + 1)}
        hub.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    splits = load("hub", "data", train=6, val=2, test=1)
    assert [key for key, _ in splits["val"]] == [f"{url}/validation{i}" for i in range(2)]
    assert set(asked) == {"/none", *(f"/train{i}" for i in range(7)), *(f"/validation{i}" for i in range(2))} and asked["/none"] == 1
    assert len(list((tmp_path / "cache" / "data_images").glob("??/*"))) == 9


def test_hub_says_what_is_wrong(tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.Dataset.from_dict({"label": [1], "text": ["x"]}).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(SourceError, match=r"data:train: no column of images .* among label, text$"):
        load("hub", tmp_path / "data")
    with pytest.raises(SourceError, match="nowhere: ") as error:
        load("hub", tmp_path / "nowhere")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match=r'data\.source=hub needs datasets: pip install "\.\[data\]"$'):
        load("hub", tmp_path / "data")


@pytest.mark.parametrize("source", ["jsonl", "folder", "imagefolder", "coco", "webdataset", "conceptual_captions"])
def test_a_missing_path_is_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError, match=r"nowhere: (No such file or directory|no such folder|expected a folder)"):
        load(source, tmp_path / "nowhere")


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
