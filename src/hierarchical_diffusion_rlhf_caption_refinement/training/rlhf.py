"""Stage 3: the denoiser is refined by the hierarchical reward, with the exact policy gradient of its denoising trajectories (or `distil`).

Axes: N images, B = N x G captions, T caption length, K denoising steps, V vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, repeat
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data.corpus import Corpus
from ..data.streams import batch_indices, share
from ..evaluation.evaluate import Worth, gold_summary, text_statistics, write_captions
from ..models.alignment import Alignment, credited_tokens, leave_one_word_out, step_potential, text_scores
from ..models.denoiser import OPEN, DiffusionCaptionModel
from ..models.diffusion import HIDDEN, revealed
from ..models.reward import Words
from ..models.sampler import Score, Trajectory, noise_for, sample, score
from ..models.saved import FILES, Eyes, build_denoiser, save_denoiser
from ..models.shaping import (
    Dense,
    HierarchicalRewardShaper,
    Scales,
    Shaped,
    dealt_out,
    dense_from_caption,
    dense_from_potential,
    dense_from_words,
    log_odds,
)
from ..utils.config import Config, RLHFConfig, SamplerConfig, ShapingConfig, settings_of
from ..utils.seeding import generator
from .base import LENGTH_WEIGHT, CaptionBatch, caption_batch, caption_loss, denoising, validation_loss
from .distil import best_found, rewritten
from .engine import Objective, Row, Stop
from .run import Run, steps_per_epoch
from .state import TrainState

SCALE_DECAY = 0.9
"""Decay of the running scales of the two rewards, per rollout."""
DRIFT_IMAGES = 64
"""Held-out images on which KL and entropy are measured after every epoch."""
PATIENCE = 5
"""Updates in a row above the KL limit that stop training."""


@dataclass(frozen=True)
class Rollout:
    """Sampled captions, the probabilities they were sampled with, and what they earned: data, without gradient."""

    x0: Int[Tensor, "B T"]
    step: Int[Tensor, "B T"]
    told: Int[Tensor, " B"]
    image: Float[Tensor, "N P F"]
    logp: Float[Tensor, "B T"]
    length_logp: Float[Tensor, " B"]
    advantage: Float[Tensor, "B T"]
    length_advantage: Float[Tensor, " B"]
    reference: Float[Tensor, "B T V"]
    """Log-probabilities of the frozen base model at the same moments."""
    length_reference: Float[Tensor, "N T"]
    anchor: CaptionBatch | None
    facts: dict[str, float]


def rollout_plan(config: RLHFConfig) -> SamplerConfig:
    return SamplerConfig(steps=config.steps, schedule=config.schedule, order=config.order, temperature=config.temperature)


def dense_reward(
    alignment: Alignment, words: Words, t: Trajectory, joint: Float[Tensor, "B E"], config: ShapingConfig, steps: int
) -> Dense:
    """Token-level CLIP credit of a rollout, by the method the config names."""
    width = t.x0.shape[1]
    said = [words(row[:n]) for row, n in zip(t.x0.tolist(), t.length.tolist(), strict=True)]
    credited = credited_tokens([w for w, _ in said], [o for _, o in said], width).to(t.x0.device)
    if config.dense == "leave_one_word_out":
        credit = leave_one_word_out(alignment, [w for w, _ in said], [o for _, o in said], joint, width)
        return dense_from_words(credit, credited, t.step, steps)
    if config.dense == "caption":
        return dense_from_caption(text_scores(alignment, [" ".join(w) for w, _ in said], joint), t.step, steps)
    assert t.drafts is not None
    drafts = [[" ".join(words(draft[:n])[0]) for draft in row] for row, n in zip(t.drafts.tolist(), t.length.tolist(), strict=True)]
    written = revealed(t.step)  # "a" or "two" may decide what comes: all words of a step earn what it adds
    return dense_from_potential(step_potential(alignment, drafts, joint), written, t.step)


def policy_loss(
    model: nn.Module, rollout: Rollout, config: RLHFConfig, kl_weight: float, allowed: Tensor
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Clipped policy gradient plus exact KL to the base model, per caption and divided by the constant T; and the anchor.

    loss = -1/(B T) sum_i min(r_i A_i, clip(r_i) A_i) + kl_weight / (B T) sum_i KL(policy_i || base_i), over tokens and the length.
    """
    scored = score(model, rollout.x0, rollout.step, rollout.told, rollout.image, config.temperature)
    width = rollout.x0.shape[1]
    gain = clipped_gain(scored.logp, rollout.logp, rollout.advantage, config.clip).sum(1)
    gain = gain + clipped_gain(scored.length_logp, rollout.length_logp, rollout.length_advantage, config.clip)
    kl = trajectory_kl(scored, rollout.reference, rollout.length_reference, rollout.step, rollout.told)
    loss = (kl_weight * kl - gain).mean() / width
    written = revealed(rollout.step)
    ratio = (scored.logp - rollout.logp).exp()
    facts = {
        "kl": kl.mean(),
        "entropy": (categorical_entropy(scored.distribution.detach()) * written).sum() / written.sum(),
        "clipped": (((ratio - 1).abs() > config.clip) * written).sum() / written.sum(),
    }
    if rollout.anchor is not None:
        nll, length = caption_loss(model, rollout.anchor, allowed)
        loss = loss + config.anchor * (nll.mean() + LENGTH_WEIGHT * length.mean())
    return loss, facts


