"""One step of many parameters: what is fixed about it (`Schedule`), and the collectives and kernels that it runs.

A kernel updates in one call what needs nothing of other ranks: tensors without a limiter, and those that this process
holds whole. Tensors with a limiter that ranks share need the norm of the whole tensor between the moments and the
write: one sum over ranks serves them all. Matrices that are orthogonalized have their norms in the same sum, and go on
in `rounds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gwt_dist import dtensor
from gwt_dist.comm import sum_over_ranks
from gwt_dist.kernels import Cut, Kernel, Part, Piece, Tensors, Work, choose, limit_growth
from gwt_dist.plan import Plan, state_dtype
from gwt_dist.rounds import NORMS, Holder, Rounds
from gwt_dist.update import Rule


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of a step."""

    plan: Plan
    group: int  # number of its parameter group
    dtype: torch.dtype
    moves: bool  # it has a gradient; without one it takes part in collectives alone
    limited: bool  # its group has a limiter
    orthogonal: bool = False  # tensors with a level have their momentum orthogonalized

    @property
    def norms(self) -> int:
        """Places in the vector of squared norms; static, so that all ranks agree on its length."""
        if not self.plan.has_levels:
            return 0
        return len(self.plan.places) * (NORMS if self.orthogonal else int(self.limited))

    @property
    def shares_norms(self) -> bool:
        """Whether other ranks hold parts of the tensors whose norms it needs."""
        return self.norms > 0 and bool(self.plan.shard.groups)


class _Stage(Enum):
    """What the update of a piece waits for."""

    FREE = 1  # nothing
    ALONE = 2  # the norm of a tensor that this process holds whole
    SHARED = 3  # the norm of a tensor that ranks share
    WHOLE = 4  # the whole matrix, on one rank


@dataclass(frozen=True, slots=True)
class _Run:
    """Work for one kernel on some members, whose tensors it gets in this order."""

    kernel: Kernel
    members: tuple[int, ...]
    work: Work


