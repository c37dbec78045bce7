"""What is fixed about one optimizer parameter: its pieces, its part in the collectives, its state, field by field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gwt_dist import dtensor, exchange, extents, owners
from gwt_dist.comm import Shard
from gwt_dist.declare import Extent, Field, Rule
from gwt_dist.layout import Fragment, Units
from gwt_dist.piece import Piece, moments_shape, stored_dtype
from gwt_dist.units import takes, units_of

_ORDER = list(Extent)


@dataclass(frozen=True, slots=True)
class Form:
    """What decides which state a parameter has."""

    level: int
    wavelet: str
    leveled: tuple[Field, ...]  # of tensors with level > 0
    plain: tuple[Field, ...]  # of all others
    formula: str  # where the state of tensors with level > 0 comes from, so what it means
    least_level: int = 1  # of the tensors that are stepped by it
    cell: int = 1  # coefficients that are kept together
    stacked: bool = False  # tensors of three dimensions are read as their matrices

    @classmethod
    def of(cls, level: int, wavelet: str, rule: Rule, stacked: bool = False) -> Form:
        """That of a group of these options."""
        program, plain = rule.program, rule.plain
        cell = max(program.cell, plain.cell)
        return cls(level, wavelet, program.fields, plain.fields, program.formula, program.least_level, cell, stacked)

    def takes(self, shape: Sequence[int]) -> bool:
        """Whether the recipe's own program steps a tensor of `shape`; else the plain one does."""
        return takes(shape, self.level, self.least_level)

    def fields(self, shape: Sequence[int]) -> tuple[Field, ...]:
        """Of a tensor of `shape`."""
        return self.leveled if self.takes(shape) else self.plain

    def units(self, shape: tuple[int, ...]) -> Units:
        """The units of a tensor of `shape`."""
        return units_of(shape, self.level, self.wavelet, self.cell)

    def __str__(self) -> str:
        names = ", ".join(map(str, self.leveled))
        stacked = ", stacked=True" if self.stacked else ""
        return f"level={self.level}, wavelet={self.wavelet!r}{stacked} with {names} by {self.formula}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One optimizer parameter for as long as its layout lasts."""

    shard: Shard
    form: Form
    pieces: tuple[Piece, ...]
    exchange: exchange.Exchange
    places: dict[str, int]  # fqn -> place in fields and sums that have one number a tensor
    fields: tuple[Field, ...]  # of any of its tensors, on whichever rank
    shapes: dict[str, tuple[int, ...]]  # of this rank's buffer of each field
    keepers: dict[str, int]  # fqn -> the place among the peers that keeps its OWNED fields, if it has any
    owned: dict[str, dict[str, Fragment]]  # fqn -> what this rank keeps of each OWNED field, where it is the keeper

    @classmethod
    def of(cls, shard: Shard, form: Form, turn: int = 0) -> Plan:
        """The plan of a shard whose group has this form; `turn` of its first tensor, see `owners.turns`."""
        found = dict.fromkeys(f for tensor in shard.tensors for f in (*form.plain, *form.leveled)
                              if f in form.fields(tensor.shape))  # fmt: skip
        fields = tuple(sorted(found, key=lambda f: _ORDER.index(f.extent)))
        places = {tensor.fqn: i for i, tensor in enumerate(shard.tensors)}
        kept = _pack(shard.fragments, form, fields, places)
        turns = owners.turns([tensor.shape for tensor in shard.tensors])
        keepers = _keepers(shard, form, [turn + its for its in turns])
        owned = _owned(shard, form, fields, keepers)
        pieces = []
        for fragment, its in zip(shard.fragments, kept, strict=True):
            units = form.units(fragment.shape)
            coefficients = next((f for f in form.fields(fragment.shape) if f.extent is Extent.UNIT), None)
            moments = its[coefficients.name] if coefficients else units.moments(fragment)
            pieces.append(Piece.of(fragment, moments, form.level, form.wavelet, its, form.cell))
        return cls(
            shard=shard,
            form=form,
            pieces=tuple(pieces),
            exchange=exchange.plan_exchange(shard.tensors, shard.fragments, form.units),
            places=places,
            fields=fields,
            shapes={field.name: _shape(shard, form, field, [*kept, *owned.values()]) for field in fields},
            keepers=keepers,
            owned=owned,
        )

    def fresh_state(self, parameter: Tensor, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """State before the first step, sharded as `parameter` is; on its device, if no other is named."""
        device = parameter.device if device is None else device
        state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
        shape, number = self.shard.tensors[0].shape, len(self.shard.stacks)
        stack = (number,) if self.shard.is_stack else ()
        for field in self.fields:
            dtype = stored_dtype(field, parameter.dtype)
            zeros = torch.zeros(self.shapes[field.name], dtype=dtype, device=device)
            if field.extent in extents.SHARDED and self.shard.local_shape is not None:
                units = extents.units_along(field.extent, shape, self.form.units(shape))
                zeros = dtensor.wrap(zeros, parameter, (*stack, *_whole(field, shape, self.form)), units, number)
            elif field.extent is not Extent.TENSOR and stack:
                zeros = dtensor.wrap_stack(zeros, parameter, (*stack, *_whole(field, shape, self.form)))
            elif field.extent in (Extent.COLUMN, Extent.OWNED) and self.shard.local_shape is not None:
                keep = self._keep(field)
                if len(keep) < self.shard.peers.world_size:
                    zeros = dtensor.of_some(zeros, parameter, _whole(field, shape, self.form), keep)
            state[field.name] = zeros
        return state

    def _keep(self, field: Field) -> list[int]:
        """The ranks that keep all of a field that is not sharded, of the one tensor that there is."""
        peers, fqn = self.shard.peers, self.shard.tensors[0].fqn
        if field.extent is Extent.OWNED and fqn in self.keepers:
            return [peers.ranks[self.keepers[fqn]]]
        held = [any(fragment.numel for fragment in peers.fragments(place)) for place in range(peers.world_size)]
        return [rank for rank, is_held in zip(peers.ranks, held, strict=True) if is_held or not any(held)]


def _pack(
    fragments: Sequence[Fragment], form: Form, fields: Sequence[Field], places: dict[str, int]
) -> list[dict[str, Fragment]]:
    """Of each fragment, what is kept of each field, one after the other in one buffer a field.

    Fragments with more numbers a coefficient come first: then theirs lie at the same place of longer and shorter
    buffers, where the fields of some tensors are among those of the others.
    """
    its_fields = [form.fields(fragment.shape) for fragment in fragments]
    coefficients = [sum(f.extent is Extent.UNIT for f in its) for its in its_fields]
    kept: list[dict[str, Fragment]] = [{} for _ in fragments]
    for field in fields:
        offset = 0
        for i in sorted(range(len(fragments)), key=lambda i: -coefficients[i]):
            if field in its_fields[i] and field.extent is not Extent.OWNED:
                fragment = fragments[i]
                at = places[fragment.fqn] if field.extent is Extent.TENSOR else offset
                kept[i][field.name] = extents.kept(field.extent, fragment, form.units(fragment.shape), at)
                offset += kept[i][field.name].numel
    return kept


def _keepers(shard: Shard, form: Form, turns: Sequence[int]) -> dict[str, int]:
    """Of each tensor with OWNED fields, who keeps them."""
    held: dict[str, dict[int, int]] = {}
    for tensor in shard.tensors:
        if prod(tensor.shape) and any(field.extent is Extent.OWNED for field in form.fields(tensor.shape)):
            held[tensor.fqn] = {}
    for place in range(shard.peers.world_size) if held else ():
        for fragment in shard.peers.fragments(place):
            if fragment.numel and (its := held.get(fragment.fqn)) is not None:
                its[place] = its.get(place, 0) + fragment.numel
    turn = {tensor.fqn: its for tensor, its in zip(shard.tensors, turns, strict=True)}
    return {fqn: owners.keeper(its, turn[fqn]) for fqn, its in held.items()}


def _owned(
    shard: Shard, form: Form, fields: Sequence[Field], keepers: Mapping[str, int]
) -> dict[str, dict[str, Fragment]]:
    """Of each tensor that this rank keeps, its OWNED fields, one after the other in one buffer a field."""
    offsets: dict[str, int] = {}
    found: dict[str, dict[str, Fragment]] = {}
    for tensor in shard.tensors:
        for field in fields if keepers.get(tensor.fqn) == shard.peers.here else ():
            if field.extent is Extent.OWNED and field in form.fields(tensor.shape):
                shape = extents.of_owner(field, tensor.shape)
                its = Fragment(tensor.fqn, shape, 0, prod(shape), offsets.get(field.name, 0))
                offsets[field.name] = its.offset + its.numel
                found.setdefault(tensor.fqn, {})[field.name] = its
    return found


def _shape(shard: Shard, form: Form, field: Field, kept: Sequence[dict[str, Fragment]]) -> tuple[int, ...]:
    """Of this rank's buffer of a field: one vector for a flat parameter, else as the local part is.

    Of a stack, one matrix after the other.
    """
    if field.extent is Extent.TENSOR:
        return () if shard.local_shape is not None and not shard.is_stack else (len(shard.tensors),)
    numbers = sum(its[field.name].numel for its in kept if field.name in its)
    if shard.local_shape is None or (field.extent in (Extent.COLUMN, Extent.OWNED) and not (numbers or shard.is_stack)):
        return (numbers,)
    local, shape = shard.local_shape, shard.tensors[0].shape
    whole = _whole(field, shape, form)
    if shard.is_stack:
        return _shape_of_stack(field, local, whole, numbers)
    if field.extent in (Extent.COLUMN, Extent.OWNED):
        return whole
    # Level 0, or rows of one element, of which no cell is cut.
    if field.extent is Extent.UNIT and whole == tuple(shape) and numbers == prod(local):
        return tuple(local)
    if field.extent is Extent.ROW:
        return numbers, 1
    if len(shape) < 2:  # a vector of which a cell is cut, or cells of a vector
        return (numbers,)
    return local[0], numbers // local[0] if numbers else whole[1]


def _shape_of_stack(field: Field, local: tuple[int, ...], whole: tuple[int, ...], numbers: int) -> tuple[int, ...]:
    """Of this rank's buffer of a field of a stack: that of a matrix, `whole`, with the matrices before it.

    One vector where ranks that hold parts of the same matrices keep fields of some of these.
    """
    matrices, rows = local[:2]
    if field.extent in extents.SHARDED:
        return matrices, rows, numbers // (matrices * rows) if numbers else whole[1]
    return (matrices, *whole) if numbers == matrices * prod(whole) else (numbers,)


def _whole(field: Field, shape: tuple[int, ...], form: Form) -> tuple[int, ...]:
    """Of the whole field of a tensor of `shape`."""
    if field.extent is Extent.UNIT:
        return moments_shape(shape, form.level, form.wavelet)
    if field.extent is Extent.OWNED:
        return extents.of_owner(field, shape)
    whole = extents.whole(field.extent, shape, form.units(shape))
    # Vectors, as coefficients of a vector are.
    return whole[1:] if field.extent is Extent.COLUMN or (field.extent is Extent.CELL and len(shape) < 2) else whole
