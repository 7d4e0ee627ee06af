"""What README and docs say to type works, on a model that takes seconds to train; the reference is up to date."""

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import tarfile
import warnings
from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import Comparison, append_comparisons
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.utils.command import find_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.grid import read_grid

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("tutorial", "howto"))]
ELSEWHERE = ("make ", "pip ", "pytest ", "python benchmarks/")
"""Commands that change the machine or run what is running."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(line: str) -> int:
    """One line of a page. Training is checked up to its settings: other tests train."""
    words = shlex.split(line, comments=True)
    command = Path(words[1]).stem if words[0] == "python" else words[1]
    if words[0] not in ("python", "caprefine") or words[1] == "-m":
        return subprocess.run(line, shell=True).returncode
    if command in ("train", "ablate"):
        args = cli.PARSERS[command]("").parse_intermixed_args(words[2:])
        if command == "ablate":
            return 0 if read_grid(find_config(str(args.grid))).jobs() else 1
        load_config([find_config(name) for name in args.config or []], args.overrides)
        return 0
    return cli.COMMANDS[command](words[2:], command)


@pytest.fixture(scope="module")
def place(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the pages take for granted."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("models", "results"):
        shutil.copytree(smoke / name / "smoke", folder / name, ignore=shutil.ignore_patterns("last_*"))
    shutil.copytree(folder / "models", folder / "models/ablation")
    shutil.copytree(smoke / "cache", folder / "cache")
    (folder / "photos").mkdir()
    for i, name in enumerate(("image.jpg", "photos/0.jpg", "photos/1.png", "listed.png")):
        render(sample_scene(5, "test", i)).save(folder / name)
    (folder / "images.txt").write_text("image.jpg\nlisted.png\n")
    (folder / "drafts.jsonl").write_text(json.dumps({"image": "image.jpg", "caption": "a red circle on snow"}) + "\n")
    (folder / "more.txt").write_text("listed.png\n")
    (folder / "products.csv").write_text("sku,photo\n1,image.jpg\n2,photos/0.jpg\n")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        tar.add(folder / "photos/1.png", "1.png")
    append_comparisons(folder / "comparisons.jsonl", [Comparison("x", "0.jpg", "a star", "a ring", "a")])
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page, place, monkeypatch):
    monkeypatch.chdir(place)
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line and not line.startswith("#")]
    assert lines
    for line in lines:
        if not line.startswith(ELSEWHERE):
            expected = int(found[1]) if (found := re.search(r"# exit code (\d)", line)) else 0
            assert run(line) == expected, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    if not (place / "shared").exists():
        assert cli.main(["export", "--checkpoint", "models/best_rlhf_model.pt", "--output", "shared"]) == 0
    for code in blocks(page, "python"):
        if "diffusers" in code:
            with warnings.catch_warnings(action="ignore"):
                pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), {})


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "docs/reward.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), (page.name, target)


def test_the_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs/make_reference.py"))["reference"]()
    assert made == (ROOT / "docs/reference.md").read_text(encoding="utf-8"), "run `make reference`"
