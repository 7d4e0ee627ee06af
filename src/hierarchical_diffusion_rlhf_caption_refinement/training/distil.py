"""Refinement without a policy gradient: of captions that a search finds of the training images the best is learned as if by people.

RAFT (Dong et al. 2023) with the model's own beam search in place of samples, so also sequence-level distillation (Kim & Rush 2016): greedy
decoding comes to write what took a search. Axes: N images, B = N x G candidates.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.corpus import Corpus
from ..data.text import decode_rows
from ..evaluation.evaluate import Worth, fit_of
from ..models.alignment import Alignment
from ..models.beam import Fit, beam_search
from ..models.denoiser import DiffusionCaptionModel
from ..models.sampler import Trajectory
from ..models.shaping import centre
from ..utils.config import SamplerConfig, ShapingConfig
from ..utils.runlog import counter

SEARCH = SamplerConfig(order="left_to_right", beams=3, lengths=3, both_ways=True, clip=0.5)
"""Nine candidates of each image; `clip` weighs the rewards beside nats per token."""
OPEN_SEARCH = replace(SEARCH, order="open_end", beams=9, lengths=1)
"""As many, of a model that has learned to close captions."""


@torch.no_grad()
def best_found(
    model: DiffusionCaptionModel, corpus: Corpus, worth: Worth, alignment: Alignment, shaping: ShapingConfig, chunk: int = 40
) -> list[str]:
    """The caption of each image that the search likes best: for its likelihood, CLIP and `worth`."""
    texts, on_progress, plan = list[str](), counter("captions searched for:"), SEARCH if model.end is None else OPEN_SEARCH
    for start in range(0, len(corpus), chunk):
        rows = list(range(start, min(start + chunk, len(corpus))))
        image = corpus.image(rows).to(model.mask.device)
        found = beam_search(model, image, plan, fit=both_rewards(corpus, rows, worth, alignment, shaping))
        texts += decode_rows(corpus.tokenizer, found.x0, found.length)
        on_progress(len(texts), len(corpus))
    return texts


def both_rewards(corpus: Corpus, rows: list[int], worth: Worth, alignment: Alignment, shaping: ShapingConfig) -> Fit:
    """CLIP's cosine and `worth`, weighted as `shaping` says."""

    def fit(x0: Tensor, length: Tensor) -> Tensor:
        group, blank = len(x0) // len(rows), torch.zeros_like(x0, dtype=torch.float32)
        t = Trajectory(x0, torch.ones_like(x0), length, length, blank, blank, blank[:, 0], None)  # read: words and lengths
        cosine = fit_of(alignment, corpus.tokenizer, corpus.joint[rows].to(x0.device))(x0, length)
        return shaping.clip_weight * in_spreads(cosine, group) + shaping.preference_weight * in_spreads(worth(corpus, rows, t), group)

    return fit


def in_spreads(reward: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """Less the mean of the image's candidates, in units of the root mean square that is left."""
    centred = centre(reward, group)
    return centred / centred.square().mean().sqrt().clamp(min=1e-8)


def rewritten(corpus: Corpus, texts: list[str]) -> Corpus:
    """The same images with these captions."""
    return replace(corpus, examples=[replace(example, captions=(text,)) for example, text in zip(corpus.examples, texts, strict=True)])
