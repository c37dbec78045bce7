"""A second moment of a row and a column in place of one a coefficient, and a momentum of what it has normalized.

    r    = b2*r + (1-b2) * (mean of e over a row + eps**2)         exp_avg_sq_row, R numbers
    c    = b2*c + (1-b2) * (mean of e over a column + eps**2)      exp_avg_sq_col, K numbers
    V    = r c / mean(c) / (1-b2**t)        e of the unit: the square of its approximation or its mean square
    u    = a / sqrt(V), over max(1, RMS(u) / clip_threshold)
    m    = b1*m + (1-b1)*u
    W   -= lr * scale * synthesis of m/(1-b1**t) and g * details / sqrt(V)

With `decay_rate` b2 is 1 - t**decay_rate, which is 0 at the first step, and there is no bias to correct. The coherence
in g is that of `weighed`, of m as it is: u is normalized.

With confidence, m is divided by sqrt(S), where S is to (u - m)**2 + 1e-16 and b3 what V is to e and b2; its vectors are
exp_avg_res_row and exp_avg_res_col. Details are not: of them S says nothing, and it is small where units have a small
mean and large details, which would grow without bound.

Sources: Adafactor (arXiv 1804.04235) for V and the limit on RMS(u); CAME (arXiv 2307.02047) for S. Without correction
of bias, at level 0, it is theirs. Published CAME has two numbers for eps; here the first is eps**2, so that eps is to a
gradient what it is to Adam's, and the second is fixed.

Two sums over ranks a step, whatever is cut. With rho the factor that limits u, m' - rho*u = b1 * (m - rho*u), so the
sums of squares that S needs follow from those of u**2, u*m and m**2, which are known before rho is.

Shapes: N coefficients, P rows and K columns of coefficients that a piece touches, see `share`. Sums and vectors are
taken in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gwt_dist.formulas.moments import first_weight, scaled, uncorrected
from gwt_dist.formulas.share import Share

CONFIDENCE_EPS = 1e-16  # beside (u - m)**2
MOST = 1e18  # of 1 / sqrt(V) and 1 / sqrt(S): where a row or a column has had no gradient, 0 times both is still 0
_LEAST = torch.finfo(torch.float32).tiny  # of what is added to a mean square: its vectors are stored in fp32


@dataclass(frozen=True, slots=True)
class Factored:
    """The functions of all four: either second moment, with and without confidence."""

    energy: bool  # e is the mean square of the unit, not the square of its approximation
    confidence: bool

    def squares(self, share: Share) -> dict[str, Tensor]:
        """Of each coefficient e, (N,) fp64, to be summed over rows and columns."""
        if self.energy:
            return energies(share)
        e_N = share.piece.transform.approximation(share.x_NU).double().square()
        return {"square_row": e_N, "square_col": e_N}

    def normalized(self, share: Share) -> dict[str, Tensor | tuple[Tensor, ...]]:
        """Squares of u and, with confidence, its products with m, (N,) fp64; changes nothing."""
        u_N = (share.piece.transform.approximation(share.x_NU) * Second.of(share).inverse_N).double()
        if not self.confidence:
            return {"squared_u": u_N.square()}
        m_N = share.state["exp_avg"].double()
        products = u_N.square(), u_N * m_N, m_N.square()
        return {"residual_row": products, "residual_col": products}

    def write(self, share: Share) -> Tensor:
        """Update all state; what the weights lose, (N, U)."""
        rule, state, transform, t = share.rule, share.state, share.piece.transform, share.step.double()
        second, beta1 = Second.of(share), rule["beta1"]
        squared = share.sums["residual_col"][0].sum() if self.confidence else share.sums["squared_u"]
        rho = 1 / ((squared / second.size).sqrt() / rule["clip_threshold"]).clamp(min=1.0)
        inverse_N = second.inverse_N * rho.to(second.inverse_N)
        gain_N = self._gain(share, t)  # of m before this step
        state["exp_avg"].mul_(beta1).add_(transform.approximation(share.x_NU) * inverse_N, alpha=1 - beta1)
        share.keep("exp_avg")
        size_N = scaled(uncorrected(t, rule), share).expand_as(inverse_N)
        n_N = state["exp_avg"] * first_weight(t, rule, share.piece.level).reciprocal().to(inverse_N)
        if self.confidence:
            n_N *= self._confidence(share, rho, second, t)
        second.store(share)
        return transform.synthesis(share.x_NU, n_N, size_N, gain_N * inverse_N)

    def _gain(self, share: Share, t: Tensor) -> Tensor:
        """What of a detail over its denominator goes to the weights, (N,)."""
        rule, m_N = share.rule, share.state["exp_avg"]
        gain_N = torch.full_like(m_N, rule["detail_gain"]) / first_weight(t, rule, share.piece.level).to(m_N)
        if rule["coherent"]:
            before = 1 - rule["beta1"] ** (t - 1)  # the weights in m of the steps before this one
            steady_N = m_N.square() * torch.where(before > 0, before.square().reciprocal(), 0.0).to(m_N)
            gain_N = torch.maximum(gain_N, steady_N.clamp(max=1.0))
        return gain_N

    def _confidence(self, share: Share, rho: Tensor, second: Second, t: Tensor) -> Tensor:
        """``1 / sqrt(S)``, (N,), its vectors updated."""
        rule, state, sums = share.rule, share.state, share.sums
        beta = rule["confidence_beta"]
        means = []
        for name, length in (("row", second.columns), ("col", second.rows)):
            squared_u, um, squared_m = sums[f"residual_{name}"]
            residual = (rho * rho * squared_u - 2 * rho * um + squared_m).clamp(min=0) * rule["beta1"] ** 2
            before = state[f"exp_avg_res_{name}"]
            before.copy_(before.double() * beta + (1 - beta) * (residual / length + CONFIDENCE_EPS))
            means.append(before.double())
        correction = 1 - beta**t if rule["correct_bias"] else torch.ones_like(t)
        return inverse_root(share, means[0], means[1], correction)


def energies(share: Share) -> dict[str, Tensor]:
    """The mean square of the unit of each coefficient, (N,) fp64, to be summed over rows and columns."""
    counts_N = share.piece.counts(share.x_NU.new_empty(share.piece.moments.numel))
    e_N = share.piece.transform.energy(share.x_NU, counts_N).double()
    return {"square_row": e_N, "square_col": e_N}


@dataclass(frozen=True, slots=True)
class Second:
    """The second moment of this step."""

    row_P: Tensor  # r, fp64
    col_K: Tensor  # c, fp64
    inverse_N: Tensor  # 1 / sqrt(V)
    rows: int  # R
    columns: int  # K

    @property
    def size(self) -> int:
        """Coefficients of the tensor."""
        return self.rows * self.columns

    @classmethod
    def of(cls, share: Share) -> Second:
        """From what is kept, which stays, and the sums of `squares`, which are complete."""
        fragment, t, rate = share.piece.fragment, share.step.double(), share.rule["decay_rate"]
        beta2 = 1 - t**rate if rate else share.rule["beta2"]
        rows, columns = prod(fragment.shape) // fragment.columns, share.piece.moments.columns
        least = max(share.rule["eps"] ** 2, _LEAST)
        row_P, col_K = (
            share.state[f"exp_avg_sq_{name}"].double() * beta2
            + (1 - beta2) * (share.sums[f"square_{name}"] / length + least)
            for name, length in (("row", columns), ("col", rows))
        )
        correction = 1 - beta2**t if share.rule["correct_bias"] and not rate else torch.ones_like(t)
        return cls(row_P, col_K, inverse_root(share, row_P, col_K, correction), rows, columns)

    def store(self, share: Share) -> None:
        """Keep it."""
        share.state["exp_avg_sq_row"].copy_(self.row_P)
        share.state["exp_avg_sq_col"].copy_(self.col_K)


def inverse_root(
    share: Share,
    row_P: Tensor,  # (P,) fp64
    col_K: Tensor,  # (K,) fp64, whose mean is that of all rows
    correction: Tensor,  # 0-d fp64
) -> Tensor:
    """``1 / sqrt(row * col / mean / correction)`` of each coefficient, (N,).

    A rank need not know the rows of others: both means are that of all coefficients.
    """
    rows_P = (row_P / col_K.mean()).rsqrt().to(share.x_NU)
    cols_K = (col_K / correction).rsqrt().to(share.x_NU)
    return share.outer(rows_P, cols_K).clamp_(max=MOST)
