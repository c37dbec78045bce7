"""Bytes of each rank, from shapes alone: before anything is allocated, and exactly.

`splits` has the arithmetic of the engines, `state` what a rank of a run is told, `plan` all ranks of a run that is not
there yet. `layout` turns fragments into moments as it does in a run. Nothing here needs torch.
"""

from gwt_dist.memory.state import GroupSpec, StateBytes, measure, plan_zero, specs

__all__ = ["GroupSpec", "StateBytes", "measure", "plan_zero", "specs"]
