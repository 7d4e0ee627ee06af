from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import Comparison
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example
from hierarchical_diffusion_rlhf_caption_refinement.data.text import build_tokenizer
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import FEATURES, RewardModel, davidson_logits
from hierarchical_diffusion_rlhf_caption_refinement.training.comparisons import Pairs, smoothing_from
from hierarchical_diffusion_rlhf_caption_refinement.training.reward import (
    Examined,
    Side,
    calibrate,
    decided_accuracy,
    examine,
    fit_ensemble,
    fit_linear,
    head_of,
    mean_margin,
    member_weights,
    pair_nll,
    score_head,
    standard_error,
    targets,
    train_reward,
)
from hierarchical_diffusion_rlhf_caption_refinement.training.reward_report import (
    accuracy_row,
    by_gap,
    calibration,
    feature_baseline,
    learning_curve,
)
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.training.state import make_optimizer
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import FitConfig, RewardConfig

F = len(FEATURES)


def examined(label: Tensor, features: Tensor, others: Tensor | None = None, per_image: int = 2) -> Examined:
    """Pairs whose sides differ by `features`."""
    n = len(label)
    corpus = Corpus([], np.zeros((0, 1, 1), np.float16), torch.zeros(0, 1), build_tokenizer(["a"], 1), 2)
    ids = torch.full((n, 2), 2), torch.full((n,), 2)
    pairs = Pairs(
        corpus,
        [Comparison(str(i), "", "a", "a", "a") for i in range(n)],
        [i // per_image for i in range(n)],
        ids,
        ids,
        label,
        torch.ones(n, 4, dtype=torch.bool),
    )
    base = torch.zeros_like(features) if others is None else others
    a, b = (Side(f, torch.zeros(n, 2, 32), torch.ones(n, 2, dtype=torch.bool)) for f in (base + features, base))
    return Examined(pairs, a, b, torch.zeros(n, 4, 32))


def synthetic(world: Any, n: int, scale: float = 1.0, seed: int = 0) -> tuple[Examined, Tensor]:
    """Raters who like two of the features, with ties; and their weights."""
    g = torch.Generator().manual_seed(seed)
    beta = torch.zeros(F)
    beta[2], beta[7] = 1.5, -1.0
    features = torch.randn(n, F, generator=g)
    margin = scale * features @ beta
    label = torch.multinomial(davidson_logits(margin, torch.tensor(-0.5)).softmax(-1), 1, generator=g).squeeze(1)
    return examined(label, features, torch.randn(n, F, generator=g)), beta


def test_the_linear_head_recovers_known_weights() -> None:
    g = torch.Generator().manual_seed(0)
    x, beta, tie = torch.randn(400, 5, generator=g), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]), torch.tensor(-0.7)
    target = davidson_logits(x @ beta, tie).softmax(-1)
    found, found_tie = fit_linear(x, target, torch.ones(400), 0.0)
    torch.testing.assert_close(found, beta, atol=1e-3, rtol=0)
    torch.testing.assert_close(found_tie, tie, atol=1e-3, rtol=0)
    ridged, _ = fit_linear(x, target, torch.ones(400), 0.1)
    assert ridged.norm() < found.norm()
    junk = torch.cat([x, torch.randn(50, 5, generator=g)]), torch.cat([target, targets(torch.zeros(50, dtype=torch.long), 0.0)])
    weighted, _ = fit_linear(*junk, torch.cat([torch.ones(400), torch.zeros(50)]), 0.0)
    torch.testing.assert_close(weighted, beta, atol=1e-3, rtol=0)
    nothing, _ = fit_linear(x, target, torch.zeros(400), 0.1)
    assert nothing.abs().max() < 1e-4


