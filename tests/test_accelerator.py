"""All that a GPU is asked to do, on a pretended one: nothing may be left on the processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    "data.train=48",
    "data.val=16",
    "data.test=16",
    "base.fit.epochs=1",
    "reward.comparisons=40",
    "reward.curve=[]",
    "rlhf.fit.epochs=1",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="this PyTorch cannot pretend to have a device"
    ),
]


def there(folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Run commands of `caprefine` on the pretended accelerator."""
    script = str(Path(__file__).with_name("accelerator.py"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run([sys.executable, script, json.dumps(commands)], cwd=folder, env=env, capture_output=True, text=True)


def rows(path: Path) -> list[dict]:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene

    folder = tmp_path_factory.mktemp("accelerator")
    for i in range(3):
        render(sample_scene(5, "test", i)).save(folder / f"{i}.png")
    (folder / "list.txt").write_text("0.png\n1.png\n2.png\n")
    drafts = ({"image": f"{i}.png", "caption": "a red star on snow"} for i in range(3))
    (folder / "drafts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in drafts))
    return folder


SEARCH = ["order=left_to_right", "beams=2", "lengths=2", "clip=1", "consensus=1", "both_ways=true"]


def test_captions_are_those_of_the_processor(smoke, images):
    from hierarchical_diffusion_rlhf_caption_refinement import cli

    predict = ["predict", "--checkpoint", str(smoke / "models/smoke/best_rlhf_model.pt"), "--output"]
    asked = {
        "plain.json": ["--image-list", "list.txt"],
        "wishes.json": ["--image-list", "list.txt", "--must-include", "red", "--ban", "blue", "--candidates", "2"],
        "searched.json": ["--image-list", "list.txt", *SEARCH],
        "guided.json": ["--image-list", "list.txt", "--template", "a [MASK] on [MASK]", "remask=1", "guidance=1.5", "temperature=0.7"],
        "mended.jsonl": ["--refine", "drafts.jsonl"],
    }
    done = there(images, *([*predict, f"there_{name}", *more] for name, more in asked.items()))
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(images)
        assert not any(cli.main([*predict, f"here_{name}", *more]) for name, more in asked.items())
    for name in asked:
        here, away = (rows(images / f"{where}_{name}") for where in ("here", "there"))
        assert [row["caption"] for row in away] == [row["caption"] for row in here]
        assert [row["reward"] for row in away] == pytest.approx([row["reward"] for row in here], abs=1e-4)


def test_what_a_gpu_refuses_is_refused():
    start = (
        "import accelerator, torch\nx = torch.ones(2).to(accelerator.DEVICE)\nx[torch.tensor([0])] = 3\nassert (x * 2).tolist() == [6, 2]\n"
    )
    for name, wrong in {
        "add.Tensor": "x + torch.ones(2)",
        "index_select": "x.index_select(0, torch.tensor([0]))",
        "index_put_": "x[torch.tensor([0, 1])] = torch.ones(2)",
        "index.Tensor": "torch.ones(2)[torch.tensor([0]).to(x.device)]",
    }.items():
        done = subprocess.run([sys.executable, "-c", start + wrong], cwd=Path(__file__).parent, capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == f"RuntimeError: aten::{name}: one tensor on pretend:0, another on cpu"


def test_every_stage_trains_and_is_evaluated(tmp_path):
    train = ["train", "--config", str(ROOT / "configs/smoke.yaml"), *SMALL]
    again = [*train, "--stage", "rlhf", "start_from=models/smoke"]
    done = there(
        tmp_path,
        train,
        [*again, "run=words", "shaping.dense=leave_one_word_out", "shaping.kappa=1", "rlhf.logprob=mean_field", "rlhf.anchor=0.1"],
        [*again, "run=caption", "shaping.dense=caption", "shaping.shuffle_alpha=true", "rlhf.sparse=references"],
        [*again, "run=distilled", "rlhf.method=distil"],
        ["evaluate", "--checkpoint", "models/smoke/best_rlhf_model.pt", "sampler.candidates=2", "sampler.temperature=1"],
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "results/smoke/training_summary.json").read_text())
    assert set(summary["evaluation"]) == {"base", "rlhf"} and summary["win_rate"]["value"] > 0
