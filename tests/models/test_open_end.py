"""Captions whose length nobody tells: written from the left until END."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.models.beam import beam_search
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import OPEN, DiffusionCaptionModel, closed
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import HIDDEN, revealed, valid_positions
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import UNKNOWN, denoise, likelihood, noise_for, sample, score
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import SamplerConfig

Toy = Callable[..., DiffusionCaptionModel]
END = 0
PLAN = SamplerConfig(steps=8, order="open_end", temperature=0.8)


def ending(toy: Toy, **shape: int) -> DiffusionCaptionModel:
    """A toy that likes to end."""
    model = toy(end=END, **shape)
    with torch.no_grad():
        model.wte.weight[END] = 2 * model.wte.weight[2]
        assert model.untold is not None
        model.untold.normal_()
    return model


def all_captions(words: list[int], longest: int) -> tuple[Tensor, Tensor]:
    rows = [list(c) for n in range(1, longest + 1) for c in product(words, repeat=n)]
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), torch.tensor(list(map(len, rows)))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_probabilities_of_all_captions_sum_to_one(toy: Toy, temperature: float) -> None:
    model, image = ending(toy, vocabulary=5, max_length=3), torch.randn(2, 3, 4)
    x0, length = all_captions([2, 3, 4], 3)
    rows = model.from_left(x0.repeat(2, 1), length.repeat(2))
    s = score(model, *rows, image, temperature)
    p = s.logp.sum(1).view(2, -1).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert (s.length_logp == 0).all() and p.std() > 1e-3
    assert (s.distribution[:, 0, END] == -torch.inf).all()  # no caption without a word


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_one_pass_scores_what_was_written_word_by_word(toy: Toy, guidance: float) -> None:
    model, image = ending(toy, max_length=6), torch.randn(3, 3, 4)
    plan = replace(PLAN, guidance=guidance)
    t = sample(model, image, plan, noise_for(range(3), 20, plan.steps, 6, 0))
    assert (t.told == OPEN).all() and len(set(t.length.tolist())) > 2 and t.length.min() > 0
    inside, rows = valid_positions(t.length, 6), torch.arange(60)
    assert (t.x0[inside] > 1).all()
    short = t.length < 6
    assert short.any() and (~short).any()
    assert (t.x0[rows[short], t.length[short]] == END).all() and (t.step[rows[short], t.length[short]] == t.length[short] + 1).all()
    assert torch.equal(revealed(t.step), valid_positions((t.length + 1).clamp(max=6), 6)) and (t.logp[~revealed(t.step)] == 0).all()
    expected = closed(t.x0, t.length, END)
    assert torch.equal(t.x0, expected[0]) and torch.equal(t.step, expected[1])
    if guidance == 1:
        s = score(model, t.x0, t.step, t.told, image, plan.temperature)
        torch.testing.assert_close(s.logp, t.logp, atol=1e-5, rtol=0)
        torch.testing.assert_close(t.confidence, s.distribution.amax(-1).exp() * revealed(t.step), atol=1e-5, rtol=0)


def test_captions_come_as_often_as_their_score_says(toy: Toy) -> None:
    model, image, count = ending(toy, vocabulary=4, max_length=2), torch.randn(1, 3, 4), 4000
    t = sample(model, image, PLAN, noise_for([0], count, PLAN.steps, 2, 0))
    x0, length = all_captions([2, 3], 2)
    p = score(model, *model.from_left(x0, length), image, PLAN.temperature).logp.sum(1).exp()
    same = [((t.x0 == row) | ~valid_positions(t.length, 2)).all(1) & (t.length == n) for row, n in zip(x0, length, strict=True)]
    frequency = torch.stack(same).float().mean(1)
    assert frequency.sum() == 1 and ((frequency - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()


def test_captions_keep_to_their_bounds(toy: Toy) -> None:
    model, image = ending(toy, max_length=8), torch.randn(4, 3, 4)
    for low, high in ((3, 5), (1, 2), (8, 0)):
        plan = replace(PLAN, min_words=low, max_words=high)
        t = sample(model, image, plan, noise_for(range(4), 25, plan.steps, 8, 0))
        assert t.length.min() >= low and t.length.max() <= (high or 8)
        found = beam_search(model, image, replace(plan, temperature=0.0, beams=4))
        assert found.length.min() >= low and found.length.max() <= (high or 8) and (found.x0[valid_positions(found.length, 8)] > 1).all()


def test_banned_words_are_never_written_and_the_rest_stays_a_distribution(toy: Toy) -> None:
    model, image, banned = ending(toy, max_length=6), torch.randn(3, 3, 4), torch.tensor([0, 0, 0, 1, 0, 1, 0]).bool()
    for plan in (PLAN, replace(PLAN, temperature=0.0)):
        t = sample(model, image, plan, noise_for(range(3), 20, 8, 6, 0), banned=banned)
        words = t.x0[valid_positions(t.length, 6)]
        assert not torch.isin(words, torch.tensor([0, 1, 3, 5])).any() and t.length.min() > 0
        s = score(model, t.x0, t.step, t.told, image, plan.temperature, banned=banned)
        torch.testing.assert_close(s.logp, t.logp, atol=1e-5, rtol=0)


def test_in_the_making_one_more_word_is_to_come(toy: Toy) -> None:
    model, image = ending(toy, max_length=6), torch.randn(2, 3, 4)
    noise = noise_for(range(2), 1, PLAN.steps, 6, 1)
    *drafts, done = denoise(model, image, PLAN, noise)
    assert len(drafts) == int((done.length + 1).clamp(max=6).max())
    for t, draft in enumerate(drafts):
        for row in range(2):
            said = min(t, int(done.length[row]))
            assert draft.x0[row, :said].tolist() == done.x0[row, :said].tolist()
            going = t <= int(done.length[row]) and t < 6
            assert int(draft.length[row]) == said + going and int((draft.step[row, : said + going] == HIDDEN).sum()) == going
    assert torch.equal(done.x0, sample(model, image, PLAN, noise).x0)


def test_a_beam_that_holds_everything_finds_the_likeliest_of_all_captions(toy: Toy) -> None:
    model, images = ending(toy, vocabulary=6, max_length=3, seed=9), 3 * torch.randn(6, 3, 4)
    x0, length = all_captions([2, 3, 4, 5], 3)
    found = beam_search(model, images, SamplerConfig(steps=3, order="open_end", beams=100))
    for image, row, n in zip(images, found.x0, found.length, strict=True):
        best = int(likelihood(model, x0, length, image[None], chunk=100).argmax())
        assert row[:n].tolist() == x0[best, : length[best]].tolist()
    assert len(set(found.length.tolist())) > 1
    s = score(model, found.x0, found.step, found.told, images)
    torch.testing.assert_close(found.logp, s.logp)


def test_one_beam_writes_what_greedy_decoding_writes(toy: Toy) -> None:
    model, images = ending(toy, max_length=6), 3 * torch.randn(8, 3, 4)
    plan = replace(PLAN, temperature=0.0)
    greedy, beam = sample(model, images, plan, noise_for(range(8), 1, 8, 6, 0)), beam_search(model, images, plan)
    for name in ("x0", "step", "length", "told"):
        assert torch.equal(getattr(greedy, name), getattr(beam, name))
    torch.testing.assert_close(greedy.logp, beam.logp, atol=1e-5, rtol=0)


def test_a_model_that_is_told_the_length_never_writes_end(toy: Toy) -> None:
    model, image = ending(toy, max_length=6), torch.randn(2, 3, 4)
    plan = replace(PLAN, order="left_to_right")
    t = sample(model, image, plan, noise_for(range(2), 50, 8, 6, 0))
    assert (t.x0[valid_positions(t.length, 6)] > 1).all() and torch.equal(t.told, t.length)
    assert (score(model, t.x0, t.step, t.told, image).distribution[..., END].exp() == 0).all()


def test_given_words_tell_the_length(toy: Toy) -> None:
    model, image = ending(toy, max_length=6), torch.randn(1, 3, 4)
    known = torch.tensor([[3, UNKNOWN, UNKNOWN, 4, HIDDEN, HIDDEN]])
    noise = noise_for([0], 1, PLAN.steps, 6, 0)
    t, told = (sample(model, image, replace(PLAN, order=order), noise, known) for order in ("open_end", "left_to_right"))
    assert t.length.tolist() == t.told.tolist() == [4] and torch.equal(t.x0, told.x0) and torch.equal(t.logp, told.logp)


def test_the_untold_length_changes_what_is_said_and_a_told_one_does_not(toy: Toy) -> None:
    model, image = ending(toy, max_length=5), torch.randn(1, 3, 4)
    x0, length = torch.tensor([[2, 3, 4, 0, 0]]), torch.tensor([3])
    before = score(model, *model.from_left(x0, length), image).logp, likelihood(model, x0, length, image, from_right=True)
    with torch.no_grad():
        assert model.untold is not None
        model.untold.normal_()
    after = score(model, *model.from_left(x0, length), image).logp, likelihood(model, x0, length, image, from_right=True)
    assert not torch.allclose(before[0], after[0]) and torch.equal(before[1], after[1])
