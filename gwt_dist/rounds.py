"""Matrices whose momentum is orthogonalized, in one step of a schedule: norms, then round by round there and back.

The schedule sums the norms of all matrices over ranks. Then, for each round (`matrices`), every rank sends the updates
of its parts to the ranks that own the matrices, which orthogonalize them and send them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gwt_dist.comm import Peers, swap
from gwt_dist.kernels import Part, Tensors, orthogonal
from gwt_dist.layout import Fragment, Overlap
from gwt_dist.matrices import Matrix, Round, plan_rounds
from gwt_dist.orthogonal import newton_schulz
from gwt_dist.plan import Plan
from gwt_dist.units import level_of

NORMS = orthogonal.NORMS


@dataclass(frozen=True, slots=True)
class Holder:
    """A parameter of which tensors are orthogonalized, and what this rank holds of them."""

    plan: Plan
    parts: tuple[Part, ...]  # of tensors with level > 0; none without a gradient
    moves: bool  # it has a gradient; without one it sends zeros and keeps nothing of what comes back
    dtype: torch.dtype  # of its moments


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Matrices of one dtype that the same ranks hold."""

    peers: Peers
    dtype: torch.dtype
    rounds: tuple[Round, ...]
    parts: tuple[tuple[Part, ...], ...]  # of each matrix, what this rank holds
    moves: tuple[bool, ...]  # of each matrix


class Rounds:
    """What one step does to these matrices, for as long as the same parameters have gradients."""

    def __init__(self, holders: Sequence[Holder], device: torch.device) -> None:
        self._device = device
        self._parts = [part for holder in holders for part in holder.parts]
        by_peers: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[Holder, str, tuple[int, ...]]]] = {}
        for holder in holders:
            for tensor in holder.plan.shard.tensors:
                if level_of(tensor.shape, holder.plan.level):
                    key = holder.plan.shard.peers.ranks, holder.dtype
                    by_peers.setdefault(key, []).append((holder, tensor.fqn, tensor.shape))
        self._buckets = [_bucket(found, dtype) for (_, dtype), found in by_peers.items()]

    def add_norms(self, tensors: Tensors, squared_norms: Tensor) -> None:
        """Add what this rank owns to `squared_norms`, fp64; `tensors` has one of each for every holder that moves."""
        for part in self._parts:
            orthogonal.add_norms(part, tensors, squared_norms)

    def run(self, tensors: Tensors, squared_norms: Tensor) -> None:
        """Update moments and weights; `squared_norms` are summed over ranks."""
        for bucket in self._buckets:
            for its in bucket.rounds:
                self._run(bucket, its, tensors, squared_norms)

    def _run(self, bucket: _Bucket, its: Round, tensors: Tensors, squared_norms: Tensor) -> None:
        outgoing = torch.zeros(sum(its.sends), dtype=bucket.dtype, device=self._device)
        slots = [
            (bucket.parts[slot.matrix][slot.part], outgoing.narrow(0, slot.start, slot.length))
            for slot in its.slots
            if bucket.moves[slot.matrix]
        ]
        for part, updates in slots:
            orthogonal.update_momentum(part, tensors, squared_norms, updates)
        received = swap(outgoing, its.sends, its.receives, bucket.peers)
        for owned in its.owned:
            matrix = received.new_empty(owned.shape)
            for overlap in owned.overlaps:
                of_sender, of_matrix = _views(overlap, received, matrix)
                of_matrix.copy_(of_sender)
            matrix = newton_schulz(matrix).contiguous()
            for overlap in owned.overlaps:
                of_sender, of_matrix = _views(overlap, received, matrix)
                of_sender.copy_(of_matrix)
        outgoing.copy_(swap(received, its.receives, its.sends, bucket.peers))
        for part, updates in slots:
            orthogonal.write(part, tensors, updates)


def _bucket(found: Sequence[tuple[Holder, str, tuple[int, ...]]], dtype: torch.dtype) -> _Bucket:
    peers = found[0][0].plan.shard.peers
    matrices = [Matrix(shape, partial(_held, holder.plan.shard.peers, fqn)) for holder, fqn, shape in found]
    return _Bucket(
        peers,
        dtype,
        plan_rounds(matrices, peers.here, peers.world_size),
        tuple(tuple(part for part in holder.parts if part.piece.fragment.fqn == fqn) for holder, fqn, _ in found),
        tuple(holder.moves for holder, _, _ in found),
    )


def _held(peers: Peers, fqn: str, place: int) -> list[Fragment]:
    return [fragment for fragment in peers.fragments(place) if fragment.fqn == fqn and fragment.numel]


def _views(overlap: Overlap, sent: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of an overlap in what was sent and in the matrix, (rows, columns) each."""
    size = overlap.rows, overlap.columns
    return (
        sent.as_strided(size, (overlap.source_stride, 1), overlap.source),
        matrix.as_strided(size, (overlap.destination_stride, 1), overlap.destination),
    )
