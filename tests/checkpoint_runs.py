"""A small run of one process, for the tests of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import gwt_dist
from gwt_dist import GWTAdamW, param_groups
from zero_cases import Net, gradients, initial, load, options, shapes_of

Run = tuple[nn.Module, GWTAdamW]


def built(level: int = 2, recipe: str = "paper", wavelet: str = "haar", model: nn.Module | None = None) -> Run:
    model = model or Net()
    load(model, initial(shapes_of(model)))
    return model, GWTAdamW(param_groups(model, targets=["attn", "mlp"], **options(level, recipe, wavelet)))


def train(run: Run, steps: list[dict[str, Tensor]]) -> None:
    for step in steps:
        for name, gradient in step.items():
            run[0].get_parameter(name).grad = gradient.clone()
        run[1].step()


def steps() -> list[dict[str, Tensor]]:
    return list(gradients(shapes_of(Net()), 5))


def content(run: Run) -> list[Tensor]:
    """Everything that a load changes."""
    states = [value for state in run[1].state.values() for value in state.values()]
    return [t.clone() for t in [*run[0].state_dict().values(), *states]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def saved_run(folder: Path) -> Path:
    """`folder`, with the checkpoint of two steps in it."""
    run = built()
    train(run, steps()[:2])
    gwt_dist.save(folder, *run, step=2, extra={"tokens": 7})
    return folder
