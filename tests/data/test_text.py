from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hierarchical_diffusion_rlhf_caption_refinement.data.text import (
    banned_ids,
    build_tokenizer,
    contains,
    decode,
    decode_rows,
    encode,
    load_tokenizer,
    pad,
    said,
    spell,
    unknown_id,
    words_and_owners,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import ConfigError


def test_captions_survive_the_round_trip_lower_cased_and_without_punctuation() -> None:
    tokenizer = build_tokenizer(["A dog's well-known café, 2 men!", "the dog"], 1)
    (ids,) = encode(tokenizer, [" The dog's CAFÉ,  2 well-known men. "])
    assert decode(tokenizer, ids) == "the dog's café 2 well-known men"
    assert encode(tokenizer, [decode(tokenizer, ids)]) == [ids]
    assert encode(tokenizer, ["cafe\u0301"]) == encode(tokenizer, ["café"])  # however it is composed
    assert Tokenizer.from_str(tokenizer.to_str()).to_str() == tokenizer.to_str()


def test_rare_and_unknown_words() -> None:
    tokenizer = build_tokenizer(["a dog", "a cat", "a dog runs"], 2)
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__) == ["<pad>", "<unk>", "a", "dog"]
    assert encode(tokenizer, ["a zebra", "", "..."]) == [[2, 1], [], []]
    assert unknown_id(tokenizer) == 1 and banned_ids(tokenizer) == (0, 1)


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("नमस्ते, दुनिया!", ["नमस्ते", "दुनिया"]),
        ("தமிழ் நாடு", ["தமிழ்", "நாடு"]),
        ("Ca\u0301i nha\u0300 đe\u0323p", ["cái", "nhà", "đẹp"]),  # letters and their marks apart
        ("İstanbul", ["i\u0307stanbul"]),
        ("12 m² ½", ["12", "m"]),
        ("ΟΔΟΣ", ["οδοσ"]),
    ],
)
def test_words_are_the_same_to_all_who_count_look_up_and_search_them(caption: str, words: list[str]) -> None:
    tokenizer = build_tokenizer([caption], 1)
    (ids,) = encode(tokenizer, [caption])
    assert said(caption) == words == [tokenizer.id_to_token(i) for i in ids] and set(tokenizer.get_vocab()) == {"<pad>", "<unk>", *words}
    assert said(decode(tokenizer, ids)) == words and contains(said(caption), said(words[0]))
    assert spell(tokenizer, caption, True) == ids


def test_what_a_vocabulary_cannot_spell_is_named() -> None:
    tokenizer = build_tokenizer(["a red dog", "a bed"], 1)
    with pytest.raises(ConfigError, match=r"^'zed' is not among the 6 words that this model knows; near are: red, bed, "):
        spell(tokenizer, "a Zed dog", True)
    other = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "dog": 2}, unk_token="<unk>"))  # to which 🦓 is a word
    other.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"^'a 🦓' is not among the 3 words"):
        spell(other, "a 🦓", True)


def test_a_vocabulary_without_a_word_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        build_tokenizer(["a dog", "a cat"], 100_000)
    assert str(error.value) == "data.min_count=100000: none of the 3 words of the training captions occurs that often"


def test_special_tokens_cannot_be_written_by_a_caption() -> None:
    tokenizer = build_tokenizer(["pad unk a"], 1)
    assert decode(tokenizer, encode(tokenizer, ["<pad> a <unk>"])[0]) == "pad a unk"


def test_pad_and_decode_rows() -> None:
    tokenizer = build_tokenizer(["a b c"], 1)
    x0, length = pad([[2, 3, 4], [4], []], 2)
    assert x0.tolist() == [[2, 3], [4, 0], [0, 0]] and length.tolist() == [2, 1, 0]
    assert decode_rows(tokenizer, x0, length) == ["a b", "c", ""]
    assert x0.dtype == length.dtype == torch.long


def test_every_word_of_a_word_vocabulary_is_its_own() -> None:
    tokenizer = build_tokenizer(["a red dog's"], 1)
    words = words_and_owners(tokenizer)
    assert words(encode(tokenizer, ["red a dog's"])[0]) == (["red", "a", "dog's"], [0, 1, 2])
    assert words([]) == ([], [])


@pytest.fixture
def bpe() -> Tokenizer:
    """A byte-level BPE like GPT-2's, with too few merges to know any long word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["a red dog runs", "the red dog"] * 5, trainer)
    return tokenizer


def test_tokens_of_a_byte_level_vocabulary_belong_to_whole_words(bpe: Tokenizer, tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "a dog, naïve zebras"
    (ids,) = encode(tokenizer, [f" {text} "])
    words, owners = words_and_owners(tokenizer)(ids)
    assert decode(tokenizer, ids) == text and words == ["a", "dog,", "naïve", "zebras"] and len(owners) == len(ids) > 4
    assert owners == sorted(owners) and set(owners) == {0, 1, 2, 3}
    spelled = [[i for i, owner in zip(ids, owners, strict=True) if owner == w] for w in range(4)]
    assert [decode(tokenizer, part) for part in spelled] == words
    assert unknown_id(tokenizer) == -1 and banned_ids(tokenizer) == (tokenizer.token_to_id("<|endoftext|>"),)


def test_a_caption_of_blanks_has_no_words(bpe: Tokenizer) -> None:
    blank = bpe.token_to_id("Ġ")
    assert words_and_owners(bpe)([blank, blank]) == ([], [0, 0])
