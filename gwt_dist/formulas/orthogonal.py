"""One step of a matrix whose momentum in wavelet space is orthogonalized: the update without a second moment.

    a    = approximation(x)
    c    = min(1, ||M||**2 / ||a||**2)      M = m / (1-b1**(t-1)), of the steps before this one; 0 at the first
    m    = b1*m + (1-b1)*a
    n    = m, or b1*m + (1-b1)*a with Nesterov
    U    = synthesis of n / (1-b1**t) and g * details       g = detail_gain, 1 unless it is said, or c for "coherence"
    O    = newton_schulz(U)                                 U of the whole matrix [R, C], as it travels
    W   -= lr * scale * sqrt(max(R, C)) * O
    W   *= 1 - lr * weight_decay

All singular values of O are about 1, so the root mean square of its elements is about ``1 / sqrt(max(R, C))`` and that
of what a weight loses ``lr * scale``. Adam's is a quarter to a third of lr; the scale of 0.5 is the one with which the
best rate was AdamW's.

Sources: K. Jordan, Muon (2024), for the iteration and its coefficients; Liu et al., arXiv 2502.16982, for a factor of
``sqrt(max(R, C))``; arXiv 2501.07237 for the wavelets. Momentum in their space, details of the gradient beside it and
the coherence c are this project's own; docs/quality.md has what was compared.

Shapes: N coefficients, U elements of a unit, see `wavelet`. Mathematics is in the dtype of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gwt_dist import products
from gwt_dist.declare import Rule
from gwt_dist.formulas.moments import first_weight, read
from gwt_dist.formulas.share import Seat, Share
from gwt_dist.layout import columns_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def newton_schulz(
    u_nRC: Tensor,  # (..., R, C), fp32, fp64 or bf16
) -> Tensor:
    """Matrices (..., R, C) with the singular vectors of `u_nRC` and singular values of about 1 (0.7 to 1.2).

    Each step is ``x = a*x + b*(x x^T) x + c*(x x^T)**2 x`` (Jordan, Muon). Of zeros it is zeros.
    """
    a, b, c = COEFFICIENTS
    rows, columns = u_nRC.shape[-2:]
    u = u_nRC.reshape(-1, rows, columns)
    norm = torch.linalg.vector_norm(u, dim=(1, 2), keepdim=True, dtype=torch.promote_types(u.dtype, torch.float32))
    # A library's product has other bits where a matrix begins at an odd place. Zeros that are added stay zeros.
    padded = u.new_zeros(len(u), products.aligned(rows), products.aligned(columns))
    torch.div(u, (norm + 1e-7).to(u.dtype), out=padded[:, :rows, :columns])
    x: Tensor = padded.mT if rows > columns else padded
    for _ in range(STEPS):
        x = torch.baddbmm(x, products.quadratic(products.gram(x), b, c), x, beta=a)
    x = x.mT if rows > columns else x
    return x[:, :rows, :columns].view(u_nRC.shape)


def norms(share: Share) -> dict[str, tuple[Tensor, ...]]:
    """Squares of the momentum before this step and of its approximation, (N,) fp64 each, for `detail_gain`."""
    a_N = share.piece.transform.approximation(share.x_NU)
    return {"m_a": tuple(x_N.double().square() for x_N in (share.state["exp_avg"], a_N))}


def momentum(share: Share) -> Tensor:
    """Add this step's approximation to the momentum; returns ``U``, (N, U)."""
    exp_avg_N, rule, transform = share.state["exp_avg"], share.rule, share.piece.transform
    gain = torch.full_like(share.step, rule["detail_gain"], dtype=torch.float64)
    if rule["coherent"]:
        squared_norm_m, squared_norm_a = share.sums["m_a"].unbind()
        gain = coherence(squared_norm_m, squared_norm_a, share.step, rule)
    fresh_N = transform.approximation(share.x_NU).mul_(1 - rule["beta1"])
    exp_avg_N.mul_(rule["beta1"]).add_(fresh_N)
    share.keep("exp_avg")
    corrected_N = read(exp_avg_N, fresh_N, rule) / first_weight(share.step.double(), rule).to(fresh_N)
    gain_N = gain.to(exp_avg_N).expand_as(exp_avg_N)
    return transform.synthesis(share.x_NU, corrected_N, torch.ones_like(exp_avg_N), gain_N)


def orthogonalize(
    u_nRC: Tensor,  # (n, R, C)
    rows: Mapping[str, Tensor],  # none
    rules: Sequence[Rule],  # of each matrix but for places without one
    seats: Sequence[Seat | None],  # of the same: there is nothing that an owner keeps
) -> None:
    """Put ``O`` in the place of ``U``."""
    u_nRC.copy_(newton_schulz(u_nRC))


def write(
    o: Tensor,  # elements of O, of any shape
    shape: Sequence[int],  # of the tensor
    rule: Rule,
) -> Tensor:
    """What its weights lose, as `o`: ``lr * scale * sqrt(max(R, C)) * O``."""
    lr = rule.lr.double() if isinstance(rule.lr, Tensor) else rule.lr  # so that the size is rounded once
    size: float | Tensor = lr * (rule["scale"] * math.sqrt(max(shape[0], columns_of(shape))))
    return o * size


def coherence(
    squared_norm_m: Tensor,  # 0-d fp64, ||m||**2 of the whole matrix before this step
    squared_norm_a: Tensor,  # 0-d fp64, ||a||**2 of the whole matrix
    step: Tensor,  # 0-d, t
    rule: Rule,
) -> Tensor:
    """How steady the gradient of a matrix has been, 0-d fp64: a factor on its details, at least `detail_gain`.

    One number for a matrix where `weighed.coherence` has one for each unit: there is no second moment to tell units
    apart, and the iteration sees them together.
    """
    least = torch.full_like(squared_norm_m, rule["detail_gain"])
    before = 1 - rule["beta1"] ** (step.double() - 1)
    steady = squared_norm_m / (before * before * squared_norm_a)
    return torch.maximum(torch.where((before > 0) & (squared_norm_a > 0), steady, 0.0).clamp(max=1.0), least)
