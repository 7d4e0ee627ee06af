"""Toy models: every weight is random, none is at its initial zero, so that no part is silently without effect."""

from collections.abc import Callable

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel


@pytest.fixture
def toy() -> Callable[..., DiffusionCaptionModel]:
    def build(vocabulary: int = 7, max_length: int = 5, seed: int = 0, layers: int = 2, end: int | None = None) -> DiffusionCaptionModel:
        torch.manual_seed(seed)
        model = DiffusionCaptionModel(vocabulary, max_length, 3, 4, width=16, layers=layers, heads=2, banned=(0, 1), end=end)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return build
