"""How many numbers ranks keep of the fields of tensors, and how many they send: by extent, whatever the recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from gwt_dist import extents
from gwt_dist.declare import Extent, Field, Program
from gwt_dist.exchange import Whole, plan_exchange
from gwt_dist.formats import FORMATS, FP32
from gwt_dist.layout import Fragment, Units
from gwt_dist.memory.splits import Concatenation
from gwt_dist.units import units_of

# Level and wavelet of a tensor's group, its coefficients that are kept together, and the fields of the tensor.
Kind = tuple[int, str, int, tuple[Field, ...]]


def bytes_of(field: Field, full: int = 4) -> int:
    """Of a number of a field; `full` are those of one in the format fp32, which fp64 weights have in fp64."""
    return full if field.format == FP32 else FORMATS[field.format].bytes


class Numbers(NamedTuple):
    """Of a field, how many numbers go with a fragment."""

    kept: int
    owned: int  # those that its rank counts in sums and writes to checkpoints


def numbers(fields: Iterable[Field], fragment: Fragment, units: Units) -> list[tuple[Field, Numbers]]:
    """Of each field that is no owner's, the numbers that go with `fragment` of a tensor of these units."""
    fields = [field for field in fields if field.extent is not Extent.OWNED]
    of = {
        extent: Numbers(extents.kept(extent, fragment, units).numel, extents.owned(extent, fragment, units).numel)
        for extent in {field.extent for field in fields}
    }
    return [(field, of[field.extent]) for field in fields]


def of_owner(fields: Iterable[Field], shape: tuple[int, ...]) -> dict[Field, int]:
    """The numbers of each OWNED field of a tensor of `shape`, which one rank keeps."""
    return {field: prod(extents.of_owner(field, shape)) for field in fields if field.extent is Extent.OWNED}


def per_tensor(programs: Iterable[Program]) -> tuple[Field, ...]:
    """The fields of one number a tensor that a parameter has if these programs step its tensors: for all of them."""
    found = (field for program in programs for field in program.fields if field.extent is Extent.TENSOR)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Counts:
    """Of the tensors of a `Concatenation`, by shard; of a tensor that it holds nothing of a shard keeps nothing."""

    elements: list[int]
    kept: dict[Field, list[int]]  # numbers
    owned: list[int]  # bytes of all fields that are sharded as elements are
    cut: list[int]  # bytes of all fields, what another shard owns
    common: int  # bytes that all shards which hold any of a tensor keep alike, once
    exchange: int


@lru_cache(maxsize=4096)
def count(laid: Concatenation, kinds: tuple[Kind | None, ...], shards: int, full: int = 4) -> Counts:
    """What `shards` ranks keep of the tensors of kind not None; a number in the format fp32 has `full` bytes."""
    elements, owned, cut = ([0] * shards for _ in range(3))
    kept: dict[Field, list[int]] = {}
    common = exchange = 0
    for number, (shape, kind) in enumerate(zip(laid.shapes, kinds, strict=True)):
        if kind is None:
            continue
        level, wavelet, cell, fields = kind
        units = units_of(shape, level, wavelet, cell)
        found: dict[tuple[int, int], tuple[list[tuple[list[int], int]], int, int]] = {}
        cuts = []
        for shard, start, stop in laid.intervals(number):
            # Which rows they are changes no number, so most parts of a tensor are like one before.
            begin = start % units.columns
            like = begin, begin + stop - start
            if like not in found:
                its = numbers(fields, Fragment("", shape, *like), units)
                found[like] = (
                    [(kept.setdefault(f, [0] * shards), n.kept) for f, n in its],
                    sum(bytes_of(f, full) * n.owned for f, n in its if f.extent in extents.SHARDED),
                    sum(bytes_of(f, full) * (n.kept - n.owned) for f, n in its),
                )
            by_field, its_owned, its_cut = found[like]
            elements[shard] += stop - start
            owned[shard] += its_owned
            cut[shard] += its_cut
            for by_shard, more in by_field:
                by_shard[shard] += more
            if start:
                cuts.append(start)
        common += full * sum(prod(extents.whole(f.extent, shape, units)) for f in fields if f.extent is Extent.COLUMN)
        tensor = Whole("", shape, tuple(cuts))
        exchange += plan_exchange([tensor], [], lambda shape, units=units: units).length  # type: ignore[misc]
    return Counts(elements, kept, owned, cut, common, exchange)


@lru_cache(maxsize=4096)
def summed(extent: Extent, one: Concatenation, units: Units) -> int:
    """Places of a sum of `extent` for the one tensor of `one`, of these units."""
    # Where a tensor is cut matters to its rows alone.
    cuts = [start for _, start, _ in one.intervals(0) if start] if extent is Extent.ROW else ()
    return extents.summed(extent, Whole("", one.shapes[0], tuple(cuts)), units)
