"""The residual of an element as a gradient of its own, bounded by its own square in the denominator: no gain, no norm.

    r = x - s*a                                        s*a is the mean of the unit
    u = (s*n/(1-b1**t) + r) / (sqrt(v/(1-b2**t) + r**2) + eps)

Source: FOAM (arXiv 2512.07112). Unlike `weighed`, eps stands beside the corrected root. Haar alone: mean and residual
meet in the element. Where units have one element r = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gwt_dist.formulas.moments import denominator, first_weight, scaled, uncorrected
from gwt_dist.formulas.share import Share


def change(share: Share, n_N: Tensor) -> Tensor:
    """``lr * scale * u``, (N, U): a root and a division an element."""
    rule, t = share.rule, share.step.double()
    mean = 2.0 ** (-share.piece.level / 2)  # s
    second_weight = 1 - rule["beta2"] ** t if rule["correct_bias"] else torch.ones_like(t)
    n_N = n_N * first_weight(t, rule, share.piece.level).reciprocal().to(n_N) * mean
    v_N = share.state["exp_avg_sq"] * second_weight.reciprocal().to(n_N)
    r_NU = share.x_NU - (share.piece.transform.approximation(share.x_NU) * mean)[:, None]
    d_NU = denominator(r_NU * r_NU + v_N[:, None], rule["eps"])
    u_NU: Tensor = (r_NU + n_N[:, None]) / d_NU
    return u_NU * scaled(uncorrected(t, rule), share)
