"""Which rank orthogonalizes which matrix, in which round, and what it is sent for it: integers alone, no torch.

    round 0      rank 0 has q_proj        rank 1 has k_proj
                 each rank sends the part of q_proj that it holds to rank 0, that of k_proj to rank 1,
                 and gets the same elements back, orthogonalized
    round 1      rank 0 has v_proj        rank 1 has o_proj    ...

A rank has one round's matrices in memory at a time. Everything follows from the layout that all ranks know, so all of
them send and expect the same numbers of elements, those that hold nothing included. One process is a world of 1, which
sends to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

from gwt_dist.layout import Fragment, Overlap, Units, columns_of

ROUND = 1 << 24  # elements of the matrices that a rank has in one round, or one matrix: 64 MiB in fp32


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that ranks hold parts of."""

    shape: tuple[int, ...]
    held: Callable[[int], Sequence[Fragment]]  # of a rank: its parts, in the order in which it holds them
    along: int = 0  # fields with one number a row that go with it


@dataclass(frozen=True, slots=True)
class Slot:
    """Where `length` elements of a part of a matrix stand in the buffer that this rank sends.

    After them come the numbers of the rows that the part touches, `rows` of each field that goes along.
    """

    matrix: int
    part: int  # among those of the matrix that this rank holds
    start: int
    length: int
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Owned:
    """A matrix that this rank puts together of what it was sent: elements of that buffer and their places in it."""

    matrix: int
    shape: tuple[int, int]
    overlaps: tuple[Overlap, ...]
    along: tuple[tuple[Overlap, ...], ...] = ()  # the same of each field of rows, ``[R, 1]``


@dataclass(frozen=True, slots=True)
class Round:
    """What one rank sends and gets in one round, by rank, and what it does with it."""

    sends: tuple[int, ...]  # elements for each rank
    receives: tuple[int, ...]  # elements of each rank
    slots: tuple[Slot, ...]
    owned: tuple[Owned, ...]


def cost(shape: Sequence[int]) -> int:
    """Multiplications of a step of the iteration, but for a factor: ``R * C * min(R, C)``."""
    columns = columns_of(shape)
    return prod(shape) * min(shape[0], columns)


def assign(shapes: Sequence[Sequence[int]], world_size: int, limit: int = ROUND) -> list[list[tuple[int, int]]]:
    """Rounds of pairs (matrix, rank that owns it): the dearest first, each to the rank that has least to do.

    In one round a rank has at most `limit` elements, or a single matrix.
    """
    busy, rounds_of = [0] * world_size, [0] * world_size
    room = [limit] * world_size
    rounds: list[list[tuple[int, int]]] = []
    for number in sorted(range(len(shapes)), key=lambda i: (-cost(shapes[i]), i)):
        owner = min(range(world_size), key=lambda rank: (busy[rank], rank))
        numel = prod(shapes[number])
        if room[owner] != limit and room[owner] < numel:
            rounds_of[owner], room[owner] = rounds_of[owner] + 1, limit
        busy[owner] += cost(shapes[number])
        room[owner] -= numel
        if rounds_of[owner] == len(rounds):
            rounds.append([])
        rounds[rounds_of[owner]].append((number, owner))
    return rounds


def plan_rounds(matrices: Sequence[Matrix], rank: int, world_size: int, limit: int = ROUND) -> tuple[Round, ...]:
    """The rounds of `matrices`, seen from `rank`.

    Message from one rank to another: the parts that the one holds of the matrices that the other owns, in the order of
    the round.
    """
    return tuple(
        _round(matrices, pairs, rank, world_size) for pairs in assign([m.shape for m in matrices], world_size, limit)
    )


def _round(matrices: Sequence[Matrix], pairs: Sequence[tuple[int, int]], rank: int, world_size: int) -> Round:
    slots: list[Slot] = []
    sends = [0] * world_size
    for there in range(world_size):  # the buffer has what goes to one rank after what goes to another
        for number, owner in pairs:
            for part, fragment in enumerate(matrices[number].held(rank) if owner == there else ()):
                rows = rows_of(fragment).numel if matrices[number].along else 0
                slots.append(Slot(number, part, sum(sends), fragment.numel, rows))
                sends[there] += fragment.numel + matrices[number].along * rows
    mine = [number for number, owner in pairs if owner == rank]
    receives = [0] * world_size
    # Of each matrix: first its elements, then each field of rows.
    overlaps: dict[int, list[list[Overlap]]] = {i: [[] for _ in range(1 + matrices[i].along)] for i in mine}
    for there in range(world_size):
        for number in mine:
            for fragment in matrices[number].held(there):
                its = [fragment, *[rows_of(fragment)] * matrices[number].along]
                for found, one in zip(overlaps[number], its, strict=True):
                    whole = Fragment("", one.shape, 0, prod(one.shape))
                    found += replace(one, offset=sum(receives)).intersect(whole)
                    receives[there] += one.numel
    owned = [
        Owned(
            number,
            (matrices[number].shape[0], columns_of(matrices[number].shape)),
            tuple(first),
            tuple(map(tuple, rest)),
        )
        for number in mine
        for first, *rest in [overlaps[number]]
    ]
    return Round(tuple(sends), tuple(receives), tuple(slots), tuple(owned))


def rows_of(fragment: Fragment) -> Fragment:
    """The numbers of the rows that a fragment touches, of ``[R, 1]``."""
    return Units(fragment.columns, max(1, fragment.columns)).moments(fragment)
