"""Which code multiplies: torch's library, or the symmetric kernel where it was measured to be faster."""

from __future__ import annotations

import os
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from gwt_dist.products import plain, symmetric

VARIABLE = "GWT_DIST_SYMMETRIC"
# Names of GPUs, as torch has them, and the fewest rows from which the kernel is faster there: benchmarks/products.py.
MEASURED: dict[str, int] = {"NVIDIA H200": 4096}


class Products(Protocol):
    """The functions of a module of products."""

    def gram(self, x_nRC: Tensor) -> Tensor:
        """See `plain.gram`."""

    def quadratic(self, g_nRR: Tensor, b: float, c: float) -> Tensor:
        """See `plain.quadratic`."""


def choose(device: torch.device, dtype: torch.dtype, rows: int) -> Products:
    """The module for matrices of so many `rows`, by ``GWT_DIST_SYMMETRIC``, the name of the GPU and the shape alone.

    The two round differently, so nothing that a rank alone may have or lack has a part in it: where the kernel is meant
    to run and cannot, that is an error. Raises `ValueError`.
    """
    return _choose(os.environ.get(VARIABLE, ""), device, dtype, rows)


@cache
def _choose(forced: str, device: torch.device, dtype: torch.dtype, rows: int) -> Products:
    if forced not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={forced!r} must be one of ('0', '1'), or unset for the faster of both")
    if forced == "0" or (not forced and not _measured(device, dtype, rows)):
        return plain
    missing = symmetric.missing(device, dtype)
    if missing:
        why = f"{VARIABLE}=1" if forced else f"The symmetric kernel, measured to be faster on {_name(device)},"
        raise ValueError(f"{why} cannot take {missing}. {VARIABLE}=0, on all ranks, leaves products to torch")
    return symmetric


def _measured(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    if device.type != "cuda" or dtype != torch.bfloat16 or not MEASURED:
        return False
    least = MEASURED.get(_name(device))
    return least is not None and rows >= least


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
