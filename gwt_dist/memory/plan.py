"""Bytes of every rank of a run that is not there yet: weights, gradients, masters, moments, cut units, collectives.

State, cut units, exchange, masters and the model's own weights are exact. Gradients are those that an engine holds at
the end of a backward pass. Activations and an engine's buffers for communication are not counted.

Ranks that hold the same are one shard, so a plan has one number a shard; replicas repeat them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod

from gwt_dist import layout
from gwt_dist.memory import splits
from gwt_dist.memory.model import ModelSpec, TensorSpec
from gwt_dist.memory.splits import Concatenation
from gwt_dist.memory.state import GroupSpec
from gwt_dist.units import coefficients, level_of, units_of

DTYPES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
ENGINES = ("single", "ddp", "zro", "oss", "zero0", "zero1", "zero2", "zero3", "fsdp2", "fsdp1", "fairscale")
MESHES = ("fsdp2", "fsdp1")  # those that may shard over a part of the ranks and replicate over the rest
STEP = 4  # bytes of a step counter: fp32
NORM = 8  # bytes of a squared norm in its collective: fp64


@dataclass(frozen=True, slots=True)
class Setup:
    """An engine and what of its settings changes bytes; see `gwt-dist plan --help`."""

    engine: str
    world_size: int = 1
    replicas: int = 1  # HSDP, HYBRID_SHARD: the mesh is replicas x shards
    weights: str = "bf16"
    gradients: str | None = None  # as the weights
    offload: str = "none"  # "optimizer": masters and state on the host; "weights"; "both"
    sub_group_size: int = 1_000_000_000
    round_robin: bool = False
    parameter_alignment: bool = False
    persistence_threshold: int = 100_000  # ZeRO-3 keeps tensors of at most so many elements whole as well
    persistence_total: int | None = None  # ... and of all of them no more than this; None: no bound
    use_orig_params: bool = True  # FSDP1
    flatten: bool = True  # fairscale
    keeps_masters: bool | None = None  # None: as the engine does by itself

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine {self.engine!r} must be one of {', '.join(ENGINES)}")
        for key, value in (("weights", self.weights), ("gradients", self.gradients or self.weights)):
            if value not in DTYPES:
                raise ValueError(f"dtype {value!r} of {key} must be one of {', '.join(DTYPES)}")
        if self.world_size < 1 or self.replicas < 1 or self.world_size % self.replicas:
            raise ValueError(f"{self.world_size} ranks cannot be {self.replicas} replicas of equal size")
        if self.engine == "single" and self.world_size > 1:
            raise ValueError(f"engine single is one process, not {self.world_size}; choose another, such as ddp")
        if self.replicas > 1 and self.engine not in MESHES:
            raise ValueError(f"{self.engine} has no mesh of replicas; {' and '.join(MESHES)} have")
        if self.offload not in ("none", "optimizer", "weights", "both"):
            raise ValueError(f"offload {self.offload!r} must be none, optimizer, weights or both")
        allowed = {"zero1": ("optimizer",), "zero2": ("optimizer",), "fsdp2": ("both",)}.get(self.engine, ())
        if self.offload not in ("none", *(allowed if self.engine != "zero3" else ("optimizer", "weights", "both"))):
            raise ValueError(
                f"{self.engine} cannot offload {self.offload}; zero1 and zero2 can the optimizer, zero3 each, and "
                f"fsdp2 both at once (CPUOffloadPolicy)"
            )
        if self.sub_group_size < 1:
            raise ValueError(f"sub_group_size={self.sub_group_size} must be at least 1")

    @property
    def shards(self) -> int:
        """Ranks that hold different things of one tensor."""
        return self.world_size // self.replicas if self.engine not in ("single", "ddp", "zero0") else 1

    @property
    def masters(self) -> bool:
        """fp32 copies of the weights that the optimizer steps."""
        if self.keeps_masters is not None:
            return self.keeps_masters
        return self.engine in ("zero1", "zero2", "zero3") or (self.engine == "zero0" and self.weights != "fp32")

    @property
    def state_bytes(self) -> int:
        """Of one moment: fp64 for fp64 weights, fp32 for all others."""
        return 8 if self.weights == "fp64" and not self.masters else 4

    def bytes_of(self, what: str) -> int:
        """Of an element of "weights" or "gradients"."""
        return DTYPES[self.weights if what == "weights" else self.gradients or self.weights]


@dataclass(slots=True)
class Plan:
    """Bytes by shard, one number each; `of_rank` says which shard a rank has."""

    setup: Setup
    model: ModelSpec
    groups: Sequence[GroupSpec]
    weights: list[int] = field(default_factory=list)
    masters: list[int] = field(default_factory=list)
    gradients: list[int] = field(default_factory=list)
    step_gradients: list[int] = field(default_factory=list)  # fp32, of one buffer at a time, beside masters
    wavelet: list[int] = field(default_factory=list)  # both moments of tensors with level > 0
    cut: list[int] = field(default_factory=list)  # the part of `wavelet` that another rank owns
    rest: list[int] = field(default_factory=list)  # both moments of level-0 tensors
    scalars: list[int] = field(default_factory=list)  # steps and limiter norms
    elements: list[int] = field(default_factory=list)  # trained elements, not bytes
    checkpoint: list[int] = field(default_factory=list)  # what a shard's ranks write between them
    checkpoint_common: int = 0  # what all ranks hold alike, of which each writes a part
    exchange: int = 0  # elements of all cut units in the sum that completes them, each step
    norms: int = 0  # squared norms in their sum, each step

    @property
    def state(self) -> list[int]:
        """All optimizer state."""
        return [sum(x) for x in zip(self.wavelet, self.rest, self.scalars, strict=True)]

    @property
    def total(self) -> list[int]:
        """Everything that is counted, on device and host together."""
        return [sum(x) for x in zip(self.device, self.host, strict=True)]

    @property
    def device(self) -> list[int]:
        """What is not offloaded."""
        return self._sum(host=False)

    @property
    def host(self) -> list[int]:
        """What is offloaded."""
        return self._sum(host=True)

    @property
    def whole_checkpoint(self) -> int:
        """Bytes of all tensors of a checkpoint, each element once."""
        return sum(self.checkpoint) + self.checkpoint_common

    def of_rank(self, rank: int) -> int:
        """The shard of a rank: neighbours shard, ranks further apart are replicas (a mesh of replicas x shards)."""
        return rank % self.setup.shards

    def _sum(self, host: bool) -> list[int]:
        offload = self.setup.offload
        optimizer = [*zip(self.masters, self.state, self.step_gradients, strict=True)]
        weights = self.weights
        gradients = self.gradients
        no = [0] * len(weights)
        moved = offload in ("optimizer", "both")
        # FSDP2's CPUOffloadPolicy keeps gradient shards on the host as well, ZeRO-Offload the fp32 ones it steps with.
        on_host = (
            weights if offload in ("weights", "both") else no,
            gradients if moved and self.setup.engine == "fsdp2" else no,
            [sum(o) for o in optimizer] if moved else no,
        )
        everything = [sum(x) for x in zip(weights, gradients, map(sum, optimizer), strict=True)]
        hosted = [sum(x) for x in zip(*on_host, strict=True)]
        return hosted if host else [a - b for a, b in zip(everything, hosted, strict=True)]


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of the tensors of a `Concatenation`, by shard."""

    elements: tuple[int, ...]
    wavelet: tuple[int, ...]  # coefficients, of one moment
    cut: tuple[int, ...]
    rest: tuple[int, ...]
    held: tuple[int, ...]  # tensors with any element
    exchange: int


