"""Which rank works on which matrix: the one that holds most of it, as far as the work stays even. Integers, no torch.

Under engines that cut a row of tensors into equal parts (ZeRO-1 and 2) almost every matrix has a rank that holds all of
it, and only those that a boundary cuts have to travel. Where all ranks hold as much (ZeRO-3, FSDP2) the work decides.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from gwt_dist.layout import columns_of

SLACK = 0.1  # how much more than evenly shared work a rank may have for the sake of what it holds; and see `keeper`


def cost(shape: Sequence[int]) -> int:
    """Multiplications of a step of the iteration, but for a factor: ``R * C * min(R, C)``."""
    return prod(shape) * min(shape[0], columns_of(shape))


def owners(shapes: Sequence[Sequence[int]], held: Sequence[Mapping[int, int]], world_size: int) -> list[int]:
    """The rank that owns each matrix; `held` has of each the elements that ranks hold, of those that hold any.

    Dearest first. No rank has more than `SLACK` above what it would have if places did not matter.
    """
    order = sorted(range(len(shapes)), key=lambda i: (-cost(shapes[i]), i))
    even, most = _evenly(shapes, order, world_size)
    bound = most * (1 + SLACK)
    busy, found = [0] * world_size, [0] * len(shapes)
    heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def idlest(ranks: tuple[int, ...]) -> int:
        """The one of these, in order, that has least to do."""
        if ranks not in heaps:
            heaps[ranks] = [(0, rank) for rank in ranks]
        heap = heaps[ranks]
        while heap[0][0] < busy[heap[0][1]]:  # work of a rank only grows, so what is too low here comes first
            heapq.heapreplace(heap, (busy[heap[0][1]], heap[0][1]))
        return heap[0][1]

    alike: dict[int, list[tuple[int, ...]]] = {}  # by identity: many matrices may be held as one is
    everyone = tuple(range(world_size))
    for number in order:
        its, work = held[number], cost(shapes[number])
        if id(its) not in alike:
            alike[id(its)] = [*_by_elements(its), everyone]
        owner = next((rank for rank in map(idlest, alike[id(its)]) if busy[rank] + work <= bound), None)
        if owner is None:
            return even
        busy[owner] += work
        found[number] = owner
    return found


def keeper(held: Mapping[int, int], turn: int) -> int:
    """The rank that keeps what belongs to one whole matrix for as long as the layout lasts: one that holds most of it.

    `held` has the elements that ranks hold, of those that hold any. Among ranks that hold as much, but for `SLACK`, the
    turn decides, a number of the matrix, see `turns`: unlike the work of one step, what is kept cannot depend on what
    else is stepped.
    """
    least = max(held.values(), default=0) * (1 - SLACK)
    ranks = sorted(rank for rank, numel in held.items() if numel >= least)
    return ranks[turn % len(ranks)] if ranks else 0


def turns(shapes: Sequence[Sequence[int]]) -> list[int]:
    """A number for each matrix, such that those of one shape take turns, and shapes do not begin at the same rank."""
    first: dict[tuple[int, ...], int] = {}
    before: Counter[tuple[int, ...]] = Counter()
    found = []
    for number, shape in enumerate(map(tuple, shapes)):
        found.append(first.setdefault(shape, number) + before[shape])
        before[shape] += 1
    return found


def _by_elements(held: Mapping[int, int]) -> list[tuple[int, ...]]:
    """The ranks that hold most of a matrix, those that hold less, and so on."""
    found: dict[int, list[int]] = {}
    for rank, numel in sorted(held.items()):
        found.setdefault(numel, []).append(rank)
    return [tuple(found[numel]) for numel in sorted(found, reverse=True)]


def _evenly(shapes: Sequence[Sequence[int]], order: Sequence[int], world_size: int) -> tuple[list[int], int]:
    """Owners by work alone, each matrix to the rank that has least to do; and the most that one has."""
    busy = [(0, rank) for rank in range(world_size)]
    found = [0] * len(shapes)
    for number in order:
        work, found[number] = busy[0]
        heapq.heapreplace(busy, (work + cost(shapes[number]), found[number]))
    return found, max(work for work, _ in busy)
