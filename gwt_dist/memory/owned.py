"""What one rank keeps of each whole matrix, by who holds most of it: fields that are an owner's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

from gwt_dist import owners
from gwt_dist.declare import Field
from gwt_dist.memory.count import of_owner
from gwt_dist.memory.splits import Concatenation
from gwt_dist.memory.travel import held

Part = tuple[Concatenation, int]  # a tensor, by its number


def kept(
    fields_of: Callable[[tuple[int, ...]], Iterable[Field]], parts: Sequence[Part], turn: int = 0
) -> Iterator[tuple[int, Field, int]]:
    """A shard, a field and its numbers, for each OWNED field of each tensor of a parameter; `fields_of` a shape.

    `turn` is that of its first tensor, see `owners.turns`.
    """
    for (laid, number), its in zip(parts, turns(parts, turn), strict=True):
        shape = laid.shapes[number]
        fields = of_owner(fields_of(shape), shape) if prod(shape) else {}
        if fields:
            shard = owners.keeper(held(laid.one(number)).elements, its)
            yield from ((shard, field, numbers) for field, numbers in fields.items())


def turns(parts: Sequence[Part], turn: int = 0) -> list[int]:
    """Of each tensor of a parameter."""
    return [turn + its for its in owners.turns([laid.shapes[number] for laid, number in parts])]
