"""Parameters that are DTensors (FSDP2, HSDP, tensor parallelism): their layout is public and read at the first step.

mesh (dp=2, tp=2), placements (Shard(0), Shard(1))          rank (dp, tp) holds a rectangle: columns of some rows

    (0,0) | (0,1)        moments of aligned rectangles are DTensors of the same placements, which
    ------+------        torch.distributed.checkpoint reshards; where columns are cut within a unit they are plain
    (1,0) | (1,1)        local tensors, and `state_dict` refuses them
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from gwt_dist import exchange, stacks
from gwt_dist.comm import Peers, Shard
from gwt_dist.layout import Fragment, Units


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The part of a DTensor that this rank holds, first placed as `like` is; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.to_local()


def shard_of(parameter: DTensor, fqn: str, stacked: bool = False) -> Shard:
    """What this rank holds of a DTensor parameter; with `stacked`, one of three dimensions is its matrices.

    Raises `ValueError` for partial values, and for tensors cut along a dimension whose parts are no rectangles of
    ``[shape[0], rest]``, or of the matrices.
    """
    mesh, placements, shape = parameter.device_mesh, parameter.placements, tuple(parameter.shape)
    partial = [placement for placement in placements if placement.is_partial()]
    if partial:
        raise ValueError(f"{fqn} has the placement {partial[0]}; reduce it before the optimizer sees it")
    number = stacks.number_of(shape, fqn) if stacked else 0
    axes = _row_axes(parameter, number)
    fragments = _fragments(parameter, shape, fqn, axes, number)
    its = tuple(stacks.name_of(fqn, i) for i in range(number)) or (fqn,)
    # Cuts between rows cut no cell. Those within a row concern the ranks that hold the rest of these rows alone.
    cuts: dict[str, set[int]] = {name: set() for name in its}
    for fragment in (fragment for there in fragments.values() for fragment in there):
        cuts[fragment.fqn] |= {start for start, _ in fragment.intervals if start % max(1, fragment.columns)}
    return Shard(
        tensors=tuple(exchange.Whole(name, shape[1:] if number else shape, tuple(sorted(cuts[name]))) for name in its),
        fragments=fragments[tuple(_coordinate(parameter))],
        groups=tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate()),
        row_groups=tuple(mesh.get_group(i) for i in axes),
        peers=_peers(parameter, shape, fqn, number),
        local_shape=tuple(parameter.to_local().shape),
        stacks={name: (fqn, i, number) for i, name in enumerate(its)} if number else {},
    )


def of_some(values: Tensor, parameter: Tensor, shape: Sequence[int], ranks: Sequence[int]) -> Tensor:
    """`values`, which these `ranks` keep alike and whole, and others have nothing of, as a DTensor of these alone.

    torch.distributed.checkpoint then writes those of one of them, and reads them on whichever ranks have them there.
    Nothing is ever sent over the mesh, so it gets no process group.
    """
    if not isinstance(parameter, DTensor):
        return values
    mesh = DeviceMesh(parameter.device_mesh.device_type, list(ranks), _init_backend=False)
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(values, mesh, [Replicate()], run_check=False, shape=torch.Size(shape), stride=stride)


def is_of_some(values: object, parameter: Tensor) -> bool:
    """Whether these are what `of_some` makes for a parameter."""
    if not isinstance(values, DTensor) or not isinstance(parameter, DTensor):
        return False
    return values.device_mesh.size() < parameter.device_mesh.size()


def wrap(moments: Tensor, parameter: Tensor, shape: Sequence[int], units: Units, number: int = 0) -> Tensor:
    """`moments` as a DTensor of global `shape`, placed as `parameter` is, where that is what they are.

    They are not where ranks keep a cut unit twice; then they stay a local tensor. `number` of matrices, 0 of what is no
    stack.
    """
    if not isinstance(parameter, DTensor):
        return moments
    if tuple(shape) != tuple(parameter.shape) or units.cell > 1:
        axes = _row_axes(parameter, number)
        expected = _fragments(parameter, tuple(shape), "", axes, number)
        for coordinate, its in _fragments(parameter, tuple(parameter.shape), "", axes, number).items():
            for fragment, wanted in zip(its, expected[coordinate], strict=True):
                if units.moments(fragment).intervals != wanted.intervals:  # shapes may be written otherwise
                    return moments
    return _placed(moments, parameter, shape)


def wrap_stack(numbers: Tensor, parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """What is kept of each matrix of a stack as a whole, one after the other, as a DTensor of global `shape`.

    Where a matrix is cut it is not kept where its elements are; then they stay a local tensor.
    """
    if not isinstance(parameter, DTensor) or any(getattr(p, "dim", 0) for p in parameter.placements):
        return numbers
    return _placed(numbers, parameter, shape)


def _placed(tensor: Tensor, parameter: DTensor, shape: Sequence[int]) -> DTensor:
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _peers(parameter: DTensor, shape: tuple[int, ...], fqn: str, number: int) -> Peers:
    """The ranks that hold one copy of a tensor of `shape`: replicas have copies of their own."""
    mesh, here = parameter.device_mesh, _coordinate(parameter)
    axes = [i for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    ranks = mesh.mesh[tuple(slice(None) if i in axes else c for i, c in enumerate(here))].flatten().tolist()
    return Peers(
        ranks=tuple(ranks),
        here=ranks.index(int(mesh.mesh[tuple(here)])),
        group=mesh.get_group(axes[0]) if len(axes) == 1 else None,
        fragments=lambda i: _held(parameter, shape, _neighbour(parameter, axes, i), fqn, number),
    )


def _fragments(
    parameter: DTensor, shape: tuple[int, ...], fqn: str, axes: Sequence[int], number: int
) -> dict[tuple[int, ...], tuple[Fragment, ...]]:
    """By coordinate in the mesh: what this rank and its neighbours along `axes` hold of a tensor of `shape`."""
    places = range(prod(parameter.device_mesh.size(axis) for axis in axes))
    coordinates = [_neighbour(parameter, axes, place) for place in places]
    return {tuple(there): _held(parameter, shape, there, fqn, number) for there in coordinates}


def _neighbour(parameter: DTensor, axes: Sequence[int], place: int) -> list[int]:
    """The coordinate of number `place` of this rank and its neighbours along `axes`, the last axis counting fastest."""
    coordinate = _coordinate(parameter)
    for axis in reversed(axes):
        place, coordinate[axis] = divmod(place, parameter.device_mesh.size(axis))
    return coordinate


def _held(
    parameter: DTensor, shape: tuple[int, ...], coordinate: list[int], fqn: str, number: int
) -> tuple[Fragment, ...]:
    """What the rank at `coordinate` of the mesh holds: a rectangle, or one of each of `number` matrices."""
    part, offset = _part(shape, tuple(parameter.device_mesh.shape), tuple(coordinate), parameter.placements)
    if not number:
        if prod(part) and tuple(part[2:]) != shape[2:]:
            raise ValueError(
                f"{fqn} of shape {shape} is sharded along a dimension after the second ({parameter.placements}); its "
                f"parts are no rectangles of [shape[0], rest]. Shard dimension 0 or 1, or say stacked=True in its "
                f"parameter group if it is a stack of matrices"
            )
        return (_rectangle(fqn, shape, part, offset, 0),)
    size, first = prod(part[1:]), offset[0]
    return tuple(
        _rectangle(name, shape[1:], part[1:], offset[1:], (i - first) * size)
        if first <= i < first + part[0]
        else Fragment(name, shape[1:], 0, 0)
        for i, name in enumerate(stacks.name_of(fqn, i) for i in range(number))
    )


def _rectangle(fqn: str, shape: tuple[int, ...], part: Sequence[int], offset: Sequence[int], place: int) -> Fragment:
    """The `part` of a tensor that begins at `offset`, at `place` of the local buffer."""
    if prod(part) == 0:
        return Fragment(fqn, shape, 0, 0)
    if len(shape) < 2:
        return Fragment(fqn, shape, sum(offset), sum(offset) + prod(part), place)
    rest = prod(shape[2:])
    columns, width = shape[1] * rest, part[1] * rest
    start = offset[0] * columns + offset[1] * rest
    if width == columns:
        return Fragment(fqn, shape, start, start + part[0] * columns, place)
    return Fragment(fqn, shape, start, start + width, place, part[0])


@lru_cache(maxsize=1 << 16)
def _part(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of a rank's part; a vector asks for those of all ranks, and most vectors are of one shape."""
    return _compute_local_shape_and_global_offset(shape, mesh_shape, list(coordinate), placements)


def _row_axes(parameter: DTensor, number: int = 0) -> list[int]:
    """Mesh axes whose ranks hold parts of one row: a dimension after the first is sharded, or that of a vector.

    Of a stack of `number` matrices, the last dimension.
    """
    # _StridedShard (rows under FSDP and tensor parallelism both) does not say of itself that it is a Shard.
    first = 2 if number else 0 if parameter.dim() == 1 else 1
    return [i for i, p in enumerate(parameter.placements) if not p.is_replicate() and getattr(p, "dim", 0) >= first]


def _coordinate(parameter: DTensor) -> list[int]:
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds no such parameter"
    return list(coordinate)
