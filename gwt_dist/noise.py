"""Noise for rounding that is a function of a place and a step: the same bits whatever ranks, kernels and threads.

    mix    a hash of 32 bits (C. Wellons' lowbias32): shifts, exclusive ors and products, so alike on every machine
    key    = mix(step ^ mix(what ^ mix(seed ^ salt)))         salt = mix(R ^ mix(C)) of a tensor ``[R, C]``
    noise  = mix(column ^ mix(row ^ key))                     what: 0 for weights, 1 for two moments, 2 for two more

16 bits are enough for a rounding: weights take the upper half, and of two moments the first the upper half, the second
the lower one. A tensor is known by its shape, as no name of it is the same under all engines: tensors of one shape
share their noise.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

T = TypeVar("T", int, Tensor)
MASK = 0xFFFFFFFF
WEIGHT = 0  # what weights are rounded by


def mix(x: T) -> T:
    """The hash of 32 bits: of an int, or of each element of an int64 tensor, from 0 to 2**32 - 1."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def salt(rows: int, columns: int) -> int:
    """What a tensor ``[rows, columns]`` is known by."""
    return mix((rows ^ mix(columns & MASK)) & MASK)


def key(step: Tensor, what: int, seed: int, its_salt: int) -> Tensor:
    """Of a tensor at a step, 0-d int64; `step` is 0-d and whole, on any device, and is not waited for."""
    return mix((step.long() & MASK) ^ mix(what ^ mix(seed ^ its_salt)))


def noise(row: Tensor, column: Tensor, its_key: Tensor) -> Tensor:
    """Of places in the whole tensor, int64 from 0 to 2**32 - 1; `row` and `column` int64 of one shape, or broadcast."""
    return mix((column & MASK) ^ mix((row & MASK) ^ its_key))


def of_moment(number: int) -> tuple[int, int]:
    """Of moment `number` of a program, from 0 on: what its key is of, and by how many bits noise is shifted right."""
    return 1 + number // 2, 0 if number % 2 else 16


def chance(its_noise: Tensor, shift: int = 16) -> Tensor:
    """The 16 bits that one rounding takes of noise, int64 from 0 to 65535, of its shape."""
    return its_noise >> shift & 0xFFFF
