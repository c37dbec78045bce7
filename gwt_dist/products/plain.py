"""The products in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(
    x_nRC: Tensor,  # (n, R, C), bf16, fp32 or fp64, of any strides
) -> Tensor:
    """``x x^T`` of each matrix, (n, R, R), dtype of `x_nRC`."""
    return torch.bmm(x_nRC, x_nRC.mT)


def quadratic(
    g_nRR: Tensor,  # (n, R, R), bf16, fp32 or fp64, symmetric
    b: float,
    c: float,
) -> Tensor:
    """``b*g + c*g*g`` of each matrix, (n, R, R), dtype of `g_nRR`."""
    return torch.baddbmm(g_nRR, g_nRR, g_nRR, beta=b, alpha=c)
