"""The kernel of symmetric products: interpreted on the CPU, compiled for an H100, and on a GPU where one is."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import symmetric_cases as cases
from gwt_dist import products
from gwt_dist.products import choice, plain, symmetric
from test_triton import needs_gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
SMALL_AND_LARGE = pytest.mark.parametrize("small", [symmetric.SMALL, 0])


@SMALL_AND_LARGE
def test_exact_on_small_integers(interpreted: Callable[..., Any], small: int) -> None:
    interpreted(cases.exact_on_small_integers, small)


@SMALL_AND_LARGE
def test_one_rounding_of_sums_in_fp32(interpreted: Callable[..., Any], small: int) -> None:
    interpreted(cases.one_rounding_of_sums_in_fp32, small)


@SMALL_AND_LARGE
def test_same_bits_in_every_stack(interpreted: Callable[..., Any], small: int) -> None:
    interpreted(cases.same_bits_in_every_stack, small)


def test_each_tile_of_the_triangle_is_there_once(interpreted: Callable[..., Any]) -> None:
    found = interpreted(cases.each_tile_once)
    for tiles, pairs in found.items():
        assert sorted(pairs) == [[i, j] for i in range(tiles) for j in range(i + 1)], tiles
    windows = [found[40][first : first + 132] for first in range(40 * 41 // 2 - 131)]
    assert max(len({row for pair in window for row in pair}) for window in windows) == 28


CODE = [
    (rows, add, tall)
    for rows in (symmetric.SMALL, 4096)
    for add, tall in ((False, False), (False, True), (True, False))
]


@pytest.mark.parametrize(("rows", "add", "tall"), CODE)
def test_the_code_for_an_h100(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: int, add: bool, tall: bool
) -> None:
    """Of padded stacks: tensor cores of Hopper, copies and stores of 16 bytes, and all in registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = code_of(rows, add, tall)
    sides = "m64n128k16" if rows > symmetric.SMALL else "m64n64k16"
    assert set(re.findall(r"wgmma\.mma_async\S*", ptx)) == {f"wgmma.mma_async.sync.aligned.{sides}.f32.bf16.bf16"}
    assert set(re.findall(r"cp\.async\.c[ga]\S* .*?, (0x\w+),", ptx)) == {"0x10"}
    assert set(re.findall(r"(?:ld|st)\.global\S*", ptx)) <= {"ld.global.v4.b32", "st.global.v4.b32"}
    assert not re.search(r"\b(?:atom|red)\.", ptx)
    said = assembled(ptx, tmp_path)
    assert "0 bytes spill stores, 0 bytes spill loads" in said and "serialized" not in said, said


def code_of(rows: int, add: bool, tall: bool) -> str:
    """PTX for an H100, compiled as for a padded stack."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, (blocks, options) = symmetric._kernels().product, symmetric.setting(rows)
    constants = {"x_stride_R" if tall else "x_stride_C": 1, "ADD": add, **blocks}
    kinds = dict.fromkeys(kernel.arg_names, "i32") | dict(x="*bf16", out="*bf16", b="fp32", c="fp32")
    kinds |= dict.fromkeys(constants, "constexpr")
    divisible = [i for i, name in enumerate(kernel.arg_names) if kinds[name] in ("*bf16", "i32")]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=kinds,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return str(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])


def assembled(ptx: str, folder: Path) -> str:
    """What the assembler says of its registers."""
    import triton

    (folder / "code.ptx").write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "code.ptx", "-o", "code.cubin"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr


def test_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    choice._choose.cache_clear()
    assert choice.choose(GPU, BF16, 4096) is plain  # nothing measured
    monkeypatch.setitem(choice.MEASURED, "Some GPU", 1024)
    choice._choose.cache_clear()
    monkeypatch.setattr(symmetric, "missing", lambda *_: "")
    assert choice.choose(GPU, BF16, 1024) is symmetric
    for device, dtype, rows in ((GPU, BF16, 1023), (GPU, torch.float32, 1024), (CPU, BF16, 1024)):
        assert choice.choose(device, dtype, rows) is plain
    monkeypatch.setenv(choice.VARIABLE, "0")
    assert choice.choose(GPU, BF16, 1024) is plain
    monkeypatch.setenv(choice.VARIABLE, "1")
    assert choice.choose(GPU, BF16, 16) is symmetric
    choice._choose.cache_clear()


@pytest.mark.parametrize(
    ("value", "device", "dtype", "message"),
    [
        ("yes", CPU, BF16, r"GWT_DIST_SYMMETRIC='yes' must be one of \('0', '1'\)"),
        ("1", CPU, BF16, r"GWT_DIST_SYMMETRIC=1 cannot take matrices on cpu \(a GPU is needed"),
        (
            "1",
            GPU,
            torch.float32,
            "GWT_DIST_SYMMETRIC=1 cannot take products of torch.float32; it takes torch.bfloat16",
        ),
    ],
)
def test_what_cannot_be_is_said(
    monkeypatch: pytest.MonkeyPatch, value: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    monkeypatch.setenv(choice.VARIABLE, value)
    with pytest.raises(ValueError, match=message):
        choice.choose(device, dtype, 64)


def test_without_triton_a_measured_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not torch's products in its place: they round differently, and the other ranks may have triton."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setitem(choice.MEASURED, "Some GPU", 1024)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "gwt_dist.products.symmetric_kernels", raising=False)
    monkeypatch.delattr("gwt_dist.products.symmetric_kernels", raising=False)
    symmetric._kernels.cache_clear()
    choice._choose.cache_clear()
    with pytest.raises(
        ValueError, match=r"(?s)faster on Some GPU, cannot take .*pip install triton.*GWT_DIST_SYMMETRIC=0"
    ):
        choice.choose(GPU, BF16, 2048)


@needs_gpu
@pytest.mark.parametrize(("rows", "columns"), [(5, 3), (130, 51), (512, 1376), (1000, 2000), (2048, 2048)])
def test_near_the_sum_in_fp64_on_a_gpu(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    monkeypatch.setenv(choice.VARIABLE, "1")
    for tall in (False, True):
        x = cases.stack(3, rows, columns, tall).cuda()
        wide = x.double()
        gram = products.gram(x)
        cases._near(gram, wide @ wide.mT, (wide.abs() @ wide.abs().mT) * columns)
        g, size = gram.double(), gram.double().abs()
        found = products.quadratic(gram, -4.775, 2.0315)
        cases._near(found, -4.775 * g + 2.0315 * g @ g, (4.775 * size + 2.0315 * size @ size) * rows)
        for its in (gram, found):
            assert torch.equal(its, its.mT)
        assert torch.equal(products.gram(x[1:2])[0], gram[1])
