"""Stage 2: the reward model learns from comparisons: the linear head in closed form, then the reader by gradient, and what both are worth.

Axes: n pairs, F features, M members, Q qualities, T caption length, W width, P image tokens.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.diffusion import valid_positions
from ..models.reward import FEATURES, QUALITIES, Evidence, RewardModel, davidson_logits
from ..utils.config import RewardConfig, settings_of
from ..utils.seeding import generator, seed_of
from .comparisons import Pairs
from .engine import Row
from .run import Run


@dataclass(frozen=True)
class Side:
    """What the evidence tells of one caption of each pair."""

    features: Float[Tensor, "n F"]
    hidden: Float[Tensor, "n T W"]
    valid: Tensor


@dataclass(frozen=True)
class Examined:
    """Pairs together with their evidence; everything on the CPU."""

    pairs: Pairs
    a: Side
    b: Side
    image: Float[Tensor, "n P W"]

    def __len__(self) -> int:
        return len(self.pairs)

    def some(self, rows: list[int]) -> "Examined":
        a, b = (Side(s.features[rows], s.hidden[rows], s.valid[rows]) for s in (self.a, self.b))
        return Examined(self.pairs.some(rows), a, b, self.image[rows])


@torch.no_grad()
def examine(evidence: Evidence, pairs: Pairs, shuffle: torch.Generator | None = None, chunk: int = 128) -> Examined:
    """Evidence of both sides; with `shuffle`, about another pair's image: the baseline that cannot see."""
    device = evidence.denoiser.mask.device
    rows = pairs.rows
    if shuffle is not None:
        rows = [rows[i] for i in torch.randperm(len(rows), generator=shuffle).tolist()]
    found: dict[str, list[Side]] = {"a": [], "b": []}
    images: list[Tensor] = []
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        image, joint = pairs.corpus.image(rows[part]).to(device), pairs.corpus.joint[rows[part]].to(device)
        for name, (x0, length) in (("a", pairs.a), ("b", pairs.b)):
            features, hidden, tokens = evidence.read(x0[part].to(device), length[part].to(device), image, joint)
            found[name].append(Side(features.cpu(), hidden.cpu(), valid_positions(length[part], x0.shape[1])))
        images.append(tokens.cpu())
    a, b = (Side(*(torch.cat([getattr(s, f) for s in found[name]]) for f in ("features", "hidden", "valid"))) for name in ("a", "b"))
    return Examined(pairs, a, b, torch.cat(images))


def head_of(data: Examined, count: int, made: float = 0.0) -> Examined:
    """The first `count` pairs that somebody was asked about, and as a share of them `made` ones."""
    asked = min(count, data.pairs.asked)
    return data.some([*range(asked), *range(data.pairs.asked, len(data))[: round(made * asked)]])


def targets(label: Int[Tensor, " n"], smoothing: float) -> Float[Tensor, "n 3"]:
    return F.one_hot(label, 3).float() * (1 - 1.5 * smoothing) + 0.5 * smoothing


def fit_linear(
    difference: Float[Tensor, "n F"], target: Float[Tensor, "n 3"], weight: Float[Tensor, " n"], l2: float
) -> tuple[Float[Tensor, " F"], Tensor]:
    """Ridge-regularised Bradley-Terry weights with ties, and the log tie weight: a convex problem, solved by L-BFGS in float64."""
    x, w = difference.double(), (weight / weight.sum().clamp(min=1)).double()
    beta, tie = torch.zeros(x.shape[1], dtype=torch.double, requires_grad=True), torch.zeros((), dtype=torch.double, requires_grad=True)
    solver = torch.optim.LBFGS([beta, tie], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-8)

    def closure() -> Tensor:
        solver.zero_grad()
        nll = -(davidson_logits(x @ beta, tie).log_softmax(-1) * target.double()).sum(-1)
        loss = (w * nll).sum() + l2 * beta.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(cast(Any, closure))
    return beta.detach().float(), tie.detach().float()


