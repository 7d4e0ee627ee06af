"""Training captions whose length nobody tells."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.text import decode_rows
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import preference, write_captions
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import OPEN, DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import HIDDEN, revealed, valid_positions
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import FEATURES
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import Trajectory, noise_for, sample, score
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import build_denoiser, load_denoiser
from hierarchical_diffusion_rlhf_caption_refinement.training.base import caption_batch, caption_loss, train_base
from hierarchical_diffusion_rlhf_caption_refinement.training.distil import best_found
from hierarchical_diffusion_rlhf_caption_refinement.training.rlhf import Rollout, Trainer, drift, policy_loss, rollout_plan
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import (
    Config,
    ConfigError,
    FitConfig,
    RLHFConfig,
    SamplerConfig,
    ShapingConfig,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import generator

RunOf = Callable[..., Run]
END, T, V = 0, 3, 4
ALL = torch.ones(V, dtype=torch.bool)


def toy(seed: int = 0, longest: int = T) -> DiffusionCaptionModel:
    torch.manual_seed(seed)
    model = DiffusionCaptionModel(V, longest, 2, 3, width=8, layers=1, heads=2, banned=(0,), end=END)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model.eval()


def every_caption(model: DiffusionCaptionModel) -> tuple[Tensor, Tensor, Tensor]:
    rows = [list(c) for n in range(1, T + 1) for c in product((1, 2, 3), repeat=n)]
    return model.from_left(torch.tensor([row + [0] * (T - len(row)) for row in rows]), torch.tensor(list(map(len, rows))))


def rollout_of(model: DiffusionCaptionModel, rows: tuple[Tensor, Tensor, Tensor], image: Tensor, tau: float, base: Any) -> Rollout:
    with torch.no_grad():
        mine, theirs = (score(m, *rows, image, tau) for m in (model, base))
    zero = torch.zeros_like(mine.logp)
    return Rollout(
        *rows, image, mine.logp, mine.length_logp, zero, zero[:, 0], theirs.distribution, theirs.length_distribution, None, {}
    )  # fmt: skip


def gradients(model: DiffusionCaptionModel, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None and g.abs().max() > 0}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_policy_gradient_is_that_of_the_enumerated_expected_reward(temperature: float) -> None:
    model, image, config = toy(), torch.randn(1, 2, 3), RLHFConfig(temperature=temperature)
    rows = every_caption(model)
    reward = torch.randn(len(rows[0]), generator=torch.Generator().manual_seed(2))
    p = score(model, *rows, image, temperature).logp.sum(1).exp()
    torch.testing.assert_close(p.sum(), torch.tensor(1.0))
    expected = gradients(model, (p * reward).sum())
    rollout = rollout_of(model, rows, image, temperature, toy(1))
    weight = (p * reward).detach() * len(p) * T  # the loss is a mean over captions, divided by T
    rollout = replace(rollout, advantage=weight[:, None] * revealed(rows[1]), length_advantage=weight)
    found = gradients(model, -policy_loss(model, rollout, config, 0.0, ALL)[0])
    assert found.keys() == expected.keys() and "untold" in found and not any("length_head" in name for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_the_ratio_is_one_right_after_the_rollout() -> None:
    model, image, config = toy(longest=6), torch.randn(2, 2, 3), RLHFConfig(steps=6, order="open_end", temperature=0.6)
    t = sample(model, image, rollout_plan(config), noise_for("ab", 20, config.steps, 6, 0))
    rollout = rollout_of(model, (t.x0, t.step, t.told), image, 0.6, model)
    rollout = replace(rollout, logp=t.logp, advantage=torch.randn(40, 6), length_advantage=torch.randn(40))
    _, facts = policy_loss(model, rollout, config, 0.0, ALL)
    assert facts["clipped"] == 0 and abs(facts["kl"].item()) < 1e-5 and len(set(t.length.tolist())) > 2


def test_kl_is_summed_over_words_and_end_and_no_length() -> None:
    model, other, image, config = toy(), toy(1), torch.randn(1, 2, 3), RLHFConfig(temperature=0.8)
    rows = every_caption(model)
    _, facts = policy_loss(model, rollout_of(model, rows, image, 0.8, other), config, 0.0, ALL)
    p, q = (score(m, *rows, image, 0.8).distribution for m in (model, other))
    first = kl_divergence(*(Categorical(logits=x[:, :1, 1:]) for x in (p, q)))  # no END there
    later = kl_divergence(*(Categorical(logits=x[:, 1:]) for x in (p, q)))
    torch.testing.assert_close(facts["kl"], (torch.cat([first, later], 1) * revealed(rows[1])).sum(1).mean())


def with_open_end(world: Any, share: float = 1.0) -> Any:
    config = replace(world.config, base=replace(world.config.base, open_end=share))
    return replace(world, config=config, eyes=replace(world.eyes, config=config))


def test_as_many_captions_as_asked_are_not_told_their_length_and_end_with_end(world: Any) -> None:
    corpus, config, rows = world.corpora["train"], replace(world.config.base, open_end=0.6), list(range(24)) * 50
    batch = caption_batch(corpus, rows, slice(None), config, generator(0, "x"))
    open_ = batch.told == OPEN
    assert open_.float().mean().item() == pytest.approx(0.6, abs=0.05) and torch.equal(batch.told[~open_], batch.length[~open_])
    for i in range(len(rows)):
        n, width = int(batch.length[i]), batch.x0.shape[1]
        assert batch.x0[i, :n].tolist() in corpus.captions[rows[i]] and (batch.x0[i, n:] == END).all()
        steps = batch.step[i].tolist()
        last = min(n + 1, width) if open_[i] else n
        assert steps[last:] == [HIDDEN] * (width - last) and max(steps[:last]) <= last
        assert not open_[i] or steps[:last] == list(range(1, last + 1))
    assert batch.x0.shape[1] <= corpus.max_words
    longest = caption_batch(replace(corpus, max_words=int(batch.length.max())), rows, slice(None), config, generator(0, "x"))
    assert longest.x0.shape[1] == int(batch.length.max())  # no room for END after the longest


def test_without_a_special_token_nothing_could_close_a_caption(world: Any) -> None:
    with pytest.raises(ConfigError, match="no special token that could close"):
        build_denoiser(replace(with_open_end(world).eyes, banned=()))


def test_the_loss_counts_end_like_a_word(world: Any) -> None:
    world = with_open_end(world)
    model, corpus = world.denoiser(), world.corpora["train"]
    batch = caption_batch(corpus, list(range(8)), slice(None), world.config.base, generator(0, "x"), drop_images=False)
    nll, _ = caption_loss(model, batch, model.allowed)
    found = score(model, *model.from_left(batch.x0, batch.length), batch.image).logp
    assert (batch.length < batch.x0.shape[1]).all()
    torch.testing.assert_close(nll, -found.sum(1) / (batch.length + 1))


def test_it_is_learned(world: Any, run_of: RunOf) -> None:
    world = with_open_end(world, 0.8)
    fit = FitConfig(epochs=25, epoch_size=24, batch_size=12, lr=1e-2)
    run = run_of(world.config, base=replace(world.config.base, fit=fit))
    _, model = load_denoiser(train_base(run, world.eyes, world.corpora), "base")
    plan = SamplerConfig(steps=12, order="open_end")
    written = write_captions(model, world.corpora["train"], list(range(24)), plan, 0)
    said = {tuple(ids) for captions in world.corpora["train"].captions for ids in captions}
    whole = [tuple(row[:n]) in said for row, n in zip(written.trajectory.x0.tolist(), written.trajectory.length.tolist(), strict=True)]
    lengths = torch.tensor([float(len(ids)) for ids in said])
    assert sum(whole) > 3  # ends where a caption ends
    assert abs(float(written.trajectory.length.float().mean() - lengths.mean())) < 2


@pytest.mark.parametrize("dense", ["leave_one_word_out", "caption"])
def test_rollouts_and_their_drift(world: Any, run_of: RunOf, dense: Any) -> None:
    world = with_open_end(world)
    config: Config = replace(
        world.config,
        shaping=ShapingConfig(dense=dense, credit="to_go"),
        rlhf=replace(world.config.rlhf, order="open_end", steps=12, anchor=0.1),
    )
    policy, reference = world.denoiser(), world.denoiser(1)
    for model in (policy, reference):
        with torch.no_grad():
            model.wte.weight[END] += 0.2
    extra = {"kl_weight": 0.03, "over": [], "confidence": [0.0, 1.0]}
    trainer = Trainer(run_of(config), policy, reference, preference(world.reward(reference)), world.eyes.alignment, world.words,
                      world.corpora["train"], extra)  # fmt: skip
    rollout = trainer.roll(0)
    assert (rollout.told == OPEN).all() and (rollout.length_logp == 0).all()
    ended = (rollout.x0 == END) & revealed(rollout.step)
    assert ended.any() and (rollout.advantage[ended] != 0).any() and (rollout.advantage[~revealed(rollout.step)] == 0).all()
    loss, facts = policy_loss(policy, rollout, config.rlhf, 0.03, policy.allowed)
    loss.backward()
    assert facts["clipped"] == 0 and facts["kl"] > 0
    t, image, _ = trainer.sample(policy, [0, 1], world.corpora["val"], "held out")
    p, q = (score(m, t.x0, t.step, t.told, image, config.rlhf.temperature).distribution for m in (policy, reference))
    expected = ((p.exp() * (p.nan_to_num(neginf=0.0) - q.nan_to_num(neginf=0.0))).sum(-1) * revealed(t.step)).sum(1).mean()
    assert drift(trainer, policy, world.corpora["val"], [0, 1])["kl"] == pytest.approx(expected.item(), rel=1e-4)


def test_distilling_searches_with_an_open_end(world: Any) -> None:
    world = with_open_end(world)
    model, corpus, seen = world.denoiser(), world.corpora["train"], []
    with torch.no_grad():
        model.wte.weight[END] = model.wte.weight[corpus.tokenizer.token_to_id("square")]  # its favourite word

    def shortness(corpus: Corpus, rows: list[int], t: Trajectory) -> Tensor:
        seen.append((decode_rows(corpus.tokenizer, t.x0, t.length), t.length))
        return -t.length.float()

    people = ShapingConfig(clip_weight=0.0, preference_weight=1e4)
    texts = best_found(model, corpus, shortness, world.eyes.alignment, people)
    candidates, lengths = seen[0]
    assert len(candidates) == 9 * len(corpus) and len(set(lengths.tolist())) > 1
    assert all(text in candidates[9 * i : 9 * i + 9] for i, text in enumerate(texts))
    assert all(len(text.split()) == int(lengths[9 * i : 9 * i + 9].min()) for i, text in enumerate(texts))


def test_the_reward_reads_captions_as_the_model_writes_them(world: Any) -> None:
    world = with_open_end(world)
    denoiser = world.denoiser(3)
    reward = world.reward(denoiser)
    corpus = world.corpora["train"]
    x0, length = torch.zeros(4, 12, dtype=torch.long), torch.tensor([3, 5, 12, 1])
    x0[valid_positions(length, 12)] = torch.randint(2, 9, (21,), generator=torch.Generator().manual_seed(0))
    features, _, _ = reward.evidence.read(x0, length, corpus.image([0, 1]), corpus.joint[:2])
    found = score(denoiser, *denoiser.from_left(x0, length), corpus.image([0, 1])).logp
    words = found * valid_positions(length, 12)
    torch.testing.assert_close(features[:, 0], words.sum(1) / length, atol=1e-5, rtol=1e-5)
    ends = found.gather(1, length[:, None].clamp(max=11))[:, 0] * (length < 12)
    torch.testing.assert_close(features[:, FEATURES.index("length logp")], ends, atol=1e-5, rtol=1e-5)
