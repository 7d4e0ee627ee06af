"""The summary of a run: the specification's tables from the log, held-out quality of base and refined model, samples for the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.corpus import Corpus
from ..data.scenes import retrieval_ceiling
from ..data.sources import load_examples
from ..data.text import pad, words_and_owners
from ..models.alignment import leave_one_word_out
from ..models.reward import RewardModel
from ..models.saved import FILES, Kind, OtherEyesError, earlier, load_denoiser, reward_beside
from ..models.shaping import HierarchicalRewardShaper, log_odds
from ..utils import checkpoint
from ..utils.config import Config
from ..utils.seeding import usable_device
from . import metrics
from .evaluate import (
    build_corpus,
    clip_scores,
    data_gold,
    gold_qualities,
    interval_row,
    reference_intervals,
    retrieval,
    text_statistics,
    write_captions,
)
from .report import Sample, WordDetail

Row = dict[str, Any]
TABLES: dict[str, dict[str, str]] = {
    "base": {"loss": "train_loss", "val_loss": "val_loss"},
    "reward": {"loss": "train_loss", "accuracy": "train_accuracy", "val_loss": "val_loss", "val_accuracy": "val_accuracy"},
    "rlhf": {"loss": "train_loss", "reward": "train_reward", "val_loss": "val_loss", "val_reward": "val_reward"},
}
"""The specification's columns and where the log has them; the other columns follow under their own names."""


@dataclass(frozen=True)
class Evaluation:
    """One captioner on the test split."""

    captions: list[str]
    corpus: Corpus
    metrics: dict[str, Any]
    gold: dict[str, np.ndarray]
    """Of each caption, by the scenes' truth; {} of photographs."""
    ids: list[list[int]]
    confidence: list[list[float]]
    reward: RewardModel | None
    parameters: int
    """Of the captioner."""


def evaluate_checkpoint(path: Path, kind: Kind, config: Config, cache: Path, strict: bool = True) -> Evaluation:
    """Captions of the test split and what they are worth, by this config's data and sampler.

    Raises CheckpointError; of a reward model of other eyes only where `strict`: amid a run's stages it may be left from the time before.
    """
    eyes, model = load_denoiser(path, kind)
    device = usable_device()
    try:
        beside = reward_beside(path, eyes, words_and_owners(eyes.tokenizer))
    except OtherEyesError:
        if strict:
            raise
        beside = None
    reward = beside and beside[1].to(device)
    eyes, model = eyes.to(device), model.to(device)
    corpus = build_corpus(eyes, load_examples(config.data, config.seed)["test"], cache)
    rows = list(range(len(corpus)))
    plan = config.sampler if reward or strict else replace(config.sampler, candidates=1)  # nothing to choose by yet
    written = write_captions(model, corpus, rows, plan, config.seed, reward, eyes.alignment)
    found: dict[str, Any] = text_statistics(written.texts) | clip_scores(eyes.alignment, written.texts, corpus)
    found["retrieval"] = retrieval(eyes.alignment, corpus)
    if written.reward is not None:
        found["reward"] = interval_row(written.reward.double().numpy())
    gold = gold_qualities(written.texts, corpus.examples)
    intervals = {k: interval_row(v) for k, v in gold.items()} if gold else reference_intervals(written.texts, corpus.examples)
    found["intervals"] = intervals
    found["gold" if gold else "references"] = {name: row["value"] for name, row in intervals.items()}
    t = written.trajectory
    ids, confidence = ([row[:n] for row, n in zip(x.tolist(), t.length.tolist(), strict=True)] for x in (t.x0, t.confidence))
    parameters = sum(p.numel() for p in model.parameters())
    return Evaluation(written.texts, corpus, found, gold, ids, confidence, reward, parameters)


def win_rate(refined: Evaluation, base: Evaluation) -> dict[str, float] | None:
    """How often the refined caption has the higher hidden utility, ties half; None without a hidden truth."""
    if not (refined.gold and base.gold):
        return None
    return asdict(metrics.win_rate(refined.gold["utility"], base.gold["utility"]))


