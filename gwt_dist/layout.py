"""Who holds what, in integers.

Every sharding engine leaves a rank with contiguous row-major intervals of tensors. That interval is a `Fragment`. The
elements of a row come in units, and moments are kept for each unit that a fragment touches: an interval again.

    tensor [R=2, C=10], unit length 4, K=3 units a row       rank 0 holds 0..7, rank 1 holds 7..20

    element   0  1  2  3 | 4  5  6  7 | 8  9  .  .           . is padding, never stored
    unit           0     |     1      |     2
    rank      0  0  0  0 | 0  0  0  1 | 1  1                 unit 1 is cut
              10 11 12 13|14 15 16 17 |18 19  .  .
    unit           3     |     4      |     5                units never cross rows

A unit that is cut is kept by each rank that touches it, computed by all of them from the same completed elements. The
rank that holds its first element owns it: counts it in norms and writes it to checkpoints. So it is with cells, several
units that are kept together; without a word to the contrary a cell is one unit.

This module knows no torch: plans are the same arithmetic before a run, in a run and in a simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod


class LayoutError(ValueError):
    """Fragments that do not make up their tensors: training on them would update wrong elements."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements ``start..stop`` (row-major, half open) of tensor `fqn`, at `offset` of a rank's local buffer.

    `shape` is the tensor's own. It is read as the matrix ``[R, C] = [shape[0], rest]``; tensors of fewer than two
    dimensions are one row. With `rows` above 1 the interval lies within one row and is repeated in the rows after it,
    dense in the buffer: the rectangle that a rank holds where columns are sharded.
    """

    fqn: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int = 0
    rows: int = 1

    def __post_init__(self) -> None:
        end = self.stop + (self.rows - 1) * self.columns
        inside = 0 <= self.start <= self.stop and end <= prod(self.shape) and self.offset >= 0 and self.rows >= 1
        if not inside or (self.rows > 1 and self.start % self.columns + self.stop - self.start > self.columns):
            raise LayoutError(
                f"fragment {self.start}..{self.stop} ({self.rows} rows) at offset {self.offset} does not lie in tensor "
                f"{self.fqn!r} of shape {self.shape} ({prod(self.shape)} elements)"
            )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.rows * (self.stop - self.start)

    @property
    def columns(self) -> int:
        """Row length of the tensor."""
        return columns_of(self.shape)

    @property
    def intervals(self) -> list[tuple[int, int]]:
        """``(start, stop)`` of each of its rows; empty if it has no elements."""
        if self.start == self.stop:
            return []
        return [(self.start + i * self.columns, self.stop + i * self.columns) for i in range(self.rows)]

    def intersect(self, other: Fragment) -> tuple[Overlap, ...]:
        """The elements of the same tensor that both hold: `source` is in this one's buffer, `destination` in `other`'s.

        Raises `LayoutError` if they are not of one shape.
        """
        if self.shape != other.shape:
            raise LayoutError(f"fragments of {self.fqn!r} have the shapes {self.shape} and {other.shape}")
        if self.rows == other.rows == 1:
            start, stop = max(self.start, other.start), min(self.stop, other.stop)
            width = stop - start
            source, destination = self.offset + start - self.start, other.offset + start - other.start
            return (Overlap(1, width, source, width, destination, width),) if width > 0 else ()
        overlaps = []
        for a, b in product(self._rectangles(), other._rectangles()):
            row, end = max(a.row, b.row), min(a.row + a.rows, b.row + b.rows)
            column, edge = max(a.column, b.column), min(a.column + a.columns, b.column + b.columns)
            if row < end and column < edge:
                places = (a.place(row, column), a.stride, b.place(row, column), b.stride)
                overlaps.append(Overlap(end - row, edge - column, *places))
        return tuple(overlaps)

    def _rectangles(self) -> list[_Rectangle]:
        """At most three: a partial first row, whole rows, a partial last row."""
        if self.numel == 0:
            return []
        row, column = divmod(self.start, self.columns)
        if self.rows > 1:
            return [_Rectangle(row, self.rows, column, self.stop - self.start, self.offset, self.stop - self.start)]
        first, last = -(-self.start // self.columns), self.stop // self.columns
        cuts = (self.start, first * self.columns, last * self.columns, self.stop)
        rectangles = []
        for start, stop in pairwise(cuts) if first <= last else [(self.start, self.stop)]:
            if start < stop:
                row, column = divmod(start, self.columns)
                rows = max(1, (stop - start) // self.columns)
                offset = self.offset + start - self.start
                rectangles.append(_Rectangle(row, rows, column, (stop - start) // rows, offset, self.columns))
        return rectangles


@dataclass(frozen=True, slots=True)
class Overlap:
    """`rows` runs of `columns` elements that two fragments share, and where they stand in the buffers of both."""

    rows: int
    columns: int
    source: int
    source_stride: int
    destination: int
    destination_stride: int


@dataclass(frozen=True, slots=True)
class _Rectangle:
    row: int
    rows: int
    column: int
    columns: int
    offset: int
    stride: int

    def place(self, row: int, column: int) -> int:
        return self.offset + (row - self.row) * self.stride + column - self.column


def columns_of(shape: Sequence[int]) -> int:
    """Row length of a tensor read as a matrix."""
    return prod(shape[1:]) if len(shape) >= 2 else prod(shape)


@dataclass(frozen=True, slots=True)
class Block:
    """`rows` runs of `columns` elements, dense from `source` on, placed from `destination` on with `stride`.

    Between a fragment (dense) and its units (rows padded to whole units), three blocks are always enough: a partial
    first row, whole rows, a partial last row.
    """

    source: int
    destination: int
    rows: int
    columns: int
    stride: int


@dataclass(frozen=True, slots=True)
class Units:
    """How rows of `columns` elements are cut into units of `length`, with `coefficients` moments for each unit.

    Units that are kept together are a cell, `cell` neighbours of a row, fewer at its end: where a boundary cuts one,
    ranks complete, keep and own all of it. Cells are numbered over the whole tensor, row by row. A fragment of several
    rows touches the same cells in each: `touched` and `owned` speak of its first row.
    """

    columns: int
    length: int
    coefficients: int = 1
    cell: int = 1

    @property
    def per_row(self) -> int:
        """Units of a row."""
        return -(-self.columns // self.length)

    @property
    def cells(self) -> int:
        """Cells of a row."""
        return -(-self.columns // (self.length * self.cell))

    def index(self, element: int) -> int:
        """The cell that holds `element`."""
        row, column = divmod(element, self.columns)
        return row * self.cells + column // (self.length * self.cell)

    def bounds(self, cell: int) -> tuple[int, int]:
        """First element of `cell` and the end of its last; the last cell of a row may be short."""
        row, k = divmod(cell, self.cells)
        span = self.length * self.cell
        return row * self.columns + k * span, row * self.columns + min((k + 1) * span, self.columns)

    def place(self, cell: int) -> int:
        """Number of moments before those of `cell`, in the whole tensor."""
        row, k = divmod(cell, self.cells or 1)
        return (row * self.per_row + k * self.cell) * self.coefficients

    def touched(self, fragment: Fragment) -> tuple[int, int]:
        """First cell that `fragment` touches and the one after the last."""
        if fragment.numel == 0:
            return 0, 0
        return self.index(fragment.start), self.index(fragment.stop - 1) + 1

    def owned(self, fragment: Fragment) -> tuple[int, int]:
        """As `touched`, without a first cell that begins on another rank."""
        first, last = self.touched(fragment)
        if first < last and self.bounds(first)[0] < fragment.start:
            first += 1
        return first, last

    def moments(self, fragment: Fragment, offset: int = 0) -> Fragment:
        """The interval of the ``[rows, per_row * coefficients]`` moments that goes with `fragment`."""
        first, last = map(self.place, self.touched(fragment))
        rows = prod(fragment.shape) // self.columns if self.columns else 0
        shape = (rows, self.per_row * self.coefficients)
        return Fragment(fragment.fqn, shape, first, last, offset, fragment.rows)

    def blocks(self, fragment: Fragment) -> tuple[Block, ...]:
        """Where the elements of `fragment` stand in the units of its cells, a ``[rows * units, length]`` buffer.

        `Block.source` counts from the start of the fragment.
        """
        if fragment.numel == 0:
            return ()
        first, last = self.touched(fragment)
        if fragment.rows > 1:
            lead, width = fragment.start - self.bounds(first)[0], fragment.stop - fragment.start
            stride = (self.place(last) - self.place(first)) // self.coefficients * self.length
            return (Block(0, lead, fragment.rows, width, stride),)
        padded = self.per_row * self.length
        origin = self._padded(self.bounds(first)[0])
        if self.columns % (self.length * self.cell) == 0:  # cells go on from row to row
            return (Block(0, self._padded(fragment.start) - origin, 1, fragment.numel, fragment.numel),)
        first_row, last_row = -(-fragment.start // self.columns), fragment.stop // self.columns
        if first_row > last_row:  # within one row
            runs = [(fragment.start, fragment.stop)]
        else:
            cuts = (fragment.start, first_row * self.columns, last_row * self.columns, fragment.stop)
            runs = list(pairwise(cuts))
        return tuple(
            Block(
                start - fragment.start,
                self._padded(start) - origin,
                rows := max(1, (stop - start) // self.columns),
                (stop - start) // rows,
                padded,
            )
            for start, stop in runs
            if start < stop
        )

    def _padded(self, element: int) -> int:
        row, column = divmod(element, self.columns)
        return row * self.per_row * self.length + column
