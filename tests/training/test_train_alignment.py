from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement.data.features import FeatureError
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example
from hierarchical_diffusion_rlhf_caption_refinement.data.text import encode, pad
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import FILES
from hierarchical_diffusion_rlhf_caption_refinement.models.vision import to_pixels
from hierarchical_diffusion_rlhf_caption_refinement.training.alignment import (
    AlignmentBatch,
    AlignmentTrainee,
    alignment_inputs,
    objective,
    retrieval,
    shuffled_ids,
    train_alignment,
)
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import load
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import FitConfig, VisionConfig


def test_every_caption_of_an_image_gets_its_turn() -> None:
    captions = [[[1], [2]], [[3]], [[4], [5], [6], [7]]]
    drawn = shuffled_ids(captions, [0, 1, 2] * 400, torch.Generator().manual_seed(0))
    assert all(ids in captions[i % 3] for i, ids in enumerate(drawn))
    counts = Counter(ids[0] for ids in drawn)
    assert set(counts) == set(range(1, 8)) and counts[1] == pytest.approx(200, abs=50) and counts[5] == pytest.approx(100, abs=40)


def test_late_interaction_by_hand(world: Any) -> None:
    trainee = AlignmentTrainee(world.eyes.alignment, None, 32)
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]])
    patches = torch.tensor([[[1.0, 0.0], [0.0, 0.5]], [[-1.0, 0.0], [0.2, 0.1]]])
    scale = trainee.late_scale.exp()
    torch.testing.assert_close(trainee.late(words, patches), scale * torch.tensor([[1.5, 0.3], [1.0, 0.2]]))


def test_padding_of_texts_does_not_change_the_loss(world: Any) -> None:
    trainee = AlignmentTrainee(world.eyes.alignment, None, 32).eval()
    image = world.corpora["val"].image(range(4))
    ids = [row[0] for row in world.corpora["val"].captions[:4]]
    losses = [objective(trainee, AlignmentBatch(image, *pad(ids, width)))[0] for width in (max(map(len, ids)), 12)]
    torch.testing.assert_close(losses[0], losses[1])


def test_retrieval_is_the_same_in_chunks(world: Any) -> None:
    trainee = AlignmentTrainee(world.eyes.alignment, world.eyes.vision, 32).eval()
    examples = world.examples["val"]
    pixels, texts = to_pixels([e.image() for e in examples], 64), [e.captions[0] for e in examples]
    with torch.no_grad():
        whole, chunks = (retrieval(trainee, pixels.__getitem__, texts, chunk) for chunk in (200, 3))
    names = {"image_to_text_r1", "image_to_text_r10", "text_to_image_r1", "text_to_image_r10", "text_to_image_mrr"}
    assert whole == chunks and set(whole) == names
    assert whole["image_to_text_r10"] == 1  # eight candidates


def test_training_learns_to_find_images_and_leaves_frozen_eyes(world: Any, run_of: Callable[..., Run]) -> None:
    fit = FitConfig(epochs=3, epoch_size=192, batch_size=24, lr=2e-3, save_every=8)
    run = run_of(world.config, alignment=replace(world.config.alignment, fit=fit))
    eyes = train_alignment(run, world.examples)
    rows = run.log.rows("alignment")
    assert (run.config.models / FILES["alignment"]).exists() and rows[-1]["contrastive"] < rows[0]["contrastive"]
    ranks, kept = [row["val_text_to_image_mrr"] for row in rows], load(run.config.models / FILES["alignment"], "alignment")["facts"]["row"]
    assert kept["epoch"] == 1 + ranks.index(max(ranks)) and len(set(ranks)) > 1  # all of eight images are among the first ten
    assert rows[-1]["loss"] == pytest.approx(rows[-1]["contrastive"] + rows[-1]["late"], rel=1e-4)
    assert eyes.vision.fingerprint() != world.eyes.vision.fingerprint()
    parameters = [*eyes.vision.parameters(), *eyes.alignment.parameters()]  # type: ignore[union-attr, attr-defined]
    assert not any(p.requires_grad for p in parameters)
    ids = encode(eyes.tokenizer, ["a red star"])[0]
    assert all(i > 1 for i in ids) and eyes.banned == (0, 1)


def test_an_encoder_wider_than_the_towers_fits_below_them(world: Any, run_of: Callable[..., Run]) -> None:
    fit = FitConfig(epochs=1, epoch_size=24, batch_size=24, save_every=1)
    wide = VisionConfig(width=48, layers=1, heads=2)
    run = run_of(world.config, vision=wide, alignment=replace(world.config.alignment, fit=fit))
    eyes = train_alignment(run, world.examples)
    image = eyes.vision.encode([world.examples["val"][0].image()])
    assert image.shape == (1, 16, 48) and eyes.alignment.embed_images(image).shape == (1, 32)


def test_images_that_cannot_be_read_are_all_named_before_training(world: Any, run_of: Callable[..., Run], tmp_path: Path) -> None:
    bad = {split: Example(split, ("a red star",), tmp_path / f"{split}.png") for split in ("train", "test")}
    examples = {split: [*some, bad[split]] if split in bad else some for split, some in world.examples.items()}
    with pytest.raises(FeatureError, match=r"^2 of 44 images cannot be read: .*/train\.png: no such file; .*/test\.png: no such file$"):
        train_alignment(run_of(world.config), examples)
    with pytest.raises(FeatureError, match=r"^1 of 3 images cannot be read: .*/train\.png: no such file$"):
        alignment_inputs(run_of(world.config), world.eyes, [bad["train"], *examples["train"][:2]])
