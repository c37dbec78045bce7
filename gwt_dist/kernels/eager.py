"""Both phases in torch operations, one fragment after the other: the reference that every other kernel must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_dist import update
from gwt_dist.kernels.job import Job


def moments(jobs: Sequence[Job], squared_norms: Tensor) -> None:
    """Phase A: update the moments of each job in place.

    Adds ``||m/d||**2`` of the coefficients that this rank owns to `squared_norms` (fp64, one place a tensor), for the
    jobs whose `norm` is a place in it.
    """
    for job in jobs:
        piece = job.piece
        exp_avg, exp_avg_sq = _moments(job)
        counts = piece.counts(exp_avg)
        update.update_moments(_gather(job), exp_avg, exp_avg_sq, counts, piece.transform, job.rule)
        if job.norm >= 0:
            rows, (low, high) = piece.moments.rows, piece.owned
            m, v = (moment.view(rows, -1)[:, low:high] for moment in (exp_avg, exp_avg_sq))
            squared_norms[job.norm] += update.squared_norm(m, v, job.rule.eps)


def write(jobs: Sequence[Job], rho: Tensor) -> None:
    """Phase B: write the weights of each job in place, `rho` (fp64) holding the limiter at the place of its norm."""
    for job in jobs:
        rule, dtype = job.rule, job.exp_avg.dtype
        u_NU = update.direction(_gather(job), *_moments(job), job.piece.transform, rule)
        factor = job.step_size
        if job.piece.level > 0:
            factor = factor * rule.scale
        if job.norm >= 0:
            factor = factor.to(rho.device) / rho[job.norm]
        change = u_NU.view(-1).mul_(factor.to(dtype))
        for source, padded in _blocks(job, job.weight, change):
            w = source.to(dtype)
            w -= padded
            if rule.weight_decay:
                w -= w * (rule.lr * rule.weight_decay)
            if w is not source:
                source.copy_(w)


def _moments(job: Job) -> tuple[Tensor, Tensor]:
    start, numel = job.piece.moments.offset, job.piece.moments.numel
    return job.exp_avg.narrow(0, start, numel), job.exp_avg_sq.narrow(0, start, numel)


def _gather(job: Job) -> Tensor:
    """The gradient of the touched units, (N, U), cut units completed, zeros at the padding of rows."""
    units = job.piece.units
    x_NU = torch.zeros((job.piece.touched, units.length), dtype=job.exp_avg.dtype, device=job.gradient.device)
    for source, padded in _blocks(job, job.gradient, x_NU.view(-1)):
        padded.copy_(source)
    for unit, elements in job.completed:
        x_NU[unit, : elements.numel()] = elements
    return x_NU


def _blocks(job: Job, buffer: Tensor, padded: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Matching views of the fragment in `buffer` and of its units in `padded`, (rows, columns) each."""
    start = job.piece.fragment.offset
    return [
        (
            buffer.narrow(0, start + b.source, b.rows * b.columns).view(b.rows, b.columns),
            padded.as_strided((b.rows, b.columns), (b.stride, 1), padded.storage_offset() + b.destination),
        )
        for b in job.piece.blocks
    ]
