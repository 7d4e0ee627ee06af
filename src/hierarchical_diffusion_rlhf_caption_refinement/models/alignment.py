"""CLIP: does a text fit an image? One interface for a pretrained CLIPModel and for towers trained here, and token-level credit from it.

Axes: B texts, N images, P image tokens, E joint embedding, L text tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from PIL.Image import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.config import AlignmentConfig
from .diffusion import valid_positions
from .layers import Block, init_weights
from .vision import VisionError, identity, quiet


@runtime_checkable
class Alignment(Protocol):
    """What the rest of the project asks of a CLIP."""

    def embed_images(self, tokens: Float[Tensor, "N P F"]) -> Float[Tensor, "N E"]: ...

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "B E"]: ...


class AlignmentModel(nn.Module):
    """Towers trained here: image tokens (of a frozen or a jointly trained encoder) and a small text transformer."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, image_width: int, config: AlignmentConfig) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        width = config.width
        bag = config.layers == 0  # a bag of words: no order, and a word counts by the length of its vector
        self.wte, self.wpe = nn.Embedding(tokenizer.get_vocab_size(), width), None if bag else nn.Embedding(max_length, width)
        self.h = nn.ModuleList(Block(width, config.heads, config.dropout, cross=False) for _ in range(config.layers))
        self.ln_f = nn.Identity() if bag else nn.LayerNorm(width)
        self.text_out = nn.Linear(width, config.embed)
        self.image_in = nn.LayerNorm(image_width)
        self.image_weight = nn.Linear(image_width, 1)
        self.drop = nn.Dropout(config.dropout)
        self.image_out = nn.Linear(2 * image_width, config.embed)
        init_weights(self, max(config.layers, 1))
        nn.init.xavier_uniform_(self.text_out.weight)
        nn.init.xavier_uniform_(self.image_out.weight)
        self.log_scale = nn.Parameter(torch.tensor(14.0).log())

    def embed_images(self, tokens: Float[Tensor, "N P F"]) -> Float[Tensor, "N E"]:
        """Unit vectors from the mean and an attention-weighted mean of the image tokens."""
        x = self.drop(self.image_in(tokens.to(self.wte.weight.dtype)))
        attended = (self.image_weight(x).softmax(1) * x).sum(1)
        return F.normalize(self.image_out(torch.cat([x.mean(1), attended], -1)), dim=-1)

    def read_ids(self, ids: Int[Tensor, "B L"], length: Int[Tensor, " B"]) -> tuple[Float[Tensor, "B L W"], Bool[Tensor, "B L"]]:
        """Contextual word vectors, and which of them are words."""
        valid = valid_positions(length.clamp(min=1), ids.shape[1])
        x = self.drop(self.wte(ids) + (self.wpe.weight[: ids.shape[1]] if self.wpe else 0))
        mask = valid[:, None].expand(-1, ids.shape[1], -1)
        for block in self.h:
            x, _ = block(x, mask, None)
        return self.ln_f(x), valid

    def pool(self, words: Float[Tensor, "B L W"], valid: Bool[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        return F.normalize(self.text_out((words * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)), dim=-1)

    def embed_ids(self, ids: Int[Tensor, "B L"], length: Int[Tensor, " B"]) -> Float[Tensor, "B E"]:
        return self.pool(*self.read_ids(ids, length))

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        rows = [e.ids[: self.max_length] for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        width = max([1, *map(len, rows)])
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.log_scale.device).view(len(rows), width)
        return self.embed_ids(ids, torch.tensor([len(row) for row in rows], device=ids.device))

    def logits(self, images: Float[Tensor, "N E"], texts: Float[Tensor, "B E"]) -> Float[Tensor, "N B"]:
        return self.log_scale.clamp(max=4.6).exp() * images @ texts.T


class PretrainedClip(nn.Module):
    """A Hugging Face CLIPModel behind the same interface; its image tokens are its own image embeddings (N, 1, E)."""

    def __init__(self, name: str) -> None:
        """Raises VisionError if it is not there, not a CLIP, or not whole."""
        super().__init__()
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            with quiet():
                loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
                self.tokenizer = AutoTokenizer.from_pretrained(name)
                self.processor = CLIPImageProcessorPil.from_pretrained(name)
        except (OSError, ValueError, ImportError) as error:
            raise VisionError(f"{name}: not a usable CLIPModel: {' '.join(str(error).split())[:300]}") from None
        if missing := loaded[1]["missing_keys"]:
            raise VisionError(f"{name}: not a CLIPModel: {len(missing)} weights are missing")
        self.model: Any = loaded[0].eval().requires_grad_(False)

    @cached_property
    def fingerprint(self) -> str:
        """Equal fingerprints, equal image embeddings."""
        return identity(self.model, self.model.state_dict(), self.processor)

    @torch.no_grad()
    def encode(self, images: Sequence[Image]) -> Float[Tensor, "N 1 E"]:
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        return self.model.get_image_features(pixels).pooler_output[:, None]

    def embed_images(self, tokens: Float[Tensor, "N P F"]) -> Float[Tensor, "N E"]:
        return F.normalize(tokens[:, 0].to(self.model.dtype), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        longest = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model.get_text_features(**batch).pooler_output, dim=-1)


def contrastive_loss(logits: Float[Tensor, "N B"], target: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """One direction of InfoNCE: row i belongs to column target[i]."""
    return F.cross_entropy(logits.float(), target)


def ranks(scores: Float[Tensor, "N B"], own: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """How many columns fit each row better than its own."""
    return (scores > scores.gather(1, own[:, None])).sum(1)


def text_scores(alignment: Alignment, texts: Sequence[str], image: Float[Tensor, "B E"]) -> Float[Tensor, " B"]:
    """Cosine of each text with its image; a text that occurs several times is embedded once."""
    unique = list(dict.fromkeys(texts))
    row = {text: i for i, text in enumerate(unique)}
    embedded = alignment.embed_texts(unique)
    return (embedded[[row[text] for text in texts]] * image).sum(-1).float()


_FUNCTION_WORDS = """
    a an the and or of to in on at is are am be was were with by for from as it its his her their this that there while who which
    above below left right over under beside behind near between next
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
"""Words that name nothing to see, and words of place, which CLIP cannot tell from their opposites (Yuksekgonul et al. 2023); they earn no
dense credit, and saying more of them is not saying more."""


def creditable(words: Sequence[str]) -> list[bool]:
    """Which words can earn dense credit: content words, each the first time it is said."""
    said: set[str] = set()
    able = []
    for word in (w.lower().strip(".,;:!?\"'") for w in words):
        able.append(bool(word) and word not in FUNCTION_WORDS and word not in said)
        said.add(word)
    return able


def credited_tokens(captions: Sequence[Sequence[str]], owners: Sequence[Sequence[int]], width: int) -> Bool[Tensor, "B T"]:
    """Tokens of words that can earn dense credit; `owners` gives the word of each token."""
    able = [creditable(words) for words in captions]
    rows = [[o < len(a) and a[o] for o in own][:width] for a, own in zip(able, owners, strict=True)]
    return torch.tensor([row + [False] * (width - len(row)) for row in rows])


@torch.no_grad()
def leave_one_word_out(
    alignment: Alignment, captions: Sequence[Sequence[str]], owners: Sequence[Sequence[int]], image: Float[Tensor, "B E"], width: int
) -> Float[Tensor, "B T"]:
    """Credit of each token: what the caption's CLIP score loses without the token's word, shared among the word's tokens.

    `captions` are lists of words, `owners` the word index of each token. Function words and repetitions earn 0.
    """
    texts, places = [], []
    for row, words in enumerate(captions):
        for i, able in enumerate(creditable(words)):
            if able:
                texts.append(" ".join([*words[:i], *words[i + 1 :]]))
                places.append((row, i))
    credit = torch.zeros(len(captions), width)
    if not texts:
        return credit.to(image.device)
    rows = torch.tensor([row for row, _ in places], device=image.device)
    whole = text_scores(alignment, [" ".join(words) for words in captions], image)
    drop = whole[rows] - text_scores(alignment, texts, image[rows])
    for (row, word), value in zip(places, drop.tolist(), strict=True):
        tokens = [t for t, owner in enumerate(owners[row][:width]) if owner == word]
        credit[row, tokens] = value / max(len(tokens), 1)
    return credit.to(image.device)


@torch.no_grad()
def step_potential(alignment: Alignment, drafts: Sequence[Sequence[str]], image: Float[Tensor, "B E"]) -> Float[Tensor, "B S"]:
    """CLIP score of the greedy completion before each denoising step and of the final caption; differences along S telescope."""
    steps = len(drafts[0])
    texts = [text for row in drafts for text in row]
    return text_scores(alignment, texts, image.repeat_interleave(steps, 0)).view(-1, steps)
