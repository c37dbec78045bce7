"""`plan`: the bytes of every shard, engine by engine, from the splits of `splits`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from gwt_dist import layout
from gwt_dist.memory import splits
from gwt_dist.memory.model import ModelSpec, TensorSpec
from gwt_dist.memory.plan import Plan
from gwt_dist.memory.setup import STEP, Setup
from gwt_dist.memory.splits import Concatenation
from gwt_dist.memory.state import GroupSpec
from gwt_dist.units import coefficients, level_of, units_of


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of the tensors of a `Concatenation`, by shard."""

    elements: tuple[int, ...]
    wavelet: tuple[int, ...]  # coefficients of all moments, as the two that follow
    cut: tuple[int, ...]
    rest: tuple[int, ...]
    second: tuple[int, ...]  # of the second moment alone, whatever the level
    held: tuple[int, ...]  # tensors with any element
    exchange: int


_Kind = tuple[int, str, int]  # level, wavelet and number of moments of a tensor's group


@lru_cache(maxsize=4096)
def _count(laid: Concatenation, kinds: tuple[_Kind | None, ...], shards: int) -> _Counts:
    """What `shards` ranks keep of the tensors of kind not None."""
    elements, wavelet, cut, rest, second, held = ([0] * shards for _ in range(6))
    exchange = 0
    for number, (shape, kind) in enumerate(zip(laid.shapes, kinds, strict=True)):
        if kind is None:
            continue
        level, name, moments = kind
        units = units_of(shape, level, name)
        kept = wavelet if level_of(shape, level) else rest
        moments = moments if kept is wavelet else 2
        starts = []
        for shard, start, stop in laid.intervals(number):
            first, last = units.index(start), units.index(stop - 1) + 1
            elements[shard] += stop - start
            held[shard] += 1
            kept[shard] += moments * (last - first) * units.coefficients
            second[shard] += (moments - 1) * (last - first) * units.coefficients
            if units.bounds(first)[0] < start and kept is wavelet:
                cut[shard] += moments * units.coefficients
            if start:
                starts.append(start)
        tensor = layout.Tensor("", shape, tuple(starts))
        exchange += layout.plan_exchange([tensor], [], lambda shape, units=units: units).length  # type: ignore[misc]
    return _Counts(tuple(elements), tuple(wavelet), tuple(cut), tuple(rest), tuple(second), tuple(held), exchange)


def plan(model: ModelSpec, groups: Sequence[GroupSpec], setup: Setup) -> Plan:
    """The plan of a model in these groups; tensors in no group are frozen.

    Raises `ValueError` for groups that the engine cannot have.
    """
    found = Plan(setup, model, groups)
    shards = setup.shards
    for values in (
        found.wavelet,
        found.second,
        found.cut,
        found.rest,
        found.scalars,
        found.elements,
        found.checkpoint,
    ):
        values += [0] * shards
    found.weights, found.gradients = [0] * shards, [0] * shards
    found.masters, found.step_gradients = [0] * shards, [0] * shards
    _BUILD[setup.engine](found)
    return found


