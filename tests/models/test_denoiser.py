from collections.abc import Callable

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hierarchical_diffusion_rlhf_caption_refinement.models.denoiser import (
    DiffusionCaptionModel,
    advance_mask,
    bounded_length_logp,
    reveal_mask,
)
from hierarchical_diffusion_rlhf_caption_refinement.models.diffusion import HIDDEN, training_steps

Toy = Callable[..., DiffusionCaptionModel]


def load_gpt2(model: DiffusionCaptionModel, gpt2: GPT2LMHeadModel) -> set[str]:
    """Copy GPT-2's weights by their own names (its Conv1D weights are transposed); returns the names that GPT-2 does not have."""
    own, theirs = model.state_dict(), gpt2.transformer.state_dict()
    for name, value in theirs.items():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert own[name].shape == (value.T if linear else value).shape, name
        own[name].copy_(value.T if linear else value)
    return set(own) - set(theirs)


def test_the_content_stream_is_gpt2() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=6, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model = DiffusionCaptionModel(13, 6, 1, 1, width=16, layers=3, heads=2).eval()
    extra = load_gpt2(model, gpt2)
    parts = ("remaining", "mask", "image_in", "image_place", "no_image", "length_head")
    assert all(name.startswith(parts) or "cross" in name for name in extra)
    model.remaining.weight.data.zero_()

    x0, length = torch.randint(13, (4, 6)), torch.full((4,), 6)
    step = torch.arange(6).expand(4, -1)
    with torch.no_grad():
        expected = gpt2(x0, output_hidden_states=True)
        states = model.streams(x0, step, length, None)
        last, _ = model.h[-1](states[-2][:, :6], reveal_mask(step)[:, :6, :6], None)
        for ours, theirs in zip([s[:, :6] for s in states[:-1]], expected.hidden_states[:-1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.ln_f(last), expected.hidden_states[-1], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.to_logits(last), expected.logits, atol=1e-5, rtol=0)


def test_a_token_sees_earlier_steps_and_neither_its_own_nor_later_ones(toy: Toy) -> None:
    model, image = toy(max_length=6), torch.randn(1, 3, 4)
    x0, length = torch.tensor([[2, 3, 4, 5, 6, 2]]), torch.tensor([6])
    step = torch.tensor([[2, 0, 1, 2, 3, 1]])
    before = model(x0, step, length, image).logits
    for position in range(6):
        changed = x0.clone()
        changed[0, position] = 2 + (x0[0, position] - 1) % 5
        moved = (model(changed, step, length, image).logits - before)[0, :, 2:].abs().amax(-1) > 1e-5
        assert torch.equal(moved, step[0] > step[0, position])


def test_logits_depend_on_place_length_and_image(toy: Toy) -> None:
    model, image = toy(), torch.randn(1, 3, 4)
    x0, step, length = torch.full((1, 4), 2), torch.ones(1, 4, dtype=torch.long), torch.tensor([4])
    logits = model(x0, step, length, image).logits
    assert (logits[0, 0] - logits[0, 1])[2:].abs().max() > 1e-3
    assert (logits - model(x0, step, torch.tensor([5]), image).logits)[..., 2:].abs().max() > 1e-3
    other = model(x0, step, length, torch.randn(1, 3, 4))
    assert (logits - other.logits)[..., 2:].abs().max() > 1e-3
    assert (other.length_logits - model(x0, step, length, image).length_logits).abs().max() > 1e-3


def test_an_image_that_is_not_seen_has_no_influence(toy: Toy) -> None:
    model, image = toy(), torch.randn(2, 3, 4)
    x0, step, length = torch.full((2, 4), 2), torch.ones(2, 4, dtype=torch.long), torch.tensor([4, 4])
    half = model(x0, step, length, image, torch.tensor([True, False]))
    torch.testing.assert_close(half.logits[0], model(x0, step, length, image).logits[0])
    none = model(x0, step, length, torch.randn(2, 3, 4), torch.tensor([False, False]))
    torch.testing.assert_close(half.logits[1], none.logits[0])
    torch.testing.assert_close(half.length_logits[1], none.length_logits[0])


def test_banned_words_have_probability_zero(toy: Toy) -> None:
    x0 = torch.full((1, 4), 2)
    logp = toy()(x0, torch.ones_like(x0), torch.tensor([4]), torch.randn(1, 3, 4)).logits.log_softmax(-1)
    assert (logp[..., :2].exp() == 0).all() and logp[..., 2:].isfinite().all()


def test_neither_the_batch_nor_padding_changes_a_caption(toy: Toy) -> None:
    model, image = toy(max_length=8), torch.randn(3, 3, 4)
    length = torch.tensor([5, 2, 3, 5, 1, 4])  # two captions of each image
    x0 = torch.randint(2, 7, (6, 5))
    step = training_steps(length, 5, "linear", 0.3, torch.Generator().manual_seed(1))
    together = model(x0, step, length, image)
    for i, n in enumerate(length.tolist()):
        alone = model(x0[i : i + 1, :n], step[i : i + 1, :n], length[i : i + 1], image[i // 2 : i // 2 + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[i, :n], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.length_logits[0], together.length_logits[i // 2], atol=1e-5, rtol=1e-5)
    junk = torch.where(step == HIDDEN, 6 - x0.clamp(max=4), x0)
    wide = torch.nn.functional.pad(junk, (0, 3), value=3), torch.nn.functional.pad(step, (0, 3), value=HIDDEN)
    real = step != HIDDEN
    torch.testing.assert_close(model(*wide, length, image).logits[:, :5][real], together.logits[real], atol=1e-5, rtol=1e-5)


def test_reveal_mask_by_hand() -> None:
    mask = reveal_mask(torch.tensor([[1, 0, 1]]))[0].int().tolist()
    assert mask == [
        [1, 1, 1, 0, 0, 0],  # content sees its own step and earlier ones
        [0, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],  # queries see earlier steps and themselves
        [0, 0, 0, 0, 1, 0],
        [0, 1, 0, 0, 0, 1],
    ]


def test_advance_mask_by_hand() -> None:
    mask = advance_mask(torch.tensor([[True, False]]), torch.tensor([[True, False]]), 1)[0].int().tolist()
    assert mask == [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 0, 1]]


def test_bounded_lengths_are_renormalised() -> None:
    logits = torch.randn(3, 6)
    torch.testing.assert_close(bounded_length_logp(logits), logits.log_softmax(-1))
    p = bounded_length_logp(logits, 2, 4).exp()
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    assert (p[:, [0, 4, 5]] == 0).all()
    torch.testing.assert_close(p[:, 1] / p[:, 3], (logits[:, 1] - logits[:, 3]).exp())


@pytest.mark.parametrize("left_to_right", [0.0, 1.0])
def test_learns_captions_by_heart(left_to_right: float) -> None:
    torch.manual_seed(0)
    model = DiffusionCaptionModel(9, 4, 2, 4, width=32, layers=2, heads=2, banned=(0, 1))
    x0, length, image = torch.randint(2, 9, (6, 4)), torch.full((6,), 4), torch.randn(6, 2, 4)
    optimizer, g, losses = torch.optim.Adam(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0), []
    for _ in range(80):
        logits = model(x0, training_steps(length, 4, "cosine", left_to_right, g), length, image).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x0.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
