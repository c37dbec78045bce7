"""Trajectories whose bits were recorded at commit 8685465, before a recipe became a declaration: `test_trajectories`.

``python tests/trajectories.py FOLDER`` records them with whichever `gwt_dist` is imported, `checkpoints` included.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from gwt_dist import GWTAdamW, save

RECIPES, LEVELS = ("paper", "energy", "orthogonal"), (0, 1, 2, 3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
SHAPES = ((7, 13), (5, 21), (3, 2, 5), (9,), (16, 8))  # ragged, of three dimensions, a vector, even
STEPS = 7
FIELDS = ("exp_avg", "exp_avg_sq", "limited_norm")


def cases() -> Iterator[tuple[str, int, str]]:
    """Recipe, level and name of a dtype."""
    return product(RECIPES, LEVELS, DTYPES)


def in_one_order(u_RC: Tensor) -> Tensor:
    """Muon's iteration on ``[R, C]``, or a stack of them, in single additions and multiplications.

    A library's matrix product has other bits on every processor.
    """
    if u_RC.dim() > 2:
        return torch.stack([in_one_order(u) if u.any() else u for u in u_RC])

    def times(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros(x.shape[0], y.shape[1], dtype=x.dtype)
        for k in range(x.shape[1]):
            total = total + x[:, k : k + 1] * y[k : k + 1, :]
        return total

    total = torch.zeros((), dtype=u_RC.dtype)
    for value in u_RC.flatten():
        total = total + value * value
    x = u_RC / (total.sqrt() + 1e-7)
    for _ in range(5):
        gram = times(x, x.T)
        x = 3.4445 * x + times(-4.7750 * gram + 2.0315 * times(gram, gram), x)
    return x


def drawn(shape: torch.Size | tuple[int, ...], random: torch.Generator) -> Tensor:
    """Numbers from -4 to 4; those of ``torch.randn`` differ between instruction sets."""
    return torch.randint(-(1 << 15), 1 << 15, tuple(shape), generator=random) / 2.0**13


def recorded(recipe: str) -> dict[str, Any]:
    """Keys of a recipe as they were then unless they were said."""
    gain = None if recipe == "paper" else "coherence"
    return {"recipe": recipe, "scale": 0.25, "detail_gain": gain, "nesterov": False}


def trajectory(recipe: str, level: int, dtype: torch.dtype, iteration: str) -> dict[str, Tensor]:
    """Weights and state after `STEPS` steps; `iteration` is where the matrix iteration is looked up."""
    random = torch.Generator().manual_seed(level)
    weights = [torch.nn.Parameter(drawn(shape, random).to(dtype)) for shape in SHAPES]
    optimizer = GWTAdamW(weights, lr=0.013, weight_decay=0.1, betas=(0.9, 0.99), level=level, **recorded(recipe))
    with patch(iteration, in_one_order):
        for step in range(STEPS):
            for weight in weights:
                # Growing and shrinking, so that limiters act and gradients are steady and not.
                gradient = drawn(weight.shape, random) * 3.0 ** (step % 4) + step / 2
                weight.grad = gradient.to(dtype)
            optimizer.step()
    found = {}
    for i, weight in enumerate(weights):
        found[f"weight{i}"] = weight.detach()
        found |= {f"{name}{i}": optimizer.state[weight][name] for name in FIELDS if name in optimizer.state[weight]}
    return found


def bits(tensor: Tensor) -> np.ndarray:
    """Its bits as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()]).numpy()


class Model(torch.nn.Module):
    """Matrices that no unit divides, a vector, a table at level 0."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.table = torch.nn.Embedding(5, 6)
        self.attn = torch.nn.Linear(6, 13)
        self.mlp = torch.nn.Linear(13, 7, bias=False)
        for parameter in self.parameters():
            parameter.data = drawn(parameter.shape, random)


def trained(recipe: str, steps: int = STEPS) -> tuple[Model, GWTAdamW]:
    """A model and its optimizer after so many steps; after none with the keys of a recipe as they are today."""
    model = Model()
    parameters = dict(model.named_parameters())
    matrices = [parameters.pop("attn.weight"), parameters.pop("mlp.weight")]
    groups = [{"params": matrices, "level": 2}, {"params": list(parameters.values()), "level": 0}]
    optimizer = GWTAdamW(groups, lr=0.01, weight_decay=0.1, **(recorded(recipe) if steps else {"recipe": recipe}))
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = drawn(parameter.shape, random)
        optimizer.step()
    return model, optimizer


def content(model: Model, optimizer: GWTAdamW) -> dict[str, Tensor]:
    """Weights and state by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[f"{name}.weight"] = parameter.detach()
        found |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return found


def record(folder: Path, iteration: str) -> None:
    """Write everything into `folder`."""
    found = {}
    for recipe, level, name in cases():
        its = trajectory(recipe, level, DTYPES[name], iteration)
        found |= {f"{recipe}/{level}/{name}/{key}": bits(value) for key, value in its.items()}
    np.savez_compressed(folder / "trajectories.npz", **found)
    for recipe in RECIPES:
        model, optimizer = trained(recipe)
        save(folder / f"version-1-{recipe}", model, optimizer, step=STEPS, extra={"recipe": recipe})
        np.savez_compressed(
            folder / f"version-1-{recipe}.npz", **{k: v.numpy() for k, v in content(model, optimizer).items()}
        )


if __name__ == "__main__":
    record(Path(sys.argv[1]), "gwt_dist.rounds.newton_schulz")
