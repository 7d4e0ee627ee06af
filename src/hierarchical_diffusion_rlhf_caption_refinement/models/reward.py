"""RewardModel: how much people would like a caption of an image, learned from comparisons.

It stands on what is already grounded: the frozen base denoiser and the alignment model tell, per caption, how surprising it is with and
without the image and how well it and each of its words fit. A linear Bradley-Terry head reads these features; a transformer reader,
started from the denoiser's last blocks, reads caption and image themselves. Members of the ensemble differ in resample and features.
Axes: N images, B captions = N x G, T caption length, F features, M members, Q qualities (total first), W width.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.config import ConfigError
from .alignment import Alignment, creditable, credited_tokens, leave_one_word_out, text_scores
from .denoiser import DiffusionCaptionModel, bounded_length_logp, may_end
from .diffusion import revealed, valid_positions
from .layers import Block

QUALITIES = ("total", "accuracy", "fluency", "specificity")
FEATURES = (
    "mean logp", "worst logp", "mean logp blind", "worst logp blind", "mean information", "worst information",
    "total information", "length logp", "alignment", "mean word credit", "worst word credit",
    "words", "words squared", "content words", "repeated words", "doubled words",
)  # fmt: skip
BLIND = ("mean logp blind", "worst logp blind", "words", "words squared", "content words", "repeated words", "doubled words")
"""Features that do not see the image: the text-only baseline."""
BOUND = 4.0
"""Scores saturate this many base-model standard deviations from the base model's mean."""
WEAK = 1.0
"""Suspicion from which a repair takes a word back, for models that do not bring their own."""


@dataclass(frozen=True)
class Dials:
    """How much each quality counts: 1 as people's choices say, 2 once more what they say about that quality, 0 so much less."""

    accuracy: float = 1.0
    fluency: float = 1.0
    specificity: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= value <= 100 for value in astuple(self)):
            raise ConfigError("accuracy, fluency and specificity count from 0 to 100 times")

    @property
    def weights(self) -> Float[Tensor, " Q"]:
        """Of total, accuracy, fluency and specificity."""
        return torch.tensor([1.0, *(value - 1 for value in astuple(self))])


EVEN = Dials()

Words = Callable[[Sequence[int]], tuple[list[str], list[int]]]
"""Token ids -> the caption's words, and the word index of each token."""


def davidson_logits(margin: Float[Tensor, "..."], tie: Tensor) -> Float[Tensor, "... 3"]:
    """Logits of (a wins, b wins, tie) for a score margin a - b: Bradley-Terry with ties (Davidson 1970)."""
    return torch.stack([margin / 2, -margin / 2, tie.expand_as(margin)], -1)


class Reader(nn.Module):
    """Reads the caption's hidden states with cross-attention to the image; starts from the denoiser's last blocks and at score 0."""

    def __init__(self, denoiser: DiffusionCaptionModel, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in list(denoiser.h)[-layers:]).requires_grad_(True)
        width = denoiser.wte.weight.shape[1]
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(QUALITIES))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Float[Tensor, "B T W"], valid: Bool[Tensor, "B T"], image: Float[Tensor, "N P W"]) -> Float[Tensor, "B Q"]:
        longest = int(valid.sum(1).max())  # columns that are padding in every caption cost as much as words
        hidden, valid = hidden[:, :longest], valid[:, :longest]
        mask = (valid[:, None] | torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)).expand(len(valid), -1, -1)
        for block in self.blocks:
            hidden, _ = block(hidden, mask, cast(Block, block).crossattention.remember(image))
        return self.out((self.norm(hidden) * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1))


