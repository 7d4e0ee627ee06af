"""The autoregressive peer refined by self-critical training: REINFORCE on CIDEr-D with the training captions (Rennie et al. 2017).

The baseline is the mean of the image's captions, which Luo (2020) found better than its greedy caption. Images, captions drawn of each,
learning rate, averaging of the weights and the choice among them on validation photographs are those of `rlhf.sparse=references`, and so is
the reward: similar images' captions count, repetitions cost, and CLIP's score of the caption is mixed in with `shaping.clip_weight`. There
is no KL. Unlike distilling it sees the whole images only, and draws without dropout.

    python benchmarks/self_critical.py --config configs/flickr8k.yaml --config configs/references.yaml --start ar.pt --output out.json \\
        start_from=models/flickr8k rlhf.fit.epoch_size=1500 rlhf.fit.batch_size=16 rlhf.fit.lr=3e-5 rlhf.fit.ema_decay=0.9

needs the alignment stage and the weights that `peers.py --peer autoregressive --save ar.pt` left. Axes: N images, B captions, T words.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from peers import END, Autoregressive, build, judge, plans
from torch import Tensor

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.streams import batch_indices
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import agreement, build_corpus, fit_of
from hierarchical_diffusion_rlhf_caption_refinement.models.alignment import Alignment
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import valid_positions
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import Trajectory
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import earlier, load_eyes, with_config
from hierarchical_diffusion_rlhf_caption_refinement.training.distil import in_spreads
from hierarchical_diffusion_rlhf_caption_refinement.training.engine import lr_at
from hierarchical_diffusion_rlhf_caption_refinement.training.pipeline import REPEATED
from hierarchical_diffusion_rlhf_caption_refinement.training.run import steps_per_epoch
from hierarchical_diffusion_rlhf_caption_refinement.training.state import averaged, make_optimizer, update_average
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, SamplerConfig, load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import seed_of, usable_precision


@torch.no_grad()
def draw(model: Autoregressive, image: Tensor, group: int, temperature: float) -> Tensor:
    """(B, T): `group` captions of each image, with END from the first one on."""
    memory, longest = model.read_image(image), model.max_length - 1
    x0 = torch.full((len(image) * group, longest), END)
    going = torch.ones(len(x0), dtype=torch.bool)
    for t in range(longest):
        logits = model.next_logits(x0[:, :t], memory, t)[:, 0].float() / temperature
        logits[:, END] = -torch.inf if t == 0 else logits[:, END]
        x0[:, t] = torch.where(going, logits.softmax(-1).multinomial(1).squeeze(1), END)
        going = x0[:, t] != END
        if not going.any():
            break
    return x0


def log_likelihood(model: Autoregressive, x0: Tensor, image: Tensor, temperature: float) -> Tensor:
    """(B,) nats of all that was drawn, the end included unless there was no room for it."""
    logits = model.next_logits(x0[:, :-1], model.read_image(image)).float() / temperature
    logits[:, 0, END] = -torch.inf
    logp = logits.log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
    return logp.masked_fill(~valid_positions((x0 != END).sum(1) + 1, x0.shape[1]), 0.0).sum(1)


def advantage(cider: Tensor, clip: Tensor, weight: float, group: int) -> Tensor:
    """Both rewards less the mean of their image's captions, in units of their root mean squares, mixed."""
    return (1 - weight) * in_spreads(cider, group) + weight * in_spreads(clip, group)


def refine(model: Autoregressive, corpora: dict[str, Corpus], config: Config, alignment: Alignment) -> list[dict]:
    """Leaves the averaged weights with the best validation CIDEr-D in the model; a row per epoch."""
    settings, fit, train = config.rlhf, config.rlhf.fit, corpora["train"]
    sparse, optimizer = agreement(train, settings.neighbours, REPEATED), make_optimizer(model, fit)
    ema, best = ({k: v.clone() for k, v in model.state_dict().items()} for _ in range(2))
    each, precision = steps_per_epoch(fit, len(train)), usable_precision(config.mixed_precision, torch.device("cpu"))
    curve = [{"step": 0} | judge(model, corpora["val"], SamplerConfig(), alignment)]
    for step in range(fit.epochs * each):
        torch.manual_seed(seed_of(config.seed, "self-critical", step))
        rows = batch_indices(len(train), fit.batch_size, step, config.seed, "rlhf")
        image, cosine = train.image(rows), fit_of(alignment, train.tokenizer, train.joint[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            x0 = draw(model, image, settings.group, settings.temperature)
            logp = log_likelihood(model, x0, image, settings.temperature)
        length, blank = (x0 != END).sum(1), torch.zeros(x0.shape)
        reward = sparse(train, rows, Trajectory(x0, x0, length, length, blank, blank, blank[:, 0], None))  # read: words and lengths
        worth = advantage(reward, cosine(x0, length), config.shaping.clip_weight, settings.group)
        loss = -(worth * logp).mean() / x0.shape[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), fit.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, fit.epochs * each, fit)
        optimizer.step()
        optimizer.zero_grad()
        update_average(ema, model, step + 1, fit.ema_decay)
        if (step + 1) % each == 0:
            with averaged(model, ema):
                curve.append({"step": step + 1, "reward": float(reward.mean())} | judge(model, corpora["val"], SamplerConfig(), alignment))
            print(json.dumps(curve[-1]), flush=True)
            if curve[-1]["cider_d"] == max(row["cider_d"] for row in curve):
                best = {k: v.clone() for k, v in ema.items()}
    model.load_state_dict(best)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", required=True)
    parser.add_argument("--start", type=Path, required=True, help="the weights to refine")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    torch.set_num_threads(config.threads or 1)
    eyes = with_config(load_eyes(earlier(config, "alignment")), config)
    corpora = {split: build_corpus(eyes, rows, Path("cache")) for split, rows in load_examples(config.data, config.seed).items()}
    model = build("autoregressive", eyes).eval()
    assert isinstance(model, Autoregressive)
    model.load_state_dict(torch.load(args.start, weights_only=True))

    def test() -> dict[str, dict[str, float]]:
        decodings = {name: plan for name, plan in plans("autoregressive", config).items() if name in ("greedy", "25 beams, CLIP")}
        return {name: judge(model, corpora["test"], plan, eyes.alignment) for name, plan in decodings.items()}

    before = test()
    curve = refine(model, corpora, config, eyes.alignment)
    queries = config.rlhf.group * config.rlhf.fit.batch_size * curve[-1]["step"]
    found = {"queries": queries, "curve": curve, "test": {"base": before, "refined": test()}}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    for name, row in found["test"]["refined"].items():
        print(name, json.dumps(row))


if __name__ == "__main__":
    main()
