"""A toy in which people like captions that name the picture's kind: RLHF must raise that on pictures it never saw."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example
from hierarchical_diffusion_rlhf_caption_refinement.data.text import banned_ids, build_tokenizer, words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import Worth, agreement, preference, write_captions
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import Evidence, RewardModel
from hierarchical_diffusion_rlhf_caption_refinement.training.rlhf import Trainer, policy_loss
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, FitConfig, RLHFConfig, SamplerConfig, ShapingConfig

KINDS = ("dog", "cat", "bird")


class Clip:
    """Sees the kind of the picture, and the kinds that a text names."""

    def embed_images(self, tokens: Tensor) -> Tensor:
        return torch.nn.functional.normalize(tokens[:, 0, :3], dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        named = torch.tensor([[float(kind in text.split()) for kind in KINDS] for text in texts])
        return torch.nn.functional.normalize(named, dim=-1)


class NamesTheKind(RewardModel):
    def score(self, x0: Tensor, length: Tensor, image: Tensor, joint: Tensor) -> Tensor:
        """1 for the right kind, -1 for each wrong one."""
        names = [self.evidence.words(row[:n])[0] for row, n in zip(x0.tolist(), length.tolist(), strict=True)]
        right = joint.argmax(1).repeat_interleave(len(x0) // len(joint)).tolist()
        worth = [[1.0 if word == KINDS[k] else -1.0 for word in set(said) & set(KINDS)] for said, k in zip(names, right, strict=True)]
        return torch.tensor([float(sum(w)) for w in worth])


def pictures(count: int, seed: int) -> Corpus:
    kind = np.arange(count) % 3
    tokens = np.random.default_rng(seed).normal(scale=0.3, size=(count, 2, 4))
    tokens[np.arange(count), :, kind] += 1.0
    tokenizer = build_tokenizer(["a dog cat bird runs sleeps red"], 1)
    joint = Clip().embed_images(torch.from_numpy(tokens).float())
    return Corpus(
        [Example(f"{seed}/{i}", (f"a {KINDS[i % 3]} runs",)) for i in range(count)], tokens.astype(np.float16), joint, tokenizer, 4
    )


def improve(run_of: Callable[..., Run], shaping: ShapingConfig, updates: int, sparse: Worth | None = None) -> tuple[float, float]:
    """Mean reward of greedy captions of unseen pictures before and after; by default people name the kind."""
    rlhf = RLHFConfig(group=8, steps=2, fit=FitConfig(batch_size=12, lr=5e-3))
    run = run_of(Config(rlhf=rlhf, shaping=shaping))
    train, held_out = pictures(48, 0), pictures(24, 1)
    words, banned = words_and_owners(train.tokenizer), banned_ids(train.tokenizer)
    torch.manual_seed(0)
    policy, reference = (DiffusionCaptionModel(9, 4, 2, 4, width=16, layers=1, heads=2, banned=banned) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    reward = sparse or preference(NamesTheKind(Evidence(reference.eval(), Clip(), words), 1, 0, 0.0))
    trainer = Trainer(run, policy, reference, reward, Clip(), words, train, {"confidence": [-2.0, 1.0]})
    plan = SamplerConfig(steps=2)

    def worth() -> float:
        return float(reward(held_out, range(24), write_captions(policy.eval(), held_out, range(24), plan, 0).trajectory).mean())

    before = worth()
    optimizer = torch.optim.Adam(policy.parameters(), lr=rlhf.fit.lr)
    for index in range(updates):
        loss, _ = policy_loss(policy, trainer.roll(index), replace(rlhf, kl=0.0, kl_target=0.0), 0.003, policy.allowed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, worth()


def test_the_sparse_reward_rises_on_unseen_pictures(run_of: Callable[..., Run]) -> None:
    before, after = improve(run_of, ShapingConfig(clip_weight=0.0), 60)
    assert before < 0.3 and after > 0.8


def test_the_mixed_reward_rises_too(run_of: Callable[..., Run]) -> None:
    before, after = improve(run_of, ShapingConfig(fade=0.0), 60)
    assert before < 0.3 and after > 0.8


def test_agreement_with_references_rises_too(run_of: Callable[..., Run]) -> None:
    before, after = improve(run_of, ShapingConfig(), 60, agreement(pictures(48, 0)))
    assert after > 3 * before > 1  # CIDEr-D
