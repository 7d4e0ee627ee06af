"""The installed command: what it answers, and that it works away from the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["--help", "--version", "train", "evaluate", "predict", "export"])
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name] if name.startswith("-") else [name, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    if name == "--help":
        assert all(f"\n  {command} " in out for command in cli.COMMANDS)
    elif name == "--version":
        assert out == "caprefine 0.1.0\n"
    else:
        assert out.startswith(f"usage: caprefine {name} ")


EXPORT = ["export", "--checkpoint", "x", "--output", "y"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["trian"], EXPORT[:3], [*EXPORT, "--images", "z"], ["ablate", "few", "--report-only", "--only", "few/*"]],
)
def test_wrong_usage(arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train"], "what was saved is kept, the same command with --resume goes on from there"),
        (["evaluate", "--checkpoint", "x"], "the same command starts over"),
        (["predict", "--checkpoint", "x", "a.png"], "the same command starts over"),
        (["predict", "--checkpoint", "x", "a.png", "--format", "txt"], "the same command goes on from there"),
        (EXPORT, "y may be incomplete, the same command starts over"),
    ],
)
def test_ctrl_c_tells_what_the_command_does_the_next_time(arguments, told, monkeypatch, capsys):
    def pressed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{arguments[0]}", pressed)
    assert (cli.main(arguments), capsys.readouterr().err) == (130, f"interrupted; {told}\n")


def test_the_scripts_are_the_same_functions(capsys):
    assert cli.train(["seed=x"]) == cli.main(["train", "seed=x"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == second


def test_configs_are_found_by_name_and_files_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("default", "default.yaml", "configs/default.yaml"):
        assert cli.find_config(name).samefile(ROOT / "configs/default.yaml")
    for name in ("ablations/arms", "configs/ablations/arms.yaml"):
        assert cli.find_config(name).samefile(ROOT / "configs/ablations/arms.yaml")
    assert cli.find_config("elsewhere/default.yaml") == Path("elsewhere/default.yaml")
    Path("default").write_text("seed: 3\n")
    assert cli.find_config("default") == Path("default")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel made from the sources alone, installed apart from this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("src", "configs"):
        shutil.copytree(ROOT / name, folder / "tree" / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for command in (
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "tree")],
        [*pip, "install", "--no-deps", "--no-index", "--find-links", str(folder), "--target", str(folder / "site"), cli.DISTRIBUTION],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "site"


def caprefine(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(site / "bin/caprefine"), *arguments], cwd=folder, env=env, capture_output=True, text=True)


def test_a_wheel_brings_command_and_configs(installed, tmp_path):
    assert caprefine(installed, tmp_path, "--version").stdout == "caprefine 0.1.0\n"
    shipped = installed / "hierarchical_diffusion_rlhf_caption_refinement/configs"
    ours, theirs = ({p.relative_to(folder): p.read_text() for p in folder.rglob("*.yaml")} for folder in (ROOT / "configs", shipped))
    assert ours == theirs and Path("ablations/arms.yaml") in ours
    for config, error in {
        "flickr8k": "error: ../shared/flickr8k/human_ratings.jsonl: no such file; "
        "the reward stage would learn from it; --stage base does without, and with "
        "--config configs/references.yaml besides captions are the reward",
        "nowhere": "error: nowhere: No such file or directory",
    }.items():
        done = caprefine(installed, tmp_path, "train", "--config", config)
        assert (done.returncode, done.stderr.strip()) == (2, error)


@pytest.mark.slow
def test_a_wheel_trains_captions_and_exports(installed, tmp_path):
    assert caprefine(installed, tmp_path, "train", "--config", "configs/smoke.yaml").returncode == 0
    model = ("--checkpoint", "models/smoke/best_rlhf_model.pt")
    assert caprefine(installed, tmp_path, "predict", *model, "results/smoke/fresh/scene_0.png").returncode == 0
    assert caprefine(installed, tmp_path, "evaluate", *model).returncode == 0
    assert caprefine(installed, tmp_path, "export", *model, "--output", "out").returncode == 0 and (tmp_path / "out/config.json").exists()
