"""A weight decays only where its change does not take it away from zero, in Triton; imports triton.

`cautious` of gwt_dist/formulas/weights.py.
"""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl


@triton.jit
def written(weight, change, decay_factor):
    """The new weight."""
    moved = weight - change
    return tl.where(weight * change >= 0, moved * decay_factor, moved)
