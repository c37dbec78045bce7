"""No kernel reads past the end of a tensor: every tensor of a step is compared with what its plan says, before any is
changed. Weights and gradients are compared with the shapes of their parameters before, in `steps`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.piece import stored_dtype


def check(work: Work, tensors: Tensors) -> None:
    """Raise `ValueError` for the first tensor that is not as the plan of its parameter says."""
    names = {part.parameter: part.piece.fragment.fqn for part in reversed(work.parts)}  # the first of each
    for i, weight in enumerate(tensors.weights):
        its = names.get(i, "a parameter")
        gradient = tensors.gradients[i]
        if gradient.numel() != weight.numel():
            raise ValueError(
                f"a gradient of {gradient.numel()} elements for the {weight.numel()} that this rank holds of the "
                f"parameter of {its!r}: the step would use those of other elements. "
                f"It was not reduced; run the last backward pass before step() outside of no_sync()"
            )
        for name, tensor, numel, dtypes in _expected(i, weight, work, tensors):
            found = _misfit(tensor, numel, dtypes, weight.device)
            if found:
                raise ValueError(
                    f"{name} of {its} {found}; a step would read and write memory that is not its own. Nothing was "
                    f"changed. Put back what was there at the step before, or build a new optimizer"
                )


def _expected(
    i: int, weight: Tensor, work: Work, tensors: Tensors
) -> Iterator[tuple[str, Tensor, int, Sequence[torch.dtype]]]:
    """Of parameter `i`: what each tensor is called, the tensor, its number of elements, the dtypes that it may have."""
    yield "the weight", weight, weight.numel(), ()
    yield "the gradient", tensors.gradients[i], weight.numel(), ()
    yield "the step", tensors.steps[i], 1, (torch.float32,)
    for field in work.program.fields:
        name = field.name
        yield name, tensors.state[name][i], work.numels[name][i], (stored_dtype(field, weight.dtype),)


def _misfit(tensor: Tensor, numel: int, dtypes: Sequence[torch.dtype], device: torch.device) -> str:
    """How a tensor differs from what is expected; nothing if it does not. Without `dtypes` any floating one will do."""
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__} and no tensor"
    if tensor.layout != torch.strided or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__} of layout {tensor.layout} and no plain dense tensor"
    if tensor.numel() != numel:
        return f"has shape {tuple(tensor.shape)}, {tensor.numel()} elements, and needs {numel}"
    if tensor.dtype not in dtypes if dtypes else not tensor.is_floating_point():
        return f"is {tensor.dtype} and must be {' or '.join(map(str, dtypes)) or 'floating'}"
    if tensor.device != device:
        return f"is on {tensor.device} and the weight on {device}"
    return "" if tensor.is_contiguous() else f"has strides {tensor.stride()} and must be dense"
