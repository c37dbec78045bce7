"""One step over many fragments: `count` the steps, then `moments` (phase A) and `write` (phase B), or both, `step`.

Three modules have these functions with one signature. `eager` is the reference, in torch operations, and takes
everything; `cpu` (C++) and `triton` take Haar units on fp32 and bf16 buffers and are held equal to it. `choose` says
which of them a parameter gets; ``GWT_DIST_KERNEL`` forces one.
"""

from gwt_dist.kernels.choice import Kernel, choose
from gwt_dist.kernels.limiter import limit_growth
from gwt_dist.kernels.piece import Piece, moments_shape
from gwt_dist.kernels.work import Cut, Part, Tensors, Work

__all__ = [
    "Cut",
    "Kernel",
    "Part",
    "Piece",
    "Tensors",
    "Work",
    "choose",
    "limit_growth",
    "moments_shape",
]
