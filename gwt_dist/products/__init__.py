"""Products of stacks of matrices that the Newton-Schulz iteration is made of: ``x x^T`` and ``b*g + c*g*g``.

`plain` is the reference, in torch operations. Shapes: n matrices of a stack, R rows, C columns.
"""

from gwt_dist.products.plain import gram, quadratic
from gwt_dist.products.stacks import dtype_of, stack_size

__all__ = ["dtype_of", "gram", "quadratic", "stack_size"]
