"""What a kernel takes in one go: pieces and their places in a step (`Part`), taken apart into integers (`Item`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gwt_dist.declare import Extent
from gwt_dist.layout import Units
from gwt_dist.piece import Piece


class Cut(NamedTuple):
    """A cell of which this rank holds a part; its `length` real elements are completed at `slot` of the exchange."""

    unit: int  # the first of it, counted over the units of all cells that the piece touches
    slot: int
    length: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where the numbers of one sum of a phase stand in the vector of the phase, for one piece."""

    name: str
    extent: Extent
    numbers: int
    # One a number for TENSOR; one a row touched, or one a place in a row, for each number after the other.
    index: Sequence[int]
    _kept: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict, compare=False)

    def places(self, number: int, device: torch.device) -> Tensor:
        """Of each row touched, or of each place in a row: int64, ``[P]`` or ``[K]``."""
        key = number, device
        if key not in self._kept:
            each = len(self.index) // self.numbers
            its = self.index[number * each : (number + 1) * each]
            self._kept[key] = torch.tensor(its, dtype=torch.int64, device=device)
        return self._kept[key]

    def read(self, sums: Tensor) -> Tensor:
        """The numbers: 0-d for TENSOR, else (P,) or (K,); with a dimension of `numbers` before where there are more."""
        if self.extent is Extent.TENSOR:
            first = self.index[0]
            return sums[first] if self.numbers == 1 else sums[first : first + self.numbers]
        found = torch.stack([sums[self.places(number, sums.device)] for number in range(self.numbers)])
        return found[0] if self.numbers == 1 else found


@dataclass(frozen=True, slots=True)
class Part:
    """One piece and its places in a step."""

    parameter: int  # in the lists of `Tensors`
    piece: Piece
    cuts: tuple[Cut, ...]
    sums: tuple[tuple[Place, ...], ...] = ()  # of each phase; none where a phase has none
    landing: int = -1  # where its elements, dense in the order of its fragment, begin among what travels; -1: nowhere

    @property
    def norm(self) -> int:
        """The place of the first number a tensor, which is all that compiled kernels sum; -1 without one."""
        places = [place for its in self.sums for place in its if place.extent is Extent.TENSOR]
        return places[0].index[0] if places else -1


class Item(NamedTuple):
    """Units that a kernel takes in one go, in integers: one row of the table that every compiled kernel reads.

    `rows` runs of `units` units each, `element_stride` elements and `moment_stride` moments apart; or, where `slot` is
    not -1, one cut cell, whose elements are in the exchange and of which the weight holds a part. Every run is one of
    whole cells of one row, or goes on from row to row where rows are whole numbers of cells.
    """

    parameter: int
    level: int
    element: int  # first element in the local buffers
    moment: int  # first moment
    rows: int
    units: int  # of each run
    last: int  # real elements of the last unit of each run
    element_stride: int
    moment_stride: int
    slot: int = -1
    lead: int = 0  # elements of a cut cell before the first that this rank holds; owned, if none
    held: int = 0  # elements of a cut cell that this rank holds
    landing: int = -1  # first element among what travels, where its elements lie as in the local buffers; -1: nowhere
    side: int = 0  # max(R, C) of the tensor
    norm: int = -1
    # For the noise of rounding, see `noise`: where the first element stands in the tensor ``[R, columns]``, that of the
    # cell where it is cut, and what the tensor is known by.
    row: int = 0
    column: int = 0
    columns: int = 0
    salt: int = 0
    scale: int = 0  # place of the first scale; runs are as many apart as there are cells in `moment_stride` moments


