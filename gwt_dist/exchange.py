"""Who completes whose cut cells: what all ranks hold between them, and one sum that gives each what it lacks.

Integers alone, as `layout`: the plan is the same arithmetic before a run, in a run and in a simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from gwt_dist.layout import Fragment, LayoutError, Units


@dataclass(frozen=True, slots=True)
class Whole:
    """One whole tensor as all ranks hold it: its shape, and the elements at which one rank's fragment ends."""

    fqn: str
    shape: tuple[int, ...]
    cuts: tuple[int, ...]


def join(ranks: Sequence[Iterable[Fragment]]) -> tuple[Whole, ...]:
    """The tensors that the fragments of all ranks make up, in order of first appearance.

    Raises `LayoutError` naming the tensor and the elements when one is held by no rank or by several.
    """
    held: dict[str, list[tuple[int, int, int]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for rank, fragments in enumerate(ranks):
        for fragment in fragments:
            if shapes.setdefault(fragment.fqn, fragment.shape) != fragment.shape:
                raise LayoutError(
                    f"tensor {fragment.fqn!r} has shape {fragment.shape} on rank {rank} and "
                    f"{shapes[fragment.fqn]} on a lower rank; ranks must build the same model"
                )
            intervals = held.setdefault(fragment.fqn, [])
            intervals += [(start, stop, rank) for start, stop in fragment.intervals]
    tensors = []
    for fqn, intervals in held.items():
        reached, numel = 0, prod(shapes[fqn])
        for start, stop, rank in [*sorted(intervals), (numel, numel, -1)]:
            if start != reached:
                found = "by no rank" if start > reached else f"by rank {rank} and another"
                raise LayoutError(
                    f"elements {min(start, reached)}..{max(start, reached)} of tensor {fqn!r} (shape {shapes[fqn]}) "
                    f"are held {found}; each element must be held exactly once"
                )
            reached = stop
        tensors.append(Whole(fqn, shapes[fqn], tuple(sorted(s for s, _, _ in intervals if s))))
    return tuple(tensors)


@dataclass(frozen=True, slots=True)
class Send:
    """`length` elements at `source` of the local buffer go to `slot` of the exchange buffer."""

    source: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Receive:
    """`length` elements at `slot` of the exchange buffer complete a cell of local fragment number `fragment`.

    `unit` is the first of the cell, counted over the units of the cells that the fragment touches, row by row.
    """

    fragment: int
    unit: int
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """How one rank takes part in completing cut cells: a sum over ranks of a buffer of `length` elements."""

    length: int
    sends: tuple[Send, ...]
    receives: tuple[Receive, ...]


def plan_exchange(
    tensors: Sequence[Whole], fragments: Sequence[Fragment], units_of: Callable[[tuple[int, ...]], Units]
) -> Exchange:
    """The exchange that completes the cut cells of `tensors`, seen from the rank that holds `fragments`.

    The buffer has a place for each cut cell, in the order of `tensors`, so it is the same on every rank; each element
    of it is sent by exactly one rank. `units_of` gives the units of a shape.
    """
    slots: dict[tuple[str, int], int] = {}
    length = 0
    for tensor in tensors:
        units = units_of(tensor.shape)
        for cut in tensor.cuts:
            cell = units.index(cut)
            start, stop = units.bounds(cell)
            if start < cut and (tensor.fqn, cell) not in slots:
                slots[tensor.fqn, cell] = length
                length += stop - start
    sends, receives = [], []
    for number, fragment in enumerate(fragments):
        units, before = units_of(fragment.shape), 0
        for row, (begin, end) in enumerate(fragment.intervals):
            first, last = units.index(begin), units.index(end - 1)
            for cell in sorted({first, last}):
                slot = slots.get((fragment.fqn, cell))
                if slot is None:
                    continue
                start, stop = units.bounds(cell)
                low, high = max(start, begin), min(stop, end)
                source = fragment.offset + row * (end - begin) + low - begin
                sends.append(Send(source, slot + low - start, high - low))
                unit = before + (units.place(cell) - units.place(first)) // units.coefficients
                receives.append(Receive(number, unit, slot, stop - start))
            before += (units.place(last + 1) - units.place(first)) // units.coefficients
    return Exchange(length, tuple(sends), tuple(receives))
