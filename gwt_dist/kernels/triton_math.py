"""Sums and powers for the Triton kernels; imports triton."""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def unit_sum(x, BLOCK: tl.constexpr, LEVEL: tl.constexpr):
    """Sum of the unit of each row of `x`, ``[BLOCK]``, a tree of neighbours as `wavelet.unit_sum`.

    A row is a unit, ``[BLOCK, 2**LEVEL]``, or a part of one, ``[BLOCK, V]``, with its other parts next to it: their
    sums go on in a butterfly, which adds the pairs of the tree and leaves the sum with all of them.
    """
    parts: tl.constexpr = (1 << LEVEL) // x.shape[1]
    for level in tl.static_range(LEVEL):
        if (parts << level) < (1 << LEVEL):
            even, odd = tl.split(tl.reshape(x, (BLOCK, (1 << (LEVEL - 1 - level)) // parts, 2)))
            x = even + odd
    x = tl.reshape(x, (BLOCK,))
    i = tl.arange(0, BLOCK)
    for level in tl.static_range(LEVEL):
        if (1 << level) < parts:
            x += tl.gather(x, i ^ (1 << level), 0)
    return x


@triton.jit
def _halves(x):
    """Two fp64 of 26 bits each whose sum is x."""
    wide = x * 134217729.0  # 2**27 + 1
    high = wide - (wide - x)
    return high, x - high


@triton.jit
def _multiply(x, x_low, y, y_low):
    """Product of two numbers, each the sum of two fp64 (T. J. Dekker, A floating-point technique, 1971).

    Without a fused multiply-add, which Triton's interpreter rounds twice in some releases.
    """
    x_high, x_rest = _halves(x)
    y_high, y_rest = _halves(y)
    high = x * y
    low = x_rest * y_rest - (((high - x_high * y_high) - x_rest * y_high) - x_high * y_rest)
    low += x * y_low + x_low * y
    total = high + low
    return total, low - (total - high)


@triton.jit
def power(base, n):
    """``base**n`` for fp64 base and whole n >= 0, to the last bit or next to it, as `pow` would return it.

    Plain squaring would lose a bit with each doubling of n, and 1 - base**n ten more where base is near 1.
    """
    power, power_low = tl.full(base.shape, 1.0, tl.float64), tl.full(base.shape, 0.0, tl.float64)
    low = tl.full(base.shape, 0.0, tl.float64)
    while tl.max(n) > 0:
        product, product_low = _multiply(power, power_low, base, low)
        odd = (n & 1) == 1
        power, power_low = tl.where(odd, product, power), tl.where(odd, product_low, power_low)
        base, low = _multiply(base, low, base, low)
        n = n >> 1
    return power + power_low
