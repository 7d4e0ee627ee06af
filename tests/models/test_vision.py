import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hierarchical_diffusion_rlhf_caption_refinement.models.vision import (
    PatchEncoder,
    PretrainedVision,
    VisionError,
    build_vision,
    to_pixels,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import VisionConfig

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}


def pictures(count: int, size: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((size, size)) for _ in range(count)]


EDGE, SQUARE = {"shortest_edge": 32}, {"height": 32, "width": 32}
PROCESSORS: dict[str, dict[str, object]] = {
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32},
    "clip vision": {"image_processor_type": "CLIPImageProcessor", "size": EDGE, "crop_size": SQUARE},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    "siglip vision": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": SQUARE},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": EDGE, "crop_size": SQUARE},
    "mobilenet": {"image_processor_type": "MobileNetV2ImageProcessor", "size": EDGE, "crop_size": SQUARE},
}
"""preprocessor_config.json as the hub has it for each kind."""


def save(model: PreTrainedModel, folder: Path, kind: str = "clip vision") -> str:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    return str(folder)


def tiny(kind: str) -> tuple[PreTrainedModel, int]:
    """A random backbone and the number of its own tokens."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=SIZE, projection_dim=8)), 17
    if kind == "siglip":
        return SiglipModel(SiglipConfig(text_config=text, vision_config=SIZE)), 16
    if kind == "mobilenet":
        return MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.1, min_depth=8, image_size=32)), 1
    models = {
        "clip vision": (CLIPVisionModel, CLIPVisionConfig, 17),
        "siglip vision": (SiglipVisionModel, SiglipVisionConfig, 16),
        "vit": (ViTModel, ViTConfig, 17),
        "dinov2": (Dinov2Model, Dinov2Config, 17),
    }
    model, config, tokens = models[kind]
    return model(config(**SIZE)), tokens


@pytest.mark.parametrize("kind", PROCESSORS)
def test_any_backbone_gives_its_tokens_and_the_pooled_vector(kind: str, tmp_path: Path) -> None:
    model, tokens = tiny(kind)
    vision = PretrainedVision(save(model, tmp_path, kind))
    assert type(vision.processor).__name__ == f"{PROCESSORS[kind].get('image_processor_type', 'CLIPImageProcessor')}Pil"
    images = pictures(6)
    features = vision.encode(images)
    assert features.shape == (6, tokens + 1, vision.width) == (6, vision.num_tokens, vision.width)
    assert not features.requires_grad and features.isfinite().all() and (features[0] != features[1]).any()
    torch.testing.assert_close(features[4:5], vision.encode(images[4:5]), atol=1e-5, rtol=1e-4)  # whatever the batch
    tower = (model.vision_model if kind in ("clip", "siglip") else model).eval()
    with torch.no_grad():
        output = tower(pixel_values=vision.processor(images=images[:1], return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(features[0, -1], output.pooler_output[0].flatten(), atol=1e-5, rtol=1e-4)
    hidden = output.last_hidden_state[0]
    torch.testing.assert_close(features[0, :-1], hidden.flatten(1).T if hidden.dim() == 3 else hidden, atol=1e-5, rtol=1e-4)


def test_a_pooler_that_the_checkpoint_lacks_is_not_used(tmp_path: Path) -> None:
    folder = save(ViTForImageClassification(ViTConfig(**SIZE)), tmp_path)
    one, two = PretrainedVision(folder), PretrainedVision(folder)
    features = one.encode(pictures(2))
    torch.testing.assert_close(features, two.encode(pictures(2)))
    assert one.fingerprint() == two.fingerprint()  # or features would be computed anew at every start
    torch.testing.assert_close(features[:, -1], features[:, :-1].mean(1))


def test_pca_centres_scales_and_travels_with_its_state(tmp_path: Path) -> None:
    vision = PretrainedVision(save(tiny("vit")[0], tmp_path), width=6)
    assert vision.encode(pictures(1)).isnan().all()  # not fitted yet
    unfitted = vision.fingerprint()
    images = pictures(40)
    vision.fit_pca(images)
    features = vision.encode(images)
    assert features.shape == (40, 18, 6) and vision.width == 6
    for part in (features[:, :-1].flatten(0, 1), features[:, -1]):
        covariance = part.T.cov(correction=0)
        assert part.mean(0).abs().max() < 1e-3
        assert covariance.diag().mean() == pytest.approx(1, abs=1e-2) and covariance.diag().max() < 4
        assert (covariance - covariance.diag().diag()).abs().max() < 1e-2
    other = PretrainedVision(str(tmp_path), width=6)
    other.load_state_dict(vision.state_dict())
    torch.testing.assert_close(other.encode(images[:3]), features[:3])
    assert other.fingerprint() == vision.fingerprint() != unfitted


def test_pca_of_full_width_loses_nothing(tmp_path: Path) -> None:
    folder = save(tiny("vit")[0], tmp_path)
    vision, native = PretrainedVision(folder, width=100), PretrainedVision(folder).encode(pictures(2))
    vision.fit_pca(pictures(40))
    assert vision.width == 16
    state = vision.state_dict()
    back = vision.encode(pictures(2))[:, :-1] @ torch.linalg.pinv(state["tokens.matrix"]) + state["tokens.mean"]
    torch.testing.assert_close(back, native[:, :-1], atol=2e-2, rtol=2e-2)


def test_fingerprint_tells_weights_and_preprocessing_apart(tmp_path: Path) -> None:
    model, _ = tiny("vit")
    first = PretrainedVision(save(model, tmp_path / "a")).fingerprint()
    assert first == PretrainedVision(save(model, tmp_path / "copy")).fingerprint()
    settings = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**settings, do_normalize=False).save_pretrained(tmp_path / "a")
    assert first != PretrainedVision(str(tmp_path / "a")).fingerprint()
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert first != PretrainedVision(save(model, tmp_path / "b")).fingerprint()


def test_no_backbone_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(VisionError, match="not a usable vision backbone") as error:
        PretrainedVision(str(tmp_path / "nothing"))
    assert "\n" not in str(error.value)


def test_mobilenet(mobilenet: Path) -> None:
    vision = PretrainedVision(str(mobilenet), width=32)
    assert vision.num_tokens == 50
    vision.fit_pca(pictures(4, 224))
    assert vision.encode(pictures(2, 224)).shape == (2, 50, 32)


def test_patches_are_row_major_and_positions_matter() -> None:
    encoder = PatchEncoder(width=16, image_size=32, patch_size=8, layers=1, heads=2)
    seen: list[torch.Tensor] = []
    encoder.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[0, :, 8:16, 24:] = 1  # row 1, column 3
    tokens = encoder(pixels)
    assert tokens.shape == (1, 16, 16) and encoder.num_tokens == 16
    assert seen[0].shape == (1, 16, 192) and seen[0][0].sum(1).nonzero().flatten().tolist() == [7]
    assert (tokens[0, 0] - tokens[0, 1]).abs().max() > 1e-3


def test_to_pixels() -> None:
    image = Image.new("RGB", (10, 20), (255, 0, 51))
    pixels = to_pixels([image], 8)
    assert pixels.shape == (1, 3, 8, 8) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0, :, 3, 3], torch.tensor([1.0, -1.0, -0.6]))


def test_encode_is_forward_without_gradient_and_fingerprint_follows_the_weights() -> None:
    encoder = PatchEncoder(width=16, image_size=32, patch_size=8, layers=1, heads=2)
    images, before = pictures(3), encoder.fingerprint()
    features = encoder.encode(images)
    assert not features.requires_grad
    torch.testing.assert_close(features, encoder(to_pixels(images, 32)).detach())
    assert encoder.fingerprint() == before
    with torch.no_grad():
        encoder.positions.add_(1)
    assert encoder.fingerprint() != before


def test_patch_encoder_learns_colours() -> None:
    torch.manual_seed(0)
    encoder, head = PatchEncoder(width=16, image_size=16, patch_size=8, layers=1, heads=2), torch.nn.Linear(16, 3)
    pixels, targets = 0.3 * torch.randn(48, 3, 16, 16), torch.arange(48) % 3
    pixels[torch.arange(48), targets] += 1
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(head(encoder(pixels).mean(1)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_build_vision(tmp_path: Path) -> None:
    patches = build_vision(VisionConfig(width=32, image_size=32, patch_size=8, layers=1))
    assert isinstance(patches, PatchEncoder) and (patches.width, patches.num_tokens) == (32, 16)
    vision = build_vision(VisionConfig(backbone=save(tiny("dinov2")[0], tmp_path), width=8))
    assert isinstance(vision, PretrainedVision) and (vision.width, vision.num_tokens) == (8, 18)
