"""Activations in 8 bits: 128 neighbours of the last dimension, which are of one token, share a least value and a scale.

    lo     the least of the group, rounded down to bf16
    scale  (largest - lo) / 255, rounded up to bf16
    code   (x - lo) / scale, rounded to nearest, or up with the probability of the rest
    x'     lo + code * scale

The rounding of lo and scale keeps all of the group within the codes, so x' is off by half a scale at most. Groups end
with the token, so nothing of a code depends on the batch, or on the ranks that share it. 1.03 bytes a number.

Mesa (arXiv 2111.11124) has one range for the whole batch, a moving average, outside of which its codes wrap around.

Shapes: T tokens, C numbers of each, G = ceil(C / 128) groups of a token.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from gwt_dist.kernels import triton
from gwt_dist.kernels.build import BuildError, load

GROUP = 128
LARGEST = 255  # code
_LOWER = 0xFFFF  # the bits of fp32 that bf16 has not
# Dtypes that the kernels of a device take.
_TAKEN = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


@dataclass(frozen=True, slots=True)
class Codes:
    """What `encode` made of a tensor."""

    code_TC: Tensor  # uint8
    lo_TG: Tensor  # bf16
    scale_TG: Tensor  # bf16

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.code_TC.nbytes + self.lo_TG.nbytes + self.scale_TG.nbytes


def encode(x_TC: Tensor, generator: torch.Generator | None = None) -> Codes:
    """Codes of a floating tensor, (T, C); with a generator of its device they are rounded by chance.

    To nearest a kernel rounds, which has the same codes: in C++ fp32 and bf16 on a CPU, in Triton on a GPU.
    """
    kernel = _kernel_of(x_TC) if generator is None else None
    if kernel is None:
        return encode_eager(x_TC, generator)
    tokens, columns = x_TC.shape
    code_TC = x_TC.new_empty((tokens, columns), dtype=torch.uint8)
    lo_TG, scale_TG = (x_TC.new_empty((tokens, -(-columns // GROUP)), dtype=torch.bfloat16) for _ in range(2))
    kernel.encode(x_TC.contiguous(), code_TC, lo_TG, scale_TG)
    return Codes(code_TC, lo_TG, scale_TG)


def decode(codes: Codes, dtype: torch.dtype) -> Tensor:
    """What they stand for, (T, C) of `dtype`. A group with a number that is none is none."""
    x_TC = torch.empty(codes.code_TC.shape, dtype=dtype, device=codes.code_TC.device)
    kernel = _kernel_of(x_TC)
    if kernel is None:
        return decode_eager(codes, dtype)
    kernel.decode(x_TC, codes.code_TC, codes.lo_TG, codes.scale_TG)
    return x_TC


class _NoMemory:
    """In place of a kernel for tensors that have shapes and no memory: there is nothing to write."""

    @staticmethod
    def encode(*_: Tensor) -> None:
        """Write codes."""

    @staticmethod
    def decode(*_: Tensor) -> None:
        """Write numbers."""


def _kernel_of(x_TC: Tensor) -> Any:
    """What has `encode` and `decode` for such a tensor; None where torch's operations do it."""
    if isinstance(x_TC, FakeTensor):
        return _NoMemory
    return _kernel(x_TC.device.type) if x_TC.dtype in _TAKEN.get(x_TC.device.type, ()) else None


@cache
def _kernel(device: str) -> ModuleType | None:
    try:
        if device == "cpu":
            return load("activations")
        triton.prepare()
        from gwt_dist.kernels import triton_activations

        return triton_activations
    except BuildError as error:
        warnings.warn(f"{error}\nActivations are packed by torch operations instead", RuntimeWarning, stacklevel=2)
        return None


def encode_eager(x_TC: Tensor, generator: torch.Generator | None = None) -> Codes:
    """As `encode`, in torch operations: the reference."""
    tokens, columns = x_TC.shape
    # A short group has its last number once more, which changes neither the least nor the largest.
    x = x_TC if columns % GROUP == 0 else torch.cat([x_TC, x_TC[:, -1:].expand(tokens, -columns % GROUP)], 1)
    x_TGn = x.float().view(tokens, -1, GROUP)
    least_TG, largest_TG = x_TGn.amin(-1), x_TGn.amax(-1)
    lo_TG = _down(least_TG)
    # Of a number of Python torch takes the inverse on a GPU, and multiplies: so divide by a tensor. Each by itself, as
    # the difference could be infinite.
    steps = torch.full((), float(LARGEST), device=x.device)
    scale_TG = _up(largest_TG / steps - lo_TG.float() / steps)
    scale = scale_TG.float()
    inverse_TG = torch.where(scale > 0, scale.reciprocal(), 0.0)
    # In place where `x_TGn` is a copy already: memory that is new costs more here than the arithmetic.
    is_copy = x is not x_TC or x.dtype != torch.float32
    t_TGn = torch.sub(x_TGn, lo_TG.float()[..., None], out=x_TGn if is_copy else None)
    t_TGn.mul_(inverse_TG[..., None])
    if generator is None:
        t_TGn = t_TGn.round_()
    else:
        t_TGn = t_TGn.add_(torch.rand(t_TGn.shape, generator=generator, device=x.device)).floor_()
    code_TC = t_TGn.clamp_(0, LARGEST).to(torch.uint8).view(tokens, -1)[:, :columns].contiguous()
    return Codes(code_TC, lo_TG, scale_TG)


def decode_eager(codes: Codes, dtype: torch.dtype) -> Tensor:
    """As `decode`, in torch operations: the reference."""
    columns = codes.code_TC.shape[1]
    groups, (lo, scale) = columns // GROUP, (codes.lo_TG.float(), codes.scale_TG.float())
    x_TC = codes.code_TC.float()
    x_TGn = x_TC[:, : groups * GROUP].unflatten(1, (groups, GROUP))
    x_TGn.mul_(scale[:, :groups, None]).add_(lo[:, :groups, None])
    if columns % GROUP:
        x_TC[:, groups * GROUP :].mul_(scale[:, groups:]).add_(lo[:, groups:])
    return x_TC.to(dtype)


def _down(x: Tensor) -> Tensor:
    """Bf16 that is not above fp32 `x`."""
    bits = x.view(torch.int32)
    # To drop bits brings a number nearer to 0, which is down for positive ones alone.
    further = ((bits < 0) & ((bits & _LOWER) != 0)).to(torch.int32) << 16
    return ((bits & ~_LOWER) + further).view(torch.float32).to(torch.bfloat16)


def _up(x: Tensor) -> Tensor:
    """Bf16 that is not below fp32 `x`, which is not negative."""
    bits = x.view(torch.int32)
    further = x.isfinite().to(torch.int32) * _LOWER
    return ((bits + further) & ~_LOWER).view(torch.float32).to(torch.bfloat16)
