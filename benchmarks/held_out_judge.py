"""Does a judge who had no part in the training prefer the refined captions?

The judge is an alignment model trained on the validation photographs alone, and a linear head on what it sees (and on the words: lengths,
repetitions), fitted to people's ratings of the photographs that the reward model kept for its report. Nothing of it was ever a reward, and
it chose no checkpoint. It looks at the test photographs that it was not fitted to. Its seed is the reward model's: the same judge for every
seed of RLHF.

    python benchmarks/held_out_judge.py --config configs/flickr8k.yaml --output docs/results/flickr8k/judge.json

needs a finished run of that config, and is for data sets with human ratings. `--refined CHECKPOINT`, once or several times, are the models
to be judged, `--against CHECKPOINT` what they are compared with instead of the base model, `--base sampler.steps=16` how that decodes.
Axes: n pairs, F features.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.preferences import Comparison
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.text import words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import (
    build_corpus,
    interval_row,
    reference_intervals,
    retrieval,
    text_statistics,
    write_captions,
)
from hierarchical_diffusion_rlhf_caption_refinement.models.reward import FEATURES, Evidence
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import (
    FILES,
    build_alignment,
    captioner_kind,
    earlier,
    load_denoiser,
    load_eyes,
    settings_from,
)
from hierarchical_diffusion_rlhf_caption_refinement.training.alignment import fit_alignment
from hierarchical_diffusion_rlhf_caption_refinement.training.comparisons import Pairs, rated, to_pairs
from hierarchical_diffusion_rlhf_caption_refinement.training.reward import decided_accuracy, examine, fit_linear, targets
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils import checkpoint
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, SamplerConfig, load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.files import write_json
from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import RunLog

SEEN = (
    "alignment", "mean word credit", "worst word credit",
    "words", "words squared", "content words", "repeated words", "doubled words",
)  # fmt: skip
"""Features that owe nothing to the denoiser, whose likelihoods the reward reads too."""
CACHE, HELD_OUT = Path("cache"), 200
"""Feature cache; validation photographs that choose the judge's best epoch."""


def other_eyes(config: Config, examples: list, seed: int) -> tuple:
    """The run's eyes, and the same with an alignment model of the judge's own."""
    eyes = load_eyes(earlier(config, "alignment"))
    own = replace(config, run=f"{config.run}_held_out_judge", start_from="", seed=seed)
    run = Run(own, Accelerator(cpu=True), RunLog(own.results), False, CACHE)
    run.config.models.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed + 1)
    other = replace(eyes, config=config, alignment=build_alignment(config, eyes.tokenizer, eyes.vision.width))
    path = run.config.models / FILES["alignment"]
    fit_alignment(run, other, other.alignment, {"train": examples[HELD_OUT:], "val": examples[:HELD_OUT]}, path)
    return eyes, load_eyes(path)


def split_seed(config: Config) -> int:
    """The seed by which the reward model's photographs were split: RLHF may have another one, which would split them anew."""
    path = earlier(config, "reward")
    return settings_from(checkpoint.load(path, "reward")["config"], path).seed


def differences(evidence: Evidence, pairs: Pairs) -> Tensor:
    """(n, F): features of a less those of b."""
    seen = examine(evidence, pairs)
    return (seen.a.features - seen.b.features)[:, [FEATURES.index(name) for name in SEEN]]


def fitted(evidence: Evidence, pairs: Pairs, l2: float) -> Tensor:
    """Weights of the features."""
    difference = differences(evidence, pairs)
    std = difference.std(0).clamp(min=1e-6)
    beta, _ = fit_linear(difference / std, targets(pairs.label, 0.0), torch.ones(len(pairs)), l2)
    return beta / std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--refined", action="append", type=Path, metavar="CHECKPOINT", help="to be judged; without it the run's own")
    parser.add_argument("--against", type=Path, metavar="CHECKPOINT", help="what these are compared with; without it the base model")
    parser.add_argument("--base", action="append", default=[], metavar="KEY=VALUE", help="how that decodes, if otherwise")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config([args.config], args.overrides)
    torch.set_num_threads(config.threads or 1)
    examples = load_examples(config.data, config.seed)
    seed = split_seed(config)
    eyes, other = other_eyes(config, examples["val"], seed)
    corpus, judged = (build_corpus(e, examples["test"], CACHE) for e in (eyes, other))
    start = earlier(config, "base")
    base = load_denoiser(start, "base")[1].eval()
    evidence = Evidence(base, other.alignment, words_and_owners(eyes.tokenizer))
    found = rated(replace(config, seed=seed, reward=replace(config.reward, repeats=0.0)), base, judged)  # people's judgements only
    beta = fitted(evidence, found.test, config.reward.l2)
    rows = sorted(set(range(len(judged))) - set(found.test.rows))
    accuracy = decided_accuracy(differences(evidence, found.val) @ beta, found.val.label)
    decided = [row for row, label in zip(found.val.rows, found.val.label.tolist(), strict=True) if label < 2]

    def captions(path: Path, plan: SamplerConfig) -> list[str]:
        model = load_denoiser(path, captioner_kind(path))[1].eval()
        return write_captions(model, corpus, range(len(corpus)), plan, config.seed).texts

    def told(texts: list[str]) -> dict[str, Any]:
        return {"references": reference_intervals(texts, examples["test"])} | text_statistics(texts)

    against = args.against or start
    theirs = captions(against, load_config([args.config], [*args.overrides, *args.base]).sampler)
    row: dict[str, Any] = {
        "judge": {
            **retrieval(other.alignment, judged),
            "comparisons": len(found.test),
            "accuracy": interval_row(accuracy.numpy(), decided),
            "weights": dict(zip(SEEN, beta.tolist(), strict=True)),
        },
        "photographs": len(rows),
        "against": {"model": str(against)} | told(theirs),
        "refined": {},
    }
    for path in args.refined or [config.models / FILES["rlhf"]]:
        ours = captions(path, config.sampler)
        margin = differences(evidence, captions_as_pairs(judged, rows, ours, theirs)) @ beta
        row["refined"][str(path)] = {"win_rate": interval_row((margin.sign() / 2 + 0.5).double().numpy())} | told(ours)
        share = row["refined"][str(path)]["win_rate"]["value"]
        print(f"the judge prefers {path} to {against} on {share:.1%} of {len(rows)} photographs, ties half")
    write_json(args.output, row)
    print(f"numbers  {args.output}")


def captions_as_pairs(corpus: Corpus, rows: list[int], ours: list[str], theirs: list[str]) -> Pairs:
    """The judged caption as a, the other one as b."""
    return to_pairs([Comparison(str(r), corpus.examples[r].key, ours[r], theirs[r], "a") for r in rows], corpus)


if __name__ == "__main__":
    main()
