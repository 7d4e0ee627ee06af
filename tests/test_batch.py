"""A folder as people have them, captioned by a job that is killed again and again: every good image once, every bad one with its reason."""

import csv
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from collections import Counter
from contextlib import closing
from pathlib import Path

import pyarrow.parquet
import pytest
from PIL import Image

from hierarchical_diffusion_rlhf_caption_refinement import cli, inputs
from hierarchical_diffusion_rlhf_caption_refinement.batch import Batch, Task, Work, ahead
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner, ObedienceError, Wishes
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.inputs import find_items
from hierarchical_diffusion_rlhf_caption_refinement.outputs import Output, beside, joined, make_output, whole
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "predict.py"


def break_image(path: Path, kind: int, whole: bytes) -> str:
    """Write a file that cannot be captioned, and return the reason that must be told."""
    bomb = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", (20000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"), (b"IDAT", b"x"), (b"IEND", b"")):
        bomb += len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    noise = bytes(random.Random(kind).randrange(256) for _ in range(300))
    cases = [
        (b"", "empty file, not an image"),
        (b"<html>404 not found</html>", "not an image"),
        (whole[: len(whole) // 2], ""),  # cut short
        (noise, "not an image"),
        (whole[:8] + noise, ""),  # a PNG's head alone
        (b"\0" * 500, "not an image"),
        (bomb, "too many pixels, refused as a decompression bomb"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"BM" + noise, ""),
        (whole[:60] + noise[:40] + whole[100:], ""),  # flipped bytes
    ]
    data, reason = cases[kind % len(cases)]
    path.write_bytes(data)
    return reason


def save_oddly(path: Path, i: int) -> Path:
    """A scene in one of the ways in which images are stored; the path may get another suffix."""
    scene = render(sample_scene(11, "test", i % 60))
    kind = i % 9
    if kind == 1:
        exif = Image.Exif()
        exif[0x0112] = 6  # rotated
        scene.save(path.with_suffix(".jpg"), exif=exif)
    elif kind == 2:
        grey = scene.convert("L").point(lambda v: v * 256, "I").convert("I;16")
        grey.save(path.with_suffix(".tif"))
    elif kind == 3:
        scene.convert("CMYK").save(path.with_suffix(".JPG"), format="JPEG")
    elif kind == 4:
        scene.save(path.with_suffix(".gif"), save_all=True, append_images=[scene.rotate(90)])
    elif kind == 5:
        scene.convert("RGBA").save(path.with_suffix(".webp"))
    elif kind == 6:
        scene.convert("P").save(path)
    elif kind == 7 and i % 50 == 7:
        scene.resize((20000, 40)).save(path)
    else:
        scene.save(path)
    return next(p for p in path.parent.iterdir() if p.name.startswith(path.stem + "."))


def build_folder(root: Path, count: int, broken: float) -> tuple[list[Path], dict[Path, str]]:
    """`count` images of every kind in nested folders with all sorts of names, at least one file broken in each of 10 ways."""
    good, bad = [], {}
    names = ["{}", "with space {}", "größe é 日本 {}", "dots.in.name {}", "{} [bracket] #1", "'quote' {}", "-dash{}"]
    render(sample_scene(3, "test", 0)).resize((100, 100)).save(root / "whole.png")
    data = (root / "whole.png").read_bytes()
    (root / "whole.png").unlink()
    for i in range(count):
        folder = root / ["", "a", "a/b c", "ü/深"][i % 4]
        folder.mkdir(parents=True, exist_ok=True)
        good.append(save_oddly(folder / (names[i % len(names)].format(i) + ".png"), i))
    for i in range(max(10, int(count * broken))):
        path = root / ["a", ""][i % 2] / f"broken {i}.png"
        bad[path] = break_image(path, i, data)
    return good, bad


@pytest.fixture
def run(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """predict.py with the smoke run's refined model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: cli.predict(["--checkpoint", str(smoke / "models/smoke/best_rlhf_model.pt"), *map(str, arguments)])


def pictures(folder: Path, count: int, first: int = 0) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        render(sample_scene(5, "test", i)).save(folder / f"{i:02}.png")
    return [folder / f"{i:02}.png" for i in range(first, first + count)]


def logged(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def kill_at_random(command, times: int, longest_s: float, rng: random.Random) -> int:
    """Run the command in a forked process that is killed; return how often it was really killed before its end."""
    killed = 0
    for _ in range(times):
        with warnings.catch_warnings(action="ignore"):  # of forking beside other threads
            process = multiprocessing.get_context("fork").Process(target=command)
            process.start()
        process.join(rng.uniform(0.05, longest_s))
        killed += process.is_alive()
        process.kill()
        process.join()
    return killed


def check_killed_job(run, count: int, kills: int, longest_s: float) -> None:
    root = Path("photos")
    root.mkdir()
    good, bad = build_folder(root, count, 0.01)
    arguments = ("-r", root, "--format", "txt", "--output", "out", "--sidecar-name", "full", "--batch-size", "8")
    killed = kill_at_random(lambda: run(*arguments), kills, longest_s, random.Random(0))
    assert killed >= kills // 2
    assert run(*arguments) == 3
    want = {Path("out") / f"{p.relative_to(root)}.txt": str(p) for p in good}
    found = {p for p in Path("out").rglob("*") if p.is_file() and p.suffix == ".txt"}
    assert found == want.keys()
    rows = logged("out/captions.log.jsonl")
    captions = {r["image"]: r["caption"] for r in rows if not r["error"]}
    assert Counter(r["image"] for r in rows if not r["error"]).most_common(1)[0][1] == 1  # none was captioned twice
    assert all(p.read_text() == captions[name] + "\n" for p, name in want.items())
    failures = {Path(r["image"]): r["error"] for r in logged("out/captions.failures.jsonl")}
    assert failures.keys() == bad.keys()
    assert all(failures[p].startswith(f"{p}: ") and failures[p].endswith(reason) for p, reason in bad.items())
    assert {p for p in Path("out").rglob("*") if p not in found} == {
        *(Path("out") / d for d in ("a", "a/b c", "ü", "ü/深")),
        Path("out/captions.log.jsonl"),
        Path("out/captions.failures.jsonl"),
    }


def test_a_killed_job_loses_nothing_and_repeats_nothing(run, capfd):
    check_killed_job(run, 150, 5, 0.9)


def test_killed_between_the_log_and_the_text_files_it_only_writes_these(run, monkeypatch):
    class Killed(BaseException):
        pass

    def die(path: Path, text: str) -> None:
        raise Killed

    pictures(Path("x"), 6)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("hierarchical_diffusion_rlhf_caption_refinement.batch.write_text", die)
        run("x", "--format", "txt", "--batch-size", "4")
    before = Path("x/captions.log.jsonl").read_text()
    assert len(before.splitlines()) == 4 and not list(Path("x").glob("*.txt"))
    assert run("x", "--format", "txt", "--batch-size", "4") == 0
    rows = logged("x/captions.log.jsonl")
    assert Path("x/captions.log.jsonl").read_text().startswith(before) and len(rows) == 6
    assert all(Path(row["image"]).with_suffix(".txt").read_text() == row["caption"] + "\n" for row in rows)


@pytest.mark.parametrize("policy", ["skip", "append"])
def test_killed_while_it_replaces_captions_it_replaces_them_the_next_time(run, monkeypatch, capsys, policy):
    class Killed(BaseException):
        pass

    def die(path: Path, text: str) -> None:
        raise Killed

    pictures(Path("x"), 2)
    mine = "mine\n" if policy == "append" else ""
    Path("x/00.txt").write_text(mine)
    command = ("x", "--format", "txt", "--existing", policy)
    assert run(*command) == 0
    first = [Path(f"x/0{i}.txt").read_text() for i in range(2)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("hierarchical_diffusion_rlhf_caption_refinement.batch.write_text", die)
        run(*command, "--suffix", "!")
    assert [Path(f"x/0{i}.txt").read_text() for i in range(2)] == first and len(logged("x/captions.log.jsonl")) == 4
    assert run(*command, "--suffix", "!") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 captions in text files (2 done before)"
    assert [Path(f"x/0{i}.txt").read_text() for i in range(2)] == [text[:-1] + "!\n" for text in first] and first[0].startswith(mine)
    assert len(logged("x/captions.log.jsonl")) == 4


@pytest.mark.slow
def test_five_thousand_images_killed_ten_times(run, capfd):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check_killed_job(run, 5000, 10, 5.0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB
    assert grown < 400, f"{grown:.0f} MiB"


def test_collisions_are_found_before_anything_is_done(run, capsys):
    pictures(Path("x"), 3)
    render(sample_scene(5, "test", 9)).save("x/01.jpg")
    assert run("x", "--format", "txt") == 2
    assert capsys.readouterr().err == "error: x/01.jpg and x/01.png would share x/01.txt; --sidecar-name full writes NAME.SUFFIX.txt\n"
    assert sorted(p.name for p in Path("x").iterdir()) == ["00.png", "01.jpg", "01.png", "02.png"]
    assert run("x", "--format", "txt", "--sidecar-name", "full") == 0
    assert Path("x/01.jpg.txt").read_text() != "" != Path("x/01.png.txt").read_text()


def test_the_same_command_again_does_nothing_and_changes_are_done_again(run, capsys):
    pictures(Path("x"), 6)
    command = ("x", "--format", "txt")
    assert run(*command) == 0
    first = {p: (p.read_text(), p.stat().st_mtime_ns) for p in Path("x").glob("*.txt")}
    assert len(first) == 6 and len(logged("x/captions.log.jsonl")) == 6
    assert run(*command) == 0
    assert capsys.readouterr().out.splitlines()[1] == "6 captions in text files (6 done before)"
    assert first == {p: (p.read_text(), p.stat().st_mtime_ns) for p in Path("x").glob("*.txt")}
    Path("x/00.txt").unlink()  # is written again, without captioning again
    Path("x/01.txt").write_text("my own words\n")
    Path("x/02.txt").write_text("")
    render(sample_scene(5, "test", 40)).save("x/03.png")  # is another image now
    assert run(*command) == 0
    texts = {p: p.read_text() for p in Path("x").glob("*.txt")}
    assert capsys.readouterr().out == "5 captions in text files (4 done before, 1 text files left as they were)\n"
    assert texts[Path("x/01.txt")] == "my own words\n" and all(texts[p] == first[p][0] for p in first if p.name in ("00.txt", "02.txt"))
    assert Counter(r["image"] for r in logged("x/captions.log.jsonl") if r["identity"])["x/03.png"] == 2
    assert run(*command, "--seed", "1", "temperature=1", "--suffix", "!") == 0
    after = {p: p.read_text() for p in Path("x").glob("*.txt")}
    assert after.pop(Path("x/01.txt")) == "my own words\n" and all(text.endswith("!\n") for text in after.values())


@pytest.mark.parametrize("policy", ["append", "prepend", "overwrite"])
def test_what_is_there_already(run, policy, capsys):
    pictures(Path("x"), 3)
    Path("x/00.txt").write_text("mine")
    assert run("x", "--format", "txt", "--existing", "error") == 2
    assert capsys.readouterr().err.startswith("error: x/00.txt: is there already")
    assert run("x", "--format", "txt", "--existing", policy) == 0
    caption = next(r["caption"] for r in logged("x/captions.log.jsonl") if r["image"] == "x/00.png")
    want = {"append": f"mine\n{caption}\n", "prepend": f"{caption}\nmine\n", "overwrite": f"{caption}\n"}[policy]
    assert Path("x/00.txt").read_text() == want and len(Path("x/01.txt").read_text().splitlines()) == 1
    for more in ((), ("--existing", policy)):
        assert run("x", "--format", "txt", *more) == 0
        assert Path("x/00.txt").read_text() == want
    assert run("x", "--format", "txt", "--existing", policy, "--prefix", "new ") == 0  # replaces our line, not theirs
    assert Path("x/00.txt").read_text() == want.replace(caption, f"new {caption}")


def test_captions_are_known_however_far_a_run_reaches_and_however_it_spells_them(run, monkeypatch, capsys):
    pictures(Path("x/a"), 2)
    Path("x/a/00.txt").write_text("mine\n")

    def texts() -> list[str]:
        return [path.read_text() for path in sorted(root.rglob("*.txt"))]

    root, command = Path("x").absolute(), ("--format", "txt", "--existing", "append")
    assert run("-r", "x", *command) == 0 and Path("x/a/captions.log.jsonl").exists()
    first = texts()
    assert first[0].startswith("mine\n") and len(first[0].splitlines()) == 2
    pictures(Path("x/b"), 1, first=2)
    assert run("-r", "x", *command) == 0 and len(logged("x/captions.log.jsonl")) == 1  # the log is in another folder now
    for names in (("x/b/02.png",), (root / "a/00.png", root / "b/02.png"), ("x/a/../a/01.png",)):
        assert run(*names, *command) == 0
    counts = ["2 captions in text files", "3 captions in text files (2 done before)", "1 captions in text files (1 done before)"]
    counts += ["2 captions in text files (2 done before)", "1 captions in text files (1 done before)"]
    assert capsys.readouterr().out.splitlines() == counts and texts()[:2] == first
    monkeypatch.chdir("x/a")
    assert run("00.png", "../b", "--format", "txt", "--suffix", "!") == 0  # replaces our lines, not theirs
    changed = texts()
    assert changed[0] == first[0][:-1] + "!\n" and changed[1] == first[1] and changed[2].endswith("!\n")
    assert len(changed[2].splitlines()) == 1


def test_logs_that_do_not_tell_the_text_file_are_understood(run, capsys):
    pictures(Path("x"), 2)
    assert run("x", "--format", "txt") == 0
    log = Path("x/captions.log.jsonl")
    rows = logged(log)
    assert [row.pop("text_file") for row in rows] == ["00.txt", "01.txt"]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(Path("x").absolute(), "--format", "txt") == run("x", "--format", "txt") == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["2 captions in text files (2 done before)"] * 2
    assert run("x", "--format", "txt", "--suffix", "!") == 0 and Path("x/00.txt").read_text() == rows[0]["caption"] + "!\n"


def test_without_a_log_no_line_is_added_twice(run):
    pictures(Path("x"), 1)
    Path("x/00.txt").write_text("mine\n")
    assert run("x", "--format", "txt", "--existing", "append") == 0
    first = Path("x/00.txt").read_text()
    for policy in ("append", "prepend"):
        Path("x/captions.log.jsonl").unlink()
        assert run("x", "--format", "txt", "--existing", policy) == 0 and Path("x/00.txt").read_text() == first


def test_policies_by_hand():
    assert [beside(p, "theirs", False, "") for p in ("skip", "error", "overwrite", "append")] == [None, None, "", "theirs"]
    assert beside("skip", "ours", True, "before") == "before" and beside("skip", " \n", False, "") == ""
    assert joined("append", "a", "b") == "a\nb\n" and joined("prepend", "a\n", "b") == "b\na\n" and joined("skip", "", "b") == "b\n"
    assert joined("append", "b\na", "b") == "b\na" and joined("prepend", "a\nb\n", "a") == "a\nb\n"


def test_every_table_says_the_same(run):
    names = pictures(Path("x/val2014"), 5)
    Path("x/val2014/broken_77.png").write_text("no")
    for output in ("p.json", "p.jsonl", "p.csv", "p.parquet", "x/metadata.jsonl"):
        assert run("-r", "x", "--output", output) == 3
    assert run("-r", "x", "--output", "coco.json", "--format", "coco") == 3
    rows = json.loads(Path("p.json").read_text())
    assert [r["image"] for r in rows] == [*map(str, names), "x/val2014/broken_77.png"]
    assert logged("p.jsonl") == rows == pyarrow.parquet.read_table("p.parquet").to_pylist()
    with Path("p.csv").open(newline="") as file:
        flat = list(csv.DictReader(file))
    assert [(r["image"], r["caption"] or None, r["error"] or None) for r in flat] == [(r["image"], r["caption"], r["error"]) for r in rows]
    good = [r for r in rows if not r["error"]]
    assert logged("x/metadata.jsonl") == [{"file_name": r["image"].removeprefix("x/"), "text": r["caption"]} for r in good]
    assert json.loads(Path("coco.json").read_text()) == [{"image_id": i, "caption": r["caption"]} for i, r in enumerate(good)]
    (failure,) = logged("coco.json.failures.jsonl")
    assert failure == {"image": "x/val2014/broken_77.png", "error": "x/val2014/broken_77.png: not an image"}


STAYS = "is there already, and predict did not write it (it has no log beside it): name another file, or move this one away"
READ = "is to be read, so it cannot be written; --output names another file"


@pytest.mark.parametrize(
    ("arguments", "output", "reason"),
    [
        (["t.csv"], "t.csv", READ),
        (["@list"], "./list", READ),
        (["--image-list", "list"], "x/../list", READ),
        (["--image-url", "x/00.png"], "x/00.png", READ),
        (["x/*.png"], "link.png", READ),
        (["--refine", "drafts.jsonl"], "drafts.jsonl", READ),
        (["t.csv"], "drafts.jsonl", STAYS),
        (["x"], "x/metadata.jsonl", STAYS),
        (["x"], "model.pt", STAYS),
        (["x"], "x", "is a folder; --output names the file"),
    ],
)
def test_no_table_takes_the_place_of_another_file(run, smoke, capsys, arguments, output, reason):
    pictures(Path("x"), 2)
    Path("t.csv").write_text("image,price\nx/00.png,3\n")
    Path("list").write_text("x/00.png\n")
    Path("drafts.jsonl").write_text('{"image": "x/00.png", "caption": "a red circle"}\n')
    Path("x/metadata.jsonl").write_text('{"file_name": "00.png", "text": "mine"}\n')
    Path("link.png").symlink_to("x/00.png")
    Path("model.pt").symlink_to(smoke / "models/smoke/best_rlhf_model.pt")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    form = [] if output.endswith("metadata.jsonl") else ["--format", "json"]
    assert run(*arguments, "--output", output, *form) == 2
    assert capsys.readouterr().err == f"error: {Path(output)}: {reason}\n"
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


def test_a_table_of_its_own_is_written_again_but_not_over_its_source(run, capsys):
    pictures(Path("x"), 2)
    Path("p.jsonl").touch()  # mktemp's
    for shard in ("1/2", "2/2", "1/2"):
        assert run("x", "--output", "p.jsonl", "--shard", shard) == 0
    assert [row["image"] for row in logged("p.jsonl")] == ["x/00.png", "x/01.png"]
    assert run("x", "--output", "p.jsonl", "--suffix", "!") == 0
    assert all(row["caption"].endswith("!") for row in logged("p.jsonl"))
    assert run("--refine", "p.jsonl", "--output", "p.jsonl") == 2 and capsys.readouterr().err == f"error: p.jsonl: {READ}\n"


def test_ways_to_name_images(run, monkeypatch, tmp_path):
    names = pictures(Path("x"), 4)
    pictures(Path("x/deep"), 1, first=9)
    subprocess.run(["tar", "cf", "x.tar", "x/00.png", "x/01.png", "x/deep"], check=True)
    Path("t.jsonl").write_text("".join(json.dumps({"file_name": str(n)}) + "\n" for n in names[:2]))
    Path("t.csv").write_text("id,picture\n1,x/02.png\n")
    Path("list").write_text("x/03.png\n# no\nx/00.png\n")
    images = [{"bytes": n.read_bytes(), "path": None} for n in names[:3]]
    pyarrow.parquet.write_table(pyarrow.table({"image": images}), "t.parquet", row_group_size=2)
    (tmp_path / "in").write_text("x/01.png\n")
    with (tmp_path / "in").open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        several = ["x", "x/0[01].png", "@list", "-", "x.tar", "t.jsonl", "t.parquet", "http://127.0.0.1:9/a.png"]
        items = find_items(several)
    assert [i.name for i in items] == [
        *map(str, names), "x/00.png", "x/01.png", "x/03.png", "x/00.png", "x/01.png",
        "x.tar/x/00.png", "x.tar/x/01.png", "x.tar/x/deep/09.png", "x/00.png", "x/01.png",
        "t.parquet/0", "t.parquet/1", "t.parquet/2", "http://127.0.0.1:9/a.png",
    ]  # fmt: skip
    assert [i.name for i in find_items(["x"], recursive=True)] == [*map(str, names), "x/deep/09.png"]
    assert find_items(["x"], recursive=True)[-1].place == Path("deep/09.png")
    assert [i.name for i in find_items(["t.csv"], column="picture")] == ["x/02.png"]
    assert run("x.tar", "x", "t.parquet", "--format", "txt", "--output", "out") == 0
    told = [Path("out", p).read_text() for p in ("00.txt", "x/x/00.txt", "t/0.txt")]
    assert told[0] == told[1] == told[2]
    with pytest.raises(ConfigError, match="no column of images among id, picture"):
        find_items(["t.csv"])
    Path("cut.tar").write_bytes(Path("x.tar").read_bytes()[:700])
    for wrong, reason in (("cut.tar", "not an uncompressed tar"), ("t2.jsonl", "No such file or directory"), ("a.log.jsonl", "own record")):
        with pytest.raises(ConfigError, match=reason):
            find_items([wrong])


def test_every_row_of_a_table_comes_back(run, capsys):
    pictures(Path("x"), 2)
    Path("t.csv").write_text("image,price\nx/00.png,3\n,4\nx/01.png,5\n")
    pyarrow.parquet.write_table(pyarrow.table({"image": ["x/00.png", None, "x/01.png"]}), "t.parquet")
    for table in ("t.csv", "t.parquet"):
        assert run(table, "--output", "p.jsonl") == 3
        rows = logged("p.jsonl")
        assert [row["image"] for row in rows] == ["x/00.png", f"{table}/1", "x/01.png"] and rows[0]["caption"]
        assert rows[1]["caption"] is None and rows[1]["error"] == f"{table}/1: no image in this row"
        capsys.readouterr()
        assert run(table, "--format", "txt") == run(table, "--format", "coco", "--output", "coco.json") == 3
        assert capsys.readouterr().err.splitlines() == [f"failed: {table}/1: no image in this row"] * 2
        assert [row["image_id"] for row in json.loads(Path("coco.json").read_text())] == [0, 1]
    Path("t.jsonl").write_text('{"image": "x/00.png"}\n\n{"id": 7}\n{"url": "x/01.png"}\n{"image": null}\n')
    assert run("t.jsonl", "--output", "p.jsonl") == 3
    found = [("x/00.png", None), ("t.jsonl/1", "t.jsonl/1: no image in this row"), ("x/01.png", None)]
    assert [(row["image"], row["error"]) for row in logged("p.jsonl")] == [*found, ("t.jsonl/3", "t.jsonl/3: no image in this row")]
    assert all(logged("p.jsonl")[i]["caption"] for i in (0, 2))
    with pytest.raises(ConfigError, match="no column photo among image, id, url; --image-column names it"):
        find_items(["t.jsonl"], column="photo")
    assert sorted(p.name for p in Path("x").glob("*.txt")) == ["00.txt", "01.txt"]
    Path("t.csv").write_text('image\n""\n')
    assert run("t.csv", "--format", "txt") == 1


def test_a_table_may_shout_its_suffix(run):
    Path("P.JSONL").write_text('{"image": "a.png"}\n{"image": "b.png"}\n')
    Path("P.TSV").write_text("id\timage\n1\ta.png\n2\tb.png\n")
    Path("P.CSV").write_text("id,image\n1,a.png\n2,b.png\n")
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.png", "b.png"]}), "Q.PARQUET")
    pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": b"x", "path": None}]}), "R.PARQUET")
    for table in ("P.JSONL", "P.TSV", "P.CSV", "Q.PARQUET"):
        assert [item.name for item in find_items([table])] == ["a.png", "b.png"]
    assert [item.name for item in find_items(["R.PARQUET"])] == ["R.PARQUET/0"]


@pytest.mark.parametrize("cut", [100, 511])
def test_a_tar_that_is_cut_off_in_a_header_is_a_failure(run, capsys, cut):
    names = pictures(Path("x"), 3)
    subprocess.run(["tar", "cf", "x.tar", *map(str, names)], check=True)
    with tarfile.open("x.tar") as tar:
        last = tar.getmembers()[-1].offset
    whole_tar = Path("x.tar").read_bytes()
    Path("x.tar").write_bytes(whole_tar[: last + cut])
    assert run("x.tar", "--output", "p.jsonl") == 3
    assert capsys.readouterr().err == f"failed: x.tar: damaged or cut off after {last} bytes; what was behind them is missing\n"
    assert [row["image"] for row in logged("p.jsonl") if row["caption"]] == ["x.tar/x/00.png", "x.tar/x/01.png"]
    for fine in (whole_tar, whole_tar[:last], whole_tar[:last] + bytes(100)):  # with an end, without one, with half of it
        Path("x.tar").write_bytes(fine)
        assert run("x.tar", "--output", "q.jsonl") == 0


def test_rows_of_a_parquet_file_are_read_once_and_in_order(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    data = pictures(Path("x"), 1)[0].read_bytes()
    pyarrow.parquet.write_table(pyarrow.table({"image": [data] * 24}), "t.parquet", row_group_size=6)
    groups, real = [], pyarrow.parquet.ParquetFile.read_row_group

    def read(self, group, *arguments):
        groups.append(group)
        time.sleep(0.02)  # while the other threads come
        return real(self, group, *arguments)

    items = find_items(["t.parquet"])
    inputs._cells.cache_clear()
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", read)
    with closing(Batch(object.__new__(Work), Output("json", Path("p.json")), items[::-1])) as batch:
        assert [item.name for item in batch.mine] == [f"t.parquet/{i}" for i in range(24)]
        assert all(picture.result().size == (64, 64) for _, picture in ahead(Task(item, "") for item in batch.mine))
    assert groups == [0, 1, 2, 3]


def test_what_a_folder_holds_but_cannot_be_read_fails(run, capsys):
    pictures(Path("x/deep"), 1)
    Path("x/gone.png").symlink_to("nowhere.png")
    Path("x/deep/loop.png").symlink_to("loop.png")
    assert run("-r", "x", "--output", "p.jsonl") == run("x/*.png", "x/deep/*.png") == 3
    lines = sorted(line.split(": ")[1] for line in capsys.readouterr().err.splitlines())
    assert lines == ["x/deep/loop.png", "x/deep/loop.png", "x/gone.png", "x/gone.png"]
    assert [row["image"] for row in logged("p.jsonl") if not row["error"]] == ["x/deep/00.png"]


def test_a_text_file_that_cannot_be_is_a_failure_of_its_image(run, capsys):
    name, _ = (path.name for path in pictures(Path("x"), 2))
    long = "a" * 251 + ".png"
    os.rename(f"x/{name}", f"x/{long}")
    for _ in range(2):
        assert run("x", "--format", "txt", "--output", "o", "--sidecar-name", "full") == 3
        assert capsys.readouterr().err == f"failed: x/{long}: its text file: File name too long\n"
    assert [path.name for path in Path("o").glob("*.txt")] == ["01.png.txt"]


def test_an_evil_tar_stays_in_its_folder(run):
    pictures(Path("x"), 1)
    subprocess.run(["tar", "cPf", "evil.tar", "--transform", "s,x/,../../up/,", "x/00.png"], check=True)
    assert run("evil.tar", "--format", "txt", "--output", "out") == 0
    assert list(Path().rglob("*.txt")) == [Path("out/evil/up/00.txt")]


def test_captions_do_not_depend_on_batches_order_shards_or_processes(run, smoke):
    names = pictures(Path("x"), 12)
    want: dict[str, str] | None = None
    rng = random.Random(0)
    for trial, (size, shards) in enumerate([(32, 1), (1, 1), (5, 3), (3, 2)]):
        output, shuffled = f"{trial}.json", rng.sample(names, len(names))
        for i in range(shards):
            shard = () if shards == 1 else ("--shard", f"{i + 1}/{shards}")
            code = run(*shuffled, "--output", output, "--batch-size", size, "temperature=0.7", "--must-include", "a", *shard)
            assert code == 0
        rows = json.loads(Path(output).read_text())
        found = {r["image"]: r["caption"] for r in rows}
        assert [r["image"] for r in rows] == list(map(str, shuffled)) and (want is None or found == want)
        want = found


@pytest.mark.slow
def test_torchrun_shards_the_same_command(run, smoke):
    pictures(Path("x"), 7)
    Path("x/bad.png").write_text("no")
    assert run("x", "--output", "one.json") == 3
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533", str(SCRIPT)]
    command += ["--checkpoint", str(smoke / "models/smoke/best_rlhf_model.pt"), "x", "--output", "two.json"]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "7 captions in two.json" in found.stdout and found.returncode == 1 and found.stderr.count("failed: x/bad.png") == 1
    texts = [[(r["image"], r["caption"]) for r in json.loads(Path(p).read_text())] for p in ("one.json", "two.json")]
    assert texts[0] == texts[1]
    assert [len(logged(f"two.json.{i}-of-2.log.jsonl")) for i in (1, 2)] == [4, 4]


def test_interrupted_it_keeps_what_is_done(run, capfd):
    pictures(Path("x"), 12)

    def slowly():
        real = Captioner.look
        Captioner.look = lambda self, picture: (time.sleep(0.1), real(self, picture))[1]  # type: ignore[method-assign]
        os._exit(run("x", "--output", "p.json", "--batch-size", "2"))

    with warnings.catch_warnings(action="ignore"):
        process = multiprocessing.get_context("fork").Process(target=slowly)
        process.start()
    while not Path("p.json.log.jsonl").exists() or not Path("p.json.log.jsonl").read_text():
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join()
    part = json.loads(Path("p.json").read_text())
    assert process.exitcode == 130 and 0 < len(part) < 12 and len(part) % 2 == 0
    assert run("x", "--output", "p.json") == 0
    rows = json.loads(Path("p.json").read_text())
    assert len(rows) == 12 and rows[: len(part)] == part and len(logged("p.json.log.jsonl")) == 12


def test_a_torn_line_costs_one_image(run, capsys):
    pictures(Path("x"), 4)
    assert run("x", "--output", "p.json") == 0
    first, log = json.loads(Path("p.json").read_text()), Path("p.json.log.jsonl")
    log.write_bytes(log.read_bytes()[:-30])
    assert run("x", "--output", "p.json") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "4 captions in p.json (3 done before)"
    again = json.loads(Path("p.json").read_text())
    assert [r["caption"] for r in again] == [r["caption"] for r in first] and again[:3] == first[:3] and len(logged(log)) == 4


def test_two_runs_do_not_write_one_log(run, capsys):
    pictures(Path("x"), 1)
    with Path("p.json.log.jsonl").open("ab") as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("x", "--output", "p.json") == 2
    assert capsys.readouterr().err == "error: p.json.log.jsonl: another run is writing it\n"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="full"), whole(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_names_that_are_not_unicode(run):
    pictures(Path("x"), 1)
    os.rename("x/00.png", b"x/\xff\xfe.png")
    for output in ("p.json", "p.csv", "p.parquet"):
        assert run("x", "--output", output) == 0
    assert run("x") == 0 and run("x", "--format", "txt") == 0
    assert json.loads(Path("p.json").read_text())[0]["image"] == os.fsdecode(b"x/\xff\xfe.png")


def test_a_csv_of_odd_names_has_a_row_for_each(run):
    for path, name in zip(pictures(Path("x"), 4), (b"\xff.png", b"a\rb.png", b"c\nd.png", b'e",.png'), strict=True):
        os.rename(path, b"x/" + name)
    assert run("x", "--output", "p.csv") == 0
    with Path("p.csv").open(encoding="utf-8", newline="") as file:
        names = [row["image"] for row in csv.DictReader(file)]
    assert names == ["x/a\rb.png", "x/c\nd.png", 'x/e",.png', "x/?.png"]
    assert [item.name for item in find_items(["p.csv"])] == names


def test_disobedience_is_an_error_of_its_image(smoke):
    captioner = Captioner.from_pretrained(smoke / "models/smoke")
    picture = render(sample_scene(5, "test", 0))
    every = [w for w in captioner.eyes.tokenizer.get_vocab() if w.isalpha()]
    with pytest.raises(ConfigError, match="every word that the model knows is banned"):
        captioner(picture, wishes=Wishes(ban=tuple(every)))
    words = captioner(picture, wishes=Wishes(ban=tuple(w for w in every if w not in ("red", "circle"))))[0].text.split()
    assert set(words) <= {"red", "circle"}
    with pytest.raises(ObedienceError, match="no caption was found that obeys"):
        only = tuple(w for w in every if w != "red")
        captioner(picture, wishes=Wishes(ban=(*only, "red red"), min_words=3))


def test_a_missing_extra_is_told_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"^o\.parquet: parquet needs pyarrow: pip install"):
        make_output(Path("o.parquet"), None, "skip", ".txt", False)
