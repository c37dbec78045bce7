"""Momentum that travels to be orthogonalized and evened out by rows, in Triton: on units and elements `orthogonal`."""

from gwt_dist.kernels.formulas.orthogonal import detail_gain, lost, momentum, sent

__all__ = ["detail_gain", "lost", "momentum", "sent"]
