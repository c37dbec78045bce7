"""What a kernel is given: fragments and their places (`Work`, fixed), and the tensors of one step (`Tensors`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gwt_dist.declare import Extent, Program, Rule
from gwt_dist.piece import Piece

T = TypeVar("T")


class Cut(NamedTuple):
    """A unit of which this rank holds a part; its `length` real elements are completed at `slot` of the exchange."""

    unit: int  # counted over the units that the piece touches
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


@dataclass(slots=True)
class Tensors:
    """The tensors of one step, one of each for a parameter; all are read and written where they lie."""

    weights: list[Tensor]  # local buffers, dense, any floating dtype
    gradients: list[Tensor]  # local buffers, dense, any floating dtype
    state: Mapping[str, list[Tensor]]  # by field of the program: dense, fp32 or fp64
    steps: list[Tensor]  # 0-d fp32, this step counted
    rules: list[Rule]  # one a parameter
    exchange: Tensor  # elements of cut units, fp32 or fp64
    made: dict[str, Any] = field(default_factory=dict)  # what a kernel made of them, for as long as the step lasts

    def once(self, name: str, make: Callable[[], T]) -> T:
        """``make()``, or what it made of these tensors before."""
        if name not in self.made:
            self.made[name] = make()
        found: T = self.made[name]
        return found


class Item(NamedTuple):
    """Units that a kernel takes in one go, in integers: one row of the table that every compiled kernel reads.

    `rows` runs of `units` units each, `element_stride` elements and `moment_stride` moments apart; or, where `slot` is
    not -1, one cut unit, whose elements are in the exchange and of which the weight holds a part.
    """

    parameter: int
    level: int
    element: int  # first element in the local buffers
    moment: int  # first moment
    rows: int
    units: int  # of each row
    last: int  # real elements of the last unit of each row
    element_stride: int
    moment_stride: int
    slot: int = -1
    lead: int = 0  # elements of a cut unit before the first that this rank holds; owned, if none
    held: int = 0  # elements of a cut unit that this rank holds
    landing: int = -1  # first element among what travels, where its elements lie as in the local buffers; -1: nowhere
    side: int = 0  # max(R, C) of the tensor
    norm: int = -1


@dataclass(eq=False)
class Work:
    """Pieces that one call of a kernel works on."""

    parts: tuple[Part, ...]
    program: Program
    lengths: tuple[tuple[int, ...], ...]  # of each phase, how many numbers a tensor each parameter has in its sums
    sizes: tuple[int, ...] = ()  # of each phase, the length of the vector of its sums
    numels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of each field, the numbers of each parameter
    _tables: dict[int, Tensor] = field(default_factory=dict, init=False)
    _batches: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)
    _needed: dict[tuple[str, ...], Tensor] = field(default_factory=dict, init=False)

    @property
    def norms(self) -> tuple[int, ...]:
        """Of each parameter, its numbers in the sums of the first phase; none where it has none."""
        return self.lengths[0] if self.lengths and any(self.lengths[0]) else ()

    def needed(self, *names: str) -> Tensor:
        """The numbers that each parameter has of these fields, int64 ``[parameters, fields]``."""
        if names not in self._needed:
            self._needed[names] = torch.tensor([self.numels[name] for name in names], dtype=torch.int64).T.contiguous()
        return self._needed[names]

    def table(self, chunk: int) -> Tensor:
        """The items of all parts in order of their norms, int64 ``[items, 15]``.

        They have about `chunk` elements each where a part has as many.
        """
        if chunk not in self._tables:
            items = [item for part in self.parts for item in items_of(part, chunk)]
            items.sort(key=lambda item: item.norm)
            self._tables[chunk] = torch.tensor(items, dtype=torch.int64).view(-1, len(Item._fields))
        return self._tables[chunk]

    def batches(self, chunk: int, elements: int) -> Tensor:
        """Runs of items of ``table(chunk)`` whose norms are theirs alone, of at least `elements` elements but the last.

        int64 ``[batches, 4]``: first item and the one after the last, first norm and the one after the last.
        """
        key = chunk, elements
        if key not in self._batches:
            batches: list[list[int]] = []
            room = 0
            for i, row in enumerate(self.table(chunk).tolist()):
                item = Item(*row)
                if not batches or (item.norm != batches[-1][3] - 1 and room <= 0):
                    batches.append([i, i, item.norm, item.norm])
                    room = elements
                batches[-1][1], batches[-1][3] = i + 1, item.norm + 1
                room -= item.rows * item.units << item.level
            self._batches[key] = torch.tensor(batches, dtype=torch.int64).view(-1, 4)
        return self._batches[key]


def items_of(part: Part, chunk: int) -> Iterator[Item]:
    """The items of a part whose transform is Haar."""
    fragment = part.piece.fragment
    side = max(*fragment.shape[:1], fragment.columns, 0)
    for item in _items(part, chunk):
        landing = part.landing + item.element - fragment.offset if part.landing >= 0 else -1
        yield item._replace(landing=landing, side=side)


def _items(part: Part, chunk: int) -> Iterator[Item]:
    piece, cuts = part.piece, {cut.unit: cut for cut in part.cuts}
    length = piece.units.length
    for block in piece.blocks:
        ends_in = (block.destination + block.columns - 1) // length
        whole = block.destination % length == 0 and ends_in not in cuts
        # Rows of a rectangle may each have cut units; all other blocks of several rows have none.
        for row in range(1 if whole else block.rows):
            element = piece.fragment.offset + block.source + row * block.columns
            begin = block.destination + row * block.stride
            end = begin + block.columns
            for unit in sorted({begin // length, (end - 1) // length} & cuts.keys()):
                low, high = max(begin, unit * length), min(end, (unit + 1) * length)
                yield Item(
                    part.parameter,
                    piece.level,
                    element + low - begin,
                    piece.moments.offset + unit,
                    rows=1,
                    units=1,
                    last=cuts[unit].length,
                    element_stride=0,
                    moment_stride=0,
                    slot=cuts[unit].slot,
                    lead=low - unit * length,
                    held=high - low,
                    norm=part.norm,
                )
                if low == begin:
                    begin, element = high, element + high - low
                if high == end:
                    end = low
            if begin < end:
                rows = block.rows if whole else 1
                yield from _whole_units(part, element, begin, end, rows, block.columns, block.stride, chunk)


def _whole_units(
    part: Part, element: int, begin: int, end: int, rows: int, element_stride: int, stride: int, chunk: int
) -> Iterator[Item]:
    """Items of elements ``begin..end`` of the padded units, which cut no unit, repeated over `rows`."""
    piece, length = part.piece, part.piece.units.length
    assert begin % length == 0, "a unit that begins on another rank was not completed"
    units = -(-(end - begin) // length)
    last = end - begin - (units - 1) * length
    moment, moment_stride = piece.moments.offset + begin // length, stride // length
    if length < 1 << piece.level:  # rows shorter than a unit, one unit each and no padding stored
        rows, units, last, element_stride, moment_stride = rows * units, 1, length, length, 1
    step = max(1, chunk >> piece.level)
    if rows == 1 or units > step:
        # Long runs are taken apart; every piece but the last has whole vectors of units.
        for row in range(rows):
            for first in range(0, units, step):
                count = min(step, units - first)
                real = last if first + count == units else length
                place = element + row * element_stride + first * length
                where = moment + row * moment_stride + first
                yield Item(part.parameter, piece.level, place, where, 1, count, real, 0, 0, norm=part.norm)
        return
    step = max(1, chunk // element_stride)
    for row in range(0, rows, step):
        yield Item(
            part.parameter,
            piece.level,
            element + row * element_stride,
            moment + row * moment_stride,
            min(step, rows - row),
            units,
            last,
            element_stride,
            moment_stride,
            norm=part.norm,
        )
