"""One step over many fragments: `count` the steps, then `phase` by phase, or all phases at once, `step`.

`eager` is the reference, in torch operations, and takes every program; `cpu` (C++) and `triton` have the formulas and
details for which there is a file, on Haar units in fp32 and bf16, and are held equal to it. `choose` says which of them
a tensor gets; ``GWT_DIST_KERNEL`` forces one.
"""

from gwt_dist.kernels.choice import Kernel, choose
from gwt_dist.kernels.items import Cut, Item, Part, Place
from gwt_dist.kernels.work import Tensors, Work

__all__ = ["Cut", "Item", "Kernel", "Part", "Place", "Tensors", "Work", "choose"]
