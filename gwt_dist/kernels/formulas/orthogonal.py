"""Momentum that travels to be orthogonalized, in Triton: gwt_dist/formulas/orthogonal.py; imports triton."""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def detail_gain(
    squared_norm_m,  # 0-d fp64, as all that follow: of the momentum before this step
    squared_norm_a,  # of this step's approximation
    before,  # how much of all gradients was in the momentum before this step
    least,
    coherent,
):
    """The factor on the details of a matrix, 0-d fp64. NaN stays NaN."""
    known = (before > 0) & (squared_norm_a > 0)
    steady = tl.where(known, squared_norm_m / tl.where(known, before * before * squared_norm_a, 1.0), 0.0)
    steady = tl.minimum(steady, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(coherent, tl.maximum(steady, least, propagate_nan=tl.PropagateNan.ALL), least)


@triton.jit
def momentum(
    a,  # (BLOCK,), as the next: the approximation of this step
    exp_avg,  # before it
    beta1,  # 0-d, as the next
    rest1,
):
    """The new momentum, (BLOCK,)."""
    return exp_avg * beta1 + a * rest1


@triton.jit
def sent(
    x,  # (BLOCK, U)
    a,  # (BLOCK,), as the next: the approximation of this step
    exp_avg,  # after it, as it is stored
    beta1,  # 0-d, as all that follow
    rest1,
    first_weight,  # what corrects the bias
    gain,  # `detail_gain`
    nesterov,
    GAIN: tl.constexpr,
):
    """U of the units, (BLOCK, U)."""
    read = tl.where(nesterov, exp_avg * beta1 + a * rest1, exp_avg)
    of_unit = tl.div_rn(read, first_weight) * GAIN - a * GAIN * gain
    return x * gain + of_unit[:, None]


@triton.jit
def lost(lr, scale, side):
    """What an element of O is multiplied with in a matrix whose larger side is `side`, fp64."""
    return lr * (scale * tl.sqrt(side.to(tl.float64)))
