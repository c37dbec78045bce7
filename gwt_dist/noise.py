"""Noise for rounding that is a function of a place and a step: the same bits whatever ranks, kernels and threads.

    mix    a hash of 32 bits (C. Wellons' lowbias32): shifts, exclusive ors and products, so alike on every machine
    key    = mix(step ^ mix(field ^ mix(seed ^ salt)))        salt = mix(R ^ mix(C)) of a tensor ``[R, C]``
    noise  = mix(column ^ mix(row ^ key))

A tensor is known by its shape, as no name of it is the same under all engines: tensors of one shape share their noise.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

T = TypeVar("T", int, Tensor)
MASK = 0xFFFFFFFF
WEIGHT = 0  # the field number of the weight; the moments of a program are 1, 2, ... in its order


def mix(x: T) -> T:
    """The hash of 32 bits: of an int, or of each element of an int64 tensor, from 0 to 2**32 - 1."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def salt(rows: int, columns: int) -> int:
    """What a tensor ``[rows, columns]`` is known by."""
    return mix((rows ^ mix(columns & MASK)) & MASK)


def key(step: Tensor, field: int, seed: int, its_salt: int) -> Tensor:
    """Of a field of a tensor at a step, 0-d int64; `step` is 0-d and whole, on any device, and is not waited for."""
    return mix((step.long() & MASK) ^ mix(field ^ mix(seed ^ its_salt)))


def noise(row: Tensor, column: Tensor, its_key: Tensor) -> Tensor:
    """Of places in the whole tensor, int64 from 0 to 2**32 - 1; `row` and `column` int64 of one shape, or broadcast."""
    return mix((column & MASK) ^ mix((row & MASK) ^ its_key))
