from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.scenes import sample_scene
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example
from hierarchical_diffusion_rlhf_caption_refinement.data.text import build_tokenizer
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import (
    build_corpus,
    clip_scores,
    reference_intervals,
    reference_scores,
    retrieval,
)
from hierarchical_diffusion_rlhf_caption_refinement.models.alignment import PretrainedClip
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import Eyes
from hierarchical_diffusion_rlhf_caption_refinement.models.vision import PatchEncoder
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import AlignmentConfig, Config

DIRECTION = {"x": [1.0, 0.0], "y": [0.0, 1.0], "xy": [0.8, 0.6], "away": [-1.0, 0.0]}


class Clip:
    def embed_images(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.tensor([DIRECTION[text] for text in texts])


@pytest.fixture
def corpus() -> Corpus:
    examples = [Example("0", ("x", "xy")), Example("1", ("y", "x"))]
    joint = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return Corpus(examples, np.zeros((2, 1, 2), np.float16), joint, build_tokenizer(["x y"], 1), 4)


def test_retrieval_counts_every_caption(corpus: Corpus) -> None:
    assert retrieval(Clip(), corpus) == {"text_to_image_r1": 0.75, "text_to_image_r5": 1.0, "text_to_image_r10": 1.0}


def test_clip_scores_by_hand(corpus: Corpus) -> None:
    found = clip_scores(Clip(), ["xy", "x"], corpus)
    assert found["clip_score"]["value"] == pytest.approx((2.5 * 0.8 + 0) / 2)
    # harmonic mean of 2.0 and the best reference's cosine 1.0; the second caption has no score of its own
    assert found["ref_clip_score"]["value"] == pytest.approx((2 * 2.0 * 1.0 / 3.0 + 0) / 2)
    assert clip_scores(Clip(), ["away", "away"], corpus)["clip_score"]["value"] == 0


def test_scores_are_the_middle_of_their_intervals() -> None:
    rng = np.random.default_rng(0)
    words = "a the dog cat man runs sits on grass snow".split()  # noqa: SIM905
    sentences = [" ".join(rng.choice(words, 7)) for _ in range(90)]
    examples = [Example(str(i), tuple(sentences[i : i + 3])) for i in range(60)]
    captions = sentences[1:61]
    scores, intervals = reference_scores(captions, examples), reference_intervals(captions, examples)
    assert scores.keys() == intervals.keys() >= {"bleu_1", "bleu_4", "cider_d", "rouge_l", "specificity"}
    for name, value in scores.items():
        assert intervals[name]["value"] == value
        assert intervals[name]["low"] <= value <= intervals[name]["high"]
    assert intervals["cider_d"]["low"] < scores["cider_d"] < intervals["cider_d"]["high"]


class OneVectorClip(PretrainedClip):
    """Sees the same in every image; counts those it looks at."""

    def __init__(self, vector: list[float], size: int) -> None:
        nn.Module.__init__(self)
        self.model = nn.Linear(2, 1, bias=False)
        self.model.weight = nn.Parameter(torch.tensor([vector]), requires_grad=False)
        self.model.dtype = torch.float32
        self.processor: Any = SimpleNamespace(to_dict=lambda: {"size": size, "processor_class": object()})
        self.seen = 0

    def encode(self, images: Any) -> Tensor:
        self.seen += len(images)
        return self.model.weight.expand(len(images), 1, 2)


def test_another_clip_of_the_same_name_is_asked_anew(tmp_path: Path) -> None:
    config = Config(alignment=AlignmentConfig(pretrained="models/clip"))
    examples = [Example(str(i), ("x",), scene=sample_scene(0, "train", i)) for i in range(3)]
    vision = PatchEncoder(8, image_size=64, patch_size=32, layers=1, heads=2)
    for vector, size, seen in (([3.0, 4.0], 224, 3), ([3.0, 4.0], 224, 0), ([4.0, 3.0], 224, 3), ([3.0, 4.0], 336, 3)):
        clip = OneVectorClip(vector, size)
        corpus = build_corpus(Eyes(config, build_tokenizer(["x"], 1), (), vision, clip), examples, tmp_path)
        torch.testing.assert_close(corpus.joint, torch.tensor([vector]).expand(3, 2) / 5, atol=1e-6, rtol=0)
        assert clip.seen == seen
