"""`orthogonal`, with the rows of the orthogonalized matrix brought to one size.

    w    = nor*w + (1-nor) * mean of the squares of each row of O          exp_avg_sq_row, R numbers a matrix
    O'   = O / (sqrt(w) + 1e-8), and the whole of it scaled back to ||O||

Rows whose neurons move more than others' since long are held back for the others. Scaled back, O' needs no correction
of the bias of w. Source: NorMuon (arXiv 2510.05491), exact here under every sharding: w travels with the rows of the
matrix and is updated where all of it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from gwt_dist.declare import Rule
from gwt_dist.formulas.orthogonal import momentum, newton_schulz, norms, write
from gwt_dist.formulas.share import Seat

__all__ = ["momentum", "norms", "orthogonalize", "write"]


def orthogonalize(
    u_nRC: Tensor,  # (n, R, C)
    rows: Mapping[str, Tensor],  # "exp_avg_sq_row": w, (n, R), updated in place
    rules: Sequence[Rule],  # of each matrix but for places without one; equal ones side by side
    seats: Sequence[Seat | None],  # of the same: there is nothing that an owner keeps
) -> None:
    """Put ``O'`` in the place of ``U``."""
    w_nR = rows["exp_avg_sq_row"]
    o_nRC = newton_schulz(u_nRC).to(w_nR.dtype)
    mean_nR = o_nRC.square().mean(-1)
    first = 0
    for nor, its in groupby(rule["nor"] for rule in rules):
        last = first + len(list(its))
        w_nR[first:last].lerp_(mean_nR[first:last], 1 - nor)
        first = last
    even_nRC = o_nRC / (w_nR.sqrt() + 1e-8)[..., None]
    scale = _norm(o_nRC) / (_norm(even_nRC) + 1e-30)
    u_nRC.copy_(even_nRC * scale)


def _norm(matrices_nRC: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrices_nRC, dim=(-2, -1), keepdim=True)
    return norm
