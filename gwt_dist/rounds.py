"""A phase that takes whole matrices to one rank each and back, round by round (`matrices`).

Every rank sends what the formula makes of its parts to the ranks that own the matrices; these do their work on the
whole matrix and send it back. One process is a world of 1, which sends to itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gwt_dist.comm import Peers, swap
from gwt_dist.declare import Rule, Travel
from gwt_dist.formulas import FORMULAS
from gwt_dist.kernels import Part, Tensors, Work, eager
from gwt_dist.layout import Fragment, Overlap
from gwt_dist.matrices import Matrix, Owned, Round, plan_rounds
from gwt_dist.plan import Plan
from gwt_dist.units import level_of


@dataclass(frozen=True, slots=True)
class Holder:
    """A parameter of which tensors travel, and what this rank holds of them."""

    plan: Plan
    parts: tuple[Part, ...]  # of the tensors that travel; none of those without a gradient, or frozen
    dtype: torch.dtype  # of its moments
    group: int  # number of its parameter group
    levels: frozenset[bool]  # whether tensors with level > 0 travel, the others, or both


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Matrices of one dtype that the same ranks hold."""

    peers: Peers
    dtype: torch.dtype
    rounds: tuple[Round, ...]
    holders: tuple[Holder, ...]  # of each matrix
    parts: tuple[tuple[Part, ...], ...]  # of each matrix, what this rank holds


class Rounds:
    """What a travelling phase of one step does, for as long as the same parameters have gradients."""

    def __init__(self, work: Work, phase: Travel, holders: Sequence[Holder], device: torch.device) -> None:
        self._work, self._phase, self._device = work, phase, device
        self._formula = FORMULAS[work.program.formula]
        by_peers: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[Holder, str, tuple[int, ...]]]] = {}
        for holder in holders:
            for tensor in holder.plan.shard.tensors:
                if bool(level_of(tensor.shape, holder.plan.form.level)) in holder.levels:
                    key = holder.plan.shard.peers.ranks, holder.dtype
                    by_peers.setdefault(key, []).append((holder, tensor.fqn, tensor.shape))
        self._buckets = [_bucket(found, dtype, len(phase.rows)) for (_, dtype), found in by_peers.items()]

    def run(
        self,
        tensors: Tensors,  # one of each for every holder that moves
        sums: list[Tensor],  # of the phases before
        rules: Sequence[Rule],  # one a group
    ) -> None:
        """Update state and weights."""
        for bucket in self._buckets:
            for its in bucket.rounds:
                self._run(bucket, its, tensors, sums, rules)

    def _run(self, bucket: _Bucket, its: Round, tensors: Tensors, sums: list[Tensor], rules: Sequence[Rule]) -> None:
        outgoing = torch.zeros(sum(its.sends), dtype=bucket.dtype, device=self._device)
        slots = [
            (bucket.parts[slot.matrix][slot.part], slot, outgoing.narrow(0, slot.start, slot.length))
            for slot in its.slots
            if bucket.parts[slot.matrix]  # else it sends zeros, and keeps nothing of what comes back
        ]
        for part, slot, elements in slots:
            share = eager.share(part, self._work, tensors, sums)
            u_NU = getattr(self._formula, self._phase.send)(share)
            for target, padded in part.piece.views(elements, u_NU.view(-1), 0):
                target.copy_(padded)
            for name, numbers in self._along(outgoing, slot.start + slot.length, slot.rows):
                numbers.copy_(share.state[name])
        received = swap(outgoing, its.sends, its.receives, bucket.peers)
        for owned in its.owned:
            self._work_on(owned, received, rules[bucket.holders[owned.matrix].group])
        outgoing.copy_(swap(received, its.receives, its.sends, bucket.peers))
        for part, slot, elements in slots:
            rule, fragment = tensors.rules[part.parameter], part.piece.fragment
            change = getattr(self._formula, self._phase.keep)(elements, fragment.shape, rule)
            weight = tensors.weights[part.parameter].view(-1).narrow(0, fragment.offset, fragment.numel)
            eager.take(weight, change, self._work.program.write, rule)
            for name, numbers in self._along(outgoing, slot.start + slot.length, slot.rows):
                place = part.piece.places[name]
                kept = tensors.state[name][part.parameter].view(-1)
                kept.narrow(0, place.offset, place.numel).copy_(numbers)

    def _work_on(self, owned: Owned, received: Tensor, rule: Rule) -> None:
        """Put a matrix together of `received`, work on it, and put it back there."""
        matrix = received.new_empty(owned.shape)
        rows = {name: received.new_empty(owned.shape[0]) for name in self._phase.rows}
        places = [(matrix, owned.overlaps), *zip(rows.values(), owned.along, strict=True)]
        for whole, overlaps in places:
            for overlap in overlaps:
                of_sender, of_matrix = _views(overlap, received, whole)
                of_matrix.copy_(of_sender)
        matrix = getattr(self._formula, self._phase.work)(matrix, rows, rule).contiguous()
        for whole, overlaps in [(matrix, owned.overlaps), *places[1:]]:
            for overlap in overlaps:
                of_sender, of_matrix = _views(overlap, received, whole)
                of_sender.copy_(of_matrix)

    def _along(self, buffer: Tensor, start: int, rows: int) -> list[tuple[str, Tensor]]:
        """The numbers of rows after the elements of a part, by field."""
        return [(name, buffer.narrow(0, start + i * rows, rows)) for i, name in enumerate(self._phase.rows)]


def _bucket(found: Sequence[tuple[Holder, str, tuple[int, ...]]], dtype: torch.dtype, along: int) -> _Bucket:
    peers = found[0][0].plan.shard.peers
    matrices = [Matrix(shape, partial(_held, holder.plan.shard.peers, fqn), along) for holder, fqn, shape in found]
    by_name: Mapping[int, dict[str, list[Part]]] = {id(holder): {} for holder, _, _ in found}
    for holder in {id(holder): holder for holder, _, _ in found}.values():
        for part in holder.parts:
            by_name[id(holder)].setdefault(part.piece.fragment.fqn, []).append(part)
    return _Bucket(
        peers,
        dtype,
        plan_rounds(matrices, peers.here, peers.world_size),
        tuple(holder for holder, _, _ in found),
        tuple(tuple(by_name[id(holder)].get(fqn, ())) for holder, fqn, _ in found),
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