def clipped_gain(logp: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic surrogate; at ratio 1 its gradient is the plain policy gradient."""
    ratio = (logp - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def categorical_kl(p: Float[Tensor, "... V"], q: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    """KL(p || q) in nats of log-probabilities; outcomes that neither allows count nothing."""
    return (p.exp() * (p.nan_to_num(neginf=0.0) - q.nan_to_num(neginf=0.0))).sum(-1)


def categorical_entropy(p: Float[Tensor, "... V"]) -> Float[Tensor, "..."]:
    return -(p.exp() * p.nan_to_num(neginf=0.0)).sum(-1)


def trajectory_kl(
    policy: Score, base: Float[Tensor, "B T V"], base_length: Float[Tensor, "N T"], step: Int[Tensor, "B T"], told: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Exact KL to the base model at every decision the trajectory visited, a told length included: nats per caption."""
    tokens = (categorical_kl(policy.distribution, base) * revealed(step)).sum(1)
    lengths = categorical_kl(policy.length_distribution, base_length)
    return tokens + lengths.repeat_interleave(len(step) // len(lengths), 0) * (told != OPEN)


@dataclass
class Trainer:
    """Everything frozen that rollouts need, and the policy they are drawn from."""

    run: Run
    policy: DiffusionCaptionModel
    reference: DiffusionCaptionModel
    reward: Worth
    alignment: Alignment
    words: Words
    corpus: Corpus
    extra: dict[str, Any]
    """Running scales, confidence statistics and KL weight: `TrainState.extra`, so that they survive a kill."""

    @property
    def config(self) -> Config:
        return self.run.config

    def rollouts(self, start: int) -> Iterator[Rollout]:
        """From update `start` on; each rollout serves `inner_updates` updates."""
        inner = self.config.rlhf.inner_updates
        for index in count(start // inner):
            yield from repeat(self.roll(index), inner)

    def progress(self, index: int) -> float:
        """Share of the training that rollout `index` begins at."""
        fit, inner = self.config.rlhf.fit, self.config.rlhf.inner_updates
        return index * inner / (fit.grad_accum * fit.epochs * steps_per_epoch(fit, len(self.corpus), inner))

    def rows(self, index: int) -> tuple[list[int], slice]:
        """Images of rollout `index`, and this process's part of them."""
        size, accelerator = self.config.rlhf.fit.batch_size, self.run.accelerator
        rows = batch_indices(len(self.corpus), size, index, self.config.seed, "rlhf")
        return rows, share(size, accelerator.process_index, accelerator.num_processes)

    @torch.no_grad()
    def sample(
        self, policy: DiffusionCaptionModel, rows: Sequence[int], corpus: Corpus, key: object, drafts: bool = False
    ) -> tuple[Trajectory, Tensor, Tensor]:
        """Captions of the rows by the rollout policy, with the images' tokens and joint embeddings."""
        config, device = self.config, self.run.device
        image, joint = corpus.image(rows).to(device), corpus.joint[list(rows)].to(device)
        keys = [(key, corpus.examples[row].key) for row in rows]
        noise = noise_for(keys, config.rlhf.group, config.rlhf.steps, policy.max_length, config.seed).to(device)
        policy.eval()
        return sample(policy, image, rollout_plan(config.rlhf), noise, drafts=drafts), image, joint

    @torch.no_grad()
    def roll(self, index: int) -> Rollout:
        """Sample, reward, shape."""
        config, group, shaping = self.config.rlhf, self.config.rlhf.group, self.config.shaping
        drafts = shaping.dense == "step_potential" and shaping.clip_weight > 0
        with self.run.accelerator.autocast():  # as the policy is scored, or their ratio would not start at 1; rewards stay exact
            whole, part = self.rows(index)
            rows = whole[part]
            t, image, joint = self.sample(self.policy, rows, self.corpus, ("rollout", index), drafts)
            learned = t if config.logprob == "trajectory" else self.mean_field(t, image)
            base = score(self.reference, t.x0, learned.step, t.told, image, config.temperature)
        sparse = self.reward(self.corpus, rows, t)
        dense = self.dense(t, joint.repeat_interleave(group, 0))
        shaper = HierarchicalRewardShaper(shaping)
        scales = self.update_scales(*shaper.squares(dense, sparse, t.step, group))
        mean, std = self.extra["confidence"]
        z = (log_odds(t.confidence) - mean) / std
        if shaping.shuffle_alpha:
            z = dealt_out(z, revealed(t.step), generator(self.config.seed, "shuffled alpha", index))
        shaped = shaper(dense, sparse, z, t.step, group, scales, shaper.trust(self.progress(index)))
        anchor = None
        if config.anchor:
            g = generator(self.config.seed, "anchor", index)
            anchor = caption_batch(self.corpus, whole, part, self.config.base, g)
        return Rollout(
            t.x0, learned.step, t.told, image, learned.logp, t.length_logp, shaped.advantage, shaped.length,
            base.distribution, base.length_distribution, anchor, rollout_facts(t, dense, sparse, shaped, group),
        )  # fmt: skip

    def mean_field(self, t: Trajectory, image: Float[Tensor, "N P F"]) -> Trajectory:
        """The same captions as if all their tokens had been drawn in one step, with the policy's probabilities for that."""
        step = torch.where(t.step == HIDDEN, HIDDEN, t.step.clamp(max=1))
        return replace(t, step=step, logp=score(self.policy, t.x0, step, t.told, image, self.config.rlhf.temperature).logp)

    def dense(self, t: Trajectory, joint: Float[Tensor, "B E"]) -> Dense:
        config = self.config
        if config.shaping.clip_weight == 0:  # the ablation does not even look
            none = torch.zeros_like(t.logp)
            return Dense(none, none.new_zeros(len(none), config.rlhf.steps), none.bool())
        return dense_reward(self.alignment, self.words, t, joint, config.shaping, config.rlhf.steps)

    def update_scales(self, dense: Tensor, sparse: Tensor) -> Scales:
        """Running mean squares over rollouts and processes."""
        new = cast(Tensor, self.run.accelerator.reduce(torch.stack([dense, sparse]), "mean")).tolist()
        old = self.extra.get("squares", new)
        self.extra["squares"] = [SCALE_DECAY * o + (1 - SCALE_DECAY) * n for o, n in zip(old, new, strict=True)]
        return Scales(*(value**0.5 for value in self.extra["squares"]))


def correlation(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float:
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-8))


def rollout_facts(t: Trajectory, dense: Dense, sparse: Float[Tensor, " B"], shaped: Shaped, group: int) -> dict[str, float]:
    """What the log tells of a rollout: rewards, alpha and its histogram, each component's share, groups without any contrast."""
    written = revealed(t.step)
    alpha, total = shaped.alpha[written], shaped.dense.abs()[written].sum() + shaped.sparse.abs()[written].sum()
    spread = sparse.view(-1, group).std(1, correction=0)
    histogram = torch.histc(alpha, 10, 0.0, 1.0) / len(alpha)
    return {
        "reward": float(sparse.mean()),
        "dense_reward": float(dense.per_step.sum(1).mean()),
        "mean_words": float(t.length.float().mean()),
        "confidence": float(t.confidence[written].mean()),
        "alpha": float(alpha.mean()),
        "alpha_sparse_correlation": correlation(alpha, sparse[:, None].expand_as(t.logp)[written]),
        "alpha_dense_correlation": correlation(alpha, dense.token[written]),
        "dense_share": float(shaped.dense.abs()[written].sum() / total.clamp(min=1e-8)),
        "zero_spread": float((spread < 1e-4).float().mean()),
        **{f"alpha_{i / 10:.1f}": float(v) for i, v in enumerate(histogram)},
    }


def kl_guard(config: RLHFConfig, extra: dict[str, Any]) -> Stop:
    """The KL controller (Ziegler et al. 2019: proportional, one-sided) and the hard stop, as the engine's `stop`."""

    def stop(state: TrainState, row: Row) -> str | None:
        if config.kl_target:
            error = min(max(row["kl"] / config.kl_target - 1, -0.2), 0.2)
            extra["kl_weight"] = max(config.kl, extra["kl_weight"] * (1 + 0.1 * error))
        over = deque([*extra["over"], row["kl"] > config.kl_stop], maxlen=PATIENCE)
        extra["over"] = list(over)
        return f"KL above {config.kl_stop:g} nats per caption for {PATIENCE} updates" if sum(over) == PATIENCE else None

    return stop


def alarms(now: dict[str, float], base: dict[str, float]) -> list[str]:
    """Signs of over-optimisation on held-out images, relative to the base model."""
    signs = {
        "repetition": now["repetition"] > base["repetition"] + 0.05,
        "length_drift": abs(now["mean_words"] / base["mean_words"] - 1) > 0.4,
        "narrow_vocabulary": now["distinct_2"] < 0.5 * base["distinct_2"],
        "bad_endings": now["bad_endings"] > base["bad_endings"] + 0.05,
        "entropy_floor": now["entropy"] < 0.1 * base["entropy"],
    }
    return [name for name, rings in signs.items() if rings]


@torch.no_grad()
def drift(trainer: Trainer, policy: DiffusionCaptionModel, corpus: Corpus, rows: list[int], chunk: int = 16) -> dict[str, float]:
    """KL to the base model in nats per caption, and entropy in nats per token, of the rollout policy on these images."""
    kl, entropy, tokens, temperature = 0.0, 0.0, 0, trainer.config.rlhf.temperature
    for start in range(0, len(rows), chunk):  # with a large vocabulary two whole distributions of every token are gigabytes
        some = rows[start : start + chunk]
        t, image, _ = trainer.sample(policy, some, corpus, "held out")
        with trainer.run.accelerator.autocast():  # as it is trained; only the policy's own forward would be otherwise
            mine, base = (score(model, t.x0, t.step, t.told, image, temperature) for model in (policy, trainer.reference))
        inside = revealed(t.step)
        kl += len(some) * float(trajectory_kl(mine, base.distribution, base.length_distribution, t.step, t.told).mean())
        entropy += float(categorical_entropy(mine.distribution)[inside].sum())
        tokens += int(inside.sum())
    return {"kl": kl / len(rows), "entropy": entropy / max(tokens, 1)}


@torch.no_grad()
def held_out(trainer: Trainer, policy: DiffusionCaptionModel, corpus: Corpus, judge: Worth) -> dict[str, float]:
    """Proxy, judge and (for scenes) gold of greedy captions of held-out images, with the text statistics that guard against hacking,
    and KL and entropy of the rollout policy there."""
    config = trainer.config
    rows = list(range(len(corpus)))
    written = write_captions(policy, corpus, rows, config.sampler.plain, config.seed)
    worth = {name: float(of(corpus, rows, written.trajectory).mean()) for name, of in {"reward": trainer.reward, "judge": judge}.items()}
    facts = worth | drift(trainer, policy, corpus, rows[:DRIFT_IMAGES])
    truth = {f"gold_{name}": value for name, value in gold_summary(written.texts, corpus.examples).items()}
    loss = {"loss": validation_loss(policy, corpus, config.base, config.seed)}
    return loss | facts | text_statistics(written.texts) | truth


def learning(trainer: Trainer) -> tuple[Callable[[int], Iterator[Any]], Objective, Stop | None]:
    """What is learned from, the loss, and what stops it: the policy gradient of rollouts, or the best captions that a search finds."""
    config, extra, corpus, allowed = trainer.config, trainer.extra, trainer.corpus, trainer.policy.allowed
    if config.rlhf.method == "distil":
        if "captions" not in extra:
            extra["captions"] = best_found(trainer.reference, corpus, trainer.reward, trainer.alignment, config.shaping)
        found = rewritten(corpus, extra["captions"])

        def make(index: int, rows: list[int], part: slice) -> CaptionBatch:
            return caption_batch(found, rows, part, config.base, generator(config.seed, "distil batch", index))

        return trainer.run.batches("distil", config.rlhf.fit, len(corpus), make), denoising(allowed), None

    def objective(model: nn.Module, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor | float]]:
        loss, facts = policy_loss(model, rollout, config.rlhf, extra["kl_weight"], allowed)
        return loss, {**facts, **rollout.facts, "kl_weight": extra["kl_weight"]}

    return trainer.rollouts, objective, kl_guard(config.rlhf, extra)


def train_rlhf(
    run: Run, eyes: Eyes, base: DiffusionCaptionModel, reward: Worth, judge: Worth, corpora: dict[str, Corpus], words: Words
) -> Path:
    """Writes best_rlhf_model.pt: the weights that the held-out judge, never used as reward, likes best, of those that raise no alarm; the
    base model is the first of them."""
    config, path = run.config, run.config.models / FILES["rlhf"]
    policy, reference = build_denoiser(eyes), base.to(run.device).eval().requires_grad_(False)
    policy.load_state_dict(base.state_dict())
    extra: dict[str, Any] = {"kl_weight": config.rlhf.kl, "over": []}
    state = run.state("rlhf", policy, config.rlhf.fit, extra)
    trainer = Trainer(run, policy, reference, reward, eyes.alignment, words, corpora["train"], state.extra)
    if "base" not in state.extra:
        sampled, _, _ = trainer.sample(reference, list(range(min(len(corpora["val"]), 128))), corpora["val"], "confidence")
        odds = log_odds(sampled.confidence[revealed(sampled.step)])
        state.extra["confidence"] = [float(odds.mean()), float(odds.std().nan_to_num().clamp(min=1e-6))]
        state.extra["base"] = held_out(trainer, reference, corpora["val"], judge)
        state.best = state.extra["base"]["judge"]
        if run.main:
            row = {"step": 0, "epoch": 0} | {f"val_{k}": v for k, v in state.extra["base"].items()}
            run.log.rewind("rlhf", -1)
            run.log.write("rlhf", row)
            save_denoiser(path, "rlhf", eyes, policy, {"row": row})

    def evaluate(model: nn.Module) -> dict[str, float]:
        now = held_out(trainer, cast(DiffusionCaptionModel, model), corpora["val"], judge)
        found = alarms(now, state.extra["base"])
        rung = {f"alarm_{name}": 1.0 for name in found}
        return now | {"alarms": float(len(found)), "judge_unalarmed": math.nan if found else now["judge"]} | rung

    def best(model: nn.Module, row: Row) -> None:
        save_denoiser(path, "rlhf", eyes, model, {"row": row})

    batches, objective, stop = learning(trainer)
    run.fit(
        "rlhf", state, config.rlhf.fit, len(corpora["train"]), batches, objective, evaluate=evaluate,
        better=("val_judge_unalarmed", "max"), best=best, stop=stop, boundary=config.rlhf.inner_updates,
        held=settings_of(config, "rlhf", "shaping", "base", "sampler"),
    )  # fmt: skip
    return path
