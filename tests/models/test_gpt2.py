"""GPT-2's weights in the denoiser: the same function at the start, new parts that learn, adapters that vanish into what they adapt."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, GPT2Model

from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel, reveal_mask
from hierarchical_diffusion_rlhf_caption_refinement.models.gpt2 import load_gpt2, merged_weights
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import (
    Eyes,
    build_alignment,
    build_denoiser,
    load_denoiser,
    save_denoiser,
    start_denoiser,
)
from hierarchical_diffusion_rlhf_caption_refinement.models.vision import build_vision
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import (
    AlignmentConfig,
    BaseConfig,
    Config,
    ConfigError,
    DataConfig,
    VisionConfig,
)

WORDS = {f"w{i}": i for i in range(13)}
LENGTH = 6


def save_gpt2(folder: Path, head: bool = False, **settings: object) -> GPT2LMHeadModel:
    """A random GPT-2, every weight away from its initial value; without its head the names have no prefix, as in the hub's `gpt2`."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    gpt2 = GPT2LMHeadModel(
        GPT2Config(**{"vocab_size": 13, "n_positions": 9, "n_embd": 16, "n_layer": 3, "n_head": 2} | ids | settings)
    ).eval()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    (gpt2 if head else gpt2.transformer).save_pretrained(folder)
    return gpt2


def eyes_of(folder: Path, **settings: object) -> Eyes:
    """Random eyes of a run that starts from the GPT-2 in a folder."""
    config = Config(
        data=DataConfig(max_words=LENGTH),
        vision=VisionConfig(width=8, image_size=32, patch_size=16, layers=1, heads=2),
        alignment=AlignmentConfig(width=8, heads=2, embed=8),
        base=replace(BaseConfig(backbone=str(folder)), **settings),
    )
    torch.manual_seed(1)
    tokenizer, vision = Tokenizer(models.WordLevel(WORDS, unk_token="w0")), build_vision(config.vision)
    return Eyes(config, tokenizer, (), vision, build_alignment(config, tokenizer, vision.width))


