import torch

from hierarchical_diffusion_rlhf_caption_refinement.models.layers import Block, init_weights, merge_heads, split_heads


def test_heads_come_apart_and_together_again() -> None:
    x = torch.randn(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2) and torch.equal(heads[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(heads), x)


def test_cached_rows_are_as_good_as_rows_computed_together() -> None:
    torch.manual_seed(0)
    block, x, causal = Block(8, 2, 0.0).eval(), torch.randn(3, 5, 8), torch.ones(5, 5).tril().bool().expand(3, -1, -1)
    memory = block.crossattention.remember(torch.randn(3, 4, 8))
    whole, _ = block(x, causal, memory)
    first, past = block(x[:, :2], causal[:, :2, :2], memory)
    rest, _ = block(x[:, 2:], causal[:, 2:], memory, past)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    queries, _ = block(x, causal[:, 3:], memory, queries=slice(3, None))
    torch.testing.assert_close(queries, whole[:, 3:])


def test_captions_of_one_image_share_its_memory() -> None:
    torch.manual_seed(0)
    block, image, x = Block(8, 2, 0.0).eval(), torch.randn(2, 4, 8), torch.randn(6, 3, 8)
    cross = block.crossattention
    together = cross(x, cross.remember(image))
    torch.testing.assert_close(together, cross(x, cross.remember(image.repeat_interleave(3, 0))))
    attended = [cross(x[i : i + 1], cross.remember(image[i // 3 : i // 3 + 1])) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(attended))


def test_initialisation_is_gpt2s_at_gpt2s_width() -> None:
    torch.manual_seed(0)
    block = Block(768, 12, 0.0, cross=False)
    init_weights(block, layers=12)
    assert abs(block.mlp.c_fc.weight.std().item() - 0.02) < 2e-4
    assert abs(block.attn.c_proj.weight.std().item() - 0.02 / 24**0.5) < 1e-4
    assert not block.attn.c_attn.bias.any() and (block.ln_1.weight == 1).all()