_Kind = tuple[int, str]  # level and wavelet of a tensor's group


@lru_cache(maxsize=4096)
def _count(laid: Concatenation, kinds: tuple[_Kind | None, ...], shards: int) -> _Counts:
    """What `shards` ranks keep of the tensors of kind not None."""
    elements, wavelet, cut, rest, held = ([0] * shards for _ in range(5))
    exchange = 0
    for number, (shape, kind) in enumerate(zip(laid.shapes, kinds, strict=True)):
        if kind is None:
            continue
        level, name = kind
        units = units_of(shape, level, name)
        kept = wavelet if level_of(shape, level) else rest
        starts = []
        for shard, start, stop in laid.intervals(number):
            first, last = units.index(start), units.index(stop - 1) + 1
            elements[shard] += stop - start
            held[shard] += 1
            kept[shard] += (last - first) * units.coefficients
            if units.bounds(first)[0] < start and kept is wavelet:
                cut[shard] += units.coefficients
            if start:
                starts.append(start)
        tensor = layout.Tensor("", shape, tuple(starts))
        exchange += layout.plan_exchange([tensor], [], lambda shape, units=units: units).length  # type: ignore[misc]
    return _Counts(*map(tuple, (elements, wavelet, cut, rest, held)), exchange)  # type: ignore[arg-type]


