"""The reveal-ordered denoiser beside two peers of its size, on the same image tokens and captions and for the same time.

`autoregressive` predicts the next word; `bidirectional` is the usual masked diffusion: every revealed word sees every other, and one pass
gives the words that are still masked. All share embeddings, blocks and the reading of the image, and keep their best validation point.

    python benchmarks/peers.py --config configs/flickr8k.yaml --peer reveal --minutes 12 --output reveal.json

needs the alignment stage of that config. Axes: B captions, T caption length, V vocabulary.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import load_examples
from hierarchical_diffusion_rlhf_caption_refinement.data.streams import batch_indices
from hierarchical_diffusion_rlhf_caption_refinement.data.text import decode_rows
from hierarchical_diffusion_rlhf_caption_refinement.evaluation.evaluate import (
    build_corpus,
    fit_of,
    gold_summary,
    reference_scores,
    text_statistics,
    with_looks,
    write_captions,
)
from hierarchical_diffusion_rlhf_caption_refinement.models.alignment import Alignment
from hierarchical_diffusion_rlhf_caption_refinement.models.beam import consensus
from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import DiffusionCaptionModel
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import reveal_counts, valid_positions
from hierarchical_diffusion_rlhf_caption_refinement.models.sampler import select
from hierarchical_diffusion_rlhf_caption_refinement.models.saved import Eyes, earlier, load_eyes, with_config
from hierarchical_diffusion_rlhf_caption_refinement.training.base import (
    LENGTH_GROUPS,
    LENGTH_WEIGHT,
    CaptionBatch,
    caption_batch,
    caption_loss,
)
from hierarchical_diffusion_rlhf_caption_refinement.training.state import averaged, make_optimizer, update_average
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import Config, SamplerConfig, load_config
from hierarchical_diffusion_rlhf_caption_refinement.utils.seeding import generator, seed_of, usable_precision

END = 0
"""The padding's id, which no caption contains, ends the autoregressive model's."""
CHECKS = 6
"""Looks at the validation captions during training."""


class Reveal(DiffusionCaptionModel):
    """The project's own."""

    def loss(self, batch: CaptionBatch) -> Tensor:
        nll, length = caption_loss(self, batch, self.allowed)
        return nll.mean() + LENGTH_WEIGHT * length.mean()

    def captions(self, corpus: Corpus, rows: list[int], plan: SamplerConfig, alignment: Alignment) -> list[str]:
        return write_captions(self, corpus, rows, plan, 0, alignment=alignment).texts


def by_length(batch: CaptionBatch, loss: Callable[[CaptionBatch], Tensor]) -> Tensor:
    """The mean of each caption's loss, computed among captions of about the same length, as the project's model does."""
    order = batch.length.argsort(stable=True)
    return torch.cat([loss(batch.rows(group)) for group in order.chunk(LENGTH_GROUPS)]).mean()


