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

from gwt_dist import exchange, layout
from gwt_dist.comm import Peers, Shard
from gwt_dist.layout import Fragment, Units


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The part of a DTensor that this rank holds, first placed as `like` is; any other tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if isinstance(like, DTensor) and tensor.placements != like.placements:
        tensor = tensor.redistribute(like.device_mesh, like.placements)
    return tensor.to_local()


def shard_of(parameter: DTensor, fqn: str) -> Shard:
    """What this rank holds of a DTensor parameter.

    Raises `ValueError` for partial values, and for tensors cut along a dimension whose parts are no rectangles of
    ``[shape[0], rest]``.
    """
    mesh, placements, shape = parameter.device_mesh, parameter.placements, tuple(parameter.shape)
    partial = [placement for placement in placements if placement.is_partial()]
    if partial:
        raise ValueError(f"{fqn} has the placement {partial[0]}; reduce it before the optimizer sees it")
    axes = _row_axes(parameter)
    fragments = _fragments(parameter, shape, fqn, axes)
    columns = layout.columns_of(shape)
    # Cuts between rows cut no cell. Those within a row concern the ranks that hold the rest of these rows alone.
    cuts = {start for fragment in fragments.values() for start, _ in fragment.intervals if start % max(1, columns)}
    mine = fragments[tuple(_coordinate(parameter))]
    return Shard(
        tensors=(exchange.Whole(fqn, shape, tuple(sorted(cuts))),),
        fragments=(mine,),
        groups=tuple(mesh.get_group(i) for i, p in enumerate(placements) if not p.is_replicate()),
        row_groups=tuple(mesh.get_group(i) for i in axes),
        peers=_peers(parameter, shape, fqn),
        local_shape=tuple(parameter.to_local().shape),
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


def wrap(moments: Tensor, parameter: Tensor, shape: Sequence[int], units: Units) -> Tensor:
    """`moments` as a DTensor of global `shape`, placed as `parameter` is, where that is what they are.

    They are not where ranks keep a cut unit twice; then they stay a local tensor.
    """
    if not isinstance(parameter, DTensor):
        return moments
    if tuple(shape) != tuple(parameter.shape) or units.cell > 1:
        axes = _row_axes(parameter)
        expected = _fragments(parameter, tuple(shape), "", axes)
        for coordinate, fragment in _fragments(parameter, tuple(parameter.shape), "", axes).items():
            if units.moments(fragment).intervals != expected[coordinate].intervals:  # shapes may be written otherwise
                return moments
    stride = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        moments, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _peers(parameter: DTensor, shape: tuple[int, ...], fqn: str) -> Peers:
    """The ranks that hold one copy of a tensor of `shape`: replicas have copies of their own."""
    mesh, here = parameter.device_mesh, _coordinate(parameter)
    axes = [i for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    ranks = mesh.mesh[tuple(slice(None) if i in axes else c for i, c in enumerate(here))].flatten().tolist()
    return Peers(
        ranks=tuple(ranks),
        here=ranks.index(int(mesh.mesh[tuple(here)])),
        group=mesh.get_group(axes[0]) if len(axes) == 1 else None,
        fragments=lambda i: (_fragment(parameter, shape, _neighbour(parameter, axes, i), fqn),),
    )


def _fragments(
    parameter: DTensor, shape: tuple[int, ...], fqn: str, axes: Sequence[int]
) -> dict[tuple[int, ...], Fragment]:
    """By coordinate in the mesh: what this rank and its neighbours along `axes` hold of a tensor of `shape`."""
    places = range(prod(parameter.device_mesh.size(axis) for axis in axes))
    coordinates = [_neighbour(parameter, axes, place) for place in places]
    return {tuple(there): _fragment(parameter, shape, there, fqn) for there in coordinates}


def _neighbour(parameter: DTensor, axes: Sequence[int], place: int) -> list[int]:
    """The coordinate of number `place` of this rank and its neighbours along `axes`, the last axis counting fastest."""
    coordinate = _coordinate(parameter)
    for axis in reversed(axes):
        place, coordinate[axis] = divmod(place, parameter.device_mesh.size(axis))
    return coordinate


def _fragment(parameter: DTensor, shape: tuple[int, ...], coordinate: list[int], fqn: str) -> Fragment:
    """The rectangle of the rank at `coordinate` of the mesh."""
    part, offset = _part(shape, tuple(parameter.device_mesh.shape), tuple(coordinate), parameter.placements)
    if prod(part) == 0:
        return Fragment(fqn, shape, 0, 0)
    if len(shape) < 2:
        return Fragment(fqn, shape, sum(offset), sum(offset) + prod(part))
    if tuple(part[2:]) != shape[2:]:
        raise ValueError(
            f"{fqn} of shape {shape} is sharded along a dimension after the second ({parameter.placements}); its parts "
            f"are no rectangles of [shape[0], rest]. Shard dimension 0 or 1"
        )
    rest = prod(shape[2:])
    columns, width = shape[1] * rest, part[1] * rest
    start = offset[0] * columns + offset[1] * rest
    if width == columns:
        return Fragment(fqn, shape, start, start + part[0] * columns)
    return Fragment(fqn, shape, start, start + width, 0, part[0])


@lru_cache(maxsize=1 << 16)
def _part(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], coordinate: tuple[int, ...], placements: tuple[Placement, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of a rank's part; a vector asks for those of all ranks, and most vectors are of one shape."""
    return _compute_local_shape_and_global_offset(shape, mesh_shape, list(coordinate), placements)


def _row_axes(parameter: DTensor) -> list[int]:
    """Mesh axes whose ranks hold parts of one row: a dimension after the first is sharded, or that of a vector."""
    # _StridedShard (rows under FSDP and tensor parallelism both) does not say of itself that it is a Shard.
    first = 0 if parameter.dim() == 1 else 1
    return [i for i, p in enumerate(parameter.placements) if not p.is_replicate() and getattr(p, "dim", 0) >= first]


def _coordinate(parameter: DTensor) -> list[int]:
    coordinate = parameter.device_mesh.get_coordinate()
    assert coordinate is not None, "a rank outside the mesh holds no such parameter"
    return list(coordinate)
