"""Adam whose second moment is of the square of the approximation, in Triton; imports triton."""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def second(x, a, count, BLOCK: tl.constexpr, LEVEL: tl.constexpr):
    """What the second moment takes of units whose approximation is a: (BLOCK,)."""
    return a * a
