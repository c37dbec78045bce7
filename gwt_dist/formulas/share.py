"""What a function of a formula is given: one piece of one tensor at one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gwt_dist.declare import Program, Rule
from gwt_dist.piece import Piece


@dataclass(frozen=True, slots=True)
class Share:
    """The units that a piece touches, cut ones completed, with what is kept and known of them.

    Dtype of all tensors is that of the moments (fp32, or fp64), of sums fp64.
    """

    x_NU: Tensor  # (N / coefficients of a unit, U) gradient, zeros where a unit is padded
    state: Mapping[str, Tensor]  # UNIT (N,), ROW (P,) of the rows touched, COLUMN (K,), TENSOR 0-d; updated in place
    sums: Mapping[str, Tensor]  # of the phases before: TENSOR 0-d or (numbers,), ROW (P,), COLUMN (K,)
    step: Tensor  # 0-d fp32, this step counted
    rule: Rule
    program: Program
    piece: Piece

    def spread_rows(self, values_P: Tensor) -> Tensor:
        """A number for each row touched, (P,), as one for each coefficient, (N,)."""
        return values_P[self.piece.rows_of(values_P.device)]

    def spread_columns(self, values_K: Tensor) -> Tensor:
        """A number for each place in a row, (K,), as one for each coefficient, (N,)."""
        return values_K[self.piece.columns_of(values_K.device)]
