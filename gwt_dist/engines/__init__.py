"""Adapters to sharding engines: each reads where the elements of the weights lie and returns plain data."""

from gwt_dist.engines.attach import attach
from gwt_dist.engines.fuse import fuse_backward
from gwt_dist.engines.initialize import initialize

__all__ = ["attach", "fuse_backward", "initialize"]
