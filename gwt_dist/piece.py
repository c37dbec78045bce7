"""One fragment with the geometry of its units and of what is kept of them, fixed for the life of the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from gwt_dist.layout import Block, Fragment, Units
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
    ) -> Piece:
        """The piece of `fragment` in a group of `level`, with its coefficients at `moments`."""
        units = units_of(tuple(fragment.shape), level, wavelet)
        level = level_of(fragment.shape, level)
        first = units.touched(fragment)[0]
        low, high = (units.coefficients * (unit - first) for unit in units.owned(fragment))
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

    def of_owned(self, values_N: Tensor) -> Tensor:
        """Those of the coefficients that count in sums, dense, of one value a coefficient, ``[N]``."""
        low, high = self.owned
        return values_N.view(self.moments.rows, -1)[:, low:high].contiguous()

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


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the mathematics and the state of parameters of `dtype`: fp64 for fp64, fp32 for all others.

    bf16 second moments could not decay: round-to-nearest loses every small step.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
