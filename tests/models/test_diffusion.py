from typing import get_args

import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import (
    HIDDEN,
    caption_nll,
    masked_share,
    reveal_counts,
    reveal_ranks,
    steps_from_ranks,
    training_steps,
    valid_positions,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Order, Schedule

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_all_masked_to_none(schedule: Schedule) -> None:
    share = masked_share(torch.linspace(0, 1, 101), schedule)
    torch.testing.assert_close(share[[0, -1]], torch.tensor([0.0, 1.0]))
    assert (share.diff() > 0).all()


def test_schedules_in_the_order_of_their_haste() -> None:
    t = torch.linspace(0.01, 0.99, 50)
    shifted, linear, log_linear, cosine = (masked_share(t, s) for s in ("shifted", "linear", "log_linear", "cosine"))
    assert (shifted < linear).all() and (linear < cosine).all() and (linear < log_linear).all()
    first = [int(reveal_counts(torch.tensor([20]), torch.tensor([5]), s)[0, 0]) for s in ("shifted", "linear", "cosine")]
    assert first == sorted(first, reverse=True) and len(set(first)) == 3
    assert reveal_counts(torch.tensor([20]), torch.tensor([5]), "linear").tolist() == [[4, 4, 4, 4, 4]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_reveals_something_until_nothing_is_left(schedule: Schedule) -> None:
    tokens, steps = (x.flatten() for x in torch.meshgrid(torch.arange(25), torch.arange(1, 17), indexing="ij"))
    counts = reveal_counts(tokens, steps, schedule)
    assert torch.equal(counts.sum(1), tokens) and (counts >= 0).all()
    k = torch.arange(counts.shape[1])
    assert torch.equal(counts > 0, k < torch.minimum(tokens, steps)[:, None])


def test_ranks_of_the_hidden_positions_alone_count_up_from_zero() -> None:
    hidden = torch.tensor([[True, False, True, True, True, False]])
    noise = torch.tensor([[0.9, 0.0, 0.1, 0.5, 0.3, 0.2]])
    assert reveal_ranks("left_to_right", noise, hidden)[hidden].tolist() == [0, 1, 2, 3]
    assert reveal_ranks("random", noise, hidden)[hidden].tolist() == [3, 0, 2, 1]
    spread = reveal_ranks("spread", torch.rand(200, 12), torch.ones(200, 12, dtype=torch.bool))
    assert torch.equal(spread.sort(1).values, torch.arange(12).expand(200, -1))


@pytest.mark.parametrize(("order", "apart"), [("spread", True), ("left_to_right", False)])
def test_tokens_of_one_step_are_spread_out(order: Order, apart: bool) -> None:
    rank = reveal_ranks(order, torch.rand(100, 12), torch.ones(100, 12, dtype=torch.bool))
    first = (rank < 3).nonzero()[:, 1].view(100, 3)  # the places of the first three tokens
    assert bool((first.diff(dim=1) > 1).all()) == apart


def test_steps_from_ranks() -> None:
    rank = torch.tensor([[2, 0, 0, 1, 3]])
    hidden = torch.tensor([[True, True, False, True, False]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert steps_from_ranks(rank, torch.tensor([[2, 1]]), hidden, valid).tolist() == [[2, 1, 0, 1, HIDDEN]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_steps_use_every_step_and_hide_padding(schedule: Schedule) -> None:
    length = torch.arange(1, 9).repeat(40)
    step = training_steps(length, 9, schedule, 0.5, torch.Generator().manual_seed(0))
    valid = valid_positions(length, 9)
    assert (step[~valid] == HIDDEN).all() and (step[valid] >= 1).all()
    for row, n in zip(step, length.tolist(), strict=True):
        assert set(row[:n].tolist()) == set(range(1, int(row[:n].max()) + 1))


def test_left_to_right_share() -> None:
    def from_left(share: float) -> Tensor:
        length = torch.full((300,), 6)
        step = training_steps(length, 6, "linear", share, torch.Generator().manual_seed(0))
        return (step == torch.arange(1, 7)).all(1)

    assert from_left(1.0).all()
    assert from_left(0.4).float().mean().item() == pytest.approx(0.4, abs=0.08)
    assert from_left(0.0).float().mean() < 0.02


def test_uniform_logits_cost_log_v_and_words_that_do_not_count_cost_nothing() -> None:
    x0, counted = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([[True, True, True], [True, False, False]])
    torch.testing.assert_close(caption_nll(torch.zeros(2, 3, 5), x0, counted), torch.tensor(5.0).log().expand(2))
    logits = torch.randn(2, 3, 5, requires_grad=True)
    masked = logits.masked_fill(torch.arange(5) == 0, -torch.inf)  # the padding's own logit
    nll = caption_nll(masked, x0, counted)
    by_hand = -masked.log_softmax(-1)[0, torch.arange(3), x0[0]].mean()
    torch.testing.assert_close(nll[0], by_hand)
    nll.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[1, 1:] == 0).all()
