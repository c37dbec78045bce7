"""Details of a unit over the denominator of the unit, times one gain, in Triton: gwt_dist/formulas/weighed.py.

Imports triton.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def sizes(t, lr, beta1, first_weight, second_weight, whole1, whole2):
    """Of a rule at step t, fp64: the size of the update, and two numbers for `change`."""
    before = whole1 - (1 - beta1)
    later = (t > 1) & (before > 0)
    steady = tl.where(later, first_weight * whole2 / tl.where(later, before * before, 1.0), 0.0)
    return tl.sqrt(second_weight) / first_weight * lr, steady, first_weight


@triton.jit
def change(
    x,  # (BLOCK, U)
    a,  # (BLOCK,), as all that follow up to n: the approximation of this step
    exp_avg,
    exp_avg_sq,
    n,  # the momentum that the update reads
    size,  # 0-d, as all that follow: of the update
    steady,  # the two numbers of `sizes`
    most,
    rest1,
    eps,
    detail_gain,
    coherent,
    GAIN: tl.constexpr,
    LEVEL: tl.constexpr,
):
    """What the weights lose, (BLOCK, U)."""
    inverse = tl.div_rn(1.0, tl.sqrt_rn(exp_avg_sq) + eps)
    size_of_unit = inverse * size
    before = (exp_avg - a * rest1) * inverse  # `weighed.coherence`
    most_steady = tl.minimum(before * before * steady, most, propagate_nan=tl.PropagateNan.ALL)
    gain = tl.maximum(detail_gain, most_steady, propagate_nan=tl.PropagateNan.ALL)
    gain = tl.where(coherent, gain, detail_gain)
    detail_size = size_of_unit * (gain if LEVEL > 0 else 0.0)
    rest = n * GAIN * size_of_unit - a * GAIN * detail_size
    return x * detail_size[:, None] + rest[:, None]
