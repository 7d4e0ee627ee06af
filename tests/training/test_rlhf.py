from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import preference
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import HIDDEN, valid_positions
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import Trajectory, noise_for, sample, score
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import load_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.models.shaping import HierarchicalRewardShaper, Scales, log_odds
from hierarchical_diffusion_rlhf_caption_refinement.training.base import caption_batch
from hierarchical_diffusion_rlhf_caption_refinement.training.rlhf import (
    Rollout,
    Trainer,
    alarms,
    categorical_kl,
    clipped_gain,
    correlation,
    dense_reward,
    held_out,
    kl_guard,
    policy_loss,
    rollout_plan,
    train_rlhf,
)
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.training.state import TrainState, make_optimizer
from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.checkpoint import CheckpointError
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import FitConfig, RLHFConfig, ShapingConfig

RunOf = Callable[..., Run]
T, V = 2, 4
ALL = torch.ones(V, dtype=torch.bool)


def toy(seed: int = 0) -> DiffusionCaptionModel:
    torch.manual_seed(seed)
    model = DiffusionCaptionModel(V, T, 2, 3, width=8, layers=1, heads=2, banned=(0,))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def rollout_of(
    model: DiffusionCaptionModel,
    x0: Tensor,
    step: Tensor,
    length: Tensor,
    image: Tensor,
    config: RLHFConfig,
    reference: DiffusionCaptionModel,
) -> Rollout:
    """What these captions look like right after they were sampled; advantages are still 0."""
    with torch.no_grad():
        mine = score(model, x0, step, length, image, config.temperature)
        base = score(reference, x0, step, length, image, config.temperature)
    zero = torch.zeros_like(mine.logp)
    return Rollout(
        x0, step, length, image, mine.logp, mine.length_logp, zero, zero[:, 0], base.distribution, base.length_distribution, None, {}
    )  # fmt: skip


