"""`plan`: the bytes of every shard, engine by engine, from the splits of `splits`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import prod

from gwt_dist import owners
from gwt_dist.declare import Program
from gwt_dist.formats import FP32
from gwt_dist.memory import owned, splits
from gwt_dist.memory.count import Kind, bytes_of, count, per_tensor, summed
from gwt_dist.memory.model import ModelSpec, TensorSpec
from gwt_dist.memory.plan import MemoryPlan
from gwt_dist.memory.setup import Setup
from gwt_dist.memory.splits import Concatenation
from gwt_dist.memory.state import STEP, GroupSpec
from gwt_dist.memory.travel import Matrices


def plan(model: ModelSpec, groups: Sequence[GroupSpec], setup: Setup) -> MemoryPlan:
    """The plan of a model in these groups; tensors in no group are frozen.

    Raises `ValueError` for groups that the engine cannot have, and for what the optimizer refuses of these weights.
    """
    for group in groups:
        _check(group, setup)
    found = MemoryPlan(setup, model, groups)
    _BUILD[setup.engine](found)
    return found


def _check(group: GroupSpec, setup: Setup) -> None:
    """Raise `ValueError` for a group that `GWTAdamW` would not step with these weights."""
    programs = group.program, group.plain
    stored = sorted({f.format for program in programs for f in program.fields} - {FP32})
    if stored and setup.state_bytes == 8:
        raise ValueError(
            f"the weights are fp64 and state_dtype keeps moments in {', '.join(stored)}, which is a rounding of fp32: "
            f"a run would refuse it. Leave state_dtype out, or plan fp32 weights"
        )
    stepped = "fp32" if setup.masters else setup.weights
    if stepped != "bf16" and any(program.rounding == "stochastic" for program in programs):
        zero = setup.engine.startswith("zero")
        raise ValueError(
            f"stochastic_rounding=True is for bf16 weights without masters, and {setup.engine} steps {stepped} here: a "
            f"run would refuse it. Leave it out, or "
            f"{'plan bf16 weights under an engine without masters' if zero else 'add --weights bf16'}"
        )


class _Filler:
    """Adds tensors and parameters to a plan."""

    def __init__(self, found: MemoryPlan) -> None:
        self.plan, self.setup, self.shards = found, found.setup, found.setup.shards
        self.groups = {name: group for group in found.groups for name, _ in group.tensors}
        self.frozen = [t for t in found.model.tensors if t.name not in self.groups]
        self.matrices = Matrices()  # of the step that is being planned

    def tensors(
        self,
        laid: Concatenation,
        names: Sequence[str],
        times: int = 1,
        *,
        alone: bool = False,
        owner: int | None = None,
    ) -> None:
        """Elements and state of tensors of these names, and what a checkpoint keeps of them, `times` over.

        `alone`: each is a parameter by itself, which has no state where nothing of it is held; without it, `parameter`
        adds what there is one of a tensor. `owner`: the shard that has all of their state, and every shard the weights.
        """
        setup, found, size, first = self.setup, self.plan, self.setup.state_bytes, owner or 0
        groups = [self.groups.get(name) for name in names]
        its, kinds = _apart(laid, groups)
        counts = count(its, kinds, self.shards if owner is None else 1, size)
        stored = 0 if owner is not None else 4 if setup.masters else setup.bytes_of("weights")
        _add(found.elements, counts.elements, times, first)
        _add(found.cut, counts.cut, times, first)
        _add(found.checkpoint, counts.elements, times * stored, first)
        _add(found.checkpoint, counts.owned, times, first)
        found.checkpoint_common += times * counts.common
        for i, group in enumerate(groups):
            held = [shard for shard, _, _ in laid.intervals(i)] if alone and group else []
            if group and held:
                begin = min(held)
                once = [0] * (max(held) - begin + 1)
                for shard in held:
                    once[shard - begin] += 1
                self._once(group, group.parts(laid, i), once, begin)
        for field, numbers in counts.kept.items():
            _add(found.fields[field], numbers, times * bytes_of(field, size), first)
        if owner is None and self.shards > 1:
            found.exchange += times * counts.exchange

    def parameter(self, group: GroupSpec, parts: Sequence[owned.Part], owner: int | None = None, turn: int = 0) -> None:
        """What a parameter of these tensors has on every shard, or on `owner`, whatever is held of them."""
        tensors = [part for one in parts for part in group.parts(*one)]
        self._once(group, tensors, [1] * (self.shards if owner is None else 1), owner or 0)
        self.shared(group, parts, owner, turn)

    def _once(self, group: GroupSpec, tensors: Sequence[owned.Part], once: Sequence[int], first: int) -> None:
        """What there is one of a parameter of these tensors, or of a tensor, on some shards from `first` on."""
        _add(self.plan.steps, once, STEP, first)
        for field in per_tensor(_programs(group, tensors)):
            _add(self.plan.fields[field], once, self.setup.state_bytes * len(tensors), first)

    def shared(self, group: GroupSpec, parts: Sequence[owned.Part], owner: int | None = None, turn: int = 0) -> None:
        """What owners keep of a parameter, its places in sums over ranks, and its matrices.

        Its places are those of each program for all of its tensors; `turn` is that of the first, see `owners.turns`.
        Parameters come in the order in which the optimizer has them.
        """
        parts = [part for one in parts for part in group.parts(*one)]
        for shard, field, numbers in owned.kept(group.fields_for, parts, turn):
            place, size = shard if owner is None else owner, numbers * bytes_of(field, self.setup.state_bytes)
            self.plan.fields[field][place] += size
            self.plan.checkpoint[place] += size
        if self.shards == 1 or owner is not None:
            return
        for one in (one for program in _programs(group, parts) for one in program.sums):
            for laid, i in parts:
                places = summed(one.extent, laid.one(i), group.units_for(laid.shapes[i]))
                self.plan.norms += one.numbers * places
        for (laid, i), its in zip(parts, owned.turns(parts, turn), strict=True):
            self.matrices.add(group.program_for(laid.shapes[i]), laid, i, its)

    def step(self) -> None:
        """The parameters since the last one are those of one call of the optimizer's ``step``."""
        _add(self.plan.travelling, self.matrices.sent(self.setup), 1)
        self.matrices = Matrices()

    def everywhere(self, values: list[int], number: int) -> None:
        """Add the same number for each shard."""
        values[:] = [value + number for value in values]

    def frozen_weights(self) -> None:
        """Frozen tensors that every rank holds whole."""
        numel = sum(tensor.numel for tensor in self.frozen)
        self.everywhere(self.plan.weights, numel * self.setup.bytes_of("weights"))
        self.plan.checkpoint_common += numel * self.setup.bytes_of("weights")