def content_logits(model: DiffusionCaptionModel, x0: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """What the content stream would say after each token, revealed left to right and with the image."""
    step, length = torch.arange(x0.shape[1]).expand_as(x0), torch.full((len(x0),), x0.shape[1])
    memory = model.read_image(image)
    before = model.streams(x0, step, length, memory)[-2][:, : x0.shape[1]]
    last, _ = model.h[-1](before, reveal_mask(step)[:, : x0.shape[1], : x0.shape[1]], memory.layers[-1])
    return model.to_logits(last)


@pytest.mark.parametrize(("width", "layers", "heads"), [(16, 3, 2), (24, 2, 3), (32, 1, 8), (64, 5, 1)])
@pytest.mark.parametrize("head", [False, True])
def test_training_starts_from_the_function_of_gpt2(width: int, layers: int, heads: int, head: bool, tmp_path: Path) -> None:
    gpt2 = save_gpt2(tmp_path, head, n_embd=width, n_layer=layers, n_head=heads)
    eyes, model = start_denoiser(eyes_of(tmp_path))
    base = eyes.config.base
    assert (base.width, base.layers, base.heads) == (width, layers, heads) and base.backbone == str(tmp_path)
    x0 = torch.randint(13, (4, LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(content_logits(model.eval(), x0, torch.randn(4, 4, 8)), gpt2(x0).logits, atol=1e-5, rtol=0)


def test_the_mask_is_the_mean_token_and_embeddings_are_cut_to_size(tmp_path: Path) -> None:
    gpt2 = save_gpt2(tmp_path, vocab_size=20).transformer  # padded to a round number, as some are
    _, model = start_denoiser(eyes_of(tmp_path))
    assert model.wte.weight.shape == (13, 16) and model.wpe.weight.shape == (LENGTH, 16)
    torch.testing.assert_close(model.wte.weight, gpt2.wte.weight[:13])
    torch.testing.assert_close(model.wpe.weight, gpt2.wpe.weight[:LENGTH])
    torch.testing.assert_close(model.mask, gpt2.wte.weight[:13].mean(0))


def learn(model: DiffusionCaptionModel, updates: int) -> list[float]:
    """Loss before each update: two images with a caption each, to be learnt by heart."""
    x0, image = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 7]]), torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(2))
    step, length, losses = torch.arange(1, 5).expand(2, -1), torch.tensor([4, 4]), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(updates):
        loss = F.cross_entropy(model(x0, step, length, image).logits.flatten(0, 1), x0.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rank", [0, 2])
def test_what_starts_at_zero_learns(rank: int, tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    _, model = start_denoiser(eyes_of(tmp_path, lora_rank=rank))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = learn(model, 60)
    assert losses[-1] < 0.3 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {f"h.{i}.crossattention.{part}.weight" for i in range(3) for part in ("c_proj", "q_attn", "c_attn")} <= moved
    assert {"remaining.weight", "mask", "image_in.1.weight", "image_place"} <= moved
    assert ("wte.weight" in moved) == (rank == 0)


def test_a_checkpoint_needs_no_backbone(tmp_path: Path) -> None:
    save_gpt2(tmp_path / "gpt2")
    eyes, model = start_denoiser(eyes_of(tmp_path / "gpt2", dropout=0.5))
    learn(model, 2)
    save_denoiser(tmp_path / "base.pt", "base", eyes, model, {})
    shutil.rmtree(tmp_path / "gpt2")
    back, loaded = load_denoiser(tmp_path / "base.pt", "base")
    assert back.config == eyes.config
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_adapters_leave_gpt2_alone_and_vanish_from_the_checkpoint(tmp_path: Path) -> None:
    gpt2 = save_gpt2(tmp_path / "gpt2").transformer
    eyes, model = start_denoiser(eyes_of(tmp_path / "gpt2", lora_rank=2))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {f"h.{i}.{part}" for i in range(3) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    frozen = {name.replace(".base_layer", "") for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(gpt2.state_dict())
    x0, image = torch.randint(13, (4, LENGTH)), torch.randn(4, 4, 8)
    start = content_logits(model.eval(), x0, image)
    learn(model, 20)
    kept = {name: p.detach().clone() for name, p in model.state_dict().items()}
    torch.testing.assert_close(kept["h.0.mlp.c_fc.base_layer.weight"], gpt2.h[0].mlp.c_fc.weight.T)
    save_denoiser(tmp_path / "base.pt", "base", eyes, model, {})
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    _, plain = load_denoiser(tmp_path / "base.pt", "base")
    assert set(plain.state_dict()) == set(build_denoiser(eyes).state_dict())
    with torch.no_grad():
        now = content_logits(model.eval(), x0, image)
        torch.testing.assert_close(content_logits(plain, x0, image), now, atol=1e-5, rtol=1e-5)
    assert (now - start).abs().max() > 0.1


def test_a_model_without_adapters_has_nothing_to_merge(tmp_path: Path) -> None:
    save_gpt2(tmp_path)
    _, model = start_denoiser(eyes_of(tmp_path))
    merged, own = merged_weights(model), model.state_dict()
    assert list(merged) == list(own) and all(torch.equal(merged[name], own[name]) for name in own)


def test_without_peft_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gpt2(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError) as error:
        start_denoiser(eyes_of(tmp_path, lora_rank=2))
    assert str(error.value) == 'base.lora_rank needs peft: pip install ".[peft]"'


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"activation_function": "relu"}, "its blocks are not GPT-2's: activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "its blocks are not GPT-2's: scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 32}, "its blocks are not GPT-2's: n_inner"),
        ({"vocab_size": 12}, r"has 12 tokens and 9 places, the tokenizer and data.max_words need \(13, 6\)"),
        ({"n_positions": 5}, r"has 13 tokens and 5 places, the tokenizer and data.max_words need \(13, 6\)"),
    ],
)
def test_another_function_is_refused(settings: dict[str, object], reason: str, tmp_path: Path) -> None:
    save_gpt2(tmp_path, **settings)
    with pytest.raises(ConfigError, match=reason) as error:
        start_denoiser(eyes_of(tmp_path))
    assert "\n" not in str(error.value)


def test_what_is_no_gpt2_is_one_clear_line(tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 13}
    BertModel(BertConfig(**tiny)).save_pretrained(tmp_path / "bert")
    deeper = GPT2Model(GPT2Config(vocab_size=13, n_positions=9, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0))
    deeper.save_pretrained(tmp_path / "torn")
    deeper.config.n_layer = 3
    deeper.config.save_pretrained(tmp_path / "torn")
    for name, reason in (("bert", "is a BertModel, not a GPT-2"), ("torn", "weights are missing"), ("nothing", "not to be had")):
        with pytest.raises(ConfigError, match=reason) as error:
            load_gpt2(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)


def test_adapters_need_a_backbone() -> None:
    with pytest.raises(ConfigError, match=r"needs base\.backbone"):
        BaseConfig(lora_rank=4)
    with pytest.raises(ConfigError, match="must be at least 0"):
        BaseConfig(backbone="gpt2", lora_rank=-1)
