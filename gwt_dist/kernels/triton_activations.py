"""Activations in 8 bits on a GPU, one pass over memory each way: see `activations.codes`, whose codes these are.

Imports triton. Bit for bit as torch's operations of numbers that are finite; T tokens, C numbers, G groups of a token.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = tl.constexpr(128)
LARGEST = tl.constexpr(255.0)  # code
_LOWER = tl.constexpr(0xFFFF)  # the bits of fp32 that bf16 has not
_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2**23: what is added to it is rounded to nearest, to even
_TOGETHER = 32  # groups of a program
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def encode(x_TC: Tensor, code_TC: Tensor, lo_TG: Tensor, scale_TG: Tensor) -> None:
    """Write codes; all are dense. `x_TC` is fp32, bf16 or fp16, codes are uint8, and what goes with them bf16."""
    _run(_encode, x_TC, code_TC, lo_TG, scale_TG)


def decode(x_TC: Tensor, code_TC: Tensor, lo_TG: Tensor, scale_TG: Tensor) -> None:
    """Write numbers."""
    _run(_decode, x_TC, code_TC, lo_TG, scale_TG)


def _run(kernel, x_TC: Tensor, code_TC: Tensor, lo_TG: Tensor, scale_TG: Tensor) -> None:
    groups = lo_TG.numel()
    if groups:
        programs = (triton.cdiv(groups, _TOGETHER),)
        # Groups are counted over all tokens; a launch has up to 2**31 - 1 programs, of 2**12 numbers each.
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(x_TC.device) if x_TC.device.type == "cuda" else nullcontext():
            kernel[programs](x_TC, code_TC, lo_TG, scale_TG, groups, *code_TC.shape[1:], N=_TOGETHER, **OPTIONS)


@triton.jit
def _places(groups, columns, N: tl.constexpr):
    """Of N groups: their numbers, where their elements lie, and which of both there are."""
    i = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    each = (columns + GROUP - 1) // GROUP  # of a token
    column = (i % each * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    there = i < groups
    return i, (i // each * columns)[:, None] + column, there, there[:, None] & (column < columns)


@triton.jit
def _upper(bits):
    """The bf16 of the upper half of int32 bits."""
    return (bits & ~_LOWER).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _encode(x, code, lo, scale, groups, columns, N: tl.constexpr):
    i, place, there, inside = _places(groups, columns, N)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    is_none = tl.max(tl.where(inside & (value != value), 1, 0), 1) > 0
    least = tl.min(tl.where(inside, value, float("inf")), 1)
    most = tl.max(tl.where(inside, value, float("-inf")), 1)
    bits = least.to(tl.int32, bitcast=True)
    # To drop bits brings a number nearer to 0, which is down for positive ones alone.
    low = tl.where((bits < 0) & ((bits & _LOWER) != 0), bits + _LOWER + 1, bits)
    low = tl.where(is_none, 0x7FC00000, low)
    lower = _upper(low).to(tl.float32)
    exact = tl.div_rn(most, tl.full(most.shape, LARGEST, tl.float32))
    exact -= tl.div_rn(lower, tl.full(most.shape, LARGEST, tl.float32))  # a difference alone could be infinite
    bits = exact.to(tl.int32, bitcast=True)
    up = tl.where(exact < float("inf"), bits + _LOWER, bits)  # not negative, so `<` says that it is finite
    up = tl.where(exact == exact, up, 0x7FC00000)
    width = _upper(up).to(tl.float32)
    one = tl.full(width.shape, 1.0, tl.float32)
    inverse = tl.where(width > 0, tl.div_rn(one, tl.where(width > 0, width, one)), 0.0)
    t = (value - lower[:, None]) * inverse[:, None]
    t = tl.where(t > 0, tl.minimum(t, LARGEST), 0.0)
    t = (t + _TO_WHOLE) - _TO_WHOLE
    tl.store(code + place, t.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(lo + i, lower.to(tl.bfloat16), mask=there)
    tl.store(scale + i, width.to(tl.bfloat16), mask=there)


@triton.jit
def _decode(x, code, lo, scale, groups, columns, N: tl.constexpr):
    i, place, there, inside = _places(groups, columns, N)
    lower = tl.load(lo + i, mask=there, other=0.0).to(tl.float32)
    width = tl.load(scale + i, mask=there, other=0.0).to(tl.float32)
    value = tl.load(code + place, mask=inside, other=0).to(tl.float32) * width[:, None] + lower[:, None]
    tl.store(x + place, value.to(x.dtype.element_ty), mask=inside)
