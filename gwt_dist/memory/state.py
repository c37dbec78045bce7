"""Optimizer-state bytes of one rank under ZeRO, from shapes alone: what a run is told before it allocates anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

from gwt_dist import stacks
from gwt_dist.declare import Extent, Field, Program
from gwt_dist.layout import Fragment, Units
from gwt_dist.memory import owned, splits
from gwt_dist.memory.count import Kind, bytes_of, numbers, of_owner, per_tensor
from gwt_dist.memory.splits import Concatenation
from gwt_dist.recipes import DEFAULT, check_group, program_of, rule_of
from gwt_dist.stacks import number_of
from gwt_dist.units import takes, units_of

STEP = 4  # bytes of a step counter: fp32
FP32 = 4  # bytes of a number where no format is said; fp64 weights have fp64
ADAMW = "AdamW"  # what is told of tensors that their recipe does not take
Tensors = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A parameter group by shapes: the trainable tensors in order, as ``(fqn, shape)``."""

    level: int
    wavelet: str
    tensors: Tensors
    program: Program = field(default_factory=partial(program_of, {}, 1))  # of matrices of its least level or more
    plain: Program = field(default_factory=partial(program_of, {}, 0))  # of all others
    stacked: bool = False  # tensors of three dimensions are stacks of matrices

    @classmethod
    def of(cls, group: Mapping[str, Any], tensors: Tensors, where: str = "a parameter group") -> GroupSpec:
        """That of a parameter group: its ``level``, and any other key of `GWTAdamW`.

        Raises `ValueError` as `GWTAdamW` does for a key that is wrong; it says `where`.
        """
        keys = {"wavelet": "haar", "recipe": DEFAULT, **group}
        check_group(keys, where)
        rule = rule_of(keys)
        found = cls(keys["level"], keys["wavelet"], tensors, rule.program, rule.plain, keys.get("stacked", False))
        for name, shape in tensors:
            found.matrices(shape, f"{name!r} in {where},")
        return found

    def matrices(self, shape: tuple[int, ...], what: str = "a tensor") -> list[tuple[int, ...]]:
        """The shapes of the tensors that one of `shape` is read as: of a stack, those of its matrices.

        Raises `LayoutError`, which says `what`, where a stack would have more than three dimensions.
        """
        number = number_of(shape, what) if self.stacked else 0
        return [shape[1:]] * number or [shape]

    def parts(self, laid: Concatenation, number: int) -> list[owned.Part]:
        """The same of a tensor by its number, each where it lies."""
        its = laid.matrices(number) if self.stacked else laid.one(number)
        return [(its, i) for i in range(len(its.shapes))]

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether the recipe steps a tensor of `shape`, and not `ADAMW`."""
        return takes(shape, self.level, self.program.least_level)

    def program_for(self, shape: Sequence[int]) -> Program:
        """What steps a tensor of `shape`."""
        return self.program if self.takes(shape) else self.plain

    def fields_for(self, shape: Sequence[int]) -> tuple[Field, ...]:
        """What the state of a tensor of `shape` is made of."""
        return self.program_for(shape).fields

    @property
    def cell(self) -> int:
        """Coefficients of its tensors that are kept together."""
        return max(self.program.cell, self.plain.cell)

    def kind(self, shape: tuple[int, ...]) -> Kind:
        """What decides what is kept of a tensor of `shape`, without what there is one of a tensor."""
        fields = self.program_for(shape).fields
        return self.level, self.wavelet, self.cell, tuple(f for f in fields if f.extent is not Extent.TENSOR)

    def whole(self, shape: tuple[int, ...], full: int = FP32) -> int:
        """Bytes of the state of a whole tensor that is a parameter by itself; `full` as in `bytes_of`."""
        its = self.matrices(shape)
        fields = self.program_for(its[0]).fields
        kept = numbers(fields, Fragment("", its[0], 0, prod(its[0])), self.units_for(its[0]))
        of_owner_too = [*((one, n.kept) for one, n in kept), *of_owner(fields, its[0]).items()]
        return STEP + len(its) * sum(bytes_of(one, full) * number for one, number in of_owner_too)

    def units_for(self, shape: tuple[int, ...]) -> Units:
        """The units of a tensor of `shape`."""
        return units_of(shape, self.level, self.wavelet, self.cell)


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of optimizer state on one rank, by the level of the groups, beside AdamW's in fp32 on the same
    elements.
    """

    wavelet: int  # state of groups with a level but for scalars, cut units counted wherever they are kept
    cut: int  # the part of `wavelet` and `rest` that another rank owns
    wavelet_adamw: int  # what AdamW would hold for the elements of these tensors
    rest: int  # state of groups at level 0
    rest_adamw: int  # what AdamW would hold for their elements
    scalars: int  # steps, and fields of one number a tensor: limiter norms

    @property
    def total(self) -> int:
        """All state of the rank."""
        return self.wavelet + self.rest + self.scalars

    @property
    def adamw(self) -> int:
        """Moments of AdamW for the same elements."""
        return self.wavelet_adamw + self.rest_adamw


