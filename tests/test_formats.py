"""State in 8 and 16 bits: what a code holds, that rounding is unbiased, and that ranks change no bit of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gwt_dist import GWTAdamW, noise
from gwt_dist.formulas.codecs import decode, encode, round_bf16
from gwt_dist.layout import Fragment
from simulated import Sharded
from test_layout import _grid, _intervals

SHAPES = {"odd": (3, 700), "narrow": (5, 66), "even": (4, 256), "vector": (131,), "deep": (2, 3, 65)}
PRODUCTS = {"products": "fp32"}
RECIPES: dict[str, dict[str, Any]] = {
    "energy": {"recipe": "energy"},
    "foam": {"recipe": "foam"},
    "orthogonal": {"recipe": "orthogonal", **PRODUCTS},
    "muon": {"recipe": "orthogonal", "level": 0, "least_level": 0, "nesterov": True, **PRODUCTS},
    "normuon": {"recipe": "orthogonal", "nor": 0.9, **PRODUCTS},
}


@pytest.fixture(autouse=True, scope="module")
def reference() -> Iterator[None]:
    """The reference alone: compiled kernels are held equal to it elsewhere, and each would have to be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GWT_DIST_KERNEL", "eager")
        yield


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chance_of(count: int, step: int = 1) -> Tensor:
    places = torch.arange(count)
    key = noise.key(torch.tensor(float(step)), 1, 0, noise.salt(8, 4096))
    return noise.chance(noise.noise(places // 4096, places % 4096, key), 16 * (step % 2))


@pytest.mark.parametrize("form", ["bf16", "int8", "e4m4"])
def test_a_code_that_was_read_is_stored_as_it_was(form: str) -> None:
    x = gaussian((4096,)).abs() if form == "e4m4" else gaussian((4096,))
    cells = torch.arange(4096) // 64
    codes, scale = encode(form, x, chance_of(4096), cells, 64)
    stored = decode(form, codes, scale, cells)
    exact = torch.zeros(4096, dtype=torch.int64) if form != "int8" else torch.full((4096,), 1 << 15)  # half a code
    again, its_scale = encode(form, stored, exact, cells, 64)
    # A scale of e4m4 may go back by a power of two, and one of int8 by its last bit.
    assert torch.equal(again, codes) if form == "int8" else torch.equal(decode(form, again, its_scale, cells), stored)
    error = (stored - x).abs()
    if form == "int8":  # a code, half as wide at 0 as a linear one
        size = x.view(64, 64).abs().amax(1).repeat_interleave(64) / (2 * 127**2)
        assert (error <= 1.001 * size * ((127**2 + 4 * x.abs() / size).sqrt() + 2)).all()
    else:
        assert (error <= x.abs() * {"bf16": 2**-7, "e4m4": 2**-4}[form]).all()


@pytest.mark.parametrize("form", ["bf16", "int8", "e4m4"])
def test_rounding_is_unbiased(form: str) -> None:
    x = gaussian((4096,)).abs() + 0.1
    cells = torch.arange(4096) // 64
    draws = []
    for step in range(400):
        codes, scale = encode(form, x, chance_of(4096, step), cells, 64)
        draws.append(decode(form, codes, scale, cells))
    drawn = torch.stack(draws).double()
    error, spread = drawn.mean(0) - x.double(), drawn.std(0) / 20
    clamped = cells.bincount().new_tensor([int(x.view(64, 64)[i].argmax()) + 64 * i for i in range(64)])
    keep = torch.ones(4096, dtype=torch.bool)
    keep[clamped] = False  # the largest of a cell has no code above it
    error, spread = error[keep & (spread > 1e-7)], spread[keep & (spread > 1e-7)]
    assert 0.9 < (error / spread).square().mean().sqrt() < 1.1
    assert abs(error.sum() / spread.square().sum().sqrt()) < 4


def test_a_cell_of_zeros_and_one_that_is_not_finite() -> None:
    cells = torch.arange(192) // 64
    x = torch.cat([torch.zeros(64), torch.full((64,), 1e-3), torch.full((64,), 2.0)])
    x[70], x[140] = float("inf"), float("nan")
    for form in ("int8", "e4m4"):
        codes, scale = encode(form, x, chance_of(192), cells, 3)
        stored = decode(form, codes, scale, cells)
        assert (stored[:64] == 0).all()
        assert not stored[64:].isfinite().any(), "what poisons a moment is not stored as a number"
    rounded = round_bf16(torch.tensor([float("inf"), float("-inf"), float("nan")]), torch.full((3,), 0xFFFF))
    assert rounded[0] == float("inf") and rounded[1] == float("-inf") and rounded[2].isnan()


@pytest.mark.parametrize("form", ["bf16", "e4m4"])
@pytest.mark.parametrize("level", [0, 2])
def test_second_moments_reach_what_they_are_of(form: str, level: int) -> None:
    """From nothing, by steps far below a code, over every power of two in between; to nearest they would not."""
    cells = torch.arange(4096) // 64
    energy = torch.ones(4096) if level == 0 else gaussian((4096, 1 << level, 40)).square().mean(1).mean(1)
    stored, exact = torch.zeros(4096), torch.zeros(4096)
    for step in range(2000):
        codes, scale = encode(form, stored * 0.999 + energy * 0.001, chance_of(4096, step), cells, 64)
        stored, exact = decode(form, codes, scale, cells), exact * 0.999 + energy * 0.001
    assert abs((stored / exact).mean() - 1) < 0.02


def test_no_second_moment_of_a_cell_is_stored_as_zero() -> None:
    x = torch.logspace(0, -30, 64)
    codes, scale = encode("e4m4", x, chance_of(64), torch.zeros(64, dtype=torch.int64), 1)
    stored = decode("e4m4", codes, scale, torch.zeros(64, dtype=torch.int64))
    assert stored.min() == 2.0**-15


@st.composite
def worlds(draw: st.DrawFn) -> list[list[Fragment]]:
    """Who holds what of `SHAPES`: each tensor cut at random among 2 to 4 ranks in random order, some of them empty."""
    world = draw(st.integers(2, 4))
    ranks: list[list[Fragment]] = [[] for _ in range(world)]
    used = [0] * world
    for fqn, shape in SHAPES.items():
        cut = _grid if len(shape) > 1 and draw(st.integers(0, 1)) else _intervals
        for rank, fragment in zip(draw(st.permutations(range(world))), cut(draw, fqn, shape, world), strict=True):
            used[rank] += draw(st.integers(0, 2))
            ranks[rank].append(replace(fragment or Fragment(fqn, shape, 0, 0), offset=used[rank]))
            used[rank] += ranks[rank][-1].numel
    return ranks


@settings(max_examples=8)
@given(worlds(), st.integers(0, 3), st.sampled_from(sorted(RECIPES)), st.sampled_from(["bf16", "int8"]), st.booleans())
def test_ranks_change_no_bit(ranks, level, recipe, state_dtype, in_bf16) -> None:
    options = {"lr": 0.01, "level": level, **RECIPES[recipe], "state_dtype": state_dtype, "rounding_seed": 7}
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    options |= {"stochastic_rounding": True} if in_bf16 else {}
    weights = {fqn: gaussian(shape, i).to(dtype) for i, (fqn, shape) in enumerate(SHAPES.items())}
    sharded = Sharded(weights, ranks, **options)
    parameters = {fqn: torch.nn.Parameter(weight.clone()) for fqn, weight in weights.items()}
    whole = GWTAdamW(list(parameters.values()), **options)
    for step in range(3):
        gradients = {fqn: gaussian(shape, 10 * step + i).to(dtype) for i, (fqn, shape) in enumerate(SHAPES.items())}
        gradients["odd"][1] *= 1e-6
        for fqn, parameter in parameters.items():
            parameter.grad = gradients[fqn]
        whole.step()
        sharded.step(gradients)
    found = sharded.gather(SHAPES)
    for fqn, parameter in parameters.items():
        assert torch.equal(found[fqn], parameter), fqn
