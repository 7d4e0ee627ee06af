"""TRL: preferences go out with their images, and rewards come in."""

import json
import warnings
from pathlib import Path

import pytest

from hierarchical_diffusion_rlhf_caption_refinement.adapters.trl import export_preferences, preference_reward
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner
from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import Comparison, PreferenceError, append_comparisons, from_trl
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene


@pytest.fixture(scope="module")
def captioner(smoke):
    return Captioner.from_pretrained(smoke / "models/smoke")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Four comparisons of two images, three of them decided, one image in a folder."""
    for i, name in enumerate(["0.png", "more/1.png"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True)
        render(sample_scene(9, "test", i)).save(path)
    rows = [("0.png", "a", "a"), ("0.png", "b", "b"), ("more/1.png", "c", "a"), ("more/1.png", "d", "tie")]
    found = [Comparison(id_, image, f"good {id_}", f"bad {id_}", choice) for image, id_, choice in rows]  # type: ignore[arg-type]
    append_comparisons(tmp_path / "comparisons.jsonl", found)
    return tmp_path


def test_preferences_go_out_with_their_images(recorded, tmp_path):
    out = tmp_path / "out"
    assert export_preferences(recorded / "comparisons.jsonl", recorded / "images", out, "Caption this.") == 3
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["chosen"][0]["content"][0]["text"] for row in rows] == ["good a", "bad b", "good c"]
    assert all((out / row["file_names"][0]).read_bytes() == (recorded / "images" / row["file_names"][0]).read_bytes() for row in rows)
    assert {c.image for c in from_trl(out / "metadata.jsonl")} == {"0.png", "more/1.png"}


@pytest.mark.parametrize("name", ["gone.png", "../images/0.png"])
def test_an_image_that_is_not_there_is_named(recorded, tmp_path, name):
    append_comparisons(tmp_path / "bad.jsonl", [Comparison("x", name, "a", "b", "a")])
    with pytest.raises(PreferenceError, match=f"^{name}: no such image in "):
        export_preferences(tmp_path / "bad.jsonl", recorded / "images", tmp_path / "out")


def test_its_trainer_can_read_the_preferences(recorded, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    export_preferences(recorded / "comparisons.jsonl", recorded / "images", tmp_path / "out")
    data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert set(data.column_names) == {"images", "prompt", "chosen", "rejected", "id"}
    assert [row["images"][0].size for row in data] == [(64, 64)] * 3
    with warnings.catch_warnings(action="ignore"):
        trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
        assert trl.is_conversational(data[0])


def test_the_reward_is_the_captions_own(captioner):
    scenes = [render(sample_scene(9, "test", i)) for i in range(3)]
    captions, like = captioner(scenes), preference_reward(captioner)
    texts, expected = [c.text for c in captions], [c.reward for c in captions]
    assert like(["Describe."] * 3, texts, image=scenes) == pytest.approx(expected, abs=1e-5)
    said = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    by_images = preference_reward(captioner, "images")
    assert by_images(["Describe."] * 3, said, images=[[s] for s in scenes], trainer_state=None) == pytest.approx(expected, abs=1e-5)
    unknown, long, nothing = like(["Describe."] * 3, ["a zeppelin", "red " * 50, ""], image=scenes)
    assert -4 < unknown < 4 and -4 < long < 4 and nothing == -4


def test_a_captioner_without_a_reward_model_cannot_be_asked(captioner):
    with pytest.raises(ValueError, match="no reward model"):
        preference_reward(Captioner(captioner.eyes, captioner.model, None, captioner.plan))


@pytest.mark.slow
def test_it_trains_with_our_reward(captioner, tmp_path):
    """One update of GRPO on a text model of one layer, the picture being a column beside the prompt."""
    with warnings.catch_warnings(action="ignore"):
        trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
        datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=captioner.eyes.tokenizer, pad_token="<pad>", eos_token="<unk>")
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2))
        data = datasets.Dataset.from_dict({"prompt": ["a"] * 4, "picture": [render(sample_scene(9, "test", i)) for i in range(4)]})
        args = trl.GRPOConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            use_cpu=True,
            report_to=[],
        )
        trainer = trl.GRPOTrainer(gpt2, preference_reward(captioner, "picture"), args, data, processing_class=tokenizer)
        trainer.train()
    logged = next(row for row in trainer.state.log_history if "rewards/people_like_it/mean" in row)
    assert -4 <= logged["rewards/people_like_it/mean"] <= 4
