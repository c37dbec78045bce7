"""A phase that takes whole matrices to one rank each and back, round by round (`matrices`).

    time ->        round 0            round 1            round 2
    depart         send, messages     send, messages     ...
    work                              on round 0         on round 1
    arrive                                               of round 0: weights

Every rank sends what the formula makes of its parts to the ranks that own the matrices; these work on stacks of whole
matrices and send them back. While a rank works on one round, the messages of the next are under way, and those of the
one before come back. One process is a world of 1, whose parts land in its stacks at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import prod

import torch
from torch import Tensor

from gwt_dist import products
from gwt_dist.comm import Peers, begin, connected, needs_host
from gwt_dist.declare import Program, Rule, Travel
from gwt_dist.formulas import FORMULAS
from gwt_dist.kernels import Kernel, Part, Tensors, Work
from gwt_dist.layout import Fragment
from gwt_dist.matrices import Matrix, Round, Route, plan_rounds
from gwt_dist.plan import Plan
from gwt_dist.seats import Place


@dataclass(frozen=True, slots=True)
class Holder:
    """A parameter of which tensors travel, and what this rank holds of them."""

    plan: Plan
    parts: tuple[Part, ...]  # of the tensors that travel; none of those without a gradient, or frozen
    dtype: torch.dtype  # of its moments
    group: int  # number of its parameter group
    takes: frozenset[bool]  # whether tensors that the recipe's own program takes travel, the others, or both
    run: int = 0  # in whose `Tensors` its parts have their parameters


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of a kernel in a round."""

    kernel: Kernel
    run: int
    members: tuple[int, ...]  # of the run
    work: Work


@dataclass(frozen=True, slots=True)
class _Round:
    """A round of matrices that the same ranks hold, with one dtype of moments."""

    peers: Peers
    plan: Round
    moments: torch.dtype
    products: torch.dtype  # in which matrices travel
    groups: tuple[tuple[int, ...], ...]  # of each stack, the parameter group of each of its matrices
    seats: tuple[tuple[Place | None, ...], ...]  # and where what belongs to it is; None of those that do not move
    calls: tuple[_Call, ...]
    rows: tuple[tuple[Part, int, int], ...]  # a part, its run, and where its rows land


@dataclass(frozen=True, slots=True)
class _Way:
    """One kind of numbers in a round: elements, or a field of rows."""

    route: Route
    landing: Tensor  # messages to others, stacks
    letters: Tensor  # what others send, and get back

    def outgoing(self) -> list[Tensor]:
        """To each rank."""
        return list(self.landing[: sum(self.route.sends)].split(list(self.route.sends)))

    def incoming(self) -> list[Tensor]:
        """From each rank."""
        return list(self.letters.split(list(self.route.receives)))

    def copy(self, back: bool = False) -> None:
        """Elements of the letters into the stacks, or back."""
        pairs = [
            (
                self.letters.as_strided((o.rows, o.columns), (o.source_stride, 1), o.source),
                self.landing.as_strided((o.rows, o.columns), (o.destination_stride, 1), o.destination),
            )
            for o in self.route.overlaps
        ]
        if pairs:
            letters, stacks = map(list, zip(*pairs, strict=True))
            torch._foreach_copy_(*((letters, stacks) if back else (stacks, letters)))

    def stack(self, number: int, *shape: int) -> Tensor:
        """A stack, in this shape."""
        return self.landing.narrow(0, self.route.stacks[number], prod(shape)).view(shape)


@dataclass(slots=True)
class _Trip:
    """A round under way."""

    its: _Round
    elements: _Way
    rows: dict[str, _Way]  # by field
    wait: Callable[[], None]

    @property
    def ways(self) -> list[_Way]:
        """All of them, in one order on all ranks."""
        return [self.elements, *self.rows.values()]


