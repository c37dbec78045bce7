"""The Triton kernels of matrices that travel: interpreted on the CPU against the eager ones, and compiled for GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_travel_cases as cases
from gwt_dist.kernels import triton, triton_travel
from test_triton import needs_gpu, needs_triton
from test_triton_code import code_of
from travel_cases import WIDE, Case, equal, rule, whole

SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def test_equal_to_eager_at_every_level(interpreted: Callable[..., Any]) -> None:
    interpreted(cases.equal_to_eager_at_every_level)


def test_equal_to_eager_where_units_are_cut(interpreted: Callable[..., Any]) -> None:
    interpreted(cases.equal_to_eager_where_units_are_cut, 40)


def test_many_matrices_are_few_launches_and_sums_have_one_order(interpreted: Callable[..., Any]) -> None:
    found = interpreted(cases.launches_and_sums)
    assert found["launches"] == 2
    assert found["places"][True] == [0] and len(found["places"][False]) == 15 and 0 not in found["places"][False]
    assert found["sums"][0] == found["sums"][1]


def test_a_place_beyond_the_landing_buffer_is_refused(interpreted: Callable[..., Any]) -> None:
    message = interpreted(cases.a_place_beyond_the_landing_buffer)
    assert re.search(r"lie at 3 to 524 of a landing buffer of 523 elements", message), message


def test_a_step_of_56_matrices_is_few_operations(interpreted: Callable[..., Any]) -> None:
    """8,290 before they were stacked, views counted."""
    same, launches, operations = interpreted(cases.steps_of_56_matrices)
    assert same
    # Four rounds of 8 stacks in all, whose iterations are what is left.
    assert (len(launches), len(operations)) == (12, 307)


@needs_triton
@pytest.mark.parametrize("level", [1, 5])
def test_the_code_for_a_gpu_rounds_each_operation_and_moves_whole_vectors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: int
) -> None:
    """Compiled without a GPU: no fused multiply-add, no approximate division or root, no flush to zero."""
    if triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    weights = code("momentum_weights", dict(parameters="*i64", rules="*fp64", weights="*fp64", count="i32"), BLOCK=32)
    for dtype in ("float32", "bfloat16"):
        sums, sent, kept = units(level, dtype, send=False), units(level, dtype, send=True), elements(level, dtype)
        assert not re.findall(r"\bfma\.|\.ftz\b|\.approx|div\.full|\bmad\.\w*\.?f", sums + sent + kept + weights)
        assert "div.rn.f32" in sent and "div.rn.f64" in sent and "sqrt.rn.f64" in kept
        for its, ways in ((sums, ("ld",)), (sent, ("ld", "st")), (kept, ("ld", "st"))):
            for way in ways:  # gradients, what is sent, what comes back, weights
                assert len(re.findall(rf"{way}\.global\.v[24]\.b32", its)) >= 2, (dtype, way)
            assert not re.findall(r"(?:ld|st)\.global\.b16", its), dtype


def code(kernel: str, arguments: dict[str, str], **constants: Any) -> str:
    return code_of(kernel, arguments, constants, module=triton_travel._kernels(), aligned=["landing"])


def units(level: int, dtype: str, send: bool) -> str:
    import triton.language as tl

    formula = triton._functions(rule().program)["formulas"]
    given = dict(items="*i64", parameters="*i64", rules="*fp64", weights="*fp64", exchange="*fp32", sums="*fp64")
    its = dict(GAINED=formula.detail_gain, MOMENTUM=formula.momentum, U=formula.sent, SEND=send, LEVEL=level)
    its |= dict(GAIN=2.0 ** (-level / 2), EXP_AVG=tl.float32)
    its |= dict(GRADIENT=getattr(tl, dtype), SENT=getattr(tl, dtype), PLAIN=True, BLOCK=triton.CHUNK >> level)
    return code("units", given | dict(squares="*fp64", landing=f"*{SHORT[dtype]}", partials="i32"), **its)


def elements(level: int, dtype: str) -> str:
    import triton.language as tl

    functions = triton._functions(rule(cautious=True).program)
    given = dict(items="*i64", parameters="*i64", rules="*fp64", landing=f"*{SHORT[dtype]}")
    its = dict(LOST=functions["formulas"].lost, WRITTEN=functions["writes"].written, LEVEL=level)
    return code("keep", given, **its, WEIGHT=getattr(tl, dtype), STOCHASTIC=False, PLAIN=True, BLOCK=triton.CHUNK)


@needs_gpu
@pytest.mark.parametrize("level", range(1, 9))
@pytest.mark.parametrize("landing", WIDE, ids=str)
def test_equal_to_eager_on_a_gpu(level: int, landing: torch.dtype) -> None:
    shapes = (5, 97), (64, 1024), (300, 1), (3, 42001), (2, 3, 5)
    rules = [rule(detail_gain=0.3), rule(lr=torch.tensor(0.3, device="cuda"), nesterov=True, detail_gain=1.0)]
    equal(triton, Case([whole(*shapes)], 0, level, rules, landing, device="cuda"))
