"""The five-line library face: `Captioner.from_pretrained("models")("photo.jpg")[0].text`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL.Image import Image

from .data.images import load_image
from .data.text import decode, words_and_owners
from .evaluation.evaluate import best_candidates
from .models.alignment import PretrainedClip
from .models.denoiser import DiffusionCaptionModel
from .models.reward import RewardModel
from .models.sampler import Trajectory, noise_for, sample
from .models.saved import FILES, Eyes, find_reward, load_denoiser, load_reward
from .utils.config import SamplerConfig


@dataclass(frozen=True)
class Token:
    token: str
    confidence: float
    """Probability of the likeliest token when this one was revealed."""
    step: int
    """Denoising step that revealed it."""


@dataclass(frozen=True)
class Caption:
    text: str
    confidence: float
    """Geometric mean of the tokens' confidence."""
    reward: float | None
    """How much people would like it, in spreads of the base model's captions around their mean; None without a reward model."""
    tokens: tuple[Token, ...]
    seed: int


class Captioner:
    """A trained model that captions images. The same image, seed and settings give the same caption, whatever else is in the batch."""

    def __init__(self, eyes: Eyes, model: DiffusionCaptionModel, reward: RewardModel | None, plan: SamplerConfig) -> None:
        self.eyes, self.model, self.reward, self.plan = eyes, model.eval(), reward, plan
        if isinstance(eyes.vision, torch.nn.Module):
            eyes.vision.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, kind: Literal["base", "rlhf"] = "rlhf", device: str = "cpu") -> "Captioner":
        """From a checkpoint, or from the folder it is in; a reward model is taken from the same folder, or the run's source.

        Raises CheckpointError.
        """
        path = Path(path) / FILES[kind] if Path(path).is_dir() else Path(path)
        eyes, model, _ = load_denoiser(path, kind)
        found = find_reward(path, eyes.config)
        reward = load_reward(found, words_and_owners(eyes.tokenizer))[0].to(device) if found else None
        return cls(eyes, model.to(device), reward, eyes.config.sampler)

    def __call__(self, images: str | Path | Image | Sequence[str | Path | Image], seed: int = 0, **settings: object) -> list[Caption]:
        """A caption per image (path or picture); `settings` are fields of SamplerConfig, e.g. steps=4, max_words=8.

        Raises ImageError for an image that cannot be read, ConfigError for settings that cannot be.
        """
        several = [images] if isinstance(images, str | Path | Image) else list(images)
        if not several:
            return []
        pictures = [image if isinstance(image, Image) else load_image(image) for image in several]
        return self.caption(pictures, replace(self.plan, **settings), seed)  # type: ignore[arg-type]

    @torch.no_grad()
    def caption(self, pictures: Sequence[Image], plan: SamplerConfig, seed: int) -> list[Caption]:
        device = self.model.mask.device
        tokens = self.eyes.vision.encode(list(pictures)).to(torch.float16).float().to(device)  # as the feature cache keeps them
        noise = noise_for([content_key(p) for p in pictures], plan.candidates, plan.steps, self.model.max_length, seed).to(device)
        written = sample(self.model, tokens, plan, noise)
        score = None
        if self.reward is not None:
            alignment = self.reward.evidence.alignment
            seen = alignment.encode(pictures) if isinstance(alignment, PretrainedClip) else tokens
            score = self.reward.score(written.x0, written.length, tokens, alignment.embed_images(seen))
        if plan.candidates > 1:
            written, score = best_candidates(written, score, plan.candidates)
        return [self.describe(written, i, float(score[i]) if score is not None else None, seed) for i in range(len(pictures))]

    def describe(self, written: Trajectory, row: int, reward: float | None, seed: int) -> Caption:
        n = int(written.length[row])
        ids, confidence, step = written.x0[row, :n].tolist(), written.confidence[row, :n].tolist(), written.step[row, :n].tolist()
        tokenizer = self.eyes.tokenizer
        tokens = tuple(Token(decode(tokenizer, [i]), c, s) for i, c, s in zip(ids, confidence, step, strict=True))
        return Caption(decode(tokenizer, ids), float(np.exp(np.log(np.maximum(confidence, 1e-9)).mean())), reward, tokens, seed)


def content_key(picture: Image) -> str:
    """Names the noise of a picture by what it shows, so that copies of a file get the same caption."""
    small = picture.convert("RGB").resize((16, 16))
    return small.tobytes().hex()
