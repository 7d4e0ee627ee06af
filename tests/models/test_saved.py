from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from hierarchical_diffusion_rlhf_caption_refinement.data.text import banned_ids, build_tokenizer, words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import Evidence, RewardModel
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import (
    Eyes,
    build_alignment,
    build_denoiser,
    eyes_payload,
    load_denoiser,
    load_eyes,
    load_reward,
    same_eyes,
    save_denoiser,
    save_eyes,
    save_reward,
    with_config,
)
from hierarchical_diffusion_rlhf_caption_refinement.models.vision import VisionError, build_vision
from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import CheckpointError
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import AlignmentConfig, BaseConfig, Config, DataConfig, VisionConfig

CONFIG = Config(
    run="toy",
    data=DataConfig(max_words=6),
    vision=VisionConfig(width=16, image_size=32, patch_size=16, layers=1, heads=2),
    alignment=AlignmentConfig(width=16, heads=2, embed=8),
    base=BaseConfig(width=16, layers=2, heads=2),
)


@pytest.fixture
def eyes() -> Eyes:
    torch.manual_seed(0)
    tokenizer, vision = build_tokenizer(["a red dog", "the blue cat"], 1), build_vision(CONFIG.vision)
    return Eyes(CONFIG, tokenizer, banned_ids(tokenizer), vision, build_alignment(CONFIG, tokenizer, vision.width))


def test_eyes_come_back_as_they_were(eyes: Eyes, tmp_path: Path) -> None:
    save_eyes(tmp_path / "eyes.pt", eyes, {"row": {"val": 0.5}})
    back = load_eyes(tmp_path / "eyes.pt")
    assert checkpoint.load(tmp_path / "eyes.pt", "alignment")["facts"] == {"row": {"val": 0.5}}
    assert back.config == CONFIG and back.banned == eyes.banned == (0, 1)
    assert back.tokenizer.to_str() == eyes.tokenizer.to_str() and back.vision.fingerprint() == eyes.vision.fingerprint()
    torch.testing.assert_close(back.alignment.embed_texts(["a red cat"]), eyes.alignment.embed_texts(["a red cat"]))
    assert not any(p.requires_grad for p in back.alignment.parameters())  # type: ignore[attr-defined]


def test_a_captioner_comes_back_with_all_it_needs(eyes: Eyes, tmp_path: Path) -> None:
    model = build_denoiser(eyes, dropout=0.5)
    save_denoiser(tmp_path / "base.pt", "base", eyes, model, {})
    back, loaded = load_denoiser(tmp_path / "base.pt", "base")
    x0, step, length, image = torch.full((1, 3), 2), torch.ones(1, 3, dtype=torch.long), torch.tensor([3]), torch.randn(1, 4, 16)
    torch.testing.assert_close(loaded(x0, step, length, image).logits, model.eval()(x0, step, length, image).logits)
    assert not loaded.training and back.vision.fingerprint() == eyes.vision.fingerprint()
    with pytest.raises(CheckpointError):
        load_denoiser(tmp_path / "base.pt", "rlhf")


@pytest.mark.parametrize("reader_layers", [0, 1])
def test_a_reward_model_comes_back_with_its_scores(eyes: Eyes, tmp_path: Path, reader_layers: int) -> None:
    words = words_and_owners(eyes.tokenizer)
    reward = RewardModel(Evidence(build_denoiser(eyes), eyes.alignment, words), 3, reader_layers, 0.7)
    reward.linear.normal_()
    reward.set_base(torch.randn(3, 9))
    with torch.no_grad():
        for parameter in reward.readers.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_reward(tmp_path / "reward.pt", eyes, reward, {"accuracy": 0.7})
    its, back = load_reward(tmp_path / "reward.pt", words)
    assert same_eyes(its, eyes)
    image = torch.randn(2, 4, 16)
    asked = (torch.tensor([[2, 3, 4], [5, 6, 0]]), torch.tensor([3, 2]), image, eyes.alignment.embed_images(image))
    torch.testing.assert_close(back.score(*asked), reward.score(*asked))
    assert checkpoint.load(tmp_path / "reward.pt", "reward")["facts"] == {"accuracy": 0.7}
    assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_eyes_are_the_same_if_they_see_and_spell_alike(eyes: Eyes, tmp_path: Path) -> None:
    save_eyes(tmp_path / "eyes.pt", eyes, {})
    assert same_eyes(load_eyes(tmp_path / "eyes.pt"), eyes)
    longer = replace(CONFIG, data=replace(CONFIG.data, max_words=7))
    for other in (
        replace(eyes, tokenizer=build_tokenizer(["a red dog", "the blue cow"], 1)),
        replace(eyes, vision=build_vision(CONFIG.vision)),
        replace(eyes, alignment=build_alignment(CONFIG, eyes.tokenizer, eyes.vision.width)),
        replace(eyes, config=longer, alignment=build_alignment(longer, eyes.tokenizer, eyes.vision.width)),
    ):
        assert not same_eyes(other, eyes)