class Rounds:
    """What a travelling phase of one step does, for as long as the same parameters have gradients."""

    def __init__(
        self, number: int, program: Program, holders: Sequence[Holder], kernels: Sequence[Kernel], device: torch.device
    ) -> None:
        phase = program.phases[number]
        assert isinstance(phase, Travel)
        self._number, self._phase, self._program, self._device = number, phase, program, device
        self._formula = FORMULAS[program.formula]
        by_peers: dict[tuple[tuple[int, ...], torch.dtype], list[tuple[Holder, str, tuple[int, ...]]]] = {}
        for holder in holders:
            for tensor in holder.plan.shard.tensors:
                if prod(tensor.shape) and holder.plan.form.takes(tensor.shape) in holder.takes:
                    key = holder.plan.shard.peers.ranks, holder.dtype
                    by_peers.setdefault(key, []).append((holder, tensor.fqn, tensor.shape))
        self._rounds = [
            its for (_, dtype), found in by_peers.items() for its in self._planned(found, dtype, tuple(kernels))
        ]
        self._places = [place for its in self._rounds for stack in its.seats for place in stack if place]
        self._unknown = dict.fromkeys(map(id, self._places), (0, False))
        if any(needs_host(device, its.peers) for its in self._rounds):
            warnings.warn(
                f"gloo sends no message from the memory of {device}: matrices of whole-matrix recipes go through the "
                f"memory of the host, twice a step, and each waits for the GPU. Use the nccl backend for GPUs",
                RuntimeWarning,
                stacklevel=2,
            )

    def _planned(
        self, found: Sequence[tuple[Holder, str, tuple[int, ...]]], dtype: torch.dtype, kernels: Sequence[Kernel]
    ) -> list[_Round]:
        peers = connected(found[0][0].plan.shard.peers, self._device)
        held = {id(holder): _held(holder.plan.shard.peers) for holder, _, _ in found}
        matrices = [
            Matrix(shape, partial(held[id(holder)], fqn), holder.group, holder.plan.keepers.get(fqn))
            for holder, fqn, shape in found
        ]
        message = products.dtype_of(self._phase.products, dtype, self._device)
        stack_size = partial(products.stack_size, device=self._device)
        its_parts: dict[tuple[int, str], list[Part]] = {}
        for holder in {id(holder): holder for holder, _, _ in found}.values():
            for part in holder.parts:
                its_parts.setdefault((id(holder), part.piece.fragment.fqn), []).append(part)
        planned = []
        for one in plan_rounds(matrices, peers.here, peers.world_size, stack_size):
            landed = [  # parts that do not move send zeros, and keep nothing of what comes back
                (found[matrix][0].run, replace(parts[part], landing=start), row)
                for (matrix, part), start, row in zip(one.parts, one.elements.slots, one.rows.slots, strict=True)
                if (parts := its_parts.get((id(found[matrix][0]), found[matrix][1])))
            ]
            groups = tuple(tuple(found[matrix][0].group for matrix in stack.matrices) for stack in one.stacks)
            seats = tuple(
                tuple(
                    Place.of(holder.plan, fqn, holder.run, its_parts.get((id(holder), fqn), ()))
                    for holder, fqn, _ in (found[matrix] for matrix in stack.matrices)
                )
                for stack in one.stacks
            )
            by_run: dict[int, list[Part]] = {}
            for run, part, _ in landed:
                by_run.setdefault(run, []).append(part)
            calls = tuple(self._call(kernels[run], run, its) for run, its in by_run.items())
            rows = tuple((part, run, row) for run, part, row in landed) if self._phase.rows else ()
            planned.append(_Round(peers, one, dtype, message, groups, seats, calls, rows))
        return planned

    def _call(self, kernel: Kernel, run: int, parts: Sequence[Part]) -> _Call:
        members = {number: i for i, number in enumerate(sorted({part.parameter for part in parts}))}
        work = Work(tuple(replace(part, parameter=members[part.parameter]) for part in parts), self._program, ())
        return _Call(kernel, run, tuple(members), work)

    def run(
        self,
        given: Sequence[Tensors],  # of each run: one of each for every holder that moves
        sums: list[Tensor],  # of the phases before
        rules: Sequence[Rule],  # one a group
    ) -> None:
        """Update state and weights."""
        there: _Trip | None = None
        back: _Trip | None = None
        known = self._known(given)
        for its in (*self._rounds, None, None):
            departed = self._depart(its, given, sums) if its else None
            if there:
                self._work(there, given, rules, known)
            if back:
                self._arrive(back, given)
            there, back = departed, there

    def _known(self, given: Sequence[Tensors]) -> dict[int, tuple[int, bool]]:
        """By identity of each place, its steps and whether its matrix is new: one read of the device for all."""
        read = [place.known(given[place.run]) for place in self._places if place.fields]
        if not read:  # nothing is kept, and nobody asks
            return self._unknown
        steps, is_set = torch.stack([torch.stack([x.float() for x in its]) for its in zip(*read, strict=True)]).tolist()
        return {id(p): (int(t), not s) for p, t, s in zip(self._places, steps, is_set, strict=True)}

    def _depart(self, its: _Round, given: Sequence[Tensors], sums: list[Tensor]) -> _Trip:
        elements = self._way(its.plan.elements, its.products)
        for call in its.calls:
            call.kernel.send(self._number, call.work, _of(call, given), sums, elements.landing)
        rows = {name: self._way(its.plan.rows, its.moments) for name in self._phase.rows}
        for name, way in rows.items():
            kept, landed = _rows(its, name, way.landing, given)
            if kept:
                torch._foreach_copy_(landed, kept)
        ways = [elements, *rows.values()]
        wait = begin([way.outgoing() for way in ways], [way.incoming() for way in ways], its.peers)
        return _Trip(its, elements, rows, wait)

    def _way(self, route: Route, dtype: torch.dtype) -> _Way:
        letters = torch.empty(sum(route.receives), dtype=dtype, device=self._device)
        return _Way(route, torch.zeros(route.size, dtype=dtype, device=self._device), letters)

    def _work(
        self, trip: _Trip, given: Sequence[Tensors], rules: Sequence[Rule], known: Mapping[int, tuple[int, bool]]
    ) -> None:
        """Put the stacks together of what arrived, work on them, and send them back."""
        trip.wait()
        for way in trip.ways:
            way.copy()
        for i, (stack, groups) in enumerate(zip(trip.its.plan.stacks, trip.its.groups, strict=True)):
            matrices = trip.elements.stack(i, stack.places, stack.rows, stack.columns)
            rows = {name: way.stack(i, stack.places, stack.rows) for name, way in trip.rows.items()}
            places, its_rules = trip.its.seats[i], [rules[group] for group in groups]
            seats = [place.seat(given[place.run], *known[id(place)]) if place else None for place in places]
            getattr(self._formula, self._phase.work)(matrices, rows, its_rules, seats)
            for place, seat, rule in zip(places, seats, its_rules, strict=True):
                if place and seat:
                    place.store(seat, rule, given[place.run])
        for way in trip.ways:
            way.copy(back=True)
        trip.wait = begin([w.incoming() for w in trip.ways], [w.outgoing() for w in trip.ways], trip.its.peers)

    def _arrive(self, trip: _Trip, given: Sequence[Tensors]) -> None:
        trip.wait()
        for call in trip.its.calls:
            call.kernel.keep(self._number, call.work, _of(call, given), trip.elements.landing)
        for name, way in trip.rows.items():
            kept, landed = _rows(trip.its, name, way.landing, given)
            if kept:
                torch._foreach_copy_(kept, landed)