def fit_ensemble(reward: RewardModel, data: Examined, config: RewardConfig, smoothing: float, seed: int) -> None:
    """Set the linear head of every member: each its own resample of the images and three quarters of the features."""
    both = torch.cat([data.a.features, data.b.features])
    reward.mean.copy_(both.mean(0))
    reward.std.copy_(both.std(0).clamp(min=1e-6))
    difference = (data.a.features - data.b.features) / reward.std.cpu()
    target = targets(data.pairs.label, smoothing)
    members = member_weights(data.pairs.rows, len(reward.linear), seed) * data.pairs.weights(config.even_sources)
    for m in range(len(reward.linear)):
        chosen = torch.rand(len(FEATURES), generator=generator(seed, "member features", m)) < 0.75
        for q in range(len(QUALITIES)):
            weight = members[m] * data.pairs.reasons[:, q]
            beta, tie = fit_linear(difference * chosen, target, weight, config.l2)
            reward.linear[m, :, q] = (beta * chosen).to(reward.linear.device)
            if q == 0:
                reward.tie[m] = tie


def member_weights(rows: list[int], members: int, seed: int) -> Float[Tensor, "M n"]:
    """How often each pair is in each member's resample; pairs of an image go together."""
    index = torch.tensor(rows)
    draws = torch.poisson(torch.ones(members, int(index.max()) + 1), generator=generator(seed, "resample"))
    return draws[:, index]


def margins(model: nn.Module, data: Examined, rows: Tensor, device: torch.device) -> Float[Tensor, "M n Q"]:
    """Raw score differences a - b of every member, from one pass; `model` is the reward model, perhaps wrapped for several processes."""
    both = (torch.cat([getattr(data.a, f)[rows], getattr(data.b, f)[rows]]).to(device) for f in ("features", "hidden", "valid"))
    a, b = model(*both, data.image[rows].repeat(2, 1, 1).to(device)).chunk(2, dim=1)
    return a - b


def mean_margin(reward: RewardModel, data: Examined, chunk: int = 256) -> Float[Tensor, " n"]:
    """The ensemble's calibrated margin of the total quality, in logits."""
    with torch.no_grad():
        parts = [margins(reward, data, rows, reward.linear.device)[..., 0].mean(0).cpu() for rows in torch.arange(len(data)).split(chunk)]
    return torch.cat(parts) / reward.temperature.cpu()


def pair_nll(margin: Float[Tensor, " n"], label: Int[Tensor, " n"], tie: Tensor) -> Float[Tensor, " n"]:
    return F.cross_entropy(davidson_logits(margin, tie), label, reduction="none")


def decided_accuracy(margin: Float[Tensor, " n"], label: Int[Tensor, " n"]) -> Float[Tensor, " m"]:
    """1 or 0 for every pair on which the rater chose a side, one half where the margin is 0."""
    sided = label < 2
    return ((margin[sided] > 0) == (label[sided] == 0)).float().masked_fill(margin[sided] == 0, 0.5)


def calibrate(reward: RewardModel, data: Examined) -> None:
    """Temperature with the highest likelihood on held-out pairs that were decided."""
    reward.temperature.fill_(1.0)
    margin, label = mean_margin(reward, data), data.pairs.label
    sided = label < 2
    if not sided.any():
        return
    sign = torch.where(label[sided] == 0, 1.0, -1.0)
    grid = torch.logspace(-1.5, 1.5, 121)
    nll = -F.logsigmoid(sign * margin[sided] / grid[:, None]).mean(1)
    reward.temperature.fill_(float(grid[nll.argmin()]))


