"""State in 8 and 16 bits in the C++ kernels against the eager reference: the same codes, scales and weights."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gwt_dist import Fragment, GWTAdamW
from gwt_dist.declare import Rule
from gwt_dist.kernels import choice, cpu
from simulated import Sharded
from test_kernels import results, same, train
from travel_cases import WIDE, Case, equal, rule, whole

# Cells that are short, that are the whole row, that rows join; rows shorter than a unit, vectors, nothing.
SHAPES = ((13, 97), (2, 1461), (9, 3), (8, 256), (131,), (), (3, 2, 5), (0, 4), (40, 36))
STORED = "bf16", "int8"
NOISE: dict[str, Any] = {"stochastic_rounding": True, "rounding_seed": 2**32 - 1}


@pytest.fixture(autouse=True)
def short_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rows are taken apart, and threads share one tensor."""
    monkeypatch.setattr(cpu, "CHUNK", 1000)


@pytest.mark.parametrize("state_dtype", STORED)
@pytest.mark.parametrize("recipe", ["energy", "paper", "foam"])
@pytest.mark.parametrize("level", [0, 1, 2, 3, 5, 8])
def test_codes_scales_and_weights_have_the_bits_of_the_reference(level: int, recipe: str, state_dtype: str) -> None:
    options: dict[str, Any] = {"level": level, "recipe": recipe, "state_dtype": state_dtype, "nesterov": level == 2}
    for dtype in WIDE:
        found = train("cpu", SHAPES, dtype=dtype, **options)
        same(found, train("eager", SHAPES, dtype=dtype, **options))
    assert torch.uint8 in {t.dtype for t in found} or state_dtype == "bf16"
    if level == 2:
        assert not all(map(torch.equal, found, train("cpu", SHAPES, dtype=dtype, rounding_seed=1, **options)))


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("level", [0, 1, 2, 5])
def test_weights_rounded_by_noise(level: int, state_dtype: str) -> None:
    options: dict[str, Any] = {"level": level, "recipe": "energy", "state_dtype": state_dtype, "dtype": torch.bfloat16}
    found = train("cpu", SHAPES, **options, **NOISE)
    same(found, train("eager", SHAPES, **options, **NOISE))
    assert not torch.equal(found[0], train("cpu", SHAPES, **options)[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("state_dtype", STORED)
def test_cells_that_are_not_finite_tiny_or_nothing(
    state_dtype: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for kernel in ("cpu", "eager"):
        monkeypatch.setenv(choice.VARIABLE, kernel)
        random = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(3, 1000, generator=random))
        optimizer = GWTAdamW([parameter], lr=0.01, level=2, state_dtype=state_dtype, recipe="energy")
        for _ in range(3):
            parameter.grad = torch.randn(3, 1000, generator=random)
            parameter.grad[1, 100] = value
            parameter.grad[2] *= value
            optimizer.step()
        found.append(results(optimizer))
    same(*found)


def test_twenty_steps_on_any_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    options: dict[str, Any] = {"recipe": "energy", "level": 2, "state_dtype": "int8", "exponents": [0, -3, 1, -1] * 5}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(train("cpu", SHAPES, **options))
    finally:
        torch.set_num_threads(before)
    same(*found)
    same(found[0], train("eager", SHAPES, **options))


# The first two ranks cut a row within a unit and within a cell; the last has columns of every row.
SHARDS = (
    [[(0, 1301), (0, 130)], [(1301, 1303), (130, 131)], [(1303, 6402), (131, 400)]],
    [[(0, 6402), (0, 399)], [], [(0, 0), (399, 400)]],
)
CUT: dict[str, dict[str, Any]] = {
    "energy": {"recipe": "energy", "state_dtype": "int8"},
    "paper": {"recipe": "paper", "state_dtype": "int8"},
    "foam, bf16": {"recipe": "foam", "state_dtype": "bf16"},
    "noise": {"recipe": "energy", "state_dtype": "int8", **NOISE},
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("level", [0, 1, 2, 8])
def test_cut_cells(level: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if name == "noise" else torch.float32
    weights = {"a": torch.randn(6, 1067).to(dtype), "b": torch.randn(20, 20).to(dtype)}
    worlds = []
    for shards in SHARDS:
        ranks = []
        for intervals in shards:
            offset, fragments = 5, []
            for (fqn, weight), (start, stop) in zip(weights.items(), intervals, strict=False):
                fragments.append(Fragment(fqn, tuple(weight.shape), start, stop, offset))
                offset += stop - start + 3
            ranks.append(fragments)
        worlds.append((weights, ranks))
    columns = itertools.pairwise((0, 6, 7, 519, 1067))
    rectangles = [[Fragment("a", (6, 1067), start, stop, 2, rows=6)] for start, stop in columns]
    worlds.append(({"a": weights["a"]}, rectangles))
    for tensors, ranks in worlds:
        gradients = [{fqn: torch.randn(w.shape).to(dtype) for fqn, w in tensors.items()} for _ in range(2)]
        found: list[list[Tensor]] = []
        for kernel in ("cpu", "eager"):
            monkeypatch.setenv(choice.VARIABLE, kernel)
            sharded = Sharded(tensors, ranks, lr=0.01, level=level, **CUT[name])
            for gradient in gradients:
                sharded.step(gradient)
            found.append([t for optimizer in sharded.optimizers for t in results(optimizer)])
        same(*found)


PAIRS = tuple(itertools.product(WIDE, WIDE))  # dtypes of weights and gradients


class Stored(Case):
    """A case whose momentum is stored in another format than fp32, at its third step."""

    def __init__(
        self,
        ranks: Sequence[Sequence[Fragment]],
        rank: int,
        level: int,
        its: Rule,
        landing: torch.dtype = torch.float32,
        pairs: Sequence[tuple[torch.dtype, torch.dtype]] = PAIRS,
    ) -> None:
        super().__init__(ranks, rank, level, [its], landing, 1, pairs=pairs)
        random = torch.Generator().manual_seed(0)
        for state in self.states:
            state["step"].fill_(3)
            kept = state["exp_avg"]
            codes = torch.randn(kept.shape, generator=random) * (0.05 if kept.dtype == torch.bfloat16 else 40)
            kept.copy_(codes.clamp(-127, 127))
            if "exp_avg_scale" in state:
                state["exp_avg_scale"].uniform_(0.01, 0.2, generator=random)


RANKS = [
    [Fragment("a", (6, 1067), 0, 1301, 2), Fragment("b", (20, 20), 0, 130, 1400)],
    [Fragment("a", (6, 1067), 1301, 6402, 2), Fragment("b", (20, 20), 130, 400, 5200)],
]
MATRICES = (13, 97), (2, 1461), (9, 3), (8, 256), (3, 2, 5), (40, 36)


@pytest.mark.parametrize("state_dtype", STORED)
@pytest.mark.parametrize("level", [0, 1, 2, 3, 8])
def test_momentum_that_travels(level: int, state_dtype: str) -> None:
    for landing, options in ((torch.float32, {}), (torch.bfloat16, {"nesterov": True, "detail_gain": 0.3})):
        its = rule(state_dtype=state_dtype, **options)
        equal(cpu, Stored([whole(*MATRICES)], 0, level, its, landing))
        for rank in range(2):
            equal(cpu, Stored(RANKS, rank, level, its, landing))
    equal(cpu, Stored([whole((13, 97))], 0, level, rule(state_dtype=state_dtype, nor=0.9)))


@pytest.mark.matrix
@pytest.mark.skipif(
    "GWT_TEST_ALL" not in os.environ, reason="builds a library for itself: make support has time for it"
)
def test_weights_that_take_what_came_back_are_rounded_by_noise() -> None:
    pairs = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    its = rule(state_dtype="int8", **NOISE)
    for level in (0, 2):
        equal(cpu, Stored([whole(*MATRICES)], 0, level, its, pairs=pairs))
        columns = [
            [Fragment("a", (6, 1067), start, stop, 2, rows=6)] for start, stop in ((0, 7), (7, 519), (519, 1067))
        ]
        for rank in range(3):
            equal(cpu, Stored(columns, rank, level, its, pairs=pairs))
