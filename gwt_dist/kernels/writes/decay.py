"""Decoupled weight decay in Triton: `decay` of gwt_dist/formulas/weights.py; imports triton."""

# Arguments are values of Triton's own compiler, which has no types for them.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it)


@triton.jit
def written(weight, change, decay_factor):
    """The new weight."""
    return (weight - change) * decay_factor