def every_caption(steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """All captions of one or two words, revealed from right to left in `steps` steps."""
    rows = [list(c) for n in (1, 2) for c in product((1, 2, 3), repeat=n)]
    length = torch.tensor([len(row) for row in rows])
    x0 = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    step = torch.tensor([[1, HIDDEN] if len(row) == 1 else [steps, 1] for row in rows])
    return x0, step, length


def gradients(model: DiffusionCaptionModel, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_gradient_is_that_of_the_enumerated_expected_reward(steps: int, temperature: float) -> None:
    model, image, config = toy(), torch.randn(1, 2, 3), RLHFConfig(temperature=temperature, steps=steps)
    x0, step, length = every_caption(steps)
    reward = torch.randn(len(x0), generator=torch.Generator().manual_seed(2))

    exact = score(model, x0, step, length, image, temperature)
    p = (exact.logp.sum(1) + exact.length_logp).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    expected = gradients(model, (p * reward).sum())

    rollout = rollout_of(model, x0, step, length, image, config, toy(1))
    weight = (p * reward).detach() * len(x0) * T  # the loss is a mean over captions, divided by T
    rollout = replace(rollout, advantage=weight[:, None].expand(-1, T) * (step < HIDDEN), length_advantage=weight)
    loss, _ = policy_loss(model, rollout, config, 0.0, ALL)
    found = gradients(model, -loss)
    assert found.keys() == expected.keys() and any("length_head" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert max(float(v.abs().max()) for name, v in expected.items() if "length_head" in name) > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("order", ["random", "spread", "left_to_right", "plackett_luce"])
def test_the_ratio_is_one_right_after_the_rollout(order: str, temperature: float) -> None:
    config = replace(RLHFConfig(steps=2, temperature=temperature), order=order)
    torch.manual_seed(0)
    model = DiffusionCaptionModel(9, 6, 2, 3, width=16, layers=2, heads=2, banned=(0,)).eval()
    image = torch.randn(2, 2, 3)
    t = sample(model, image, rollout_plan(config), noise_for("ab", 5, config.steps, 6, 0))
    s = score(model, t.x0, t.step, t.length, image, temperature)
    torch.testing.assert_close((s.logp - t.logp).exp(), torch.ones_like(t.logp), atol=1e-5, rtol=0)
    torch.testing.assert_close((s.length_logp - t.length_logp).exp(), torch.ones(10), atol=1e-5, rtol=0)
    rollout = Rollout(
        t.x0, t.step, t.length, image, t.logp, t.length_logp, torch.randn(10, 6), torch.randn(10), s.distribution.detach(),
        s.length_distribution.detach(), None, {},
    )  # fmt: skip
    _, facts = policy_loss(model, rollout, config, 0.0, torch.ones(9, dtype=torch.bool))
    assert facts["clipped"] == 0 and abs(facts["kl"].item()) < 1e-5
    _, facts = policy_loss(model, rollout, replace(config, temperature=temperature / 2), 0.0, torch.ones(9, dtype=torch.bool))
    assert facts["clipped"] > 0.2  # scored at another temperature it would not be one


def test_nothing_to_gain_nothing_to_learn() -> None:
    model, image, config = toy(), torch.randn(1, 2, 3), RLHFConfig()
    rollout = rollout_of(model, *every_caption(2), image, config, toy(1))
    loss, _ = policy_loss(model, rollout, config, 0.0, ALL)
    assert all((g == 0).all() for g in gradients(model, loss).values())
    pulled, facts = policy_loss(model, rollout, config, 0.5, ALL)
    torch.testing.assert_close(pulled, 0.5 * facts["kl"] / T)
    assert facts["kl"] > 0.01 and any((g != 0).any() for g in gradients(model, pulled).values())
    same, facts = policy_loss(model, rollout_of(model, *every_caption(2), image, config, model), config, 0.5, ALL)
    assert abs(facts["kl"].item()) < 1e-6
    assert max(g.abs().max() for g in gradients(model, same).values()) < 1e-5  # KL is at its minimum


def test_kl_is_summed_over_the_decisions_of_a_caption() -> None:
    model, other, image, config = toy(), toy(1), torch.randn(1, 2, 3), RLHFConfig(temperature=0.8)
    x0, step, length = every_caption(2)
    _, facts = policy_loss(model, rollout_of(model, x0, step, length, image, config, other), config, 0.0, ALL)
    p, q = (score(m, x0, step, length, image, 0.8) for m in (model, other))
    tokens = kl_divergence(Categorical(logits=p.distribution[..., 1:]), Categorical(logits=q.distribution[..., 1:]))
    lengths = kl_divergence(Categorical(logits=p.length_distribution), Categorical(logits=q.length_distribution))
    torch.testing.assert_close(facts["kl"], (tokens * valid_positions(length, T)).sum(1).mean() + lengths[0])


def test_categorical_kl_is_torchs_and_the_impossible_does_no_harm() -> None:
    p, q = torch.randn(5, 6).log_softmax(-1), torch.randn(5, 6).log_softmax(-1)
    torch.testing.assert_close(categorical_kl(p, q), kl_divergence(Categorical(logits=p), Categorical(logits=q)))
    torch.testing.assert_close(categorical_kl(p, p), torch.zeros(5), atol=1e-7, rtol=0)
    logits = torch.randn(5, 6, requires_grad=True)
    banned = torch.tensor([True, False, True, False, False, False])
    masked = logits.masked_fill(banned, -torch.inf).log_softmax(-1)
    kl = categorical_kl(masked, q.masked_fill(banned, -torch.inf).log_softmax(-1))
    torch.testing.assert_close(kl, categorical_kl(logits[:, ~banned].log_softmax(-1), q[:, ~banned].log_softmax(-1)))
    kl.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and (logits.grad[:, banned] == 0).all()


def test_clipped_gain_by_hand() -> None:
    old = torch.zeros(4, requires_grad=False)
    logp = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    gain = clipped_gain(logp, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2)
    torch.testing.assert_close(gain, torch.tensor([1.2, 0.5, -1.5, -0.8]))
    gain.sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, 0.5, -1.5, 0.0]))  # no further where the step was long enough


def test_the_loss_of_a_caption_does_not_depend_on_its_batch_or_padding() -> None:
    torch.manual_seed(0)
    model = DiffusionCaptionModel(9, 6, 2, 3, width=16, layers=2, heads=2, banned=(0,)).eval()
    config, image = RLHFConfig(steps=3), torch.randn(3, 2, 3)
    t = sample(model, image, rollout_plan(config), noise_for("abc", 2, 3, 6, 0))
    rollout = rollout_of(model, t.x0, t.step, t.length, image, config, model)
    g = torch.Generator().manual_seed(0)
    written = t.step < HIDDEN
    rollout = replace(rollout, advantage=torch.randn(6, 6, generator=g) * written, length_advantage=torch.randn(6, generator=g))
    allowed = torch.ones(9, dtype=torch.bool)
    whole = gradients(model, policy_loss(model, rollout, config, 0.3, allowed)[0])
    junk = replace(rollout, x0=torch.where(written, rollout.x0, 3))
    parts = []
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        names = ("x0", "step", "told", "logp", "length_logp", "advantage", "length_advantage", "reference")
        part = {name: getattr(junk, name)[rows] for name in names}
        one = replace(junk, **part, image=image[i : i + 1], length_reference=rollout.length_reference[i : i + 1])
        parts.append(gradients(model, policy_loss(model, one, config, 0.3, allowed)[0]))
    for name, value in whole.items():
        torch.testing.assert_close(sum(p[name] for p in parts) / 3, value, atol=1e-6, rtol=1e-4)


