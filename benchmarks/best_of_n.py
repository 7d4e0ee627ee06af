"""Can the reward be trusted under pressure? Of n captions the reward's favourite is taken, n = 1 ... N, and its hidden quality looked at.

No training is needed, so this is the check before RLHF: where gold falls while reward and judge rise, the reward can be gamed.

    python benchmarks/best_of_n.py --models models --output docs/results/best_of_n.json

needs the alignment, base and reward stages of a run on scenes. Expectations over all subsets of size n are exact (order statistics), not
sampled. Axes: I images, N captions of each.
"""

import argparse
import json
from math import comb, log
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.text import words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import (
    build_corpus,
    gold_qualities,
    interval_row,
    write_captions,
)
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.report import STYLE
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import FILES, load_denoiser, load_reward
from hierarchical_diffusion_rlhf_caption_refinement.training.pipeline import JUDGE
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import SamplerConfig

GOLD = ("utility", "accuracy", "fluency", "specificity", "mean_words")


def rank_weights(n: int, total: int) -> np.ndarray:
    """Probability that the caption of each rank, worst first, is the best of n drawn from all `total` without putting back."""
    return np.array([comb(rank, n - 1) / comb(total, n) for rank in range(total)])


def best_of(n: int, chooser: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(I,) expected value, by image, of the caption that `chooser` (I, N) likes best of n; both arrays (I, N)."""
    ordered = np.take_along_axis(value, chooser.argsort(axis=1, kind="stable"), axis=1)
    return ordered @ rank_weights(n, value.shape[1])


def measure(models: Path, images: int, candidates: int, temperature: float) -> dict[str, np.ndarray]:
    """(I, N) reward, judge and hidden qualities of captions that the base model writes of test images."""
    eyes, model = load_denoiser(models / FILES["base"], "base")
    examples = load_examples(eyes.config.data, eyes.config.seed)["test"][:images]
    corpus, words = build_corpus(eyes, examples, Path("cache")), words_and_owners(eyes.tokenizer)
    reward, judge = (load_reward(models / name, words)[1] for name in (FILES["reward"], JUDGE))
    rows, plan = list(range(len(corpus))), SamplerConfig(steps=eyes.config.rlhf.steps, temperature=temperature)
    written = write_captions(model, corpus, rows, plan, eyes.config.seed, reward, group=candidates, chunk=8)
    t, found = written.trajectory, dict[str, np.ndarray]()
    parts = [slice(i * candidates, (i + 8) * candidates) for i in range(0, len(rows), 8)]
    judged = [judge.score(t.x0[p], t.length[p], corpus.image(rows[i : i + 8]), corpus.joint[i : i + 8])
              for p, i in zip(parts, range(0, len(rows), 8), strict=True)]  # fmt: skip
    assert written.reward is not None
    found["reward"], found["judge"] = written.reward.numpy(), torch.cat(judged).numpy()
    gold = gold_qualities(written.texts, [example for example in examples for _ in range(candidates)])
    return {name: value.reshape(-1, candidates) for name, value in (found | {q: gold[q] for q in GOLD}).items()}


def draw(curve: list[dict], path: Path) -> None:
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure((7.6, 3.4))
        left, right = figure.subplots(1, 2)
        left.set(title="What the reward and the judge say", ylabel="standard deviations of the base")
        right.set(title="Gold: hidden utility", ylabel="utility, at most 1")
        n = [row["n"] for row in curve]
        for axes, name in ((left, "reward"), (left, "judge"), (right, "utility"), (right, "accuracy")):
            (line,) = axes.plot(n, [row[name]["value"] for row in curve], "o-", label=name)
            low, high = ([row[name][end] for row in curve] for end in ("low", "high"))
            axes.fill_between(n, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("captions n, of which the reward's favourite is taken")
            axes.legend()
        figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder with the checkpoints (default: models)")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=64, help="captions drawn per image, the largest n (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.5, help="of the draws (default: 0.5, RLHF's own)")
    parser.add_argument("--output", type=Path, required=True, help="JSON; the picture lies beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.models, args.images, args.candidates, args.temperature)
    sizes = [2**k for k in range(args.candidates.bit_length())]
    curve = [
        {"n": n, "kl": log(n) - (n - 1) / n} | {name: interval_row(best_of(n, found["reward"], v)) for name, v in found.items()}
        for n in sizes
    ]
    oracle = [{"n": n, "utility": interval_row(best_of(n, found["utility"], found["utility"]))} for n in sizes]
    facts = {"images": len(found["reward"]), "candidates": args.candidates, "temperature": args.temperature}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts | {"by_reward": curve, "by_gold": oracle}, indent=1) + "\n")
    draw(curve, args.output.with_suffix(".png"))
    for row, best in zip(curve, oracle, strict=True):
        values = "  ".join(f"{name} {row[name]['value']:.3f}" for name in ("reward", "judge", "utility", "accuracy", "fluency"))
        print(f"n {row['n']:3d}  {values}  best possible utility {best['utility']['value']:.3f}")


if __name__ == "__main__":
    main()
