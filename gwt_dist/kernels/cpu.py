"""Both phases on a CPU in C++: one pass over memory for each, many tensors in one call. See `cpu.cpp`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gwt_dist.kernels.build import load
from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.update import Rule

CHUNK = 1 << 16  # elements that a thread takes in one go: long enough to hide the taking, short enough to share out
CACHE = 1 << 21  # elements between the phases of tensors held whole: 8 MiB of fp32 gradients are still in a cache
_MOMENTS, _WRITE, _STEP = 1, 2, 3


def count(steps: list[Tensor]) -> None:
    """As `eager.count`, without a call of torch for each."""
    _module().count(steps)


def moments(work: Work, tensors: Tensors, squared_norms: Tensor) -> None:
    """As `eager.moments`."""
    _run(_MOMENTS, work, tensors, squared_norms, _NONE)


def write(work: Work, tensors: Tensors, rho: Tensor) -> None:
    """As `eager.write`."""
    _run(_WRITE, work, tensors, _NONE, rho)


def step(work: Work, tensors: Tensors) -> None:
    """As `eager.step`, the gradient read from memory once, or twice where a tensor with a limiter fits no cache."""
    _run(_STEP, work, tensors, _NONE, _NONE)


_NONE = torch.empty(0, dtype=torch.float64)
_NO_BATCHES = torch.empty((0, 4), dtype=torch.int64)


def _run(phase: int, work: Work, tensors: Tensors, squared_norms: Tensor, rho: Tensor) -> None:
    distinct = {id(rule): rule for rule in tensors.rules}
    numbers = {key: i for i, key in enumerate(distinct)}
    _module().step(
        phase,
        work.table(CHUNK),
        work.batches(CHUNK, CACHE) if phase == _STEP else _NO_BATCHES,
        tensors.weights,
        tensors.gradients,
        tensors.exp_avg,
        tensors.exp_avg_sq,
        tensors.steps,
        [_row(rule) for rule in distinct.values()],
        [numbers[id(rule)] for rule in tensors.rules],
        tensors.exchange.float(),
        squared_norms,
        rho,
        tensors.limited_norms if work.norms else [],
    )


def _row(rule: Rule) -> tuple[float, ...]:
    beta1, beta2 = rule.betas
    lr, energy, coherent = float(rule.lr), float(rule.energy), float(rule.coherent)
    numbers = lr, beta1, beta2, rule.eps, rule.weight_decay, rule.scale, float(rule.detail_gain)
    return *numbers, energy, rule.limiter, coherent


def prepare() -> None:
    """Build or load the module; raises `BuildError` if it cannot be built."""
    _module()


@cache
def _module() -> Any:
    return load("cpu")
