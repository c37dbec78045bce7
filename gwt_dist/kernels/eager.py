"""Both phases in torch operations, one fragment after the other: the reference that every other kernel must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from gwt_dist import update
from gwt_dist.kernels.limiter import limit_growth
from gwt_dist.kernels.piece import Piece
from gwt_dist.kernels.work import Part, Tensors, Work


def count(steps: list[Tensor]) -> None:
    """Add 1 to each of `steps`, 0-d fp32 tensors."""
    torch._foreach_add_(steps, 1)


def moments(work: Work, tensors: Tensors, squared_norms: Tensor) -> None:
    """Phase A: update the moments in place.

    Adds ``||m/d||**2`` of the coefficients that this rank owns to `squared_norms` (fp64, one place a tensor), for the
    parts whose `norm` is a place in it.
    """
    for part in work.parts:
        piece, rule = part.piece, tensors.rules[part.parameter]
        exp_avg, exp_avg_sq = _moments(part, tensors)
        counts = piece.counts(exp_avg)
        update.update_moments(gather(part, tensors), exp_avg, exp_avg_sq, counts, piece.transform, rule)
        if part.norm >= 0:
            rows, (low, high) = piece.moments.rows, piece.owned
            m, v = (moment.view(rows, -1)[:, low:high] for moment in (exp_avg, exp_avg_sq))
            squared_norms[part.norm] += update.squared_norm(m, v, rule.eps)


def write(work: Work, tensors: Tensors, rho: Tensor) -> None:
    """Phase B: write the weights in place, `rho` (fp64) holding the limiter of each part at the place of its norm."""
    for part in work.parts:
        rule, weight = tensors.rules[part.parameter], tensors.weights[part.parameter].view(-1)
        t = tensors.steps[part.parameter]
        size = update.step_size(t, rule)
        if part.piece.level > 0:
            size = size * rule.scale
        if part.norm >= 0:
            size = size.to(rho.device) / rho[part.norm]
        x_NU, moments = gather(part, tensors), _moments(part, tensors)
        change = update.change(x_NU, *moments, size.to(x_NU), t, part.piece.transform, rule).view(-1)
        decay_factor = update.decay_factor(rule, x_NU)
        for source, padded in blocks(part.piece, weight, change, part.piece.fragment.offset):
            w = source.to(x_NU.dtype)
            w -= padded
            w *= decay_factor
            if w is not source:
                source.copy_(w)


def step(work: Work, tensors: Tensors) -> None:
    """Both phases of tensors that this process holds whole, and their limiters between them.

    Either all parts have a place for their norm or none has.
    """
    if not tensors.weights:
        return
    squared_norms = torch.zeros(sum(work.norms), dtype=torch.float64, device=tensors.weights[0].device)
    moments(work, tensors, squared_norms)
    rho = squared_norms
    if work.norms:
        rho = limit_growth(squared_norms, work.norms, tensors.limited_norms, tensors.rules)
    write(work, tensors, rho)


def _moments(part: Part, tensors: Tensors) -> tuple[Tensor, Tensor]:
    start, numel = part.piece.moments.offset, part.piece.moments.numel
    exp_avg, exp_avg_sq = tensors.exp_avg[part.parameter], tensors.exp_avg_sq[part.parameter]
    return exp_avg.view(-1).narrow(0, start, numel), exp_avg_sq.view(-1).narrow(0, start, numel)


def gather(part: Part, tensors: Tensors) -> Tensor:
    """The gradient of the touched units, (N, U), cut units completed, zeros at the padding of rows."""
    piece, gradient = part.piece, tensors.gradients[part.parameter].view(-1)
    dtype = tensors.exp_avg[part.parameter].dtype
    x_NU = torch.zeros((piece.touched, piece.units.length), dtype=dtype, device=gradient.device)
    for source, padded in blocks(piece, gradient, x_NU.view(-1), piece.fragment.offset):
        padded.copy_(source)
    for cut in part.cuts:
        x_NU[cut.unit, : cut.length] = tensors.exchange.narrow(0, cut.slot, cut.length)
    return x_NU


def blocks(piece: Piece, buffer: Tensor, padded: Tensor, start: int) -> list[tuple[Tensor, Tensor]]:
    """Matching views of the fragment, which begins at `start` of `buffer`, and of its units in `padded`.

    (rows, columns) each.
    """
    return [
        (
            buffer.narrow(0, start + b.source, b.rows * b.columns).view(b.rows, b.columns),
            padded.as_strided((b.rows, b.columns), (b.stride, 1), padded.storage_offset() + b.destination),
        )
        for b in piece.blocks
    ]
