"""Adam whose second moment is of the mean square of a unit, in Triton; imports triton."""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl

from gwt_dist.kernels.triton_math import unit_sum


@triton.jit
def second(x, a, count, BLOCK: tl.constexpr, LEVEL: tl.constexpr):
    """What the second moment takes of units x or their parts, as `unit_sum`, of `count` real elements: (BLOCK,)."""
    return tl.div_rn(unit_sum(x * x, BLOCK, LEVEL), count)
