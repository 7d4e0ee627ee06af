"""predict.py: files, lists and addresses of images become captions; what fails is listed and does not stop the rest."""

import json
import random
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(7):
        render(sample_scene(5, "test", i)).save(folder / f"{i}.png")
    render(sample_scene(5, "test", 0)).resize((300, 200)).save(folder / "photo.jpg")
    return folder


@pytest.fixture
def predict(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """predict.py with the smoke run's refined model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.predict(["--checkpoint", str(smoke / "models/smoke/best_rlhf_model.pt"), *arguments])


def listed(predict, names, *more: str) -> tuple[int, list[dict]]:
    Path("images.txt").write_text("\n".join(map(str, names)) + "\n")
    for name in ("predictions.json", "predictions.json.log.jsonl"):
        Path(name).unlink(missing_ok=True)
    code = predict("--image-list", "images.txt", "--output", "predictions.json", *more)
    return code, json.loads(Path("predictions.json").read_text())


@pytest.fixture
def address(pictures: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pictures)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_image(predict, pictures, capsys):
    assert predict("--image-url", str(pictures / "photo.jpg")) == 0
    out = capsys.readouterr().out
    first, second, *_ = out.splitlines()
    assert first.startswith(f"{pictures / 'photo.jpg'}: ") and len(first.split(": ")[1].split()) >= 1
    assert second.startswith("confidence 0.") and "reward " in second


def test_an_address_gives_the_caption_of_the_file(predict, pictures, address):
    shouted = address.replace("http", "HTTP")
    code, (by_name, *by_address) = listed(predict, [pictures / "3.png", f"{address}/3.png", f"{shouted}/3.png"])
    assert code == 0 and {row["caption"] for row in by_address} == {by_name["caption"]}
    assert [row["image"] for row in by_address] == [f"{address}/3.png", f"{shouted}/3.png"]


def test_an_address_without_an_image(predict, address, capsys):
    assert predict("--image-url", f"{address}/nothing.png") == 1
    assert capsys.readouterr().err == f"failed: {address}/nothing.png: HTTP Error 404: File not found\n"


def test_a_list_becomes_a_file_of_captions(predict, pictures, capsys):
    code, rows = listed(predict, [*(pictures / f"{i}.png" for i in range(7)), "# a comment", "", pictures / "0.png"])
    assert (code, capsys.readouterr().out) == (0, "8 captions in predictions.json\n")
    assert [row["image"] for row in rows] == [str(pictures / f"{i}.png") for i in (0, 1, 2, 3, 4, 5, 6, 0)]
    for row in rows:
        assert set(row) == {"image", "caption", "confidence", "reward", "tokens", "seed", "error"} and row["error"] is None
        assert " ".join(token["token"] for token in row["tokens"]) == row["caption"]
        assert 0 < row["confidence"] <= 1 and isinstance(row["reward"], float)
        assert {token["step"] for token in row["tokens"]} <= set(range(1, 5))
    assert rows[0] == rows[-1]


def test_captions_do_not_depend_on_the_company(predict, pictures):
    names = [str(pictures / f"{i}.png") for i in range(7)]
    several = {}
    for settings in ([], ["temperature=1", "order=random"]):
        for size in ("1", "3", "32"):
            random.Random(size).shuffle(names)
            rows = listed(predict, names, "--batch-size", size, *settings)[1]
            several.setdefault(tuple(settings), []).append({row["image"]: row["caption"] for row in rows})
    for found in several.values():
        assert found[0] == found[1] == found[2]
    drawn = listed(predict, names, "temperature=1", "order=random", "--seed", "1")[1]
    assert {row["image"]: row["caption"] for row in drawn} != several["temperature=1", "order=random"][0]


def test_bad_images_are_listed_and_the_others_captioned(predict, pictures, capsys):
    Path("text.png").write_text("this is no picture")
    Path("cut.png").write_bytes((pictures / "1.png").read_bytes()[:900])
    Path("empty.jpg").touch()
    names = [str(pictures / "0.png"), "missing.png", "text.png", str(pictures / "2.png"), "cut.png", "empty.jpg", "."]
    code, rows = listed(predict, names, "--batch-size", "2")
    assert code == 3 and [row["image"] for row in rows] == names
    assert [row["caption"] is None for row in rows] == [False, True, True, False, True, True, True]
    found = capsys.readouterr()
    assert found.out == "2 captions in predictions.json\n"
    lines = found.err.splitlines()
    assert len(lines) == 5 and all(line.startswith("failed: ") for line in lines)
    assert lines[0] == "failed: missing.png: no such file" and lines[1] == "failed: text.png: not an image"
    assert [row["error"] for row in rows if row["error"]] == [line.removeprefix("failed: ") for line in lines]


def test_nothing_but_bad_images(predict, capsys):
    code, rows = listed(predict, ["missing.png", "gone.png"])
    assert code == 1 and [row["error"] for row in rows] == ["missing.png: no such file", "gone.png: no such file"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "names no image"),
        (b"\n# only this\n", "names no image"),
        (b"\xff\xfe\x00", "not a text file"),
        (None, "No such file or directory"),
    ],
)
def test_a_list_without_images(predict, capsys, content, reason):
    if content is not None:
        Path("images.txt").write_bytes(content)
    assert predict("--image-list", "images.txt") == 2
    assert capsys.readouterr().err == f"error: images.txt: {reason}\n"


def test_settings_of_the_sampler(predict, pictures):
    names = [pictures / f"{i}.png" for i in range(4)]
    for bounds in ((6, 7), (2, 2), (11, 12)):
        code, rows = listed(predict, names, f"min_words={bounds[0]}", f"max_words={bounds[1]}")
        assert code == 0 and all(bounds[0] <= len(row["tokens"]) <= bounds[1] for row in rows)
    one_step = listed(predict, names, "steps=1")[1]
    assert all(token["step"] == 1 for row in one_step for token in row["tokens"])
    best = listed(predict, names, "candidates=8", "temperature=1")[1]
    first = listed(predict, names, "candidates=1", "temperature=1")[1]
    assert sum(row["reward"] for row in best) > sum(row["reward"] for row in first)
    for order in ("left_to_right", "plackett_luce", "confidence"):
        assert listed(predict, names[:1], f"order={order}", "guidance=2", "remask=1", "threshold=0.9", "top_p=0.9")[0] == 0


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("stepz=3", "sampler.stepz=3: unknown key 'sampler.stepz'; did you mean 'sampler.steps'?"),
        ("steps=0", "sampler.steps=0: must be at least 1"),
        ("min_words=99", "sampler.min_words must not be more than data.max_words"),
        ("candidates=4", "sampler.candidates > 1 needs sampler.temperature > 0"),
    ],
)
def test_settings_that_do_not_exist_or_fit(predict, pictures, capsys, setting, line):
    assert predict("--image-url", str(pictures / "0.png"), setting) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_standard_input_that_is_closed(predict, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert predict("-") == 2
    assert capsys.readouterr().err == "error: standard input: is closed\n"


OPEN = "[MASK]"


def texts(rows) -> list[str]:
    return [row["caption"] for row in rows]


def test_arguments_are_images_or_settings(predict, pictures):
    photo = Path("steps=9.png")
    photo.write_bytes((pictures / "1.png").read_bytes())
    assert predict(str(pictures / "0.png"), "steps=1", str(photo), "--output", "a.json", "max_words=3") == 0
    rows = json.loads(Path("a.json").read_text())
    assert [row["image"] for row in rows] == [str(pictures / "0.png"), "steps=9.png"]
    assert all(token["step"] == 1 for row in rows for token in row["tokens"]) and all(len(row["tokens"]) <= 3 for row in rows)


def test_no_images_is_wrong_usage(predict):
    with pytest.raises(SystemExit) as stopped:
        predict("steps=4")
    assert stopped.value.code == 2


def test_flags_are_settings_by_another_name(predict, pictures):
    names = [pictures / f"{i}.png" for i in range(3)]
    flags = listed(predict, names, "--steps", "2", "--threshold", "0.1", "--candidates", "4")[1]
    assert flags == listed(predict, names, "steps=2", "threshold=0.1", "candidates=4", "temperature=0.5")[1]
    assert flags != listed(predict, names, "--steps", "2", "--threshold", "0.1", "--candidates", "4", "temperature=1")[1]


def test_words_are_bounded_included_and_banned(predict, pictures):
    names = [pictures / f"{i}.png" for i in range(7)]
    for low, high in ((1, 3), (6, 6), (9, 12)):
        found = listed(predict, names, "--min-words", str(low), "--max-words", str(high))[1]
        assert all(low <= len(text.split()) <= high for text in texts(found))
    free = texts(listed(predict, names)[1])
    found = texts(listed(predict, names, "--must-include", "Green circle!", "--must-include", "on water")[1])
    assert all("green circle" in text and "on water" in text for text in found)
    common = max({w for t in free for w in t.split()}, key=lambda w: sum(w in t.split() for t in free))
    found = texts(listed(predict, names, "--ban", common.upper(), "--ban", "no-such-word", "temperature=1", "remask=2")[1])
    assert not any(common in text.split() for text in found)
    pair = " ".join(free[0].split()[:2])
    found = texts(listed(predict, names, "--ban", pair)[1])
    assert not any(f" {pair} " in f" {text} " for text in found) and found[0] != free[0]
    found = texts(listed(predict, names, "--must-include", "two", "--ban", "a", "--max-words", "5", "--candidates", "2")[1])
    assert all("two" in t.split() and "a" not in t.split() and len(t.split()) <= 5 for t in found)
    assert set(texts(listed(predict, names[:2], "--must-include", "green circle", "--max-words", "2")[1])) == {"green circle"}
    filled = texts(listed(predict, names[:1], "--must-include", "green circle", "--template", f"{OPEN} and {OPEN}", "--max-words", "4")[1])
    assert "green circle" in filled[0] and len(filled[0].split()) == 4


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        (f"there is {OPEN} on {OPEN}", r"there is \w+( \w+)* on \w+( \w+)*"),
        (f"{OPEN} and {OPEN} circle", r"\w+( \w+)* and \w+( \w+)* circle"),
        (f"A green {OPEN} {OPEN} .", r"a green( \w+){2,}"),
    ],
)
def test_templates_keep_their_words(predict, pictures, template, pattern):
    found = texts(
        listed(predict, [pictures / f"{i}.png" for i in range(5)], "--template", template, "--prefix", "sks, ", "--suffix", "!")[1]
    )
    assert all(re.fullmatch(f"sks, {pattern}!", text) for text in found)


@pytest.mark.parametrize(
    ("wish", "line"),
    [
        (["--must-include", "a purpel dog"], "'purpel' is not among the "),
        (["--template", "a photo"], "the template 'a photo' leaves nothing open: write [MASK] where words are missing"),
        (["--ban", "red", "--must-include", "red circle"], "'red' is banned and asked for at once"),
        (["--min-words", "99"], "a caption has at most 20 tokens, not 99"),
        (
            ["--must-include", "red circle", "--max-words", "1"],
            "the given words and what is between them take 2 tokens, a caption has at most 1",
        ),
        (
            ["--must-include", "red circle", "--template", "[MASK] and [MASK]", "--max-words", "3"],
            "the given words and what is between them take 4 tokens, a caption has at most 3",
        ),
        (["--ban", ""], "'' is an empty word: it cannot be included or banned"),
        (["--must-include", "!"], "'!' is an empty word: it cannot be included or banned"),
        (["--min-words", "5", "--max-words", "4"], "5 to 4 words cannot be: at least 1, and not more than at most"),
        (["--shard", "3/2"], "--shard 3/2: expected I/N with I from 1 to N"),
        (["--output", "x.doc"], "x.doc: --format says what to write, one of txt, json, jsonl, csv, parquet, metadata, coco"),
        (["--output", "x.json", "--format", "coco", "@list"], "photo.jpg: its name does not end in a number, the COCO id"),
        (["nothing/*.png"], "nothing/*.png: no image in it"),
        (["guidance=nan"], "sampler.guidance=nan: must be a finite number"),
        (["temperature=inf"], "sampler.temperature=inf: must be a finite number"),
        (["--threshold", "nan"], "sampler.threshold=nan: must be a finite number"),
        (["steps=99999999999999999999"], "sampler.steps=99999999999999999999: must be a finite number"),
        (["steps=???"], "sampler.steps=???: 'sampler.steps' has no value"),
        (["--candidates", "2", "--accuracy", "1e300"], "accuracy, fluency and specificity count from 0 to 100 times"),
        (["--seed", "100000000000000000000"], "error: --seed 100000000000000000000: must fit into 64 bits"),
        ([""], "an empty image name"),
        (["--format", "txt", "--ext", "."], "--ext .: expected a suffix such as .txt that is not an image's"),
        (["--format", "txt", "--ext", ".a/b"], "--ext .a/b: expected a suffix such as .txt that is not an image's"),
    ],
)
def test_wishes_that_cannot_be_fulfilled(predict, pictures, capsys, wish, line):
    Path("list").write_text(f"{pictures / 'photo.jpg'}\n")
    assert predict(str(pictures / "0.png"), *wish) == 2
    (found,) = capsys.readouterr().err.splitlines()
    assert line in found


def test_unknown_words_come_with_near_ones(predict, pictures, capsys):
    predict(str(pictures / "0.png"), "--must-include", "purpel")
    assert "near are: purple" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a.png", "--report-only"], "--report-only goes with --refine"),
        (["a.png", "--weak", "1"], "--weak goes with --refine"),
        (["t.csv", "--caption-column", "text"], "--caption-column goes with --refine"),
        (["--refine", "t.csv", "--report-only", "--weak", "1"], "--weak decides what is replaced; --report-only replaces nothing"),
        (["--refine", "t.csv", "--must-include", "a dog"], "--must-include is for new captions"),
        (["--refine", "t.csv", "temperature=1"], "temperature=1 is for new captions"),
        (["--refine", "folder", "--caption-column", "text"], "--caption-column is for tables: .jsonl .csv .tsv .parquet"),
        (["a.png", "--image-column", "photo"], "--image-column is for tables"),
        (["a.png", "--existing", "append", "--output", "x.csv"], "--existing is for text files: --format txt"),
        (["a.png", "--ext", ".cap"], "--ext is for text files: --format txt"),
        (["--refine", "t.csv", "--ext", ".cap"], "--ext is for text files: --format txt"),
    ],
)
def test_what_would_be_ignored_is_refused(predict, capsys, arguments, line):
    with pytest.raises(SystemExit) as stopped:
        predict(*arguments)
    assert stopped.value.code == 2 and line in capsys.readouterr().err


def test_a_refine_of_nothing_tells_what_is_not_there(predict, pictures, capsys):
    for name, reason in (("nosuch", "no such file"), ("nosuch.png", "no such file"), (pictures, "no caption in it")):
        assert predict("--refine", str(name), "--report-only") == 2
        assert capsys.readouterr().err == f"error: {name}: {reason}\n"
    assert predict("--refine", str(pictures / "0.png"), "--report-only") == 2
    assert capsys.readouterr().err == f"error: {pictures / '0.png'}: no caption in it\n"


@pytest.mark.parametrize("weak", ["nan", "inf"])
def test_a_suspicion_that_is_no_number_is_refused(predict, pictures, capsys, weak):
    Path("d.jsonl").write_text(f'{{"image": "{pictures / "0.png"}", "caption": "a red circle"}}\n')
    assert predict("--refine", "d.jsonl", "--weak", weak) == 2
    assert capsys.readouterr().err == f"error: --weak {weak}: must be a finite number\n"


def test_steps_are_refused_where_a_search_would_ignore_them(predict, pictures, capsys):
    search = (str(pictures / "0.png"), "order=left_to_right", "beams=2")
    assert predict(*search) == 0
    assert predict(*search, "--steps", "4") == 2 and "a beam search takes a step for every word" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--image-list", "x"], ["--model-type", "reward"]])
def test_wrong_usage(predict, arguments):
    with pytest.raises(SystemExit) as stopped:
        predict("--image-url", "x.png", *arguments)
    assert stopped.value.code == 2


def test_the_wrong_model_type(predict, smoke, capsys):
    assert predict("--image-url", "x.png", "--model-type", "base") == 1
    assert capsys.readouterr().err == f"error: {smoke / 'models/smoke/best_rlhf_model.pt'}: is a rlhf checkpoint, expected base\n"
