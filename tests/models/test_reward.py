import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.text import banned_ids, build_tokenizer, encode, pad, words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.models.alignment import AlignmentModel, text_scores
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel, reveal_mask
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import steps_from_left, valid_positions
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import (
    BLIND,
    BOUND,
    FEATURES,
    QUALITIES,
    Evidence,
    RewardModel,
    davidson_logits,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import AlignmentConfig

TEXTS = ["a red dog", "the the dog runs dog", "cat", "a blue cat and a red dog"]


def reward_model(members: int = 3, reader_layers: int = 1, pessimism: float = 0.5) -> RewardModel:
    """All of it random, the readers' outputs too."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([*TEXTS, "the blue dog"], 1)
    alignment = AlignmentModel(tokenizer, 8, 4, AlignmentConfig(width=16, layers=1, heads=2, embed=8))
    vocabulary = tokenizer.get_vocab_size()
    denoiser = DiffusionCaptionModel(vocabulary, 8, 3, 4, width=16, layers=2, heads=2, dropout=0.5, banned=banned_ids(tokenizer))
    reward = RewardModel(Evidence(denoiser, alignment, words_and_owners(tokenizer)), members, reader_layers, pessimism)
    with torch.no_grad():
        reward.linear.normal_()
        for parameter in [*denoiser.parameters(), *reward.readers.parameters()]:
            parameter.add_(0.2 * torch.randn_like(parameter))
    reward.readers.eval()
    return reward


def captions(reward: RewardModel, texts: list[str], width: int = 8) -> tuple[Tensor, Tensor]:
    tokenizer = reward.evidence.alignment.tokenizer  # type: ignore[attr-defined]
    return pad(encode(tokenizer, texts), width)


def pictures(reward: RewardModel, count: int) -> tuple[Tensor, Tensor]:
    image = torch.randn(count, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return image, reward.evidence.alignment.embed_images(image)


def test_davidson_is_bradley_terry_with_ties() -> None:
    margin = torch.linspace(-3, 3, 13)
    p = davidson_logits(margin, torch.tensor(0.4)).softmax(-1)
    torch.testing.assert_close(p.sum(-1), torch.ones(13))
    torch.testing.assert_close(p.flip(0)[:, [1, 0, 2]], p)  # the sides can be swapped
    torch.testing.assert_close(p[:, 0] / (p[:, 0] + p[:, 1]), margin.sigmoid())
    torch.testing.assert_close(p[:, 2] / (p[:, 0] * p[:, 1]).sqrt(), torch.full((13,), 0.4).exp())
    assert p[:, 2].argmax() == 6


def test_features_say_what_their_names_say() -> None:
    reward = reward_model()
    x0, length = captions(reward, TEXTS)
    image, joint = pictures(reward, 2)
    values, hidden, tokens = reward.evidence.read(x0, length, image, joint)
    assert values.shape == (4, len(FEATURES)) and hidden.shape == (4, 8, 16) and tokens.shape == (2, 3, 16)
    f = dict(zip(FEATURES, values.T, strict=True))
    assert f["words"].tolist() == [3, 5, 1, 7] and f["words squared"].tolist() == pytest.approx([0.9, 2.5, 0.1, 4.9])
    assert f["content words"].tolist() == [2, 2, 1, 4] and f["repeated words"].tolist() == [0, 1, 0, 0]
    assert f["doubled words"].tolist() == [0, 1, 0, 0]
    with torch.no_grad():
        torch.testing.assert_close(f["alignment"], text_scores(reward.evidence.alignment, TEXTS, joint.repeat_interleave(2, 0)))
        denoiser = reward.evidence.denoiser
        seen = [denoiser(x0[:1, :3], torch.tensor([[1, 2, 3]]), length[:1], image[:1], s) for s in (None, torch.tensor([False]))]
        logp, blind = (p.logits.log_softmax(-1)[0, torch.arange(3), x0[0, :3]] for p in seen)
    torch.testing.assert_close(f["mean logp"][0], logp.mean(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f["worst logp blind"][0], blind.min(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f["total information"][0], (logp - blind).sum(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(f["length logp"][0], seen[0].length_logits.log_softmax(-1)[0, 2], atol=1e-5, rtol=1e-5)
    assert set(BLIND) < set(FEATURES)


def test_a_score_depends_on_its_own_caption_and_image_alone() -> None:
    reward = reward_model()
    image, joint = pictures(reward, 2)
    together = reward.score(*captions(reward, TEXTS), image, joint)
    for i, text in enumerate(TEXTS):
        n = len(text.split())
        alone = reward.score(*captions(reward, [text], n), image[i // 2 : i // 2 + 1], joint[i // 2 : i // 2 + 1])  # nor on padding
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)


def test_another_image_changes_what_sees_and_leaves_what_is_blind() -> None:
    reward = reward_model()
    x0, length = captions(reward, TEXTS[:2])
    image, joint = pictures(reward, 2)
    own, _, _ = reward.evidence.read(x0, length, image, joint)
    swapped, _, _ = reward.evidence.read(x0, length, image.flip(0), joint.flip(0))
    same = [name for name, a, b in zip(FEATURES, own.T, swapped.T, strict=True) if torch.allclose(a, b)]
    assert same == list(BLIND)
    assert (reward.score(x0, length, image, joint) - reward.score(x0, length, image.flip(0), joint.flip(0))).abs().min() > 1e-3


def test_score_is_a_bounded_lower_bound_centred_on_the_base_model() -> None:
    reward = reward_model(reader_layers=0)
    x0, length = captions(reward, TEXTS)
    image, joint = pictures(reward, 4)
    members = reward.members(x0, length, image, joint)
    assert members.shape == (3, 4, len(QUALITIES))
    reward.set_base(members[..., 0])
    score = reward.score(x0, length, image, joint)
    low = BOUND * torch.atanh(score / BOUND)
    torch.testing.assert_close(low.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(low.std(), torch.tensor(1.0), atol=1e-5, rtol=0)
    reward.linear.mul_(100)
    assert reward.score(x0, length, image, joint).abs().max() <= BOUND

    brave, cautious = reward_model(pessimism=0.0), reward_model(pessimism=1.0)
    total = brave.members(x0, length, image, joint)[..., 0]
    torch.testing.assert_close(brave.score(x0, length, image, joint), BOUND * torch.tanh(total.mean(0) / BOUND))
    expected = BOUND * torch.tanh((total.mean(0) - total.std(0, correction=0)) / BOUND)
    torch.testing.assert_close(cautious.score(x0, length, image, joint), expected)


def test_temperature_divides_the_margins() -> None:
    reward = reward_model()
    x0, length = captions(reward, TEXTS)
    image, joint = pictures(reward, 4)
    hot = reward.members(x0, length, image, joint)
    reward.temperature.fill_(2.0)
    torch.testing.assert_close(reward.members(x0, length, image, joint), hot / 2)


def test_readers_start_at_zero_from_the_denoisers_last_blocks() -> None:
    evidence = reward_model().evidence
    fresh = RewardModel(evidence, 2, 1, 0.5)
    block, source = fresh.readers[0].blocks[0], evidence.denoiser.h[-1]  # type: ignore[index, union-attr]
    for own, theirs in zip(block.parameters(), source.parameters(), strict=True):
        assert torch.equal(own, theirs) and own is not theirs and own.requires_grad and not theirs.requires_grad
    x0, length = captions(fresh, TEXTS)
    assert not fresh.members(x0, length, *pictures(fresh, 4)).any()


def test_readers_of_two_blocks_read_what_the_denoisers_last_two_do() -> None:
    one = reward_model().evidence
    denoiser, two = one.denoiser, Evidence(one.denoiser, one.alignment, one.words, 2)
    x0, length = captions(reward_model(), TEXTS)
    image, joint = pictures(reward_model(), len(TEXTS))
    valid, place = valid_positions(length, 8), torch.arange(8).expand_as(x0)
    embedded = denoiser.embed(denoiser.wte(x0), place, length)  # the denoiser has two blocks
    mask = reveal_mask(steps_from_left(length, 8))[:, :8, :8]
    after_one, _ = denoiser.h[0](embedded, mask, denoiser.read_image(image).layers[0])
    torch.testing.assert_close(two.read(x0, length, image, joint)[1][valid], embedded[valid])
    torch.testing.assert_close(one.read(x0, length, image, joint)[1][valid], after_one[valid])


def test_what_the_reward_stands_on_is_frozen() -> None:
    reward = reward_model().train()
    assert reward.training and reward.readers.training and not reward.evidence.denoiser.training
    trained = {name.split(".")[0] for name, p in reward.named_parameters() if p.requires_grad}
    assert trained == {"readers"}
    x0, length = captions(reward, TEXTS)
    image, joint = pictures(reward, 4)
    asked = (x0, length, image.requires_grad_(), joint.requires_grad_())
    assert not reward.score(*asked).requires_grad
    features, hidden, tokens = reward.evidence.read(*asked)
    assert not (features.requires_grad or hidden.requires_grad or tokens.requires_grad)
    torch.testing.assert_close(reward.evidence.read(*asked)[0], features)  # although the denoiser was built with dropout