class Evidence(nn.Module):
    """The frozen models that the reward stands on, and the features they give."""

    def __init__(self, denoiser: DiffusionCaptionModel, alignment: Alignment, words: Words, reader_layers: int = 1) -> None:
        """`reader_layers`: blocks of the readers, which start from the denoiser's last ones and read what goes into these."""
        super().__init__()
        self.reader_layers = min(reader_layers, len(denoiser.h))
        self.denoiser = denoiser.requires_grad_(False)
        self.alignment = alignment.requires_grad_(False) if isinstance(alignment, nn.Module) else alignment
        self.words = words
        self.eval()

    def train(self, mode: bool = True) -> "Evidence":
        return super().train(False)  # frozen: no dropout, ever

    @torch.no_grad()
    def read(
        self, x0: Int[Tensor, "B T"], length: Int[Tensor, " B"], image: Float[Tensor, "N P I"], joint: Float[Tensor, "N E"]
    ) -> tuple[Float[Tensor, "B F"], Float[Tensor, "B T W"], Float[Tensor, "N P W"]]:
        """Features (see FEATURES; nats, cosines, counts), hidden states of the caption, and the image in the denoiser's width."""
        width, longest = x0.shape[1], int(length.max())
        logp, hidden, length_logp = (part[:, :longest] for part in self._surprise(x0, length, image, None))
        blind = self._surprise(x0, length, image, torch.zeros(len(image), dtype=torch.bool, device=image.device))[0][:, :longest]
        x0, group = x0[:, :longest], len(x0) // len(image)
        words, owners = zip(*(self.words(row[:n]) for row, n in zip(x0.tolist(), length.tolist(), strict=True)), strict=True)
        joint = joint.repeat_interleave(group, 0)
        credit = leave_one_word_out(self.alignment, words, owners, joint, x0.shape[1])
        named = credited_tokens(words, owners, x0.shape[1]).to(x0.device)
        known = valid_positions(length, longest) & self.denoiser.allowed[x0]  # others surprise equally in every caption
        features = [
            *_mean_and_worst(logp, known), *_mean_and_worst(blind, known), *_mean_and_worst(logp - blind, known),
            ((logp - blind) * known).sum(1), length_logp[:, 0], text_scores(self.alignment, [" ".join(w) for w in words], joint),
            *_mean_and_worst(credit, named), *_counts(words, x0.device),
        ]  # fmt: skip
        hidden = F.pad(hidden, (0, 0, 0, width - longest))
        return torch.stack(features, 1), hidden, self.denoiser.image_in(image.to(hidden.dtype)) + self.denoiser.image_place

    def _surprise(self, x0: Tensor, length: Tensor, image: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Nats of each token from left to right, the content stream's states for the readers, and (B, 1) nats of the length, or of END."""
        memory = self.denoiser.read_image(image, seen)
        x0, step, told = self.denoiser.from_left(x0, length)
        x0, step = (part[:, : int(revealed(step).sum(1).max())] for part in (x0, step))
        states = self.denoiser.streams(x0, step, told, memory)
        logits = self.denoiser.to_logits(states[-1], may_end(told, torch.arange(x0.shape[1], device=x0.device)))
        logp = logits.log_softmax(-1).gather(-1, x0[..., None]).squeeze(-1).clamp(min=-20.0)
        if self.denoiser.end is None:
            lengths = bounded_length_logp(memory.length_logits).repeat_interleave(len(x0) // len(image), 0)
            ending = lengths.gather(1, length[:, None] - 1)
        else:
            ending = (logp * (revealed(step) & ~valid_positions(length, x0.shape[1]))).sum(1, keepdim=True)
        return logp, states[-1 - self.reader_layers][:, : x0.shape[1]], ending


def _mean_and_worst(value: Float[Tensor, "B T"], counted: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
    mean = (value * counted).sum(1) / counted.sum(1).clamp(min=1)
    return mean, torch.where(counted, value, torch.inf).amin(1).nan_to_num(posinf=0.0)


def _counts(words: Sequence[Sequence[str]], device: torch.device) -> list[Float[Tensor, " B"]]:
    """Words, their square / 10, content words, content words said again, words doubled."""
    rows = []
    for said in words:
        n, able = len(said), creditable(said)
        content = [w for w in said if creditable([w])[0]]
        doubled = sum(a == b for a, b in pairwise(said))
        rows.append([n, n * n / 10, sum(able), len(content) - len(set(content)), doubled])
    return list(torch.tensor(rows, dtype=torch.float32, device=device).T)


class RewardModel(nn.Module):
    """An ensemble over shared evidence. Scores are in logits of the preference probability, divided by the calibrated temperature."""

    mean: Tensor
    std: Tensor
    linear: Tensor
    tie: Tensor
    temperature: Tensor
    base: Tensor

    def __init__(self, evidence: Evidence, members: int, reader_layers: int, pessimism: float, weak: float = WEAK) -> None:
        """`reader_layers` 0 leaves the linear head alone; `weak`: suspicion (nats) that few words of correct captions reach."""
        super().__init__()
        self.evidence, self.pessimism, self.weak = evidence, pessimism, weak
        self.readers = nn.ModuleList(Reader(evidence.denoiser, reader_layers) for _ in range(members if reader_layers else 0))
        self.register_buffer("mean", torch.zeros(len(FEATURES)))
        self.register_buffer("std", torch.ones(len(FEATURES)))
        self.register_buffer("linear", torch.zeros(members, len(FEATURES), len(QUALITIES)))
        self.register_buffer("tie", torch.zeros(members))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("base", torch.tensor([0.0, 1.0]))

    def forward(self, features: Float[Tensor, "B F"], hidden: Tensor, valid: Tensor, image: Tensor) -> Float[Tensor, "M B Q"]:
        """Raw score of every member and quality from the evidence; this is what training sees."""
        scores = torch.einsum("bf,mfq->mbq", (features - self.mean) / self.std, self.linear)
        if len(self.readers):
            scores = scores + torch.stack([reader(hidden, valid, image) for reader in self.readers])
        return scores

    @torch.no_grad()
    def members(self, x0: Tensor, length: Tensor, image: Tensor, joint: Tensor) -> Float[Tensor, "M B Q"]:
        features, hidden, tokens = self.evidence.read(x0, length, image, joint)
        return self(features, hidden, valid_positions(length, x0.shape[1]), tokens) / self.temperature

    @torch.no_grad()
    def score(
        self,
        x0: Int[Tensor, "B T"],
        length: Int[Tensor, " B"],
        image: Float[Tensor, "N P I"],
        joint: Float[Tensor, "N E"],
        dials: Dials = EVEN,
    ) -> Float[Tensor, " B"]:
        """The reward of RLHF: the ensemble's lower bound, centred on the base model's captions and softly bounded; 0 is the base model."""
        total = self.members(x0, length, image, joint) @ dials.weights.to(image.device)
        low = total.mean(0) - self.pessimism * total.std(0, correction=0)
        return BOUND * torch.tanh((low - self.base[0]) / self.base[1] / BOUND)

    def set_base(self, scores: Float[Tensor, "M B"]) -> None:
        """Centre and unit of `score`: mean and spread of the lower bound over the base model's captions."""
        low = scores.mean(0) - self.pessimism * scores.std(0, correction=0)
        self.base.copy_(torch.stack([low.mean(), low.std().clamp(min=1e-6)]))
