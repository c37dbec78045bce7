"""What one rank keeps of each whole matrix, by who holds most of it: fields that are an owner's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod

from gwt_dist import owners
from gwt_dist.declare import Field
from gwt_dist.memory.count import of_owner
from gwt_dist.memory.splits import Concatenation
from gwt_dist.memory.travel import held

Part = tuple[Concatenation, int]  # a tensor, by its number
Tensors = Iterable[tuple[str, tuple[int, ...]]]  # names and shapes


def turns(tensors: Tensors) -> dict[str, int]:
    """By name, the turn of each tensor among all that the optimizer is given: see `owners.turns`."""
    named = dict(tensors)
    return dict(zip(named, owners.turns(list(named.values())), strict=True))


def kept(
    fields_of: Callable[[tuple[int, ...]], Iterable[Field]], parts: Sequence[Part], its_turns: Sequence[int]
) -> Iterable[tuple[int, Field, int]]:
    """A shard, a field and its numbers, for each OWNED field of each tensor of a parameter; `fields_of` a shape."""
    for (laid, number), turn in zip(parts, its_turns, strict=True):
        shape = laid.shapes[number]
        fields = of_owner(fields_of(shape), shape) if prod(shape) else {}
        if fields:
            shard = owners.keeper(held(laid.one(number)).elements, turn)
            yield from ((shard, field, numbers) for field, numbers in fields.items())
