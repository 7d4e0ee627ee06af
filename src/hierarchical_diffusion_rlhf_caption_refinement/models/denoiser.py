"""DiffusionCaptionModel: the logits of every caption token given the image and the tokens revealed before its step.

Two streams share all weights and run as one sequence of 2 T rows. Content rows (token embeddings) attend to content with
`step[j] <= step[i]`; query rows (mask embedding) attend to content with `step[j] < step[i]` and to themselves. One pass so gives the exact
log-probability of a whole denoising trajectory, and a revealed token's keys and values never change, so they can be cached (XLNet's two
streams; Eso-LM). Axes: B captions = N images x G, T caption length, V vocabulary, P image tokens, W width, R rows, S cached rows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from .diffusion import steps_from_left, valid_positions
from .layers import Block, KeyValue, init_weights

OPEN = 0
"""Told in place of a length: the caption is written from the left, and an end token closes it."""


class Prediction(NamedTuple):
    logits: Float[Tensor, "B T V"]
    length_logits: Float[Tensor, "N T"]
    """Entry i is the logit of i + 1 tokens."""


class ImageMemory(NamedTuple):
    layers: list[KeyValue]
    length_logits: Float[Tensor, "N T"]


@dataclass
class Cache:
    """Keys and values of the tokens revealed so far."""

    layers: list[KeyValue | None]
    valid: Bool[Tensor, "B S"]

    @classmethod
    def empty(cls, layers: int, rows: int, device: torch.device) -> "Cache":
        return cls([None] * layers, torch.zeros(rows, 0, dtype=torch.bool, device=device))


class Rows(NamedTuple):
    """Some positions of each caption, padded to the longest choice."""

    position: Int[Tensor, "B R"]
    valid: Bool[Tensor, "B R"]


class DiffusionCaptionModel(nn.Module):
    def __init__(
        self,
        vocabulary: int,
        max_length: int,
        image_tokens: int,
        image_width: int,
        *,
        width: int,
        layers: int,
        heads: int,
        dropout: float = 0.0,
        banned: tuple[int, ...] = (),
        end: int | None = None,
    ) -> None:
        """`banned`: token ids (padding, unknown) that have probability 0 everywhere; but `end`, one of them, closes captions whose length
        is not told. None: all lengths are told."""
        super().__init__()
        self.max_length, self.end = max_length, end
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
        self.remaining = nn.Embedding(max_length, width)  # tokens still to come: position and length in one
        self.mask = nn.Parameter(torch.zeros(width))
        self.untold = None if end is None else nn.Parameter(torch.zeros(width))  # in place of the tokens still to come
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        self.image_in = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, width))
        self.image_place = nn.Parameter(torch.zeros(image_tokens, width))
        self.no_image = nn.Parameter(torch.zeros(image_tokens, width))
        self.length_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, max_length))
        self.register_buffer("allowed", torch.ones(vocabulary, dtype=torch.bool), persistent=False)
        self.allowed: Tensor
        self.allowed[list(banned)] = False
        init_weights(self, layers)
        nn.init.normal_(self.mask, std=0.02)

    def read_image(
        self, image: Float[Tensor, "N P F"], seen: Bool[Tensor, " N"] | None = None, kept: Int[Tensor, "N K"] | None = None
    ) -> ImageMemory:
        """Keys, values and length logits, once per image; images with `seen` False become the learned empty image.

        Of the image tokens only those at `kept` are read, if it is given.
        """
        tokens = self.image_in(image.to(self.wte.weight.dtype)) + self.image_place
        if seen is not None:
            tokens = torch.where(seen[:, None, None], tokens, self.no_image)
        if kept is not None:
            tokens = tokens.take_along_dim(kept[..., None], 1)
        blocks: list[Block] = list(self.h)  # type: ignore[arg-type]
        return ImageMemory([b.crossattention.remember(tokens) for b in blocks], self.length_head(tokens.mean(1)).float())

    def embed(self, rows: Float[Tensor, "B R W"] | Tensor, position: Int[Tensor, "B R"], length: Int[Tensor, " B"]) -> Tensor:
        to_come = self.remaining((length[:, None] - 1 - position).clamp(min=0))
        if self.untold is not None:
            to_come = torch.where((length == OPEN)[:, None, None], self.untold, to_come)
        return self.drop(rows + self.wpe(position) + to_come)

    def to_logits(self, hidden: Float[Tensor, "B R W"], may_end: Bool[Tensor, "B R"] | None = None) -> Float[Tensor, "B R V"]:
        """`may_end`: the rows where the caption may be over; None: nowhere."""
        weight = self.wte.weight
        bias = weight.new_zeros(len(weight)).masked_fill(~self.allowed, -torch.inf)
        if self.end is None or may_end is None:
            return F.linear(self.ln_f(hidden), weight, bias).float()
        bias[self.end] = 0
        logits = F.linear(self.ln_f(hidden), weight, bias).float()
        logits[..., self.end] = logits[..., self.end].masked_fill(~may_end, -torch.inf)
        return logits

    def streams(
        self, x0: Int[Tensor, "B T"], step: Int[Tensor, "B T"], length: Int[Tensor, " B"], memory: ImageMemory | None
    ) -> list[Float[Tensor, "B R W"]]:
        """Hidden states before each block and after the last: rows 0 … T-1 content, T … 2T-1 query; after the last, query rows alone."""
        place = torch.arange(x0.shape[1], device=x0.device).expand_as(x0)
        hidden = self.embed(torch.cat([self.wte(x0), self.mask.expand(*x0.shape, -1)], 1), place.repeat(1, 2), length)
        mask = reveal_mask(step)
        states = [hidden]
        for i, block in enumerate(self.h):
            last = i == len(self.h) - 1  # nobody reads the content stream's last output
            queries = slice(x0.shape[1], None) if last else slice(None)
            hidden, _ = block(hidden, mask[:, queries], memory.layers[i] if memory else None, queries=queries)
            states.append(hidden)
        return states

    def forward(
        self,
        x0: Int[Tensor, "B T"],
        step: Int[Tensor, "B T"],
        length: Int[Tensor, " B"],
        image: Float[Tensor, "N P F"],
        seen: Bool[Tensor, " N"] | None = None,
        kept: Int[Tensor, "N K"] | None = None,
    ) -> Prediction:
        """Logits of token i given the image and every token j with `step[j] < step[i]`; captions of one image stand together.

        `length` is what the model is told; where that is OPEN, END stands among the tokens.
        """
        memory = self.read_image(image, seen, kept)
        hidden = self.streams(x0, step, length, memory)[-1]
        return Prediction(self.to_logits(hidden, may_end(length, torch.arange(x0.shape[1], device=x0.device))), memory.length_logits)

    def advance(
        self, cache: Cache, x0: Int[Tensor, "B T"], new: Rows, ask: Rows, length: Int[Tensor, " B"], memory: ImageMemory
    ) -> tuple[Float[Tensor, "B R V"], Cache]:
        """One denoising step: the tokens `new` (just revealed) enter the cache, then the logits at positions `ask`."""
        content = self.wte(x0.gather(1, new.position))
        hidden = torch.cat([content, self.mask.expand(*ask.position.shape, -1)], 1)
        hidden = self.embed(hidden, torch.cat([new.position, ask.position], 1), length)
        mask = advance_mask(cache.valid, new.valid, ask.position.shape[1])
        count, layers = new.position.shape[1], []
        for i, block in enumerate(self.h):
            past = cache.layers[i]
            hidden, (k, v) = block(hidden, mask, memory.layers[i], past)
            k, v = k[:, :, :count], v[:, :, :count]
            layers.append((torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)) if past else (k, v))
        return self.to_logits(hidden[:, count:], may_end(length, ask.position)), Cache(layers, torch.cat([cache.valid, new.valid], 1))

    def from_left(self, x0: Int[Tensor, "B T"], length: Int[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, steps and told lengths of captions written word by word from the left: with END after the last word, where there is room
        for it, if the model has learned to close captions."""
        if self.end is None:
            return x0, steps_from_left(length, x0.shape[1]), length
        return *closed(x0, length, self.end), torch.full_like(length, OPEN)


