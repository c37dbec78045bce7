"""The elements of a tensor in row-major order, wherever its strides put them in memory."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from gwt_dist.layout import Overlap


def flat(tensor: Tensor) -> Tensor:
    """One dimension of the same memory, where that is dense and in order; any other tensor as it is."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return tensor
    return tensor.as_strided((tensor.numel(),), (1,))  # a stride of a dimension of one element may be any


def is_flat(tensor: Tensor) -> bool:
    """Whether it is what `flat` makes of dense memory."""
    return tensor.dim() == 1 and tensor.stride() == (1,) and not tensor.is_conj() and not tensor.is_neg()


def copy(destination: Tensor, source: Tensor, overlap: Overlap) -> None:
    """Copy what `overlap` says, cast to the dtype of the destination; one of both is `is_flat`, the other what `flat`
    returned.
    """
    o = overlap
    if is_flat(destination) and is_flat(source):
        size = (o.rows, o.columns)
        to = destination.as_strided(size, (o.destination_stride, 1), destination.storage_offset() + o.destination)
        to.copy_(source.as_strided(size, (o.source_stride, 1), source.storage_offset() + o.source))
        return
    rows, columns = o.rows, o.columns
    if columns == o.source_stride == o.destination_stride:
        rows, columns = 1, rows * columns
    for row in range(rows):
        to_start, from_start = o.destination + row * o.destination_stride, o.source + row * o.source_stride
        if is_flat(source):
            for view in _views(destination, to_start, to_start + columns):
                view.copy_(source[from_start : from_start + view.numel()].view(view.shape))
                from_start += view.numel()
        else:
            for view in _views(source, from_start, from_start + columns):
                destination[to_start : to_start + view.numel()].view(view.shape).copy_(view)
                to_start += view.numel()


def _views(tensor: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Views of a tensor that hold its elements ``start..stop`` in order: whole slices, and parts of the outer two."""
    if start >= stop:
        return
    if tensor.dim() == 0:
        yield tensor
        return
    size = prod(tensor.shape[1:])
    first, last = -(-start // size), stop // size
    if first > last:  # within one slice
        yield from _views(tensor[last], start - last * size, stop - last * size)
        return
    if start < first * size:
        yield from _views(tensor[first - 1], start - (first - 1) * size, size)
    if first < last:
        yield tensor[first:last]
    yield from _views(tensor[last], 0, stop - last * size) if stop > last * size else ()


def are_distinct(tensor: Tensor) -> bool:
    """Whether no two elements share memory; False too where strides alone do not show it."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return tensor.numel() == 0
            reach += (size - 1) * stride
    return True


def put(tensor: Tensor, values: Tensor) -> None:
    """Write all elements of a tensor whose elements may share memory; of the same shape."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def can_take(tensor: Tensor, values: Tensor) -> bool:
    """Whether `put` would leave these very values: elements that share memory must have one value."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    trial = torch.empty(span, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())
    put(trial, values)
    return torch.equal(trial.contiguous().view(torch.uint8), values.to(trial.dtype).contiguous().view(torch.uint8))