def trainer_of(world: Any, run_of: RunOf, **settings: object) -> Trainer:
    rlhf = replace(world.config.rlhf, **settings.pop("rlhf", {}))  # type: ignore[arg-type]
    run = run_of(world.config, rlhf=rlhf, **settings)
    policy, reference = world.denoiser(), world.denoiser()
    extra = {"kl_weight": 0.03, "over": [], "confidence": [0.0, 1.0]}
    reward = preference(world.reward(reference))
    return Trainer(run, policy, reference, reward, world.eyes.alignment, world.words, world.corpora["train"], extra)


SHAPINGS = {
    "default": ShapingConfig(),
    "to go": ShapingConfig(credit="to_go"),
    "potential": ShapingConfig(dense="step_potential", credit="potential"),
    "shuffled": ShapingConfig(kappa=1.0, shuffle_alpha=True),
    "caption": ShapingConfig(dense="caption", credit="to_go"),
    "one word out": ShapingConfig(dense="leave_one_word_out"),
    "sparse": ShapingConfig(clip_weight=0.0),
    "sparse potential": ShapingConfig(clip_weight=0.0, dense="step_potential", credit="potential"),
}


@pytest.mark.parametrize("name", SHAPINGS)
def test_a_rollout_is_data_and_its_update_touches_the_policy_alone(world: Any, run_of: RunOf, name: str) -> None:
    trainer = trainer_of(world, run_of, shaping=SHAPINGS[name])
    reward = world.reward(trainer.reference)
    trainer.reward = preference(reward)
    for part in (trainer.reference, reward):
        part.requires_grad_(True)  # even if nobody had frozen them
    rollout = trainer.roll(0)
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in vars(rollout).values())
    centred = rollout.length_advantage.view(-1, trainer.config.rlhf.group)
    torch.testing.assert_close(centred.mean(1), torch.zeros(len(centred)), atol=1e-5, rtol=0)
    assert (rollout.advantage[rollout.step == HIDDEN] == 0).all() and rollout.advantage.abs().max() > 0.1
    assert (rollout.facts["alpha"] == 0) == name.startswith("sparse")
    assert sum(v for k, v in rollout.facts.items() if k.startswith("alpha_0")) == pytest.approx(1, abs=1e-5)

    frozen = {**dict(trainer.reference.named_parameters()), **dict(reward.named_parameters())}
    optimised = [p for group in make_optimizer(trainer.policy, trainer.config.rlhf.fit).param_groups for p in group["params"]]
    assert {p.data_ptr() for p in optimised} == {p.data_ptr() for p in trainer.policy.parameters()}
    assert not {p.data_ptr() for p in optimised} & {p.data_ptr() for p in frozen.values()}
    loss, facts = policy_loss(trainer.policy, rollout, trainer.config.rlhf, 0.03, trainer.policy.allowed)
    loss.backward()
    assert all(p.grad is None for p in frozen.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainer.policy.parameters())
    assert facts["clipped"] == 0 and abs(facts["kl"].item()) < 1e-4 and facts["entropy"] > 0


