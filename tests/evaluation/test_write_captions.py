from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example
from hierarchical_diffusion_rlhf_caption_refinement.data.text import build_tokenizer
from hierarchical_diffusion_rlhf_caption_refinement.evaluation import metrics
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import agreement, best_candidates, preference, write_captions
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import Evidence, RewardModel
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import Trajectory
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import SamplerConfig


class Clip:
    def embed_images(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def embed_texts(self, texts: list[str]) -> Tensor:
        return torch.zeros(len(texts), 4)


class LikesLongCaptions(RewardModel):
    def score(self, x0: Tensor, length: Tensor, image: Tensor, joint: Tensor) -> Tensor:
        return length.float() + 0.01 * x0.float().sum(1)


@pytest.fixture
def corpus() -> Corpus:
    examples = [Example(f"image {i}", ("a red dog runs",)) for i in range(7)]
    tokens = np.random.default_rng(0).normal(size=(7, 3, 4)).astype(np.float16)
    return Corpus(examples, tokens, torch.zeros(7, 4), build_tokenizer(["a red dog runs fast"], 1), 6)


@pytest.fixture
def model() -> DiffusionCaptionModel:
    torch.manual_seed(0)
    return DiffusionCaptionModel(7, 6, 3, 4, width=16, layers=2, heads=2, banned=(0, 1)).eval()


def liking(model: DiffusionCaptionModel) -> RewardModel:
    return LikesLongCaptions(Evidence(model, Clip(), lambda ids: ([], [])), 1, 0, 0.0)


@pytest.mark.parametrize("order", ["spread", "confidence"])
def test_captions_do_not_depend_on_the_chunk(corpus: Corpus, model: DiffusionCaptionModel, order: str) -> None:
    plan = SamplerConfig(steps=3, temperature=0.9, remask=1, order="confidence" if order == "confidence" else "spread")
    rows = [4, 0, 6, 2, 1]
    whole = write_captions(model, corpus, rows, plan, 0, group=2)
    chunks = write_captions(model, corpus, rows, plan, 0, group=2, chunk=2)
    assert whole.texts == chunks.texts and len(whole.texts) == 10 and whole.reward is None
    alone = write_captions(model, corpus, [6], plan, 0, group=2)
    assert alone.texts == whole.texts[4:6]
    assert write_captions(model, corpus, rows, plan, 1, group=2).texts != whole.texts


def test_the_best_of_several_candidates_is_kept(corpus: Corpus, model: DiffusionCaptionModel) -> None:
    rows, reward = list(range(7)), liking(model)
    plan = SamplerConfig(steps=3, temperature=1.0, candidates=5)
    all_five = write_captions(model, corpus, rows, SamplerConfig(steps=3, temperature=1.0), 0, reward, group=5)
    best = write_captions(model, corpus, rows, plan, 0, reward)
    assert all_five.reward is not None and best.reward is not None
    torch.testing.assert_close(best.reward, all_five.reward.view(7, 5).amax(1))
    picked = all_five.reward.view(7, 5).argmax(1) + 5 * torch.arange(7)
    assert best.texts == [all_five.texts[i] for i in picked.tolist()]
    with pytest.raises(ValueError, match="needs a reward model"):
        write_captions(model, corpus, rows, plan, 0)


def test_clip_chooses_among_the_captions_of_a_search(corpus: Corpus, model: DiffusionCaptionModel) -> None:
    class LikesFast(Clip):
        def embed_texts(self, texts: list[str]) -> Tensor:
            return torch.tensor([[float(text.split().count("fast")), 0, 0, 0] for text in texts])

    looked = replace(corpus, joint=torch.tensor([[1.0, 0, 0, 0]] * 7))
    plan, rows = SamplerConfig(steps=6, order="left_to_right", beams=4, lengths=6), list(range(7))
    plain = write_captions(model, looked, rows, plan, 0, alignment=LikesFast())
    chosen = write_captions(model, looked, rows, replace(plan, clip=100.0), 0, alignment=LikesFast(), chunk=2)
    assert plain.texts == write_captions(model, looked, rows, plan, 0).texts
    fast = [sum(text.split().count("fast") for text in found.texts) for found in (plain, chosen)]
    assert fast[1] > fast[0] + 3
    averse = write_captions(model, looked, rows, replace(plan, clip=-100.0), 0, alignment=LikesFast())
    assert not any("fast" in text for text in averse.texts)


def test_candidates_are_picked_within_each_image() -> None:
    x0 = torch.arange(6)[:, None]
    t = Trajectory(x0, x0, x0[:, 0], x0[:, 0], x0.float(), x0.float(), x0[:, 0].float(), None)
    best, score = best_candidates(t, torch.tensor([1.0, 3.0, 2.0, 9.0, 8.0, 7.0]), 3)
    assert best.x0.flatten().tolist() == [1, 3] and score.tolist() == [3.0, 9.0]


def test_worth_is_the_rewards_score_or_cider_d_by_the_training_captions(corpus: Corpus, model: DiffusionCaptionModel) -> None:
    rows, reward = [5, 2, 3], liking(model)
    written = write_captions(model, corpus, rows, SamplerConfig(steps=3, temperature=1.0), 0, reward, group=2)
    assert written.reward is not None
    torch.testing.assert_close(preference(reward)(corpus, rows, written.trajectory), written.reward)

    said = [Example("x", ("a fast dog", "a red dog runs")), Example("image 3", ("a red dog",)), Example("z", ("dog runs",))]
    train = replace(corpus, examples=said, joint=torch.eye(3, 4))
    corpus.joint[[5, 2]] = torch.tensor([[0.0, 0.1, 1.0, 0.0], [1.0, 0.1, 0.0, 0.0]])
    corpus.joint[3] = torch.tensor([0.0, 1.0, 0.2, 0.0])  # most like itself, which does not count
    corpus.examples[2] = Example("image 2", ("A dog runs fast.", "a fast dog"))
    found = agreement(train)(corpus, rows, written.trajectory)

    def cider(references: list[Example]) -> Tensor:
        refs = [[metrics.tokenize(c) for c in example.captions] for example in references for _ in range(2)]
        idf = metrics.rarity([[metrics.tokenize(c) for c in e.captions] for e in said])
        return torch.tensor(metrics.cider_d([text.split() for text in written.texts], refs, idf)).float()

    own = cider([corpus.examples[row] for row in rows])
    torch.testing.assert_close(found, own)
    assert found.max() > 0.5 and len(set(found.tolist())) > 2
    torch.testing.assert_close(
        agreement(train, neighbours=1)(corpus, rows, written.trajectory), 0.25 * own + 0.75 * cider([said[2], said[0], said[2]])
    )
    loss = found - agreement(train, repeated=0.3)(corpus, rows, written.trajectory)
    again = [metrics.repeats(text.split()) for text in written.texts]
    torch.testing.assert_close(loss, 0.3 * torch.tensor(again).float())
    assert 0 < sum(again) < len(again)