class Bidirectional(DiffusionCaptionModel):
    def states(self, x0: Tensor, masked: Tensor, length: Tensor, memory) -> Tensor:
        place = torch.arange(x0.shape[1]).expand_as(x0)
        hidden = self.embed(torch.where(masked[..., None], self.mask, self.wte(x0)), place, length)
        attend = (valid_positions(length, x0.shape[1])[:, None] | torch.eye(x0.shape[1], dtype=torch.bool)).expand(-1, x0.shape[1], -1)
        for block, image in zip(self.h, memory.layers, strict=True):
            hidden, _ = block(hidden, attend, image)
        return self.to_logits(hidden)

    def loss(self, batch: CaptionBatch) -> Tensor:
        return by_length(batch, self._loss)

    def _loss(self, batch: CaptionBatch) -> Tensor:
        valid, memory = valid_positions(batch.length, batch.x0.shape[1]), self.read_image(batch.image, batch.seen, batch.kept)
        steps = batch.step.masked_fill(~valid, 0).amax(1)
        now = 1 + (torch.rand(len(batch.x0)) * steps).long()  # a moment of the same reveal that the project's model learns from
        masked = valid & (batch.step >= now[:, None])
        logits = self.states(batch.x0, masked, batch.length, memory)
        nll = F.cross_entropy(logits.flatten(0, 1), batch.x0.flatten(), reduction="none").view(batch.x0.shape).nan_to_num(posinf=0.0)
        counted = masked & self.allowed[batch.x0]
        length = F.cross_entropy(memory.length_logits, batch.length - 1, reduction="none")
        return (nll * counted).sum(1) / counted.sum(1).clamp(min=1) + LENGTH_WEIGHT * length

    @torch.no_grad()
    def captions(self, corpus: Corpus, rows: list[int], plan: SamplerConfig, alignment: Alignment) -> list[str]:
        """Median length, then the likeliest words at the most confident places, `plan.steps` times; left to right if the plan says so."""
        memory = self.read_image(corpus.image(rows))
        length = 1 + (memory.length_logits.softmax(-1).cumsum(-1) < 0.5).sum(-1)
        open_ = valid_positions(length, self.max_length)
        x0, counts = torch.zeros(open_.shape, dtype=torch.long), reveal_counts(length, torch.full_like(length, plan.steps), plan.schedule)
        for k in range(counts.shape[1]):
            best = self.states(x0, open_, length, memory).softmax(-1).max(-1)
            score = best.values if plan.order == "confidence" else -torch.arange(x0.shape[1]).expand_as(x0).float()
            now = select(score, open_, counts[:, k])
            x0, open_ = torch.where(now, best.indices, x0), open_ & ~now
        return decode_rows(corpus.tokenizer, x0, length)