def test_a_rollout_is_sampled_then_scored_then_shaped(world: Any, run_of: RunOf) -> None:
    trainer = trainer_of(world, run_of, shaping=ShapingConfig(kappa=1.0))
    trainer.reference = world.denoiser(1).requires_grad_(False)
    trainer.extra["confidence"] = [-2.5, 0.3]
    rollout, group = trainer.roll(0), trainer.config.rlhf.group
    t, image, joint = trainer.sample(trainer.policy, trainer.rows(0)[0], trainer.corpus, ("rollout", 0), drafts=True)
    assert torch.equal(t.x0, rollout.x0) and torch.equal(image, rollout.image)
    alignment, shaper = trainer.alignment, HierarchicalRewardShaper(trainer.config.shaping)
    dense = dense_reward(alignment, world.words, t, joint.repeat_interleave(group, 0), trainer.config.shaping, trainer.config.rlhf.steps)
    sparse = world.reward(world.denoiser()).score(t.x0, t.length, image, joint)
    scales = Scales(*(float(square) ** 0.5 for square in shaper.squares(dense, sparse, t.step, group)))
    shaped = shaper(dense, sparse, (log_odds(t.confidence) + 2.5) / 0.3, t.step, group, scales)
    torch.testing.assert_close(rollout.advantage, shaped.advantage)
    torch.testing.assert_close(rollout.length_advantage, shaped.length)
    assert rollout.facts["alpha"] == pytest.approx(float(shaped.alpha[t.step < HIDDEN].mean())) and shaped.alpha.std() > 0.05
    base = score(trainer.reference, t.x0, t.step, t.length, image, trainer.config.rlhf.temperature)
    torch.testing.assert_close(rollout.reference, base.distribution)
    torch.testing.assert_close(rollout.length_reference, base.length_distribution)


def test_shuffled_alphas_have_the_same_histogram(world: Any, run_of: RunOf) -> None:
    shaping = ShapingConfig(kappa=1.0)
    plain, shuffled = (trainer_of(world, run_of, shaping=replace(shaping, shuffle_alpha=on)).roll(0) for on in (False, True))
    same = {k for k in plain.facts if k == "alpha" or k.startswith("alpha_0")} | {"reward", "dense_reward"}
    assert {k: shuffled.facts[k] for k in same} == pytest.approx({k: plain.facts[k] for k in same}) and len(same) > 10
    assert torch.equal(shuffled.x0, plain.x0) and not torch.allclose(shuffled.advantage, plain.advantage)


def test_alpha_fades_as_the_training_goes_on(world: Any, run_of: RunOf) -> None:
    trainer = trainer_of(
        world, run_of, shaping=ShapingConfig(kappa=0.0, fade=0.5), rlhf={"fit": FitConfig(epochs=4, epoch_size=12, batch_size=3)}
    )
    assert [trainer.progress(index) for index in (0, 4, 16)] == [0.0, 0.25, 1.0]  # of 4 epochs of 4 rollouts
    short = trainer_of(world, run_of, rlhf={"inner_updates": 2, "fit": FitConfig(epochs=3, epoch_size=5, batch_size=8, save_every=2)})
    assert [short.progress(index) for index in (0, 1, 3)] == pytest.approx([0.0, 1 / 3, 1.0])  # one rollout, for two updates, an epoch
    assert [trainer.roll(index).facts["alpha"] for index in (0, 4, 8, 12)] == pytest.approx([0.5, 0.25, 0.0, 0.0])


