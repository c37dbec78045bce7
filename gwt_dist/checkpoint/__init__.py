"""State that survives: checkpoints that any engine on any number of ranks can load, and that notice damage.

See docs/checkpoints.md for the format.
"""

from gwt_dist.checkpoint.folder import NoCheckpoint, checkpoints, find, locate, read_index
from gwt_dist.checkpoint.format import CheckpointError, Index
from gwt_dist.checkpoint.match import Left
from gwt_dist.checkpoint.read import Loaded, load
from gwt_dist.checkpoint.whole import full_state
from gwt_dist.checkpoint.write import save

__all__ = [
    "CheckpointError",
    "Index",
    "Left",
    "Loaded",
    "NoCheckpoint",
    "checkpoints",
    "find",
    "full_state",
    "load",
    "locate",
    "read_index",
    "save",
]
