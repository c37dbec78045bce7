"""Bytes that an optimizer holds: every tensor that can be reached from it, weights and gradients apart."""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What leads away from the optimizer, or holds no tensors.
_PASSED_BY = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    nn.Module,
    nn.Parameter,
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
    torch.device,
    torch.Generator,
)
_REFERENCES = (weakref.ref, weakref.ProxyType)


def bytes_held(roots: Iterable[Any], weights: Iterable[Tensor]) -> int:
    """Bytes of all tensors that can be reached from `roots`; of those in one storage no more than it has.

    A view counts with its own elements: GaLore's projections are views of a whole decomposition, of which the method
    needs a quarter, and an optimizer is not charged with what its package keeps alive by accident.
    Dictionaries, lists, attributes and slots are followed, so a projection inside an object of its own counts, and so
    do the parts of a tensor subclass (8-bit values, their scales and tables). `weights` and their gradients do not.
    """
    known = set()
    for weight in weights:
        known.add(weight.untyped_storage().data_ptr())
        if weight.grad is not None:
            known.add(weight.grad.untyped_storage().data_ptr())
    views: dict[int, dict[tuple[Any, ...], int]] = {}
    sizes: dict[int, int] = {}
    for tensor in tensors_in(roots):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            views.setdefault(storage.data_ptr(), {})[place] = tensor.numel() * tensor.element_size()
    return sum(min(sizes[storage], sum(places.values())) for storage, places in views.items())


def tensors_in(roots: Iterable[Any]) -> Iterator[Tensor]:
    """The plain tensors that can be reached from `roots`; subclasses are taken apart."""
    seen: set[int] = set()
    todo: list[Any] = list(roots)
    alive = []  # an id is known again only as long as its object is there
    while todo:
        found = todo.pop()
        if found is None or id(found) in seen or isinstance(found, (*_PASSED_BY, *_REFERENCES)):
            continue
        seen.add(id(found))
        alive.append(found)
        if isinstance(found, Tensor):
            if hasattr(found, "__tensor_flatten__"):
                todo += [getattr(found, name) for name in found.__tensor_flatten__()[0]]
            else:
                yield found
        elif isinstance(found, Mapping):
            todo += found.values()
        elif isinstance(found, (list, tuple, set, frozenset)):
            todo += found
        else:
            if isinstance(found, types.MethodType):
                continue
            todo += getattr(found, "__dict__", {}).values()
            for kind in type(found).__mro__:
                slots = kind.__dict__.get("__slots__", ())
                todo += [getattr(found, slot, None) for slot in ([slots] if isinstance(slots, str) else slots)]
