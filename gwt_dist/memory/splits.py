"""What each engine leaves on its ranks, by arithmetic on shapes: lengths, gaps and paddings are written here alone.

Every engine that shards lays tensors one after the other and cuts them into equal parts, one a shard:

    tensors   |-- a --|.|---- b ----|- c -|...|        . is padding: between tensors, or at the end
    shards    |   part 0  |   part 1  | part 2 |

ZeRO-1 and 2 do it with the tensors of a group, FSDP1 with those of a unit, ZeRO-3 with each tensor alone, and FSDP2
with each tensor in whole rows. What an engine really made is read in `engines`; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from math import ceil, prod

from gwt_dist import stacks
from gwt_dist.layout import Fragment, columns_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Concatenation:
    """Tensors of `shapes`, each from its element in `begins` on, cut into parts of `part` elements."""

    shapes: tuple[Shape, ...]
    begins: tuple[int, ...]
    part: int

    def held(self, shard: int) -> list[tuple[int, int]]:
        """``(start, stop)`` of each tensor on one shard; ``(0, 0)`` of those that it holds nothing of."""
        low, high = shard * self.part, (shard + 1) * self.part
        found = []
        for shape, begin in zip(self.shapes, self.begins, strict=True):
            start, stop = max(begin, low), min(begin + prod(shape), high)
            found.append((start - begin, stop - begin) if start < stop else (0, 0))
        return found

    def fragments(self, names: Sequence[str], shard: int) -> list[Fragment]:
        """`held` as fragments of tensors of these names; their offsets are left at 0."""
        held = zip(names, self.shapes, self.held(shard), strict=True)
        return [Fragment(name, shape, *interval) for name, shape, interval in held]

    def one(self, number: int) -> Concatenation:
        """A tensor by itself where it lies: quick to hash, whatever stands beside it, so that counts are kept by it."""
        return Concatenation((self.shapes[number],), (self.begins[number],), self.part)

    def matrices(self, number: int) -> Concatenation:
        """A tensor by itself as its matrices, if it is a stack of them: who holds what of which stays as it is."""
        one, matrices = self.one(number), stacks.number_of(self.shapes[number])
        if not matrices:
            return one
        shape = self.shapes[number][1:]
        begins = tuple(one.begins[0] + i * prod(shape) for i in range(matrices))
        return Concatenation((shape,) * matrices, begins, self.part)

    def intervals(self, number: int) -> Iterator[tuple[int, int, int]]:
        """``(shard, start, stop)`` of tensor `number` on the shards that hold any of it, in order."""
        begin, numel = self.begins[number], prod(self.shapes[number])
        start = 0
        while start < numel:
            shard = (begin + start) // self.part
            stop = min(numel, (shard + 1) * self.part - begin)
            yield shard, start, stop
            start = stop


def flat(shapes: Sequence[Shape], shards: int, *, multiple: int = 1, starts: int = 1) -> Concatenation:
    """Tensors in equal parts of a multiple of `multiple` elements; each tensor begins at a multiple of `starts`."""
    begins, end = [], 0
    for shape in shapes:
        end = _up(end, starts)
        begins.append(end)
        end += prod(shape)
    return Concatenation(tuple(shapes), tuple(begins), max(1, _up(ceil(end / shards), multiple)))


def zero_1_and_2(
    shapes: Sequence[Shape], shards: int, *, round_robin: bool = False, alignment: int = 1
) -> tuple[Concatenation, list[int]]:
    """The tensors of a group in equal parts of an even number of elements, and their order.

    `round_robin`: every tensor to the next rank, as ``round_robin_gradients`` has it. `alignment`: elements in 16
    bytes with ``parameter_alignment``. `BF16_Optimizer` lays its buffers out in the same way.
    """
    order = list(range(len(shapes)))
    if round_robin:
        order = [i for first in range(shards) for i in order[first::shards]]
    return flat([shapes[i] for i in order], shards, multiple=2, starts=alignment), order


def zero_3(shape: Shape, shards: int) -> Concatenation:
    """A tensor in equal slots."""
    return flat([shape], shards)


def sub_groups(shapes: Sequence[Shape], shards: int, sub_group_size: int) -> list[list[int]]:
    """The tensors of each buffer of ZeRO-3: a buffer takes tensors until their slots reach `sub_group_size`."""
    buffers: list[list[int]] = [[]]
    filled = 0
    for number, shape in enumerate(shapes):
        if filled >= sub_group_size:
            buffers.append([])
            filled = 0
        buffers[-1].append(number)
        filled += ceil(prod(shape) / shards)
    return buffers


def rows(shape: Shape, shards: int) -> Concatenation:
    """FSDP2: whole rows of a tensor, elements of a 1-D one."""
    columns = columns_of(shape) if len(shape) >= 2 else 1
    count = prod(shape) // columns if columns else 0
    return Concatenation((shape,), (0,), max(1, ceil(count / shards) * columns))


def fsdp1(shapes: Sequence[Shape], shards: int, ranks: int, itemsize: int, use_orig_params: bool) -> Concatenation:
    """The tensors of a unit of FSDP1 in a process group of `ranks`, which is 1 shard with NO_SHARD.

    With ``use_orig_params`` each begins at a multiple of 16 bytes, and the end is a multiple of `ranks` in any case.
    """
    if not use_orig_params:
        return flat(shapes, shards)
    laid = flat(shapes, shards, starts=max(1, 16 // itemsize))
    end = laid.begins[-1] + prod(shapes[-1])
    return Concatenation(laid.shapes, laid.begins, _up(end, ranks) // shards)


def largest_first(groups: Sequence[Sequence[Shape]], shards: int) -> list[list[int]]:
    """`ZeroRedundancyOptimizer`: the owner of each tensor of each group, always the rank that has least so far."""
    return _owners(groups, shards, lambda shapes: sorted(range(len(shapes)), key=lambda i: -prod(shapes[i])))


def in_order(groups: Sequence[Sequence[Shape]], shards: int) -> list[list[int]]:
    """OSS of fairscale: the same, in the order of the groups."""
    return _owners(groups, shards, lambda shapes: list(range(len(shapes))))


def _owners(
    groups: Sequence[Sequence[Shape]], shards: int, order: Callable[[Sequence[Shape]], list[int]]
) -> list[list[int]]:
    least = [(0, rank) for rank in range(shards)]
    heapify(least)
    owners = []
    for shapes in groups:
        of_group = [0] * len(shapes)
        for number in order(shapes):
            size, rank = least[0]
            of_group[number] = rank
            heapreplace(least, (size + prod(shapes[number]), rank))
        owners.append(of_group)
    return owners


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
