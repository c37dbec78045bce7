"""How matrices are stacked for their products, and in which dtype these are: by shape and kind of device alone."""

from __future__ import annotations

import torch

PRODUCTS = "auto", "bf16", "fp32"

GPU_ELEMENTS = 1 << 22  # of a stack: enough to fill a GPU
CPU_ELEMENTS = 1 << 14  # a CPU is busy with little, larger stacks leave its cache, and unused places waste its time
MOST = 64  # matrices of a stack
ALIGNED = 16  # elements: what rows and columns of matrices in products are multiples of, with zeros added
BF16_CAPABILITY = 8, 0  # of NVIDIA's GPUs with bf16 units; torch numbers AMD's with them from (9, 0)


def dtype_of(products: str, math: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of products of matrices on `device` whose other mathematics is in `math`.

    ``"auto"`` is bf16 for fp32 where the GPU has units for it and `math` elsewhere; ``"bf16"`` is bf16 everywhere and
    ``"fp32"`` is `math`, fp64 for fp64. On GPUs products of fp32 follow ``torch.backends.cuda.matmul.allow_tf32``.
    """
    if products not in PRODUCTS:
        raise ValueError(f"products={products!r} must be one of {PRODUCTS}")
    if products == "auto":
        fast = math == torch.float32 and device.type == "cuda"
        fast = fast and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
        products = "bf16" if fast else "fp32"
    return torch.bfloat16 if products == "bf16" else math


def stack_size(rows: int, columns: int, device: torch.device) -> int:
    """How many matrices of one shape are iterated together, from 1 to 64; places without a matrix are zeros.

    A library picks its algorithm by the size of the stack too. So this never depends on how many matrices a rank has:
    the bits of a matrix are the same on any number of ranks.
    """
    limit = CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS
    return min(MOST, max(1, limit // (aligned(rows) * aligned(columns))))


def aligned(length: int) -> int:
    """A number of rows or columns as products should have it."""
    return -(-length // ALIGNED) * ALIGNED
