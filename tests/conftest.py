"""Shared by all tests: one thread, no network, and the optional folders that lie beside the repository."""

import gc
import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"
SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.yaml"


def pytest_collection_finish() -> None:
    """All that the imports left is never collected: looking through it takes half a second a time, and Accelerate asks for it."""
    gc.freeze()


def _folder(*parts: str) -> Path:
    folder = SHARED.joinpath(*parts)
    if not folder.is_dir():
        pytest.skip(f"no folder {'/'.join(('../shared', *parts))}")
    return folder


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Flickr8k: `captions.jsonl`, `human_ratings.jsonl` and `images/`."""
    return _folder("flickr8k")


@pytest.fixture(scope="session")
def mobilenet() -> Path:
    """MobileNetV2 as a Hugging Face directory."""
    return _folder("models", "mobilenet_v2")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `train.py --config configs/smoke.yaml` was run from end to end; tests must not write into it."""
    from hierarchical_diffusion_rlhf_caption_refinement import cli  # only here, so that the type checks are in place

    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.train(["--config", str(SMOKE)]) == 0
    return folder
