"""evaluate.py: the numbers of a checkpoint on its test images, alone and beside another, and what it refuses."""

import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.summary import summarise
from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import load_config

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"
BASE, REWARD, RLHF = (f"models/smoke/best_{kind}_model.pt" for kind in ("base", "reward", "rlhf"))


@pytest.fixture
def there(smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the finished run's checkpoints and features in it, as working directory."""
    for name in ("models", "cache"):
        shutil.copytree(smoke / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_numbers_are_those_of_the_training_run(smoke, there, capsys):
    assert cli.evaluate(["--checkpoint", RLHF, "--model-type", "rlhf"]) == 0
    found = json.loads(Path("results/smoke/evaluation_rlhf/evaluation.json").read_text())
    summary = json.loads((smoke / "results/smoke/training_summary.json").read_text())
    assert found["evaluation"] == {RLHF: summary["evaluation"]["rlhf"]}
    assert found["gold"]["rlhf"] == summary["gold"]["rlhf"]
    assert (found["type"], found["run"], len(found["captions"])) == ("rlhf", "smoke", 32)
    assert Path("results/smoke/evaluation_rlhf/report.html").stat().st_size > 10_000
    assert "test images" in capsys.readouterr().out


def test_two_captioners_on_the_same_images(smoke, there, capsys):
    assert cli.evaluate(["--checkpoint", RLHF, "--compare", BASE, "--output", "elsewhere"]) == 0
    found = json.loads(Path("elsewhere/evaluation.json").read_text())
    summary = json.loads((smoke / "results/smoke/training_summary.json").read_text())
    assert found["win_rate"] == summary["win_rate"] and set(found["evaluation"]) == {RLHF, BASE} and list(found["gold"]) == ["rlhf", "base"]
    assert Path("elsewhere/report.html").exists() and not Path("results").exists()
    assert f"{RLHF} beats {BASE} on" in " ".join(capsys.readouterr().out.split())


def test_each_is_named_by_what_it_is_whichever_comes_first(smoke, there, capsys):
    gold = json.loads((smoke / "results/smoke/training_summary.json").read_text())["gold"]
    command = ["--checkpoint", BASE, "--model-type", "base", "--compare", RLHF, "--output", "x"]
    assert cli.evaluate(command) == 0
    found = json.loads(Path("x/evaluation.json").read_text())
    assert found["gold"] == {"base": gold["base"], "rlhf": gold["rlhf"]} and gold["base"] != gold["rlhf"]
    assert (found["checkpoint"], found["type"], found["compare"], found["compare_type"]) == (BASE, "base", RLHF, "rlhf")
    page = Path("x/report.html").read_text()
    values = [f"{gold[kind]['utility']:.3f}" for kind in ("base", "rlhf")]
    assert f"{BASE} beats {RLHF}." in page and f"<th>{BASE}</th><th>{RLHF}</th>" in page
    assert re.search(f"<th>utility.*?</th>{''.join(f'<td>{value}</td>' for value in values)}", page)
    assert re.search(rf"utility\W+{values[0]}\W+{values[1]}", capsys.readouterr().out)


def test_two_of_one_kind_are_the_checkpoint_and_the_other(there):
    shutil.copytree("models/smoke", "models/copy")
    other = BASE.replace("smoke", "copy")
    for compare in (other, BASE):
        assert cli.evaluate(["--checkpoint", BASE, "--model-type", "base", "--compare", compare, "--output", "x", "data.test=6"]) == 0
        found = json.loads(Path("x/evaluation.json").read_text())
        assert list(found["gold"]) == ["checkpoint", "compare"] and found["gold"]["checkpoint"] == found["gold"]["compare"]
        assert set(found["evaluation"]) == {BASE, compare} and found["win_rate"]["value"] == 0.5
        assert f"{BASE} beats {compare}." in Path("x/report.html").read_text()


def test_the_base_model_with_other_settings(there):
    assert cli.evaluate(["--checkpoint", BASE, "--model-type", "base", "--output", "short", "sampler.max_words=4", "data.test=10"]) == 0
    found = json.loads(Path("short/evaluation.json").read_text())
    assert len(found["captions"]) == 10 and max(len(c.split()) for c in found["captions"].values()) <= 4
    assert list(found["gold"]) == ["base"] and BASE in Path("short/report.html").read_text()


def test_best_of_several_by_reward(there):
    scores = []
    for i, more in enumerate(["sampler.candidates=1", "sampler.candidates=6"]):
        arguments = ["--checkpoint", BASE, "--model-type", "base", "--output", str(i), "sampler.temperature=1", "data.test=12", more]
        assert cli.evaluate(arguments) == 0
        scores.append(json.loads(Path(f"{i}/evaluation.json").read_text())["evaluation"][BASE]["reward"]["value"])
    assert scores[1] > scores[0]


def test_several_candidates_need_a_reward_model(there, capsys):
    Path(REWARD).unlink()
    assert cli.evaluate(["--checkpoint", BASE, "--model-type", "base", "sampler.temperature=1", "sampler.candidates=2"]) == 1
    assert capsys.readouterr().err == "error: sampler.candidates > 1 needs a reward model to choose by\n"


def test_a_reward_model_of_other_eyes(there, capsys):
    payload = checkpoint.load(REWARD, "reward")
    next(iter(payload["alignment"].values())).add_(1.0)
    checkpoint.save(REWARD, "reward", payload)
    line = f"{REWARD}: its eyes or its vocabulary are not those of {RLHF}; train the older one anew, or move it away"
    assert cli.evaluate(["--checkpoint", RLHF]) == cli.predict(["--checkpoint", RLHF, "x.png", "--candidates", "2"]) == 1
    assert capsys.readouterr().err == f"error: {line}\n" * 2
    config = load_config([SMOKE], ["data.test=4"])  # a training run between its stages goes on without it
    assert summarise(config, [], {"seconds": {"base": 1.0, "rlhf": 1.0}}, Path("cache"))[1]["rlhf"].reward is None
    cli.caption_fresh_images(config, Console())
    assert capsys.readouterr().out == f"no captions of new images: {line}\n"


def test_wrong_kinds_and_settings(there, capsys):
    refused = [
        (["--checkpoint", RLHF, "--model-type", "base"], 1, f"{RLHF}: is a rlhf checkpoint, expected base"),
        (["--checkpoint", REWARD], 1, f"{REWARD}: is a reward checkpoint, expected rlhf"),
        (["--checkpoint", RLHF, "--compare", REWARD], 1, f"{REWARD}: is a reward checkpoint, expected a captioner: base or rlhf"),
        (["--checkpoint", "models/smoke/last_rlhf.pt"], 1, "models/smoke/last_rlhf.pt: is a training checkpoint, expected rlhf"),
        (["--checkpoint", RLHF, "sampler.stepz=4"], 2, "sampler.stepz=4: unknown key 'sampler.stepz'; did you mean 'sampler.steps'?"),
        (["--checkpoint", RLHF, "sead=4"], 2, "sead=4: unknown key 'sead'; did you mean 'seed'?"),
        (["--checkpoint", RLHF, "sampler.guidance=nan"], 2, "sampler.guidance=nan: must be a finite number, and not beyond 1e+12"),
    ]
    settled = "is for training; for an evaluation run, seed, data, sampler and shaping can be set"
    for text in ("base.width=64", "vision.image_size=128", "threads=2", "reward.pessimism=1", "rlhf.kl=1", "data.max_words=9"):
        refused.append((["--checkpoint", RLHF, text], 2, f"{text}: {settled}"))
    for arguments, code, line in refused:
        assert cli.evaluate([*arguments, "--output", "x"]) == code
        assert capsys.readouterr().err == f"error: {line}\n"


class Bomb:
    def __reduce__(self):
        return exec, ("open('it ran', 'w').close()",)


def damaged(original: bytes, path: Path, how: str) -> None:
    """Write a file that is no checkpoint any more."""
    if how == "pickle":
        path.write_bytes(pickle.dumps({"format": 1, "kind": "rlhf", "payload": Bomb()}))
    elif how == "archive with a pickle":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"format": 1, "kind": "rlhf", "payload": Bomb()}, protocol=2))
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
    elif how != "missing":
        path.write_bytes({"empty": b"", "text": b"hello", "cut": original[: len(original) // 2], "flipped": _flipped(original)}[how])


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 64]) + data[middle + 64 :]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "No such file or directory"),
        ("empty", "empty file"),
        ("text", "not a checkpoint"),
        ("cut", "damaged or cut short"),
        ("flipped", "damaged or cut short"),
        ("pickle", "refused: it holds Python objects, which can run code when loaded; none of it was run"),
        ("archive with a pickle", "refused: it holds Python objects, which can run code when loaded; none of it was run"),
    ],
)
@pytest.mark.parametrize(
    "command", [cli.evaluate, lambda arguments: cli.predict([*arguments, "--image-url", "x.png"])], ids=["evaluate", "predict"]
)
def test_a_damaged_checkpoint_is_named_with_the_reason_and_nothing_in_it_runs(smoke, tmp_path, monkeypatch, capsys, how, reason, command):
    monkeypatch.chdir(tmp_path)
    damaged((smoke / RLHF).read_bytes(), Path("bad.pt"), how)
    assert command(["--checkpoint", "bad.pt"]) == 1
    assert capsys.readouterr().err == f"error: bad.pt: {reason}\n"
    assert not Path("it ran").exists()
