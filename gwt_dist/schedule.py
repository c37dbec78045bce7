"""One step of many parameters: what is fixed about it (`Schedule`), and the collectives and kernels that it runs.

A kernel updates in one call, through all phases of the program, what needs nothing of other ranks: tensors whose
program has no sums, and those that this process holds whole. For all others the phases of all programs go side by side,
and one sum a group of processes serves them all. Which program a tensor has, nobody here asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gwt_dist.comm import sum_over_ranks
from gwt_dist.declare import Program, Rule
from gwt_dist.kernels import Tensors
from gwt_dist.plan import Plan
from gwt_dist.stages import Maker, Run, Stage
from gwt_dist.sums import Entry, lay_out

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter of a step."""

    plan: Plan
    group: int  # number of its parameter group
    dtype: torch.dtype
    moves: bool  # it has a gradient and is not frozen; else it takes part in collectives alone
    leveled: Program  # of its tensors that the recipe takes, those with level > 0 where it says nothing else
    plain: Program  # of the others
    shape: tuple[int, ...] = ()  # of the local part
    is_dtensor: bool = False
    frozen: frozenset[str] = frozenset()  # names of its tensors that stay as they are

    def entries(self, number: int) -> Iterator[Entry]:
        """Its programs, whichever rank holds the tensors that they step, so that all ranks agree on sums."""
        taken: dict[Program, set[bool]] = {}
        for tensor in self.plan.shard.tensors:
            takes = self.plan.form.takes(tensor.shape)
            taken.setdefault(self.leveled if takes else self.plain, set()).add(takes)
        for program, its in taken.items():
            yield Entry(number, self.plan, program, frozenset(its), self.frozen)


