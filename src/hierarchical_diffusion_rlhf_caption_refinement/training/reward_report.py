"""What the reward model is worth, next to what it must not be: better than raters, as good without the image, sure of itself.

Axes: n pairs, F features.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..data.scenes import check
from ..evaluation import metrics
from ..evaluation.evaluate import interval_row
from ..models.reward import BLIND, FEATURES, RewardModel
from ..utils.config import RewardConfig
from ..utils.seeding import generator
from .comparisons import Judgements, Pairs, smoothing_from
from .reward import Examined, decided_accuracy, examine, fit_ensemble, fit_linear, head_of, mean_margin, targets


def accuracy_row(margin: Float[Tensor, " n"], pairs: Pairs) -> dict[str, float]:
    """Accuracy on decided pairs, with an interval clustered by image."""
    groups = [row for row, label in zip(pairs.rows, pairs.label.tolist(), strict=True) if label < 2]
    return interval_row(decided_accuracy(margin, pairs.label).numpy(), groups)


def by_gap(margin: Float[Tensor, " n"], pairs: Pairs) -> dict[str, float]:
    """Accuracy on decided pairs by how far apart the captions are: hidden utility for scenes, mean rating else; thirds of the pairs."""
    gaps = [_gap(pairs, i) for i in range(len(pairs))]
    sided = (pairs.label < 2).numpy()
    right, gap = decided_accuracy(margin, pairs.label).numpy(), np.array(gaps)[sided]
    low, high = np.quantile(gap, [1 / 3, 2 / 3]) if len(gap) else (0.0, 0.0)
    parts = {"small": gap <= low, "middle": (gap > low) & (gap <= high), "large": gap > high}
    return {name: float(right[part].mean()) for name, part in parts.items() if part.any()}


def by_source(margin: Float[Tensor, " n"], pairs: Pairs) -> dict[str, dict[str, float]]:
    """Accuracy of each source of ratings; of one with machine captions, where a pair often only tests human or machine, of these alone."""
    sources = [str(c.provenance_a.get("source", "")) for c in pairs.comparisons]
    machine = [all(str(p.get("origin", "")).startswith("machine") for p in (c.provenance_a, c.provenance_b)) for c in pairs.comparisons]
    groups = {name: [i for i, s in enumerate(sources) if s == name] for name in dict.fromkeys(sources) if name}
    groups |= {f"{name}, machine only": [i for i in rows if machine[i]] for name, rows in groups.items() if any(machine[i] for i in rows)}
    return {name: accuracy_row(margin[rows], pairs.some(rows)) for name, rows in groups.items()}


def _gap(pairs: Pairs, i: int) -> float:
    comparison, example = pairs.comparisons[i], pairs.corpus.examples[pairs.rows[i]]
    if example.scene is None:
        return abs(float(comparison.gap or 0.0))
    return abs(check(comparison.a, example.scene).utility - check(comparison.b, example.scene).utility)


def feature_baseline(train: Examined, test: Examined, names: tuple[str, ...], config: RewardConfig) -> dict[str, float]:
    """A linear head that sees only some of the features."""
    index = [FEATURES.index(name) for name in names]
    std = torch.cat([train.a.features, train.b.features])[:, index].std(0).clamp(min=1e-6)
    difference = (train.a.features - train.b.features)[:, index] / std
    beta, _ = fit_linear(difference, targets(train.pairs.label, 0.0), train.pairs.weights(config.even_sources), config.l2)
    return accuracy_row((test.a.features - test.b.features)[:, index] / std @ beta, test.pairs)


def learning_curve(
    reward: RewardModel, train: Examined, test: Examined, config: RewardConfig, smoothing: float, seed: int
) -> dict[str, Any]:
    """Accuracy of the linear ensemble from the first n comparisons."""
    rows: dict[str, Any] = {}
    for count in sorted({min(n, train.pairs.asked) for n in config.curve}):
        head = RewardModel(reward.evidence, config.members, 0, config.pessimism)
        head.to(reward.linear.device)
        fit_ensemble(head, head_of(train, count, config.repeats), config, smoothing, seed)
        rows[str(count)] = accuracy_row(mean_margin(head, test), test.pairs)
    return rows


def calibration(margin: Float[Tensor, " n"], pairs: Pairs) -> float:
    """Expected calibration error of the probability that a is preferred, on decided pairs."""
    sided = pairs.label < 2
    return metrics.expected_calibration_error(torch.sigmoid(margin[sided]).double().numpy(), (pairs.label[sided] == 0).double().numpy())


def reward_report(reward: RewardModel, found: Judgements, train: Examined, used: int, config: RewardConfig, seed: int) -> dict[str, Any]:
    """Every figure of the design's section on human preferences, on images the model never saw; it and its baselines learned from the
    first `used` of `train`.

    `share_of_ceiling` compares with a second rater, who errs as often as the first; one who never errs agrees with a rater more often than
    that, and only what is above even him (`above_ceiling`) smells of a leak.
    """
    test = examine(reward.evidence, found.test)
    margin = mean_margin(reward, test)
    shuffled = mean_margin(reward, examine(reward.evidence, found.test, generator(seed, "shuffled images")))
    accuracy = accuracy_row(margin, found.test)
    ceiling, same = found.rater_agreement, head_of(train, used, config.repeats)
    report: dict[str, Any] = {
        "comparisons": {"train": used, "val": found.val.asked, "test": len(found.test)},
        "accuracy": accuracy,
        "rater_agreement": ceiling,
        "share_of_ceiling": accuracy["value"] / ceiling if ceiling > 0 else None,
        "above_ceiling": bool(accuracy["low"] > 1 - smoothing_from(ceiling)),
        "length_only": feature_baseline(same, test, ("words", "words squared"), config),
        "text_only": feature_baseline(same, test, BLIND, config),
        "alignment_only": feature_baseline(same, test, ("alignment",), config),
        "image_shuffled": accuracy_row(shuffled, found.test),
        "by_source": by_source(margin, found.test),
        "by_gap": by_gap(margin, found.test),
        "calibration_error": calibration(margin, found.test),
        "temperature": float(reward.temperature),
        "weights": dict(zip(FEATURES, reward.linear[..., 0].mean(0).tolist(), strict=True)),
    }
    if found.repeats is not None and len(found.repeats):
        report["repetition"] = accuracy_row(mean_margin(reward, examine(reward.evidence, found.repeats)), found.repeats)
    report["curve"] = learning_curve(reward, train, test, config, found.smoothing, seed)
    if found.facts is not None and len(found.facts):
        seen = mean_margin(reward, examine(reward.evidence, found.facts))
        unseen = mean_margin(reward, examine(reward.evidence, found.facts, generator(seed, "shuffled facts")))
        report["facts"] = {"accuracy": accuracy_row(seen, found.facts), "image_shuffled": accuracy_row(unseen, found.facts)}
    return report
