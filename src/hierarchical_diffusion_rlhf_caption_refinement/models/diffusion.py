"""Pure functions of the absorbing diffusion: how a caption is revealed in steps, and the loss of a denoiser.

A caption of n tokens starts as n masks (t = 1) and ends clean (t = 0). Step 0 is content known beforehand; the tokens revealed k-th carry
step k. Axes: B captions, T longest caption, K steps, V vocabulary.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..utils.config import Order, Schedule

HIDDEN = 10_000
"""Step of padding: later than every real step, so no token ever attends to it."""


def masked_share(t: Float[Tensor, "..."], schedule: Schedule) -> Float[Tensor, "..."]:
    """Share of the tokens that is still masked at level t in [0, 1]; 1 at t = 1 and 0 at t = 0.

    `linear` (LLaDA) reveals evenly; `cosine` (MaskGIT) and `log_linear` (log of the revealed share linear in t) reveal few tokens first;
    `shifted` (LaViDa, a = 1/3) many first.
    """
    if schedule == "linear":
        return t
    if schedule == "cosine":
        return torch.sin(t * math.pi / 2)
    if schedule == "log_linear":
        return (1 - torch.exp(-3 * t)) / (1 - math.exp(-3))
    return t / (3 - 2 * t)


def reveal_counts(tokens: Int[Tensor, " B"], steps: Int[Tensor, " B"], schedule: Schedule) -> Int[Tensor, "B K"]:
    """How many tokens each step reveals. Every step reveals at least one until none is left; rows sum to `tokens`."""
    total = int(steps.max())
    k = torch.arange(total + 1, device=tokens.device)  # (K + 1,)
    n, budget = tokens[:, None], steps[:, None]
    left = torch.round(n * masked_share((1 - k / budget).clamp(min=0).float(), schedule)).long()
    most = (n - k).clamp(min=0)
    least = torch.minimum((budget - k).clamp(min=0), most)
    left = torch.where(k >= budget, 0, torch.clamp(left, least, most))
    left[:, 0] = tokens
    return left[:, :-1] - left[:, 1:]


def reveal_ranks(order: Order, noise: Float[Tensor, "B T"], hidden: Tensor) -> Int[Tensor, "B T"]:
    """Rank 0, 1, … of each hidden position in an order that does not depend on the model; `noise` is uniform in [0, 1).

    `spread` walks the caption in golden-ratio strides from a random start, so that tokens of one step are far apart.
    """
    place = torch.arange(noise.shape[1], device=noise.device).expand_as(noise)
    if order in ("left_to_right", "open_end"):
        score = place.float()
    elif order == "spread":
        score = (place * 0.6180339887 + noise[:, :1]) % 1
    else:
        score = noise
    return torch.where(hidden, score, torch.inf).argsort(dim=1, stable=True).argsort(dim=1, stable=True)


def steps_from_ranks(rank: Int[Tensor, "B T"], counts: Int[Tensor, "B K"], hidden: Tensor, valid: Tensor) -> Int[Tensor, "B T"]:
    """Step 1 … K of every hidden position, 0 of known ones, HIDDEN of padding."""
    step = 1 + torch.searchsorted(counts.cumsum(1), rank, right=True)
    return torch.where(valid, torch.where(hidden, step, 0), HIDDEN)


def valid_positions(length: Int[Tensor, " B"], width: int) -> Tensor:
    """(B, T) bool: positions inside the caption."""
    return torch.arange(width, device=length.device) < length[:, None]


def revealed(step: Int[Tensor, "B T"]) -> Tensor:
    """(B, T) bool: tokens that a step revealed, neither given nor padding."""
    return (step > 0) & (step < HIDDEN)


def steps_from_left(length: Int[Tensor, " B"], width: int) -> Int[Tensor, "B T"]:
    """The steps of captions revealed word by word from the left."""
    return torch.where(valid_positions(length, width), torch.arange(1, width + 1, device=length.device), HIDDEN)


def training_steps(
    length: Int[Tensor, " B"], width: int, schedule: Schedule, left_to_right: float, generator: torch.Generator
) -> Int[Tensor, "B T"]:
    """A random reveal for training: 1 … n steps in random order or, for a share of the captions, word by word from the left."""
    draws = torch.rand(2, len(length), generator=generator).to(length.device)
    noise = torch.rand(len(length), width, generator=generator).to(length.device)
    valid = valid_positions(length, width)
    from_left = draws[0] < left_to_right
    steps = torch.where(from_left, length, 1 + (draws[1] * length).long())
    rank = torch.where(from_left[:, None], reveal_ranks("left_to_right", noise, valid), reveal_ranks("random", noise, valid))
    return steps_from_ranks(rank, reveal_counts(length, steps, schedule), valid, valid)


def caption_nll(logits: Float[Tensor, "B T V"], x0: Int[Tensor, "B T"], counted: Tensor) -> Float[Tensor, " B"]:
    """Cross-entropy in nats per counted token, for each caption: the masked-diffusion bound with every token supervised in one pass."""
    nll = F.cross_entropy(logits.float().flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)
    return (nll.nan_to_num(posinf=0.0) * counted).sum(1) / counted.sum(1).clamp(min=1)
