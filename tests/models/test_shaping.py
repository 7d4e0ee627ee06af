from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import HIDDEN
from hierarchical_diffusion_rlhf_caption_refinement.models.shaping import (
    Dense,
    HierarchicalRewardShaper,
    Scales,
    Shaped,
    centre,
    centred_dense,
    dealt_out,
    dense_from_caption,
    dense_from_potential,
    dense_from_words,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ShapingConfig

Credit = Literal["local", "to_go", "potential"]
CREDITS: tuple[Credit, ...] = ("local", "to_go", "potential")
GROUP, STEPS = 4, 3
LENGTHS = torch.tensor([5, 3, 4, 5, 2, 5, 5, 1])


def rollout(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps, potentials, credited tokens and sparse rewards of two groups of four captions."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.arange(5) < LENGTHS[:, None]
    step = torch.where(valid, torch.randint(1, STEPS + 1, (8, 5), generator=g), HIDDEN)
    credited = valid & (torch.rand(8, 5, generator=g) < 0.7)
    return step, torch.rand(8, STEPS + 1, generator=g), credited, torch.randn(8, generator=g)


def dense_of(credit: str, seed: int = 0) -> tuple[Dense, Tensor, Tensor]:
    step, potential, credited, sparse = rollout(seed)
    if credit == "potential":
        return dense_from_potential(potential, credited, step), step, sparse
    words = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed)) * credited
    return dense_from_words(words, credited, step, STEPS), step, sparse


def config(credit: Credit = "local", **values: float) -> ShapingConfig:
    dense = "step_potential" if credit == "potential" else "leave_one_word_out"
    return replace(ShapingConfig(kappa=1.0, fade=0.0), credit=credit, dense=dense, **values)


def shape(c: ShapingConfig, dense: Dense, sparse: Tensor, step: Tensor, z: Tensor | None = None, scales: Scales | None = None) -> Shaped:
    shaper = HierarchicalRewardShaper(c)
    d, s = shaper.squares(dense, sparse, step, GROUP)
    own = Scales(float(d) ** 0.5, float(s) ** 0.5)
    return shaper(dense, sparse, torch.linspace(-2, 2, 40).view(8, 5) if z is None else z, step, GROUP, scales or own)


def test_local_is_the_formula_read_literally() -> None:
    step = torch.tensor([[1, 2], [2, 1], [1, HIDDEN], [1, 1]])
    credit, credited = torch.tensor([[0.4, 0.0], [0.1, 0.3], [0.2, 0.0], [0.0, 0.2]]), torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1]]).bool()
    sparse, z = torch.tensor([1.0, 3.0, 0.0, 2.0]), torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.5, 9.0], [0.0, -2.0]])
    shaper = HierarchicalRewardShaper(ShapingConfig(clip_weight=1.0, preference_weight=3.0, kappa=0.5))
    found = shaper(dense_from_words(credit, credited, step, 2), sparse, z, step, 2, Scales(dense=0.5, sparse=2.0))
    alpha = torch.sigmoid(torch.tensor(1 / 3).log() - 0.5 * z) * torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]])
    mean = torch.tensor([(0.4 + 0.1 + 0.3) / 3, (0.4 + 0.1 + 0.3) / 3, 0.2, 0.2])[:, None]  # over what can earn in each group
    r_dense = (credit - mean) * credited / 0.5
    r_sparse = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None] / 2.0 * (step < HIDDEN)
    torch.testing.assert_close(found.alpha, alpha)
    torch.testing.assert_close(found.advantage, alpha * r_dense + (1 - alpha) * r_sparse)
    torch.testing.assert_close(found.dense + found.sparse, found.advantage)
    torch.testing.assert_close(found.length, r_sparse[:, 0])


def test_to_go_sums_this_step_and_all_later_ones() -> None:
    step = torch.tensor([[1, 2, 2, 3], [3, 1, HIDDEN, HIDDEN]])
    credit = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.0, 0.0]])
    dense = dense_from_words(credit, credit > 0, step, 3)
    torch.testing.assert_close(dense.per_step, torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.0, 0.5]]))
    to_go = torch.tensor([[1.0, 0.9, 0.4], [1.1, 0.5, 0.5]])
    centred = to_go - to_go.mean(0)
    expected = torch.stack([centred[0, [0, 1, 1, 2]], centred[1, [2, 0, 2, 2]]])
    torch.testing.assert_close(centred_dense(dense, step, 2, "to_go"), expected)


