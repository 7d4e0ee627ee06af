from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hierarchical_diffusion_rlhf_caption_refinement.data.images import CROPS, look
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import with_looks
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import HIDDEN
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import FILES, load_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.training.base import caption_batch, caption_loss, train_base, validation_loss
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import FitConfig
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import generator


def test_a_batch_is_the_same_however_it_is_shared_out(world: Any) -> None:
    corpus, config, rows = world.corpora["train"], world.config.base, [3, 1, 7, 7]
    whole = caption_batch(corpus, rows, slice(None), config, generator(0, "x"))
    parts = [caption_batch(corpus, rows, part, config, generator(0, "x")) for part in (slice(0, 2), slice(2, 4))]
    for name in ("x0", "step", "length", "image", "seen"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
    for i, row in enumerate(rows):
        n = int(whole.length[i])
        assert whole.x0[i, :n].tolist() in corpus.captions[row]
        assert (whole.step[i, :n] < HIDDEN).all() and (whole.step[i, n:] == HIDDEN).all()
        assert torch.equal(whole.image[i], corpus.image([row])[0])


def test_images_are_withheld_as_often_as_asked(world: Any) -> None:
    config = replace(world.config.base, image_dropout=0.25)
    batch = caption_batch(world.corpora["train"], [0] * 2000, slice(None), config, generator(0, "x"))
    assert (~batch.seen).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert caption_batch(world.corpora["train"], [0] * 50, slice(None), config, generator(0, "x"), drop_images=False).seen.all()


def test_a_training_caption_sees_as_many_image_tokens_as_asked_and_always_the_last(world: Any) -> None:
    corpus, rows = world.corpora["train"], list(range(24)) * 10
    tokens = corpus.tokens.shape[1]
    config = replace(world.config.base, patch_dropout=0.5)
    batch = caption_batch(corpus, rows, slice(None), config, generator(0, "x"))
    assert batch.kept is not None and batch.kept.shape == (240, 1 + round((tokens - 1) / 2))
    assert (batch.kept[:, -1] == tokens - 1).all() and all(len(set(row)) == len(row) for row in batch.kept.tolist())
    often = batch.kept[:, :-1].flatten().bincount(minlength=tokens) / len(rows)
    torch.testing.assert_close(often[:-1], torch.full((tokens - 1,), 0.5), atol=0.15, rtol=0)
    plain = caption_batch(corpus, rows, slice(None), world.config.base, generator(0, "x"))
    assert plain.kept is None
    assert all(getattr(batch, name).equal(getattr(plain, name)) for name in ("x0", "step", "length", "image", "seen"))
    part = caption_batch(corpus, rows, slice(120, 240), config, generator(0, "x"))
    assert part.kept is not None and part.kept.equal(batch.kept[120:]) and part.rows(torch.tensor([3])).kept.equal(batch.kept[[123]])
    assert caption_batch(corpus, rows, slice(None), config, generator(0, "x"), drop_images=False).kept is None


def test_tokens_that_are_not_kept_have_no_say(world: Any) -> None:
    model = world.denoiser()
    batch = caption_batch(world.corpora["train"], [0, 1, 2], slice(None), replace(world.config.base, patch_dropout=0.5), generator(0, "x"))
    nll = caption_loss(model, batch, model.allowed)[0]
    assert batch.kept is not None
    hidden = torch.ones(batch.image.shape[:2], dtype=torch.bool).scatter(1, batch.kept, False)
    changed, read = batch.image.clone(), batch.image.clone()
    changed[hidden], read[~hidden] = 7.0, 7.0
    torch.testing.assert_close(caption_loss(model, replace(batch, image=changed), model.allowed)[0], nll)
    assert not torch.allclose(caption_loss(model, replace(batch, image=read), model.allowed)[0], nll)
    torch.testing.assert_close(
        caption_loss(model, replace(batch, kept=torch.arange(batch.image.shape[1]).expand(3, -1)), model.allowed)[0],
        caption_loss(model, replace(batch, kept=None), model.allowed)[0],
    )


def test_images_are_seen_in_all_ways_equally_often(world: Any) -> None:
    corpus = world.corpora["train"]
    other = replace(corpus, looks=(corpus.tokens + np.float16(100), corpus.tokens + np.float16(200)))
    rows = list(range(24)) * 20
    plain, mixed = (caption_batch(c, rows, slice(None), world.config.base, generator(0)) for c in (corpus, other))
    assert mixed.x0.equal(plain.x0) and mixed.step.equal(plain.step) and mixed.seen.equal(plain.seen)
    looks = ((mixed.image - plain.image).mean((1, 2)) / 100).round().long().bincount()
    torch.testing.assert_close(looks / len(rows), torch.full((3,), 1 / 3), atol=0.07, rtol=0)
    part = caption_batch(other, rows, slice(120, 240), world.config.base, generator(0))
    assert part.image.equal(mixed.image[120:240])


def test_the_looks_are_the_encoder_s_of_the_mirrored_and_the_cropped_images(world: Any, tmp_path: Path) -> None:
    corpus = replace(world.corpora["val"], examples=world.corpora["val"].examples[:3])
    plain, crops, both = (
        with_looks(corpus, world.eyes, replace(world.config.base, mirror=mirror, crops=crops), tmp_path).looks
        for mirror, crops in ((False, 0), (False, 2), (True, 2))
    )
    expected = [(None, True), (CROPS[0], False), (CROPS[1], False), (CROPS[1], True)]
    none, first, second, turned = (
        world.eyes.vision.encode([look(example.image(), *how) for example in corpus.examples]).half().numpy() for how in expected
    )
    assert plain == () and len(crops) == 2 and len(both) == 3
    for found, own in zip((*crops, *both), (first, second, none, first, turned), strict=True):
        np.testing.assert_allclose(found, own, atol=2e-3)
    assert not np.allclose(second, turned, atol=0.1)


def test_a_second_process_begins_with_others_and_gets_the_same_looks(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = replace(world.corpora["val"], examples=world.corpora["val"].examples[:3])
    config, encode = replace(world.config.base, mirror=True, crops=2), world.eyes.vision.encode
    firsts, looks = [], []
    for rank in range(2):
        seen: list[torch.Tensor] = []
        monkeypatch.setattr(world.eyes.vision, "encode", lambda images, seen=seen: seen.append(encode(images)) or seen[-1])
        looks.append(with_looks(corpus, world.eyes, config, tmp_path / str(rank), rank, 2).looks)
        firsts.append(seen[0].half().numpy())
    assert all(np.array_equal(a, b) for a, b in zip(*looks, strict=True))
    assert [np.array_equal(looks[0][i], first) for i, first in enumerate(firsts)] == [True, True]


def test_the_loss_is_per_token_and_leaves_out_unknown_words(world: Any) -> None:
    model = world.denoiser()
    batch = caption_batch(world.corpora["train"], [0, 1], slice(None), world.config.base, generator(0, "x"), drop_images=False)
    nll, length = caption_loss(model, batch, model.allowed)
    prediction = model(batch.x0, batch.step, batch.length, batch.image)
    for i, n in enumerate(batch.length.tolist()):
        torch.testing.assert_close(nll[i], F.cross_entropy(prediction.logits[i, :n], batch.x0[i, :n]))
        torch.testing.assert_close(length[i], -prediction.length_logits[i].log_softmax(-1)[n - 1])
    unknown = replace(batch, x0=batch.x0.clone())
    unknown.x0[0, 0] = 1
    logits = model(unknown.x0, unknown.step, unknown.length, unknown.image).logits[0]
    n = int(batch.length[0])
    torch.testing.assert_close(caption_loss(model, unknown, model.allowed)[0][0], F.cross_entropy(logits[1:n], batch.x0[0, 1:n]))


def test_validation_is_fixed_and_weighs_images_equally(world: Any) -> None:
    model, corpus = world.denoiser(), world.corpora["val"]
    loss = validation_loss(model, corpus, world.config.base, 0)
    assert loss == validation_loss(model, corpus, world.config.base, 0) != validation_loss(model, corpus, world.config.base, 1)


def test_training_learns_and_keeps_the_best_weights(world: Any, run_of: Callable[..., Run]) -> None:
    base = replace(world.config.base, fit=FitConfig(epochs=3, epoch_size=96, batch_size=24, lr=3e-3, save_every=4))
    run = run_of(world.config, base=base)
    path = train_base(run, replace(world.eyes, config=run.config), world.corpora)
    assert path == run.config.models / FILES["base"]
    rows = run.log.rows("base")
    losses = [row["val_loss"] for row in rows]
    assert len(rows) == 3 and min(losses) < 0.9 * validation_loss(world.denoiser(), world.corpora["val"], base, 0)
    _, model = load_denoiser(path, "base")
    assert checkpoint.load(path, "base")["facts"]["row"]["val_loss"] == min(losses)
    assert validation_loss(model, world.corpora["val"], base, run.config.seed) == pytest.approx(min(losses), abs=1e-5)


def test_captions_lose_the_same_alone_and_in_groups_of_a_length(world: Any) -> None:
    model, corpus = world.denoiser(), world.corpora["train"]
    batch = caption_batch(corpus, list(range(24)), slice(None), world.config.base, generator(0, "x"))
    assert len(set(batch.length.tolist())) > 4
    together = caption_loss(model, batch, model.allowed)
    alone = [caption_loss(model, batch.rows(torch.tensor([i])), model.allowed) for i in range(24)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts))
