"""Denoising: length, then positions, then tokens; returns the trajectory that RLHF scores again in one pass.

Positions are chosen before tokens, so the probability of a trajectory is exact: log p(length | image) + sum of log p(token | what was
revealed before its step). The orders `random`, `spread` and `left_to_right` do not depend on the model. `plackett_luce` draws positions by
their detached confidence: the order is then part of the data, not of the policy. `confidence` is for inference only. `open_end` decides the
length last: from the left, until END is drawn like a word.
Axes: B captions = N images x G, T caption length, K steps, R rows, V vocabulary.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import comb
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..utils.config import SamplerConfig
from ..utils.seeding import generator
from .denoiser import OPEN, Cache, DiffusionCaptionModel, Rows, bounded_length_logp
from .diffusion import HIDDEN, reveal_counts, reveal_ranks, revealed, steps_from_left, steps_from_ranks, valid_positions

UNKNOWN = -1
"""Marks the positions that a draft leaves open."""
LAYOUTS = 96
"""Most drafts that are tried for one image."""
Given = tuple[Sequence[int], Sequence[int]]
"""Ids of given words where they begin a caption, and elsewhere: subword tokenizers spell the two differently."""
T = TypeVar("T")


@dataclass(frozen=True)
class Noise:
    """All the randomness of B captions, uniform in [0, 1): captions do not depend on how they are batched."""

    length: Float[Tensor, " B"]
    order: Float[Tensor, "B K T"]
    token: Float[Tensor, "B T"]

    @classmethod
    def draw(cls, captions: int, steps: int, width: int, generator: torch.Generator) -> "Noise":
        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        return cls(uniform(captions), uniform(captions, steps, width), uniform(captions, width))

    def to(self, device: torch.device | str) -> "Noise":
        return Noise(self.length.to(device), self.order.to(device), self.token.to(device))


@dataclass(frozen=True)
class Trajectory:
    """How B captions came to be; probabilities are the sampling policy's."""

    x0: Int[Tensor, "B T"]
    """Words, and after the last one END where the model wrote it."""
    step: Int[Tensor, "B T"]
    """Step that revealed each token; 0 for given words, HIDDEN for padding and for what is still open."""
    length: Int[Tensor, " B"]
    """Of the caption, without END."""
    told: Int[Tensor, " B"]
    """The length that the model was told, or OPEN."""
    logp: Float[Tensor, "B T"]
    """Nats of each token at its step; 0 for given words and padding."""
    confidence: Float[Tensor, "B T"]
    """Probability of the likeliest token when the position was revealed; 1 for given words, 0 for padding."""
    length_logp: Float[Tensor, " B"]
    """0 where the length was given, or not told."""
    drafts: Int[Tensor, "B S T"] | None
    """Greedy completion before each step, and the final caption; only on request."""


def policy_logp(
    logits: Float[Tensor, "... V"], temperature: float, top_p: float = 1.0, banned: Bool[Tensor, " V"] | None = None
) -> Float[Tensor, "... V"]:
    """Log-probabilities of the token policy; `banned` tokens have none. Sampler and scorer both come here, so that they cannot disagree.

    Temperature 0 (greedy decoding) keeps the model's own probabilities for reporting.
    """
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if top_p >= 1:
        return logp
    ordered, index = logp.sort(-1, descending=True)
    outside = ordered.exp().cumsum(-1) - ordered.exp() >= top_p  # the token that crosses top_p stays
    return logp.masked_fill(outside.gather(-1, index.argsort(-1)), -torch.inf).log_softmax(-1)


