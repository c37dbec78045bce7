"""One step of many parameters: what is fixed about it (`Schedule`), and the collectives and kernels that it runs.

Parameters without a limiter are updated in one pass. Those with one need the norm of the whole tensor between the
moments and the write: one batch for all that share ranks, so that one collective serves them, and batches that fit in a
processor's cache for those that this process holds whole, so that the second pass finds their gradients there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gwt_dist import dtensor, update
from gwt_dist.comm import sum_over_ranks
from gwt_dist.kernels import Cut, Kernel, Part, Tensors, Work, choose
from gwt_dist.plan import Plan
from gwt_dist.update import Rule

CACHE = 1 << 21  # elements of a batch of whole tensors on a CPU: 8 MiB of fp32 gradients


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of a step."""

    plan: Plan
    group: int  # number of its parameter group
    dtype: torch.dtype
    moves: bool  # it has a gradient; without one it takes part in collectives alone
    limited: bool  # its group has a limiter

    @property
    def norms(self) -> int:
        """Places in the vector of squared norms; static, so that all ranks agree on its length."""
        return len(self.plan.places) if self.limited and self.plan.has_levels else 0


@dataclass(frozen=True, slots=True)
class _Run:
    """Work for one kernel on some members, whose tensors it gets in this order."""

    kernel: Kernel
    members: tuple[int, ...]
    work: Work


@dataclass(frozen=True, slots=True)
class _Batch:
    """Members with a limiter between one sum of norms and the next."""

    members: tuple[int, ...]
    runs: tuple[_Run, ...]
    norms: tuple[int, ...]  # places of each member


