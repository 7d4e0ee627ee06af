"""Stage 1: the denoiser learns to caption. Axes: B captions = N images, T caption length, P image tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.corpus import Corpus
from ..data.text import banned_ids, load_tokenizer, pad
from ..evaluation.evaluate import gold_summary, reference_scores, write_captions
from ..models.denoiser import OPEN, DiffusionCaptionModel, closed
from ..models.diffusion import HIDDEN, caption_nll, revealed, training_steps, valid_positions
from ..models.saved import FILES, Eyes, save_denoiser, start_denoiser
from ..utils.config import BaseConfig, ConfigError, settings_of
from ..utils.seeding import generator, seed_of
from .alignment import shuffled_ids
from .engine import Objective, Row, to_device
from .run import Run

LENGTH_GROUPS = 4
"""Groups of similar length that a batch is computed in on a processor; a GPU takes as long for one of them as for all."""
LENGTH_WEIGHT = 0.1
"""Weight of the length head's cross-entropy beside that of a token."""


@dataclass(frozen=True)
class CaptionBatch:
    x0: Int[Tensor, "B T"]
    """Words, and END after those of captions with an open end."""
    step: Int[Tensor, "B T"]
    length: Int[Tensor, " B"]
    told: Int[Tensor, " B"]
    """The length, or OPEN."""
    image: Float[Tensor, "B P F"]
    seen: Bool[Tensor, " B"]
    """False where the image is withheld, to learn the unconditional model too."""
    kept: Int[Tensor, "B K"] | None = None
    """The image tokens that are read; None: all."""

    def rows(self, index: Int[Tensor, " G"]) -> "CaptionBatch":
        """Some of the captions, without the columns that are padding in all of them."""
        step, kept = self.step[index], None if self.kept is None else self.kept[index]
        longest = int((step < HIDDEN).sum(1).max())
        return CaptionBatch(
            self.x0[index, :longest], step[:, :longest], self.length[index], self.told[index], self.image[index], self.seen[index], kept
        )


def caption_batch(
    corpus: Corpus, rows: list[int], part: slice, config: BaseConfig, g: torch.Generator, drop_images: bool = True
) -> CaptionBatch:
    """A random caption of each row, revealed at random; noise is drawn for the whole batch, then this process's part is taken.

    `drop_images` False withholds no image and no part of one.
    """
    ids, room = shuffled_ids(corpus.captions, rows, g), int(config.open_end > 0)
    x0, length = pad(ids, min(max(map(len, ids)) + room, corpus.max_words))
    step, told = training_steps(length, x0.shape[1], config.schedule, config.left_to_right, g), length
    if config.open_end:
        open_ = torch.rand(len(rows), generator=g) < config.open_end
        with_end, from_left = closed(x0, length, banned_ids(corpus.tokenizer)[0])
        told = length.masked_fill(open_, OPEN)
        x0, step = torch.where(open_[:, None], with_end, x0), torch.where(open_[:, None], from_left, step)
    seen = torch.rand(len(rows), generator=g) >= (config.image_dropout if drop_images else 0.0)
    look = torch.randint(1 + len(corpus.looks), (len(rows),), generator=g)[part] if corpus.looks else None
    kept = kept_tokens(len(rows), corpus.tokens.shape[1], config.patch_dropout, g)[part] if config.patch_dropout and drop_images else None
    return CaptionBatch(x0[part], step[part], length[part], told[part], corpus.image(rows[part], look), seen[part], kept)


def kept_tokens(images: int, tokens: int, dropout: float, g: torch.Generator) -> Int[Tensor, "N K"]:
    """A random choice of each image's tokens, and the last one, which is the pooled vector where there is one (Liu et al. 2022)."""
    count = round((1 - dropout) * (tokens - 1))
    chosen = torch.rand(images, tokens - 1, generator=g).argsort(1)[:, :count]
    return torch.cat([chosen, torch.full((images, 1), tokens - 1)], 1)


