"""Which way of giving credit points where captions get better? The policy gradients of several, beside that of the hidden quality.

All see the same rollouts. Of each the cosine with the true gradient is estimated: of its mean over infinitely many updates (what its
bias costs) and of one update and of ten (what its noise costs, too). The choice of the length is left out. No training
is needed.

    python benchmarks/credit.py --models models --output credit_base.json
    python benchmarks/credit.py --models models --policy models/best_rlhf_model.pt --output credit_refined.json

needs the alignment, base and reward stages of a run on scenes.
Axes: B captions, T caption length, K kinds of credit, N blocks, D parameters.
"""

import argparse
import copy
import math
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.text import decode_rows, words_and_owners
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import build_corpus, gold_qualities, preference
from hierarchical_diffusion_rlhf_caption_refinement.models.alignment import text_scores
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import revealed
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import score
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import FILES, load_denoiser, load_reward
from hierarchical_diffusion_rlhf_caption_refinement.models.shaping import centre, centred_dense
from hierarchical_diffusion_rlhf_caption_refinement.training.rlhf import Trainer, dense_reward
from hierarchical_diffusion_rlhf_caption_refinement.training.run import Run
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ShapingConfig
from hierarchical_diffusion_rlhf_caption_refinement.utils.files import write_json
from hierarchical_diffusion_rlhf_caption_refinement.utils.runlog import RunLog

BLOCK = 10
"""Rollouts whose mean gradient is kept."""
MIXED = (0.2, 0.3, 0.5, 0.7)
"""Shares of dense credit in the mixtures with the sparse reward."""


def trainer_of(models: Path, policy: Path | None, cache: Path) -> Trainer:
    """Everything that a rollout needs, as the models were made."""
    eyes, base = load_denoiser(models / FILES["base"], "base")
    drawn = load_denoiser(policy, "rlhf")[1] if policy else copy.deepcopy(base)
    words = words_and_owners(eyes.tokenizer)
    _, reward = load_reward(models / FILES["reward"], words)
    config = replace(eyes.config, run="credit", shaping=ShapingConfig(dense="step_potential"))
    corpus = build_corpus(eyes, load_examples(config.data, config.seed)["train"], cache)
    run = Run(config, Accelerator(cpu=True), RunLog(config.results), False, cache)
    return Trainer(run, drawn.requires_grad_(True), base, preference(reward), eyes.alignment, words, corpus, {})


def advantages(trainer: Trainer, index: int) -> tuple[dict[str, Float[Tensor, "B T"]], Float[Tensor, "B T"]]:
    """What each kind of credit says of the tokens of one rollout, and the tokens' log-probabilities, with gradient."""
    config, group = trainer.config, trainer.config.rlhf.group
    rows, _ = trainer.rows(index)
    t, image, joint = trainer.sample(trainer.policy, rows, trainer.corpus, ("credit", index), drafts=True)
    logp = score(trainer.policy, t.x0, t.step, t.length, image, config.rlhf.temperature).logp
    written, each = revealed(t.step), joint.repeat_interleave(group, 0)
    texts = decode_rows(trainer.corpus.tokenizer, t.x0, t.length)
    truth = gold_qualities(texts, [trainer.corpus.examples[row] for row in rows for _ in range(group)])["utility"]
    whole = {
        "gold": torch.tensor(truth, dtype=torch.float32),
        "sparse": trainer.reward(trainer.corpus, rows, t),
        "caption": text_scores(trainer.alignment, texts, each),
    }
    found = {name: centre(value, group)[:, None] * written for name, value in whole.items()}
    for dense, credit in (("leave_one_word_out", "local"), ("step_potential", "local"), ("step_potential", "to_go")):
        shaping = replace(config.shaping, dense=dense, credit=credit)
        given = dense_reward(trainer.alignment, trainer.words, t, each, shaping, config.rlhf.steps)
        found[f"{dense} {credit}"] = centred_dense(given, t.step, group, credit) * written
    return {name: a / a[written].square().mean().sqrt().clamp(min=1e-8) for name, a in found.items()}, logp


def gradients(trainer: Trainer, index: int) -> tuple[list[str], Float[Tensor, "K D"]]:
    """Policy gradients of one rollout, one of each kind of credit."""
    found, logp = advantages(trainer, index)
    weights = list(trainer.policy.parameters())
    rows = []
    for advantage in found.values():
        parts = torch.autograd.grad(logp, weights, advantage / logp.numel(), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return list(found), torch.stack(rows)


def unbiased(a: Float[Tensor, "N D"], b: Float[Tensor, "N D"]) -> float:
    """Inner product of two means, from products of different blocks alone: noise that blocks share does not count."""
    return float((a.sum(0) @ b.sum(0) - (a * b).sum()) / (len(a) * (len(a) - 1)))


def cosines(blocks: Float[Tensor, "N D"], gold: Float[Tensor, "N D"], single: float) -> dict[str, float]:
    """With the true gradient; `single` is the mean square length of one rollout's gradient. NaN where noise hides a length."""
    inner, true, several = unbiased(blocks, gold), unbiased(gold, gold), float(blocks.square().sum(1).mean())
    lengths = {"of the mean": unbiased(blocks, blocks), "of one update": single, f"of {BLOCK} updates": several}
    return {name: round(inner / (true * square) ** 0.5, 3) if min(true, square) > 0 else math.nan for name, square in lengths.items()}


def compare(trainer: Trainer, rollouts: int) -> dict[str, dict[str, float]]:
    """Cosines of every kind of credit, and of the sparse reward mixed with each dense one."""
    names, blocks, gram = [], [], torch.zeros(())
    for start in range(0, rollouts, BLOCK):
        total = torch.zeros(())
        for index in range(start, start + BLOCK):
            names, rows = gradients(trainer, index)
            total, gram = total + rows / BLOCK, gram + rows @ rows.T / rollouts
        blocks.append(total)
        print(f"{start + BLOCK} of {rollouts} rollouts", flush=True)
    each = torch.stack(blocks, 1)  # (K, N, D)

    def row(weights: dict[str, float]) -> dict[str, float]:
        w = torch.tensor([weights.get(name, 0.0) for name in names])
        return cosines(torch.einsum("k,kbd->bd", w, each), each[names.index("gold")], float(w @ gram @ w))

    found = {name: row({name: 1.0}) for name in names}
    for name in names[2:]:
        found |= {f"sparse and {share:g} of {name}": row({"sparse": 1 - share, name: share}) for share in MIXED}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder with the alignment, base and reward checkpoints")
    parser.add_argument("--policy", type=Path, help="refined model whose rollouts are looked at; default: the base model")
    parser.add_argument("--rollouts", type=int, default=60, help=f"a multiple of {BLOCK}, two of them at least (default: 60)")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where image features are kept (default: cache)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.rollouts < 2 * BLOCK or args.rollouts % BLOCK:
        parser.error(f"--rollouts must be a multiple of {BLOCK}, two of them at least")
    torch.set_num_threads(1)
    found = compare(trainer_of(args.models, args.policy, args.cache), args.rollouts)
    write_json(args.output, {"rollouts": args.rollouts, "cosine with the gradient of gold": found})
    for name, row in found.items():
        print(f"{name:42s}", "  ".join(f"{k} {v:6.3f}" for k, v in row.items()))


if __name__ == "__main__":
    main()
