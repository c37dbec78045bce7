"""One Adam step with moments in wavelet space, as pure functions of units: the reference for every kernel.

    a    = approximation(x)
    m    = b1*m + (1-b1)*a
    v    = b2*v + (1-b2)*e        e = a**2 ("approximation") or the mean square of the unit ("energy")
    d    = sqrt(v) + eps
    g    = detail_gain, or the coherence of the unit where that is more
    u    = synthesis of m/d and g * details / d
    rho  = max(||m/d|| / (prev + 1e-8), limiter) / limiter        the norm-growth limiter, one number a tensor
    prev = ||m/d|| / rho
    W   -= lr * sqrt(1-b2**t)/(1-b1**t) * scale/rho * u
    W   *= 1 - lr * weight_decay

Source: Gradient Wavelet Transform (arXiv 2501.07237), Adam with ``eps`` beside the uncorrected ``sqrt(v)``. At level 0
``a = x`` and the details vanish, which leaves AdamW. The coherence is this project's own, see `coherence`.

Shapes: N coefficients, U elements of a unit, see `wavelet`. Mathematics is in the dtype of the arguments: fp32, or fp64
for fp64 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gwt_dist.wavelet import Transform


@dataclass(frozen=True, slots=True)
class Rule:
    """The numbers of a parameter group at one step, recipe resolved."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    scale: float  # factor on the update where level > 0
    energy: bool  # second moment from the energy of the unit, not from its approximation
    detail_gain: float  # factor on the details; with `coherent` the least one
    coherent: bool  # details of a unit have its coherence as their factor where that is more
    limiter: float  # growth of ||m/d|| allowed in one step, 0: unlimited
    orthogonal: bool = False  # no second moment where level > 0: the update of `orthogonal` instead of this one


def update_moments(
    x_NU: Tensor,  # (N, U) gradient, zeros where a unit is padded
    exp_avg_N: Tensor,  # (N,) updated in place
    exp_avg_sq_N: Tensor,  # (N,) updated in place
    count_N: Tensor,  # (N,) elements of the unit that are not padding
    transform: Transform,
    rule: Rule,
) -> None:
    """Decay both moments and add this step's approximation and second moment."""
    beta1, beta2 = rule.betas
    a_N = transform.approximation(x_NU)
    e_N = transform.energy(x_NU, count_N) if rule.energy else a_N * a_N
    exp_avg_N.mul_(beta1).add_(a_N.mul_(1 - beta1))
    exp_avg_sq_N.mul_(beta2).add_(e_N.mul_(1 - beta2))


def denominator(exp_avg_sq_N: Tensor, eps: float) -> Tensor:
    """``sqrt(v) + eps``, shape (N,).

    The root is taken in fp64, which rounds correctly to fp32: torch's own on a CPU is MKL's, one bit off in a fifth of
    all cases, and no kernel could equal it.
    """
    return exp_avg_sq_N.double().sqrt().to(exp_avg_sq_N.dtype).add_(eps)


def squared_norm(exp_avg_N: Tensor, exp_avg_sq_N: Tensor, eps: float) -> Tensor:
    """``||m/d||**2`` over the given coefficients, a 0-d fp64 tensor."""
    return (exp_avg_N / denominator(exp_avg_sq_N, eps)).double().square_().sum()


def limit_growth(
    squared_norm_T: Tensor,  # (T,) fp64, ||m/d||**2 of each whole tensor
    limited_norm_T: Tensor,  # (T,) fp64, prev; <= 0 means not yet set
    limiter: float | Tensor,  # one for all, or (T,)
) -> tuple[Tensor, Tensor]:
    """The divisor rho of T tensors and the norms to remember, (T,) fp64 each.

    A zero or non-finite norm is never remembered: it would hold later updates near zero for thousands of steps.
    """
    norm_T = squared_norm_T.sqrt()
    valid_T = norm_T.isfinite() & (norm_T > 0)
    rho_T = (norm_T / (limited_norm_T + 1e-8)).clamp(min=limiter).div_(limiter)
    rho_T = torch.where(valid_T & (limited_norm_T > 0), rho_T, 1.0)
    return rho_T, torch.where(valid_T, norm_T / rho_T, limited_norm_T)


def step_size(step: Tensor, rule: Rule) -> Tensor:
    """``lr * sqrt(1-b2**t)/(1-b1**t)`` as a 0-d fp64 tensor; `step` is t, 0-d."""
    beta1, beta2 = rule.betas
    t = step.double()
    return (1 - beta2**t).sqrt_() / (1 - beta1**t) * rule.lr


def coherence(
    exp_avg_N: Tensor,  # (N,) after update_moments
    a_N: Tensor,  # (N,) this step's approximation
    inverse_N: Tensor,  # (N,) 1 / denominator
    step: Tensor,  # 0-d, t
    rule: Rule,
) -> Tensor:
    """How steady the gradient of each unit has been, 0 to 1, times ``1-b1**t``: a gain of its details, (N,).

    With ``M`` and ``V`` the bias-corrected moments, M being of the steps before this one, it is ``M**2 / V``. Where a
    gradient is signal of power S and noise of power N, its expectation is S / (S+N) + (1-b1)/(1+b1) * N / (S+N). The
    first term is the factor that takes the signal best out of a single noisy gradient (Wiener's), which is all that is
    known of a detail. This step's own approximation is left out of M, or an outlier would call itself steady.

    The factor ``1-b1**t`` cancels that of `step_size`, which is meant for a moment.
    """
    beta1, beta2 = rule.betas
    t = step.double()
    whole = 1 - beta1**t
    before = whole - (1 - beta1)  # b1 * (1 - b1**(t-1)): none at the first step
    factor = torch.where((t > 1) & (before > 0), whole * (1 - beta2**t) / (before * before), 0.0)
    steady_N = (exp_avg_N - a_N * (1 - beta1)) * inverse_N
    return torch.minimum(steady_N * steady_N * factor.to(steady_N), whole.to(steady_N))


def decay_factor(rule: Rule, like: Tensor) -> Tensor:
    """What weight decay leaves of a weight, ``1 - lr * weight_decay``, taken in fp64, as a 0-d tensor.

    In dtype and on the device of `like`.
    """
    if isinstance(rule.lr, Tensor) and rule.lr.device == like.device:
        return (1 - rule.lr.double() * rule.weight_decay).to(like.dtype)
    return like.new_full((), 1 - float(rule.lr) * rule.weight_decay)  # a fill: a copy to a GPU would wait for it


def change(
    x_NU: Tensor,  # (N, U) gradient, zeros where a unit is padded
    exp_avg_N: Tensor,  # (N,) after update_moments
    exp_avg_sq_N: Tensor,  # (N,) after update_moments
    size: Tensor,  # 0-d, ``step_size * scale / rho``
    step: Tensor,  # 0-d, t
    transform: Transform,
    rule: Rule,
) -> Tensor:
    """``size * u``, what weight loses, (N, U).

    One division a unit: ``1 / d`` is in the factor of its approximation, of all its details and in its coherence.
    """
    inverse_N = denominator(exp_avg_sq_N, rule.eps).reciprocal_()
    gain_N = torch.full_like(inverse_N, rule.detail_gain)
    if rule.coherent:
        gain_N = torch.maximum(gain_N, coherence(exp_avg_N, transform.approximation(x_NU), inverse_N, step, rule))
    return transform.synthesis(x_NU, exp_avg_N, inverse_N * size, gain_N)
