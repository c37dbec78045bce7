"""Activations in 8 bits in Triton: bit for bit as torch's operations, and as it is compiled."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import triton_activation_cases as cases
from gwt_dist.activations.codes import GROUP
from gwt_dist.kernels import triton
from test_triton import needs_gpu, needs_triton
from test_triton_code import code_of


def test_equal_to_eager(interpreted: Callable[..., Any]) -> None:
    assert interpreted(cases.equal_to_eager) == 3 * 20 * (1 + 2 + 1 + 3)


def test_numbers_that_are_none_stay_visible(interpreted: Callable[..., Any]) -> None:
    assert interpreted(cases.none_stays_visible) == [GROUP, GROUP, 0]


@needs_gpu
def test_equal_to_eager_on_a_gpu() -> None:
    cases.equal_to_eager("cuda")
    assert cases.none_stays_visible("cuda") == [GROUP, GROUP, 0]


@needs_triton
@pytest.mark.parametrize("kernel", ["_encode", "_decode"])
def test_the_code_for_a_gpu_rounds_each_operation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: str) -> None:
    """No operation is fused, is near, or flushes small numbers to zero, and memory is asked for vectors."""
    if triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    from gwt_dist.kernels import triton_activations

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = dict(x="*bf16", code="*u8", lo="*bf16", scale="*bf16", groups="i32", columns="i32")
    constants, options = {"N": triton_activations._TOGETHER}, triton_activations.OPTIONS
    aligned = ("x", "code", "lo", "scale", "columns")
    code = code_of(kernel, arguments, constants, options, triton_activations, aligned)
    assert not re.findall(r"\bfma\.rn\.f|\.ftz\b|\.approx|div\.full|\bmad\.\w*\.?f", code)
    assert re.search(r"global(?:\.\w+)*\.v[24]\.", code)
