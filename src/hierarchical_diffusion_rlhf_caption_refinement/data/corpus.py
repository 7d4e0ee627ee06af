"""One split of a data set as the models see it: image tokens, joint embeddings, captions as ids."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor

from .sources import Example
from .text import encode, unknown_id


@dataclass(frozen=True)
class Corpus:
    examples: list[Example]
    tokens: np.ndarray
    """(N, P, D) float16, usually memory-mapped."""
    joint: Float[Tensor, "N E"]
    """Image embeddings of the alignment model."""
    tokenizer: Tokenizer
    max_words: int
    looks: tuple[np.ndarray, ...] = ()
    """The tokens of the images seen otherwise (mirrored, cropped), for training that wants them."""

    def __len__(self) -> int:
        return len(self.examples)

    def image(self, rows: Sequence[int], look: Int[Tensor, " B"] | None = None) -> Float[Tensor, "B P D"]:
        """Tokens of these images; `look` 0 is the image itself, k the k-th of `looks`."""
        tokens = self.tokens[list(rows)]
        for i, k in enumerate([] if look is None else look.tolist()):
            if k:
                tokens[i] = self.looks[k - 1][rows[i]]
        return torch.from_numpy(tokens.astype(np.float32))

    @cached_property
    def captions(self) -> list[list[list[int]]]:
        """Ids of each image's captions, without those that are too long or more than a third unknown words; of images that have no others
        the first words of one, which a warning counts."""
        unknown = unknown_id(self.tokenizer)

        def usable(ids: list[int]) -> bool:
            return 0 < len(ids) <= self.max_words and 3 * ids.count(unknown) <= len(ids)

        rows = [encode(self.tokenizer, example.captions) for example in self.examples]
        good = [[ids for ids in row if usable(ids)] for row in rows]
        if cut := sum(not some for some in good):
            told = (
                "%d of %d images have no caption of at most %d tokens (data.max_words), two thirds of them known: its beginning has to do"
            )
            logging.getLogger(__name__).warning(told, cut, len(self), self.max_words)
        return [some or [row[0][: self.max_words] or [unknown]] for some, row in zip(good, rows, strict=True)]

    @cached_property
    def row_of(self) -> dict[str, int]:
        return {example.key: i for i, example in enumerate(self.examples)}
