"""What the ranks of `test_counters.py` run: a tiny model under ZeRO, saved and loaded at other accumulations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import gwt_dist
from gwt_dist import GWTAdamW, param_groups

STEPS = 9
OPTIONS: dict[str, Any] = dict(lr=0.01, level=1, recipe="paper", targets=["0", "1"])
Sizes = tuple[int, int, int]  # ranks, accumulation, sequences of a micro-batch


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))


@cache
def batches(size: int) -> Tensor:
    """`[STEPS, size, 8]`: what each step sees, whoever shares it."""
    return torch.randn(STEPS, size, 8, generator=torch.Generator().manual_seed(size))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@cache
def through(size: int) -> list[list[Tensor]]:
    """The weights after each number of steps, of one process that takes each batch at once."""
    model = net()
    optimizer = GWTAdamW(param_groups(model, **OPTIONS))
    found = [[p.detach().clone() for p in model.parameters()]]
    for batch in batches(size):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    return found


def size_of(sizes: Sizes) -> int:
    return sizes[0] * sizes[1] * sizes[2]


def engine_of(sizes: Sizes, stage: int, **changes: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": sizes[2],
        "gradient_accumulation_steps": sizes[1],
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "GWTAdamW", "params": OPTIONS},
        **changes,
    }
    return gwt_dist.initialize(model=net(), config=config)[0]


def micro_batches(sizes: Sizes, step: int) -> Iterator[Tensor]:
    """What this rank has of a step, cut into micro-batches."""
    yield from batches(size_of(sizes))[step].view(dist.get_world_size(), sizes[1], sizes[2], 8)[dist.get_rank()]


def train(engine: Any, sizes: Sizes, steps: range) -> None:
    for step in steps:
        for micro in micro_batches(sizes, step):
            engine.backward(loss_of(engine, micro))
            engine.step()


def weights(engine: Any) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return [
        safe_get_full_fp32_param(p).detach().clone().view(getattr(p, "ds_shape", p.shape))
        for p in engine.module.parameters()
    ]


def error_of(found: list[Tensor], size: int, start: int, stop: int) -> float:
    """Largest difference to the run through, relative to how far it went from step `start` to `stop`."""
    expected, before = through(size)[stop], through(size)[start]
    moved = max(float((a - b).abs().max()) for a, b in zip(expected, before, strict=True))
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / moved


def place(folder: str, sizes: Sizes) -> Path:
    return Path(folder, "-".join(map(str, sizes)))


def save_case(folder: str, runs: list[Sizes]) -> list[float]:
    """A checkpoint after each of the first seven steps of each run; how far each is from the run through."""
    errors = []
    for i, sizes in enumerate(runs):
        engine = engine_of(sizes, 2 + i % 2)
        for step in range(7):
            train(engine, sizes, range(step, step + 1))
            gwt_dist.save(place(folder, sizes), engine, engine.optimizer, step=step + 1, random_states=False)
        errors.append(error_of(weights(engine), size_of(sizes), 0, 7))
        engine.destroy()
    return errors


def load_case(folder: str, saved: list[Sizes], runs: list[Sizes]) -> dict[tuple[Any, ...], tuple[float, list[int]]]:
    """From each saved step on, two steps on other ranks with other accumulation: how far from the run through, and
    what the engine counts then.
    """
    results = {}
    for i, sizes in enumerate(runs):
        engine = engine_of(sizes, 3 - i % 2)
        for step in range(1, 8):
            by = [one for one in saved if size_of(one) == size_of(sizes)]
            source = by[(i + step) % len(by)]
            gwt_dist.load(place(folder, source), engine, engine.optimizer, which=step)
            train(engine, sizes, range(step, step + 2))
            error = error_of(weights(engine), size_of(sizes), step, step + 2)
            results[source, sizes, step] = error, counted(engine)
        engine.destroy()
    return results


def counted(engine: Any) -> list[int]:
    return [engine.global_steps, engine.micro_steps, engine.global_samples]
