"""A LLaMA of a few lines, for measurements where no other library is to be there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model. The names of the matrices are those that `gwt_dist.param_groups` looks for."""

    hidden: int
    wide: int
    layers: int
    heads: int
    vocabulary: int = 32_000


class Attention(nn.Module):
    """Causal, with rotary positions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.qkv = nn.ModuleList(nn.Linear(sizes.hidden, sizes.hidden, bias=False) for _ in range(3))
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)

    def forward(self, x_BTC: Tensor, turns: Tensor) -> Tensor:
        """`turns` are cosines and sines, (2, T, half a head)."""
        q, k, v = (project(x_BTC).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in self.qkv)
        mixed = functional.scaled_dot_product_attention(_turned(q, turns), _turned(k, turns), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    cosine, sine = turns.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


class Gated(nn.Module):
    """The MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.hidden, sizes.wide, bias=False)
        self.up = nn.Linear(sizes.hidden, sizes.wide, bias=False)
        self.down = nn.Linear(sizes.wide, sizes.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of each position."""
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and MLP."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm_attn, self.norm_mlp = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.attn, self.mlp = Attention(sizes), Gated(sizes)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """The residual stream."""
        x = x + self.attn(self.norm_attn(x), turns)
        return x + self.mlp(self.norm_mlp(x))


class Llama(nn.Module):
    """The loss of a batch."""

    def __init__(self, sizes: Sizes, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        half = sizes.hidden // sizes.heads // 2
        angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Cross-entropy of `tokens` (B, T + 1), int64, after their first."""
        x = self.embedding(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x, self.turns)
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
