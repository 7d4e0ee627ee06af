"""Images -> image tokens: any frozen Hugging Face vision backbone, or a small encoder of patches that is trained here.

Axes: B images, P image tokens, D width, C native width of a backbone, H and W pixels.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel

from ..utils.checkpoint import digest
from ..utils.config import VisionConfig

BATCH = 2
"""Images per pass of a backbone on CPU: larger batches are slower, because their buffers are mapped anew at every layer."""
GPU_BATCH = 64
"""On a GPU, small ones are."""
WHITENING = 0.1
"""Ridge of the whitening, in mean variances of the kept components: strong components come out equal, weak ones stay weaker."""


class VisionError(ValueError):
    """A vision backbone that cannot be used; the message is one line with its name and the reason."""


def identity(model: nn.Module, weights: dict[str, Tensor], processor: Any) -> str:
    """Hash of a pretrained model and of how it wants its images, whatever its directory is called."""
    settings = {key: str(value) for key, value in processor.to_dict().items() if not key.endswith(("_type", "_class"))}
    return digest(weights.items(), type(model).__name__, json.dumps(settings, sort_keys=True))


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no reports from transformers: what matters in them is checked, and raised."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


class Projection(nn.Module):
    """Centres and scales C features to D principal components of mean variance 1."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, native: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((native,), torch.nan))  # unfitted, it must not pass unnoticed
        self.register_buffer("matrix", torch.full((native, width), torch.nan))

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B D"]:
        return (x - self.mean) @ self.matrix

    def fit(self, count: int, total: Float[Tensor, " C"], outer: Float[Tensor, "C C"]) -> None:
        """From the number of features, their sum and the sum of their outer products, in float64."""
        mean = total / count
        variances, axes = torch.linalg.eigh(outer / count - mean[:, None] * mean)
        width = self.matrix.shape[1]
        variances, axes = variances.flip(0)[:width].clamp_min(0), axes.flip(1)[:, :width]
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # the sign of an eigenvector is arbitrary
        scale = (variances + WHITENING * variances.mean()).clamp_min(1e-12).rsqrt()
        scale = scale / (variances * scale.square()).mean().clamp_min(1e-12).sqrt()
        self.mean.copy_(mean)
        self.matrix.copy_(axes * scale)