class _Sums:
    """Adds tensors to a plan."""

    def __init__(self, found: Plan) -> None:
        self.plan, self.setup = found, found.setup
        self.kinds = {name: (g.level, g.wavelet, g.moments) for g in found.groups for name, _ in g.tensors}
        # Squared norms of a tensor: of its limiter, or of momentum and approximation.
        self.norms_of = {n: int(g.limited) if g.second_moment else 2 for g in found.groups for n, _ in g.tensors}
        self.frozen = [t for t in found.model.tensors if t.name not in self.kinds]
        self.shards = len(found.weights)

    def moments(self, laid: Concatenation, names: Sequence[str], times: int = 1) -> _Counts:
        """Moments of tensors of these names, and what a checkpoint keeps of them, `times` over."""
        setup, found = self.setup, self.plan
        counts = _count(laid, tuple(self.kinds.get(name) for name in names), self.shards)
        moment = setup.state_bytes
        stored = 4 if setup.masters else setup.bytes_of("weights")
        for s in range(self.shards):
            found.elements[s] += times * counts.elements[s]
            found.wavelet[s] += times * moment * counts.wavelet[s]
            found.cut[s] += times * moment * counts.cut[s]
            found.rest[s] += times * moment * counts.rest[s]
            found.second[s] += times * moment * counts.second[s]
            owned = counts.wavelet[s] - counts.cut[s] + counts.rest[s]
            found.checkpoint[s] += times * (stored * counts.elements[s] + moment * owned)
        if self.shards > 1:
            found.exchange += times * counts.exchange
            for name, shape in zip(names, laid.shapes, strict=True):
                level, _, moments = self.kinds.get(name, (0, "", 2))
                found.travelling += times * prod(shape) if moments == 1 and level_of(shape, level) else 0
        return counts

    def scalars(self, tensors: int) -> int:
        """Bytes of the step and the norms of a parameter that stands for so many tensors."""
        return STEP + self.setup.state_bytes * tensors

    def everywhere(self, values: list[int], number: int) -> None:
        """Add the same number for each shard."""
        values[:] = [value + number for value in values]

    def norms(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        """A parameter's places in the sum of norms: those of each tensor, if any of them has a level."""
        if self.shards > 1:
            if any(level_of(shape, self.kinds[name][0]) for name, shape in zip(names, shapes, strict=True)):
                self.plan.norms += self.norms_of[names[0]] * len(names)

    def frozen_weights(self) -> None:
        """Frozen tensors that every rank holds whole."""
        numel = sum(tensor.numel for tensor in self.frozen)
        self.everywhere(self.plan.weights, numel * self.setup.bytes_of("weights"))
        self.plan.checkpoint_common += numel * self.setup.bytes_of("weights")


def _whole(found: Plan) -> None:
    """One process, DDP, ZeRO-0: everything everywhere."""
    sums, setup = _Sums(found), found.setup
    sums.frozen_weights()
    for group in found.groups:
        for name, shape in group.tensors:
            sums.moments(splits.flat([shape], 1), [name])
            found.scalars[0] += sums.scalars(1)
            found.weights[0] += prod(shape) * setup.bytes_of("weights")
            found.gradients[0] += prod(shape) * setup.bytes_of("gradients")
            if setup.masters:
                found.masters[0] += prod(shape) * 4
                found.step_gradients[0] += prod(shape) * 4


def _owners(found: Plan) -> None:
    """ZeroRedundancyOptimizer, OSS: whole weights and gradients everywhere, each tensor's state on one rank."""
    sums, setup = _Sums(found), found.setup
    sums.frozen_weights()
    split = splits.largest_first if setup.engine == "zro" else splits.in_order
    owners = split([[shape for _, shape in group.tensors] for group in found.groups], setup.world_size)
    for group, of_group in zip(found.groups, owners, strict=True):
        for (_, shape), rank in zip(group.tensors, of_group, strict=True):
            leveled = level_of(shape, group.level) > 0
            moments = group.moments if leveled else 2
            moment = setup.state_bytes * coefficients(shape, group.level, group.wavelet)
            kept = moments * moment
            (found.wavelet if leveled else found.rest)[rank] += kept
            found.second[rank] += (moments - 1) * moment
            found.scalars[rank] += sums.scalars(1)
            found.elements[rank] += prod(shape)
            found.checkpoint[rank] += kept
            found.checkpoint_common += prod(shape) * setup.bytes_of("weights")
    trained = sum(prod(shape) for group in found.groups for _, shape in group.tensors)
    sums.everywhere(found.weights, trained * setup.bytes_of("weights"))
    sums.everywhere(found.gradients, trained * setup.bytes_of("gradients"))


def _zero_1_and_2(found: Plan) -> None:
    """Weights whole, in flat buffers of a group with padding; masters, state and (stage 2) gradients in equal parts."""
    sums, setup = _Sums(found), found.setup
    sums.frozen_weights()
    alignment = 16 // setup.bytes_of("weights") if setup.parameter_alignment else 1
    for group in found.groups:
        shapes = [shape for _, shape in group.tensors]
        laid, order = splits.zero_1_and_2(shapes, sums.shards, round_robin=setup.round_robin, alignment=alignment)
        names = [group.tensors[i][0] for i in order]
        sums.moments(laid, names)
        sums.norms(names, laid.shapes)
        whole = sum(prod(shape) for shape in shapes)
        sums.everywhere(found.scalars, sums.scalars(len(shapes)))
        sums.everywhere(found.weights, laid.part * sums.shards * setup.bytes_of("weights"))
        sums.everywhere(found.masters, laid.part * 4)
        padded = laid.part * sums.shards
        held = padded if setup.bf16_optimizer else whole if setup.engine == "zero1" else laid.part
        sums.everywhere(found.gradients, held * setup.bytes_of("gradients"))
        if not setup.bf16_optimizer:  # which steps with a part of its fp32 gradients
            _largest(found.step_gradients, laid.part * 4)


def _zero_3(found: Plan) -> None:
    """Everything in equal slots of each tensor; small tensors whole as well."""
    sums, setup = _Sums(found), found.setup
    for group in found.groups:
        shapes = [shape for _, shape in group.tensors]
        _each(sums, group, lambda shape: splits.zero_3(shape, sums.shards))
        for numbers in splits.sub_groups(shapes, sums.shards, setup.sub_group_size):
            slots = sum(splits.zero_3(shapes[i], sums.shards).part for i in numbers)
            sums.everywhere(found.scalars, sums.scalars(len(numbers)))
            sums.norms([group.tensors[i][0] for i in numbers], [shapes[i] for i in numbers])
            sums.everywhere(found.masters, slots * 4)
            sums.everywhere(found.gradients, slots * setup.bytes_of("gradients"))
            _largest(found.step_gradients, slots * 4)
    whole = 0
    bound = setup.persistence_total
    for tensor in found.model.tensors:
        sums.everywhere(found.weights, splits.zero_3(tensor.shape, sums.shards).part * setup.bytes_of("weights"))
        if tensor.numel <= setup.persistence_threshold and (bound is None or whole + tensor.numel <= bound):
            whole += tensor.numel
    sums.everywhere(found.weights, whole * setup.bytes_of("weights"))
    _frozen_parts(sums, lambda tensor: splits.zero_3(tensor.shape, sums.shards))


def _fsdp2(found: Plan) -> None:
    """Each tensor in whole rows; what is short of rows is padded for the weight alone."""
    sums, setup = _Sums(found), found.setup
    weight, gradient = setup.bytes_of("weights"), setup.bytes_of("gradients")
    for tensor in found.model.tensors:
        sums.everywhere(found.weights, splits.rows(tensor.shape, sums.shards).part * weight if tensor.numel else 0)
    for group in found.groups:
        before = list(found.elements)
        _each(sums, group, lambda shape: splits.rows(shape, sums.shards))
        for s, (now, then) in enumerate(zip(found.elements, before, strict=True)):
            found.gradients[s] += (now - then) * gradient
        for name, shape in group.tensors:
            sums.everywhere(found.scalars, sums.scalars(1))
            sums.norms([name], [shape])
    _frozen_parts(sums, lambda tensor: splits.rows(tensor.shape, sums.shards))


def _each(sums: _Sums, group: GroupSpec, split: Callable[[tuple[int, ...]], Concatenation]) -> None:
    """Tensors that are split one by one: those of one shape at once."""
    first: dict[tuple[int, ...], str] = {}
    times: Counter[tuple[int, ...]] = Counter()
    for name, shape in group.tensors:
        first.setdefault(shape, name)
        times[shape] += 1
    for shape, name in first.items():
        sums.moments(split(shape), [name], times[shape])


def _frozen_parts(sums: _Sums, split: Callable[[TensorSpec], Concatenation]) -> None:
    for tensor in sums.frozen:
        for shard, start, stop in split(tensor).intervals(0):
            sums.plan.checkpoint[shard] += (stop - start) * sums.setup.bytes_of("weights")


def _flat_units(found: Plan) -> None:
    """FSDP1 and fairscale: the tensors of a unit one after the other, in equal padded parts."""
    sums, setup = _Sums(found), found.setup
    weight, gradient = setup.bytes_of("weights"), setup.bytes_of("gradients")
    units: dict[str, list[TensorSpec]] = {}
    for tensor in found.model.tensors:
        alone = setup.engine == "fairscale" and not setup.flatten
        units.setdefault(tensor.name if alone else tensor.unit, []).append(tensor)
    parts = setup.engine == "fsdp1" and setup.use_orig_params  # each tensor's part is a parameter by itself
    for unit, tensors in units.items():
        names, shapes = [t.name for t in tensors], [t.shape for t in tensors]
        if setup.engine == "fsdp1":
            ranks = sums.shards if sums.shards > 1 else setup.world_size
            laid = splits.fsdp1(shapes, sums.shards, ranks, weight, setup.use_orig_params)
        else:
            laid = splits.flat(shapes, sums.shards)
        kinds = {sums.kinds.get(name) for name in names}
        if not parts and len(kinds) > 1:
            raise ValueError(
                f"the tensors of unit {unit or 'the rest of the model'!r} have the levels "
                f"{sorted(k[0] for k in kinds if k)}{' and some are frozen' if None in kinds else ''}, and one flat "
                f"parameter has one: use_orig_params, or one level for all"
            )
        sums.everywhere(found.weights, laid.part * weight)
        if kinds == {None}:
            continue
        sums.everywhere(found.gradients, laid.part * gradient)
        counts = sums.moments(laid, names)
        if parts:
            for s in range(sums.shards):
                found.scalars[s] += counts.held[s] * sums.scalars(1)  # no gradient, so no state, where nothing is held
            for tensor in tensors:
                if tensor.name in sums.kinds:
                    sums.norms([tensor.name], [tensor.shape])
        else:
            sums.everywhere(found.scalars, sums.scalars(len(tensors)))
            sums.norms(names, shapes)
    for tensor in sums.frozen:
        found.checkpoint_common += tensor.numel * weight


def _largest(values: list[int], number: int) -> None:
    values[:] = [max(value, number) for value in values]


_BUILD: dict[str, Callable[[Plan], None]] = {
    "single": _whole,
    "ddp": _whole,
    "zero0": _whole,
    "zro": _owners,
    "oss": _owners,
    "zero1": _zero_1_and_2,
    "zero2": _zero_1_and_2,
    "zero3": _zero_3,
    "fsdp2": _fsdp2,
    "fsdp1": _flat_units,
    "fairscale": _flat_units,
}
