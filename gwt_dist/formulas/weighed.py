"""Details of a unit over the denominator of the unit, times one gain: a number, or the coherence of the unit.

u = synthesis of n/d and g * details / d        g = detail_gain, or the coherence of the unit where that is more
"""

from __future__ import annotations

import torch
from torch import Tensor

from gwt_dist.declare import Rule
from gwt_dist.formulas.moments import denominator, first_weight, scaled, step_size
from gwt_dist.formulas.share import Share


def change(share: Share, n_N: Tensor) -> Tensor:
    """``lr * sqrt(1-b2**t)/(1-b1**t) * scale/rho * u``, (N, U).

    One division a unit: ``1 / d`` is in the factor of its approximation, of all its details and in its coherence.
    """
    rule, piece, step = share.rule, share.piece, share.step
    inverse_N = denominator(share.state["exp_avg_sq"], rule["eps"]).reciprocal_()
    gain_N = torch.full_like(inverse_N, rule["detail_gain"])
    if rule["coherent"]:
        a_N = piece.transform.approximation(share.x_NU)
        steady_N = coherence(share.state["exp_avg"], a_N, inverse_N, step, rule, piece.level)
        gain_N = torch.maximum(gain_N, steady_N)
    size = scaled(step_size(step, rule, piece.level), share)
    return piece.transform.synthesis(share.x_NU, n_N, inverse_N * size, gain_N)


def coherence(
    exp_avg_N: Tensor,  # (N,) this step's approximation added
    a_N: Tensor,  # (N,) this step's approximation
    inverse_N: Tensor,  # (N,) 1 / denominator
    step: Tensor,  # 0-d, t
    rule: Rule,
    level: int,
) -> Tensor:
    """How steady the gradient of each unit has been, 0 to 1, times ``1-b1**t``: a gain of its details, (N,).

    With ``M`` and ``V`` the bias-corrected moments, M being of the steps before this one, it is ``M**2 / V``. Where a
    gradient is signal of power S and noise of power N, its expectation is S / (S+N) + (1-b1)/(1+b1) * N / (S+N). The
    first term is the factor that takes the signal best out of a single noisy gradient (Wiener's), which is all that is
    known of a detail. This step's own approximation is left out of M, or an outlier would call itself steady.

    The factor ``1-b1**t`` cancels that of `moments.step_size`, which is meant for a moment. The coherence is this
    project's own.
    """
    beta1, beta2 = rule["beta1"], rule["beta2"]
    t = step.double()
    before = 1 - beta1**t - (1 - beta1)  # b1 * (1 - b1**(t-1)): none at the first step
    most = first_weight(t, rule, level)
    factor = torch.where((t > 1) & (before > 0), most * (1 - beta2**t) / (before * before), 0.0)
    steady_N = (exp_avg_N - a_N * (1 - beta1)) * inverse_N
    return torch.minimum(steady_N * steady_N * factor.to(steady_N), most.to(steady_N))
