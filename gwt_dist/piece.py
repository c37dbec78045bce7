"""One fragment with the geometry of its units and of what is kept of them, fixed for the life of the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from gwt_dist.declare import Field
from gwt_dist.formats import FORMATS, FP32
from gwt_dist.layout import Block, Fragment, Units
from gwt_dist.noise import salt
from gwt_dist.units import level_of, units_of
from gwt_dist.wavelet import Transform, transform


@dataclass(frozen=True, slots=True)
class Piece:
    """The geometry of one fragment at one level, fixed for the life of the layout.

    N coefficients, U elements of a unit; P rows and K places in a row that the fragment touches, of ``[R, K]``.
    """

    fragment: Fragment  # elements in the weight and gradient buffers
    moments: Fragment  # coefficients, at their place in the buffers of what is kept of them
    level: int
    transform: Transform
    units: Units
    blocks: tuple[Block, ...]
    owned: tuple[int, int]  # coefficients of each row of `moments` that count in sums, from its start
    places: Mapping[str, Fragment] = field(default_factory=dict)  # of each field, the numbers kept and where

    @classmethod
    def of(
        cls,
        fragment: Fragment,
        moments: Fragment,
        level: int,
        wavelet: str,
        places: Mapping[str, Fragment] | None = None,
        cell: int = 1,
    ) -> Piece:
        """The piece of `fragment` in a group of `level`, coefficients at `moments`, `cell` kept together."""
        units = units_of(tuple(fragment.shape), level, wavelet, cell)
        level = level_of(fragment.shape, level)
        low, high = (units.place(one) - moments.start for one in units.owned(fragment))
        blocks = units.blocks(fragment)
        return cls(fragment, moments, level, transform(wavelet, level), units, blocks, (low, high), places or {})

    @property
    def touched(self) -> int:
        """Number of units."""
        return self.moments.numel // self.units.coefficients if self.moments.numel else 0

    @property
    def first_row(self) -> int:
        """The first row touched."""
        return self.moments.start // max(1, self.moments.columns)

    @property
    def rows(self) -> int:
        """Number of rows touched, P."""
        moments = self.moments
        if not moments.numel:
            return 0
        return moments.rows if moments.rows > 1 else (moments.stop - 1) // moments.columns - self.first_row + 1

    @property
    def salt(self) -> int:
        """What the tensor is known by in noise."""
        columns = self.fragment.columns
        return salt(prod(self.fragment.shape) // columns if columns else 0, columns)

    def elements_at(self, first: int, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and column in the tensor of elements of the fragment from `first` of it on, int64 of `shape` each."""
        fragment = self.fragment
        i = torch.arange(first, first + prod(shape), device=device).view(*shape)
        if fragment.rows > 1:
            width = fragment.stop - fragment.start
            element = fragment.start + i // width * fragment.columns + i % width
        else:
            element = fragment.start + i
        return element // fragment.columns, element % fragment.columns

    def cells_of(self, device: torch.device) -> Tensor:
        """Of each coefficient, which of the cells touched it is in, int64 ``[N]``; of units of one coefficient."""
        moments, units = self.moments, self.units
        first, last = units.touched(self.fragment)
        if not moments.numel:
            return torch.zeros(0, dtype=torch.int64, device=device)
        row, place = self.rows_of(device), self.columns_of(device) // units.cell
        along = last - first if moments.rows > 1 else units.cells
        return row * along + place - first % units.cells

    def rows_of(self, device: torch.device) -> Tensor:
        """Of each coefficient, which of the rows touched it is in, int64 ``[N]``."""
        moments = self.moments
        if moments.rows > 1:
            return torch.arange(moments.rows, device=device).repeat_interleave(moments.stop - moments.start)
        row = torch.arange(moments.start, moments.stop, device=device) // max(1, moments.columns)
        return row - self.first_row

    def columns_of(self, device: torch.device) -> Tensor:
        """Of each coefficient, its place in its row, int64 ``[N]``."""
        moments = self.moments
        column = torch.arange(moments.start, moments.stop, device=device) % max(1, moments.columns)
        return column.repeat(moments.rows)

    @property
    def window(self) -> tuple[int, int, int]:
        """First place in a row, places W and lead: coefficients are those of a ``[P, W]`` from the lead on, dense."""
        moments = self.moments
        if moments.rows > 1:
            return moments.start % moments.columns, moments.stop - moments.start, 0
        return 0, moments.columns, moments.start % max(1, moments.columns)

    def of_matrix(self, values_PW: Tensor) -> Tensor:
        """Of numbers by row and place in a row, of which one dimension may be 1, those of the coefficients, ``[N]``."""
        _, width, lead = self.window
        return values_PW.expand(self.rows, width).reshape(-1)[lead : lead + self.moments.numel]

    def owned_matrix(self, values_N: Tensor) -> Tensor:
        """One value of each coefficient by row and place in a row, ``[P, W]``: zeros where another rank counts."""
        (low, high), (_, width, lead) = self.owned, self.window
        values = values_N.view(self.moments.rows, -1)
        if self.moments.rows == 1 and (lead, low, high) == (0, 0, self.rows * width):
            return values.view(self.rows, width)
        found_PW = values_N.new_zeros(self.rows, width)
        if self.moments.rows > 1:
            found_PW[:, low:high] = values[:, low:high]
        else:
            found_PW.view(-1)[lead + low : lead + high] = values[0, low:high]
        return found_PW

    def counts(self, like: Tensor) -> Tensor:
        """Elements behind each coefficient that are not padding, ``[N]`` in dtype and device of `like`."""
        moments, full = self.moments, 1 << self.level
        counts = torch.full((moments.numel,), full, dtype=like.dtype, device=like.device)
        if moments.columns:
            # The last coefficient of a row of the tensor comes up once in each row of the fragment, if at all.
            every = moments.columns if moments.rows == 1 else moments.stop - moments.start
            last = (moments.columns - 1 - moments.start) % moments.columns
            if last < every:
                counts[last::every] = self.units.columns - (moments.columns - 1) * full
        return counts

    def views(self, buffer: Tensor, padded: Tensor, start: int) -> list[tuple[Tensor, Tensor]]:
        """Matching views of the fragment, which begins at `start` of a 1-D buffer, and of its units in `padded`.

        (rows, columns) each; `padded` is ``[N * U]``.
        """
        return [
            (
                buffer.narrow(0, start + b.source, b.rows * b.columns).view(b.rows, b.columns),
                padded.as_strided((b.rows, b.columns), (b.stride, 1), padded.storage_offset() + b.destination),
            )
            for b in self.blocks
        ]


def moments_shape(shape: Sequence[int], level: int, wavelet: str) -> tuple[int, ...]:
    """Shape of the moments of a whole tensor: its own at level 0, else ``[rows, coefficients of a row]``."""
    if level_of(shape, level) == 0:
        return tuple(shape)
    whole = Fragment("", tuple(shape), 0, prod(shape))
    return units_of(tuple(shape), level, wavelet).moments(whole).shape


_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}


def stored_dtype(field: Field, dtype: torch.dtype) -> torch.dtype:
    """Of a field in the state of parameters of `dtype`."""
    return math_dtype(dtype) if field.format == FP32 else _STORED[FORMATS[field.format].stored]


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the mathematics of parameters of `dtype`, and of their state in the format fp32: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
