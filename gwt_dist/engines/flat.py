"""What an adapter reads of a flat parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist.layout import Fragment


@dataclass(frozen=True, slots=True)
class FlatBuffer:
    """What an adapter reads of one flat parameter that an engine hands to the optimizer."""

    parameter: Tensor  # 1-D, the buffer itself; or one whole tensor in its own shape
    fragments: tuple[Fragment, ...]  # this rank's; padding belongs to none
    weights: tuple[Tensor, ...]  # per fragment, 1-D: the same elements as the model holds them
    group: ProcessGroup | None  # the ranks that hold the rest
    owners: tuple[Tensor, ...] = ()  # per fragment, the model's parameter, where the engine keeps it beside the buffer


def cut(tensors: Iterable[tuple[str, tuple[int, ...]]], low: int, high: int) -> tuple[Fragment, ...]:
    """The fragments of a rank that holds elements ``low..high`` of tensors laid one after the other.

    `tensors` are names and shapes. A tensor of which the rank holds nothing has an empty fragment, so that all ranks
    know the same tensors.
    """
    fragments, begin = [], 0
    for fqn, shape in tensors:
        start, stop = max(begin, low), min(begin + prod(shape), high)
        start, stop, offset = (start - begin, stop - begin, start - low) if start < stop else (0, 0, 0)
        fragments.append(Fragment(fqn, shape, start, stop, offset))
        begin += prod(shape)
    return tuple(fragments)
