from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from hierarchical_diffusion_rlhf_caption_refinement.data.corpus import Corpus
from hierarchical_diffusion_rlhf_caption_refinement.data.sources import Example
from hierarchical_diffusion_rlhf_caption_refinement.data.text import build_tokenizer


def corpus(*captions: tuple[str, ...], tokenizer: Tokenizer | None = None) -> Corpus:
    examples = [Example(str(i), c) for i, c in enumerate(captions)]
    tokens = np.arange(len(captions) * 2, dtype=np.float16).reshape(-1, 2, 1)
    tokenizer = tokenizer or build_tokenizer(["a red dog runs fast"], 1)
    return Corpus(examples, tokens, torch.zeros(len(captions), 1), tokenizer, max_words=4)


def test_usable_captions_are_kept_and_every_image_keeps_one(caplog: pytest.LogCaptureFixture) -> None:
    found = corpus(("a dog", "a red dog runs fast", "a zebra", "dog red a zebra"), ("a red dog runs fast",), ("zebra",), ("...",)).captions
    a, dog, fast, red, runs = 2, 3, 4, 5, 6
    assert found == [[[a, dog], [dog, red, a, 1]], [[a, red, dog, runs]], [[1]], [[1]]] and fast == 4
    assert caplog.messages == [
        "3 of 4 images have no caption of at most 4 tokens (data.max_words), two thirds of them known: its beginning has to do"
    ]


def test_images_come_as_float32_in_the_order_asked() -> None:
    c = corpus(("a",), ("a",), ("a",))
    assert c.image([2, 0]).tolist() == [[[4.0], [5.0]], [[0.0], [1.0]]] and c.image([1]).dtype == torch.float32
    assert len(c) == 3 and c.row_of == {"0": 0, "1": 1, "2": 2}


def test_images_are_seen_as_asked_and_the_tokens_stay_as_they_are() -> None:
    c = corpus(("a",), ("a",), ("a",))
    other = replace(c, looks=(-c.tokens, 10 * c.tokens))
    assert other.image([2, 0, 1], torch.tensor([1, 0, 2])).flatten().tolist() == [-4.0, -5.0, 0.0, 1.0, 20.0, 30.0]
    assert other.image([2]).equal(c.image([2])) and other.tokens.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_captions_that_can_be_spelled_have_no_unknown_words() -> None:
    assert corpus(("ab",), tokenizer=Tokenizer(models.BPE({"a": 0, "b": 1}, []))).captions == [[[0, 1]]]