def test_a_whole_captions_score_is_a_second_sparse_reward() -> None:
    step, _, _, sparse = rollout()
    score = torch.randn(8, generator=torch.Generator().manual_seed(4))
    found = shape(config("to_go", kappa=0.0), dense_from_caption(score, step, STEPS), sparse, step, scales=Scales(0.5, 2.0))
    expected = 0.5 * centre(score, GROUP) / 0.5 + 0.5 * centre(sparse, GROUP) / 2.0
    torch.testing.assert_close(found.advantage, expected[:, None] * (step < HIDDEN))


def test_dealing_out_keeps_the_values_and_loses_their_owners() -> None:
    step, _, _, _ = rollout()
    z, written = torch.arange(40.0).view(8, 5), step < HIDDEN
    found = dealt_out(z, written, torch.Generator().manual_seed(0))
    assert torch.equal(found[written].sort().values, z[written]) and torch.equal(found[~written], z[~written])
    assert (found[written] != z[written]).float().mean() > 0.8
    assert torch.equal(found, dealt_out(z, written, torch.Generator().manual_seed(0)))


def test_potential_credit_telescopes() -> None:
    step, potential, credited, _ = rollout()
    dense = dense_from_potential(potential, credited, step)
    torch.testing.assert_close(dense.per_step.sum(1), potential[:, -1] - potential[:, 0])
    for row, token in (step < HIDDEN).nonzero().tolist():
        k = int(step[row, token])
        gain = potential[row, k] - potential[row, k - 1]
        torch.testing.assert_close(dense.token[row, token], gain * credited[row, token])


def test_potential_shaping_with_a_constant_alpha_is_a_baseline_of_the_state() -> None:
    """Its credit to go is -alpha Phi of the state a token was drawn in: from a shared start it ranks captions as the sparse reward does."""
    _, potential, _, sparse = rollout()
    step = torch.arange(1, STEPS + 1).expand(8, -1)
    potential[:, 0] = torch.tensor([0.3, 0.8]).repeat_interleave(GROUP)  # one start state per image
    dense, alpha, scale = dense_from_potential(potential, torch.ones_like(step).bool(), step), 0.5, 0.7
    found = shape(config("potential", kappa=0.0), dense, sparse, step, torch.randn(8, 3), Scales(scale, 1.0))
    centred_sparse = centre(sparse, GROUP)[:, None].expand(-1, 3)
    torch.testing.assert_close(found.sparse, centred_sparse)
    torch.testing.assert_close(found.dense, -alpha * centre(potential[:, :-1], GROUP) / scale)
    torch.testing.assert_close(found.advantage[:, 0], centred_sparse[:, 0])
    gains = torch.cat([found.dense[:, :-1] - found.dense[:, 1:], found.dense[:, -1:]], 1)  # F_k, less the group's mean
    torch.testing.assert_close(gains.sum(1), torch.zeros(8), atol=1e-6, rtol=0)


def test_tokens_that_cannot_earn_have_no_dense_advantage() -> None:
    dense, step, sparse = dense_of("local")
    found = shape(config(), dense, sparse, step)
    assert (found.dense[~dense.credited] == 0).all() and (found.dense[dense.credited] != 0).all()


@pytest.mark.parametrize("credit", CREDITS)
def test_nothing_lands_on_padding_or_given_words(credit: Credit) -> None:
    dense, step, sparse = dense_of(credit)
    step[0, 0] = 0
    found = shape(config(credit), dense, sparse, step)
    outside = (step == 0) | (step == HIDDEN)
    for part in (found.advantage, found.alpha, found.dense, found.sparse):
        assert (part[outside] == 0).all() and (part[~outside] != 0).any()


@pytest.mark.parametrize("credit", CREDITS)
def test_permuting_the_captions_of_a_group_permutes_their_advantages(credit: Credit) -> None:
    dense, step, sparse = dense_of(credit)
    z, order = torch.randn(8, 5), torch.tensor([2, 0, 3, 1, 4, 7, 6, 5])
    potential = dense.potential[order] if dense.potential is not None else None
    moved = Dense(dense.token[order], dense.per_step[order], dense.credited[order], potential)
    before = shape(config(credit), dense, sparse, step, z)
    after = shape(config(credit), moved, sparse[order], step[order], z[order])
    for name in ("advantage", "alpha", "length"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name)[order])


