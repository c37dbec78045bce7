"""Side networks that learn beside a frozen LLaMA: SHERL and one after LoSA; and LoRA, to compare them with.

B sequences of T tokens, hidden states of C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput


class Sherl(nn.Module):
    """SHERL (ECCV 2024): what early layers say, less what they say twice, goes into the last frozen layer.

    Dropout is left out, so that any number of ranks takes the same steps.
    """

    late = 1  # frozen layers behind the side network, through which gradients go

    def __init__(self, width: int, layers: int, features: int = 4) -> None:
        super().__init__()
        last = layers - 1 - self.late
        features = min(features, last + 1)
        self.taken = [last - i * (last + 1) // features for i in reversed(range(features))]  # spread evenly
        half = width // 2
        self.down = nn.ModuleList(nn.Linear(width, half) for _ in self.taken)
        self.norms = nn.ModuleList(nn.LayerNorm(half) for _ in self.taken)
        self.score = nn.Linear(half, 1, bias=False)
        self.up = nn.Linear(half, width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: list[Tensor]) -> Tensor:
        """From the `[B, T, C]` of all early layers the `[B, T, C]` that the last layer reads."""
        small = [norm(down(hidden[i])) for norm, down, i in zip(self.norms, self.down, self.taken, strict=True)]
        h = torch.stack(small)  # [features, B, T, C / 2]
        guide = h[-1]
        unit = F.normalize(h, dim=-1)
        redundancy = torch.einsum("ibtc,jbtc->ijbt", unit, unit).relu().sum(1)  # at least 1: each is like itself
        weight = self.score(h * guide).squeeze(-1).relu() / redundancy
        weight = weight / weight.sum(0).clamp_min(1e-6)
        together = (weight[..., None] * h).sum(0) + guide
        return self.norm(self.up(together.relu())) + torch.tanh(self.gate / 0.1) * hidden[-1]


class Channels(nn.Module):
    """Low-rank MLP over channels, zero at the start."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` of `[B, T, C]`."""
        return self.up(F.gelu(self.down(x)))


class Tokens(nn.Module):
    """Low-rank matrix over tokens, zero at the start, of which a token sees what is before it: text has an order."""

    def __init__(self, length: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(length, rank, bias=False)
        self.up = nn.Linear(rank, length, bias=False)
        nn.init.zeros_(self.up.weight)
        self.register_buffer("one", torch.eye(length), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` of `[B, T, C]`."""
        tokens = x.shape[1]
        # Of the identity the modules make the product of their matrices; reading `.weight` would pass ZeRO-3 by.
        product = self.up(self.down(self.one))[:tokens, :tokens]  # [from, to]
        return torch.einsum("st,bsc->btc", product.triu(), x)


class Losa(nn.Module):
    """After LoSA (CVPR 2024): refined layer by layer by low-rank mixers, of channels and of tokens in turn.

    The paper's exact equation is not public; it mixes patches of images, which have no order.
    """

    late = 0

    def __init__(self, width: int, layers: int, length: int, rank: int = 8) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.mixers = nn.ModuleList(Tokens(length, rank) if i % 2 else Channels(width, rank) for i in range(layers))

    def forward(self, hidden: list[Tensor]) -> Tensor:
        """From the `[B, T, C]` of all layers the `[B, T, C]` that the head reads; at the start the last layer's."""
        y = torch.zeros_like(hidden[-1])
        for x, norm, mixer in zip(hidden, self.norms, self.mixers, strict=True):
            y = y + mixer(norm(x + y))
        return hidden[-1] + y


class SideNetwork(nn.Module):
    """A frozen LLaMA and its side network, the only part that is trained."""

    def __init__(self, backbone: LlamaForCausalLM, kind: str) -> None:
        super().__init__()
        config = backbone.config
        self.backbone = backbone.requires_grad_(False)
        self.side: Sherl | Losa
        if kind == "sherl":
            self.side = Sherl(config.hidden_size, config.num_hidden_layers)
        else:
            self.side = Losa(config.hidden_size, config.num_hidden_layers, config.max_position_embeddings)

    @property
    def blocks(self) -> list[nn.Module]:
        """What is gathered at a time."""
        return [*self.backbone.model.layers, self.side]

    @property
    def early(self) -> list[nn.Module]:
        """The layers that no gradient goes through."""
        layers = self.backbone.model.layers
        return list(layers)[: len(layers) - self.side.late]

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        """Loss, and logits `[B, T, vocabulary]`, of `[B, T]` tokens."""
        llama = self.backbone.model
        early = self.early
        hidden = []
        with torch.no_grad():
            x = llama.embed_tokens(input_ids)
            rotary = llama.rotary_emb(x, torch.arange(input_ids.shape[1], device=x.device)[None])
            for layer in early:
                x = layer(x, position_embeddings=rotary)
                hidden.append(x)
        x = self.side(hidden)
        for layer in llama.layers[len(early) :]:
            x = layer(x, position_embeddings=rotary)
        logits = self.backbone.lm_head(llama.norm(x))
        loss = self.backbone.loss_function(logits=logits, labels=labels, vocab_size=self.backbone.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


class LoRA(nn.Module):
    """A frozen Linear and a product of two thin ones beside it, zero at the start."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.lora_down = nn.Linear(base.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, rows]` of `[B, T, columns]`."""
        return self.base(x) + self.lora_up(self.lora_down(x))


def with_lora(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with adapters on queries and values, and nothing else to be trained."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))
    return model
