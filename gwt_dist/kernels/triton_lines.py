"""Rows that begin anywhere in memory, for the Triton kernels; imports triton.

A warp takes 32 elements in one instruction, and costs a sector of 32 bytes more where they do not begin at one. So the
N elements that a program takes at once lie on a ring of N places: warps begin where lines of memory begin, and what
comes before the first element in its line is where the last elements go. From there elements go through shared memory
to the threads that have their units, and the changes of weights back.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

PART = tl.constexpr(4)  # elements of a unit that a thread takes; more would meet in the banks of shared memory


@triton.jit
def before(pointer):
    """Elements from the begin of the 32 that a warp takes to `pointer`."""
    size: tl.constexpr = pointer.dtype.element_ty.primitive_bitwidth // 8
    return (pointer.to(tl.int64) & (32 * size - 1)).to(tl.int32) // size


@triton.jit
def ring(p, shift, N: tl.constexpr):
    """Which element, counted from the begin of its line, is at the places p of the ring; the first of N is `shift`."""
    return p + tl.where(p < shift, N, 0)


@triton.jit
def _swap(p):
    return p ^ ((p >> 5) & 3)


@triton.jit
def places(N: tl.constexpr):
    """All places, ``[N]``, some swapped within a warp: threads that read four neighbours each meet in no bank."""
    warps: tl.constexpr = min(N, 128)
    p = (tl.arange(0, N // warps) * warps)[:, None] + _swap(tl.arange(0, warps))[None, :]
    return tl.reshape(p, (N,))


@triton.jit
def to_parts(x, first, length, N: tl.constexpr, V: tl.constexpr):
    """Parts of units ``[M, V]`` from `x` on the ring, ``[N]`` in the order of `places`; zeros behind their length.

    `first`, ``[M]``, is the first element of a part, counted from the begin of the line; `length` ``[M]``.
    """
    M: tl.constexpr = N // V
    j = tl.arange(0, V)[:, None]
    place = _swap((first[None, :] + j) & (N - 1))
    x = tl.gather(x, tl.reshape(place, (N,)), 0)
    x = tl.where(tl.reshape(j < length[None, :], (N,)), x, 0.0)
    return tl.trans(tl.reshape(x, (V, M)))


@triton.jit
def changes(
    CHANGE: tl.constexpr,  # of the details
    x,  # [M, V]
    a,  # [M], as all that follow up to n
    exp_avg,
    exp_avg_sq,
    n,
    size,  # 0-d, as all that follow
    first,
    second,
    rest1,
    eps,
    detail_gain,
    coherent,
    GAIN: tl.constexpr,
    LEVEL: tl.constexpr,
    M: tl.constexpr,
    V: tl.constexpr,
):
    """What the weights lose, ``[M * V]`` in the order of `place_of_change`.

    One element of each part at a time: a thread keeps all of its parts, and the numbers of a unit stay where they are.
    """
    if V == 1:
        change = CHANGE(
            x, a, exp_avg, exp_avg_sq, n, size, first, second, rest1, eps, detail_gain, coherent, GAIN, LEVEL
        )
        return tl.reshape(change, (M,))
    else:
        half: tl.constexpr = V // 2
        even, odd = tl.split(tl.reshape(x, (M, half, 2)))
        even = changes(
            CHANGE, even, a, exp_avg, exp_avg_sq, n, size, first, second, rest1, eps, detail_gain, coherent, GAIN,
            LEVEL, M, half,
        )  # fmt: skip
        odd = changes(
            CHANGE, odd, a, exp_avg, exp_avg_sq, n, size, first, second, rest1, eps, detail_gain, coherent, GAIN,
            LEVEL, M, half,
        )  # fmt: skip
        return tl.reshape(tl.trans(tl.join(even, odd)), (M * V,))


@triton.jit
def place_of_change(element, M: tl.constexpr, V: tl.constexpr):
    """Where `changes` has an element, counted from the first of all units: even ones of all parts before odd ones."""
    shift: tl.constexpr = V // 2  # log2, as V is 1, 2 or 4
    j = element & (V - 1)
    return (element >> shift) + ((j & 1) * (V // 2) + (j >> 1)) * M
