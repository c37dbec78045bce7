"""The two phases of a step over many fragments: `moments` (phase A) and `write` (phase B).

The optimizer calls these names and knows no implementation. `eager` is the reference, in torch operations.
"""

from gwt_dist.kernels.eager import moments, write
from gwt_dist.kernels.job import Job, Piece, level_of, moments_shape, units_of

__all__ = ["Job", "Piece", "level_of", "moments", "moments_shape", "units_of", "write"]