def tables(rows: list[Row]) -> dict[str, list[Row]]:
    """Every epoch's row of every stage, the specification's columns first and under its names."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        names = TABLES.get(row["stage"], {})
        named = {"epoch": row["epoch"], "step": row["step"]} | {new: row[old] for old, new in names.items() if old in row}
        rest = {k: v for k, v in row.items() if k not in names and k not in ("stage", "epoch", "step")}
        found.setdefault(row["stage"], []).append(named | rest)
    return found


def summarise(config: Config, rows: list[Row], facts: dict[str, Any], cache: Path) -> tuple[dict[str, Any], dict[str, Evaluation]]:
    """All that `results/training_summary.json` holds, from the log and from the checkpoints of the stages that are complete."""
    paths: dict[Kind, Path] = {"base": earlier(config, "base"), "rlhf": config.models / FILES["rlhf"]}
    begun = "alignment" in facts["seconds"] or (config.models / "last_base.pt").exists()  # else the base model was copied from another run
    done = facts["seconds"].keys() | (set() if begun and not config.start_from else {"base"})
    found: dict[str, Evaluation] = {
        k: evaluate_checkpoint(path, k, config, cache, strict=False) for k, path in paths.items() if k in done and path.exists()
    }
    summary: dict[str, Any] = {"run": config.run} | facts | {"stages": tables(rows)}
    summary["evaluation"] = {kind: e.metrics for kind, e in found.items()}
    summary["parameters"] = {kind: e.parameters for kind, e in found.items()}
    if found and (first := next(iter(found.values()))).gold:
        summary["gold"] = {"data": data_gold(first.corpus.examples)} | {kind: e.metrics["gold"] for kind, e in found.items()}
        texts = [example.captions[0] for example in first.corpus.examples]
        summary["alignment"] = best_alignment(config) | {
            "ceiling_r1": retrieval_ceiling([e.scene for e in first.corpus.examples if e.scene], texts)
        }
    elif found:
        summary["references"] = {kind: e.metrics["references"] for kind, e in found.items()}
        summary["alignment"] = best_alignment(config)
    if len(found) == 2:
        summary["win_rate"] = win_rate(found["rlhf"], found["base"])
    return summary, found


def best_alignment(config: Config) -> dict[str, float]:
    """Held-out retrieval of the alignment model that the run stands on; a pretrained one was not measured."""
    facts = checkpoint.load(earlier(config, "alignment"), "alignment")["facts"]
    return {k: v for k, v in facts.get("row", {}).items() if k.startswith("val_")}


def samples(config: Config, found: Sequence[Evaluation], count: int = 12) -> list[Sample]:
    """Some test images with their captions by the first captioner and, before, the last, and where the reward of the former comes from."""
    after, before = found[0], found[-1]
    rows = range(min(count, len(after.captions)))
    details = word_details(config, after.reward, after, list(rows)) if after.reward else [[] for _ in rows]

    def quality(e: Evaluation, row: int) -> dict[str, float]:
        return {name: float(values[row]) for name, values in e.gold.items()}

    return [
        Sample(
            image=example.image(), key=example.key, references=example.captions, before=before.captions[row], after=after.captions[row],
            before_quality=quality(before, row), after_quality=quality(after, row), words=details[row],
        )
        for row in rows if (example := after.corpus.examples[row])
    ]  # fmt: skip


def word_details(config: Config, reward: RewardModel, found: Evaluation, rows: list[int]) -> list[list[WordDetail]]:
    """Per word: confidence (of its least certain token), alpha, the CLIP credit of the word, and the preference score of the caption."""
    split, device = words_and_owners(found.corpus.tokenizer), reward.linear.device
    image, joint = found.corpus.image(rows).to(device), found.corpus.joint[rows].to(device)
    said, owners = zip(*(split(found.ids[row]) for row in rows), strict=True)
    whole = [list(range(len(words))) for words in said]
    credit = leave_one_word_out(reward.evidence.alignment, said, whole, joint, max(map(len, said)))
    x0, length = pad([found.ids[row] for row in rows], found.corpus.max_words)
    score = reward.score(x0.to(device), length.to(device), image, joint)
    odds = log_odds(torch.tensor([c for row in found.confidence for c in row]))
    shaper = HierarchicalRewardShaper(config.shaping)
    details = []
    for i, row in enumerate(rows):
        mine = zip(owners[i], found.confidence[row], strict=True)
        least = dict(sorted(mine, key=lambda pair: -pair[1]))  # the last of a word's tokens stays: its least certain
        confidence = torch.tensor([least.get(word, 1.0) for word in whole[i]])
        z = (log_odds(confidence) - odds.mean()) / odds.std().clamp(min=1e-6)
        alpha = shaper.alpha(z[None])[0].tolist()
        parts = zip(said[i], confidence.tolist(), alpha, credit[i].tolist(), strict=False)
        details.append([WordDetail(word=w, confidence=c, alpha=a, dense=d, sparse=float(score[i])) for w, c, a, d in parts])
    return details
