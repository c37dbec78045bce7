"""What is kept of the coefficients of a piece, as it is stored: read and written through the format of its field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gwt_dist import noise
from gwt_dist.declare import Field
from gwt_dist.formats import FORMATS, FP32, scale_of
from gwt_dist.formulas.codecs import decode, encode
from gwt_dist.piece import Piece


@dataclass(frozen=True, slots=True)
class StoredField:
    """A field over coefficients of one piece, whole cells: views of the state, which `write` changes."""

    field: Field
    piece: Piece
    codes_N: Tensor  # fp32 or fp64 themselves in the format fp32
    scale: Tensor | None  # (G,), one a cell, where the format has scales

    @classmethod
    def of(cls, field: Field, piece: Piece, stored: Mapping[str, Tensor]) -> StoredField:
        """That of a field; `stored` has views of the piece by name, of its scales too."""
        scaled = FORMATS[field.format].scaled
        return cls(field, piece, stored[field.name], stored[scale_of(field.name)] if scaled else None)

    def read(self) -> Tensor:
        """The numbers, (N,): those of the state itself in fp32, else a copy."""
        if self.field.format == FP32:
            return self.codes_N
        return decode(self.field.format, self.codes_N, self.scale, self._cells())

    def write(self, values_N: Tensor, key: Tensor, shift: int) -> None:
        """Store `values_N`, fp32 (N,), rounded by noise, see `noise.chance`, and put back there what was stored."""
        if self.field.format == FP32:
            self.codes_N.copy_(values_N)
            return
        cells_N, device = self._cells(), values_N.device
        places = self.piece.rows_of(device) + self.piece.first_row, self.piece.columns_of(device)
        chance_N = noise.chance(noise.noise(*places, key), shift)
        codes, scale = encode(
            self.field.format,
            values_N,
            chance_N,
            cells_N,
            0 if self.scale is None else len(self.scale),
        )
        self.codes_N.copy_(codes)
        if self.scale is not None and scale is not None:
            self.scale.copy_(scale)
        values_N.copy_(self.read())

    def _cells(self) -> Tensor:
        return self.piece.cells_of(self.codes_N.device)
