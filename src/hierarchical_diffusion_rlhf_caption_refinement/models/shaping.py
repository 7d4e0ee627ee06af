"""HierarchicalRewardShaper: R(t) = alpha(c) R_dense(t) + (1 - alpha(c)) R_sparse, as advantages per token.

A pure function of detached tensors: no parameters, no state. Axes: B captions = N images x G (captions of an image stand together),
T caption length, K denoising steps.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..utils.config import ShapingConfig
from .diffusion import revealed


@dataclass(frozen=True)
class Dense:
    """Token-level CLIP credit of sampled captions, in cosine units."""

    token: Float[Tensor, "B T"]
    """Credit of each token alone."""
    per_step: Float[Tensor, "B K"]
    """Credit of each denoising step: of its tokens together."""
    credited: Bool[Tensor, "B T"]
    """Tokens that can earn dense credit at all."""
    potential: Float[Tensor, "B S"] | None = None
    """Phi before each step and at the end (S = K + 1), for potential-based credit."""


@dataclass(frozen=True)
class Scales:
    """Running root-mean-squares of the centred rewards; what makes the two kinds comparable before they are mixed."""

    dense: float
    sparse: float


@dataclass(frozen=True)
class Shaped:
    advantage: Float[Tensor, "B T"]
    alpha: Float[Tensor, "B T"]
    dense: Float[Tensor, "B T"]
    """The dense part, alpha included."""
    sparse: Float[Tensor, "B T"]
    length: Float[Tensor, " B"]
    """Advantage of the choice of length: a sequence-level decision, so the sparse reward's alone."""


def dense_from_words(credit: Float[Tensor, "B T"], credited: Bool[Tensor, "B T"], step: Int[Tensor, "B T"], steps: int) -> Dense:
    """Leave-one-word-out credit, and its sums per step."""
    return Dense(credit, _sum_by_step(credit, step, steps), credited)


def dense_from_potential(potential: Float[Tensor, "B S"], credited: Bool[Tensor, "B T"], step: Int[Tensor, "B T"]) -> Dense:
    """Tokens revealed at step k earn Phi_k - Phi_(k-1); the differences telescope."""
    gain = potential.diff(dim=1)  # (B, K)
    own = gain.gather(1, (step - 1).clamp(0, gain.shape[1] - 1))
    return Dense(own * credited, gain, credited, potential)


def dense_from_caption(score: Float[Tensor, " B"], step: Int[Tensor, "B T"], steps: int) -> Dense:
    """Every written token earns the whole caption's score. It comes after the last step: to go is the score less the group's mean."""
    written = revealed(step)
    per_step = torch.zeros(len(score), steps, device=score.device)
    per_step[:, -1] = score
    return Dense(score[:, None] * written, per_step, written)


def dealt_out(z: Float[Tensor, "B T"], written: Bool[Tensor, "B T"], generator: torch.Generator) -> Float[Tensor, "B T"]:
    """The values of written tokens in random places: what they were is kept, whose they were is lost."""
    values, order = z[written], torch.randperm(int(written.sum()), generator=generator)
    return z.masked_scatter(written, values[order.to(z.device)])


def log_odds(confidence: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return torch.logit(confidence.clamp(1e-4, 1 - 1e-4))


def _sum_by_step(value: Float[Tensor, "B T"], step: Int[Tensor, "B T"], steps: int) -> Float[Tensor, "B K"]:
    return torch.zeros(len(value), steps, device=value.device).scatter_add(1, (step - 1).clamp(0, steps - 1), value * revealed(step))


def centre(x: Float[Tensor, "B ..."], group: int) -> Float[Tensor, "B ..."]:
    """Subtract the mean of the G captions of each image."""
    grouped = x.unflatten(0, (-1, group))
    return (grouped - grouped.mean(1, keepdim=True)).flatten(0, 1)


def centred_dense(dense: Dense, step: Int[Tensor, "B T"], group: int, credit: str) -> Float[Tensor, "B T"]:
    """Dense credit of each token less what the group earns on average; exactly 0 where a token cannot earn any."""
    if credit == "local":
        token, weight = (x.unflatten(0, (-1, group)) for x in (dense.token, dense.credited.float()))
        mean = (token * weight).sum((1, 2), keepdim=True) / weight.sum((1, 2), keepdim=True).clamp(min=1)
        return ((token - mean) * weight).flatten(0, 1)
    to_go = centre(dense.per_step.flip(1).cumsum(1).flip(1), group)  # (B, K): this step's credit and all later steps'
    return to_go.gather(1, (step - 1).clamp(0, to_go.shape[1] - 1))


@dataclass(frozen=True)
class HierarchicalRewardShaper:
    config: ShapingConfig

    @property
    def weight(self) -> float:
        """w_clip = clip_weight / (clip_weight + preference_weight)."""
        return self.config.clip_weight / (self.config.clip_weight + self.config.preference_weight)

    def alpha(self, z: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """alpha(c) = sigmoid(logit(w_clip) - kappa z(c)), bounded when both weights are positive; z is the standardised confidence."""
        if self.weight in (0.0, 1.0):
            return torch.full_like(z, self.weight)
        logit = math.log(self.weight / (1 - self.weight))
        return torch.sigmoid(logit - self.config.kappa * z).clamp(self.config.alpha_min, self.config.alpha_max)

    def squares(self, dense: Dense, sparse: Float[Tensor, " B"], step: Int[Tensor, "B T"], group: int) -> tuple[Tensor, Tensor]:
        """Mean squares of this batch's centred rewards, for the running scales."""
        d = centred_dense(dense, step, group, self.config.credit)
        return d[dense.credited].square().mean().nan_to_num(), centre(sparse, group).square().mean()

    def trust(self, progress: float) -> float:
        """What is left of alpha after this share of the training."""
        return max(0.0, 1 - progress / self.config.fade) if self.config.fade else 1.0

    def __call__(
        self,
        dense: Dense,
        sparse: Float[Tensor, " B"],
        z: Float[Tensor, "B T"],
        step: Int[Tensor, "B T"],
        group: int,
        scales: Scales,
        trust: float = 1.0,
    ) -> Shaped:
        """Normalise each reward on its own, mix them by alpha (times `trust`), place the credit."""
        written = revealed(step)
        alpha = trust * self.alpha(z) * written
        whole = centre(sparse, group) / max(scales.sparse, 1e-8)
        s = whole[:, None] * written
        if self.config.credit == "potential" and self.weight > 0:
            d, s_part = self._potential(dense, alpha, step, group, scales) * written, s
        else:
            d = alpha * centred_dense(dense, step, group, self.config.credit) / max(scales.dense, 1e-8) * written
            s_part = (1 - alpha) * s
        return Shaped(d + s_part, alpha, d, s_part, whole * float(self.config.preference_weight > 0))

    def _potential(self, dense: Dense, alpha: Tensor, step: Int[Tensor, "B T"], group: int, scales: Scales) -> Float[Tensor, "B T"]:
        """Credit to go of F_k = (alpha Phi)_k - (alpha Phi)_(k-1) with Phi = 0 at the end: minus alpha Phi of the state each token was
        drawn in. It cannot move the optimum (Ng et al. 1999); CLIP acts as a baseline."""
        assert dense.potential is not None
        steps = dense.per_step.shape[1]
        count = _sum_by_step(torch.ones_like(alpha), step, steps)
        state_alpha = _sum_by_step(alpha, step, steps) / count.clamp(min=1)  # mean over the tokens drawn in the state
        value = centre(state_alpha * dense.potential[:, :-1], group) / max(scales.dense, 1e-8)
        return -value.gather(1, (step - 1).clamp(0, steps - 1))
