"""Beam search from the left, over several lengths at once or with an open end: the likeliest caption per token.

Axes: N images, L lengths, K beams, R = N x L x K captions in the making, T caption length, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..utils.config import SamplerConfig
from .denoiser import OPEN, Cache, DiffusionCaptionModel, Rows, bounded_length_logp
from .diffusion import revealed, steps_from_left, valid_positions
from .sampler import Noise, Trajectory, denoise, likelihood, not_yet, policy_logp, score

Fit = Callable[[Int[Tensor, "R T"], Int[Tensor, " R"]], Float[Tensor, " R"]]
"""Ids and lengths -> how well each caption fits its image."""


def search_or_denoise(
    model: DiffusionCaptionModel,
    image: Float[Tensor, "N P F"],
    plan: SamplerConfig,
    noise: Noise,
    known: Tensor | None = None,
    banned: Bool[Tensor, " V"] | None = None,
    fit: Fit | None = None,
) -> Iterator[Trajectory]:
    """Captions as the plan says, in the making and at last complete; a search tells only the end.

    Given words (`known`, as in `sample`) leave nothing to search for among lengths and are sampled.
    """
    if plan.beams == plan.lengths == 1 or known is not None:
        return denoise(model, image, plan, noise, known, banned=banned)
    return iter([beam_search(model, image, plan, banned, fit)])


@torch.no_grad()
def beam_search(
    model: DiffusionCaptionModel,
    image: Float[Tensor, "N P F"],
    plan: SamplerConfig,
    banned: Bool[Tensor, " V"] | None = None,
    fit: Fit | None = None,
) -> Trajectory:
    """One caption per image: the best of `plan.beams` for each of the `plan.lengths` likeliest lengths, or with an open end.

    Best is nats per token, the length or END counted as one, plus `plan.clip` times `fit`, plus `plan.consensus` times `consensus`. With
    `plan.both_ways` nats are the mean of two readings, from the left and from the right: captions found by one reading are those that
    it overrates.
    """
    n, beams = len(image), plan.beams
    memory = model.read_image(image)
    low, high = plan.min_words, min(plan.max_words or model.max_length, model.max_length)
    if open_end := plan.order == "open_end":
        length, length_logp = torch.full((n * beams,), high, device=image.device), 0.0  # until END comes
    else:
        tried = bounded_length_logp(memory.length_logits, low, high).topk(min(plan.lengths, high - low + 1), 1).indices
        free = bounded_length_logp(memory.length_logits).gather(1, tried)  # bounds choose among lengths, and make none likelier
        length, length_logp = (x.flatten().repeat_interleave(beams) for x in (tried + 1, free))
    told = torch.full_like(length, OPEN) if open_end else length
    x0 = torch.zeros(len(length), model.max_length, dtype=torch.long, device=image.device)
    total = torch.where(torch.arange(len(length), device=image.device) % beams == 0, 0.0, -torch.inf)  # at first all beams are one
    cache = Cache.empty(len(model.h), len(length), image.device)
    new = Rows(x0[:, :0], x0[:, :0].bool())
    for t in range(int(length.max())):
        ask = Rows(torch.full_like(length, t)[:, None], (t < length)[:, None])
        logits, cache = model.advance(cache, x0, new, ask, told, memory)
        logp = policy_logp(logits[:, 0], 1.0, banned=not_yet(model, banned, t, low))
        stay = torch.full_like(logp, -torch.inf)
        stay[:, 0] = 0.0  # a finished caption only goes on as it is
        reached = (total[:, None] + torch.where(ask.valid, logp, stay)).view(len(total) // beams, -1).topk(beams, 1)
        parent = (reached.indices // logp.shape[1] + torch.arange(0, len(total), beams, device=image.device)[:, None]).flatten()
        total, x0, cache, length = reached.values.flatten(), x0[parent], _reordered(cache, parent), length[parent]
        token = (reached.indices % logp.shape[1]).flatten()
        if open_end:
            length = torch.where((token == model.end) & (t < length), t, length)
        x0[:, t] = torch.where(t < length, token, 0)
        new = Rows(ask.position, (t < length)[:, None])
        if not new.valid.any():
            break
    worth = (total + length_logp) / (length + 1)
    if plan.both_ways:
        own = zip(x0.chunk(n), length.chunk(n), image.split(1), strict=True)
        worth = (worth + torch.cat([likelihood(model, *one, from_right=True, banned=banned) for one in own])) / 2
    if plan.clip and fit is not None:
        worth = worth + plan.clip * fit(x0, length)
    if plan.consensus:
        worth = worth + plan.consensus * consensus(x0, length, len(x0) // n)
    worth = worth.view(n, -1)
    best = worth.argmax(1) + torch.arange(0, len(total), worth.shape[1], device=image.device)
    return _scored(model, x0[best], length[best], open_end, image, banned)


def consensus(x0: Int[Tensor, "R T"], length: Int[Tensor, " R"], group: int) -> Float[Tensor, " R"]:
    """`_consensus` of the captions of each image, of which `group` stand together."""
    return torch.cat([_consensus(*some) for some in zip(x0.split(group), length.split(group), strict=True)])


def _consensus(x0: Int[Tensor, "C T"], length: Int[Tensor, " C"]) -> Float[Tensor, " C"]:
    """How much each caption of an image has in common with all of them: minimum Bayes risk (Kumar & Byrne 2004), which likes what many say.

    The mean over n = 1 ... 4 of the mean cosine of the counts of n words in a row: CIDEr (Vedantam et al. 2015) without its rarities.
    """
    total = torch.zeros(len(x0), device=x0.device)
    for n in range(1, min(4, int(length.max())) + 1):
        grams = x0.unfold(1, n, 1)  # C x (T - n + 1) x n
        inside = valid_positions(length - n + 1, grams.shape[1])
        which = grams[inside].unique(dim=0, return_inverse=True)[1]
        counts = torch.zeros(len(x0), int(inside.sum()), device=x0.device)
        counts.index_put_((inside.nonzero()[:, 0], which), torch.ones(len(which), device=x0.device), accumulate=True)
        unit = F.normalize(counts, dim=1)
        total += unit @ unit.mean(0)
    return total / 4


def _reordered(cache: Cache, parent: Tensor) -> Cache:
    return Cache([pair and (pair[0][parent], pair[1][parent]) for pair in cache.layers], cache.valid[parent])


def _scored(model: DiffusionCaptionModel, x0: Tensor, length: Tensor, open_end: bool, image: Tensor, banned: Tensor | None) -> Trajectory:
    """The captions as trajectories that reveal one token after the other."""
    step, told = steps_from_left(length, x0.shape[1]), length
    if open_end:
        x0, step, told = model.from_left(x0, length)
    found = score(model, x0, step, told, image, banned=banned)
    confidence = torch.where(revealed(step), found.distribution.amax(-1).exp(), 0.0)
    return Trajectory(x0, step, length, told, found.logp, confidence, found.length_logp, None)
