"""Sums over the ranks of a process group, and what a rank holds of an optimizer parameter."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist import layout
from gwt_dist.layout import Fragment


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of the tensors that one optimizer parameter stands for.

    A parameter that one process holds whole is one fragment, and its group is None. A flat partition of an engine is
    as many fragments as it has pieces of tensors.
    """

    tensors: tuple[layout.Tensor, ...]  # as all ranks of the group hold them, the same tuple on each rank
    fragments: tuple[Fragment, ...]  # this rank's, in its local buffer
    group: ProcessGroup | None  # None: a world of 1
    is_whole: bool = False  # the parameter has the shape of its one tensor

    @classmethod
    def whole(cls, fqn: str, shape: tuple[int, ...]) -> Shard:
        """A tensor that this process holds whole, in its own shape."""
        return cls((layout.Tensor(fqn, shape, ()),), (Fragment(fqn, shape, 0, prod(shape)),), None, True)


def sum_over_ranks(buffer: Tensor, group: ProcessGroup | None) -> None:
    """Add up `buffer` over the ranks of `group` in place; nothing to do in a world of 1.

    The result has the same bits on every rank.
    """
    if group is not None and buffer.numel():
        dist.all_reduce(buffer, group=group)
