"""One Adam step with moments in wavelet space, as pure functions of units: the reference for every kernel.

    a    = approximation(x)
    m    = b1*m + (1-b1)*a
    v    = b2*v + (1-b2)*e        e = a**2 ("approximation") or the mean square of the unit ("energy")
    d    = sqrt(v) + eps
    n    = m, or b1*m + (1-b1)*a with Nesterov
    u    = synthesis of n/d and g * details / d, g of `weighed`;  `residual` has another u
    rho  = max(||n/d|| / (prev + 1e-8), limiter) / limiter        the norm-growth limiter, one number a tensor
    prev = ||n/d|| / rho
    W   -= lr * sqrt(1-b2**t)/(1-b1**t) * scale/rho * u
    W   *= 1 - lr * weight_decay

Source: Gradient Wavelet Transform (arXiv 2501.07237), Adam with ``eps`` beside the uncorrected ``sqrt(v)``. At level 0
``a = x`` and the details vanish; scale, limiter and Nesterov are left out there, which leaves AdamW.

Shapes: N coefficients, U elements of a unit, see `wavelet`. Mathematics is in the dtype of the arguments: fp32, or fp64
for fp64 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gwt_dist.formulas import residual, weighed
from gwt_dist.formulas.limiter import limit
from gwt_dist.formulas.moments import denominator, read
from gwt_dist.formulas.share import Share

# The change of the weights, (N, U), from n, (N,).
DETAILS: dict[str, Callable[[Share, Tensor], Tensor]] = {
    "weighed": weighed.change,
    "residual": residual.change,
}


@dataclass(frozen=True, slots=True)
class Adam:
    """The functions of both second moments."""

    energy: bool  # e is the mean square of the unit, not the square of its approximation
    limit = staticmethod(limit)

    def moments(self, share: Share) -> dict[str, Tensor]:
        """Update both moments; returns the squares of ``n/d`` of each coefficient, (N,) fp64, whose sum limits."""
        exp_avg_N, exp_avg_sq_N = share.state["exp_avg"], share.state["exp_avg_sq"]
        transform, beta1, beta2 = share.piece.transform, share.rule["beta1"], share.rule["beta2"]
        a_N = transform.approximation(share.x_NU)
        e_N = transform.energy(share.x_NU, share.piece.counts(exp_avg_N)) if self.energy else a_N * a_N
        n_N = a_N * (1 - beta1)
        exp_avg_N.mul_(beta1).add_(n_N)
        exp_avg_sq_N.mul_(beta2).add_(e_N.mul_(1 - beta2))
        share.keep("exp_avg", "exp_avg_sq")
        if not share.program.sums:
            return {}
        n_N = read(exp_avg_N, n_N, share.rule)
        return {"update": (n_N / denominator(exp_avg_sq_N, share.rule["eps"])).double().square_()}

    def write(self, share: Share) -> Tensor:
        """What the weights lose, (N, U)."""
        n_N = share.state["exp_avg"]
        if share.rule["nesterov"] and share.piece.level:
            fresh_N = share.piece.transform.approximation(share.x_NU).mul_(1 - share.rule["beta1"])
            n_N = read(n_N, fresh_N, share.rule)
        return DETAILS[share.program.detail](share, n_N)

    def step(self, share: Share) -> Tensor:
        """Both at once."""
        self.moments(share)
        return self.write(share)
