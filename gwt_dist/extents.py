"""What a rank keeps of a state tensor, by the extent of its field: integers, from layouts alone.

A field over rows or cells is nothing new to `layout`: its units are the rows, or the cells. Every question of a
fragment, which numbers it keeps and which of them it owns, then has the answer that it has for coefficients.
"""

from __future__ import annotations

from math import prod

from gwt_dist.declare import SIDES, Extent, Field
from gwt_dist.exchange import Whole
from gwt_dist.layout import Fragment, Units, columns_of

SHARDED = Extent.UNIT, Extent.CELL, Extent.ROW  # fields that are sharded as the tensor is; all others are kept whole


def units_along(extent: Extent, shape: tuple[int, ...], units: Units) -> Units:
    """The units of which a field of a SHARDED `extent` has one number a coefficient; `units` are the tensor's."""
    if extent is Extent.UNIT:
        return units
    columns = columns_of(shape)
    return Units(columns, max(1, columns) if extent is Extent.ROW else units.length * units.cell)


def kept(extent: Extent, fragment: Fragment, units: Units, offset: int = 0) -> Fragment:
    """The numbers that go with `fragment` of a tensor of these units, as an interval of the whole field.

    The whole field is ``[R, K]`` for UNIT, ``[R, cells of a row]`` for CELL, ``[R, 1]`` for ROW, ``[1, K]`` for
    COLUMN and ``[1]`` for TENSOR; `offset` is the place in this rank's buffer.
    """
    if extent in SHARDED:
        return units_along(extent, fragment.shape, units).moments(fragment, offset)
    if extent is Extent.TENSOR:  # whatever this rank holds of the tensor
        return Fragment(fragment.fqn, (1,), 0, 1, offset)
    coefficients = units.per_row * units.coefficients if prod(fragment.shape) else 0
    return Fragment(fragment.fqn, (1, coefficients), 0, coefficients if fragment.numel else 0, offset)


def owned(extent: Extent, fragment: Fragment, units: Units) -> Fragment:
    """The part of `kept` that this rank counts in sums and writes to checkpoints; what all keep alike, all own."""
    numbers = kept(extent, fragment, units)
    if extent not in SHARDED:
        return numbers
    along = units_along(extent, fragment.shape, units)
    low, high = (along.place(cell) - numbers.start for cell in along.owned(fragment))
    start = numbers.start + low
    if high <= low:
        return Fragment(numbers.fqn, numbers.shape, start, start)
    return Fragment(numbers.fqn, numbers.shape, start, numbers.start + high, 0, numbers.rows)


def whole(extent: Extent, shape: tuple[int, ...], units: Units) -> tuple[int, ...]:
    """Shape of a whole field of a tensor of `shape`."""
    return kept(extent, Fragment("", shape, 0, prod(shape)), units).shape


def of_owner(field: Field, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of an OWNED field of a tensor of `shape`, which has at least two dimensions."""
    return tuple(SIDES[side](shape[0], columns_of(shape), field.rank) for side in field.sides)


def summed(extent: Extent, tensor: Whole, units: Units) -> int:
    """Places of a sum of `extent` that ranks share: one a tensor, one a place in a row, or one a row that is cut."""
    return len(shared_rows(tensor)) if extent is Extent.ROW else prod(whole(extent, tensor.shape, units))


def shared_rows(tensor: Whole) -> list[int]:
    """Rows of which more than one rank holds a part."""
    columns = max(1, columns_of(tensor.shape))
    return sorted({cut // columns for cut in tensor.cuts if cut % columns})