def plan(model: ModelSpec, groups: Sequence[GroupSpec], setup: Setup) -> Plan:
    """The plan of a model in these groups; tensors in no group are frozen.

    Raises `ValueError` for groups that the engine cannot have.
    """
    found = Plan(setup, model, groups)
    shards = setup.world_size if setup.engine in ("zro", "oss") else setup.shards
    for values in (found.wavelet, found.cut, found.rest, found.scalars, found.elements, found.checkpoint):
        values += [0] * shards
    found.weights, found.gradients = [0] * shards, [0] * shards
    found.masters, found.step_gradients = [0] * shards, [0] * shards
    _BUILD[setup.engine](found)
    return found


class _Sums:
    """Adds tensors to a plan."""

    def __init__(self, found: Plan) -> None:
        self.plan, self.setup = found, found.setup
        self.kinds = {name: (g.level, g.wavelet) for g in found.groups for name, _ in g.tensors}
        self.limited = {name: g.limited for g in found.groups for name, _ in g.tensors}
        self.frozen = [t for t in found.model.tensors if t.name not in self.kinds]
        self.shards = len(found.weights)

    def moments(self, laid: Concatenation, names: Sequence[str], times: int = 1) -> _Counts:
        """Moments of tensors of these names, and what a checkpoint keeps of them, `times` over."""
        setup, found = self.setup, self.plan
        counts = _count(laid, tuple(self.kinds.get(name) for name in names), self.shards)
        moment = 2 * setup.state_bytes
        stored = 4 if setup.masters else setup.bytes_of("weights")
        for s in range(self.shards):
            found.elements[s] += times * counts.elements[s]
            found.wavelet[s] += times * moment * counts.wavelet[s]
            found.cut[s] += times * moment * counts.cut[s]
            found.rest[s] += times * moment * counts.rest[s]
            owned = counts.wavelet[s] - counts.cut[s] + counts.rest[s]
            found.checkpoint[s] += times * (stored * counts.elements[s] + moment * owned)
        if self.shards > 1:
            found.exchange += times * counts.exchange
        return counts

    def scalars(self, tensors: int) -> int:
        """Bytes of the step and the norms of a parameter that stands for so many tensors."""
        return STEP + self.setup.state_bytes * tensors

    def everywhere(self, values: list[int], number: int) -> None:
        """Add the same number for each shard."""
        values[:] = [value + number for value in values]

    def norms(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        """A parameter's places in the sum of norms: one a tensor, if any of them has a level."""
        if self.shards > 1 and self.limited[names[0]]:
            if any(level_of(shape, self.kinds[name][0]) for name, shape in zip(names, shapes, strict=True)):
                self.plan.norms += len(names)

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
    moment = 2 * setup.state_bytes
    for group, of_group in zip(found.groups, owners, strict=True):
        for (_, shape), rank in zip(group.tensors, of_group, strict=True):
            kept = moment * coefficients(shape, group.level, group.wavelet)
            (found.wavelet if level_of(shape, group.level) else found.rest)[rank] += kept
            found.scalars[rank] += sums.scalars(1)
            found.elements[rank] += prod(shape)
            found.checkpoint[rank] += kept
            found.checkpoint_common += prod(shape) * setup.bytes_of("weights")
            sums.everywhere(found.weights, 0)
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
        held = whole if setup.engine == "zero1" else laid.part
        sums.everywhere(found.gradients, held * setup.bytes_of("gradients"))
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
            laid = splits.fsdp1(shapes, sums.shards, weight, setup.use_orig_params)
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


def at_level(groups: Sequence[GroupSpec], level: int) -> list[GroupSpec]:
    """The same groups with `level` in the place of every level above 0."""
    return [replace(group, level=level) if group.level else group for group in groups]
