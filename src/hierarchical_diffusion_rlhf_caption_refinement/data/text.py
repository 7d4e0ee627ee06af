"""Captions as token ids and back, and which word each token belongs to."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from jaxtyping import Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from ..utils.config import ConfigError

PAD, UNKNOWN_WORD = "<pad>", "<unk>"
_NORMALIZER = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
_SPLITTER = pre_tokenizers.Split(Regex(r"[^\W_]+(?:['’\-][^\W_]+)*"), "removed", invert=True)
"""What a word is, for the tokenizer and for everything else: Python's `re` would leave marks out of it, and take in ² and ½."""


def build_tokenizer(captions: Iterable[str], min_count: int) -> Tokenizer:
    """A vocabulary of the lower-cased words that occur at least `min_count` times; punctuation is dropped."""
    counts = Counter(word for caption in captions for word in said(caption))
    words = [PAD, UNKNOWN_WORD, *sorted(w for w, n in counts.items() if n >= min_count)]
    if len(words) == 2:
        raise ConfigError(f"data.min_count={min_count}: none of the {len(counts)} words of the training captions occurs that often")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=UNKNOWN_WORD))
    tokenizer.normalizer = _NORMALIZER  # type: ignore[assignment]
    tokenizer.pre_tokenizer = _SPLITTER  # type: ignore[assignment]
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """The fast tokenizer of a Hugging Face id or directory. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        return Tokenizer.from_str(AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer.to_str())
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"{name}: not a usable tokenizer: {' '.join(str(error).split())[:300]}") from None


def banned_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that no caption may contain: padding, unknown, and a pretrained tokenizer's special tokens. The first closes open ends."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return tuple(sorted(special | {i for t in (PAD, UNKNOWN_WORD) if (i := tokenizer.token_to_id(t)) is not None}))


def unknown_id(tokenizer: Tokenizer) -> int:
    """Id of a word outside the vocabulary; -1 where every word can be spelled."""
    index = tokenizer.token_to_id(UNKNOWN_WORD)
    return -1 if index is None else index


def said(text: str) -> list[str]:
    """The words of a text, lower-cased, without punctuation."""
    return [word for word, _ in _SPLITTER.pre_tokenize_str(_NORMALIZER.normalize_str(text))]


def contains(words: Sequence[str], phrase: Sequence[str]) -> bool:
    """Whether the phrase's words stand next to each other among `words`."""
    return any(list(words[i : i + len(phrase)]) == list(phrase) for i in range(len(words) - len(phrase) + 1))


def spell(tokenizer: Tokenizer, text: str, first: bool) -> list[int]:
    """Ids of a phrase at the beginning of a caption or inside it. Raises ConfigError with a word that the model does not know."""
    ids = tokenizer.encode(text.strip() if first else f" {text.strip()}", add_special_tokens=False).ids
    if unknown_id(tokenizer) in ids:
        known = sorted(tokenizer.get_vocab())
        strange = (w for w in said(text) if unknown_id(tokenizer) in tokenizer.encode(w, add_special_tokens=False).ids)
        word = next(strange, text.strip())  # another's tokenizer may lack what is no word, such as 🦓
        near = difflib.get_close_matches(word, [w for w in known if said(w) == [w]], n=3, cutoff=0.0)
        raise ConfigError(f"'{word}' is not among the {len(known)} words that this model knows; near are: {', '.join(near)}")
    if not ids:
        raise ConfigError(f"'{text}' has no word")
    return ids


def spellings(tokenizer: Tokenizer, word: str) -> list[int]:
    """Ids of the tokens that are this word alone, in any case, with or without a blank."""
    return [i for i in range(tokenizer.get_vocab_size()) if said(decode(tokenizer, [i])) == [word]]


def encode(tokenizer: Tokenizer, captions: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch([c.strip() for c in captions], add_special_tokens=False)]


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False).strip()


def decode_rows(tokenizer: Tokenizer, x0: Int[Tensor, "B T"], length: Int[Tensor, " B"]) -> list[str]:
    return [decode(tokenizer, row[:n]) for row, n in zip(x0.tolist(), length.tolist(), strict=True)]


def pad(rows: Sequence[Sequence[int]], width: int) -> tuple[Int[Tensor, "B T"], Int[Tensor, " B"]]:
    """Ids padded with 0 to `width`, and the lengths; longer rows are cut."""
    x0 = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        x0[i, : len(row[:width])] = torch.tensor(row[:width], dtype=torch.long)
    return x0, torch.tensor([len(row[:width]) for row in rows], dtype=torch.long)


def words_and_owners(tokenizer: Tokenizer) -> Callable[[Sequence[int]], tuple[list[str], list[int]]]:
    """Ids -> the blank-separated words of the decoded caption, and the index of the word that each token is part of."""

    @lru_cache(1 << 16)  # captions and drafts of an image share their beginnings
    def count(ids: tuple[int, ...]) -> int:
        return len(decode(tokenizer, ids).split())

    def words(ids: Sequence[int]) -> tuple[list[str], list[int]]:
        prefixes = (tuple(ids[: i + 1]) for i in range(len(ids)))
        return decode(tokenizer, ids).split(), [max(count(prefix) - 1, 0) for prefix in prefixes]

    return words
