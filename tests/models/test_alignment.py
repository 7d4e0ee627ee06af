from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from hierarchical_diffusion_rlhf_caption_refinement.data.text import build_tokenizer, encode, pad
from hierarchical_diffusion_rlhf_caption_refinement.models.alignment import (
    AlignmentModel,
    PretrainedClip,
    contrastive_loss,
    creditable,
    leave_one_word_out,
    ranks,
    step_potential,
    text_scores,
)
from hierarchical_diffusion_rlhf_caption_refinement.utils.config import AlignmentConfig

WORDS = ["a", "red", "blue", "dog", "cat", "runs", "the"]


class Worth:
    """A CLIP whose score of a text is the sum of known worths of its distinct words."""

    def __init__(self, **worth: float) -> None:
        self.worth = worth
        self.asked: list[str] = []

    def embed_images(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self.asked += texts
        return torch.tensor([[sum(self.worth.get(w, 0.0) for w in set(t.split()))] for t in texts])


def test_credit_is_what_the_score_loses_without_the_word() -> None:
    clip, image = Worth(dog=0.5, red=0.2, the=9.0, runs=-0.1), torch.tensor([[1.0], [2.0]])
    captions = [["the", "red", "dog", "runs"], ["dog", "red", "dog"]]
    owners = [[0, 1, 2, 2, 3], [0, 1, 2]]  # "dog" is two tokens in the first caption
    credit = leave_one_word_out(clip, captions, owners, image, 6)
    first = [0.0, 0.2, 0.25, 0.25, -0.1, 0.0]  # function words and padding earn nothing
    second = [0.0, 0.4, 0.0, 0.0, 0.0, 0.0]  # without either "dog" the other remains; the second one earns nothing anyway
    torch.testing.assert_close(credit, torch.tensor([first, second]))
    assert "red dog runs" not in clip.asked  # the caption without "the" is not even looked at


def test_no_creditable_word_no_question() -> None:
    clip = Worth(the=1.0)
    assert not leave_one_word_out(clip, [["the", "a"], []], [[0, 1], []], torch.ones(2, 1), 3).any() and not clip.asked


def test_creditable_words_name_something_for_the_first_time() -> None:
    assert creditable(["A", "red,", "dog", "and", "the", "Dog.", "--", "!"]) == [False, True, True, False, False, False, True, False]
    places = ["a", "ring", "left", "of", "a", "cross", "above", "the", "heart"]
    assert [word for word, able in zip(places, creditable(places), strict=True) if able] == ["ring", "cross", "heart"]


def test_step_potential_scores_every_draft_against_its_own_image() -> None:
    clip, image = Worth(dog=0.5, red=0.2), torch.tensor([[1.0], [3.0]])
    phi = step_potential(clip, [["a", "a dog", "red dog"], ["red", "a", "a"]], image)
    torch.testing.assert_close(phi, torch.tensor([[0.0, 0.5, 0.7], [0.6, 0.0, 0.0]]))
    torch.testing.assert_close(phi.diff(dim=1).sum(1), phi[:, -1] - phi[:, 0])


def test_text_scores_asks_for_each_text_once() -> None:
    clip = Worth(dog=1.0, cat=2.0)
    scores = text_scores(clip, ["dog", "cat", "dog"], torch.tensor([[1.0], [1.0], [3.0]]))
    assert scores.tolist() == [1.0, 2.0, 3.0] and clip.asked == ["dog", "cat"]


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.6, 0.4, 0.3], [0.9, 0.8, 0.7]])  # own column is 1st, 2nd, 3rd
    assert ranks(scores, torch.arange(3)).tolist() == [0, 1, 2] and ranks(scores, torch.tensor([1, 1, 0])).tolist() == [2, 1, 0]


def towers(seed: int = 0) -> AlignmentModel:
    torch.manual_seed(seed)
    return AlignmentModel(build_tokenizer(WORDS, 1), 5, 4, AlignmentConfig(width=16, layers=1, heads=2, embed=8)).eval()


def test_embeddings_are_unit_vectors_whatever_the_batch_and_the_padding() -> None:
    model, texts = towers(), ["a red dog", "cat", "", "the blue cat runs a dog red"]
    together = model.embed_texts(texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    for i, text in enumerate(texts):
        torch.testing.assert_close(model.embed_texts([text])[0], together[i], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together[3], model.embed_texts(["the blue cat runs a"])[0])  # cut at max_length
    ids, length = pad(encode(model.tokenizer, texts[:2]), 5)
    torch.testing.assert_close(model.embed_ids(ids, length), together[:2], atol=1e-6, rtol=1e-5)
    image = torch.randn(3, 6, 4)
    torch.testing.assert_close(model.embed_images(image).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model.embed_images(image)[1:2], model.embed_images(image[1:2]))


def test_word_order_and_words_outside_the_vocabulary_matter() -> None:
    model = towers()
    one, two, three = model.embed_texts(["red dog", "dog red", "red zebra"])
    assert (one - two).norm() > 1e-3 and (one - three).norm() > 1e-3


def test_learns_which_text_belongs_to_which_image() -> None:
    model, texts = towers().train(), ["a red dog", "a blue dog", "the red cat", "the blue cat runs"]
    image = torch.randn(4, 3, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    ids, length = pad(encode(model.tokenizer, texts), 5)
    losses = []
    for _ in range(60):
        logits = model.logits(model.embed_images(image), model.embed_ids(ids, length))
        loss = contrastive_loss(logits, torch.arange(4)) + contrastive_loss(logits.T, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        final = model.eval().logits(model.embed_images(image), model.embed_texts(texts))
    assert losses[-1] < 0.2 * losses[0] and not ranks(final, torch.arange(4)).any() and not ranks(final.T, torch.arange(4)).any()


def save_clip(folder: Path) -> CLIPModel:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<start>", "<end>", "<unk>", *WORDS])}
    text = {**size, "vocab_size": len(vocabulary), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8}, projection_dim=8)).eval()
    clip.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", unk_token="<unk>", pad_token="<pad>")
    fast.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return clip


def test_a_pretrained_clip_behind_the_same_interface(tmp_path: Path) -> None:
    reference, clip = save_clip(tmp_path), PretrainedClip(str(tmp_path))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(3)]
    texts = ["a red dog", "the cat"]
    tokens = clip.encode(images)
    assert tokens.shape == (3, 1, 8)
    cosine = clip.embed_images(tokens) @ clip.embed_texts(texts).T
    with torch.no_grad():
        batch = clip.tokenizer(texts, padding=True, return_tensors="pt")
        expected = reference(**batch, pixel_values=clip.processor(images, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(cosine, expected.logits_per_image / reference.logit_scale.exp())
    torch.testing.assert_close(clip.embed_texts(texts[:1])[0], clip.embed_texts(texts)[0], atol=1e-6, rtol=1e-5)
    long = clip.embed_texts([" ".join(["red"] * 30)])  # longer than CLIP reads
    torch.testing.assert_close(F.cosine_similarity(long, clip.embed_texts([" ".join(["red"] * 6)])), torch.ones(1))
    assert not any(p.requires_grad for p in clip.parameters())
