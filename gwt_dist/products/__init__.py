"""Products of stacks of matrices that the Newton-Schulz iteration is made of: ``x x^T`` and ``b*g + c*g*g``.

`plain` is the reference, in torch operations; `symmetric` computes half of each product, on a GPU in bf16. `choose`
says which of them a stack gets; ``GWT_DIST_SYMMETRIC`` forces one. Shapes: n matrices of a stack, R rows, C columns.
All sizes are right, but stacks should be dense with R and C multiples of 16, zeros added: a GPU loads whole vectors
then (the kernel single elements otherwise), and all matrices begin alike, on which the order of MKL's sums depends.
"""

from torch import Tensor

from gwt_dist.products.choice import choose
from gwt_dist.products.stacks import aligned, dtype_of, stack_size

__all__ = ["aligned", "dtype_of", "gram", "quadratic", "stack_size"]


def gram(x_nRC: Tensor) -> Tensor:
    """As `plain.gram`."""
    return choose(x_nRC.device, x_nRC.dtype, x_nRC.shape[1]).gram(x_nRC)


def quadratic(g_nRR: Tensor, b: float, c: float) -> Tensor:
    """As `plain.quadratic`."""
    return choose(g_nRR.device, g_nRR.dtype, g_nRR.shape[1]).quadratic(g_nRR, b, c)