def _apart(laid: Concatenation, groups: Sequence[GroupSpec | None]) -> tuple[Concatenation, tuple[Kind | None, ...]]:
    """Tensors of these groups as what they are read as, and of each its kind."""
    shapes: list[tuple[int, ...]] = []
    begins: list[int] = []
    kinds: list[Kind | None] = []
    for i, group in enumerate(groups):
        its = laid.matrices(i) if group and group.stacked else laid.one(i)
        shapes += its.shapes
        begins += its.begins
        kinds += [group.kind(its.shapes[0]) if group else None] * len(its.shapes)
    return Concatenation(tuple(shapes), tuple(begins), laid.part), tuple(kinds)


def _programs(group: GroupSpec, parts: Sequence[owned.Part]) -> set[Program]:
    return {group.program_for(laid.shapes[i]) for laid, i in parts}


def _whole(found: MemoryPlan) -> None:
    """One process, DDP, ZeRO-0: everything everywhere."""
    filler, setup = _Filler(found), found.setup
    filler.frozen_weights()
    for group in found.groups:
        for name, shape in group.tensors:
            laid = splits.flat([shape], 1)
            filler.tensors(laid, [name])
            filler.parameter(group, [(laid, 0)])
            found.weights[0] += prod(shape) * setup.bytes_of("weights")
            found.gradients[0] += prod(shape) * setup.bytes_of("gradients")
            if setup.masters:
                found.masters[0] += prod(shape) * 4
                found.step_gradients[0] += prod(shape) * 4


