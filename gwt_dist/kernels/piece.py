"""One fragment with the geometry of its units and moments, fixed for the life of the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gwt_dist.layout import Block, Fragment, Units
from gwt_dist.units import level_of, units_of
from gwt_dist.wavelet import Transform, transform


@dataclass(frozen=True, slots=True)
class Piece:
    """The geometry of one fragment at one level, fixed for the life of the layout."""

    fragment: Fragment  # elements in the weight and gradient buffers
    moments: Fragment  # coefficients in the buffers of exp_avg and exp_avg_sq
    level: int
    transform: Transform
    units: Units
    blocks: tuple[Block, ...]
    owned: tuple[int, int]  # coefficients of each row of `moments` that count in norms, from its start

    @classmethod
    def of(cls, fragment: Fragment, moments: Fragment, level: int, wavelet: str) -> Piece:
        """The piece of `fragment` in a group of `level`, with its moments at `moments`."""
        units = units_of(tuple(fragment.shape), level, wavelet)
        level = level_of(fragment.shape, level)
        first = units.touched(fragment)[0]
        low, high = (units.coefficients * (unit - first) for unit in units.owned(fragment))
        blocks = units.blocks(fragment)
        return cls(fragment, moments, level, transform(wavelet, level), units, blocks, (low, high))

    @property
    def touched(self) -> int:
        """Number of units."""
        return self.moments.numel // self.units.coefficients if self.moments.numel else 0

    def counts(self, like: Tensor) -> Tensor:
        """Elements behind each coefficient that are not padding, ``[moments.numel]`` in dtype and device of `like`."""
        moments, full = self.moments, 1 << self.level
        counts = torch.full((moments.numel,), full, dtype=like.dtype, device=like.device)
        if moments.columns:
            # The last coefficient of a row of the tensor comes up once in each row of the fragment, if at all.
            every = moments.columns if moments.rows == 1 else moments.stop - moments.start
            last = (moments.columns - 1 - moments.start) % moments.columns
            if last < every:
                counts[last::every] = self.units.columns - (moments.columns - 1) * full
        return counts


def moments_shape(shape: Sequence[int], level: int, wavelet: str) -> tuple[int, ...]:
    """Shape of the moments of a whole tensor: its own at level 0, else ``[rows, coefficients of a row]``."""
    if level_of(shape, level) == 0:
        return tuple(shape)
    whole = Fragment("", tuple(shape), 0, prod(shape))
    return units_of(tuple(shape), level, wavelet).moments(whole).shape
