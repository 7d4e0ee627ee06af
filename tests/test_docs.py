"""What README and docs say to type works, on a model that takes seconds to train; the reference is up to date.

`test_commands` runs what is quick as it stands and checks the rest by its arguments; `test_slow_commands` runs the rest. Only links and the
reference are looked at by `make test`.
"""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import Comparison
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.utils.command import find_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.grid import read_grid

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("tutorial", "howto", "results/ablation", "results/gpu"))]
WITH_COMMANDS = [*PAGES, ROOT / "CONTRIBUTING.md"]
SPOKEN = re.compile(r"`((?:python|caprefine|make|pip|torchrun) [^`.]*(?:\.(?!\.)[^`.]*)*)`")
"""A command within a sentence, unless it ends in an ellipsis."""


HUB_ID = "you/captioner"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line and not line.startswith("#")]
    return lines + SPOKEN.findall(page.read_text(encoding="utf-8"))


def command_of(words: list[str]) -> str:
    """train, evaluate, ... for the scripts and for the installed command."""
    return Path(words[1]).stem if words[1].startswith("scripts/") else words[1] if words[0] == "caprefine" else ""


def run(line: str, config: pytest.Config) -> int:
    """One line of a page, in a folder like the repository; of what is slow the arguments are read."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        words = ["python", *words[3:]]
    command = command_of(words)
    if words[0] == "hf" or HUB_ID in words:
        return 0
    if words[1].startswith("benchmarks/"):
        return 0 if (ROOT / words[1]).exists() else 1
    if words[0] == "make":
        return subprocess.run([*words, "--dry-run"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        return 0 if (words[-1][2:-1] in extras if words[-1].startswith(".[") else (ROOT / words[-1]).exists()) else 1
    if words[0] == "pytest":
        return 0 if config._parser.parse(words[1:]).file_or_dir == ["tests/"] else 1
    if command == "train":
        args = cli.PARSERS[command]("").parse_intermixed_args(words[2:])
        load_config([find_config(name) for name in args.config or []], args.overrides)
        return 0
    if command == "ablate":
        return 0 if read_grid(find_config(str(cli.PARSERS[command]("").parse_args(words[2:]).grid))).jobs() else 1
    if command:
        return cli.COMMANDS[command](words[2:], command)
    return subprocess.run([sys.executable, *words[1:]] if words[0] == "python" else line, shell=words[0] != "python").returncode


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
    for name in ("benchmarks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "*.md"))
    for name in ("taste", "own", "liked"):
        shutil.copytree(smoke / "models/smoke", folder / "models" / name, ignore=shutil.ignore_patterns("last_*"))
    (folder / "album").mkdir()
    for i in range(40):
        render(sample_scene(7, "test", i)).save(folder / f"album/{i:03}.png")
        (folder / f"album/{i:03}.txt").write_text("a star on sand")
    rows = ["image,a,b,choice", *(f"{i:03}.png,a star,a ring on sand,{'ab'[i % 2]}" for i in range(40))]
    shutil.copytree(folder / "album", folder / "photographs")
    taste, own = blocks(ROOT / "docs/tutorial.md", "yaml")
    (folder / "taste.yaml").write_text(taste)
    (folder / "own.yaml").write_text(own.replace("google/mobilenet_v2_1.0_224", "../shared/models/mobilenet_v2"))
    for name in ("taste.csv", "choices.csv"):
        (folder / name).write_text("\n".join(rows))
    (folder / "comparisons.jsonl").write_text(json.dumps(asdict(Comparison("x", "0.jpg", "a star", "a ring", "a"))))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_commands(page, place, monkeypatch, pytestconfig):
    monkeypatch.chdir(place)
    for line in commands(page):
        expected = int(found[1]) if (found := re.search(r"# exit code (\d)", line)) else 0
        assert run(line, pytestconfig) == expected, line


def settings(tree: dict, start: str = "") -> list[str]:
    """A config's values as single settings."""
    parts = [settings(v, f"{start}{k}.") if isinstance(v, dict) else [f"{start}{k}={json.dumps(v)}"] for k, v in tree.items()]
    return [text for part in parts for text in part]


SMOKE = settings(yaml.safe_load((ROOT / "configs/smoke.yaml").read_text(encoding="utf-8")))
SMALL = [text for text in SMOKE if ".steps=" not in text]
"""But the config's own steps: photographs' captions take one for every word."""
A_FEW_TESTS = "-q -n 0 -p no:cacheprovider -k 'shaping or links_lead_somewhere'"


def small_make(words: list[str], env: dict[str, str]) -> int:
    """`make train` at the smoke config's sizes, the others with a few tests; set-up was done by who runs this."""
    if words[1] == "train":
        dry = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
        return max(cli.train([*shlex.split(line)[2:], *SMALL]) for line in dry if "scripts/train.py" in line)
    done = [f"--old-file=.venv/.{extras}" for extras in ("core", "dev", "all")]
    return subprocess.run([*words, *done, f"PY={sys.executable}"], cwd=ROOT, env=env | {"PYTEST_ADDOPTS": A_FEW_TESTS}).returncode