def _owners(found: MemoryPlan) -> None:
    """ZeroRedundancyOptimizer, OSS: whole weights and gradients everywhere, each tensor's state on one rank."""
    filler, setup = _Filler(found), found.setup
    filler.frozen_weights()
    split = splits.largest_first if setup.engine == "zro" else splits.in_order
    owners = split([[shape for _, shape in group.tensors] for group in found.groups], setup.world_size)
    for group, of_group in zip(found.groups, owners, strict=True):
        for (name, shape), rank in zip(group.tensors, of_group, strict=True):
            laid = splits.flat([shape], 1)
            filler.tensors(laid, [name], owner=rank)
            filler.parameter(group, [(laid, 0)], rank)
    trained = sum(prod(shape) for group in found.groups for _, shape in group.tensors)
    found.checkpoint_common += trained * setup.bytes_of("weights")
    filler.everywhere(found.weights, trained * setup.bytes_of("weights"))
    filler.everywhere(found.gradients, trained * setup.bytes_of("gradients"))


def _zero_1_and_2(found: MemoryPlan) -> None:
    """Weights whole, in flat buffers of a group with padding; masters, state and (stage 2) gradients in equal parts."""
    filler, setup = _Filler(found), found.setup
    filler.frozen_weights()
    alignment = 16 // setup.bytes_of("weights") if setup.parameter_alignment else 1
    for group in found.groups:
        shapes = [shape for _, shape in group.tensors]
        laid, order = splits.zero_1_and_2(shapes, filler.shards, round_robin=setup.round_robin, alignment=alignment)
        names = [group.tensors[i][0] for i in order]
        filler.tensors(laid, names)
        filler.parameter(group, [(laid, i) for i in range(len(shapes))])
        whole = sum(prod(shape) for shape in shapes)
        filler.everywhere(found.weights, laid.part * filler.shards * setup.bytes_of("weights"))
        filler.everywhere(found.masters, laid.part * 4)
        padded = laid.part * filler.shards
        held = padded if setup.bf16_optimizer else whole if setup.engine == "zero1" else laid.part
        filler.everywhere(found.gradients, held * setup.bytes_of("gradients"))
        if not setup.bf16_optimizer:  # which steps with a part of its fp32 gradients, and all groups in one call
            _largest(found.step_gradients, laid.part * 4)
            filler.step()
    filler.step()


def _zero_3(found: MemoryPlan) -> None:
    """Everything in equal slots of each tensor; small tensors whole as well."""
    filler, setup = _Filler(found), found.setup
    for group in found.groups:
        shapes = [shape for _, shape in group.tensors]
        _each(filler, group, lambda shape: splits.zero_3(shape, filler.shards))
        for buffer in splits.sub_groups(shapes, filler.shards, setup.sub_group_size):
            parts = [(splits.zero_3(shapes[i], filler.shards), 0) for i in buffer]
            slots = sum(laid.part for laid, _ in parts)
            filler.parameter(group, parts)
            filler.everywhere(found.masters, slots * 4)
            filler.everywhere(found.gradients, slots * setup.bytes_of("gradients"))
            _largest(found.step_gradients, slots * 4)
            filler.step()  # a call for each buffer
    whole = 0
    bound = setup.persistence_total
    for tensor in found.model.tensors:
        filler.everywhere(found.weights, splits.zero_3(tensor.shape, filler.shards).part * setup.bytes_of("weights"))
        if tensor.numel <= setup.persistence_threshold and (bound is None or whole + tensor.numel <= bound):
            whole += tensor.numel
    filler.everywhere(found.weights, whole * setup.bytes_of("weights"))
    _frozen_parts(filler, lambda tensor: splits.zero_3(tensor.shape, filler.shards))


