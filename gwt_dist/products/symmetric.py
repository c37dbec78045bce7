"""The products in Triton, of bf16 on a GPU: tiles on and below the diagonal alone, each stored twice.

Half the work of `plain`. Sums are in fp32 and in one order, block sizes follow from the number of rows, and nothing is
tuned when it runs: so the bits of a matrix depend on its shape alone. See `symmetric_kernels.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

SMALL = 512  # rows up to which there are too few large tiles to fill a GPU
# Of up to SMALL rows, and of more: tile, steps of the sum.
BLOCKS = {"BLOCK": 64, "DEPTH": 64}, {"BLOCK": 128, "DEPTH": 64}
# Three stages of copies leave room for two large tiles at once on a multiprocessor of an H100, four do not.
OPTIONS = {"num_warps": 4, "num_stages": 3}, {"num_warps": 8, "num_stages": 3}


def gram(x_nRC: Tensor) -> Tensor:
    """As `plain.gram`, exactly symmetric."""
    return _product(x_nRC, 0.0, 1.0, add=False)


def quadratic(g_nRR: Tensor, b: float, c: float) -> Tensor:
    """As `plain.quadratic`, exactly symmetric; rounded once."""
    return _product(g_nRR, b, c, add=True)


def missing(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps the kernel from products of `dtype` on `device`; nothing where it can run."""
    if dtype != torch.bfloat16:
        return f"products of {dtype}; it takes torch.bfloat16 alone"
    try:
        interpreted = type(_kernels().product).__name__ == "InterpretedFunction"
    except ImportError as error:
        return (
            f"anything without the package triton ({error}); install the version that torch names: pip install triton"
        )
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"matrices on {device} (a GPU is needed, or, for tests on a CPU alone, TRITON_INTERPRET=1)"
    return ""


def setting(rows: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Block sizes and the compiler's options for matrices of so many rows."""
    large = rows > SMALL
    return BLOCKS[large], {**OPTIONS[large], "enable_fp_fusion": False}


@cache
def _kernels() -> Any:
    from gwt_dist.products import symmetric_kernels

    return symmetric_kernels


def _product(x: Tensor, b: float, c: float, add: bool) -> Tensor:
    n, rows, columns = x.shape
    out = torch.empty((n, rows, rows), dtype=x.dtype, device=x.device)
    blocks, options = setting(rows)
    tiles = -(-rows // blocks["BLOCK"])
    with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():
        _kernels().product[(n * tiles * (tiles + 1) // 2,)](
            x, out, rows, columns, *x.stride(), b, c, ADD=add, **blocks, **options
        )
    return out
