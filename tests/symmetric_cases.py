"""Cases for `test_symmetric.py` that run where Triton interprets kernels, which a process decides when it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

import triton_cases
from gwt_dist import products
from gwt_dist.products import choice, symmetric, symmetric_kernels

SHAPES = [(5, 3), (16, 64), (33, 70), (130, 51), (192, 130)]  # R, C


@contextmanager
def interpreter(small: int) -> Iterator[None]:
    """The kernel for all products, as for more rows than `small`; with a repair: dots of bf16 would be of its codes."""
    from triton.runtime import interpreter as triton_interpreter

    builder = triton_interpreter.InterpreterBuilder
    dot = builder.create_dot

    def of_bf16(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, _wide(a), _wide(b), *more)

    with (
        triton_cases.interpreter(),
        patch.object(builder, "create_dot", of_bf16),
        patch.object(symmetric, "SMALL", small),
    ):
        with patch.dict("os.environ", {choice.VARIABLE: "1"}):
            yield


def _wide(handle: Any) -> Any:
    from triton.runtime.interpreter import TensorHandle

    assert handle.dtype.scalar == tl.bfloat16
    return TensorHandle(torch.from_numpy(np.array(handle.data)).view(torch.bfloat16).float().numpy(), tl.float32)


def stack(n: int, rows: int, columns: int, tall: bool, whole: bool = False) -> Tensor:
    """``(n, R, C)`` bf16: normal numbers, or small whole ones; `tall` is a view of the transposed matrices."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn((n, columns, rows) if tall else (n, rows, columns), generator=generator)
    x = (2 * x).round().clamp(-3, 3) if whole else x
    return x.bfloat16().mT if tall else x.bfloat16()


def exact_on_small_integers(small: int) -> None:
    """Sums of whole numbers below 2**24 are exact in any order, so there is one right answer: rounded once."""
    with interpreter(small):
        for rows, columns in SHAPES:
            for n, tall in ((1, False), (3, True)):
                x = stack(n, rows, columns, tall, whole=True)
                wide = x.double() @ x.double().mT
                assert torch.equal(products.gram(x), wide.bfloat16()), (rows, columns, n)
                g = (wide % 7 - 3).bfloat16()
                expected = (-0.75 * g.double() + 0.5 * g.double() @ g.double()).bfloat16()
                assert torch.equal(products.quadratic(g, -0.75, 0.5), expected), (rows, columns, n)


def one_rounding_of_sums_in_fp32(small: int) -> None:
    """Of normal numbers: half a step of bf16 and the error of the sum; the result is its own transpose, bit for bit."""
    with interpreter(small):
        for rows, columns in SHAPES:
            for tall in (False, True):
                x = stack(2, rows, columns, tall)
                gram = products.gram(x)
                _near(gram, x.double() @ x.double().mT, (x.double().abs() @ x.double().abs().mT) * columns)
                g, size = gram.double(), gram.double().abs()
                found = products.quadratic(gram, -4.775, 2.0315)
                _near(found, -4.775 * g + 2.0315 * g @ g, (4.775 * size + 2.0315 * size @ size) * rows)
                for its in (gram, found):
                    assert its.is_contiguous() and torch.equal(its, its.mT), (rows, columns, tall)


def _near(found: Tensor, expected: Tensor, terms: Tensor) -> None:
    """`terms` is the sum of the sizes of what was added, times how many."""
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= expected.abs() * 2.0**-8 + terms * 2.0**-24).all()


def same_bits_in_every_stack(small: int) -> None:
    """Whatever the size of the stack, the place in it, and whether the matrix is a tall one's view."""
    with interpreter(small):
        for rows, columns in ((33, 70), (130, 51)):
            x = stack(3, rows, columns, tall=True)
            gram = products.gram(x)
            quadratic = products.quadratic(gram, -4.775, 2.0315)
            for place in range(3):
                for its in (
                    x[place : place + 1],
                    x[place : place + 1].contiguous(),
                    x[[place, 0]],
                    x[2:].expand(2, -1, -1),
                ):
                    alone = products.gram(its)
                    of = 2 if its.stride(0) == 0 else place
                    assert torch.equal(alone[0], gram[of])
                    assert torch.equal(products.quadratic(alone, -4.775, 2.0315)[0], quadratic[of])


@triton.jit
def _tiles(found, tiles):
    t = tl.program_id(0)
    i, j = symmetric_kernels.tile(t, tiles)
    tl.store(found + 2 * t, i)
    tl.store(found + 2 * t + 1, j)


def each_tile_once() -> dict[int, list[list[int]]]:
    """The tiles of each number of rows of tiles, in their order."""
    found = {}
    with triton_cases.interpreter():
        for tiles in (*range(1, 12), 40):
            pairs = torch.full((tiles * (tiles + 1) // 2, 2), -1, dtype=torch.int32)
            _tiles[(len(pairs),)](pairs, tiles)
            found[tiles] = pairs.tolist()
    return found