def test_smoothing_explains_the_agreement() -> None:
    for flips in (0.0, 0.1, 0.25, 0.5):
        assert smoothing_from((1 - flips) ** 2 + flips**2) == pytest.approx(flips)
    assert smoothing_from(float("nan")) == 0 and smoothing_from(0.4) == 0.5
    smooth = targets(torch.tensor([0, 1, 2]), 0.2)
    torch.testing.assert_close(smooth, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]))


def test_pairs_of_an_image_are_resampled_together() -> None:
    rows = [0, 3, 0, 5, 3, 0]
    weights = member_weights(rows, 200, seed=0)
    assert (
        torch.equal(weights[:, 0], weights[:, 2])
        and torch.equal(weights[:, 0], weights[:, 5])
        and torch.equal(weights[:, 1], weights[:, 4])
    )
    assert (weights[:, 0] != weights[:, 1]).any() and weights.mean().item() == pytest.approx(1, abs=0.15)
    assert torch.equal(weights, member_weights(rows, 200, seed=0)) and not torch.equal(weights, member_weights(rows, 200, seed=1))


def two_sources(few: int, many: int) -> Examined:
    """Raters of one source like a feature, and many more of the other do not."""
    features = torch.zeros(few + many, F)
    features[:, 2] = torch.randn(few + many, generator=torch.Generator().manual_seed(0))
    few_like, many_dislike = (features[:few, 2] < 0).long(), (features[few:, 2] > 0).long()
    data = examined(torch.cat([few_like, many_dislike]), features)
    sources = ["few"] * few + ["many"] * many
    comparisons = [replace(c, provenance_a={"source": s}) for c, s in zip(data.pairs.comparisons, sources, strict=True)]
    return replace(data, pairs=replace(data.pairs, comparisons=comparisons))


def test_sources_count_as_evenly_as_told(world: Any) -> None:
    data = two_sources(20, 320)
    shares = {even: data.pairs.weights(even).split([20, 320]) for even in (0.0, 0.5, 1.0)}
    assert (data.pairs.weights(0.0) == 1).all()
    assert [float(many.sum() / few.sum()) for few, many in shares.values()] == pytest.approx([16, 4, 1])
    assert (examined(torch.zeros(7, dtype=torch.long), torch.zeros(7, F)).pairs.weights(1.0) == 1).all()  # nobody to share with
    liked = []
    for even in shares:
        reward = world.reward()
        fit_ensemble(reward, data, RewardConfig(even_sources=even), 0.0, 0)
        liked.append(float(reward.linear[:, 2, 0].sum()))
    assert liked[0] < liked[1] < 0 and liked[1] < liked[2]


def test_pairs_of_an_image_are_one_piece_of_evidence() -> None:
    gain = torch.randn(200, generator=torch.Generator().manual_seed(0))
    alone = standard_error(gain, list(range(200)))
    assert alone == pytest.approx(float(gain.std(correction=0)) / 200**0.5, rel=1e-4)
    assert standard_error(gain.repeat(2), [*range(200), *range(200)]) == pytest.approx(alone, rel=1e-4)  # the same again: no surer


def test_accuracy_and_loss_by_hand() -> None:
    margin, label = torch.tensor([2.0, -1.0, 3.0, -0.5]), torch.tensor([0, 0, 2, 1])
    assert decided_accuracy(margin, label).tolist() == [1, 0, 1]
    assert decided_accuracy(torch.zeros(3), torch.tensor([0, 1, 2])).tolist() == [0.5, 0.5]  # wherever the preferred one stands
    tie = torch.tensor(0.3)
    expected = [-davidson_logits(m, tie).log_softmax(-1)[y] for m, y in zip(margin, label, strict=True)]
    torch.testing.assert_close(pair_nll(margin, label, tie), torch.stack(expected))


