"""TRL: preferences go out with their images, and rewards come in."""

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.adapters.trl import export_preferences, preference_reward
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner
from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import Comparison, PreferenceError, from_trl
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
    (tmp_path / "comparisons.jsonl").write_text("".join(json.dumps(asdict(c)) + "\n" for c in found))
    return tmp_path


def test_preferences_go_out_with_their_images(recorded, tmp_path):
    out = tmp_path / "out"
    assert export_preferences(recorded / "comparisons.jsonl", recorded / "images", out, "Caption this.") == 3
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [row["chosen"][0]["content"][0]["text"] for row in rows] == ["good a", "bad b", "good c"]
    assert all((out / row["file_names"][0]).read_bytes() == (recorded / "images" / row["file_names"][0]).read_bytes() for row in rows)
    assert {c.image for c in from_trl(out / "metadata.jsonl")} == {"0.png", "more/1.png"}


def test_the_command_does_the_same(recorded, tmp_path, capsys):
    comparisons = ["export", "--preferences", str(recorded / "comparisons.jsonl"), "--output", str(tmp_path / "out")]
    assert cli.main([*comparisons, "--images", str(recorded / "images")]) == 0 and (tmp_path / "out/more/1.png").exists()
    assert capsys.readouterr().out == f"3 pairs in {tmp_path / 'out'}\n"
    assert cli.main(comparisons) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_files_of_other_hands_are_not_overwritten(recorded, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", "--preferences", str(recorded / "comparisons.jsonl"), "--images", str(recorded / "images"), "--output"]
    for name, content in (("metadata.jsonl", '{"file_name": "0.png", "text": "mine"}\n'), ("0.png", "mine")):
        out.mkdir()
        (out / name).write_text(content)
        assert cli.main([*command, str(out)]) == 2 and (out / name).read_text() == content and list(out.iterdir()) == [out / name]
        line = f"error: {out / name}: is there already, and not of an export; move it away, or name another folder\n"
        assert capsys.readouterr().err == line
        (out / name).unlink()
        out.rmdir()
    before = sorted(recorded.rglob("*"))
    assert cli.main([*command, f"{recorded}/images/../images"]) == 2 and sorted(recorded.rglob("*")) == before
    assert ": the images are there; name another folder, to which they are copied\n" in capsys.readouterr().err


def test_an_export_can_be_repeated(recorded, tmp_path):
    def export() -> dict[str, bytes]:
        assert export_preferences(recorded / "comparisons.jsonl", recorded / "images", tmp_path / "out") == 3
        return {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    first = export()
    assert export() == first
    (tmp_path / "out/metadata.jsonl").unlink()  # as an interruption leaves it
    assert export() == first
    render(sample_scene(9, "test", 7)).save(recorded / "images/0.png")
    assert export()["0.png"] == (recorded / "images/0.png").read_bytes() != first["0.png"]


@pytest.mark.parametrize("name", ["gone.png", "../images/0.png"])
def test_an_image_that_is_not_there_is_named(recorded, tmp_path, name):
    (tmp_path / "bad.jsonl").write_text(json.dumps(asdict(Comparison("x", name, "a", "b", "a"))))
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


def tiny_llava(folder: Path) -> None:
    """A model that sees and its processor, random, with words for the recorded comparisons."""
    import transformers

    words = ["<pad>", "<unk>", "<image>", "good", "bad", *"abc"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<pad>", "extra_special_tokens": {"image_token": "<image>"}}
    said = "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }} {% endfor %}"
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
        patch_size=16,
        vision_feature_select_strategy="default",
        chat_template="{% for m in messages %}" + said + "{% endfor %}",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**small, image_size=32, patch_size=16),
        text_config=transformers.LlamaConfig(**small, vocab_size=len(words)),
        image_token_index=words.index("<image>"),
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.slow
def test_a_model_that_sees_learns_from_the_preferences(recorded, tmp_path):
    """Two updates of DPO on a LLaVA of one layer that was saved on the spot."""
    export_preferences(recorded / "comparisons.jsonl", recorded / "images", tmp_path / "out")
    with warnings.catch_warnings(action="ignore"):
        trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
        datasets = pytest.importorskip("datasets")
        tiny_llava(tmp_path / "vlm")
        data = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
        args = trl.DPOConfig(
            str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=3,
            learning_rate=0.1,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        trainer = trl.DPOTrainer(str(tmp_path / "vlm"), args=args, train_dataset=data)
        trainer.train()
    first, second = (row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["rewards/margins"] == 0
    assert second["loss"] < first["loss"] and second["rewards/margins"] > 0


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


def test_pictures_are_told_apart_by_what_they_show(captioner):
    """Not by their bytes, which are the same in different colours of a palette; and as their files would be."""
    scene = render(sample_scene(9, "test", 0)).quantize(16)
    other = scene.copy()
    other.putpalette(bytes(255 - value for value in scene.getpalette()))
    clear = scene.convert("RGBA")
    clear.putalpha(128)
    like, text = preference_reward(captioner), captioner(scene)[0].text
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    scores = like([""] * 3, [text] * 3, image=[scene, other, clear])
    assert scores == [like([""], [text], image=[picture.convert("RGB")])[0] for picture in (scene, other, white)]
    assert len(set(scores)) == 3 and scene.tobytes() == other.tobytes()


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
