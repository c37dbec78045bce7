"""Products of stacks of matrices: in torch, and by the symmetric kernel, interpreted and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gwt_dist import products
from gwt_dist.products import plain, stacks

SHAPES = [(1, 1), (5, 3), (16, 16), (33, 70), (130, 51)]  # R, C
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def stack(n: int, rows: int, columns: int, dtype: torch.dtype, tall: bool = False) -> Tensor:
    """Normal numbers ``(n, R, C)``; `tall` is a view of the transposed matrices."""
    shape = (n, columns, rows) if tall else (n, rows, columns)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rows + columns), dtype=torch.float64).to(dtype)
    return x.mT if tall else x


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_matrix_has_the_same_bits_in_every_stack(dtype: torch.dtype, tall: bool) -> None:
    """On a CPU for any n; what a GPU's library does for one n it does for each place."""
    for rows, columns in SHAPES:
        whole = stack(8, rows, columns, dtype, tall)
        gram = plain.gram(whole)
        quadratic = plain.quadratic(gram, -4.775, 2.0315)
        assert gram.dtype == quadratic.dtype == dtype and gram.shape == quadratic.shape == (8, rows, rows)
        for n in range(1, 8):
            for first in (0, 8 - n):
                part = slice(first, first + n)
                its = plain.gram(whole[part])
                assert torch.equal(its, gram[part]), (rows, columns, n)
                assert torch.equal(plain.quadratic(its, -4.775, 2.0315), quadratic[part]), (rows, columns, n)


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
    assert [products.stack_size(r, c, CPU) for r, c in ((8, 8), (64, 64), (256, 256), (512, 512))] == [64, 16, 1, 1]
    assert stacks.MOST == 64
