"""Numbers in the formats of `formats`, rounded by noise: the reference for every kernel.

    bf16   the upper 16 bits of fp32, after noise was added to the lower ones
    int8   scale * code * (127 + |code|), code -127 to 127, scale the largest of the cell / 32258
    e4m4   scale * (1 + m/16) * 2**(e-15), e and m four bits each, scale the power of two at or below the largest,
           or above it where that may be rounded up to it

Codes are rounded up with the probability of the rest. To nearest a second moment could not decay, as a step changes it
by less than half of what a code can say, and small momentum would stick. In e4m4 nothing is 0 but a cell that is all 0
(or below 2**-95), and what is less than ``2**-15`` of the scale is stored as that: a moment that vanished would make
its update without bound.

Single fp32 operations and shifts, so every kernel has the same bits. int8 is companded, as in FlashOptim (arXiv
2602.23349): twice as dense at 0 as linear codes are. The curves are this project's: a parabola has its own inverse in
one root, and is read without a division.

Shapes: N numbers in G cells; codes (N,), scales (G,) fp32, `cells_N` the cell of each number, int64; `chance_N` the 16
bits by which each is rounded, int64, see `noise.chance`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST = 127  # code of int8
SCALE = 3.100006142631173e-05  # of the largest of a cell: 1 / (2 * 127**2), what its code stands for, in fp32
TINY = 2.0**-126  # scales below have no inverse
_HALF = LARGEST / 2
_SIGNLESS = 0x7FFFFFFF
_INF = 0x7F800000
_FRACTION = 0x7FFFFF
_LAST = 15 << 19  # fractions above 15/16 may be rounded up to the next power of two
_LARGEST = 254 << 23  # of the exponent 254 there is no next one


def round_bf16(x: Tensor, chance: Tensor) -> Tensor:
    """bf16 of fp32 `x`, rounded up with the probability of the rest; both of one shape."""
    bits = x.float().contiguous().view(torch.int32).long() & 0xFFFFFFFF
    finite = (bits & _INF) != _INF
    is_nan = (bits & _SIGNLESS) > _INF
    upper = torch.where(finite, bits + chance, bits) >> 16
    return (upper | (is_nan.long() << 6)).to(torch.int16).view(torch.bfloat16)


def tops(x_N: Tensor, cells_N: Tensor, cells: int) -> Tensor:
    """The bits of the largest absolute value of each cell, (G,) int32: inf and NaN are the largest of all."""
    bits_N = x_N.view(torch.int32) & _SIGNLESS
    return torch.zeros(cells, dtype=torch.int32, device=x_N.device).scatter_reduce(0, cells_N, bits_N, "amax")


def encode_int8(x_N: Tensor, chance_N: Tensor, cells_N: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Codes, int8 (N,), and scales, (G,), of fp32 `x_N`."""
    scale = tops(x_N, cells_N, cells).view(torch.float32) * SCALE
    usable = (scale >= TINY) & scale.isfinite()
    inverse_N = torch.where(usable, 1 / scale, 0.0)[cells_N]
    x_N = torch.where(usable[cells_N], x_N, 0.0)
    # The code of which t scales are read: c * (127 + c) = t. The root in fp64 rounds correctly, see `denominator`.
    t_N = (x_N * inverse_N).abs()
    z_N = (t_N + _HALF * _HALF).double().sqrt().float() - _HALF
    code_N = (z_N.copysign(x_N) + chance_N.float() * 2.0**-16).floor_().clamp_(-LARGEST, LARGEST)
    return code_N.to(torch.int8), scale


def decode_int8(code_N: Tensor, scale: Tensor, cells_N: Tensor) -> Tensor:
    """fp32 (N,)."""
    code_N = code_N.float()
    return scale[cells_N] * (code_N * (code_N.abs() + LARGEST))


def encode_e4m4(x_N: Tensor, chance_N: Tensor, cells_N: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Codes, uint8 (N,), and scales, (G,), of fp32 `x_N`, which is not negative."""
    top = tops(x_N, cells_N, cells)
    # The largest may be rounded up to the next power of two, which must have a code: without it a cell could not grow.
    e = (top >> 23) + ((top & _FRACTION > _LAST) & (top < _LARGEST)).to(torch.int32)
    e = torch.where(e < 32, 0, e)
    bits_N = x_N.view(torch.int32).long()
    code_N = ((bits_N + (chance_N << 3)) >> 19) - ((e.long() - 15) << 4)[cells_N]
    code_N = torch.where(((e > 0) & (e < 255))[cells_N], code_N.clamp(0, 255), 0)
    return code_N.to(torch.uint8), (e << 23).view(torch.float32)


def decode_e4m4(code_N: Tensor, scale: Tensor, cells_N: Tensor) -> Tensor:
    """fp32 (N,)."""
    return scale[cells_N] * ((code_N.to(torch.int32) + (112 << 4)) << 19).view(torch.float32)


def _encode_bf16(x_N: Tensor, chance_N: Tensor, cells_N: Tensor, cells: int) -> tuple[Tensor, None]:
    return round_bf16(x_N, chance_N), None


def _decode_bf16(code_N: Tensor, scale: None, cells_N: Tensor) -> Tensor:
    return code_N.float()


# By format, but for fp32, whose numbers are stored as they are.
_CODECS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor | None]], Callable[..., Tensor]]] = {
    "bf16": (_encode_bf16, _decode_bf16),
    "int8": (encode_int8, decode_int8),
    "e4m4": (encode_e4m4, decode_e4m4),
}


def encode(form: str, x_N: Tensor, chance_N: Tensor, cells_N: Tensor, cells: int) -> tuple[Tensor, Tensor | None]:
    """Codes and scales of fp32 `x_N` in the format called `form`; None where that has no scales."""
    return _CODECS[form][0](x_N, chance_N, cells_N, cells)


def decode(form: str, code_N: Tensor, scale: Tensor | None, cells_N: Tensor) -> Tensor:
    """What `encode` stored, fp32 (N,)."""
    return _CODECS[form][1](code_N, scale, cells_N)