def test_the_first_comparisons_are_people_s_and_made_ones_come_with_them_as_a_share(world: Any) -> None:
    data, _ = synthetic(world, 20)
    data = replace(data, pairs=replace(data.pairs, made=4))
    ids = {name: [int(c.id) for c in head_of(data, *given).pairs.comparisons] for name, given in
           {"all": (99, 1.0), "eight": (8, 0.25), "people": (99,), "none": (3, 0.1)}.items()}  # fmt: skip
    assert ids == {"all": list(range(20)), "eight": [*range(8), 16, 17], "people": list(range(16)), "none": [0, 1, 2]}
    some = head_of(data, 8, 0.25)
    assert (some.pairs.asked, some.pairs.made, len(some)) == (8, 2, 10) and torch.equal(some.a.features[8:], data.a.features[16:18])
    assert torch.equal(some.image[8:], data.image[16:18])
    curve = learning_curve(world.reward(), data, data, RewardConfig(curve=(8, 999), members=2), 0.0, 0)
    assert list(curve) == ["8", "16"]


def test_the_ensemble_learns_what_raters_like(world: Any) -> None:
    reward = world.reward()
    data, beta = synthetic(world, 1500)
    fit_ensemble(reward, head_of(data, 1000), RewardConfig(l2=1e-4), 0.0, 0)
    held = examined(data.pairs.label[1000:], (data.a.features - data.b.features)[1000:])
    assert score_head(reward, held)["accuracy"] > 0.75
    unused = (reward.linear[:, :, 0] == 0).sum(1)
    assert (unused > 0).all() and not torch.equal(reward.linear[0] == 0, reward.linear[1] == 0)  # members differ in their features
    assert beta[2] > 0 and reward.linear[:, 2, 0].sum() > 0 > reward.linear[:, 7, 0].sum()


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_calibration_recovers_how_much_too_sure_the_scores_are(world: Any, factor: float) -> None:
    reward, (data, beta) = world.reward(), synthetic(world, 4000)
    reward.linear.zero_()
    reward.linear[:, :, 0] = factor * beta
    calibrate(reward, data)
    assert reward.temperature.item() == pytest.approx(factor, rel=0.12)
    margin = mean_margin(reward, data)
    assert calibration(margin, data.pairs) < 0.05 < calibration(margin * factor, data.pairs) + 0.02
    torch.testing.assert_close(margin, mean_margin(reward, data, chunk=7), atol=1e-5, rtol=1e-5)


def test_baselines_see_their_features_alone(world: Any) -> None:
    data, _ = synthetic(world, 1500)
    train, test = head_of(data, 1000), data
    liked = feature_baseline(train, test, (FEATURES[2], FEATURES[7]), RewardConfig())
    blind = feature_baseline(train, test, ("words", "words squared"), RewardConfig())
    assert liked["value"] > 0.75 and liked["low"] < liked["value"] < liked["high"] and blind["value"] < 0.6
    curve = learning_curve(world.reward(), data, data, RewardConfig(curve=(30, 800, 9000), members=2), 0.0, 0)
    assert list(curve) == ["30", "800", "1500"] and curve["1500"]["value"] > curve["30"]["value"]


def test_accuracy_counts_decided_pairs(world: Any) -> None:
    data, _ = synthetic(world, 300)
    perfect = torch.where(data.pairs.label == 0, 1.0, -1.0)
    assert accuracy_row(perfect, data.pairs)["value"] == 1 and accuracy_row(-perfect, data.pairs)["value"] == 0


def test_evidence_of_pairs_is_that_of_their_captions(world: Any) -> None:
    corpus, reward = world.corpora["val"], world.reward()
    ids = [row[0] for row in corpus.captions]
    x0 = torch.zeros(8, 12, dtype=torch.long)
    for i, row in enumerate(ids):
        x0[i, : len(row)] = torch.tensor(row)
    length = torch.tensor([len(row) for row in ids])
    a, b = (x0, length), (x0.flip(0), length.flip(0))
    pairs = Pairs(corpus, [], list(range(8)), a, b, torch.zeros(8, dtype=torch.long), torch.ones(8, 4, dtype=torch.bool))
    data = examine(reward.evidence, pairs)
    torch.testing.assert_close(examine(reward.evidence, pairs, chunk=3).a.features, data.a.features, atol=1e-4, rtol=1e-4)
    image = corpus.image(range(8))
    margin = reward.members(*a, image, corpus.joint) - reward.members(*b, image, corpus.joint)
    torch.testing.assert_close(mean_margin(reward, data), margin[..., 0].mean(0), atol=1e-4, rtol=1e-4)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(examine(reward.evidence, pairs, g).image, data.image[order])