def _fsdp2(found: MemoryPlan) -> None:
    """Each tensor in whole rows; what is short of rows is padded for the weight alone."""
    filler, setup = _Filler(found), found.setup
    weight, gradient = setup.bytes_of("weights"), setup.bytes_of("gradients")
    turns = iter(owners.turns([shape for group in found.groups for _, shape in group.tensors]))
    for tensor in found.model.tensors:
        filler.everywhere(found.weights, splits.rows(tensor.shape, filler.shards).part * weight if tensor.numel else 0)
    for group in found.groups:
        before = list(found.elements)
        _each(filler, group, lambda shape: splits.rows(shape, filler.shards))
        for s, (now, then) in enumerate(zip(found.elements, before, strict=True)):
            found.gradients[s] += (now - then) * gradient
        for _, shape in group.tensors:
            filler.parameter(group, [(splits.rows(shape, filler.shards), 0)], turn=next(turns))
    filler.step()
    _frozen_parts(filler, lambda tensor: splits.rows(tensor.shape, filler.shards))


def _each(filler: _Filler, group: GroupSpec, split: Callable[[tuple[int, ...]], Concatenation]) -> None:
    """Tensors that are split one by one: those of one shape at once."""
    first: dict[tuple[int, ...], str] = {}
    times: Counter[tuple[int, ...]] = Counter()
    for name, shape in group.tensors:
        first.setdefault(shape, name)
        times[shape] += 1
    for shape, name in first.items():
        filler.tensors(split(shape), [name], times[shape])


def _frozen_parts(filler: _Filler, split: Callable[[TensorSpec], Concatenation]) -> None:
    for tensor in filler.frozen:
        for shard, start, stop in split(tensor).intervals(0):
            filler.plan.checkpoint[shard] += (stop - start) * filler.setup.bytes_of("weights")


def _flat_units(found: MemoryPlan) -> None:
    """FSDP1 and fairscale: the tensors of a unit one after the other, in equal padded parts."""
    filler, setup = _Filler(found), found.setup
    weight, gradient = setup.bytes_of("weights"), setup.bytes_of("gradients")
    units: dict[str, list[TensorSpec]] = {}
    for tensor in found.model.tensors:
        alone = setup.engine == "fairscale" and not setup.flatten
        units.setdefault(tensor.name if alone else tensor.unit, []).append(tensor)
    parts = setup.engine == "fsdp1" and setup.use_orig_params  # each tensor's part is a parameter by itself
    place = {name: i for i, name in enumerate(name for group in found.groups for name, _ in group.tensors)}
    stepped: list[tuple[int, GroupSpec, list[owned.Part]]] = []
    for unit, tensors in units.items():
        names, shapes = [t.name for t in tensors], [t.shape for t in tensors]
        if setup.engine == "fsdp1":
            ranks = filler.shards if filler.shards > 1 else setup.world_size
            laid = splits.fsdp1(shapes, filler.shards, ranks, weight, setup.use_orig_params)
        else:
            laid = splits.flat(shapes, filler.shards)
        groups = [filler.groups.get(name) for name in names]
        kinds = {g and (g.level, g.wavelet, g.stacked, g.program, g.plain) for g in groups}
        if not parts and len(kinds) > 1:
            raise ValueError(
                f"the tensors of unit {unit or 'the rest of the model'!r} have the levels "
                f"{sorted({g.level for g in groups if g})}{' and some are frozen' if None in kinds else ''}, or other "
                f"keys that differ, and one flat parameter has one: use_orig_params, or the same for all (rest)"
            )
        filler.everywhere(found.weights, laid.part * weight)
        if kinds == {None}:
            continue
        filler.everywhere(found.gradients, laid.part * gradient)
        filler.tensors(laid, names, alone=parts)
        if parts:
            its = enumerate(zip(names, groups, strict=True))
            stepped += [(place[name], group, [(laid, i)]) for i, (name, group) in its if group]
        elif groups[0]:
            stepped.append((place[names[0]], groups[0], [(laid, i) for i in range(len(tensors))]))
    for _, group, held in sorted(stepped, key=lambda one: one[0]):
        (filler.shared if parts else filler.parameter)(group, held)
    filler.step()
    for tensor in filler.frozen:
        found.checkpoint_common += tensor.numel * weight


def _add(values: list[int], more: Sequence[int], factor: int, first: int = 0) -> None:
    for s, number in enumerate(more, first):
        values[s] += factor * number


def _largest(values: list[int], number: int) -> None:
    values[:] = [max(value, number) for value in values]


_BUILD: dict[str, Callable[[MemoryPlan], None]] = {
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
