"""A small world of scenes seen by random eyes, for tests that need a whole stage's surroundings."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example, load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.text import banned_ids, build_tokenizer, words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import build_corpus
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import Evidence, RewardModel, Words
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import Eyes, build_alignment, build_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.models.vision import build_vision
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import RunLog

SMOKE = Path(__file__).resolve().parents[2] / "configs" / "smoke.yaml"


@dataclass(frozen=True)
class World:
    config: Config
    examples: dict[str, list[Example]]
    eyes: Eyes
    corpora: dict[str, Corpus]
    words: Words

    def denoiser(self, seed: int = 0) -> DiffusionCaptionModel:
        torch.manual_seed(seed)
        return build_denoiser(self.eyes).eval()

    def reward(self, denoiser: DiffusionCaptionModel | None = None, reader_layers: int = 0) -> RewardModel:
        reward = RewardModel(Evidence(denoiser or self.denoiser(9), self.eyes.alignment, self.words), 2, reader_layers, 0.5)
        reward.linear.copy_(0.1 * torch.randn(reward.linear.shape, generator=torch.Generator().manual_seed(3)))
        return reward.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = load_config([SMOKE], ["data.train=24", "data.val=8", "data.test=10", "data.max_words=12"])
    examples = load_examples(config.data, config.seed)
    torch.manual_seed(0)
    tokenizer = build_tokenizer([caption for e in examples["train"] for caption in e.captions], 1)
    vision = build_vision(config.vision)
    alignment = build_alignment(config, tokenizer, vision.width).eval().requires_grad_(False)
    eyes = Eyes(config, tokenizer, banned_ids(tokenizer), vision, alignment)
    cache = tmp_path_factory.mktemp("cache")
    corpora = {split: build_corpus(eyes, some, cache) for split, some in examples.items()}
    return World(config, examples, eyes, corpora, words_and_owners(tokenizer))


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def build(config: Config, resume: bool = False, **groups: object) -> Run:
        return Run(replace(config, **groups), Accelerator(cpu=True), RunLog(tmp_path / "results"), resume, tmp_path / "cache")

    return build