@pytest.mark.parametrize("credit", CREDITS)
def test_what_the_whole_group_earns_alike_counts_nothing(credit: Credit) -> None:
    step = torch.tensor([[1, 2, 3]]).expand(8, -1)
    every = torch.ones(8, 3, dtype=torch.bool)
    same = torch.rand(2, 4).repeat_interleave(GROUP, 0)
    flat = torch.full((2, 3), 0.3).repeat_interleave(GROUP, 0)
    dense = dense_from_potential(same, every, step) if credit == "potential" else dense_from_words(flat, every, step, STEPS)
    z = torch.randn(2, 3).repeat_interleave(GROUP, 0)
    found = shape(config(credit), dense, torch.tensor([2.0, -1.0]).repeat_interleave(GROUP), step, z, Scales(1.0, 1.0))
    torch.testing.assert_close(found.advantage, torch.zeros(8, 3), atol=1e-6, rtol=0)
    assert (found.length == 0).all()


@pytest.mark.parametrize("credit", CREDITS)
def test_the_units_of_either_reward_do_not_matter(credit: Credit) -> None:
    dense, step, sparse = dense_of(credit)
    potential = 7 * dense.potential if dense.potential is not None else None
    louder = Dense(7 * dense.token, 7 * dense.per_step, dense.credited, potential)
    found = shape(config(credit), dense, sparse, step)
    torch.testing.assert_close(shape(config(credit), louder, 30 * sparse + 4, step).advantage, found.advantage)
    assert (shape(config(credit), louder, sparse, step, scales=Scales(1.0, 1.0)).advantage - found.advantage).abs().max() > 0.1


@pytest.mark.parametrize("credit", CREDITS)
def test_without_clip_weight_the_advantage_is_the_sparse_one(credit: Credit) -> None:
    dense, step, sparse = dense_of("local")  # the ablation has no potential to look at
    found = shape(config(credit, clip_weight=0.0), dense, sparse, step, scales=Scales(1.0, 2.0))
    assert (found.alpha == 0).all() and (found.dense == 0).all()
    torch.testing.assert_close(found.advantage, (centre(sparse, GROUP) / 2)[:, None] * (step < HIDDEN))


def test_alpha_fades_in_a_straight_line() -> None:
    shaper = HierarchicalRewardShaper(config(fade=0.5))
    assert [shaper.trust(share) for share in (0.0, 0.125, 0.25, 0.5, 1.0)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert HierarchicalRewardShaper(config()).trust(0.9) == 1.0
    dense, step, sparse = dense_of("local")
    z, scales = torch.linspace(-2, 2, 40).view(8, 5), Scales(1.0, 2.0)
    whole, half, none = (shaper(dense, sparse, z, step, GROUP, scales, trust) for trust in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half.alpha, whole.alpha / 2)
    torch.testing.assert_close(half.advantage, (whole.advantage + none.advantage) / 2)
    torch.testing.assert_close(none.advantage, (centre(sparse, GROUP) / 2)[:, None] * (step < HIDDEN))


def test_without_preference_weight_the_advantage_is_the_dense_one() -> None:
    dense, step, sparse = dense_of("local")
    found = shape(config(preference_weight=0.0), dense, sparse, step, scales=Scales(0.5, 1.0))
    assert (found.alpha[step < HIDDEN] == 1).all() and (found.sparse == 0).all() and (found.length == 0).all()
    torch.testing.assert_close(found.advantage, centred_dense(dense, step, GROUP, "local") / 0.5)


def test_alpha_leans_on_clip_where_the_model_is_unsure() -> None:
    z = torch.linspace(-9, 9, 19)[None]
    alpha = HierarchicalRewardShaper(config(clip_weight=1.0, preference_weight=2.0)).alpha(z)[0]
    assert (alpha.diff() <= 0).all() and alpha[0].item() == pytest.approx(0.9) and alpha[-1].item() == pytest.approx(0.1)
    assert alpha[9].item() == pytest.approx(1 / 3)
    constant = HierarchicalRewardShaper(config(clip_weight=1.0, preference_weight=2.0, kappa=0.0)).alpha(z)
    torch.testing.assert_close(constant, torch.full_like(z, 1 / 3))


def test_groups_without_contrast_do_not_divide_by_zero() -> None:
    step = torch.ones(8, 2, dtype=torch.long)
    none = torch.zeros(8, 2)
    dense = Dense(none, torch.zeros(8, STEPS), none.bool())
    found = shape(config(), dense, torch.ones(8), step, torch.zeros(8, 2))
    assert (found.advantage == 0).all() and (found.length == 0).all()