def test_weights_of_another_shape_are_one_clear_line(eyes: Eyes, tmp_path: Path) -> None:
    wider = replace(eyes, config=replace(CONFIG, base=replace(CONFIG.base, width=32)))
    save_denoiser(tmp_path / "base.pt", "base", eyes, build_denoiser(wider), {})
    with pytest.raises(CheckpointError, match="does not fit") as error:
        load_denoiser(tmp_path / "base.pt", "base")
    assert "base.pt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["model", "vision", "alignment"])
def test_weights_that_are_no_numbers_are_refused(eyes: Eyes, tmp_path: Path, part: str) -> None:
    save_denoiser(tmp_path / "base.pt", "base", eyes, build_denoiser(eyes), {})
    saved = torch.load(tmp_path / "base.pt", weights_only=True)
    name = next(iter(saved["payload"][part]))
    saved["payload"][part][name].view(-1)[-1] = float("nan")
    torch.save(saved, tmp_path / "base.pt")
    with pytest.raises(CheckpointError) as error:
        load_denoiser(tmp_path / "base.pt", "base")
    assert str(error.value) == f"{tmp_path / 'base.pt'}: damaged: not all numbers of {name} are finite"


@pytest.mark.parametrize("part", ["model", "vision", "alignment", "config", "tokenizer", "banned"])
def test_a_file_without_a_part_is_one_line(eyes: Eyes, tmp_path: Path, part: str) -> None:
    payload = eyes_payload(eyes) | {"model": build_denoiser(eyes).state_dict()}
    checkpoint.save(tmp_path / "base.pt", "base", {name: value for name, value in payload.items() if name != part})
    with pytest.raises(CheckpointError) as error:
        load_denoiser(tmp_path / "base.pt", "base")
    assert str(error.value) == f"{tmp_path / 'base.pt'}: damaged or made by another version: it has no '{part}'"


def test_settings_of_another_version_are_one_line_that_names_file_and_key(eyes: Eyes, tmp_path: Path) -> None:
    save_eyes(tmp_path / "eyes.pt", eyes, {})
    saved = torch.load(tmp_path / "eyes.pt", weights_only=True)
    saved["payload"]["config"]["base"]["later"] = 1
    torch.save(saved, tmp_path / "eyes.pt")
    with pytest.raises(CheckpointError, match=r"eyes\.pt: made by another version of the package: base\.later: .*'later'") as error:
        load_eyes(tmp_path / "eyes.pt")
    assert "\n" not in str(error.value)


def test_files_from_before_alpha_could_fade_did_not_fade(eyes: Eyes, tmp_path: Path) -> None:
    save_eyes(tmp_path / "eyes.pt", eyes, {})
    saved = torch.load(tmp_path / "eyes.pt", weights_only=True)
    shaping = saved["payload"]["config"]["shaping"]
    shaping.pop("fade")
    shaping["preference_weight"] = 0.0
    torch.save(saved, tmp_path / "eyes.pt")
    assert load_eyes(tmp_path / "eyes.pt").config.shaping.fade == 0


def test_another_runs_settings_do_not_change_what_the_eyes_are_built_from(eyes: Eyes) -> None:
    other = Config(run="other", seed=7, data=DataConfig(max_words=30, train=5), base=BaseConfig(width=64))
    merged = with_config(eyes, other).config
    assert (merged.run, merged.seed, merged.data.train) == ("other", 7, 5)
    assert merged.data.max_words == 6 and merged.base == other.base and merged.vision == CONFIG.vision


def test_what_is_no_pretrained_clip_is_one_clear_line(eyes: Eyes, tmp_path: Path) -> None:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**size, "vocab_size": 20, "max_position_embeddings": 8}
    CLIPTextModel(CLIPTextConfig(**text)).save_pretrained(tmp_path / "half")
    vision = {**size, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "mute")  # no tokenizer
    for name in ("half", "mute", "nothing"):
        config = replace(CONFIG, alignment=replace(CONFIG.alignment, pretrained=str(tmp_path / name)))
        with pytest.raises(VisionError, match="CLIPModel") as error:
            build_alignment(config, eyes.tokenizer, 16)
        assert name in str(error.value) and "\n" not in str(error.value)