class Autoregressive(DiffusionCaptionModel):
    def next_logits(self, x0: Tensor, memory, first: int = 0) -> Tensor:
        """(B, T + 1 - first, V): logits of each word from `first` on and of the one after the last, given those before.

        The mask embedding starts the caption.
        """
        hidden = torch.cat([self.mask.expand(len(x0), 1, -1), self.wte(x0)], 1)
        hidden = self.drop(hidden + self.wpe.weight[: hidden.shape[1]])
        causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril().expand(len(x0), -1, -1)
        for block, image in zip(self.h, memory.layers, strict=True):
            hidden, _ = block(hidden, causal, image)
        return self.to_logits(hidden[:, first:])

    def loss(self, batch: CaptionBatch) -> Tensor:
        return by_length(batch, self._loss)

    def _loss(self, batch: CaptionBatch) -> Tensor:
        target = F.pad(batch.x0 * valid_positions(batch.length, batch.x0.shape[1]), (0, 1), value=END)
        counted = valid_positions(batch.length + 1, target.shape[1]) & self.allowed[target]
        logits = self.next_logits(batch.x0, self.read_image(batch.image, batch.seen, batch.kept))
        nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).nan_to_num(posinf=0.0)
        return (nll * counted).sum(1) / counted.sum(1)

    @torch.no_grad()
    def captions(self, corpus: Corpus, rows: list[int], plan: SamplerConfig, alignment: Alignment) -> list[str]:
        """Greedy, or beam search by mean log-probability per word, the end included; the plan's CLIP and consensus choose at last."""
        beams, longest = plan.beams, self.max_length - 1
        memory = self.read_image(corpus.image(rows))
        texts = torch.zeros(len(rows) * beams, longest, dtype=torch.long)
        score = torch.tensor([0.0] + [-torch.inf] * (beams - 1)).repeat(len(rows))
        ended, length = torch.zeros(len(texts), dtype=torch.bool), torch.zeros(len(texts), dtype=torch.long)
        for t in range(longest):
            logp = self.next_logits(texts[:, :t], memory, t)[:, 0].log_softmax(-1)
            logp[ended] = torch.where(torch.arange(logp.shape[1]) == END, 0.0, -torch.inf)
            logp[:, END] = torch.where(torch.full_like(ended, t == 0), -torch.inf, logp[:, END])
            best = (score[:, None] + logp).view(len(rows), -1).topk(beams)
            parent = (best.indices // logp.shape[1] + torch.arange(len(rows))[:, None] * beams).flatten()
            word, score = (best.indices % logp.shape[1]).flatten(), best.values.flatten()
            texts, ended, length = texts[parent], ended[parent], length[parent]
            texts[:, t] = word
            ended = ended | (word == END)
            length = torch.where(ended, length, t + 1)
            if bool(ended.all()):
                break
        worth = score / (length + 1)
        if plan.clip:
            worth = worth + plan.clip * fit_of(alignment, corpus.tokenizer, corpus.joint[rows])(texts, length)
        if plan.consensus:
            worth = worth + plan.consensus * consensus(texts, length, beams)
        chosen = worth.view(len(rows), beams).argmax(1) + torch.arange(len(rows)) * beams
        return decode_rows(corpus.tokenizer, texts[chosen], length[chosen])


PEERS = {"reveal": Reveal, "bidirectional": Bidirectional, "autoregressive": Autoregressive}


def build(peer: str, eyes: Eyes) -> DiffusionCaptionModel:
    base, ends = eyes.config.base, peer == "autoregressive"
    banned = tuple(i for i in eyes.banned if not (ends and i == END))
    return PEERS[peer](
        eyes.tokenizer.get_vocab_size(), eyes.config.data.max_words + ends, eyes.vision.num_tokens, eyes.vision.width,
        width=base.width, layers=base.layers, heads=base.heads, dropout=base.dropout, banned=banned,
        end=END if peer == "reveal" and base.open_end else None,
    )  # fmt: skip


def plans(peer: str, config: Config) -> dict[str, SamplerConfig]:
    """The decodings to compare."""
    words = config.data.max_words
    if peer == "autoregressive":
        plain = SamplerConfig(order="left_to_right")
        return word_by_word(plain) | {"25 beams, CLIP, consensus": replace(plain, beams=25, clip=3.0, consensus=1.0)}
    if peer == "reveal" and config.base.open_end:
        return open_plans(words)
    return {
        f"left to right, {words} steps": SamplerConfig(steps=words, order="left_to_right"),
        **{f"most confident first, {k} steps": SamplerConfig(steps=k, order="confidence") for k in (4, 8, 12)},
        **(reveal_plans() if peer == "reveal" else {}),
    }


def word_by_word(plain: SamplerConfig) -> dict[str, SamplerConfig]:
    wide = {f"{k} beams{', CLIP' if clip else ''}": (k, clip) for k, clip in ((3, 0.0), (5, 0.0), (5, 3.0), (25, 3.0))}
    return {"greedy": plain} | {name: replace(plain, beams=k, clip=clip) for name, (k, clip) in wide.items()}


def open_plans(words: int) -> dict[str, SamplerConfig]:
    """As the autoregressive one writes, and what it cannot do: read its captions from the right, write in any order."""
    plain = SamplerConfig(steps=words, order="open_end")
    both = replace(plain, beams=25, clip=4.0, both_ways=True)
    told = {f"length first, left to right, {words} steps": replace(plain, order="left_to_right"), "spread, 4 steps": SamplerConfig(steps=4)}
    read = {"25 beams, CLIP, read both ways": both, "25 beams, CLIP, consensus, read both ways": replace(both, consensus=3.0)}
    return word_by_word(plain) | read | told


def reveal_plans() -> dict[str, SamplerConfig]:
    wide = SamplerConfig(order="left_to_right", beams=5, lengths=5)
    spread = {f"spread, {k} steps": SamplerConfig(steps=k) for k in (4, 8)}
    searched = {
        f"5 beams, 5 lengths{', CLIP' if clip else ''}{', read both ways' if both else ''}": replace(wide, clip=clip, both_ways=both)
        for clip in (0.0, 3.0)
        for both in (False, True)
    }
    agreed = replace(wide, clip=4.0, consensus=3.0, both_ways=True)
    return spread | searched | {"5 beams, 5 lengths, CLIP, consensus, read both ways": agreed}


def judge(model, corpus: Corpus, plan: SamplerConfig, alignment: Alignment, count: int = 10_000) -> dict[str, float]:
    rows = list(range(min(count, len(corpus))))
    texts = [text for part in torch.tensor(rows).split(100) for text in model.captions(corpus, part.tolist(), plan, alignment)]
    examples = corpus.examples[: len(rows)]
    return (gold_summary(texts, examples) or reference_scores(texts, examples)) | text_statistics(texts)


def train(model, corpora: dict[str, Corpus], config: Config, minutes: float, plan: SamplerConfig, alignment: Alignment) -> dict:
    """The averaged weights with the best validation captions, of a run whose learning rate ends with its time."""
    fit, measure = config.base.fit, "utility" if corpora["val"].examples[0].scene else "cider_d"
    optimizer, ema = make_optimizer(model, fit), {k: v.clone() for k, v in model.state_dict().items()}
    precision = usable_precision(config.mixed_precision, torch.device("cpu"))
    step, spent, curve, best = 0, 0.0, [], {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    while spent < 60 * minutes:
        started, share = time.process_time(), spent / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = fit.lr * min(share / max(fit.warmup, 1e-9) + 0.01, 0.5 * (1 + math.cos(math.pi * share)))
        torch.manual_seed(seed_of(config.seed, "micro-batch", step))
        rows = batch_indices(len(corpora["train"]), fit.batch_size, step, config.seed, "base")
        batch = caption_batch(corpora["train"], rows, slice(None), config.base, generator(config.seed, "base batch", step))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), fit.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        update_average(ema, model, step, fit.ema_decay)
        spent += time.process_time() - started
        if spent >= 60 * minutes * (len(curve) + 1) / CHECKS:
            with averaged(model, ema):
                model.eval()
                found = {"step": step, "seconds": spent, "loss": float(loss.detach())} | judge(model, corpora["val"], plan, alignment, 400)
            model.train()
            curve.append(found)
            print(json.dumps(found), flush=True)
            if found[measure] == max(row[measure] for row in curve):
                best = {k: v.clone() for k, v in ema.items()}
    model.load_state_dict(best)
    return {"steps": step, "epochs": step * fit.batch_size / (config.base.fit.epoch_size or len(corpora["train"])), "curve": curve}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument(
        "--minutes",
        type=float,
        required=True,
        help="processor minutes of training, without the looks at validation captions: other work beside it does not count",
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save", type=Path, help="where its weights go, for self_critical.py")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config([args.config], args.overrides)
    torch.set_num_threads(config.threads or 1)
    eyes = with_config(load_eyes(earlier(config, "alignment")), config)
    corpora = {split: build_corpus(eyes, rows, Path("cache")) for split, rows in load_examples(config.data, config.seed).items()}
    corpora["train"] = with_looks(corpora["train"], eyes, config.base, Path("cache"))
    torch.manual_seed(seed_of(config.seed, "base"))
    model = build(args.peer, eyes)
    decodings = plans(args.peer, config)
    facts = train(model, corpora, config, args.minutes, next(iter(decodings.values())), eyes.alignment)
    model.eval()
    if args.save:
        torch.save(model.state_dict(), args.save)
    row = {"peer": args.peer, "minutes": args.minutes, "parameters": sum(p.numel() for p in model.parameters())} | facts
    row["test"] = {name: judge(model, corpora["test"], plan, eyes.alignment) for name, plan in decodings.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(row, indent=1) + "\n")
    for name, found in row["test"].items():
        print(name, json.dumps(found))


if __name__ == "__main__":
    main()