class PretrainedVision:
    """A frozen Hugging Face backbone; its tokens are all that its last layer holds, and the pooled vector as the last one."""

    def __init__(self, name: str, width: int = 0) -> None:
        """`width` 0 keeps the backbone's own features; else `fit_pca` or `load_state_dict` must set the projection before use.

        Raises VisionError if the backbone is not there, lacks weights or has no image processor.
        """
        self.name = name
        try:
            with quiet():
                self.processor: Any = AutoImageProcessor.from_pretrained(name, backend="pil")
                model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, ImportError) as error:
            raise VisionError(f"{name}: not a usable vision backbone: {' '.join(str(error).split())[:300]}") from None
        self.model: Any = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)  # convolutions on CPU are a quarter faster
        missing = {key.removeprefix("vision_model.") for key in report["missing_keys"]} & set(self.model.state_dict())
        untrained = {key for key in missing if "pooler" in key}
        if missing != untrained:
            raise VisionError(f"{name}: {len(missing)} weights are missing, the first is {min(missing)}")
        self.pooler = not untrained  # a pooler that the checkpoint lacks would be random
        grid, pooled = self._native([Image.new("RGB", (64, 64))])
        self.num_tokens, self._native_width = grid.shape[1] + 1, grid.shape[2]
        if pooled.shape[-1] != self._native_width:
            raise VisionError(f"{name}: pooled width {pooled.shape[-1]} differs from token width {self._native_width}")
        self.width = min(width or self._native_width, self._native_width)
        self.projections = nn.ModuleDict({kind: Projection(self._native_width, self.width) for kind in ("tokens", "pooled") if width})
        self._identity = identity(self.model, self.weights(), self.processor)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def networks(self) -> nn.ModuleList:
        """The backbone and the projection."""
        return nn.ModuleList([self.model, self.projections])

    def to(self, device: torch.device | str) -> None:
        self.networks.to(device)

    @torch.no_grad()
    def _native(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Tokens (B, P, C) and pooled vectors (B, C) of one batch."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        output = self.model(pixel_values=pixels.to(self.device))
        tokens: Tensor = output.last_hidden_state
        if tokens.dim() == 4:
            tokens = tokens.flatten(2).transpose(1, 2)
        pooled = getattr(output, "pooler_output", None)
        return tokens, pooled.flatten(1) if pooled is not None and self.pooler else tokens.mean(1)

    def fit_pca(self, images: Iterable[Image.Image]) -> None:
        """Sets the projection from training images, one for tokens and one for the pooled vector; a thousand images are plenty."""
        if not self.projections:
            return
        native = self._native_width
        sums = {kind: [0, torch.zeros(native).double(), torch.zeros(native, native).double()] for kind in self.projections}
        for image in images:
            tokens, pooled = self._native([image])
            for kind, x in (("tokens", tokens[0].cpu().double()), ("pooled", pooled.cpu().double())):
                sums[kind] = [a + b for a, b in zip(sums[kind], (len(x), x.sum(0), x.T @ x), strict=True)]
        for kind, projection in self.projections.items():
            cast(Projection, projection).fit(*sums[kind])

    def encode(self, images: list[Image.Image]) -> Float[Tensor, "B P D"]:
        """Image tokens on the backbone's device."""
        parts: list[Tensor] = []
        batch = BATCH if self.device.type == "cpu" else GPU_BATCH
        for start in range(0, len(images), batch):
            tokens, pooled = self._native(images[start : start + batch])
            if self.projections:
                tokens, pooled = self.projections["tokens"](tokens), self.projections["pooled"](pooled)
            parts.append(torch.cat([tokens, pooled[:, None]], dim=1))
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Tensor]:
        """The projection; the backbone itself is found again by its name."""
        return self.projections.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.projections.load_state_dict(state)

    def weights(self) -> dict[str, Tensor]:
        """The backbone's, without a pooler that the checkpoint lacks."""
        return {name: value for name, value in self.model.state_dict().items() if self.pooler or "pooler" not in name}

    def save_backbone(self, folder: Path) -> None:
        """As a Hugging Face directory with its image processor."""
        self.model.save_pretrained(folder, state_dict=self.weights())
        self.processor.save_pretrained(folder)

    def fingerprint(self) -> str:
        """Hash of weights, preprocessing and projection: equal fingerprints, equal tokens."""
        return digest(self.state_dict().items(), self._identity)


class Block(nn.Module):
    """Pre-norm transformer block without causality."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def to_pixels(images: Sequence[Image.Image], size: int) -> Float[Tensor, "B 3 H W"]:
    """RGB images squeezed to squares of `size` pixels, in [-1, 1]."""
    squares = [image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(square, dtype=np.float32) for square in squares])).permute(0, 3, 1, 2) / 127.5 - 1


class PatchEncoder(nn.Module):
    """A small transformer over the patches of a square image, for training from scratch."""

    def __init__(self, width: int, image_size: int, patch_size: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width, self.image_size, self.patch_size = width, image_size, patch_size
        self.num_tokens = (image_size // patch_size) ** 2
        self.embed = nn.Sequential(nn.Linear(3 * patch_size**2, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.positions = nn.Parameter(0.02 * torch.randn(self.num_tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        """Tokens of patches in row-major order; pixels as `to_pixels` gives them."""
        patches = F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2)
        return self.norm(self.blocks(self.embed(patches) + self.positions))

    @torch.no_grad()
    def encode(self, images: list[Image.Image]) -> Float[Tensor, "B P D"]:
        """Image tokens on the encoder's device, without gradient."""
        return self(to_pixels(images, self.image_size).to(self.device))

    def fingerprint(self) -> str:
        """Hash of the weights: equal fingerprints, equal tokens."""
        return digest(self.state_dict().items(), str(self.patch_size))


def build_vision(config: VisionConfig) -> PretrainedVision | PatchEncoder:
    """The image encoder of a config; both kinds have width, num_tokens, device, to, encode, fingerprint, and state dicts."""
    if config.backbone != "patches":
        return PretrainedVision(config.backbone, config.width)
    return PatchEncoder(config.width, config.image_size, config.patch_size, config.layers, config.heads)