def items_of(part: Part, chunk: int, joined: bool = True, scale: str = "") -> Iterator[Item]:
    """The items of a part whose transform is Haar, of about `chunk` elements each; see `Work.table`.

    `scale` is the name of a field over cells, if the program has any: all of them lie at the same places.
    """
    piece, fragment = part.piece, part.piece.fragment
    columns = fragment.columns
    side, its_salt = max(*fragment.shape[:1], columns, 0), piece.salt
    for item, first in _items(part, chunk, joined):
        landing = part.landing + item.element - fragment.offset if part.landing >= 0 else -1
        row, column = divmod(first, columns)
        place = 0
        if scale:
            touched, last = piece.units.touched(fragment)
            # In a rectangle, whose rows touch the same cells: of rows before this one in the fragment too.
            before = (row - fragment.start // columns) * (last - touched) if fragment.rows > 1 else -touched
            at = piece.units.index(first)
            in_row = at % piece.units.cells - touched % piece.units.cells if fragment.rows > 1 else at
            place = piece.places[scale].offset + before + in_row
        yield item._replace(
            landing=landing, side=side, row=row, column=column, columns=columns, salt=its_salt, scale=place
        )


def _items(part: Part, chunk: int, joined: bool) -> Iterator[tuple[Item, int]]:
    """Items, and the element of the tensor at which each begins: that of its cell where it is cut."""
    piece, fragment, units = part.piece, part.piece.fragment, part.piece.units
    length = units.length
    cuts = {cut.unit * length: cut for cut in part.cuts}  # by the first element of the cell, among those of all cells
    for block in piece.blocks:
        whole = not _cut_cells(units, block.destination, fragment.start + block.source, block.columns) & cuts.keys()
        # Rows of a rectangle may each have cut cells; all other blocks of several rows have none.
        for row in range(1 if whole else block.rows):
            first = fragment.start + block.source if fragment.rows == 1 else fragment.start + row * fragment.columns
            element = fragment.offset + block.source + row * block.columns
            begin = block.destination + row * block.stride
            end = begin + block.columns
            for start in sorted(_cut_cells(units, begin, first, end - begin) & cuts.keys()):
                cut = cuts[start]
                count = -(-cut.length // length)
                low, high = max(begin, start), min(end, start + count * length)
                item = Item(
                    part.parameter,
                    piece.level,
                    element + low - begin,
                    piece.moments.offset + start // length,
                    rows=1,
                    units=count,
                    last=cut.length - (count - 1) * length,
                    element_stride=0,
                    moment_stride=0,
                    slot=cut.slot,
                    lead=low - start,
                    held=high - low,
                    norm=part.norm,
                )
                yield item, first + start - begin
                if low == begin:
                    begin, element, first = high, element + high - low, first + high - low
                if high == end:
                    end = low
            if begin < end:
                run = _Run(element, first, begin, end, block.rows if whole else 1, block.columns, block.stride)
                yield from _whole_units(part, run, chunk, joined)


def _cut_cells(units: Units, begin: int, first: int, count: int) -> set[int]:
    """Where the cells begin, among the elements of all cells, that hold the first and the last element of a run.

    `count` elements from `first` of the tensor on, which is `begin` among the elements of all cells.
    """
    return {begin + units.bounds(units.index(element))[0] - first for element in (first, first + count - 1)}


class _Run(NamedTuple):
    """Elements ``begin..end`` of the cells of a piece, which cut none, repeated over rows."""

    element: int  # the first in the local buffers
    first: int  # and in the tensor
    begin: int
    end: int
    rows: int
    element_stride: int
    stride: int  # of the elements of all cells


def _whole_units(part: Part, run: _Run, chunk: int, joined: bool) -> Iterator[tuple[Item, int]]:
    """Items of a run, and the element of the tensor at which each begins."""
    piece, units, columns = part.piece, part.piece.units, part.piece.fragment.columns
    length, cell, rows, element_stride = units.length, units.cell, run.rows, run.element_stride
    assert run.begin % length == 0, "a cell that begins on another rank was not completed"
    count = -(-(run.end - run.begin) // length)
    last = run.end - run.begin - (count - 1) * length
    moment, moment_stride = piece.moments.offset + run.begin // length, run.stride // length
    if length < 1 << piece.level:  # rows shorter than a unit, one unit each and no padding stored
        rows, count, last, element_stride, moment_stride = rows * count, 1, length, length, 1
    step = max(cell, (chunk >> piece.level) // cell * cell)
    if rows == 1 or count > step or (cell > 1 and not joined):
        # Long runs are taken apart; every piece but the last has whole vectors of units, and whole cells.
        for row in range(rows):
            for before in range(0, count, step):
                its = min(step, count - before)
                real = last if before + its == count else length
                place = run.element + row * element_stride + before * length
                where = moment + row * moment_stride + before
                item = Item(part.parameter, piece.level, place, where, 1, its, real, 0, 0, norm=part.norm)
                yield item, run.first + row * columns + before * length
        return
    step = max(1, chunk // element_stride)
    for row in range(0, rows, step):
        item = Item(
            part.parameter,
            piece.level,
            run.element + row * element_stride,
            moment + row * moment_stride,
            min(step, rows - row),
            count,
            last,
            element_stride,
            moment_stride,
            norm=part.norm,
        )
        yield item, run.first + row * columns