def _of(call: _Call, given: Sequence[Tensors]) -> Tensors:
    """Those of the members of a call."""
    its, members = given[call.run], call.members
    if len(members) == len(its.weights):
        return its
    return Tensors(
        [its.weights[i] for i in members],
        [its.gradients[i] for i in members],
        {name: [tensors[i] for i in members] for name, tensors in its.state.items()},
        [its.steps[i] for i in members],
        [its.rules[i] for i in members],
        its.exchange,
    )


def _rows(its: _Round, name: str, landing: Tensor, given: Sequence[Tensors]) -> tuple[list[Tensor], list[Tensor]]:
    """A field of rows: of each part, what is kept of it and where it lands."""
    kept, landed = [], []
    for part, run, start in its.rows:
        place = part.piece.places[name]
        kept.append(given[run].state[name][part.parameter].view(-1).narrow(0, place.offset, place.numel))
        landed.append(landing.narrow(0, start, place.numel))
    return kept, landed


def _held(peers: Peers) -> Callable[[str, int], Sequence[Fragment]]:
    """Of the name of a tensor and a place: the fragments of it there that are not empty."""

    @cache
    def at(place: int) -> dict[str, list[Fragment]]:
        found: dict[str, list[Fragment]] = {}
        for fragment in peers.fragments(place):
            if fragment.numel:
                found.setdefault(fragment.fqn, []).append(fragment)
        return found

    return lambda fqn, place: at(place).get(fqn, ())
