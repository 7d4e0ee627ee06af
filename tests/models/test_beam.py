import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

from hierarchical_diffusion_rlhf_caption_refinement.models.beam import beam_search, consensus, search_or_denoise
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import UNKNOWN, likelihood, noise_for, sample, score
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError, SamplerConfig

Toy = Callable[..., DiffusionCaptionModel]
GREEDY = SamplerConfig(steps=4, order="left_to_right")


def wide(beams: int, lengths: int, **more: float) -> SamplerConfig:
    return SamplerConfig(steps=4, order="left_to_right", beams=beams, lengths=lengths, **more)


def all_captions(longest: int) -> list[list[int]]:
    return [list(words) for n in range(1, longest + 1) for words in product(range(2, 7), repeat=n)]


def per_token(model: DiffusionCaptionModel, captions: list[list[int]], image: torch.Tensor, from_right: bool = False) -> torch.Tensor:
    x0 = torch.tensor([row + [0] * (model.max_length - len(row)) for row in captions])
    return likelihood(model, x0, torch.tensor(list(map(len, captions))), image, from_right, chunk=512)


def test_a_beam_that_holds_everything_finds_the_likeliest_of_all_captions(toy: Toy):
    model, images = toy(max_length=3, seed=3), torch.randn(4, 3, 4)
    found = beam_search(model, images, wide(beams=125, lengths=3))
    every = all_captions(3)
    for image, x0, n in zip(images, found.x0.tolist(), found.length.tolist(), strict=True):
        assert x0[:n] == every[int(per_token(model, every, image[None]).argmax())]


def test_reading_both_ways_finds_the_likeliest_by_the_mean_of_the_readings(toy: Toy):
    model, images = toy(max_length=3, seed=3), 4 * torch.randn(12, 3, 4)
    found, one_way = (beam_search(model, images, wide(beams=125, lengths=3, both_ways=both)) for both in (True, False))
    every = all_captions(3)
    for image, x0, n in zip(images, found.x0.tolist(), found.length.tolist(), strict=True):
        both = per_token(model, every, image[None]) + per_token(model, every, image[None], from_right=True)
        assert x0[:n] == every[int(both.argmax())]
    assert not found.x0.equal(one_way.x0)


