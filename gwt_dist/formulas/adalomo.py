"""A second moment of a row and a column and nothing else: no momentum, so no coefficient is kept.

    u    = x / sqrt(V), over max(1, RMS(u) / clip_threshold)        V of `factored`, e the mean square of a unit
    W   -= lr * scale * max(1e-3, RMS(W)) * u

What is left of a level is that a column is one of units. Source: AdaLomo (arXiv 2310.10195), at level 0 its step; there
the rate of weight decay is multiplied by max(1e-3, RMS(W)) too, here it is AdamW's.

Shapes: N coefficients, U elements of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gwt_dist.formulas import factored
from gwt_dist.formulas.factored import Second
from gwt_dist.formulas.moments import scaled, uncorrected
from gwt_dist.formulas.share import Share

LEAST = 1e-3  # of RMS(W): weights of zeros move too


def squares(share: Share) -> dict[str, Tensor]:
    """Of each coefficient e, (N,), and the squares of the weights that this rank holds, summed; fp64."""
    return factored.energies(share) | {"squared_w": share.weight.double().square().sum()}


def normalized(share: Share) -> dict[str, Tensor]:
    """Squares of u of each unit, as those of its coefficients, (N,) fp64; changes nothing."""
    coefficients = share.piece.units.coefficients
    squared_N = _normalized(share, Second.of(share)).double().square().sum(-1) / coefficients
    return {"squared_u": squared_N.repeat_interleave(coefficients)}


def write(share: Share) -> Tensor:
    """Update what is kept; what the weights lose, (N, U)."""
    second, rule = Second.of(share), share.rule
    elements = second.rows * share.piece.fragment.columns
    rms_u, rms_w = ((share.sums[name] / elements).sqrt() for name in ("squared_u", "squared_w"))
    size = uncorrected(share.step.double(), rule) * rms_w.clamp(min=LEAST)
    change_NU = _normalized(share, second)
    second.store(share)
    return change_NU * scaled(size / (rms_u / rule["clip_threshold"]).clamp(min=1.0), share)


def _normalized(share: Share, second: Second) -> Tensor:
    """``x / sqrt(V)``, (N, U)."""
    transform = share.piece.transform
    a_N = transform.approximation(share.x_NU)
    return transform.synthesis(share.x_NU, a_N, second.inverse_N, torch.ones_like(a_N))