def train_reward(run: Run, evidence: Evidence, train: Examined, val: Examined, smoothing: float) -> tuple[RewardModel, Row]:
    """The ensemble with the linear head and, where it predicts held-out choices better, the reader; and how that was decided."""
    config, seed = run.config.reward, run.config.seed
    torch.manual_seed(seed_of(seed, "reward"))
    reward = RewardModel(evidence, config.members, config.reader_layers if config.reader else 0, config.pessimism).to(run.device)
    with torch.no_grad():
        fit_ensemble(reward, train, config, smoothing, seed)
    linear = held_out_losses(reward, val)  # an untrained reader adds nothing
    facts: Row = {"reader": False, "linear_val_loss": float(linear.mean()), "linear_val_accuracy": score_head(reward, val)["accuracy"]}
    if config.reader:
        best = train_reader(run, reward, train, val, smoothing)
        gain = linear - held_out_losses(reward, val)
        clear = float(gain.mean()) > 2 * standard_error(gain, val.pairs.rows)
        if not clear:
            reward.readers = nn.ModuleList()
        facts |= {"reader": clear, "reader_val_loss": best, "reader_gain": float(gain.mean())}
    return reward.eval().requires_grad_(False), facts


def standard_error(values: Float[Tensor, " n"], images: list[int]) -> float:
    """Of the mean, pairs of one image counted together: two raters' choices on a pair are not two pieces of evidence."""
    sums = torch.zeros(max(images) + 1).index_add_(0, torch.tensor(images), values - values.mean())
    return float(sums.square().sum().sqrt()) / len(values)


def train_reader(run: Run, reward: RewardModel, train: Examined, val: Examined, smoothing: float) -> float | None:
    """Train the readers on top of the linear head and leave the weights with the lowest held-out loss, which is returned."""
    config, seed = run.config.reward, run.config.seed
    state = run.state("reward", reward, config.fit, {"best_reader": {}})
    weights = member_weights(train.pairs.rows, config.members, seed) * train.pairs.weights(config.even_sources)
    target = targets(train.pairs.label, smoothing)

    def objective(model: nn.Module, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        margin = margins(model, train, rows.cpu(), run.device)  # (M, B, Q)
        logp = davidson_logits(margin, reward.tie[:, None, None]).log_softmax(-1)
        nll = -(logp * target[rows.cpu()][None, :, None].to(logp.device)).sum(-1)  # (M, B, Q)
        counted = (weights[:, rows.cpu(), None] * train.pairs.reasons[rows.cpu()][None]).to(nll.device)
        accuracy = decided_accuracy(margin[..., 0].mean(0).cpu(), train.pairs.label[rows.cpu()]).mean().nan_to_num()
        return (nll * counted).mean(), {"accuracy": accuracy}

    def best(model: nn.Module, row: Row) -> None:
        state.extra["best_reader"] = {name: value.detach().clone() for name, value in reward.readers.state_dict().items()}

    def rows_of(index: int, rows: list[int], part: slice) -> Tensor:
        return torch.tensor(rows[part])

    run.fit(
        "reward", state, config.fit, len(train), run.batches("reward", config.fit, len(train), rows_of), objective,
        evaluate=lambda model: score_head(cast(RewardModel, model), val), better=("val_loss", "min"), best=best,
        held=settings_of(run.config, "reward"),
    )  # fmt: skip
    if state.extra["best_reader"]:
        reward.readers.load_state_dict(state.extra["best_reader"])
    return state.best


def held_out_losses(reward: RewardModel, data: Examined) -> Float[Tensor, " n"]:
    """Nats of each choice, ties included, under the ensemble's mean."""
    return pair_nll(mean_margin(reward, data), data.pairs.label, reward.tie.mean().cpu())


def score_head(reward: RewardModel, data: Examined) -> dict[str, float]:
    """Held-out loss (nats per pair, ties included) and accuracy on decided pairs of the ensemble's mean."""
    accuracy = decided_accuracy(mean_margin(reward, data), data.pairs.label)
    return {"loss": float(held_out_losses(reward, data).mean()), "accuracy": float(accuracy.mean())}
