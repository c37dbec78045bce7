"""Sets of tensors, and the optimizers that step on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gwt_dist import GWTAdamW

VOCABULARY = 32_000
REFERENCE = "AdamW fused"
Shapes = Sequence[tuple[int, ...]]


def layer(hidden: int, wide: int) -> list[tuple[int, int]]:
    """The seven matrices of a layer of LLaMA."""
    return [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]


def llama(layers: int, hidden: int, wide: int) -> list[tuple[int, ...]]:
    """All parameters of a LLaMA."""
    norms = [(hidden,), (hidden,)]
    return [(VOCABULARY, hidden), *[*layer(hidden, wide), *norms] * layers, (hidden,), (VOCABULARY, hidden)]


@dataclass(frozen=True, slots=True)
class Tensors:
    """One set of tensors."""

    name: str
    shapes: Shapes
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


SETS = (
    Tensors("LLaMA-60M, 56 matrices", layer(512, 1376) * 8),
    Tensors("16 x 4096x4096", [(4096, 4096)] * 16),
    Tensors("1000 x 64x64", [(64, 64)] * 1000),
    Tensors("4 x 4096x5461", [(4096, 5461)] * 4),
    Tensors("1 x 4096x4096", [(4096, 4096)]),
    Tensors("LLaMA-1B", llama(24, 2048, 5461), (torch.bfloat16,)),
)
TINY = (Tensors("3 matrices and a vector", [(16, 24), (16, 24), (8, 43), (24,)]),)


class Several:
    """Optimizers that step one after the other, as Muon with AdamW for what are no hidden matrices."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def state(self) -> dict[Tensor, Any]:
        """Those of all."""
        return {parameter: its for part in self.parts for parameter, its in part.state.items()}

    def step(self) -> None:
        """A step of each."""
        for part in self.parts:
            part.step()


@dataclass(frozen=True, slots=True)
class Contender:
    """One optimizer, and how often a step reads the gradient and the state; 0 where memory is not what it waits for."""

    name: str
    make: Callable[[list[nn.Parameter]], Any]
    passes: int = 0
    package: str = ""  # that it comes with
    on: str = ""  # the one set that it is measured on, as its first step takes long; else all

    @property
    def installed(self) -> bool:
        """Whether it is here."""
        return not self.package or importlib.util.find_spec(self.package) is not None

    def traffic(self, elements: int, size: int, state: int) -> int:
        """Bytes that a step has to move: weights and state there and back, and what later passes read again."""
        return (2 + self.passes) * size * elements + (1 + self.passes) * state


def divided(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices; embeddings, heads and vectors."""
    hidden, rest = [], []
    for parameter in parameters:
        (hidden if parameter.dim() == 2 and parameter.shape[0] < VOCABULARY else rest).append(parameter)
    return hidden, rest


def ours(recipe: str, level: int, state_dtype: str = "fp32") -> Callable[[list[nn.Parameter]], GWTAdamW]:
    """A recipe at a level for hidden matrices, AdamW's update for the others; moments of all in one format."""

    def make(parameters: list[nn.Parameter]) -> GWTAdamW:
        hidden, rest = divided(parameters)
        groups = [{"params": hidden, "level": level, "recipe": recipe}]
        groups += [{"params": rest, "level": 0}] if rest else []
        return GWTAdamW(groups, lr=1e-4, weight_decay=0.01, state_dtype=state_dtype)

    return make


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """torch's, fused."""
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)


def muon(parameters: list[nn.Parameter]) -> torch.optim.Optimizer | Several:
    """torch's, with AdamW for what it does not take."""
    hidden, rest = divided(parameters)
    its = torch.optim.Muon(hidden, lr=1e-4)
    return Several(its, adamw(rest)) if rest else its


def _torchao(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-4)


def _bitsandbytes(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, lr=1e-4)
    return optimizer


def _galore(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    hidden, rest = divided(parameters)
    projected = {"params": hidden, "rank": 512, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([projected, {"params": rest}] if rest else [projected], lr=1e-4, no_deprecation_warning=True)


CONTENDERS = (
    Contender(REFERENCE, adamw, passes=1),
    *(Contender(f"energy-{level}", ours("energy", level), passes=1) for level in (1, 2, 3, 4)),
    Contender("paper-2", ours("paper", 2), passes=2),
    *(Contender(f"orthogonal-{level}", ours("orthogonal", level)) for level in (1, 3)),
    *(
        Contender(f"{recipe}-{level}, {form}", ours(recipe, level, form), passes=passes)
        for recipe, level, passes in (("energy", 2, 1), ("orthogonal", 1, 0))
        for form in ("bf16", "int8")
    ),
    Contender("torch.optim.Muon", muon),
    Contender("torchao AdamW8bit", _torchao, passes=1, package="torchao", on="16 x 4096x4096"),
    Contender("bitsandbytes AdamW8bit", _bitsandbytes, passes=1, package="bitsandbytes", on="16 x 4096x4096"),
    Contender("GaLore, rank 512", _galore, package="galore_torch", on="1 x 4096x4096"),
)


def bytes_of(state: Any) -> int:
    """Of all tensors in an optimizer's state, those within tensors of another class included."""
    if isinstance(state, Tensor):
        inner = getattr(state, "__tensor_flatten__", None)
        if inner is not None:
            return sum(bytes_of(getattr(state, name)) for name in inner()[0])
        return state.numel() * state.element_size()
    return sum(map(bytes_of, state.values())) if isinstance(state, dict) else 0
