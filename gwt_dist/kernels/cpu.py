"""Both phases on a CPU in C++: one pass over memory for each, many tensors in one call. See `cpu.cpp`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gwt_dist.declare import Rule
from gwt_dist.kernels.build import load
from gwt_dist.kernels.work import Tensors, Work

CHUNK = 1 << 16  # elements that a thread takes in one go: long enough to hide the taking, short enough to share out
CACHE = 1 << 21  # elements between the phases of tensors held whole: 8 MiB of fp32 gradients are still in a cache
_MOMENTS, _WRITE, _STEP = 1, 2, 3


def count(steps: list[Tensor]) -> None:
    """As `eager.count`, without a call of torch for each."""
    _module().count(steps)


def phase(number: int, work: Work, tensors: Tensors, sums: list[Tensor]) -> None:
    """As `eager.phase`."""
    if number:
        _run(_WRITE, work, tensors, _NONE, sums[0])
    else:
        _run(_MOMENTS, work, tensors, sums[0], _NONE)


def step(work: Work, tensors: Tensors) -> None:
    """As `eager.step`, the gradient read from memory once, or twice where a tensor with a limiter fits no cache."""
    _run(_STEP, work, tensors, _NONE, _NONE)


_NONE = torch.empty(0, dtype=torch.float64)
_NO_BATCHES = torch.empty((0, 4), dtype=torch.int64)


def _run(what: int, work: Work, tensors: Tensors, squared_norms: Tensor, rho: Tensor) -> None:
    distinct = {id(rule): rule for rule in tensors.rules}
    numbers = {key: i for i, key in enumerate(distinct)}
    energy = float(work.program.formula == "adam_energy")
    _module().step(
        what,
        work.table(CHUNK),
        work.batches(CHUNK, CACHE) if what == _STEP else _NO_BATCHES,
        tensors.weights,
        tensors.gradients,
        tensors.state["exp_avg"],
        tensors.state["exp_avg_sq"],
        tensors.steps,
        [_row(rule, energy) for rule in distinct.values()],
        [numbers[id(rule)] for rule in tensors.rules],
        tensors.exchange.float(),
        squared_norms,
        rho,
        tensors.state["limited_norm"] if work.norms else [],
    )


def _row(rule: Rule, energy: float) -> tuple[float, ...]:
    names = "beta1", "beta2", "eps", "weight_decay", "scale", "detail_gain"
    return float(rule.lr), *(float(rule[name]) for name in names), energy, rule["limiter"], rule["coherent"]


def prepare() -> None:
    """Build or load the module; raises `BuildError` if it cannot be built."""
    _module()


@cache
def _module() -> Any:
    return load("cpu")