def specs(named_parameters: Iterable[tuple[str, Any]], groups: Sequence[Mapping[str, Any]]) -> list[GroupSpec]:
    """The groups that `param_groups` returned, by shapes; under `deepspeed.zero.Init` too.

    Raises `ValueError` for a key of a group that is wrong.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    return [
        GroupSpec.of(
            {key: value for key, value in group.items() if key != "params"},
            tuple((names[id(p)], tuple(getattr(p, "ds_shape", p.shape))) for p in group["params"]),
            f"parameter group {number}",
        )
        for number, group in enumerate(groups)
    ]


def plan_zero(
    groups: Sequence[GroupSpec], *, stage: int, world_size: int, rank: int, sub_group_size: int = 1_000_000_000
) -> StateBytes:
    """State bytes of `rank` under DeepSpeed ZeRO stage 1, 2 or 3 over `world_size` ranks."""
    buffers: list[tuple[GroupSpec, Sequence[Fragment]]] = []
    whole = 0
    for group in groups:
        names, shapes = [name for name, _ in group.tensors], [shape for _, shape in group.tensors]
        if stage == 3:
            laid = [
                [(splits.zero_3(shapes[i], world_size), 0) for i in buffer]
                for buffer in splits.sub_groups(shapes, world_size, sub_group_size)
            ]
        else:
            one = splits.zero_1_and_2(shapes, world_size)[0]
            laid = [[(one, i) for i in range(len(shapes))]]
        left = iter(names)
        for parts in laid:
            held = [slot.one(i).fragments([next(left)], rank)[0] for slot, i in parts]
            buffers.append((group, held))
            its = owned.kept(group.fields_for, [part for one in parts for part in group.parts(*one)])
            whole += sum(bytes_of(field) * numbers for shard, field, numbers in its if shard == rank)
    return measure(buffers, whole)


def measure(buffers: Iterable[tuple[GroupSpec, Sequence[Fragment]]], whole: int = 0) -> StateBytes:
    """State bytes for flat buffers, each of which holds `fragments` of all tensors of one optimizer parameter.

    A tensor of which the rank holds nothing is an empty fragment: what there is one of a tensor, every rank keeps.
    `whole` are the bytes that it keeps of whole matrices, in groups at level 0.
    """
    wavelet = cut = wavelet_adamw = rest_adamw = scalars = 0
    rest = whole
    for group, given in buffers:
        fragments = [part for one in given for part in (stacks.parts(one) if group.stacked else (one,))]
        programs = {group.program_for(fragment.shape) for fragment in fragments}
        scalars += STEP + FP32 * len(per_tensor(programs)) * len(fragments)
        for fragment in fragments:
            its = numbers(group.kind(fragment.shape)[-1], fragment, group.units_for(fragment.shape))
            kept = sum(bytes_of(f) * n.kept for f, n in its)
            cut += kept - sum(bytes_of(f) * n.owned for f, n in its)
            if group.level:
                wavelet += kept
                wavelet_adamw += 2 * FP32 * fragment.numel
            else:
                rest += kept
                rest_adamw += 2 * FP32 * fragment.numel
    return StateBytes(wavelet, cut, wavelet_adamw, rest, rest_adamw, scalars)
