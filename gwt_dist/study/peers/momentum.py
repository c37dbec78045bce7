"""A momentum that is kept in fp32, in bf16, or in 8 bits with a scale for each block of elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MOMENTUM_DTYPES = ("fp32", "bf16", "int8")
BLOCK = 2048  # elements that share a scale
_LARGEST = 127  # code of the largest element of a block


def refresh(state: dict[str, Any], gradient: Tensor, beta: float, dtype: str) -> Tensor:
    """Take `gradient` into the momentum in `state`, and return the momentum.

        m = beta*m + (1-beta)*g

    What is returned has not been rounded: the step takes it as it is, and the format holds what the next step begins
    from (8-bit Muon, arXiv 2509.23106, which orthogonalizes before it quantizes). Rounding is to nearest.

    Args:
        state: Without these keys before the first step. After it with `momentum` of the gradient's shape, fp32 or
            bf16, or for "int8" with `codes`, int8 of the gradient's shape, and `scales`, fp32, one for each `BLOCK`
            elements in their order.
        gradient: Any shape, fp32 or bf16.
        beta: Weight of the old momentum.
        dtype: One of `MOMENTUM_DTYPES`.

    Returns:
        The momentum, fp32; with "fp32" the tensor in `state`, which must not be changed.
    """
    gradient = gradient.float()
    if dtype == "int8":
        old = dequantized(state["codes"], state["scales"]) if "codes" in state else torch.zeros_like(gradient)
        momentum = old.lerp_(gradient, 1 - beta)
        state["codes"], state["scales"] = quantized(momentum)
        return momentum
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(gradient, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    kept: Tensor = state["momentum"]
    momentum = kept.float().lerp_(gradient, 1 - beta)  # in place where it is fp32
    if momentum is not kept:
        kept.copy_(momentum)
    return momentum


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x`, any shape, fp32: each block's largest magnitude, and ``round(127 * x / scale)``.

    A block with an element that is not finite comes back as NaN, so that a run which diverges is seen to.

    Returns:
        int8 of the shape of `x`, and fp32 of shape (blocks,).
    """
    blocks = -(-x.numel() // BLOCK)
    flat = functional.pad(x.reshape(-1), (0, blocks * BLOCK - x.numel())).view(blocks, BLOCK)
    scales = flat.abs().amax(1)
    by = torch.where(scales == 0, 1.0, scales)  # codes of a block of zeros are zeros
    codes = (flat / by[:, None] * _LARGEST).round().to(torch.int8)
    # A copy: a view would keep the padding of the last block alive.
    return codes.view(-1)[: x.numel()].clone().view(x.shape), scales


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """``scale * code / 127``, fp32, of what `quantized` returned."""
    of_each = scales.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
    return codes.float() / _LARGEST * of_each
