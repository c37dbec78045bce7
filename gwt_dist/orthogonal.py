"""One step of a matrix whose momentum in wavelet space is orthogonalized: the update without a second moment.

    a    = approximation(x)
    c    = min(1, ||M||**2 / ||a||**2)      M = m / (1-b1**(t-1)), of the steps before this one; 0 at the first
    m    = b1*m + (1-b1)*a
    U    = synthesis of m / (1-b1**t) and g * details       g = detail_gain, or c where that is more
    O    = newton_schulz(U)                                 U of the whole matrix [R, C]
    W   -= lr * scale * sqrt(max(R, C)) * O
    W   *= 1 - lr * weight_decay

All singular values of O are about 1, so the root mean square of its elements is about ``1 / sqrt(max(R, C))`` and that
of what a weight loses ``lr * scale``, as it is under Adam.

Sources: K. Jordan, Muon (2024), for the iteration and its coefficients; Liu et al., arXiv 2502.16982, for a factor of
``sqrt(max(R, C))``; arXiv 2501.07237 for the wavelets. Momentum in their space and the coherence c, which decides how
much of the details takes part, are this project's own; docs/quality.md has what was compared.

Shapes: N coefficients, U elements of a unit, see `wavelet`. Mathematics is in the dtype of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gwt_dist.layout import columns_of
from gwt_dist.update import Rule
from gwt_dist.wavelet import Transform

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def newton_schulz(
    u_RC: Tensor,  # (R, C), fp32 or fp64
) -> Tensor:
    """A matrix (R, C) with the singular vectors of `u_RC` and singular values of about 1 (0.7 to 1.2), same dtype.

    Each step is ``x = a*x + b*(x x^T) x + c*(x x^T)**2 x`` (Jordan, Muon). Of zeros it is zeros.
    """
    a, b, c = COEFFICIENTS
    tall = u_RC.shape[0] > u_RC.shape[1]
    x: Tensor = u_RC.T if tall else u_RC
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(a * x, torch.addmm(b * gram, gram, gram, alpha=c), x)
    return x.T if tall else x


def detail_gain(
    squared_norm_m: Tensor,  # 0-d fp64, ||m||**2 of the whole matrix before this step
    squared_norm_a: Tensor,  # 0-d fp64, ||a||**2 of the whole matrix
    step: Tensor,  # 0-d, t
    rule: Rule,
) -> Tensor:
    """The factor on the details of a matrix, 0-d fp64: its coherence, which is how steady its gradient has been.

    One number for a matrix where `update.coherence` has one for each unit: there is no second moment to tell units
    apart, and the iteration sees them together.
    """
    least = torch.full_like(squared_norm_m, rule.detail_gain)
    if not rule.coherent:
        return least
    before = 1 - rule.betas[0] ** (step.double() - 1)
    steady = squared_norm_m / (before * before * squared_norm_a)
    return torch.maximum(torch.where((before > 0) & (squared_norm_a > 0), steady, 0.0).clamp(max=1.0), least)


def update_momentum(
    x_NU: Tensor,  # (N, U) gradient, zeros where a unit is padded
    exp_avg_N: Tensor,  # (N,) updated in place
    gain: Tensor,  # 0-d, the factor on the details
    step: Tensor,  # 0-d, t
    transform: Transform,
    rule: Rule,
) -> Tensor:
    """Add this step's approximation to the momentum; returns ``U``, (N, U)."""
    beta = rule.betas[0]
    exp_avg_N.mul_(beta).add_(transform.approximation(x_NU).mul_(1 - beta))
    corrected_N = exp_avg_N / (1 - beta ** step.double()).to(exp_avg_N)
    return transform.synthesis(x_NU, corrected_N, torch.ones_like(exp_avg_N), gain.to(exp_avg_N).expand_as(exp_avg_N))


def step_size(shape: Sequence[int], rule: Rule) -> float | Tensor:
    """``lr * scale * sqrt(max(R, C))`` of a tensor of `shape`."""
    columns = columns_of(shape)
    return rule.lr * (rule.scale * math.sqrt(max(shape[0], columns)))
