"""Adam moments in wavelet space, sharded: the same update on one rank and on many.

optimizer = GWTAdamW(param_groups(model), lr=1e-3)
"""

import os.path as _path
import sys as _sys
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    # From the modules of the functions: who reads sources alone, as the API page does, takes `engines.attach` for one.
    from gwt_dist.activations import compress_activations
    from gwt_dist.checkpoint import CheckpointError, full_state, load, save
    from gwt_dist.description import describe
    from gwt_dist.engines.attach import attach
    from gwt_dist.engines.fuse import fuse_backward
    from gwt_dist.engines.initialize import initialize
    from gwt_dist.galore import GaLoreAdamW
    from gwt_dist.groups import param_groups
    from gwt_dist.layout import Fragment, LayoutError
    from gwt_dist.optimizer import GWTAdamW

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Fragment",
    "GWTAdamW",
    "GaLoreAdamW",
    "LayoutError",
    "attach",
    "compress_activations",
    "describe",
    "full_state",
    "fuse_backward",
    "initialize",
    "load",
    "param_groups",
    "save",
]
_HOMES = {
    "CheckpointError": "checkpoint",
    "Fragment": "layout",
    "GWTAdamW": "optimizer",
    "GaLoreAdamW": "galore",
    "LayoutError": "layout",
    "attach": "engines",
    "compress_activations": "activations",
    "describe": "description",
    "full_state": "checkpoint",
    "fuse_backward": "engines",
    "initialize": "engines",
    "load": "checkpoint",
    "param_groups": "groups",
    "save": "checkpoint",
}


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


# The command gwt-dist loads what each of its commands needs and nothing else: torch alone takes longer than a plan.
# Everywhere else all is loaded at once, so that DeepSpeed finds the type, which it looks for in torch.optim.
if _path.basename(_sys.argv[0] if getattr(_sys, "argv", None) else "") != "gwt-dist":
    import torch as _torch

    for _name in __all__:
        __getattr__(_name)
    _torch.optim.GWTAdamW = _import_module(f"{__name__}.engines.section").from_section  # type: ignore[attr-defined]
