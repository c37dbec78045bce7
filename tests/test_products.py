"""Products of stacks of matrices in torch, how many and in which dtype; and the benchmark that compares products."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gwt_dist import products
from gwt_dist.products import stacks

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import products as benchmark

SHAPES = [(1, 1), (5, 3), (16, 16), (33, 70), (130, 51)]  # R, C
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def stack(n: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers ``(n, R, C)``, with zeros added up to multiples of 16."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn((n, rows, columns), generator=generator, dtype=torch.float64)
    return torch.nn.functional.pad(x, (0, -columns % 16, 0, -rows % 16)).to(dtype)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_matrix_has_the_same_bits_at_each_place_of_a_stack(dtype: torch.dtype, tall: bool, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for (rows, columns), n in itertools.product(SHAPES, (1, 2, 3, 8)):
            whole = stack(n, columns, rows, dtype) if tall else stack(n, rows, columns, dtype)
            expected = both(whole.mT if tall else whole)
            for place in range(n):  # the other places without a matrix
                moved = torch.zeros_like(whole)
                moved[place] = whole[0]
                for found, its in zip(both(moved.mT if tall else moved), expected, strict=True):
                    assert found.dtype == dtype and torch.equal(found[place], its[0]), (rows, columns, n, place)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_matrix_has_the_same_bits_in_a_stack_of_any_size(dtype: torch.dtype) -> None:
    """Of one thread: several share the work of one matrix, or take one matrix each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows, columns in SHAPES:
            whole = stack(8, rows, columns, dtype)
            expected = both(whole)
            for n in range(1, 8):
                for first in (0, 8 - n):
                    part = slice(first, first + n)
                    for found, its in zip(both(whole[part]), expected, strict=True):
                        assert torch.equal(found, its[part]), (rows, columns, n)
    finally:
        torch.set_num_threads(before)


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x x^T``, ``(n, R, R)``, and its quadratic."""
    g = products.gram(x)
    return g, products.quadratic(g, -4.775, 2.0315)


def test_products_are_what_they_are_called() -> None:
    x = stack(3, 33, 70, torch.float64)
    g = products.gram(x)
    torch.testing.assert_close(g, torch.einsum("nij,nkj->nik", x, x), rtol=1e-14, atol=1e-13)
    expected = 3 * g - 2 * torch.einsum("nij,njk->nik", g, g)
    torch.testing.assert_close(products.quadratic(g, 3.0, -2.0), expected, rtol=1e-13, atol=1e-10)


def test_dtypes_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32, fp64, bf16 = torch.float32, torch.float64, torch.bfloat16
    for math in (fp32, fp64):
        assert products.dtype_of("auto", math, CPU) == products.dtype_of("fp32", math, CPU) == math
        assert products.dtype_of("bf16", math, CPU) == bf16
    for capability, dtype in (((7, 5), fp32), ((8, 0), bf16), ((9, 0), bf16), ((12, 1), bf16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, its=capability: its)
        assert products.dtype_of("auto", fp32, GPU) == dtype
        assert products.dtype_of("auto", fp64, GPU) == fp64
        assert products.dtype_of("fp32", fp32, GPU) == fp32
    with pytest.raises(ValueError, match=r"products='tf32' must be one of \('auto', 'bf16', 'fp32'\)"):
        products.dtype_of("tf32", fp32, CPU)


def test_sizes_of_stacks() -> None:
    sizes = {(512, 512): 16, (512, 1376): 5, (1024, 1024): 4, (2048, 2048): 1, (4096, 11008): 1, (64, 64): 64}
    assert {shape: products.stack_size(*shape, GPU) for shape in sizes} == sizes
    sizes = {(8, 8): 64, (40, 40): 7, (64, 64): 4, (256, 256): 1, (512, 512): 1}
    assert {shape: products.stack_size(*shape, CPU) for shape in sizes} == sizes
    # What counts are the elements with zeros added: products of 1 x 4096 are those of 16 x 4096.
    assert products.stack_size(1, 4096, CPU) == products.stack_size(4096, 2, CPU) == 1
    assert stacks.MOST == 64


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--shapes", "8x21", "--rounds", "1"])
    said = capsys.readouterr().out
    assert "| 8x21 | 32 | gram | " in said and "| 8x21 | 32 | quadratic | " in said and said.count("| none |") == 2
    assert "There is no GPU here" in said and "MEASURED" not in said


def test_the_benchmark_finds_where_the_kernel_is_faster() -> None:
    def rows(*times: tuple[int, float, float]) -> list[dict[str, Any]]:
        """Rows, ms of torch, ms of the kernel; each of two shapes and two products."""
        return [
            {"shape": (r, wide * r), "product": product, "torch_ms": theirs, "kernel_ms": ours}
            for r, theirs, ours in times
            for wide in (1, 3)
            for product in ("gram", "quadratic")
        ]

    assert benchmark.fewest_rows(rows((512, 1.0, 0.9), (1024, 2.0, 2.1), (2048, 4.0, 3.0), (4096, 9.0, 5.0))) == 2048
    assert benchmark.fewest_rows(rows((512, 1.0, 0.9), (1024, 2.0, 1.9))) == 512
    assert benchmark.fewest_rows(rows((512, 1.0, 0.9), (1024, 2.0, 2.0))) is None
    one_is_slower = rows((512, 1.0, 0.9), (1024, 2.0, 1.9))
    one_is_slower[0]["kernel_ms"] = 1.2
    assert benchmark.fewest_rows(one_is_slower) == 1024
