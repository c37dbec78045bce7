"""Bytes that each rank sends of the matrices that go to a rank each and back: who holds what, and who owns it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gwt_dist.declare import Extent, Program, Travel
from gwt_dist.layout import Fragment
from gwt_dist.matrices import rows_of
from gwt_dist.memory.setup import Setup
from gwt_dist.memory.splits import Concatenation
from gwt_dist.owners import keeper, owners


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A matrix by what shards hold of it. Known by its identity: many matrices of a model are held alike."""

    shape: tuple[int, ...]
    elements: Mapping[int, int]  # of the shards that hold any
    rows: Mapping[int, int]  # that their parts touch


@lru_cache(maxsize=4096)
def held(one: Concatenation) -> Held:
    """What shards hold of the one tensor of `one`."""
    shape, elements, rows = one.shapes[0], {}, {}
    for shard, start, stop in one.intervals(0):
        elements[shard] = stop - start
        rows[shard] = rows_of(Fragment("", shape, start, stop)).numel
    return Held(shape, elements, rows)


class Matrices:
    """Those of one step of the optimizer, by program, in the order of its parameters."""

    def __init__(self) -> None:
        self._by_program: dict[Program, list[tuple[Held, int]]] = {}

    def add(self, program: Program, laid: Concatenation, number: int, turn: int) -> None:
        """A tensor by its number and turn, see `owners.turns`, stepped by `program`, which may leave it where it is."""
        if program.travels and 0 not in laid.shapes[number]:
            self._by_program.setdefault(program, []).append((held(laid.one(number)), turn))

    def sent(self, setup: Setup) -> list[int]:
        """Bytes that each shard sends: its parts of the matrices of others, and of its own the parts of others back."""
        found = [0] * setup.shards
        for program, matrices in self._by_program.items():
            its = [one for one, _ in matrices]
            if program.names(Extent.OWNED):
                owner_of = [keeper(one.elements, turn) for one, turn in matrices]
            else:
                owner_of = owners([one.shape for one in its], [one.elements for one in its], setup.shards)
            for phase in program.phases:
                if isinstance(phase, Travel):
                    sizes = setup.bytes_of_products(phase.products), setup.state_bytes * len(phase.rows)
                    _add(found, its, owner_of, *sizes)
        return found


def _add(found: list[int], its: Sequence[Held], owner_of: Sequence[int], an_element: int, a_row: int) -> None:
    size = {
        one: {shard: numel * an_element + one.rows[shard] * a_row for shard, numel in one.elements.items()}
        for one in set(its)
    }
    whole = {one: sum(of_shard.values()) for one, of_shard in size.items()}
    for one, times in Counter(its).items():
        for shard, its_size in size[one].items():
            found[shard] += times * its_size
    for one, owner in zip(its, owner_of, strict=True):
        own = size[one].get(owner, 0)
        found[owner] += whole[one] - 2 * own  # it keeps its own part, and sends all others back
