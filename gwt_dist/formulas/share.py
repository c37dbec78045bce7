"""What a function of a formula is given: one piece of one tensor at one step, or one whole matrix on its owner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from gwt_dist.declare import Program, Rule
from gwt_dist.piece import Piece


@dataclass(frozen=True, slots=True)
class Seat:
    """What belongs to one matrix of a stack that moves, on the rank that owns it."""

    # Its OWNED fields in their shapes, updated in place; fp32 of those that are stored in another format.
    state: Mapping[str, Tensor]
    step: Tensor  # 0-d fp32, this step counted
    count: int  # the same on the host
    is_new: bool  # the first row of the first of these fields was never set


@dataclass(frozen=True, slots=True)
class Share:
    """The units that a piece touches, cut cells completed, with what is kept and known of them.

    Dtype of all tensors is that of the mathematics (fp32, or fp64), of sums fp64.
    """

    x_NU: Tensor  # (N / coefficients of a unit, U) gradient, zeros where a unit is padded
    weight: Tensor  # the elements of the weight that this rank holds, 1-D, in its own dtype; to be read alone
    # UNIT (N,), ROW (P,) of the rows touched, COLUMN (K,), TENSOR 0-d; updated in place, and UNIT then `keep`-ed
    state: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]  # of the phases before: TENSOR 0-d or (numbers,), ROW (P,), COLUMN (K,)
    step: Tensor  # 0-d fp32, this step counted
    rule: Rule
    program: Program
    piece: Piece
    # Of a UNIT field: puts what is in `state` where it is stored, and back as it was stored.
    store: Callable[[str], None]
    changes: Mapping[str, int]  # of each UNIT field that is stored in another format, torch's count when it was stored

    def keep(self, *names: str) -> None:
        """Store these UNIT fields after an update.

        What is stored is what is used: afterwards `state` has them as their format rounds them. So a step of one pass
        or two, one that is resumed, and the copy of a cut cell on another rank all go on from the same bits.
        """
        for name in names:
            self.store(name)

    def spread_rows(self, values_P: Tensor) -> Tensor:
        """A number for each row touched, (P,), as one for each coefficient, (N,)."""
        return self.piece.of_matrix(values_P[:, None])

    def spread_columns(self, values_K: Tensor) -> Tensor:
        """A number for each place in a row, (K,), as one for each coefficient, (N,)."""
        first, width, _ = self.piece.window
        return self.piece.of_matrix(values_K[None, first : first + width])

    def outer(self, values_P: Tensor, values_K: Tensor) -> Tensor:
        """The product of a number for each row touched, (P,), and one for each place in a row, (K,), as (N,)."""
        first, width, _ = self.piece.window
        return self.piece.of_matrix(values_P[:, None] * values_K[None, first : first + width])