class Schedule:
    """What one step does, for as long as the same parameters on one device have gradients and limiters."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        self.members, self._device = tuple(members), device
        self._first_slot = [0, *accumulate(member.plan.exchange.length for member in members)]
        exchanging = [member.plan for member in members if member.plan.exchange.length]
        self._lengths = [plan.exchange.length for plan in exchanging]
        self._row_groups = [plan.shard.row_groups for plan in exchanging]
        wide = any(member.dtype == torch.float64 for member in members)
        self._exchange_dtype = torch.float64 if wide else torch.float32
        # (member, where its elements of cut units lie, where they go)
        self._sends = [
            (i, *_indices(member.plan, self._first_slot[i], device))
            for i, member in enumerate(members)
            if member.moves and member.plan.exchange.sends
        ]
        self._counting = self._by_kernel([i for i, member in enumerate(members) if member.moves])
        self._alone = self._runs(_Stage.FREE) + self._runs(_Stage.ALONE)

        # Those with a limiter come before those whose momentum is orthogonalized; one sum has the norms of both.
        sharing = [i for i, member in enumerate(members) if member.shares_norms and not member.orthogonal]
        whole = [i for i, member in enumerate(members) if member.norms and member.orthogonal]
        self._limited, self._summed = sharing, sharing + whole
        self._whole = [i for i in whole if members[i].moves]  # whose tensors the rounds are given, in this order
        self._norms = [members[i].norms for i in self._summed]
        self._groups = [members[i].plan.shard.groups for i in self._summed]
        first_norm = dict(zip(self._summed, accumulate(self._norms, initial=0), strict=False))
        self._shared = self._runs(_Stage.SHARED, first_norm)
        self._rounds = Rounds([self._holder(i, first_norm[i]) for i in whole], device)
        # A member without a gradient has places among the norms, but nothing to limit or to remember.
        self._nothing = {i: torch.zeros(members[i].norms, device=device) for i in sharing if not members[i].moves}

    def run(
        self,
        weights: Sequence[Tensor],  # one a member, as all that follow: dense local buffers
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        rules: Sequence[Rule],  # one a group
    ) -> None:
        """One step, counted; for members without a gradient weights, gradients and states may be anything."""
        for kernel, members in self._counting:
            kernel.count([states[i]["step"] for i in members])
        exchange = self._completed(gradients)

        def tensors(members: Sequence[int], second_moment: bool = True) -> Tensors:
            return Tensors(
                [weights[i] for i in members],
                [gradients[i] for i in members],
                [dtensor.local(states[i]["exp_avg"]) for i in members],
                [dtensor.local(states[i]["exp_avg_sq"]) for i in members] if second_moment else [],
                [states[i]["step"] for i in members],
                [rules[self.members[i].group] for i in members],
                exchange,
                [states[i]["limited_norm"] for i in members],
            )

        for run in self._alone:
            run.kernel.step(run.work, tensors(run.members))
        if not self._summed:
            return
        squared_norms = torch.zeros(sum(self._norms), dtype=torch.float64, device=self._device)
        given = [(run, tensors(run.members)) for run in self._shared]
        whole = tensors(self._whole, second_moment=False)
        for run, its in given:
            run.kernel.moments(run.work, its, squared_norms)
        self._rounds.add_norms(whole, squared_norms)
        sum_over_ranks(squared_norms, self._norms, self._groups)
        if self._limited:
            counts = self._norms[: len(self._limited)]
            limited = [self._nothing[i] if i in self._nothing else states[i]["limited_norm"] for i in self._limited]
            its_rules = [rules[self.members[i].group] for i in self._limited]
            rho = limit_growth(squared_norms[: sum(counts)], counts, limited, its_rules)
            for run, its in given:
                run.kernel.write(run.work, its, rho)
        self._rounds.run(whole, squared_norms)

    def _holder(self, i: int, first_norm: int) -> Holder:
        member = self.members[i]
        parts = self._parts(self._whole.index(i), i, _Stage.WHOLE, first_norm) if member.moves else ()
        return Holder(member.plan, tuple(parts), member.moves, state_dtype(member.dtype))

    def _completed(self, gradients: Sequence[Tensor]) -> Tensor:
        """The elements of all cut units, completed by one sum for each process group; none if nothing is cut."""
        buffer = torch.zeros(self._first_slot[-1], dtype=self._exchange_dtype, device=self._device)
        for i, sources, slots in self._sends:
            buffer[slots] = gradients[i].view(-1)[sources].to(buffer.dtype)
        sum_over_ranks(buffer, self._lengths, self._row_groups)
        return buffer

    def _runs(self, stage: _Stage, first_norm: Mapping[int, int] | None = None) -> tuple[_Run, ...]:
        """The work of one stage by kernel; the norms of each run are counted by themselves without `first_norm`."""
        members = enumerate(self.members)
        moving = [i for i, m in members if m.moves and any(_stage(m, piece) is stage for piece in m.plan.pieces)]
        runs = []
        for kernel, chosen in self._by_kernel(moving):
            norms = [0 if stage is _Stage.FREE else self.members[i].norms for i in chosen]
            first = first_norm or dict(zip(chosen, accumulate(norms, initial=0), strict=False))
            parts = [part for n, i in enumerate(chosen) for part in self._parts(n, i, stage, first[i])]
            runs.append(_Run(kernel, tuple(chosen), Work(tuple(parts), tuple(norms) if any(norms) else ())))
        return tuple(runs)

    def _by_kernel(self, numbers: Sequence[int]) -> list[tuple[Kernel, list[int]]]:
        found: dict[int, tuple[Kernel, list[int]]] = {}
        for i in numbers:
            kernel = choose(self._device, self.members[i].dtype, self.members[i].plan.pieces)
            found.setdefault(id(kernel), (kernel, []))[1].append(i)
        return list(found.values())

    def _parts(self, parameter: int, i: int, stage: _Stage, first_norm: int) -> list[Part]:
        plan = self.members[i].plan
        each = NORMS if stage is _Stage.WHOLE else 1
        cuts: dict[int, list[Cut]] = {}
        for receive in plan.exchange.receives:
            cut = Cut(receive.unit, self._first_slot[i] + receive.slot, receive.length)
            cuts.setdefault(receive.fragment, []).append(cut)
        return [
            Part(
                parameter,
                piece,
                tuple(cuts.get(number, ())),
                -1 if stage is _Stage.FREE else first_norm + each * plan.places[piece.fragment.fqn],
            )
            for number, piece in enumerate(plan.pieces)
            if piece.touched and _stage(self.members[i], piece) is stage
        ]


def _stage(member: Member, piece: Piece) -> _Stage:
    if member.orthogonal and piece.level:
        return _Stage.WHOLE
    if not (member.norms and piece.level):
        return _Stage.FREE
    return _Stage.SHARED if member.shares_norms else _Stage.ALONE


def _indices(plan: Plan, first_slot: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Elements of the local buffer that complete cut units, and their places in the exchange."""
    sends = plan.exchange.sends
    sources = torch.cat([torch.arange(send.source, send.source + send.length) for send in sends])
    slots = torch.cat([torch.arange(send.slot, send.slot + send.length) for send in sends]) + first_slot
    return sources.to(device), slots.to(device)