def inverse_cdf(logp: Float[Tensor, "... V"], u: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The outcome at quantile u of each distribution; never one of probability 0."""
    cdf = logp.double().exp().cumsum(-1)
    return torch.searchsorted(cdf, (u.double() * cdf[..., -1])[..., None], right=True).squeeze(-1).clamp(max=logp.shape[-1] - 1)


def take_rows(chosen: Bool[Tensor, "B T"]) -> Rows:
    """The chosen positions of each caption, from the left, padded to the longest choice."""
    most = int(chosen.sum(1).max()) if len(chosen) else 0
    position = (~chosen).int().argsort(dim=1, stable=True)[:, :most]
    return Rows(position, chosen.gather(1, position))


def put(target: Tensor, rows: Rows, value: Tensor) -> Tensor:
    """`target` (B, T) with `value` (B, R) written at the valid rows."""
    return target.scatter(1, rows.position, torch.where(rows.valid, value, target.gather(1, rows.position)))


def choose_length(length_logits: Float[Tensor, "N T"], group: int, u: Float[Tensor, " B"], plan: SamplerConfig) -> tuple[Tensor, Tensor]:
    """Length of each caption and its log-probability; greedy decoding takes the median length."""
    logp = bounded_length_logp(length_logits, plan.min_words, min(plan.max_words or length_logits.shape[1], length_logits.shape[1]))
    logp = logp.repeat_interleave(group, 0)
    length = 1 + inverse_cdf(logp, u if plan.temperature > 0 else torch.full_like(u, 0.5))
    return length, logp.gather(1, length[:, None] - 1).squeeze(1)


def select(score: Float[Tensor, "B T"], open_: Bool[Tensor, "B T"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B T"]:
    """The `count` best open positions of each caption."""
    rank = torch.where(open_, score, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    return open_ & (rank < count[:, None])


def guided(logits: Float[Tensor, "B R V"], guidance: float) -> Float[Tensor, "C R V"]:
    """Classifier-free guidance: rows are captions with their image, then the same captions without it (Ho & Salimans 2022)."""
    if guidance == 1:
        return logits
    with_image, without = logits.log_softmax(-1).chunk(2)
    return torch.where(with_image.isinf(), with_image, without + guidance * (with_image - without))


def _twice(guidance: float) -> Callable[[Tensor], Tensor]:
    return (lambda x: x) if guidance == 1 else (lambda x: torch.cat([x, x]))


def _seen(image: Float[Tensor, "N P F"], guidance: float) -> tuple[Tensor, Bool[Tensor, " M"] | None]:
    """The images, for guidance followed by themselves unseen."""
    images = _twice(guidance)(image)
    return images, None if guidance == 1 else torch.arange(len(images), device=image.device) < len(image)


@torch.no_grad()
def sample(
    model: DiffusionCaptionModel,
    image: Float[Tensor, "N P F"],
    plan: SamplerConfig,
    noise: Noise,
    known: Int[Tensor, "B T"] | None = None,
    drafts: bool = False,
    banned: Bool[Tensor, " V"] | None = None,
) -> Trajectory:
    """Caption N images, B / N times each. `known` fixes words and with them the lengths (UNKNOWN marks open positions inside a caption,
    HIDDEN the padding); no `banned` token is written."""
    *_, done = denoise(model, image, plan, noise, known, drafts, banned)
    return done


@torch.no_grad()
def denoise(
    model: DiffusionCaptionModel,
    image: Float[Tensor, "N P F"],
    plan: SamplerConfig,
    noise: Noise,
    known: Int[Tensor, "B T"] | None = None,
    drafts: bool = False,
    banned: Bool[Tensor, " V"] | None = None,
) -> Iterator[Trajectory]:
    """What `sample` returns, in the making: before each step, and at last complete."""
    if plan.order == "open_end" and known is None:  # drafts tell their lengths
        yield from write_on(model, image, plan, noise, banned)
        return
    twice = _twice(plan.guidance)
    memory = model.read_image(*_seen(image, plan.guidance))
    group = len(noise.length) // len(image)
    if known is None:
        length, length_logp = choose_length(memory.length_logits[: len(image)], group, noise.length, plan)
        known = torch.where(valid_positions(length, model.max_length), UNKNOWN, HIDDEN)
    else:
        length, length_logp = (known != HIDDEN).sum(1), torch.zeros_like(noise.length)
    open_, valid = known == UNKNOWN, known != HIDDEN
    x0 = torch.where(open_ | ~valid, 0, known)
    counts = reveal_counts(open_.sum(1), torch.full_like(length, plan.steps), plan.schedule)
    by_model = plan.order in ("confidence", "plackett_luce")
    step = torch.where(valid, 0, HIDDEN)
    if not by_model:
        step = steps_from_ranks(reveal_ranks(plan.order, noise.order[:, 0], open_), counts, open_, valid)
    logp, confidence = torch.zeros_like(noise.token), (valid & ~open_).float()
    cache, new, history = Cache.empty(len(model.h), len(twice(length)), image.device), take_rows(valid & ~open_), []
    for k in range(1, plan.steps + 1):
        if not open_.any():
            break
        yield Trajectory(x0, torch.where(open_, HIDDEN, step), length, length, logp, confidence, length_logp, None)
        now = open_ & (step == k)
        ask = take_rows(open_ if by_model or drafts or plan.threshold else now)
        logits, cache = model.advance(cache, twice(x0), _both(new, twice), _both(ask, twice), twice(length), memory)
        dist = policy_logp(guided(logits, plan.guidance), plan.temperature, plan.top_p, banned)
        best = dist.max(-1)
        token = inverse_cdf(dist, noise.token.gather(1, ask.position)) if plan.temperature > 0 else best.indices
        if drafts:
            history.append(put(x0, ask, best.indices))
        if by_model or plan.threshold:
            sure = put(torch.zeros_like(confidence), ask, best.values.exp())
            if by_model:
                now = select(order_score(sure, noise.order[:, (k - 1) % noise.order.shape[1]], plan), open_, counts[:, k - 1])
            if plan.threshold:
                now |= open_ & (sure >= plan.threshold)
            step = torch.where(now, k, step)
        put_now = Rows(ask.position, ask.valid & now.gather(1, ask.position))
        x0 = put(x0, put_now, token)
        logp = put(logp, put_now, dist.gather(-1, token[..., None]).squeeze(-1))
        confidence = put(confidence, put_now, best.values.exp())
        open_, new = open_ & ~now, take_rows(now)
    history += [x0] * (plan.steps + 1 - len(history))
    done = Trajectory(x0, step, length, length, logp, confidence, length_logp, torch.stack(history, 1) if drafts else None)
    yield done
    for _ in range(plan.remask):
        for done in rewrite(model, image, plan, noise, done, banned):  # noqa: B020, it begins with the one before
            yield done


def write_on(
    model: DiffusionCaptionModel, image: Float[Tensor, "N P F"], plan: SamplerConfig, noise: Noise, banned: Bool[Tensor, " V"] | None
) -> Iterator[Trajectory]:
    """The same from the left, a word a step, until END; in the making one more word is still to come."""
    twice = _twice(plan.guidance)
    memory, cache = model.read_image(*_seen(image, plan.guidance)), Cache.empty(len(model.h), len(twice(noise.length)), image.device)
    x0 = torch.zeros_like(noise.token, dtype=torch.long)
    step, logp, confidence = torch.full_like(x0, HIDDEN), torch.zeros_like(noise.token), torch.zeros_like(noise.token)
    length, told, nothing = torch.zeros_like(x0[:, 0]), torch.full_like(x0[:, 0], OPEN), torch.zeros_like(noise.length)
    going, new = torch.ones_like(length, dtype=torch.bool), Rows(x0[:, :0], x0[:, :0].bool())
    for t in range(min(plan.max_words or model.max_length, model.max_length)):
        yield Trajectory(x0, step, length + going.int(), told, logp, confidence, nothing, None)
        ask = Rows(torch.full_like(x0[:, :1], t), going[:, None])
        logits, cache = model.advance(cache, twice(x0), _both(new, twice), _both(ask, twice), twice(told), memory)
        dist = policy_logp(guided(logits, plan.guidance), plan.temperature, plan.top_p, not_yet(model, banned, t, plan.min_words))
        best = dist.max(-1)
        token = inverse_cdf(dist, noise.token[:, t : t + 1]) if plan.temperature > 0 else best.indices
        x0, step = put(x0, ask, token), put(step, ask, torch.full_like(token, t + 1))
        logp = put(logp, ask, dist.gather(-1, token[..., None]).squeeze(-1))
        confidence = put(confidence, ask, best.values.exp())
        going = going & (token[:, 0] != model.end)
        length, new = length + going.int(), Rows(ask.position, going[:, None])
        if not going.any():
            break
    yield Trajectory(x0, step, length, told, logp, confidence, nothing, None)


def not_yet(model: DiffusionCaptionModel, banned: Bool[Tensor, " V"] | None, place: int, least: int) -> Bool[Tensor, " V"] | None:
    """What may not stand at this place: `banned` tokens, nor END before there are so many."""
    if place >= least or model.end is None:
        return banned
    banned = torch.zeros_like(model.allowed) if banned is None else banned.clone()
    banned[model.end] = True
    return banned


def order_score(confidence: Float[Tensor, "B T"], u: Float[Tensor, "B T"], plan: SamplerConfig) -> Float[Tensor, "B T"]:
    """Key whose k largest entries are revealed next; log-confidence plus Gumbel noise draws from Plackett-Luce."""
    if plan.order == "confidence":
        return confidence
    gumbel = -torch.log(-torch.log(u.clamp(1e-9, 1 - 1e-7)))
    return confidence.clamp(min=1e-9).log() + gumbel


def _both(rows: Rows, twice: Callable[[Tensor], Tensor]) -> Rows:
    return Rows(twice(rows.position), twice(rows.valid))


def rewrite(
    model: DiffusionCaptionModel, image: Tensor, plan: SamplerConfig, noise: Noise, done: Trajectory, banned: Tensor | None = None
) -> Iterator[Trajectory]:
    """Take back the least confident eighth of the words that were written, and write them again given the rest, one at a time."""
    mine = revealed(done.step)
    weak = select(-done.confidence, mine, (mine.sum(1) + 7) // 8)
    known = torch.where(weak, UNKNOWN, torch.where(done.step < HIDDEN, done.x0, HIDDEN))
    plan = replace(plan, remask=0, steps=max(int(weak.sum(1).max()), 1), threshold=0.0)
    before = (done.step * mine).amax(1, keepdim=True)
    for again in denoise(model, image, plan, noise, known, banned=banned):
        confidence = torch.where(weak, again.confidence, done.confidence)
        step = torch.where(weak, (again.step + before).clamp(max=HIDDEN), done.step)
        yield replace(again, confidence=confidence, length_logp=done.length_logp, step=step)


@dataclass(frozen=True)
class Score:
    logp: Float[Tensor, "B T"]
    """Nats of each token at its step."""
    distribution: Float[Tensor, "B T V"]
    """Log-probabilities of the whole vocabulary at that moment."""
    length_logp: Float[Tensor, " B"]
    """0 where the length is not told."""
    length_distribution: Float[Tensor, "N T"]


def score(
    model: torch.nn.Module,
    x0: Int[Tensor, "B T"],
    step: Int[Tensor, "B T"],
    told: Int[Tensor, " B"],
    image: Float[Tensor, "N P F"],
    temperature: float = 1.0,
    seen: Bool[Tensor, " N"] | None = None,
    banned: Bool[Tensor, " V"] | None = None,
) -> Score:
    """Exact log-probability of trajectories in one pass, with gradient; `model` may be wrapped for distributed training."""
    longest = int((step < HIDDEN).sum(1).max())  # columns that are padding in every caption cost as much as words
    prediction = model(x0[:, :longest], step[:, :longest], told, image, seen)
    distribution = F.pad(policy_logp(prediction.logits, temperature, banned=banned), (0, 0, 0, x0.shape[1] - longest))
    logp = distribution.gather(-1, x0[..., None]).squeeze(-1).masked_fill(~revealed(step), 0.0)
    lengths = bounded_length_logp(prediction.length_logits)
    length_logp = lengths.repeat_interleave(len(x0) // len(image), 0).gather(1, (told[:, None] - 1).clamp(min=0)).squeeze(1)
    return Score(logp, distribution, length_logp.masked_fill(told == OPEN, 0.0), lengths)


@torch.no_grad()
def likelihood(
    model: DiffusionCaptionModel,
    x0: Int[Tensor, "B T"],
    length: Int[Tensor, " B"],
    image: Float[Tensor, "1 P F"],
    from_right: bool = False,
    chunk: int = 16,
    banned: Bool[Tensor, " V"] | None = None,
) -> Float[Tensor, " B"]:
    """Nats per token of captions of one image, read from one end, given words and length (or END) included; what is impossible counts as
    -100."""
    x0, step, told = model.from_left(x0, length)
    if from_right:
        step, told = steps_from_left(length, x0.shape[1]), length
        step = torch.where(step < HIDDEN, length[:, None] + 1 - step, HIDDEN)
    parts = [score(model, *some, image, banned=banned) for some in zip(x0.split(chunk), step.split(chunk), told.split(chunk), strict=True)]
    return torch.cat([p.logp.clamp(min=-100).sum(1) + p.length_logp for p in parts]) / (length + 1)


def thin(rows: Sequence[T], most: int = LAYOUTS) -> list[T]:
    """All rows, or `most` of them, evenly spaced."""
    return list(rows) if len(rows) <= most else [rows[i * len(rows) // most] for i in range(most)]


def _compositions(total: int, parts: int) -> Iterable[Sequence[int]]:
    """Ways to write `total` as a sum of `parts` positive numbers; a sample where there are very many."""
    if parts == 0 or total < parts:
        return [()] if parts == total == 0 else []
    inner, rng = range(1, total), random.Random(total)
    many = comb(total - 1, parts - 1) > 10 * LAYOUTS
    cuts = [sorted(rng.sample(inner, parts - 1)) for _ in range(10 * LAYOUTS)] if many else combinations(inner, parts - 1)
    return [[b - a for a, b in pairwise((0, *cut, total))] for cut in cuts]


def layouts(length: int, parts: Sequence[Given | None], phrases: Sequence[Given]) -> list[list[int]]:
    """Drafts of `length` tokens: `parts` in this order (None: one or more open tokens) and each phrase somewhere in what is open."""
    given = [None if part is None else list(part[i > 0]) for i, part in enumerate(parts)]
    rows: list[list[int]] = []
    for sizes in _compositions(length - sum(len(g) for g in given if g is not None), given.count(None)):
        gaps = iter(sizes)
        rows.append([t for g in given for t in (g if g is not None else [UNKNOWN] * next(gaps))])
    for phrase in phrases:
        spelled = [(row, i, list(phrase[i > 0])) for row in thin(rows) for i in range(length)]
        rows = [[*row[:i], *ids, *row[i + len(ids) :]] for row, i, ids in spelled if row[i : i + len(ids)] == [UNKNOWN] * len(ids)]
    return rows


def noise_for(keys: Sequence[object], group: int, steps: int, width: int, seed: int) -> Noise:
    """Noise of `group` captions for each image, a function of the seed and the image's key alone."""
    parts = [Noise.draw(group, steps, width, generator(seed, "noise", key)) for key in keys]
    return Noise(torch.cat([p.length for p in parts]), torch.cat([p.order for p in parts]), torch.cat([p.token for p in parts]))
