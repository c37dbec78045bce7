"""What a backward pass needs of a forward pass, in fewer bits."""

from gwt_dist.activations.compress import Compression, compress_activations

__all__ = ["Compression", "compress_activations"]