class Schedule:
    """What one step does, for as long as the same parameters on one device have gradients and programs."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        self.members, self._device = tuple(members), device
        self.moving = [i for i, member in enumerate(members) if member.moves]
        self.shapes = [members[i].shape for i in self.moving]
        self._first_slot = [0, *accumulate(member.plan.exchange.length for member in members)]
        exchanging = [member.plan for member in members if member.plan.exchange.length]
        self._lengths = [plan.exchange.length for plan in exchanging]
        self._row_groups = [plan.shard.row_groups for plan in exchanging]
        wide = any(member.dtype == torch.float64 for member in members)
        self._exchange_dtype = torch.float64 if wide else torch.float32
        # (member, where its elements of cut cells lie, where they go)
        self._sends = [
            (i, *_indices(member.plan, self._first_slot[i], device))
            for i, member in enumerate(members)
            if member.moves and member.plan.exchange.sends
        ]
        self._groups = [member.group for member in members]
        self.has_dtensors = any(member.is_dtensor for member in members)
        moves = [member.moves for member in members]
        make = Maker([m.dtype for m in members], [m.group for m in members], moves, self._first_slot, device)
        local: list[Entry] = []
        shared: dict[Program, list[Entry]] = {}
        for i, member in enumerate(members):
            for entry in member.entries(i):
                if entry.program.travels or (entry.program.sums and member.plan.shard.groups):
                    shared.setdefault(entry.program, []).append(entry)
                else:
                    local.append(entry)
        self.local = make.local(local)
        depth = max((len(program.phases) for program in shared), default=0)
        self._sums = [lay_out([entry for its in shared.values() for entry in its], phase) for phase in range(depth)]
        self._stages = [Stage(program, entries, self._sums, make) for program, entries in shared.items()]
        # Which members each run is the first to step, and those that move and of which this rank steps nothing.
        left = set(self.moving)
        self._first: list[list[bool]] = []
        for run in chain(self.local, *(stage.runs for stage in self._stages)):
            self._first.append([i in left for i in run.members])
            left.difference_update(run.members)
        self._idle = sorted(left)

    def run(
        self,
        weights: Sequence[Tensor],  # one a member, as all that follow: dense local buffers
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        rules: Sequence[Rule],  # one a group
    ) -> None:
        """One step, counted; for members that do not move weights, gradients and states may be anything."""
        # Kernels are launched on the current GPU.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            self._run(weights, gradients, states, rules)

    def _run(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
        rules: Sequence[Rule],
    ) -> None:
        exchange = torch.zeros(self._first_slot[-1], dtype=self._exchange_dtype, device=self._device)

        def tensors(run: Run) -> Tensors:
            its = _of(run, states)
            return Tensors(
                _of(run, weights),
                _of(run, gradients),
                {name: self._local([state[name] for state in its]) for name in run.work.program.names()},
                [state["step"] for state in its],
                [rules[group] for group in _of(run, self._groups)],
                exchange,
            )

        try:
            local = [(run, tensors(run)) for run in self.local]
            given = [[(run, tensors(run)) for run in stage.runs] for stage in self._stages]
        except KeyError as error:
            raise self._lacking(states, error) from None
        for run, its in chain(local, *given):
            run.kernel.check(run.work, its)
        for (run, its), first in zip(chain(local, *given), self._first, strict=True):
            run.kernel.count(run.work, its, first)
        if self._idle:
            torch._foreach_add_([states[i]["step"] for i in self._idle], 1)
        self._complete(exchange, gradients)
        for run, its in local:
            run.kernel.step(run.work, its)
        sums: list[Tensor] = []
        for phase, laid in enumerate(self._sums):
            sums.append(torch.zeros(laid.length, dtype=torch.float64, device=self._device))
            for stage, runs in zip(self._stages, given, strict=True):
                stage.phase(phase, runs, sums, rules)
            sum_over_ranks(sums[-1], *laid.over)
            for stage in self._stages:
                stage.settle(phase, sums[-1], states, rules)

    def spread(self, values: list[T]) -> list[Any]:
        """Of `values`, one a member that moves, one a member: None of the others."""
        if len(values) == len(self.members):
            return values
        found: list[Any] = [None] * len(self.members)
        for i, value in zip(self.moving, values, strict=True):
            found[i] = value
        return found

    def _lacking(self, states: Sequence[Mapping[str, Any]], error: KeyError) -> ValueError:
        """For state that was taken out of the optimizer's, and is no state any more."""
        for member, state in zip(self.members, states, strict=True):
            lacks = [name for name in ("step", *member.plan.shapes) if name not in state] if member.moves else []
            if lacks:
                return ValueError(
                    f"the state of {member.plan.shard.tensors[0].fqn} has no {lacks[0]}, only {', '.join(state)}: it "
                    f"is not that of this recipe. Nothing was changed. Build the optimizer as it was, or clear all "
                    f"of its state"
                )
        return ValueError(f"the state of the optimizer has no {error}")

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        """The parts of DTensors that this rank holds; other tensors, and those that no kernel takes, as they are."""
        if not self.has_dtensors:
            return tensors
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]

    def _complete(self, exchange: Tensor, gradients: Sequence[Tensor]) -> None:
        """The elements of all cut cells, completed by one sum for each process group; none if nothing is cut."""
        for i, sources, slots in self._sends:
            exchange[slots] = gradients[i].view(-1)[sources].to(exchange.dtype)
        sum_over_ranks(exchange, self._lengths, self._row_groups)


def _of(run: Run, values: Sequence[T]) -> list[T]:
    """Those of the members of a run."""
    return list(values) if len(run.members) == len(values) else [values[i] for i in run.members]


def _indices(plan: Plan, first_slot: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Elements of the local buffer that complete cut cells, and their places in the exchange."""
    sends = plan.exchange.sends
    sources = torch.cat([torch.arange(send.source, send.source + send.length) for send in sends])
    slots = torch.cat([torch.arange(send.slot, send.slot + send.length) for send in sends]) + first_slot
    return sources.to(device), slots.to(device)
