"""`orthogonal`, with the rows of the orthogonalized matrix brought to one size.

    w    = nor*w + (1-nor) * mean of the squares of each row of O          exp_avg_sq_row, R numbers a matrix
    O'   = O / (sqrt(w) + 1e-8), and the whole of it scaled back to ||O||

Rows whose neurons move more than others' since long are held back for the others. Scaled back, O' needs no correction
of the bias of w. Source: NorMuon (arXiv 2510.05491), exact here under every sharding: w travels with the rows of the
matrix and is updated where all of it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gwt_dist.declare import Rule
from gwt_dist.formulas.orthogonal import momentum, newton_schulz, norms, write

__all__ = ["momentum", "norms", "orthogonalize", "write"]


def orthogonalize(u_RC: Tensor, rows: Mapping[str, Tensor], rule: Rule) -> Tensor:
    """``O'`` of a whole matrix, (R, C); ``rows["exp_avg_sq_row"]`` is w, (R,), updated in place."""
    o_RC, w_R = newton_schulz(u_RC), rows["exp_avg_sq_row"]
    w_R.lerp_(o_RC.square().mean(1), 1 - rule["nor"])
    even_RC = o_RC / (w_R.sqrt() + 1e-8)[:, None]
    scale: Tensor = o_RC.norm() / (even_RC.norm() + 1e-30)
    return even_RC * scale
