"""The phases of parts whose momentum is orthogonalized, in torch operations; the iteration between them takes the time.

Norms of the whole matrix, then momentum and ``U``, then the write of what the iteration made of ``U``. See
`gwt_dist.orthogonal` for the formulas; `rounds` runs these.
"""

from __future__ import annotations

from torch import Tensor

from gwt_dist import orthogonal, update
from gwt_dist.kernels.eager import blocks, gather
from gwt_dist.kernels.work import Part, Tensors

NORMS = 2  # places of a matrix in the vector of squared norms


def add_norms(part: Part, tensors: Tensors, squared_norms: Tensor) -> None:
    """Add ``||m||**2`` and ``||a||**2`` of the coefficients that this rank owns, at the place of the norm and after it.

    `squared_norms` is fp64; the moments are those before the step.
    """
    piece = part.piece
    rows, (low, high) = piece.moments.rows, piece.owned
    approximation = piece.transform.approximation(gather(part, tensors))
    for place, coefficients in enumerate((_momentum(part, tensors), approximation)):
        owned = coefficients.view(rows, -1)[:, low:high].double()
        squared_norms[part.norm + place] += owned.square().sum()


def update_momentum(
    part: Part,
    tensors: Tensors,
    squared_norms: Tensor,  # fp64, of whole matrices
    updates: Tensor,  # (elements of the part,) written: its elements of U
) -> None:
    """Update the momentum in place."""
    piece, rule, step = part.piece, tensors.rules[part.parameter], tensors.steps[part.parameter]
    norm_m, norm_a = squared_norms[part.norm : part.norm + NORMS].unbind()
    gain = orthogonal.detail_gain(norm_m, norm_a, step, rule)
    x_NU, exp_avg = gather(part, tensors), _momentum(part, tensors)
    u_NU = orthogonal.update_momentum(x_NU, exp_avg, gain, step, piece.transform, rule)
    for target, padded in blocks(piece, updates, u_NU.view(-1), 0):
        target.copy_(padded)


def write(
    part: Part,
    tensors: Tensors,
    updates: Tensor,  # (elements of the part,) its elements of O
) -> None:
    """Write the weight in place."""
    fragment, rule = part.piece.fragment, tensors.rules[part.parameter]
    weight = tensors.weights[part.parameter].view(-1).narrow(0, fragment.offset, fragment.numel)
    w = weight.to(updates.dtype)
    w -= updates * orthogonal.step_size(fragment.shape, rule)
    w *= update.decay_factor(rule, updates)
    if w is not weight:
        weight.copy_(w)


def _momentum(part: Part, tensors: Tensors) -> Tensor:
    moments = part.piece.moments
    return tensors.exp_avg[part.parameter].view(-1).narrow(0, moments.offset, moments.numel)