def caption_loss(model: nn.Module, batch: CaptionBatch, allowed: Tensor) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Nats per token of each caption (words outside the vocabulary do not count), and nats of its length.

    The captions are computed in groups of about the same length: the same losses without the columns that are padding in a whole group.
    """
    groups = LENGTH_GROUPS if batch.x0.device.type == "cpu" else 1
    order = batch.length.argsort(stable=True)
    losses = [_caption_loss(model, batch.rows(group), allowed) for group in order.chunk(groups)]
    nll, length = (torch.cat(parts)[order.argsort()] for parts in zip(*losses, strict=True))
    return nll, length


def _caption_loss(model: nn.Module, batch: CaptionBatch, allowed: Tensor) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    prediction = model(batch.x0, batch.step, batch.told, batch.image, batch.seen, batch.kept)
    words = valid_positions(batch.length, batch.x0.shape[1])
    counted = (words & allowed[batch.x0]) | (revealed(batch.step) & ~words)
    length = F.cross_entropy(prediction.length_logits, batch.length - 1, reduction="none")
    return caption_nll(prediction.logits, batch.x0, counted), length


def denoising(allowed: Tensor) -> Objective:
    """The base model's objective."""

    def objective(model: nn.Module, batch: CaptionBatch) -> tuple[Tensor, dict[str, Tensor]]:
        nll, length = caption_loss(model, batch, allowed)
        return nll.mean() + LENGTH_WEIGHT * length.mean(), {"nll": nll.mean(), "length_nll": length.mean()}

    return objective


@torch.no_grad()
def validation_loss(model: DiffusionCaptionModel, corpus: Corpus, config: BaseConfig, seed: int, chunk: int = 100) -> float:
    """Nats per token of one fixed caption of each image under fixed reveals, with the image."""
    rows = list(range(len(corpus)))
    parts = [
        caption_batch(corpus, rows[i : i + chunk], slice(None), config, generator(seed, "validation", i), False)
        for i in range(0, len(rows), chunk)
    ]
    losses = [caption_loss(model, to_device(part, model.mask.device), model.allowed)[0] for part in parts]
    return float(torch.cat(losses).mean())


def train_base(run: Run, eyes: Eyes, corpora: dict[str, Corpus]) -> Path:
    """Writes best_base_model.pt, the weights with the lowest validation loss."""
    config, path = run.config, run.config.models / FILES["base"]
    if config.base.backbone and load_tokenizer(config.base.backbone).get_vocab() != eyes.tokenizer.get_vocab():
        raise ConfigError(f"base.backbone={config.base.backbone}: the alignment stage ran with another vocabulary; run it again")
    torch.manual_seed(seed_of(config.seed, "base"))
    eyes, model = start_denoiser(eyes)
    state = run.state("base", model, config.base.fit)

    def make(index: int, rows: list[int], part: slice) -> CaptionBatch:
        return caption_batch(corpora["train"], rows, part, config.base, generator(config.seed, "base batch", index))

    def evaluate(bare: nn.Module) -> dict[str, float]:
        denoiser = cast(DiffusionCaptionModel, bare)
        return {"loss": validation_loss(denoiser, corpora["val"], config.base, config.seed)} | sampled_quality(
            run, denoiser, corpora["val"]
        )

    def best(bare: nn.Module, row: Row) -> None:
        save_denoiser(path, "base", eyes, bare, {"row": row})

    batches = run.batches("base", config.base.fit, len(corpora["train"]), make)
    run.fit(
        "base", state, config.base.fit, len(corpora["train"]), batches, denoising(model.allowed),
        evaluate=evaluate, better=("val_loss", "min"), best=best, held=settings_of(config, "base"),
    )  # fmt: skip
    return path


def sampled_quality(run: Run, model: DiffusionCaptionModel, corpus: Corpus, limit: int = 200) -> dict[str, float]:
    """What the captions of some held-out images are worth: by the scenes' truth, else against the references. For the curves only."""
    rows = list(range(min(limit, len(corpus))))
    texts = write_captions(model, corpus, rows, run.config.sampler.plain, run.config.seed).texts
    examples = [corpus.examples[row] for row in rows]
    truth = {f"gold_{name}": value for name, value in gold_summary(texts, examples).items()}
    return truth or {"cider_d": reference_scores(texts, examples)["cider_d"]}
