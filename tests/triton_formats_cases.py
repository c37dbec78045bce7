"""Cases for `test_formats_triton.py` that run where Triton interprets its kernels, or on a GPU; see `triton_cases`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import test_formats
from gwt_dist.kernels import triton
from simulated import Sharded
from triton_cases import ENERGY, FOAM, PAPER, SLOW, interpreter, kernel, rule, run_both, same

# Rows of whole cells that go on one in another, rows with short cells, rows shorter than a unit, and vectors.
SHAPES = (5, 97), (3, 512), (1, 1040), (9, 3), (7,), (130,)
NESTEROV: dict[str, Any] = {"recipe": "energy", "nesterov": True}


def rules(state_dtype: str, stochastic: bool, *recipes: dict[str, Any]) -> list[Any]:
    noise = {"state_dtype": state_dtype, "stochastic_rounding": stochastic, "rounding_seed": (1 << 32) - 5}
    return [rule(recipe, **noise) for recipe in recipes]


def equal_to_eager(
    state_dtype: str,
    levels: tuple[int, ...],
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    sizes: tuple[float, ...] = (1.0,),
    device: str = "cpu",
) -> None:
    """Two steps of whole tensors; weights in bf16 are rounded by noise, in fp32 they cannot be."""
    wide = torch.float32, torch.bfloat16
    with interpreter() if device == "cpu" else nullcontext():
        for level in levels:
            for size in sizes:
                for recipe in (
                    (ENERGY, FOAM, PAPER, NESTEROV) if device == "cuda" else ((FOAM, PAPER)[level % 2], ENERGY)
                ):
                    for weight in wide if device == "cuda" else (wide[recipe is ENERGY],):
                        tensors = [(shape, weight, wide[i % 2], i == 1) for i, shape in enumerate(shapes)]
                        its = rules(state_dtype, weight == torch.bfloat16, recipe)
                        run_both("triton", tensors, its, level, size, triton.CHUNK, level, device)


def equal_to_eager_where_cells_are_cut(examples: int, device: str = "cpu") -> None:
    """The fragments of `test_formats`, on two to four ranks: weights and all of their state."""

    @settings(SLOW, max_examples=examples)
    @given(
        test_formats.worlds(),
        st.integers(0, 3),
        st.sampled_from(sorted(test_formats.RECIPES)),
        st.sampled_from(["bf16", "int8"]),
        st.booleans(),
        st.sampled_from([256, 4096]),
    )
    def check(ranks: Any, level: int, recipe: str, state_dtype: str, in_bf16: bool, chunk: int) -> None:
        options = {"lr": 0.01, "level": level, **test_formats.RECIPES[recipe]}
        options |= {"state_dtype": state_dtype, "stochastic_rounding": in_bf16, "rounding_seed": 7}
        dtype = torch.bfloat16 if in_bf16 else torch.float32

        def tensors(seed: int) -> dict[str, Tensor]:
            its = enumerate(test_formats.SHAPES.items())
            return {fqn: test_formats.gaussian(shape, seed + i).to(device, dtype) for i, (fqn, shape) in its}

        found = {}
        for name in ("eager", "triton"):
            with kernel(name, chunk):
                found[name] = Sharded(tensors(0), ranks, **options)
                for step in (1, 2):
                    found[name].step(tensors(10 * step))
        mine, reference = found["triton"], found["eager"]
        for i, (flat, other) in enumerate(zip(mine.flats, reference.flats, strict=True)):
            same(flat, other, f"weights of rank {i}")
            its, theirs = mine.optimizers[i].state[flat], reference.optimizers[i].state[other]
            for key in theirs:
                same(its[key], theirs[key], f"{key} of rank {i}")

    with interpreter() if device == "cpu" else nullcontext():
        check()


def uploads_and_launches(state_dtype: str) -> list[int]:
    return []


_ = patch