def install(words: list[str], env: dict[str, str], folder: Path) -> int:
    """A `pip install` into an environment of its own, which finds what is installed here, and what is missing on the index."""
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder)
        own = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True).strip()
        Path(own, "here.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    code = subprocess.run([sys.executable, "-m", "pip", "--python", python, *words[1:], "--quiet"], cwd=ROOT, env=env).returncode
    return code or subprocess.run([folder / "bin/caprefine", "--help"], env=env, stdout=subprocess.DEVNULL).returncode


def run_slow(words: list[str], env: dict[str, str]) -> int | None:
    """What `run` does not: training, at the smoke config's sizes, several processes, the hub, installations; None for the rest."""
    command = command_of(words[2:] if words[0] == "torchrun" else words)
    small = SMALL if command == "train" else []
    if words[0] == "make":
        return small_make(words, env)
    if words[0] == "pip":
        return install(words, env, Path("environment").absolute())
    if words[0] == "pytest":
        return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=env | {"PYTEST_ADDOPTS": A_FEW_TESTS}).returncode
    if words[0] in ("torchrun", "hf") or HUB_ID in words:
        words = [str(ROOT / word) if word.startswith("scripts/") else word for word in words]
        return subprocess.run([*words, *small], env=env).returncode
    if words[1].startswith("benchmarks/"):
        tiny = ["--size", "tiny", "--updates", "8"] if words[1].endswith("step_rate.py") else []
        return subprocess.run([sys.executable, *words[1:], *tiny], env=env).returncode
    return cli.COMMANDS[command]([*words[2:], *small], command) if command in ("train", "ablate") else None


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of commands that reach a hub, which is on this machine."""
    with subprocess.Popen([sys.executable, ROOT / "tests/hub.py"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        address, home = server.stdout.readline().strip(), str(tmp_path_factory.mktemp("hub"))
        found = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "HF_HOME": home, "OMP_NUM_THREADS": "1"}
        yield os.environ | found | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        server.terminate()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_slow_commands(page, place, hub, tmp_path, monkeypatch):
    """As they stand, but for the sizes of what is trained: those of the smoke config, and of a grid two arms of one seed.

    Photographs are trained on where there are any.
    """
    shutil.copytree(place, tmp_path / "place")
    if photographs := (ROOT.parent / "shared/flickr8k").is_dir():
        (tmp_path / "shared").symlink_to(ROOT.parent / "shared")
    monkeypatch.chdir(tmp_path / "place")
    Path("configs/ablations").mkdir(parents=True)
    smoke = yaml.safe_load((ROOT / "configs/ablations/smoke.yaml").read_text(encoding="utf-8"))
    for path in (ROOT / "configs/ablations").glob("*.yaml"):
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
        grid["arms"] = {name: grid["arms"][name] for name in {grid["baseline"], "hierarchical"}}
        grid |= {"config": str(ROOT / "configs/smoke.yaml"), "seeds": [0], "settings": smoke["settings"]}
        Path("configs/ablations", path.name).write_text(yaml.safe_dump(grid), encoding="utf-8")
    # A first round is laid over what is set here.
    refine = yaml.safe_load((ROOT / "configs/self_critical.yaml").read_text(encoding="utf-8"))
    refine["rlhf"]["fit"] |= {"epochs": 1, "epoch_size": 16, "batch_size": 4}
    Path("configs/self_critical.yaml").write_text(yaml.safe_dump(refine), encoding="utf-8")
    if page.stem == "howto":
        assert cli.main(["export", "--checkpoint", "models/best_rlhf_model.pt", "--output", "shared"]) == 0
    lines = [line for line in commands(page) if photographs or "flickr8k" not in line]
    once = dict.fromkeys(tuple(shlex.split(line, comments=True)) for line in lines)
    codes = {words: run_slow(list(words), hub) for words in once}
    assert 0 in codes.values()
    assert not {words: code for words, code in codes.items() if code}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_programs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    if not (place / "shared").exists():
        assert cli.main(["export", "--checkpoint", "models/best_rlhf_model.pt", "--output", "shared"]) == 0
    monkeypatch.setattr("builtins.input", lambda question: "a")
    for code in blocks(page, "python"):
        if HUB_ID in code:
            continue
        if "diffusers" in code:
            with warnings.catch_warnings(action="ignore"):
                pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, str(page), "exec"), {})


@pytest.mark.slow
def test_programs_that_reach_the_hub(place, hub, monkeypatch):
    monkeypatch.chdir(place)
    if not (place / "shared").exists():
        assert cli.main(["export", "--checkpoint", "models/best_rlhf_model.pt", "--output", "shared"]) == 0
    programs = [code for page in PAGES for code in blocks(page, "python") if HUB_ID in code]
    assert programs
    for code in programs:
        code += '\nprint(captioner("image.jpg")[0].text)'
        found = subprocess.run([sys.executable, "-c", code], env=hub, capture_output=True, text=True)
        assert found.returncode == 0 and found.stdout.strip(), found.stderr


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "docs/reward.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), (page.name, target)


def test_the_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "docs/make_reference.py"))["reference"]()
    assert made == (ROOT / "docs/reference.md").read_text(encoding="utf-8"), "run `make reference`"
    assert not [line for line in made.splitlines() if line.endswith("|  |")], "says nothing of this one"
