"""Adam moments in wavelet space, sharded: the same update on one rank and on many.

optimizer = GWTAdamW(param_groups(model, level=2), lr=1e-2)
"""

import torch as _torch

from gwt_dist.checkpoint import CheckpointError, load, save
from gwt_dist.engines import attach, fuse_backward, initialize
from gwt_dist.groups import param_groups
from gwt_dist.layout import Fragment, LayoutError
from gwt_dist.optimizer import GWTAdamW

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Fragment",
    "GWTAdamW",
    "LayoutError",
    "attach",
    "fuse_backward",
    "initialize",
    "load",
    "param_groups",
    "save",
]

# DeepSpeed looks for an optimizer type that it does not know in torch.optim.
_torch.optim.GWTAdamW = GWTAdamW  # type: ignore[attr-defined]
