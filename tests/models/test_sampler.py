from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import (
    HIDDEN,
    reveal_counts,
    reveal_ranks,
    steps_from_ranks,
    valid_positions,
)
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import (
    UNKNOWN,
    Trajectory,
    denoise,
    inverse_cdf,
    likelihood,
    noise_for,
    policy_logp,
    sample,
    score,
    select,
    take_rows,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Order, SamplerConfig, Schedule

Toy = Callable[..., DiffusionCaptionModel]
PLAN = SamplerConfig(steps=3, order="random", temperature=0.8)
ROLLOUT_ORDERS: tuple[Order, ...] = ("random", "spread", "left_to_right", "plackett_luce")


def draw(model: DiffusionCaptionModel, image: Tensor, plan: SamplerConfig, group: int = 4, seed: int = 0, **more: object) -> Trajectory:
    noise = noise_for(range(len(image)), group, plan.steps, model.max_length, seed)
    return sample(model, image, plan, noise, **more)


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("order", ROLLOUT_ORDERS)
@pytest.mark.parametrize("drafts", [False, True])
def test_one_pass_scores_what_was_sampled_step_by_step(toy: Toy, order: Order, schedule: Schedule, drafts: bool) -> None:
    model, image = toy(max_length=8), torch.randn(3, 3, 4)
    plan = replace(PLAN, order=order, schedule=schedule)
    t = draw(model, image, plan, group=5, drafts=drafts)
    s = score(model, t.x0, t.step, t.length, image, plan.temperature)
    torch.testing.assert_close(s.logp, t.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(s.length_logp, t.length_logp, atol=1e-5, rtol=0)
    written = t.step != HIDDEN
    assert torch.equal(written, valid_positions(t.length, 8)) and (t.logp[written] < 0).all() and (t.logp[~written] == 0).all()
    assert t.step[written].min() == 1 and t.step[written].max() <= plan.steps
    likeliest = s.distribution.amax(-1).exp()
    torch.testing.assert_close(t.confidence, torch.where(written, likeliest, 0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [*ROLLOUT_ORDERS, "confidence"])
def test_given_words_stay_and_the_rest_is_written_around_them(toy: Toy, order: Order) -> None:
    model, image = toy(max_length=6), torch.randn(2, 3, 4)
    rows = [
        [3, UNKNOWN, UNKNOWN, 4, HIDDEN, HIDDEN],
        [UNKNOWN] * 6,
        [5, 5, 5, HIDDEN, HIDDEN, HIDDEN],
        [UNKNOWN, 2, UNKNOWN, 2, UNKNOWN, HIDDEN],
    ]
    known = torch.tensor(rows)
    plan = replace(PLAN, order=order)
    t = draw(model, image, plan, group=2, known=known)
    given = (known != UNKNOWN) & (known != HIDDEN)
    assert torch.equal(t.x0[given], known[given]) and (t.step[given] == 0).all() and (t.logp[given] == 0).all()
    assert (t.confidence[given] == 1).all() and (t.x0[known == UNKNOWN] > 1).all()
    assert t.length.tolist() == [4, 6, 3, 5] and (t.length_logp == 0).all()
    s = score(model, t.x0, t.step, t.length, image, plan.temperature)
    torch.testing.assert_close(s.logp, t.logp, atol=1e-5, rtol=0)


def all_captions(model: DiffusionCaptionModel, words: list[int]) -> tuple[Tensor, Tensor]:
    rows = [list(c) for n in range(1, model.max_length + 1) for c in product(words, repeat=n)]
    x0 = torch.tensor([row + [0] * (model.max_length - len(row)) for row in rows])
    return x0, torch.tensor([len(row) for row in rows])


def fixed_steps(length: Tensor, width: int, order: Order, steps: int) -> Tensor:
    """Reveal steps that depend on the length alone."""
    valid = valid_positions(length, width)
    rank = reveal_ranks(order, torch.tensor([0.7, 0.2, 0.5])[:width].expand(len(length), -1), valid)
    return steps_from_ranks(rank, reveal_counts(length, torch.full_like(length, steps), "linear"), valid, valid)


@pytest.mark.parametrize("order", ["random", "spread", "left_to_right"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_probabilities_of_all_captions_sum_to_one(toy: Toy, order: Order, temperature: float) -> None:
    model, image = toy(vocabulary=5, max_length=3), torch.randn(2, 3, 4)
    x0, length = all_captions(model, [2, 3, 4])
    for steps in (1, 2, 3):
        step = fixed_steps(length, 3, order, steps)
        s = score(model, x0.repeat(2, 1), step.repeat(2, 1), length.repeat(2), image, temperature)
        logp = (s.logp.sum(1) + s.length_logp).view(2, -1)
        torch.testing.assert_close(logp.exp().sum(1), torch.ones(2))
        assert logp.exp().std() > 1e-3


def test_captions_come_as_often_as_their_score_says(toy: Toy) -> None:
    model, image = toy(vocabulary=4, max_length=2), torch.randn(1, 3, 4)
    x0, length = all_captions(model, [2, 3])
    plan, count = replace(PLAN, order="left_to_right", steps=2), 4000
    t = draw(model, image, plan, group=count)
    s = score(model, x0, fixed_steps(length, 2, "left_to_right", 2), length, image, plan.temperature)
    p = (s.logp.sum(1) + s.length_logp).exp()
    seen = torch.stack(
        [((t.x0 == row) & valid_positions(t.length, 2)).sum(1).eq(n) & (t.length == n) for row, n in zip(x0, length, strict=True)]
    )
    frequency = seen.float().mean(1)
    assert frequency.sum() == 1 and ((frequency - p).abs() < 4 * (p * (1 - p) / count).sqrt()).all()


@pytest.mark.parametrize("order", [*ROLLOUT_ORDERS, "confidence"])
def test_a_caption_does_not_depend_on_what_is_sampled_beside_it(toy: Toy, order: Order) -> None:
    model, image = toy(max_length=9), torch.randn(4, 3, 4)
    plan = replace(PLAN, order=order, remask=1)
    noise = noise_for(list("abcd"), 3, plan.steps, 9, seed=5)
    together = sample(model, image, plan, noise)
    for i, key in enumerate("abcd"):
        alone = sample(model, image[i : i + 1], plan, noise_for([key], 3, plan.steps, 9, seed=5))
        part = slice(3 * i, 3 * i + 3)
        assert torch.equal(alone.x0, together.x0[part]) and torch.equal(alone.step, together.step[part])
        torch.testing.assert_close(alone.logp, together.logp[part], atol=1e-5, rtol=0)
    few = noise_for(list("cb"), 2, plan.steps, 9, seed=5)
    assert torch.equal(few.token, noise_for(list("cb"), 2, plan.steps, 9, seed=5).token)
    assert not torch.equal(few.token, noise_for(list("cb"), 2, plan.steps, 9, seed=6).token)


def test_drafts_are_whole_captions_that_come_to_agree_with_the_last(toy: Toy) -> None:
    model, image = toy(max_length=6), torch.randn(3, 3, 4)
    t = draw(model, image, PLAN, drafts=True)
    assert t.drafts is not None and t.drafts.shape == (12, PLAN.steps + 1, 6)
    assert torch.equal(t.drafts[:, -1], t.x0)
    for k in range(PLAN.steps):
        fixed = t.step <= k
        assert torch.equal(t.drafts[:, k][fixed], t.x0[fixed])
        assert (t.drafts[:, k][t.step != HIDDEN] > 1).all()
    plain = draw(model, image, PLAN)
    assert plain.drafts is None and torch.equal(plain.x0, t.x0) and torch.equal(plain.step, t.step)


@pytest.mark.parametrize("order", [*ROLLOUT_ORDERS, "confidence"])
def test_in_the_making_every_step_shows_what_was_revealed_before_it(toy: Toy, order: Order) -> None:
    model, image = toy(max_length=9), torch.randn(2, 3, 4)
    plan = replace(PLAN, order=order)
    noise = noise_for("ab", 4, plan.steps, 9, seed=0)
    *made, end = denoise(model, image, plan, noise)
    assert len(made) == end.step[end.step < HIDDEN].max() == plan.steps
    for k, t in enumerate(made):
        there = end.step <= k
        assert torch.equal(t.step, torch.where(there, end.step, HIDDEN)) and torch.equal(t.length, end.length)
        for now, last in ((t.x0, end.x0), (t.logp, end.logp), (t.confidence, end.confidence)):
            assert torch.equal(now, torch.where(there, last, 0))


def test_what_is_written_again_is_open_before(toy: Toy) -> None:
    model, image = toy(max_length=9), torch.randn(2, 3, 4)
    noise = noise_for("ab", 4, PLAN.steps, 9, seed=0)
    first = list(denoise(model, image, PLAN, noise))
    made = list(denoise(model, image, replace(PLAN, remask=1), noise))
    assert all(torch.equal(a.step, b.step) and torch.equal(a.x0, b.x0) for a, b in zip(first, made[: len(first)], strict=True))
    again, end = made[len(first)], made[-1]
    taken = again.step != first[-1].step
    assert (again.step[taken] == HIDDEN).all() and torch.equal(taken.sum(1), (end.length + 7) // 8)
    assert torch.equal(end.x0[~taken], first[-1].x0[~taken]) and torch.equal(end.step != HIDDEN, first[-1].step != HIDDEN)


def test_greedy_takes_the_likeliest_words_and_the_median_length(toy: Toy) -> None:
    model, image = toy(), torch.randn(3, 3, 4)
    t = draw(model, image, replace(PLAN, temperature=0.0, order="left_to_right"), group=2)
    s = score(model, t.x0, t.step, t.length, image)
    written = t.step != HIDDEN
    assert torch.equal(s.distribution.argmax(-1)[written], t.x0[written])
    torch.testing.assert_close(s.logp, t.logp, atol=1e-5, rtol=0)
    cdf = s.length_distribution.exp().cumsum(1).repeat_interleave(2, 0)
    assert torch.equal((cdf < 0.5).sum(1) + 1, t.length)


def test_inverse_cdf_follows_the_distribution_and_never_takes_the_impossible() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.bincount(inverse_cdf(p.log().expand(1000, -1), u), minlength=6).tolist() == [0, 500, 0, 200, 300, 0]
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert inverse_cdf(p.log().expand(2, -1), edge).tolist() == [1, 4]


def test_top_p_keeps_the_smallest_nucleus() -> None:
    p = torch.tensor([[0.1, 0.5, 0.05, 0.35]])
    for top_p, nucleus in {0.3: [1], 0.5: [1], 0.6: [1, 3], 0.9: [0, 1, 3], 1.0: [0, 1, 2, 3]}.items():
        kept = policy_logp(p.log(), 1.0, top_p).exp()
        expected = torch.zeros(1, 4)
        expected[:, nucleus] = p[:, nucleus] / p[:, nucleus].sum()
        torch.testing.assert_close(kept, expected)


def test_temperature_sharpens_and_zero_keeps_the_models_own() -> None:
    logits = torch.randn(3, 5)
    torch.testing.assert_close(policy_logp(logits, 0.5), (2 * logits).log_softmax(-1))
    torch.testing.assert_close(policy_logp(logits, 0.0), logits.log_softmax(-1))


@pytest.mark.parametrize("order", ["spread", "confidence"])
def test_a_threshold_reveals_more_at_once(toy: Toy, order: Order) -> None:
    model, image = toy(max_length=8), torch.randn(4, 3, 4)
    plan = replace(PLAN, order=order, steps=8)
    last = {}
    for threshold in (0.0, 0.4, 0.01):
        t = draw(model, image, replace(plan, threshold=threshold))
        assert (t.x0[t.step != HIDDEN] > 1).all()
        torch.testing.assert_close(score(model, t.x0, t.step, t.length, image, plan.temperature).logp, t.logp, atol=1e-5, rtol=0)
        last[threshold] = torch.where(t.step == HIDDEN, 0, t.step).amax(1)
    assert (last[0.01] == 1).all() and (last[0.4] <= last[0.0]).all() and last[0.4].sum() < last[0.0].sum()


def test_confident_words_come_first(toy: Toy) -> None:
    model, image = toy(max_length=8), torch.randn(2, 3, 4)
    known = torch.full((2, 8), UNKNOWN)
    t = draw(model, image, replace(PLAN, order="confidence", steps=8, temperature=0.0), group=1, known=known)
    blank = score(model, t.x0, torch.ones_like(t.x0), t.length, image).distribution.amax(-1)
    assert torch.equal((t.step == 1).int().argmax(1), blank.argmax(1))


@pytest.mark.parametrize(("order", "steps"), [("spread", 3), ("confidence", 1), ("plackett_luce", 1)])
def test_remasking_writes_the_least_confident_words_again(toy: Toy, order: Order, steps: int) -> None:
    model, image = toy(max_length=20), torch.randn(2, 3, 4)
    known = torch.full((4, 20), UNKNOWN)
    known[:, 3] = 5
    plan = replace(PLAN, order=order, steps=steps)
    once, again, twice = (draw(model, image, replace(plan, remask=r), group=2, known=known) for r in (0, 1, 2))
    assert (twice.x0[:, 3] == 5).all() and (twice.step[:, 3] == 0).all()
    weak = once.confidence.topk(3, largest=False).indices  # 19 words: an eighth, rounded up
    expected = torch.zeros_like(known, dtype=torch.bool).scatter(1, weak, True)
    assert torch.equal(again.step > steps, expected)
    assert torch.equal(again.x0[~expected], once.x0[~expected]) and not torch.equal(again.x0, once.x0)
    second = again.confidence.topk(3, largest=False).indices  # the second round weighs all words anew
    assert torch.equal((twice.step > again.step.amax(1, keepdim=True)).nonzero()[:, 1].view(4, 3), second.sort(1).values)
    x0, step = again.x0, torch.where(expected, again.step - steps, 0)
    rescored = score(model, x0, step, again.length, image, plan.temperature)
    torch.testing.assert_close(rescored.logp[expected], again.logp[expected], atol=1e-5, rtol=0)


def test_lengths_keep_their_bounds(toy: Toy) -> None:
    model, image = toy(max_length=8), torch.randn(3, 3, 4)
    free = draw(model, image, PLAN, group=20)
    bound = draw(model, image, replace(PLAN, min_words=3, max_words=5), group=20)
    assert free.length.min() < 3 and free.length.max() > 5
    assert set(bound.length.tolist()) == {3, 4, 5}
    assert draw(model, image, replace(PLAN, min_words=8)).length.eq(8).all()
    assert torch.equal(draw(model, image, replace(PLAN, max_words=50), group=20).length, free.length)


def test_guidance_one_is_none_and_more_leans_on_the_image(toy: Toy) -> None:
    model, image = toy(max_length=6), torch.randn(3, 3, 4)
    off, almost = draw(model, image, PLAN), draw(model, image, replace(PLAN, guidance=1 + 1e-6))
    assert torch.equal(off.x0, almost.x0) and torch.equal(off.length, almost.length)
    torch.testing.assert_close(off.logp, almost.logp, atol=1e-4, rtol=0)

    one = replace(PLAN, steps=1, temperature=1.0)
    strong = draw(model, image, replace(one, guidance=2.0))
    unseen = torch.zeros(3, dtype=torch.bool)
    s = [score(model, strong.x0, strong.step, strong.length, image, 1.0, seen).distribution for seen in (None, unseen)]
    expected = torch.where(s[0].isinf(), s[0], s[1] + 2 * (s[0] - s[1])).log_softmax(-1).gather(-1, strong.x0[..., None]).squeeze(-1)
    written = strong.step != HIDDEN
    torch.testing.assert_close(strong.logp[written], expected[written], atol=1e-5, rtol=0)
    assert (strong.x0[written] > 1).all()


@pytest.mark.parametrize("order", [*ROLLOUT_ORDERS, "confidence"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_banned_tokens_are_never_written_and_the_rest_stays_a_distribution(toy: Toy, order: Order, temperature: float) -> None:
    model, image = toy(max_length=8), torch.randn(3, 3, 4)
    plan = replace(PLAN, order=order, temperature=temperature, remask=1, guidance=2.0)
    banned = torch.zeros(len(model.allowed), dtype=torch.bool)
    banned[3::2] = True
    free, t = draw(model, image, plan), draw(model, image, plan, banned=banned)
    assert banned[free.x0[free.step != HIDDEN]].any() and not banned[t.x0[t.step != HIDDEN]].any()
    plain = draw(model, image, replace(plan, remask=0, guidance=1.0), banned=banned)
    s = score(model, plain.x0, plain.step, plain.length, image, temperature or 1.0, banned=banned)
    torch.testing.assert_close(s.logp, plain.logp, atol=1e-5, rtol=0)
    mass = s.distribution.exp().sum(-1)[plain.step != HIDDEN]
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_given_words_may_be_banned_ones(toy: Toy) -> None:
    model = toy()
    known = torch.tensor([[3, UNKNOWN, 3, HIDDEN, HIDDEN]])
    banned = torch.arange(len(model.allowed)) == 3
    t = draw(model, torch.randn(1, 3, 4), PLAN, group=1, known=known, banned=banned)
    assert t.x0[0, [0, 2]].tolist() == [3, 3] and t.x0[0, 1] != 3


@pytest.mark.parametrize("from_right", [False, True])
def test_likelihood_is_the_score_from_one_end_per_token(toy: Toy, from_right: bool) -> None:
    model, image = toy(), torch.randn(1, 3, 4)
    x0, length = torch.randint(2, 5, (7, model.max_length)), torch.tensor([1, 2, 3, 4, 5, 5, 2])
    place = torch.arange(1, model.max_length + 1)
    if from_right:
        place = torch.tensor([[n - i for i in range(model.max_length)] for n in length.tolist()])
    s = score(model, x0, torch.where(valid_positions(length, model.max_length), place, HIDDEN), length, image)
    expected = (s.logp.sum(1) + s.length_logp) / (length + 1)
    torch.testing.assert_close(likelihood(model, x0, length, image, from_right, chunk=3), expected, atol=1e-5, rtol=0)


def test_a_complete_draft_is_returned_as_it_is(toy: Toy) -> None:
    known = torch.tensor([[2, 3, HIDDEN, HIDDEN, HIDDEN]])
    t = draw(toy(), torch.randn(1, 3, 4), replace(PLAN, remask=1), group=1, known=known)
    assert t.x0.tolist() == [[2, 3, 0, 0, 0]] and t.length.tolist() == [2]


def test_rows_and_selection_by_hand() -> None:
    rows = take_rows(torch.tensor([[False, True, True], [True, False, False]]))
    assert rows.position.tolist()[0] == [1, 2] and rows.position.tolist()[1][0] == 0
    assert rows.valid.tolist() == [[True, True], [True, False]]
    chosen = select(
        torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]), torch.tensor([[True, False, True], [True, True, True]]), torch.tensor([1, 2])
    )
    assert chosen.tolist() == [[False, False, True], [True, True, False]]


def test_scoring_has_a_gradient_and_sampling_has_none(toy: Toy) -> None:
    model, image = toy(), torch.randn(2, 3, 4)
    t = draw(model, image, PLAN)
    assert not any(value.requires_grad for value in vars(t).values() if value is not None)
    score(model, t.x0, t.step, t.length, image, PLAN.temperature).logp.sum().backward()
    assert model.wte.weight.grad is not None and model.wte.weight.grad.abs().sum() > 0
