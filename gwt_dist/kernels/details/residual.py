"""The residual of an element as a gradient of its own, in Triton: gwt_dist/formulas/residual.py; imports triton."""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def sizes(t, lr, beta1, first_weight, second_weight, whole1, whole2):
    """Of a rule at step t, fp64: the size of the update, and two numbers for `change`."""
    return lr, 1 / first_weight, 1 / second_weight


@triton.jit
def change(
    x,  # (BLOCK, U)
    a,  # (BLOCK,), as all that follow up to n: the approximation of this step
    exp_avg,
    exp_avg_sq,
    n,  # the momentum that the update reads
    size,  # 0-d, as all that follow: of the update
    first,  # the two numbers of `sizes`: what corrects the moments
    second,
    rest1,
    eps,
    detail_gain,
    coherent,
    GAIN: tl.constexpr,
    LEVEL: tl.constexpr,
):
    """What the weights lose, (BLOCK, U)."""
    read = n * first * GAIN
    r = x - (a * GAIN)[:, None]
    d = tl.sqrt_rn(r * r + (exp_avg_sq * second)[:, None]) + eps
    return tl.div_rn(r + read[:, None], d) * size
