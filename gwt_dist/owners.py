"""Which rank works on which matrix: the one that holds most of it, as far as the work stays even. Integers, no torch.

Under engines that cut a row of tensors into equal parts (ZeRO-1 and 2) almost every matrix has a rank that holds all of
it, and only those that a boundary cuts have to travel. Where all ranks hold as much (ZeRO-3, FSDP2) the work decides.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from math import prod

from gwt_dist.layout import columns_of

SLACK = 0.1  # how much more than evenly shared work a rank may have for the sake of what it holds


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
    for number in order:
        its, work = held[number], cost(shapes[number])
        fits = [rank for rank in its if busy[rank] + work <= bound]
        fits = fits or [rank for rank in range(world_size) if busy[rank] + work <= bound]
        if not fits:
            return even
        owner = min(fits, key=lambda rank: (-its.get(rank, 0), busy[rank], rank))
        busy[owner] += work
        found[number] = owner
    return found


def _evenly(shapes: Sequence[Sequence[int]], order: Sequence[int], world_size: int) -> tuple[list[int], int]:
    """Owners by work alone, each matrix to the rank that has least to do; and the most that one has."""
    busy = [(0, rank) for rank in range(world_size)]
    found = [0] * len(shapes)
    for number in order:
        work, found[number] = busy[0]
        heapq.heapreplace(busy, (work + cost(shapes[number]), found[number]))
    return found, max(work for work, _ in busy)