def test_consensus_is_the_mean_cosine_of_counts_of_words_in_a_row():
    captions = [[1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [6]]
    x0 = torch.tensor([row + [9] * (5 - len(row)) for row in captions])  # what stands after the end does not count

    def cosine(a: list[int], b: list[int], n: int) -> float:
        one, other = (Counter(tuple(row[i : i + n]) for i in range(len(row) - n + 1)) for row in (a, b))
        norm = math.sqrt(sum(v * v for v in one.values()) * sum(v * v for v in other.values()))
        return sum(v * other[gram] for gram, v in one.items()) / norm if norm else 0.0

    expected = [sum(cosine(a, b, n) for b in captions for n in range(1, 5)) / 16 for a in captions]
    torch.testing.assert_close(consensus(x0, torch.tensor([3, 3, 4, 1]), 4), torch.tensor(expected))


def test_consensus_chooses_what_most_candidates_say(toy: Toy):
    model, images = toy(max_length=4, seed=3), torch.randn(6, 3, 4)
    plan = wide(beams=5, lengths=3)
    found, alone = (beam_search(model, images, replace(plan, consensus=weight)) for weight in (1e4, 0.0))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(x0: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        seen.append((x0, length))
        return torch.zeros(len(x0))

    beam_search(model, images, replace(plan, clip=1.0), fit=keep)
    for i, (x0, length) in enumerate(zip(seen[0][0].chunk(6), seen[0][1].chunk(6), strict=True)):
        best = int(consensus(x0, length, 15).argmax())
        assert found.x0[i].equal(x0[best]) and found.length[i] == length[best]
    assert not found.x0.equal(alone.x0)


def test_one_beam_is_greedy_decoding_of_the_likeliest_length(toy: Toy):
    model, images = toy(seed=5), torch.randn(6, 3, 4)
    likeliest = 1 + model.read_image(images).length_logits.argmax(1)
    known = torch.where(torch.arange(5) < likeliest[:, None], UNKNOWN, 10_000)
    greedy = sample(model, images, GREEDY, noise_for(range(6), 1, 4, 5, 0), known)
    # the sampler's own steps are fewer than words; one word per step is what a beam does
    one_by_one = sample(model, images, SamplerConfig(steps=5, order="left_to_right"), noise_for(range(6), 1, 5, 5, 0), known)
    found = beam_search(model, images, SamplerConfig(steps=5, order="left_to_right", beams=1, lengths=1))
    assert found.length.equal(likeliest) and greedy.length.equal(likeliest)
    assert found.x0.equal(one_by_one.x0)
    torch.testing.assert_close(found.logp, one_by_one.logp)
    torch.testing.assert_close(found.confidence, one_by_one.confidence)


def test_more_beams_and_lengths_never_find_a_less_likely_caption_than_the_whole_search_allows(toy: Toy):
    model, images = toy(max_length=4, seed=7), torch.randn(8, 3, 4)
    whole = beam_search(model, images, wide(beams=625, lengths=4))
    narrow = beam_search(model, images, wide(beams=2, lengths=2))

    def worth(t):
        return (t.logp.sum(1) + t.length_logp) / (t.length + 1)

    assert (worth(narrow) <= worth(whole) + 1e-5).all()


def test_its_probabilities_are_those_of_the_scorer_and_padding_has_none(toy: Toy):
    model, images = toy(seed=9), torch.randn(5, 3, 4)
    found = beam_search(model, images, wide(3, 3))
    again = score(model, found.x0, found.step, found.length, images)
    torch.testing.assert_close(found.logp, again.logp)
    padding = torch.arange(5) >= found.length[:, None]
    assert (found.logp[padding] == 0).all() and (found.confidence[padding] == 0).all() and (found.x0[padding] == 0).all()


def test_a_caption_does_not_depend_on_its_batch_and_keeps_to_bounds_and_bans(toy: Toy):
    model, images = toy(seed=11), torch.randn(5, 3, 4)
    plan = wide(3, 5, min_words=2, max_words=3)
    banned = torch.zeros(7, dtype=torch.bool).index_fill(0, torch.tensor([4]), True)
    found = beam_search(model, images, plan, banned)
    assert set(found.length.tolist()) <= {2, 3} and not (found.x0 == 4).any()
    for i in range(5):
        assert beam_search(model, images[i : i + 1], plan, banned).x0.equal(found.x0[i : i + 1])


def test_bounds_make_no_caption_likelier(toy: Toy):
    """Both readings are of the model's own lengths, so that the left one does not favour the short (its sum is divided by the length)."""
    for seed in range(12, 20):
        model, image = toy(seed=seed), torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))
        short = all_captions(2)
        worth = (per_token(model, short, image) + per_token(model, short, image, from_right=True)) / 2
        found = beam_search(model, image, wide(25, 5, both_ways=True, max_words=2))
        assert found.x0[0, : found.length[0]].tolist() == short[int(worth.argmax())]


def test_impossible_lengths_have_no_vote(toy: Toy):
    for seed in range(20, 40):
        model, images = toy(seed=seed), torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(seed))
        many, two = (beam_search(model, images, wide(3, lengths, min_words=3, max_words=4, consensus=5.0)) for lengths in (5, 2))
        assert many.x0.equal(two.x0)


def test_the_plan_decides_who_decodes_and_given_words_are_kept(toy: Toy):
    model, images = toy(seed=13), torch.randn(2, 3, 4)
    noise = noise_for(range(2), 1, 4, 5, 0)
    *_, drawn = search_or_denoise(model, images, GREEDY, noise)
    assert drawn.x0.equal(sample(model, images, GREEDY, noise).x0)
    (found,) = search_or_denoise(model, images, wide(3, 3), noise)
    assert found.x0.equal(beam_search(model, images, wide(3, 3)).x0)
    known = torch.tensor([[3, UNKNOWN, 5, 10_000, 10_000]] * 2)
    *_, given = search_or_denoise(model, images, wide(3, 3), noise, known)
    assert given.x0[:, [0, 2]].tolist() == [[3, 5]] * 2


@pytest.mark.parametrize("wrong", [{"order": "spread"}, {"temperature": 1.0}, {"guidance": 2.0}, {"remask": 1}, {"threshold": 0.9}])
def test_a_search_that_could_not_be_is_refused(wrong: dict):
    with pytest.raises(ConfigError, match="left_to_right"):
        SamplerConfig(**({"order": "left_to_right", "beams": 2} | wrong))


def test_clip_without_a_search_is_refused_and_plain_plans_have_neither():
    with pytest.raises(ConfigError, match=r"sampler\.clip chooses"):
        SamplerConfig(clip=3.0)
    assert replace(wide(5, 5), clip=3.0, consensus=3.0).plain == wide(1, 1)
