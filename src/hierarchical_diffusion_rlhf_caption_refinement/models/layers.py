"""GPT-2's block with cross-attention to an image; parameter names are those of `transformers`' GPT-2.

Axes: B captions (N images x G captions each), R rows, S cached rows, P image tokens, W width, H heads, D = W / H.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (B, H, S, D)."""


def split_heads(x: Float[Tensor, "B R W"], heads: int) -> Float[Tensor, "B H R D"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H R D"]) -> Float[Tensor, "B R W"]:
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B R W"], mask: Bool[Tensor, "B Q S"], past: KeyValue | None, queries: slice
    ) -> tuple[Float[Tensor, "B Q W"], KeyValue]:
        """Rows `queries` of x attend to the cached rows and to x's own; returns their output and x's keys and values."""
        q, k, v = (split_heads(y, self.heads) for y in self.c_attn(x).chunk(3, dim=-1))
        keys, values = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True)) if past else (k, v)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q[:, :, queries], keys, values, mask[:, None], dropout_p=p)
        return self.c_proj(merge_heads(y)), (k, v)


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_attn = nn.Linear(width, width)
        self.c_attn = nn.Linear(width, 2 * width)
        self.c_proj = nn.Linear(width, width)

    def remember(self, image: Float[Tensor, "N P W"]) -> KeyValue:
        """The image's keys and values, shared by every step and every caption of the image."""
        k, v = self.c_attn(image).chunk(2, dim=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Float[Tensor, "B R W"], memory: KeyValue) -> Float[Tensor, "B R W"]:
        keys, values = memory
        per_image = x.reshape(keys.shape[0], -1, x.shape[-1])  # (N, G R, W)
        y = F.scaled_dot_product_attention(split_heads(self.q_attn(per_image), self.heads), keys, values)
        return self.c_proj(merge_heads(y)).view_as(x)


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "... W"]) -> Float[Tensor, "... W"]:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, cross: bool = True) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads, dropout)
        if cross:
            self.ln_cross_attn, self.crossattention = nn.LayerNorm(width), CrossAttention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), MLP(width)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B R W"],
        mask: Bool[Tensor, "B Q S"],
        memory: KeyValue | None,
        past: KeyValue | None = None,
        queries: slice = slice(None),
    ) -> tuple[Float[Tensor, "B Q W"], KeyValue]:
        """New hidden states of rows `queries`, and the keys and values of all rows."""
        y, present = self.attn(self.ln_1(x), mask, past, queries)
        x = x[:, queries] + self.drop(y)
        if memory is not None:
            x = x + self.drop(self.crossattention(self.ln_cross_attn(x), memory))
        return x + self.drop(self.mlp(self.ln_2(x))), present


def init_weights(module: nn.Module, layers: int) -> None:
    """GPT-2's initialisation with 0.02 scaled to the width (it is 0.55 / sqrt(768)); residual projections divided by sqrt(2 layers)."""
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            std = 0.55 / parameter.shape[-1] ** 0.5
            nn.init.normal_(parameter, std=std / (2 * layers) ** 0.5 if name.endswith("c_proj.weight") else std)
