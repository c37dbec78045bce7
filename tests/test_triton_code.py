"""The code that Triton makes of the kernels for a GPU: compiled here without one, and read."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from gwt_dist.declare import Program
from gwt_dist.kernels import triton
from test_triton import PROGRAM, needs_triton
from triton_cases import CAUTIOUS, FOAM, PAPER, rule


@needs_triton
@pytest.mark.parametrize("level", [0, 2, 5])
def test_the_code_for_a_gpu_rounds_each_operation_and_moves_whole_vectors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: int
) -> None:
    """Compiled without a GPU: no fused multiply-add, no approximate division or root, no flush to zero."""
    if triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtype in ("float32", "bfloat16"):
        code = compiled(PROGRAM, level, dtype, moments=True, write=True, plain=True)
        assert not re.findall(r"\bfma\.|\.ftz\b|\.approx|div\.full|\bmad\.\w*\.?f", code)
        assert "div.rn.f32" in code and "sqrt.rn.f32" in code
        # Weights and gradients go in vectors; so do moments, as long as there are as many as threads.
        assert len(re.findall(r"ld\.global\.v[24]\.b32", code)) >= 4
        assert not re.findall(r"(?:ld|st)\.global\.b16" if level > 4 else r"(?:ld|st)\.global\.b(?:16|32)", code)
    code = ""
    for its in (rule(FOAM).program, rule(CAUTIOUS).program, rule(PAPER).program):
        code += compiled(its, level, "float32", moments=False, write=True, plain=False)
        arguments = dict(parameters="*i64", first="*fp32", rules="*fp64", sizes="*fp64", length="i32")
        of_detail = triton._functions(its)["details"].sizes
        code += code_of("count", arguments, dict(OF_DETAIL=of_detail, BLOCK=32))
    arguments = dict(limited="*i64", rules="*fp64", sums="*fp64", count="i32")
    limit = code_of("limit", arguments, dict(BLOCK=256))
    assert "sqrt.rn.f64" in limit and "div.rn.f64" in limit and "0d3E45798EE2308C3A" in limit  # 1e-8 in fp64
    code += limit
    assert not re.findall(r"\bfma\.|\.ftz\b|\.approx|div\.full|\bmad\.\w*\.?f", code)


@needs_triton
@pytest.mark.parametrize("level", [1, 2, 6])
@pytest.mark.parametrize("bits", [16, 32])
def test_rows_that_begin_anywhere_are_read_and_written_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: int, bits: int
) -> None:
    """One instruction an element of a thread, and none more for units that are in parts, whatever the level."""
    if triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = {16: "bfloat16", 32: "float32"}[bits]
    code = compiled(PROGRAM, level, dtype, moments=True, write=True, plain=False)
    found = Counter(re.findall(r"\b((?:ld|st)\.global\.\S*b(?:16|32)|shfl|(?:ld|st)\.local)", code))
    elements = triton.CHUNK // 4 // 128  # of a thread; a unit has one moment, or one for each part of four elements
    moments = 2 * elements // min(1 << level, 4)
    # Weights and gradients; moments; and in the other branch, elements of cut units, which are fp32.
    expected = Counter({f"ld.global.b{bits}": 2 * elements, f"st.global.b{bits}": elements})
    expected += Counter({"ld.global.b32": elements + moments, "st.global.b32": moments})
    assert found == expected


@pytest.mark.skipif("GWT_TEST_ALL" not in os.environ, reason="takes its time: make support has it")
@needs_triton
@pytest.mark.parametrize(("level", "dtype", "most"), [(1, "bfloat16", 1.15), (4, "float32", 1.07)])
def test_rows_that_begin_anywhere_ask_for_few_more_sectors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: int, dtype: str, most: float
) -> None:
    """By addresses and layouts, over the bytes that a step must move; and nothing is spilled."""
    if triton.interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import transactions

    asked, beyond, used = transactions.count(level, dtype, 5461)
    assert 1 <= beyond <= asked <= most
    assert [each.split(" / ")[1] for each in used] == ["0"] * len(used)


def compiled(program: Program, level: int, dtype: str, moments: bool, write: bool, plain: bool) -> str:
    import triton.language as tl

    functions = triton._functions(program)
    its = dict(SECOND=functions["formulas"].second, CHANGE=functions["details"].change)
    its |= dict(WRITTEN=functions["writes"].written)

    tables = dict(items="*i64", parameters="*i64", rules="*fp64", sizes="*fp64", exchange="*fp32", rho="*fp64")
    constants: dict[str, Any] = dict(MOMENTS=moments, WRITE=write, LEVEL=level, GAIN=2.0 ** (-level / 2))
    constants |= its | dict(WEIGHT=getattr(tl, dtype), GRADIENT=getattr(tl, dtype))
    constants |= zip(("EXP_AVG", "EXP_AVG_SQ"), triton.formats(program, "exp_avg", "exp_avg_sq"), strict=True)
    constants |= dict(STOCHASTIC=program.rounding == "stochastic")
    options = triton.options(plain, level, program.cell, triton.takes_noise(program))
    constants |= {name: options.pop(name) for name in ("PLAIN", "BLOCK")}
    return code_of("phase", tables | dict(partials="*fp64"), constants, options)


def code_of(
    kernel: str,
    arguments: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any] = triton.OPTIONS,
    module: Any = None,  # which has the kernel; None: `triton_kernels`
    aligned: Collection[str] = (),  # arguments that lie as torch allocates memory
) -> str:
    """PTX of a kernel for an H100."""
    import triton as compiler
    from triton.backends.compiler import GPUTarget

    source = compiler.compiler.ASTSource(
        fn=getattr(module or triton._kernels(), kernel),
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if name in aligned},
    )
    found = compiler.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return str(found.asm["ptx"])
