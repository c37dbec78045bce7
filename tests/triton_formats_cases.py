"""Cases for `test_formats_triton.py` that run where Triton interprets its kernels, or on a GPU; see `triton_cases`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import test_formats
import travel_cases
from gwt_dist.declare import Rule
from gwt_dist.kernels import triton
from gwt_dist.layout import Fragment
from simulated import Sharded
from triton_cases import ENERGY, FOAM, PAPER, SLOW, interpreter, kernel, rule, run_both, same

WIDE = torch.float32, torch.bfloat16
NESTEROV: dict[str, Any] = {"recipe": "energy", "nesterov": True}
# Rows with short cells, rows of whole cells and of whole units that go on one in another, rows shorter than a unit, and
# a vector.
FEW = (2, 97), (2, 512), (4, 24), (3, 3), (70,)
MANY = *FEW, (5, 65), (33, 1000), (3, 42001), (64, 1024), (70, 48), (7,), (300, 1)
# Of `test_formats`, smaller ones.
CUT = {"odd": (2, 300), "narrow": (3, 66), "vector": (131,), "even": (2, 128)}


@contextmanager
def running(device: str) -> Iterator[None]:
    """On the CPU interpreted. Threads of ranks have numpy's own mind about infinities, so warnings are no errors."""
    if device != "cpu":
        yield
        return
    with interpreter(), warnings.catch_warnings():
        yield


def equal_to_eager(
    state_dtype: str,
    levels: tuple[int, ...],
    recipes: tuple[dict[str, Any], ...] = (ENERGY, PAPER, NESTEROV, FOAM),
    sizes: tuple[float, ...] = (1.0,),
    device: str = "cpu",
) -> None:
    """Two steps of whole tensors with one recipe a level; bf16 weights are rounded by noise, others cannot be."""
    shapes = MANY if device == "cuda" else FEW
    with running(device):
        for level in levels:
            its = recipes if device == "cuda" else (recipes[level % len(recipes)],)
            for weight in WIDE if device == "cuda" else (WIDE[level % 2],):
                tensors = [(shape, weight, WIDE[i % 2], i == 0) for i, shape in enumerate(shapes)]
                for size in sizes:
                    rules = [noisy(state_dtype, weight == torch.bfloat16, recipe) for recipe in its]
                    for each in rules:
                        run_both("triton", tensors, [each], level, size, triton.CHUNK, level, device)


def equal_to_eager_where_matrices_travel(state_dtype: str, levels: tuple[int, ...], device: str = "cpu") -> None:
    """What is summed, sent and kept of whole matrices, in places that are plain and not, and of one with a cut cell."""
    pairs = (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)
    options: dict[str, Any] = dict(state_dtype=state_dtype, stochastic_rounding=True, rounding_seed=9)
    shapes = MANY if device == "cuda" else ((3, 37), (2, 512), (1, 48), (3, 1))
    whole = travel_cases.whole(*(shape for shape in shapes if len(shape) > 1))
    cut = [Fragment("t", (2, 300), 0, 101)], [Fragment("t", (2, 300), 101, 600, offset=1)]
    with running(device):
        for level in levels:
            rules = [travel_cases.rule(least_level=0, level=level, nesterov=nesterov, **options) for nesterov in (0, 1)]
            for ranks, rank in (([whole], 0), (cut, 0), (cut, 1)):
                case = travel_cases.Case(ranks, rank, level, rules, pairs=pairs, device=device)
                travel_cases.equal(triton, case)


def noisy(state_dtype: str, stochastic: bool, recipe: dict[str, Any]) -> Rule:
    return rule(recipe, state_dtype=state_dtype, stochastic_rounding=stochastic, rounding_seed=(1 << 32) - 5)


def equal_to_eager_where_cells_are_cut(examples: int, device: str = "cpu") -> None:
    """Tensors that two to four ranks hold as in `test_formats`: weights and all of their state."""

    @settings(SLOW, max_examples=examples)
    @given(
        test_formats.worlds(),
        st.integers(0, 3),
        st.sampled_from(sorted(test_formats.RECIPES)),
        st.sampled_from(["int8", "bf16", "fp32"]),
        st.booleans(),
    )
    def check(ranks: Any, level: int, recipe: str, state_dtype: str, in_bf16: bool) -> None:
        # Not "coherence" where matrices travel: a kernel may add norms in an order of its own.
        options = {"lr": 0.01, "level": level, "detail_gain": 0.3, **test_formats.RECIPES[recipe]}
        if recipe == "foam":
            del options["detail_gain"]
        options |= {"state_dtype": state_dtype, "stochastic_rounding": in_bf16, "rounding_seed": 7}
        start, *gradients = (_tensors(seed, WIDE[in_bf16], device) for seed in (0, 10, 20))
        found = {}
        for name in ("eager", "triton"):
            with kernel(name):
                found[name] = Sharded(start, ranks, **options)
                for its in gradients:
                    found[name].step(its)
        mine, reference = found["triton"], found["eager"]
        for rank, (flat, other) in enumerate(zip(mine.flats, reference.flats, strict=True)):
            same(flat, other, f"weights of rank {rank}")
            state, expected = mine.optimizers[rank].state[flat], reference.optimizers[rank].state[other]
            for key in expected:
                same(state[key], expected[key], f"{key} of rank {rank}")

    with running(device), patch.object(test_formats, "SHAPES", CUT):
        check()


def _tensors(seed: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    its = enumerate(CUT.items())
    return {fqn: test_formats.gaussian(shape, seed + i).to(device, dtype) for i, (fqn, shape) in its}
