"""What a schedule runs: kernels on pieces of many parameters (`Run`), programs that need other ranks (`Stage`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from gwt_dist.declare import Extent, Pass, Program, Rule, Travel
from gwt_dist.exchange import Receive
from gwt_dist.formulas import check
from gwt_dist.kernels import Cut, Kernel, Part, Tensors, Work, choose, eager
from gwt_dist.piece import math_dtype
from gwt_dist.rounds import Holder, Rounds
from gwt_dist.sums import Entry, Sums, lay_out


@dataclass(frozen=True, slots=True)
class Run:
    """Work for one kernel on some members, whose tensors it gets in this order."""

    kernel: Kernel
    members: tuple[int, ...]
    work: Work


class Maker:
    """Makes runs of the entries of one schedule.

    Args:
        dtypes: Of the members.
        groups: Numbers of their parameter groups.
        moves: Whether each has a gradient; without one it has no run.
        first_slots: Where the cut cells of each begin in the exchange.
        device: Where all of them are.
    """

    def __init__(
        self,
        dtypes: Sequence[torch.dtype],
        groups: Sequence[int],
        moves: Sequence[bool],
        first_slots: Sequence[int],
        device: torch.device,
    ) -> None:
        self.dtypes, self.groups, self.moves, self.device = dtypes, groups, moves, device
        self._first_slots = first_slots
        self._cuts: dict[int, dict[int, list[Cut]]] = {}  # of each member and each of its pieces

    def local(self, entries: Sequence[Entry]) -> list[Run]:
        """Runs of tensors that need nothing of other ranks: their sums are their own."""
        by_program: dict[Program, list[Entry]] = {}
        for entry in entries:
            by_program.setdefault(entry.program, []).append(entry)
        found = []
        for program, its in by_program.items():
            check(program)
            for kernel, chosen in self._by_kernel(its):
                found.append(self.run(kernel, chosen, [lay_out(chosen, p) for p in range(len(program.phases))]))
        return found

    def run(self, kernel: Kernel, entries: Sequence[Entry], sums: Sequence[Sums]) -> Run:
        """A run whose sums stand where `sums`, one a phase, say."""
        parts = [part for n, entry in enumerate(entries) for part in self._parts(n, entry, sums)]
        program, members = entries[0].program, tuple(entry.member for entry in entries)
        lengths = tuple(tuple(stop - start for start, stop in map(its.span, entries)) for its in sums)
        sizes = tuple(its.length for its in sums)
        numels = {name: tuple(prod(e.plan.shapes[name]) for e in entries) for name in program.names()}
        return Run(kernel, members, Work(tuple(parts), program, lengths, sizes, numels))

    def runs(self, entries: Sequence[Entry], sums: Sequence[Sums]) -> list[Run]:
        """A run a kernel."""
        return [self.run(kernel, chosen, sums) for kernel, chosen in self._by_kernel(entries)]

    def _by_kernel(self, entries: Sequence[Entry]) -> list[tuple[Kernel, list[Entry]]]:
        found: dict[int, tuple[Kernel, list[Entry]]] = {}
        for entry in entries:
            pieces = [piece for _, piece in entry.pieces()]
            if pieces and self.moves[entry.member]:
                kernel = choose(self.device, self.dtypes[entry.member], entry.program, pieces)
                found.setdefault(id(kernel), (kernel, []))[1].append(entry)
        return list(found.values())

    def _parts(self, parameter: int, entry: Entry, sums: Sequence[Sums]) -> list[Part]:
        if entry.member not in self._cuts:
            receives = entry.plan.exchange.receives
            self._cuts[entry.member] = _cuts(receives, self._first_slots[entry.member])
        cuts = self._cuts[entry.member]
        return [
            Part(parameter, piece, tuple(cuts.get(number, ())), tuple(its.of(entry, number) for its in sums))
            for number, piece in entry.pieces()
        ]


class Stage:
    """A program of tensors that ranks share, phase by phase."""

    def __init__(self, program: Program, entries: Sequence[Entry], sums: Sequence[Sums], make: Maker) -> None:
        check(program)
        self.program = program
        self.members = [entry.member for entry in entries]  # those without a gradient too
        self.groups = [make.groups[i] for i in self.members]
        self.runs = make.runs(entries, sums)
        spans = [[its.span(entry) for entry in entries] for its in sums]
        self._between = Work((), program, tuple(tuple(stop - start for start, stop in each) for each in spans))
        wide = any(math_dtype(make.dtypes[i]) == torch.float64 for i in self.members)
        self._settling: Kernel = eager if wide or len(self.runs) != 1 else self.runs[0].kernel
        self._spans = [(each[0][0], each[-1][1]) for each in spans]
        # A member without a gradient has places in the sums, but nothing to remember.
        self._nothing = {
            entry.member: {
                name: torch.zeros(entry.plan.shapes[name], device=make.device) for name in program.names(Extent.TENSOR)
            }
            for entry in entries
            if not make.moves[entry.member]
        }
        self._rounds: dict[int, Rounds] = {}
        for number, phase in enumerate(program.phases):
            if isinstance(phase, Travel):
                kernels = [run.kernel for run in self.runs]
                self._rounds[number] = Rounds(number, program, _holders(entries, self.runs, make), kernels, make.device)

    def phase(
        self,
        number: int,
        given: Sequence[tuple[Run, Tensors]],  # of `runs`
        sums: list[Tensor],  # of the phases up to this one
        rules: Sequence[Rule],  # one a group
    ) -> None:
        """Run a phase, if the program has so many."""
        if number in self._rounds:
            self._rounds[number].run([tensors for _, tensors in given], sums, rules)
        elif number < len(self.program.phases):
            for run, tensors in given:
                run.kernel.phase(number, run.work, tensors, sums)

    def settle(self, number: int, sums: Tensor, states: Sequence[Mapping[str, Any]], rules: Sequence[Rule]) -> None:
        """Put in the place of the complete sums of a phase what later phases read; `rules` one a group."""
        its = self.program.phases[number] if number < len(self.program.phases) else None
        if isinstance(its, Pass) and its.then:
            its_states = [self._nothing.get(i, states[i]) for i in self.members]
            state = {name: [one[name] for one in its_states] for name in self.program.names(Extent.TENSOR)}
            its_sums = sums[slice(*self._spans[number])]
            given = Tensors([], [], state, [], [rules[group] for group in self.groups], sums)
            self._settling.settle(number, self._between, given, its_sums)


def _holders(entries: Sequence[Entry], runs: Sequence[Run], make: Maker) -> list[Holder]:
    run_of = {member: number for number, run in enumerate(runs) for member in run.members}
    parts: dict[int, list[Part]] = {}
    for run in runs:
        for part in run.work.parts:
            parts.setdefault(run.members[part.parameter], []).append(part)
    return [
        Holder(
            entry.plan,
            tuple(parts.get(entry.member, ())),
            math_dtype(make.dtypes[entry.member]),
            make.groups[entry.member],
            entry.takes,
            run_of.get(entry.member, 0),
        )
        for entry in entries
    ]


def _cuts(receives: Sequence[Receive], first_slot: int) -> dict[int, list[Cut]]:
    found: dict[int, list[Cut]] = {}
    for receive in receives:
        cut = Cut(receive.unit, first_slot + receive.slot, receive.length)
        found.setdefault(receive.fragment, []).append(cut)
    return found
