"""Sums over the ranks of process groups, and what a rank holds of an optimizer parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist import layout
from gwt_dist.layout import Fragment


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of the tensors that one optimizer parameter stands for.

    A parameter that one process holds whole is one fragment, and it has no groups. A flat partition of an engine is as
    many fragments as it has pieces of tensors.
    """

    tensors: tuple[layout.Tensor, ...]  # as all ranks hold them, the same tuple on each rank
    fragments: tuple[Fragment, ...]  # this rank's, in its local buffer
    groups: tuple[ProcessGroup, ...]  # summing over one after the other takes in all ranks; none: a world of 1
    row_groups: tuple[ProcessGroup, ...]  # the same for the ranks that hold the rest of this one's cut units
    local_shape: tuple[int, ...] | None = None  # shape of the local part, where it is that of one tensor

    @classmethod
    def whole(cls, fqn: str, shape: tuple[int, ...]) -> Shard:
        """A tensor that this process holds whole, in its own shape."""
        return cls((layout.Tensor(fqn, shape, ()),), (Fragment(fqn, shape, 0, prod(shape)),), (), (), shape)


def sum_over_ranks(buffer: Tensor, lengths: Sequence[int], groups: Sequence[tuple[ProcessGroup, ...]]) -> None:
    """Add up a 1-D buffer over ranks in place, its parts over different groups: one collective for each group at most.

    Part i is the next ``lengths[i]`` elements and is summed over each of ``groups[i]``, one after the other; a part
    without groups (a world of 1) is left alone. All ranks of a group pass the same lengths in the same order, and the
    sums have the same bits on all of them.
    """
    segments: dict[ProcessGroup, list[list[int]]] = {}  # start and stop, neighbours joined
    start = 0
    for length, part_groups in zip(lengths, groups, strict=True):
        for group in part_groups if length else ():
            segments_of_group = segments.setdefault(group, [])
            if segments_of_group and segments_of_group[-1][1] == start:
                segments_of_group[-1][1] = start + length
            else:
                segments_of_group.append([start, start + length])
        start += length
    for group, parts in segments.items():
        views = [buffer[start:stop] for start, stop in parts]
        together = views[0] if len(views) == 1 else torch.cat(views)
        all_reduce(together, group)
        if len(views) > 1:
            torch._foreach_copy_(views, list(together.split([view.numel() for view in views])))


def all_reduce(buffer: Tensor, group: ProcessGroup) -> None:
    """The sum of `buffer` over the ranks of `group`, in place."""
    dist.all_reduce(buffer, group=group)
