"""Whole matrices on one rank each: stacks, rounds, and how parts get there and back. Integers alone, no torch.

    round 0      rank 0 has q_proj, k_proj     rank 1 has gate_proj
                 each rank sends what it holds of a matrix to the rank that owns it, and gets the same elements back
    round 1      rank 0 has v_proj, o_proj     rank 1 has up_proj    ...

Matrices of one shape are worked on together, in stacks. How many places a stack has follows from the shape alone, never
from how many matrices a rank owns, so that a matrix meets the same arithmetic on any number of ranks; places without a
matrix are zeros. What a rank holds of its own matrices lands in the stack at once:

    landing      | to rank 0 | to rank 1 | ...   | stack [n, R, C] | stack [n, R, C] | ...

Everything follows from the layout that all ranks know, so all of them send and expect the same numbers of elements,
those that hold nothing included. One process is a world of 1, which sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

from gwt_dist.layout import Fragment, Overlap, Units, columns_of
from gwt_dist.owners import cost, owners

ROUND = 1 << 23  # elements of the stacks that a rank has in one round, or one stack: 16 MiB in bf16
ALIGNED = 64  # elements: where stacks begin, so that matrix products read aligned memory

StackSize = Callable[[int, int], int]  # of rows and columns: places of a stack


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that ranks hold parts of."""

    shape: tuple[int, ...]
    held: Callable[[int], Sequence[Fragment]]  # of a rank: its parts, in the order in which it holds them
    group: int = 0  # matrices of one group are side by side in a stack
    keeper: int | None = (
        None  # the rank that keeps what belongs to it, and so works on it; None: whoever has least to do
    )

    @property
    def rows_columns(self) -> tuple[int, int]:
        """``(R, C)``."""
        return self.shape[0], columns_of(self.shape)


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices of one shape that a rank works on together."""

    rows: int
    columns: int
    places: int
    matrices: tuple[int, ...]  # in the first places; the others are zeros


@dataclass(frozen=True, slots=True)
class Route:
    """How parts reach the stacks of their owners, and come back the same way; the numbers are elements."""

    size: int  # of the landing: messages, then stacks
    slots: tuple[int, ...]  # where each part of this rank begins in the landing
    stacks: tuple[int, ...]  # where each stack of this rank begins there
    sends: tuple[int, ...]  # to each rank, one message after the other from the start of the landing
    receives: tuple[int, ...]  # from each rank, in a buffer of their own
    overlaps: tuple[Overlap, ...]  # of that buffer (source) and the stacks in the landing (destination)


@dataclass(frozen=True, slots=True)
class Round:
    """What one rank does in one round."""

    parts: tuple[tuple[int, int], ...]  # the matrix of each slot, and the number of the part among those of this rank
    stacks: tuple[Stack, ...]
    elements: Route
    rows: Route  # of a number for each row, ``[R, 1]``: what goes along


def plan_rounds(
    matrices: Sequence[Matrix], rank: int, world_size: int, stack_size: StackSize, limit: int = ROUND
) -> tuple[Round, ...]:
    """The rounds of `matrices`, seen from `rank`; in each a rank has at most `limit` elements, or one stack.

    Message from one rank to another: the parts that the one holds of the matrices that the other owns, in the order of
    the other's stacks.
    """
    held = [
        {there: numel for there in range(world_size) if (numel := sum(f.numel for f in matrix.held(there)))}
        for matrix in matrices
    ]
    free = [number for number, matrix in enumerate(matrices) if matrix.keeper is None]
    found = owners([matrices[number].shape for number in free], [held[number] for number in free], world_size)
    owner_of = [matrix.keeper or 0 for matrix in matrices]
    for number, owner in zip(free, found, strict=True):
        owner_of[number] = owner
    its = [list(_rounds(matrices, owner_of, there, stack_size, limit)) for there in range(world_size)]
    depth = max(map(len, its))
    return tuple(
        _round(matrices, [each[number] if number < len(each) else () for each in its], rank) for number in range(depth)
    )


def _rounds(
    matrices: Sequence[Matrix], owner_of: Sequence[int], rank: int, stack_size: StackSize, limit: int
) -> Iterator[tuple[Stack, ...]]:
    """The stacks of one rank, round by round."""
    mine = [number for number, owner in enumerate(owner_of) if owner == rank]

    def order(number: int) -> tuple[int, tuple[int, int], int, int]:
        matrix = matrices[number]
        return -cost(matrix.shape), matrix.rows_columns, matrix.group, number

    found: list[Stack] = []
    room = limit
    for (rows, columns), alike in groupby(sorted(mine, key=order), key=lambda number: matrices[number].rows_columns):
        numbers, places = tuple(alike), stack_size(rows, columns)
        for first in range(0, len(numbers), places):
            if found and room < places * rows * columns:
                yield tuple(found)
                found, room = [], limit
            found.append(Stack(rows, columns, places, numbers[first : first + places]))
            room -= places * rows * columns
    if found:
        yield tuple(found)


def _round(matrices: Sequence[Matrix], stacks: Sequence[tuple[Stack, ...]], rank: int) -> Round:
    """`stacks` are those of each rank."""
    owned = [[number for stack in its for number in stack.matrices] for its in stacks]
    parts = [(number, part) for its in owned for number in its for part in range(len(matrices[number].held(rank)))]
    return Round(
        tuple(parts),
        stacks[rank],
        _route(matrices, owned, stacks[rank], rank, lambda fragment: fragment),
        _route(matrices, owned, [replace(stack, columns=1) for stack in stacks[rank]], rank, rows_of),
    )


def _route(
    matrices: Sequence[Matrix],
    owned: Sequence[Sequence[int]],  # by each rank, in order
    stacks: Sequence[Stack],  # of this one
    rank: int,
    form: Callable[[Fragment], Fragment],  # of a part: what of it goes this way
) -> Route:
    def lands(there: int, fragment: Fragment) -> bool:
        """Whether a part of `rank` that `there` owns is dense in the stack, so that it needs no message."""
        return there == rank and fragment.rows == 1

    def held(there: int, numbers: Sequence[int]) -> list[tuple[int, Fragment]]:
        return [(number, form(fragment)) for number in numbers for fragment in matrices[number].held(there)]

    mine = [held(rank, numbers) for numbers in owned]  # by owner
    sends = [sum(its.numel for _, its in found if not lands(there, its)) for there, found in enumerate(mine)]
    size, begins = _aligned(sum(sends)), []
    place: dict[int, int] = {}
    for stack in stacks:
        begins.append(size)
        place |= {number: size + i * stack.rows * stack.columns for i, number in enumerate(stack.matrices)}
        size += _aligned(stack.places * stack.rows * stack.columns)
    slots, sent = [], 0
    for there, found in enumerate(mine):
        for number, its in found:
            slots.append(place[number] + its.start if lands(there, its) else sent)
            sent += 0 if lands(there, its) else its.numel
    receives = [0] * len(owned)
    overlaps: list[Overlap] = []
    for there in range(len(owned)):
        for number, its in held(there, owned[rank]):
            if not lands(there, its):
                whole = Fragment("", its.shape, 0, prod(its.shape), place[number])
                overlaps += replace(its, offset=sum(receives)).intersect(whole)
                receives[there] += its.numel
    return Route(size, tuple(slots), tuple(begins), tuple(sends), tuple(receives), tuple(overlaps))


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNED) * ALIGNED


def rows_of(fragment: Fragment) -> Fragment:
    """The numbers of the rows that a fragment touches, of ``[R, 1]``."""
    return Units(fragment.columns, max(1, fragment.columns)).moments(fragment)
