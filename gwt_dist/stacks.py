"""Matrices that one parameter holds stacked, ``[E, R, C]``, as the experts of a mixture: each is a tensor by itself.

    experts [E=2, R=3, C=4]  ->  experts[0] [3, 4], experts[1] [3, 4]        elements 0..11 and 12..23 of the stack

Below the optimizer there are tensors of at most two dimensions and these, so units, rows, sums and owners need not know
what a stack is. What is stored of a tensor has the stack's name: `together` says where in it that of a matrix is.

Shape alone cannot tell a stack from the kernel of a convolution, whose row is an output channel, so a group says it.
Integers alone, as `layout`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from math import prod

from gwt_dist.exchange import Whole
from gwt_dist.layout import Fragment, LayoutError

Shape = tuple[int, ...]


def number_of(shape: Sequence[int], what: str = "a tensor") -> int:
    """Matrices of a tensor in a group with ``stacked=True``, 0 of one that is no stack: a matrix, a vector, a number.

    Raises `LayoutError`, which says `what`, for more than three dimensions.
    """
    if len(shape) > 3:
        raise LayoutError(
            f"{what} of shape {tuple(shape)} is in a parameter group with stacked=True, which reads a tensor of three "
            f"dimensions as [matrices, rows, columns]: of {len(shape)} it is not known where a matrix begins. Put it "
            f"into a group without stacked, where a row is [shape[0], rest], or make it [matrices, rows, columns]"
        )
    return shape[0] if len(shape) == 3 else 0


def name_of(fqn: str, number: int) -> str:
    """The name of a matrix of a stack."""
    return f"{fqn}[{number}]"


def matrices(whole: Whole) -> tuple[Whole, ...]:
    """The tensors that a tensor is read as: the matrices of a stack, or itself."""
    number = number_of(whole.shape, repr(whole.fqn))
    if not number:
        return (whole,)
    shape, size, cuts = whole.shape[1:], prod(whole.shape[1:]), whole.cuts
    found = []
    for i in range(number):
        within = cuts[bisect_right(cuts, i * size) : bisect_left(cuts, (i + 1) * size)]
        found.append(Whole(name_of(whole.fqn, i), shape, tuple(cut - i * size for cut in within)))
    return tuple(found)


def parts(fragment: Fragment) -> Iterator[Fragment]:
    """What a fragment holds of each of `matrices`, in order; of those of which it holds nothing, an empty fragment."""
    number = number_of(fragment.shape, repr(fragment.fqn))
    if not number:
        yield fragment
        return
    shape, size = fragment.shape[1:], prod(fragment.shape[1:])
    offset = fragment.offset
    held: list[list[Fragment]] = [[] for _ in range(number)]
    for start, stop in fragment.intervals:  # of several rows, each of which is a matrix, or one over whole matrices
        for i in range(start // size, -(-stop // size)):
            low, high = max(start, i * size), min(stop, (i + 1) * size)
            held[i].append(Fragment(name_of(fragment.fqn, i), shape, low - i * size, high - i * size, offset))
            offset += high - low
    for i, its in enumerate(held):
        yield from its or [Fragment(name_of(fragment.fqn, i), shape, 0, 0)]


def together(fragment: Fragment, fqn: str, place: int, number: int) -> Fragment:
    """What is kept of matrix `place` of `number`, as a part of what is kept of the stack `fqn`: one below another."""
    first, *rest = fragment.shape
    shift = place * prod(fragment.shape)
    start, stop = fragment.start + shift, fragment.stop + shift
    return Fragment(fqn, (number * first, *rest), start, stop, fragment.offset, fragment.rows)