def may_end(length: Int[Tensor, " B"], position: Int[Tensor, "... R"]) -> Bool[Tensor, "B R"]:
    """Where END may stand: in captions whose length is not told, but at their beginning."""
    return (length == OPEN)[:, None] & (position > 0)


def closed(x0: Int[Tensor, "B T"], length: Int[Tensor, " B"], end: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The tokens with `end` after the last word, if T has room for it, and the steps that reveal them from the left."""
    place = torch.arange(x0.shape[1], device=x0.device)
    with_end = torch.where(place == length[:, None], end, torch.where(valid_positions(length, x0.shape[1]), x0, 0))
    return with_end, steps_from_left((length + 1).clamp(max=x0.shape[1]), x0.shape[1])


def bounded_length_logp(length_logits: Float[Tensor, "N T"], low: int = 1, high: int = 0) -> Float[Tensor, "N T"]:
    """Log-probability of 1 … T tokens, renormalised over low … high tokens (high 0: no upper bound)."""
    count = torch.arange(1, length_logits.shape[1] + 1, device=length_logits.device)
    allowed = (count >= low) & (count <= (high or length_logits.shape[1]))
    return length_logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def reveal_mask(step: Int[Tensor, "B T"]) -> Bool[Tensor, "B R R"]:
    """Who attends to whom among T content rows followed by T query rows; every row attends at least to itself."""
    by, to = step[:, :, None], step[:, None, :]
    itself = torch.eye(step.shape[1], dtype=torch.bool, device=step.device).expand(len(step), -1, -1)
    content = torch.cat([(to <= by) | itself, torch.zeros_like(itself)], 2)
    query = torch.cat([to < by, itself], 2)
    return torch.cat([content, query], 1)


def advance_mask(past: Bool[Tensor, "B S"], new: Bool[Tensor, "B R"], ask: int) -> Bool[Tensor, "B Q C"]:
    """The same for one cached step: rows are the new tokens, then `ask` queries; columns the cache, the new tokens, the queries."""
    rows = new.shape[1] + ask
    known = torch.cat([past, new], 1)[:, None].expand(-1, rows, -1)
    blank = torch.zeros(len(new), rows, ask, dtype=torch.bool, device=new.device)
    mask = torch.cat([known, blank], 2)
    mask[:, :, past.shape[1] :].diagonal(dim1=1, dim2=2).fill_(True)  # itself
    return mask
