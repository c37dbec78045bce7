"""The compiled kernels of matrices that travel against the eager reference: what is summed, sent and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_dist.kernels import choice, choose, cpu
from test_layout import worlds
from travel_cases import WIDE, Case, equal, rule, same, whole

# Divided and not by units and vectors, rows shorter than a unit, longer than a chunk, of three dimensions.
SHAPES = (66, 97), (3, 5461), (9, 3), (64, 64), (3, 2, 5), (0, 4), (2, 70_000), (300, 256)
OPTIONS = st.fixed_dictionaries(
    {
        "nesterov": st.booleans(),
        "correct_bias": st.booleans(),
        "cautious": st.booleans(),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.99, 0.0)]),
        "detail_gain": st.sampled_from([None, 0.0, 0.3, "coherence"]),
        "scale": st.sampled_from([0.25, 1.0]),
        "weight_decay": st.sampled_from([0.1, 0.0]),
        "lr": st.sampled_from([0.01, torch.tensor(0.02), 0.0]),
    }
)


@pytest.mark.parametrize("landing", WIDE, ids=str)
@pytest.mark.parametrize("level", range(1, 9))
def test_matrices_of_any_shape(level: int, landing: torch.dtype) -> None:
    equal(cpu, Case([whole(*SHAPES)], 0, level, [rule(), rule(lr=0.3, nesterov=True, detail_gain=0.5)], landing))


@settings(max_examples=60)
@given(
    worlds(),
    st.integers(1, 8),
    OPTIONS,
    st.sampled_from(WIDE),
    st.sampled_from([1, 2, 7]),
    st.sampled_from([-30, -3, 0, 3, 18]),
)
def test_what_any_rank_holds(
    world: Any, level: int, options: dict[str, Any], landing: torch.dtype, t: int, exponent: int
) -> None:
    """Cut units, rectangles of columns, ranks without anything."""
    _, ranks = world
    for rank in range(len(ranks)):
        equal(cpu, Case(ranks, rank, level, [rule(**options)], landing, t, 10.0**exponent))
