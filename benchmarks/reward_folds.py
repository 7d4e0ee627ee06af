"""What the reward model is worth on every rated photograph: five linear heads, each asked about the fifth of them that it has not seen.

The report of the reward stage holds a fifth back, and of captions that two machines wrote of a photograph there are so few ratings in it
that a seed moves their share by a tenth. Here every pair counts once. Which of the photographs are together goes by their names alone.

    python benchmarks/reward_folds.py --config configs/flickr8k.yaml --output folds.json --even 0 --even 0.5 --even 1

needs the base stage of that config, and is for data sets with human ratings; `--even` are values of `reward.even_sources` to compare. Axes:
n pairs.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.text import words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import build_corpus
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import Evidence, RewardModel
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import earlier, load_denoiser, load_eyes
from hierarchical_diffusion_rlhf_caption_refinement.training.comparisons import rated, to_pairs
from hierarchical_diffusion_rlhf_caption_refinement.training.reward import Examined, examine, fit_ensemble, mean_margin
from hierarchical_diffusion_rlhf_caption_refinement.training.reward_report import by_source
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import RewardConfig, load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.files import write_json
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import seed_of

FOLDS, CACHE = 5, Path("cache")


def held_out_margins(evidence: Evidence, data: Examined, config: RewardConfig, smoothing: float) -> Tensor:
    """(n,): of each pair by the head that has seen no pair of its photograph."""
    fold = torch.tensor([seed_of(0, "fold", c.image) % FOLDS for c in data.pairs.comparisons])
    margin = torch.zeros(len(data))
    for held in range(FOLDS):
        head = RewardModel(evidence, config.members, 0, config.pessimism)
        fit_ensemble(head, data.some((fold != held).nonzero().flatten().tolist()), config, smoothing, held)
        rows = (fold == held).nonzero().flatten().tolist()
        margin[rows] = mean_margin(head, data.some(rows))
    return margin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--even", action="append", type=float, metavar="POWER", help="reward.even_sources; without it the config's")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config([args.config], args.overrides)
    torch.set_num_threads(config.threads or 1)
    eyes = load_eyes(earlier(config, "alignment"))
    base = load_denoiser(earlier(config, "base"), "base")[1].eval()
    corpus = build_corpus(eyes, load_examples(config.data, config.seed)["test"], CACHE)
    evidence = Evidence(base, eyes.alignment, words_and_owners(eyes.tokenizer))
    found = rated(config, base, corpus)
    parts = (found.train, found.val, found.test)
    data = examine(evidence, to_pairs([c for part in parts for c in part.comparisons], corpus))
    rows = {}
    for even in args.even or [config.reward.even_sources]:
        margin = held_out_margins(evidence, data, replace(config.reward, even_sources=even), found.smoothing)
        rows[str(even)] = by_source(margin, data.pairs)
        told = (f"{name} {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})" for name, row in rows[str(even)].items())
        print(f"reward.even_sources={even}: {', '.join(told)}")
    write_json(args.output, {"pairs": len(data), "photographs": len(set(data.pairs.rows)), "accuracy by reward.even_sources": rows})
    print(f"numbers  {args.output}")


if __name__ == "__main__":
    main()
