"""The pre-training recipe: `start` is the command, `main` the same as a function, beside them their parts."""

from gwt_dist.train.command import main, start

__all__ = ["main", "start"]
