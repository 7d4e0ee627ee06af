"""What a search finds best is learned."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.text import decode_rows
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import preference, write_captions
from hierarchical_diffusion_rlhf_caption_refinement.models.beam import beam_search
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import Trajectory
from hierarchical_diffusion_rlhf_caption_refinement.training import rlhf as stage
from hierarchical_diffusion_rlhf_caption_refinement.training.distil import SEARCH, best_found, both_rewards, in_spreads, rewritten
from hierarchical_diffusion_rlhf_caption_refinement.training.rlhf import train_rlhf
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import FitConfig, ShapingConfig


def test_rewards_in_spreads_by_hand() -> None:
    assert in_spreads(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2).tolist() == pytest.approx([-(2**0.5), 2**0.5, 0, 0])
    assert in_spreads(torch.ones(4), 2).tolist() == [0, 0, 0, 0]


def shortness(corpus: Corpus, rows: list[int], t: Trajectory) -> Tensor:
    return -t.length.float()


def test_shaping_weighs_the_two_rewards(world: Any) -> None:
    x0, length = torch.randint(2, 9, (6, 12), generator=torch.Generator().manual_seed(0)), torch.tensor([3, 4, 5, 3, 4, 8])

    def fit(clip: float, people: float) -> Tensor:
        shaping = ShapingConfig(clip_weight=float(clip), preference_weight=float(people), fade=0.0)
        return both_rewards(world.corpora["train"], [0, 1], shortness, world.eyes.alignment, shaping)(x0, length)

    assert fit(0, 1).tolist() == in_spreads(-length.float(), 3).tolist()
    assert fit(0.5, 2).tolist() == pytest.approx((0.5 * fit(1, 0) + 2 * fit(0, 1)).tolist(), abs=1e-5) and fit(1, 0).abs().sum() > 0


def test_the_best_of_what_the_search_finds(world: Any) -> None:
    model, corpus, people = world.denoiser(), world.corpora["train"], ShapingConfig(clip_weight=0.0, preference_weight=1e4)
    seen: list[tuple[list[str], Tensor]] = []

    def worth(corpus: Corpus, rows: list[int], t: Trajectory) -> Tensor:
        seen.append((decode_rows(corpus.tokenizer, t.x0, t.length), t.length))
        return shortness(corpus, rows, t)

    texts = best_found(model, corpus, worth, world.eyes.alignment, people, chunk=5)
    candidates, lengths = [text for part, _ in seen for text in part], torch.cat([part for _, part in seen])
    assert len(texts) == len(corpus) and len(candidates) == 9 * len(corpus)
    for i, text in enumerate(texts):
        own, length = candidates[9 * i : 9 * i + 9], lengths[9 * i : 9 * i + 9]
        assert text in own and int(length[own.index(text)]) == int(length.min())
    assert best_found(model, corpus, worth, world.eyes.alignment, people, chunk=5) == texts
    plain = beam_search(model, corpus.image([0]), SEARCH, fit=None)
    assert decode_rows(corpus.tokenizer, plain.x0, plain.length)[0] in candidates[:9]


def test_rewritten_images_keep_their_tokens(world: Any) -> None:
    corpus = world.corpora["val"]
    texts = [example.captions[-1] for example in corpus.examples]
    found = rewritten(corpus, texts)
    assert [example.captions for example in found.examples] == [(text,) for text in texts] and found.tokens is corpus.tokens
    assert decode_rows(corpus.tokenizer, torch.tensor([found.captions[0][0]]), torch.tensor([len(found.captions[0][0])])) == texts[:1]


def test_it_is_learned_and_a_resumed_run_does_not_search_again(
    world: Any, run_of: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = FitConfig(epochs=6, epoch_size=24, batch_size=8, lr=1e-2, save_every=3)
    rlhf = replace(world.config.rlhf, method="distil", fit=fit)
    run, base, reward = run_of(world.config, rlhf=rlhf), world.denoiser(), preference(world.reward())
    config = replace(world.eyes, config=run.config)
    train_rlhf(run, config, base, reward, reward, world.corpora, world.words)
    rows = run.log.rows("rlhf")
    assert [row["epoch"] for row in rows] == list(range(7)) and rows[-1]["loss"] < 0.7 * rows[1]["loss"] and "kl_weight" not in rows[-1]
    policy = torch.load(run.last("rlhf"), weights_only=True)["payload"]["model"]
    taught = torch.load(run.last("rlhf"), weights_only=True)["payload"]["extra"]["captions"]
    learned = world.denoiser()
    learned.load_state_dict(policy)
    written = write_captions(learned, world.corpora["train"], range(24), run.config.sampler, 0).texts
    before = write_captions(base, world.corpora["train"], range(24), run.config.sampler, 0).texts

    def overlap(texts: list[str]) -> float:
        return sum(len(set(a.split()) & set(b.split())) / len(set(b.split())) for a, b in zip(texts, taught, strict=True)) / len(taught)

    assert overlap(written) > 0.5 + 0.5 * overlap(before)
    monkeypatch.setattr(stage, "best_found", lambda *_: pytest.fail("searched again"))
    again = run_of(run.config, resume=True)
    assert train_rlhf(again, config, base, reward, reward, world.corpora, world.words).exists()