class Schedule:
    """What one step does, for as long as the same parameters on one device have gradients and limiters."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        self.members, self._device = tuple(members), device
        self._exchanges = [member.plan.exchange for member in members]
        lengths = [exchange.length for exchange in self._exchanges]
        self._first_slot = [0, *accumulate(lengths)]
        wide = any(member.dtype == torch.float64 for member in members)
        self._exchange_dtype = torch.float64 if wide else torch.float32
        # (member, where its elements of cut units lie, where they go)
        self._sends = [
            (i, *_indices(member.plan, self._first_slot[i], device))
            for i, member in enumerate(members)
            if member.moves and member.plan.exchange.sends
        ]
        self._free = self._runs([i for i, m in enumerate(members) if m.moves and not m.norms])
        self._batches = [self._batch(numbers) for numbers in _batches(members, device)]

    def run(
        self,
        weights: Sequence[Tensor],  # one a member, as all that follow: dense local buffers
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        rules: Sequence[Rule],  # one a group
    ) -> None:
        """One step; for members without a gradient weights, gradients and states may be anything."""
        exchange = self._completed(gradients)

        def tensors(members: Sequence[int]) -> Tensors:
            return Tensors(
                [weights[i] for i in members],
                [gradients[i] for i in members],
                [dtensor.local(states[i]["exp_avg"]) for i in members],
                [dtensor.local(states[i]["exp_avg_sq"]) for i in members],
                [states[i]["step"] for i in members],
                [rules[self.members[i].group] for i in members],
                exchange,
            )

        for run in self._free:
            run.kernel.step(run.work, tensors(run.members))
        for batch in self._batches:
            squared_norms = torch.zeros(sum(batch.norms), dtype=torch.float64, device=self._device)
            given = [(run, tensors(run.members)) for run in batch.runs]
            for run, its in given:
                run.kernel.moments(run.work, its, squared_norms)
            sum_over_ranks(squared_norms, batch.norms, [self.members[i].plan.shard.groups for i in batch.members])
            rho = self._limit_growth(batch, squared_norms, rules, states)
            for run, its in given:
                run.kernel.write(run.work, its, rho)

    def _completed(self, gradients: Sequence[Tensor]) -> Tensor:
        """The elements of all cut units, completed by one sum for each process group; none if nothing is cut."""
        buffer = torch.zeros(self._first_slot[-1], dtype=self._exchange_dtype, device=self._device)
        for i, sources, slots in self._sends:
            buffer[slots] = gradients[i].view(-1)[sources].to(buffer.dtype)
        lengths = [exchange.length for exchange in self._exchanges]
        sum_over_ranks(buffer, lengths, [member.plan.shard.row_groups for member in self.members])
        return buffer

    def _limit_growth(
        self, batch: _Batch, squared_norms: Tensor, rules: Sequence[Rule], states: Sequence[Mapping[str, Any]]
    ) -> Tensor:
        """The limiters rho of all tensors with a norm, fp64, shaped as `squared_norms`; stores the limited norms."""
        # A member without a gradient has a place among the norms, but nothing to limit or to remember.
        stored = [
            states[i]["limited_norm"].view(-1) if self.members[i].moves else squared_norms.new_zeros(length)
            for i, length in zip(batch.members, batch.norms, strict=True)
        ]
        limiters = [rules[self.members[i].group].limiter for i in batch.members]
        limiter: float | Tensor = limiters[0]
        if len(set(limiters)) > 1:  # fills: a copy to a GPU would wait for it
            filled = [squared_norms.new_full((n,), x) for n, x in zip(batch.norms, limiters, strict=True)]
            limiter = torch.cat(filled)
        rho, new = update.limit_growth(squared_norms, torch.cat(stored).double(), limiter)
        torch._foreach_copy_(stored, list(new.split(batch.norms)))
        return rho

    def _batch(self, numbers: Sequence[int]) -> _Batch:
        norms = tuple(self.members[i].norms for i in numbers)
        first = dict(zip(numbers, [0, *accumulate(norms)], strict=False))
        return _Batch(tuple(numbers), self._runs([i for i in numbers if self.members[i].moves], first), norms)

    def _runs(self, numbers: Sequence[int], first_norm: Mapping[int, int] | None = None) -> tuple[_Run, ...]:
        by_kernel: dict[int, tuple[Kernel, list[int]]] = {}
        for i in numbers:
            member = self.members[i]
            kernel = choose(self._device, member.dtype, member.plan.pieces)
            by_kernel.setdefault(id(kernel), (kernel, []))[1].append(i)
        return tuple(
            _Run(
                kernel,
                tuple(chosen),
                Work(tuple(p for n, i in enumerate(chosen) for p in self._parts(n, i, first_norm))),
            )
            for kernel, chosen in by_kernel.values()
        )

    def _parts(self, parameter: int, i: int, first_norm: Mapping[int, int] | None) -> list[Part]:
        plan = self.members[i].plan
        cuts: dict[int, list[Cut]] = {}
        for receive in plan.exchange.receives:
            cut = Cut(receive.unit, self._first_slot[i] + receive.slot, receive.length)
            cuts.setdefault(receive.fragment, []).append(cut)
        return [
            Part(
                parameter,
                piece,
                tuple(cuts.get(number, ())),
                first_norm[i] + plan.places[piece.fragment.fqn] if first_norm is not None and piece.level else -1,
            )
            for number, piece in enumerate(plan.pieces)
            if piece.touched
        ]


def _batches(members: Sequence[Member], device: torch.device) -> list[list[int]]:
    """Numbers of the limited members, in batches: those of shared tensors together, the others by size."""
    shared = [i for i, m in enumerate(members) if m.norms and m.plan.shard.groups]
    batches = [shared] if shared else []
    room = 0
    for i, member in enumerate(members):
        if not member.norms or not member.moves or member.plan.shard.groups:
            continue
        numel = sum(fragment.numel for fragment in member.plan.shard.fragments)
        if not room or (device.type == "cpu" and room < numel):
            batches.append([])
            room = CACHE
        batches[-1].append(i)
        room = max(1, room - numel)
    return batches


def _indices(plan: Plan, first_slot: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Elements of the local buffer that complete cut units, and their places in the exchange."""
    sends = plan.exchange.sends
    sources = torch.cat([torch.arange(send.source, send.source + send.length) for send in sends])
    slots = torch.cat([torch.arange(send.slot, send.slot + send.length) for send in sends]) + first_slot
    return sources.to(device), slots.to(device)