def reader_data(n: int, seed: int) -> Examined:
    """What raters like here is in the hidden states alone: no feature tells."""
    g = torch.Generator().manual_seed(seed)
    data = examined(torch.randint(2, (n,), generator=g), 0.01 * torch.randn(n, F, generator=g), torch.randn(n, F, generator=g))
    liked, other = torch.randn(32, generator=torch.Generator().manual_seed(9)), torch.randn(n, 2, 32, generator=g)
    sign = torch.where(data.pairs.label == 0, 1.0, -1.0)[:, None, None]
    return replace(data, a=replace(data.a, hidden=other + sign * liked), b=replace(data.b, hidden=other - sign * liked))


def test_the_reader_stays_where_it_predicts_better(world: Any, run_of: Callable[..., Run]) -> None:
    settings = RewardConfig(members=2, fit=FitConfig(epochs=3, batch_size=20, lr=3e-3))
    run = run_of(world.config, reward=settings)
    evidence = world.reward().evidence
    reward, facts = train_reward(run, evidence, reader_data(120, 0), reader_data(60, 1), 0.0)
    assert facts["reader"] and facts["reader_val_loss"] < facts["linear_val_loss"] and len(reward.readers) == 2
    assert score_head(reward, reader_data(60, 2))["accuracy"] > 0.9
    assert not reward.training and not any(p.requires_grad for p in reward.parameters())


def test_the_reader_goes_where_the_linear_head_predicts_better(world: Any, run_of: Callable[..., Run]) -> None:
    settings = RewardConfig(members=2, fit=FitConfig(epochs=1, batch_size=20, lr=3e-3))
    train, held = reader_data(120, 0), reader_data(60, 1)
    misled = replace(held, a=replace(held.a, hidden=held.b.hidden), b=replace(held.b, hidden=held.a.hidden))
    reward, facts = train_reward(run_of(world.config, reward=settings), world.reward().evidence, train, misled, 0.0)
    assert not facts["reader"] and len(reward.readers) == 0 and facts["reader_val_loss"] > facts["linear_val_loss"]
    assert score_head(reward, misled)["loss"] == pytest.approx(facts["linear_val_loss"])
    without = run_of(world.config, reward=replace(settings, reader=False))
    alone, facts = train_reward(without, reward.evidence, train, held, 0.0)
    assert facts["reader"] is False and len(alone.readers) == 0


def test_the_optimiser_sees_the_readers_alone(world: Any) -> None:
    reward = RewardModel(world.reward().evidence, 2, 1, 0.5)
    optimised = {id(p) for group in make_optimizer(reward, FitConfig()).param_groups for p in group["params"]}
    assert optimised == {id(p) for p in reward.readers.parameters()}


def test_accuracy_by_gap_splits_decided_pairs_into_thirds(world: Any) -> None:
    data, _ = synthetic(world, 90)
    rated = [Comparison(str(i), "0", "a", "a", "a", gap=(-1) ** i * i / 90) for i in range(90)]
    corpus = replace(data.pairs.corpus, examples=[Example("0", ("a",))] * 45)
    pairs = replace(data.pairs, corpus=corpus, comparisons=rated, label=torch.zeros(90, dtype=torch.long))
    margin = torch.where(torch.arange(90) < 30, -1.0, 1.0)  # wrong where the gap is small
    assert by_gap(margin, pairs) == {"small": 0.0, "middle": 1.0, "large": 1.0}
