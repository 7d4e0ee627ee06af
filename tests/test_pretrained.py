"""Hugging Face's layout: what is saved reads back to the same captions, from a folder, from the hub, and through the Auto classes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPImageProcessorPil, ViTConfig, ViTModel

from hierarchical_diffusion_rlhf_caption_refinement import cli
from hierarchical_diffusion_rlhf_caption_refinement.captioner import Captioner
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import render, sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.data.text import encode
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.card import model_card
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import build_alignment, build_denoiser, load_denoiser, save_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.models.vision import build_vision, to_pixels
from hierarchical_diffusion_rlhf_caption_refinement.pretrained import CaptionRefiner
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import CheckpointError
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, DataConfig, RLHFConfig, VisionConfig

FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def exported(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "captioner"
    assert cli.main(["export", "--checkpoint", str(smoke / "models/smoke/best_rlhf_model.pt"), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    return [render(sample_scene(9, "test", i)) for i in range(5)]


def test_the_same_captions_rewards_and_confidences(smoke, exported, scenes, tmp_path):
    before, after = Captioner.from_pretrained(smoke / "models/smoke"), Captioner.from_pretrained(exported)
    for settings in ({}, {"temperature": 1.0, "candidates": 3, "seed": 4}):
        found = after(scenes, **settings)
        assert found == before(scenes, **settings) and all(isinstance(c.reward, float) for c in found)
    after.save_pretrained(tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {p.name: p.read_bytes() for p in exported.iterdir()}


def test_a_base_model_without_a_reward(smoke, scenes, tmp_path):
    shutil.copy(smoke / "models/smoke/best_base_model.pt", tmp_path)
    alone = Captioner.from_pretrained(tmp_path, "base")
    alone.save_pretrained(tmp_path / "out")
    found = Captioner.from_pretrained(tmp_path / "out")
    assert found(scenes) == alone(scenes) and found.reward is None and found.parts.kind == "base"
    assert "Nothing: the run's" in (tmp_path / "out/README.md").read_text()


def test_nothing_is_pickled_and_no_place_of_this_machine_is_told(exported):
    assert sorted(path.name for path in exported.iterdir()) == FILES
    assert not any(path.read_bytes().startswith((b"PK", b"\x80")) for path in exported.iterdir())
    texts = [path.read_text() for path in exported.iterdir() if path.suffix in (".json", ".md")]
    assert not any(str(exported.parents[1]) in text for text in texts)


@pytest.mark.parametrize(("place", "name"), [(".", "captions"), ("a/data", "data"), ("/", "data"), ("", "")])
def test_the_data_has_a_name_wherever_it_lies(smoke, tmp_path, monkeypatch, place, name):
    (tmp_path / "captions").mkdir()
    monkeypatch.chdir(tmp_path / "captions")
    captioner = Captioner.from_pretrained(smoke / "models/smoke")
    eyes, source = captioner.eyes, "folder" if place else "scenes"
    config = replace(eyes.config, data=replace(eyes.config.data, source=source, path=place))
    captioner.parts = replace(captioner.parts, eyes=replace(eyes, config=config))
    captioner.save_pretrained(tmp_path / "out")
    assert Captioner.from_pretrained(tmp_path / "out").eyes.config.data.path == name


def test_a_checkpoint_near_the_root_was_measured_nowhere(smoke):
    parts = Captioner.from_pretrained(smoke / "models/smoke").parts
    assert parts.measured()["gold"] and replace(parts, files=(Path("/best_rlhf_model.pt"),)).measured() == {}


def test_the_reward_of_an_earlier_run_is_found_from_anywhere(smoke, tmp_path, monkeypatch):
    for name in ("earlier", "later"):
        (tmp_path / "run/models" / name).mkdir(parents=True)
        (tmp_path / name).mkdir()
    shutil.copy(smoke / "models/smoke/best_reward_model.pt", tmp_path / "run/models/earlier")
    eyes, model = load_denoiser(smoke / "models/smoke/best_rlhf_model.pt", "rlhf")
    eyes = replace(eyes, config=replace(eyes.config, start_from="models/earlier"))
    path = tmp_path / "run/models/later/best_rlhf_model.pt"
    save_denoiser(path, "rlhf", eyes, model, {})
    for folder, named in (("run", "models/later/best_rlhf_model.pt"), ("later", path), ("earlier", "../run/models/later")):
        monkeypatch.chdir(tmp_path / folder)
        parts = Captioner.from_pretrained(named).parts
        assert parts.reward and parts.files[1].resolve() == tmp_path / "run/models/earlier/best_reward_model.pt"


def test_a_backbone_named_from_where_training_ran_is_found_from_anywhere(smoke, scenes, tmp_path, monkeypatch):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**small, image_size=32, patch_size=16), add_pooling_layer=False).save_pretrained(tmp_path / "shared/vit")
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path / "shared/vit")
    (tmp_path / "run/models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    eyes = load_denoiser(smoke / "models/smoke/best_base_model.pt", "base")[0]
    config = replace(eyes.config, vision=VisionConfig(backbone="../shared/vit", width=0))
    vision = build_vision(config.vision)
    eyes = replace(eyes, config=config, vision=vision, alignment=build_alignment(config, eyes.tokenizer, vision.width))
    path = tmp_path / "run/models/best_base_model.pt"
    save_denoiser(path, "base", eyes, build_denoiser(eyes), {})
    expected = Captioner.from_pretrained("models", "base")(scenes)
    (tmp_path / "else/where").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "else/where")
    found = Captioner.from_pretrained(path)
    assert found(scenes) == expected and found.eyes.config == config
    assert cli.main(["export", "--checkpoint", str(path), "--output", "out"]) == 0
    (tmp_path / "shared").rename(tmp_path / "gone")
    Path("out").rename(tmp_path / "moved")
    assert Captioner.from_pretrained("../../moved")(scenes) == expected
    line = r"best_base_model\.pt: \.\./shared/vit, by which it sees, is no folder from here, .*`caprefine export`, run where the folder is"
    with pytest.raises(CheckpointError, match=line):
        Captioner.from_pretrained(path)


def test_the_card_has_the_measured_table(smoke, exported):
    card, summary = (exported / "README.md").read_text(), json.loads((smoke / "results/smoke/training_summary.json").read_text())
    assert card.startswith("---\nlibrary_name: ") and "\npipeline_tag: image-to-text\n" in card
    gold = summary["gold"]["rlhf"]
    assert f"| **refined** | **{gold['accuracy']:.3f}** | **{gold['specificity']:.3f}** |" in card
    assert f"in {summary['reward']['accuracy']['value']:.1%} (95 %:" in card and f"{summary['win_rate']['value']:.1%}" in card


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "refined by reinforcement learning from the preferences of people."),
        ({"sparse": "references"}, "refined by reinforcement learning from agreement with the training captions (CIDEr-D)."),
        ({"sparse": "references", "method": "distil"}, "refined on the best captions that a search finds by agreement with the training"),
        ({"first": "configs/references.yaml"}, "from the preferences of people, after a first round as references.yaml says."),
    ],
)
def test_the_card_says_how_a_model_was_refined(settings, told):
    config = Config(data=DataConfig(source="folder", path="photos"), rlhf=RLHFConfig(**settings))
    assert told in model_card(config, "rlhf", 10, 20, {}) and "refined" not in model_card(config, "base", 10, 20, {})


def test_transformers_reads_every_part(exported, scenes):
    captioner = Captioner.from_pretrained(exported)
    assert AutoConfig.from_pretrained(exported).model_type == "caprefine"
    tokenizer = AutoTokenizer.from_pretrained(exported)
    texts = ["A small red circle!", "two hearts on water", "a zeppelin"]
    assert tokenizer(texts).input_ids == encode(captioner.eyes.tokenizer, texts) and tokenizer.pad_token_id == 0
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 90, 3), dtype=np.uint8))
    pixels = AutoImageProcessor.from_pretrained(exported, backend="pil")([photo, scenes[0]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, to_pixels([photo, scenes[0]], 64), atol=1e-5, rtol=0)


def test_auto_model_holds_the_same_networks(exported, tmp_path):
    model, captioner = AutoModel.from_pretrained(exported), Captioner.from_pretrained(exported)
    assert isinstance(model, CaptionRefiner) and not model.training
    asked = torch.tensor([[2, 3, 4]]), torch.tensor([[1, 1, 2]]), torch.tensor([3]), torch.randn(1, captioner.eyes.vision.num_tokens, 32)
    assert torch.equal(model(*asked).logits, captioner.model(*asked).logits)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_an_id_of_the_hub_is_fetched_without_anything_that_could_hold_code(exported, scenes, monkeypatch):
    asked = []

    def fetch(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Captioner.from_pretrained("somebody/captioner")(scenes) == Captioner.from_pretrained(exported)(scenes)
    assert asked == [("somebody/captioner", ["*.json", "*.safetensors", "*.txt", "*.md"])]


def test_an_id_that_is_not_there_is_one_clear_line():
    with pytest.raises(CheckpointError, match=r"^nobody/nothing: no such file or folder, and not to be had from the hub: ") as error:
        Captioner.from_pretrained("nobody/nothing")
    assert "\n" not in str(error.value)


def test_pushing_sends_the_folder(exported, monkeypatch):
    sent: dict[str, object] = {}

    class Api:
        def create_repo(self, repo: str, **options: object) -> None:
            sent["repo"] = (repo, options)

        def upload_folder(self, repo_id: str, folder_path: str) -> str:
            sent["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert Captioner.from_pretrained(exported).push_to_hub("me/mine", private=True) == "https://hub.example/me/mine"
    assert sent == {"repo": ("me/mine", {"private": True, "exist_ok": True}), "files": FILES}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("config.json", '{"model_type": "gpt2"}', "config.json: the model is of type gpt2, expected caprefine"),
        ("config.json", "{", "damaged or cut short"),
        ("model.safetensors", "x" * 30, "damaged or cut short"),
        ("model.safetensors", None, "No such file or directory"),
    ],
)
def test_damaged_folders_are_one_clear_line(exported, tmp_path, name, content, line):
    shutil.copytree(exported, tmp_path / "bad")
    path = tmp_path / "bad" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(CheckpointError, match=line) as error:
        Captioner.from_pretrained(tmp_path / "bad")
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_1(exported, tmp_path, capsys):
    (tmp_path / "out/model.safetensors").mkdir(parents=True)
    shutil.copy(exported / "config.json", tmp_path / "out")
    assert cli.main(["export", "--checkpoint", str(exported), "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'out/model.safetensors'}: cannot be written: ") and "Is a directory" in line


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors", "vision"])
def test_files_of_other_hands_are_not_overwritten(exported, tmp_path, capsys, name):
    path, command = tmp_path / "out" / name, ["export", "--checkpoint", str(exported), "--output", str(tmp_path / "out")]
    path.mkdir(parents=True) if name == "vision" else (path.parent.mkdir(), path.write_text('{"model_type": "gpt2"}'))
    (tmp_path / "out/photo.txt").write_text("mine")
    assert cli.main(command) == 2 and sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([name, "photo.txt"])
    reason = "is there already, and no captioner that was saved here; move it away, or name another folder"
    assert capsys.readouterr().err == f"error: {path}: {reason}\n"
    assert name == "vision" or path.read_text() == '{"model_type": "gpt2"}'
    path.rename(tmp_path / "away")
    assert cli.main(command) == 0
    (tmp_path / "out/model.safetensors").unlink()  # as an interrupted export leaves it
    (tmp_path / "out/README.md").write_text("half a ca")
    assert cli.main(command) == 0 and (tmp_path / "out/photo.txt").read_text() == "mine"
    assert all((tmp_path / "out" / p.name).read_bytes() == p.read_bytes() for p in exported.iterdir())


def test_settings_of_another_version_are_one_line_and_exit_code_1(exported, scenes, tmp_path, capsys):
    scenes[0].save(tmp_path / "0.png")
    shutil.copytree(exported, tmp_path / "later")
    told = json.loads((tmp_path / "later/config.json").read_text())
    told["settings"]["base"]["later"] = 1
    (tmp_path / "later/config.json").write_text(json.dumps(told))
    assert cli.main(["predict", "--checkpoint", str(tmp_path / "later"), str(tmp_path / "0.png")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.json: made by another version of the package: base.later: " in line


def test_another_kind_than_asked_for_is_refused(exported):
    with pytest.raises(CheckpointError, match="is a rlhf captioner, expected base"):
        Captioner.from_pretrained(exported, "base")


def test_predict_takes_an_exported_folder(smoke, exported, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scenes[0].save("0.png")
    for name, checkpoint in {"a.json": smoke / "models/smoke/best_rlhf_model.pt", "b.json": exported}.items():
        assert cli.main(["predict", "--checkpoint", str(checkpoint), "0.png", "--output", name]) == 0
    assert Path("a.json").read_text() == Path("b.json").read_text()