@pytest.mark.parametrize("logprob", ["trajectory", "mean_field"])
def test_the_ratio_starts_at_one_whichever_probabilities_are_improved(world: Any, run_of: RunOf, logprob: str) -> None:
    trainer = trainer_of(world, run_of, rlhf={"logprob": logprob})
    trainer.reference = world.denoiser(1).requires_grad_(False)
    rollout, config = trainer.roll(0), trainer.config.rlhf
    mine, base = (score(m, rollout.x0, rollout.step, rollout.told, rollout.image, config.temperature)
                  for m in (trainer.policy, trainer.reference))  # fmt: skip
    torch.testing.assert_close(mine.logp, rollout.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(base.distribution, rollout.reference)
    written = rollout.step < HIDDEN
    assert set(rollout.step[written].tolist()) == ({1} if logprob == "mean_field" else {1, 2, 3})
    if logprob == "mean_field":  # no token knows of another
        other = torch.where(torch.arange(12) == 0, (rollout.x0 % 3) + 5, rollout.x0)
        seen = score(trainer.policy, other, rollout.step, rollout.told, rollout.image, config.temperature)
        torch.testing.assert_close(seen.logp[:, 1:], rollout.logp[:, 1:], atol=1e-5, rtol=0)


def test_rollouts_can_be_replayed_and_serve_their_updates(world: Any, run_of: RunOf) -> None:
    trainer = trainer_of(world, run_of, rlhf={"inner_updates": 2})
    first = list(islice(trainer.rollouts(0), 4))
    assert first[0] is first[1] and first[2] is first[3] and first[1] is not first[2]
    again = trainer_of(world, run_of, rlhf={"inner_updates": 2})
    again.extra.update(squares=[1.0, 1.0])
    (third,) = islice(again.rollouts(2), 1)
    assert torch.equal(third.x0, first[2].x0) and torch.equal(third.step, first[2].step)


def test_running_scales(world: Any, run_of: RunOf) -> None:
    trainer = trainer_of(world, run_of)
    scales = trainer.update_scales(torch.tensor(4.0), torch.tensor(9.0))
    assert (scales.dense, scales.sparse) == (pytest.approx(2), pytest.approx(3))
    scales = trainer.update_scales(torch.tensor(14.0), torch.tensor(9.0))
    assert scales.dense == pytest.approx(5**0.5) and trainer.extra["squares"] == pytest.approx([5.0, 9.0])


def test_the_anchor_adds_the_base_objective(world: Any, run_of: RunOf) -> None:
    trainer = trainer_of(world, run_of, rlhf={"anchor": 0.5})
    rollout, config = trainer.roll(0), trainer.config.rlhf
    assert rollout.anchor is not None and len(rollout.anchor.x0) == config.fit.batch_size
    with_anchor, _ = policy_loss(trainer.policy, rollout, config, 0.0, trainer.policy.allowed)
    without, _ = policy_loss(trainer.policy, replace(rollout, anchor=None), config, 0.0, trainer.policy.allowed)
    rows, _ = trainer.rows(0)
    g = torch.Generator().manual_seed(0)
    other = caption_batch(world.corpora["train"], rows, slice(None), trainer.config.base, g)
    assert torch.equal(rollout.anchor.image, other.image) and (with_anchor - without).item() > 0.5


def test_the_anchor_of_a_process_is_its_part_of_the_batch_s(world: Any, run_of: RunOf) -> None:
    trainer = trainer_of(world, run_of, rlhf={"anchor": 0.5})
    whole, _ = trainer.rows(0)
    alone = trainer.roll(0).anchor
    trainer.rows = lambda index: (whole, slice(1, None))  # type: ignore[method-assign]
    second = trainer.roll(0).anchor
    assert alone is not None and second is not None and len(second.x0) == len(whole) - 1
    assert all(torch.equal(getattr(second, name), getattr(alone, name)[1:]) for name in ("x0", "step", "length", "image", "seen"))


def test_dense_reward_of_a_rollout(world: Any) -> None:
    tokenizer, alignment = world.eyes.tokenizer, world.eyes.alignment
    ids = tokenizer.encode("a red circle", add_special_tokens=False).ids
    x0, step = torch.tensor([[*ids, 0]]), torch.tensor([[2, 1, 2, HIDDEN]])
    drafts = torch.tensor([[[ids[0], ids[0], ids[0], 0], [ids[0], ids[1], ids[0], 0], [*ids, 0]]])
    zero = torch.zeros(1, 4)
    t = Trajectory(x0, step, torch.tensor([3]), torch.tensor([3]), zero, zero, zero[:, 0], drafts)
    joint = world.corpora["train"].joint[:1]
    words = dense_reward(alignment, world.words, t, joint, ShapingConfig(dense="leave_one_word_out"), 2)
    assert words.credited.tolist() == [[False, True, True, False]]
    whole, red, circle = ((alignment.embed_texts([text]) @ joint.T).item() for text in ("a red circle", "a circle", "a red"))
    torch.testing.assert_close(words.token, torch.tensor([[0.0, whole - red, whole - circle, 0.0]]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(words.per_step, words.token[:, [1, 2]])
    steps = dense_reward(alignment, world.words, t, joint, ShapingConfig(), 2)
    assert steps.credited.tolist() == [[True, True, True, False]]
    phi = steps.potential
    texts = ["a a a", "a red a", "a red circle"]
    torch.testing.assert_close(phi, (alignment.embed_texts(texts) @ joint.T).T, atol=1e-5, rtol=1e-4)


def test_captions_that_decode_to_blanks_earn_nothing(world: Any) -> None:
    t = Trajectory(*(torch.ones(1, 2, dtype=torch.long),) * 2, *(torch.tensor([2]),) * 2, *(torch.zeros(1, 2),) * 2, torch.zeros(1), None)
    shaping = ShapingConfig(dense="leave_one_word_out")
    dense = dense_reward(world.eyes.alignment, lambda ids: ([], [0] * len(ids)), t, world.corpora["train"].joint[:1], shaping, 1)
    assert not dense.credited.any() and not dense.token.any()


def test_held_out_figures(world: Any, run_of: RunOf) -> None:
    trainer = trainer_of(world, run_of)
    facts = held_out(trainer, trainer.reference, world.corpora["val"], trainer.reward)
    assert facts["kl"] == pytest.approx(0, abs=1e-4) and facts["judge"] == pytest.approx(facts["reward"], abs=1e-5)
    assert 0 <= facts["gold_utility"] <= 1 and facts["entropy"] > 0 and facts["loss"] > 0
    moved = held_out(trainer, world.denoiser(5), world.corpora["val"], trainer.reward)
    assert moved["kl"] > 0.01
    assert held_out(trainer, trainer.reference, world.corpora["val"], trainer.reward) == facts


def test_kl_controller_and_hard_stop() -> None:
    config, extra = RLHFConfig(kl=0.03, kl_target=5.0, kl_stop=20.0), {"kl_weight": 0.03, "over": []}
    guard, state = kl_guard(config, extra), TrainState(torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]))
    assert guard(state, {"kl": 1.0}) is None and extra["kl_weight"] == 0.03  # never below its setting
    assert guard(state, {"kl": 5.5}) is None and extra["kl_weight"] == pytest.approx(0.03 * 1.01)
    for _ in range(4):
        assert guard(state, {"kl": 21.0}) is None
    assert extra["kl_weight"] == pytest.approx(0.03 * 1.01 * 1.02**4)
    assert guard(state, {"kl": 19.0}) is None
    answers = [guard(state, {"kl": 21.0}) for _ in range(5)]
    assert answers[:4] == [None] * 4 and "KL above 20" in answers[4]
    fixed = {"kl_weight": 0.03, "over": []}
    kl_guard(replace(config, kl_target=0.0), fixed)(state, {"kl": 15.0})
    assert fixed["kl_weight"] == 0.03


def test_alarms_ring_for_what_goes_wrong_and_only_then() -> None:
    base = {"repetition": 0.05, "mean_words": 8.0, "distinct_2": 0.4, "bad_endings": 0.02, "entropy": 2.0}
    assert alarms(base, base) == []
    wrong = {"repetition": 0.2, "mean_words": 12.0, "distinct_2": 0.1, "bad_endings": 0.2, "entropy": 0.1}
    for key, value in wrong.items():
        assert len(alarms(base | {key: value}, base)) == 1
    assert alarms(base | wrong, base) == ["repetition", "length_drift", "narrow_vocabulary", "bad_endings", "entropy_floor"]


def test_log_odds_and_correlation() -> None:
    torch.testing.assert_close(log_odds(torch.tensor([0.5, 0.9])), torch.tensor([0.0, 9.0]).clamp(min=1).log())
    assert log_odds(torch.tensor([0.0, 1.0])).isfinite().all()
    x = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(x, 3 - 2 * x) == pytest.approx(-1) and correlation(x, torch.ones(3)) == 0


@pytest.mark.parametrize("alarmed", [True, False])
def test_weights_that_raise_an_alarm_are_never_kept(world: Any, run_of: RunOf, monkeypatch: pytest.MonkeyPatch, alarmed: bool) -> None:
    monkeypatch.setattr("hierarchical_diffusion_rlhf_caption_refinement.training.rlhf.alarms", lambda now, base: ["repetition"] * alarmed)
    rlhf = replace(world.config.rlhf, fit=FitConfig(epochs=3, epoch_size=4, batch_size=2, lr=3e-2, save_every=2))
    run, base, reward = run_of(world.config, rlhf=rlhf), world.denoiser(), preference(world.reward())
    path = train_rlhf(run, replace(world.eyes, config=run.config), base, reward, reward, world.corpora, world.words)
    rows = run.log.rows("rlhf")
    _, kept = load_denoiser(path, "rlhf")
    judged = [row["val_judge"] for row in rows]
    assert [row.get("val_alarm_repetition") for row in rows[1:]] == [1.0 if alarmed else None] * 3
    best = 0 if alarmed else judged.index(max(judged))
    assert len(rows) == 4 and checkpoint.load(path, "rlhf")["facts"]["row"]["epoch"] == best
    other = run_of(run.config, shaping=ShapingConfig(clip_weight=0.0), resume=True)
    with pytest.raises(CheckpointError, match=r"last_rlhf\.pt: was trained with shaping\.clip_weight=0\.5, now it is 0\.0; remove it"):
        train_rlhf(other, replace(world.eyes, config=other.config), base, reward, reward, world.corpora, world.words)
    same = all(torch.equal(a, b) for a, b in zip(kept.state_dict().values(), base.cpu().state_dict().values(), strict=True))
    assert same == (best == 0)
    assert max(judged[1:]) > judged[0]
