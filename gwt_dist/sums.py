"""Where the sums of a phase stand in one vector, and over which ranks each part of it is summed.

    | one a tensor, one a place in a row  | one a row that ranks share      | one a row of this rank alone |
    | over all ranks that hold the tensor | over those that hold that row   | over none                    |

The first two parts follow from layouts and programs alone, so they are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch.distributed import ProcessGroup

from gwt_dist import extents
from gwt_dist.declare import Extent, Pass, Program, Sum
from gwt_dist.kernels import Place
from gwt_dist.piece import Piece
from gwt_dist.plan import Plan

Groups = tuple[ProcessGroup, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """The tensors of one parameter that one program steps."""

    member: int  # number of the parameter
    plan: Plan
    program: Program
    takes: frozenset[bool]  # whether it steps tensors that the recipe's own program takes, the others, or both
    frozen: frozenset[str] = frozenset()  # names of the tensors that stay as they are; all ranks sum over them too

    @property
    def key(self) -> tuple[int, int]:
        """What it is known by in a schedule."""
        return self.member, id(self.program)

    def pieces(self) -> list[tuple[int, Piece]]:
        """Its pieces that it steps, of which this rank holds anything, and their numbers in the plan."""
        return [
            (i, p)
            for i, p in enumerate(self.plan.pieces)
            if p.touched and self.plan.form.takes(p.fragment.shape) in self.takes and p.fragment.fqn not in self.frozen
        ]

    def sums(self, phase: int) -> tuple[Sum, ...]:
        """Of phase number `phase`; none where the program has fewer phases."""
        its = self.program.phases[phase] if phase < len(self.program.phases) else None
        return its.sums if isinstance(its, Pass) else ()


@dataclass(slots=True)
class Sums:
    """The vector of one phase."""

    parts: list[tuple[int, Groups]] = field(default_factory=list)  # lengths, and over which groups they are summed
    length: int = 0
    # By member and program (its identity, which is quick to hash): the first part of an entry, places of its pieces.
    spans: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    places: dict[tuple[int, int, int], tuple[Place, ...]] = field(default_factory=dict)

    @property
    def over(self) -> tuple[list[int], list[Groups]]:
        """Lengths of the parts, and the groups of each, for `comm.sum_over_ranks`."""
        return [length for length, _ in self.parts], [groups for _, groups in self.parts]

    def span(self, entry: Entry) -> tuple[int, int]:
        """First number of an entry in the first part, and the one after the last."""
        return self.spans[entry.key]

    def of(self, entry: Entry, piece: int) -> tuple[Place, ...]:
        """The places of a piece, by its number in the plan."""
        return self.places[(*entry.key, piece)]

    def take(self, length: int, groups: Groups) -> range:
        """The next `length` numbers."""
        if self.parts and self.parts[-1][1] == groups:
            self.parts[-1] = self.parts[-1][0] + length, groups
        else:
            self.parts.append((length, groups))
        self.length += length
        return range(self.length - length, self.length)


def lay_out(entries: Sequence[Entry], phase: int) -> Sums:
    """The vector of phase number `phase`: the entries of one program after those of another."""
    sums = Sums()
    # (entry, sum, tensor) and, of rows, (entry, sum, tensor, row) -> the places of all numbers
    places: dict[tuple[object, ...], range] = {}
    for n, entry in enumerate(entries):
        before = sums.length
        for one in entry.sums(phase):
            for tensor in entry.plan.shard.tensors if one.extent is not Extent.ROW else ():
                units = entry.plan.form.units(tensor.shape)
                length = one.numbers * extents.summed(one.extent, tensor, units)
                places[n, one.name, tensor.fqn] = sums.take(length, entry.plan.shard.groups)
        sums.spans[entry.key] = before, sums.length
    for n, entry in enumerate(entries):
        for one in entry.sums(phase):
            for tensor in entry.plan.shard.tensors if one.extent is Extent.ROW else ():
                for row in extents.shared_rows(tensor):
                    places[n, one.name, tensor.fqn, row] = sums.take(one.numbers, entry.plan.shard.row_groups)
    for n, entry in enumerate(entries):
        for number, piece in entry.pieces():
            found = []
            for one in entry.sums(phase):
                key = n, one.name, piece.fragment.fqn
                index: Sequence[int] = places.get(key, range(0))
                if one.extent is Extent.ROW:
                    its = [(*key, row) for row in range(piece.first_row, piece.first_row + piece.rows)]
                    for place in its:
                        if place not in places:
                            places[place] = sums.take(one.numbers, ())
                    index = [places[place][i] for i in range(one.numbers) for place in its]
                found.append(Place(one.name, one.extent, one.numbers, index))
            sums.places[(*entry.key, number)] = tuple(found)
    return sums
