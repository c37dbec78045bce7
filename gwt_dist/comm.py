"""Sums over the ranks of process groups, and what a rank holds of an optimizer parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist import exchange, stacks
from gwt_dist.layout import Fragment


@dataclass(frozen=True, slots=True)
class Peers:
    """The ranks that hold all of the tensors of an optimizer parameter between them, this one included."""

    ranks: tuple[int, ...]  # their ranks in the whole world, in an order that is the same on all of them
    here: int  # the place of this one
    group: ProcessGroup | None  # through which they send; None: there is none of these ranks alone, see `connected`
    fragments: Callable[[int], Sequence[Fragment]]  # of a place: the fragments there, empty ones or not

    @property
    def world_size(self) -> int:
        """Their number."""
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class Shard:
    """What this rank holds of the tensors that one optimizer parameter stands for.

    A parameter that one process holds whole is one fragment, and it has no groups. A flat partition of an engine is as
    many fragments as it has pieces of tensors.
    """

    # As all ranks hold them. The same on each, but for a DTensor whose columns are cut: there the cuts are those of the
    # rows that this rank holds a part of.
    tensors: tuple[exchange.Whole, ...]
    fragments: tuple[Fragment, ...]  # this rank's, in its local buffer
    groups: tuple[ProcessGroup, ...]  # summing over one after the other takes in all ranks; none: a world of 1
    row_groups: tuple[ProcessGroup, ...]  # the same for the ranks that hold the rest of this one's cut units
    peers: Peers
    # Shape of the local part, where it is that of one tensor, or of one stack of matrices.
    local_shape: tuple[int, ...] | None = None
    # The model's parameters, one a tensor, where an engine steps on other tensors in their place; else none.
    owners: tuple[Tensor, ...] = field(default=(), compare=False)
    # Of each tensor that is a matrix of a stack: the stack's name, the place in it and the number of its matrices.
    stacks: Mapping[str, tuple[str, int, int]] = field(default_factory=dict, compare=False)

    @classmethod
    def whole(cls, fqn: str, shape: tuple[int, ...]) -> Shard:
        """A tensor that this process holds whole, in its own shape."""
        fragments = (Fragment(fqn, shape, 0, prod(shape)),)
        return cls((exchange.Whole(fqn, shape, ()),), fragments, (), (), alone(fragments), shape)

    @property
    def is_stack(self) -> bool:
        """Whether the parameter is one stack of matrices, in its own shape."""
        return self.local_shape is not None and bool(self.stacks)

    def source(self, fqn: str) -> tuple[str, int, int]:
        """Of one of its tensors: the name that the model has, its place under it, and how many there are."""
        return self.stacks.get(fqn, (fqn, 0, 1))

    def unstacked(self) -> Shard:
        """The same with a tensor for each matrix of each tensor of three dimensions.

        Raises `LayoutError` for tensors of more.
        """
        tensors: list[exchange.Whole] = []
        owners: list[Tensor] = []
        found: dict[str, tuple[str, int, int]] = {}
        for number, tensor in enumerate(self.tensors):
            its = stacks.matrices(tensor)
            tensors += its
            owners += [self.owners[number]] * len(its) if self.owners else []
            if its[0] is not tensor:
                found |= {one.fqn: (tensor.fqn, place, len(its)) for place, one in enumerate(its)}
        if not found:
            return self

        def of(fragments: Sequence[Fragment]) -> tuple[Fragment, ...]:
            return tuple(part for fragment in fragments for part in stacks.parts(fragment))

        held = self.peers.fragments
        return replace(
            self,
            tensors=tuple(tensors),
            fragments=of(self.fragments),
            peers=replace(self.peers, fragments=lambda place: of(held(place))),
            owners=tuple(owners),
            stacks=found,
        )


def alone(fragments: Sequence[Fragment]) -> Peers:
    """A world of 1, which holds `fragments`."""
    return Peers((0,), 0, None, lambda _: fragments)


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


# Groups by the ranks that they were made for, of each world.
_groups: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()


def connected(peers: Peers, device: torch.device) -> Peers:
    """`peers` with a group of their own, which is made the first time that all of them ask.

    The first call of a group over NCCL connects all its ranks, so it must not be a message that concerns some of them:
    the others would be waited for. Groups of engines and meshes have summed before anything travels; a tensor that is
    cut along several axes of a mesh has no group, and its new one begins with a sum.
    """
    if peers.group is not None or peers.world_size == 1:
        return peers
    world = dist.group.WORLD
    assert world is not None, "there are other ranks"
    made = _groups.setdefault(world, {})
    if peers.ranks not in made:
        # Ranks outside do not take part: they may have no such tensor.
        group = dist.new_group(list(peers.ranks), use_local_synchronization=True)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # not one of a step's
        made[peers.ranks] = group
    return replace(peers, group=made[peers.ranks])


Kinds = Sequence[Sequence[Tensor]]  # of each kind of message, a buffer for each peer


def begin(outgoing: Kinds, incoming: Kinds, peers: Peers) -> Callable[[], None]:
    """Start to send, of each kind, ``outgoing[kind][i]`` to peer i and to fill ``incoming[kind][i]`` with what it has.

    Returns what waits until all of it is there; until then nothing of it may be written. One message from one rank to
    another for each kind at most, none if it would be empty; to itself a rank copies. All peers pass the same kinds
    with the same lengths, in the same order of calls.
    """
    for sent, received in zip(outgoing, incoming, strict=True):
        received[peers.here].copy_(sent[peers.here])
    if peers.world_size == 1:
        return _nothing
    return post(outgoing, incoming, peers)


def _nothing() -> None:
    pass


def post(outgoing: Kinds, incoming: Kinds, peers: Peers) -> Callable[[], None]:
    """As `begin`, to and from the other peers alone."""
    staged = any(needs_host(buffer.device, peers) for kind in outgoing for buffer in kind)
    if staged:
        outgoing = [[buffer.cpu() for buffer in kind] for kind in outgoing]
    there = [[torch.empty_like(buffer, device="cpu") for buffer in kind] for kind in incoming] if staged else incoming
    messages = [
        dist.P2POp(operation, buffer, rank, peers.group)
        for operation, kinds in ((dist.isend, outgoing), (dist.irecv, there))
        for kind in kinds
        for i, (buffer, rank) in enumerate(zip(kind, peers.ranks, strict=True))
        if i != peers.here and buffer.numel()
    ]
    requests = dist.batch_isend_irecv(messages) if messages else []

    def wait() -> None:
        for request in requests:
            request.wait()
        if staged:
            for kind, its in zip(incoming, there, strict=True):
                for i, (buffer, arrived) in enumerate(zip(kind, its, strict=True)):
                    if i != peers.here:
                        buffer.copy_(arrived)

    return wait


def needs_host(device: torch.device, peers: Peers) -> bool:
    """Whether messages between `peers` go through the memory of the host: gloo sends none from that of a GPU."""
    if device.type == "cpu" or peers.world_size == 1:
        return False
    # "cuda:nccl,cpu:gloo"
    backends = dict(pair.split(":") for pair in dist.get_backend_config(peers.group).split(",") if ":" in pair)
    return backends.get(device.type) == "gloo"
