"""State in 8 and 16 bits and bf16 weights without masters, in Triton: bit for bit as eager, and as it is compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import triton_formats_cases as cases
from gwt_dist.kernels import triton
from test_triton import needs_gpu, needs_triton
from test_triton_code import compiled
from triton_cases import ENERGY, PAPER, rule


@pytest.mark.parametrize(("state_dtype", "levels"), [("bf16", (1, 2)), ("int8", (0, 1, 2, 3, 5))])
def test_equal_to_eager(interpreted: Callable[..., Any], state_dtype: str, levels: tuple[int, ...]) -> None:
    interpreted(cases.equal_to_eager, state_dtype, levels)


def test_equal_to_eager_for_gradients_of_any_size(interpreted: Callable[..., Any]) -> None:
    """Cells of zeros, cells whose scale has no inverse, and second moments that are infinite."""
    interpreted(cases.equal_to_eager, "int8", (1, 2), (ENERGY, PAPER), (1e-42, 1e-14, 1e37))


def test_equal_to_eager_where_cells_are_cut(interpreted: Callable[..., Any]) -> None:
    interpreted(cases.equal_to_eager_where_cells_are_cut, 3)


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_equal_to_eager_where_matrices_travel(interpreted: Callable[..., Any], state_dtype: str) -> None:
    interpreted(cases.equal_to_eager_where_matrices_travel, state_dtype, (0, 2))


@needs_triton
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_the_code_for_a_gpu_rounds_each_operation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state_dtype: str, plain: bool
) -> None:
    """No operation is fused or flushes small numbers to zero, and codes go in vectors."""
    if triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program = rule(ENERGY, state_dtype=state_dtype, stochastic_rounding=True).program
    code = compiled(program, 2, "bfloat16", moments=True, write=True, plain=plain)
    assert not re.findall(r"\bfma\.|\.ftz\b|\.approx|div\.full|\bmad\.\w*\.?f", code)
    if plain:
        assert not re.findall(r"(?:ld|st)\.global\.b8", code)


@needs_triton
@pytest.mark.matrix
def test_memory_is_asked_for_7_bytes_an_element(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bf16 weights with state in 8 bits at level 2: 6 of weights and gradients, 1 of codes, 1/16 of scales."""
    if triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import transactions

    asked, beyond, used = transactions.count(2, "bfloat16", 4096, "int8")
    assert beyond == 1
    assert asked <= 1.04
    assert [each.split(" / ")[1] for each in used] == ["0"]


@needs_gpu
@pytest.mark.parametrize("level", range(9))
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_equal_to_eager_on_a_gpu(state_dtype: str, level: int) -> None:
    cases.equal_to_eager(state_dtype, (level,), device="cuda")


@needs_gpu
@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("size", [1e-42, 1e-37, 1e-15, 1e18, 1e37])
def test_equal_to_eager_on_a_gpu_for_gradients_of_any_size(state_dtype: str, size: float) -> None:
    cases.equal_to_eager(state_dtype, (0, 2), sizes=(size,), device="cuda")


@needs_gpu
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "int8"])
def test_equal_to_eager_on_a_gpu_where_matrices_travel(state_dtype: str) -> None:
    cases.equal_to_eager_where_matrices_travel(state_dtype, tuple(range(9)), device="cuda")


@needs_gpu
def test_equal_to_eager_on_a_gpu_where_cells_are_cut() -> None:
    cases.equal_to_eager_where_cells_are_cut(60, device="cuda")
