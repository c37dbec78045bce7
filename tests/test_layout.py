"""Fragments, units, ownership and cut units: properties over random shapes, levels, cuts and ranks.

The last tests run the real optimizer on simulated ranks: the sharded step is the whole step.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gwt_dist import Fragment, GWTAdamW, LayoutError
from gwt_dist.exchange import Whole, join, plan_exchange
from gwt_dist.layout import Units
from gwt_dist.units import units_of
from simulated import Sharded

settings.register_profile("gwt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("gwt")

SHAPES = st.one_of(
    st.tuples(st.integers(2, 7), st.integers(2, 23)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.just(1), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7)),
    st.just(()),
)
UNITS = st.builds(Units, st.integers(1, 23), st.integers(1, 9), st.integers(1, 4))


def _grid(draw: st.DrawFn, fqn: str, shape: tuple[int, ...], world: int) -> list[Fragment | None]:
    """A tensor cut into bands of rows and panels of columns, as two mesh axes do; one rectangle a rank."""
    rows, columns = shape[0], prod(shape[1:])
    panels = draw(st.integers(min(2, world), world))
    bands = world // panels
    row_cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=bands - 1, max_size=bands - 1)))
    column_cuts = sorted(draw(st.lists(st.integers(0, columns), min_size=panels - 1, max_size=panels - 1)))
    held: list[Fragment | None] = []
    for r0, r1 in pairwise([0, *row_cuts, rows]):
        for c0, c1 in pairwise([0, *column_cuts, columns]):
            empty = r0 == r1 or c0 == c1
            held.append(None if empty else Fragment(fqn, shape, r0 * columns + c0, r0 * columns + c1, 0, r1 - r0))
    return held + [None] * (world - len(held))


def _intervals(draw: st.DrawFn, fqn: str, shape: tuple[int, ...], world: int) -> list[Fragment | None]:
    """A tensor cut anywhere, as flat buffers do."""
    cuts = sorted(draw(st.lists(st.integers(0, prod(shape)), min_size=world - 1, max_size=world - 1)))
    return [Fragment(fqn, shape, start, stop) for start, stop in pairwise([0, *cuts, prod(shape)])]


@st.composite
def worlds(
    draw: st.DrawFn, every: st.SearchStrategy[tuple[int, ...]] = SHAPES
) -> tuple[dict[str, tuple[int, ...]], list[list[Fragment]]]:
    """Shapes, and who holds what: each tensor cut at random among 1 to 9 ranks in random order, some of them empty."""
    world = draw(st.integers(1, 9))
    shapes = {f"t{i}": shape for i, shape in enumerate(draw(st.lists(every, min_size=1, max_size=3)))}
    ranks: list[list[Fragment]] = [[] for _ in range(world)]
    used = [0] * world
    for fqn, shape in shapes.items():
        cut = _grid if len(shape) > 1 and draw(st.integers(0, 3)) else _intervals
        for rank, fragment in zip(draw(st.permutations(range(world))), cut(draw, fqn, shape, world), strict=True):
            used[rank] += draw(st.integers(0, 2))
            fragment = fragment or Fragment(fqn, shape, 0, 0)
            ranks[rank].append(replace(fragment, offset=used[rank]))
            used[rank] += fragment.numel
    return shapes, ranks


@given(worlds(), st.integers(0, 6), st.sampled_from(["haar", "db2"]))
def test_every_unit_is_owned_once_and_kept_where_it_is_touched(world, level, wavelet) -> None:
    shapes, ranks = world
    for fqn, shape in shapes.items():
        units = units_of(shape, level, wavelet)
        owners: dict[int, int] = {}
        keepers: dict[int, set[int]] = {}
        for rank, fragments in enumerate(ranks):
            for f in (f for f in fragments if f.fqn == fqn):
                touching = {units.index(e) for start, stop in f.intervals for e in range(start, stop)}
                below = [i * units.per_row for i in range(f.rows)]
                assert touching == {unit + row for unit in range(*units.touched(f)) for row in below}
                for unit in (unit + row for unit in range(*units.owned(f)) for row in below):
                    assert owners.setdefault(unit, rank) == rank, "a unit has two owners"
                    start = units.bounds(unit)[0]
                    assert any(begin <= start < end for begin, end in f.intervals)
                for unit in touching:
                    keepers.setdefault(unit, set()).add(rank)
                moments = units.moments(f)
                assert moments.numel == len(touching) * units.coefficients
        every = set(range(units.index(prod(shape) - 1) + 1))
        assert set(owners) == set(keepers) == every
        assert all(owners[unit] in keepers[unit] for unit in every)


@given(UNITS, st.integers(1, 5), st.data())
def test_units_are_intervals_of_one_row(units: Units, rows: int, data: st.DataObject) -> None:
    numel = rows * units.columns
    seen = 0
    for unit in range(rows * units.per_row):
        start, stop = units.bounds(unit)
        assert start == seen < stop <= start + units.length
        assert start // units.columns == (stop - 1) // units.columns
        assert all(units.index(element) == unit for element in range(start, stop))
        seen = stop
    assert seen == numel
    start = data.draw(st.integers(0, numel - 1))
    stop = data.draw(st.integers(start + 1, numel))
    below = 1
    if stop - 1 < (start // units.columns + 1) * units.columns:  # in one row, which may come up again below
        below = data.draw(st.integers(1, rows - start // units.columns))
    fragment = Fragment("w", (rows, units.columns), start, stop, 0, below)
    first, last = units.touched(fragment)
    buffer: list[int | None] = [None] * (below * (last - first) * units.length)
    elements = [element for begin, end in fragment.intervals for element in range(begin, end)]
    for block in units.blocks(fragment):
        for row in range(block.rows):
            for column in range(block.columns):
                place = block.destination + row * block.stride + column
                assert buffer[place] is None
                buffer[place] = elements[block.source + row * block.columns + column]
    touched = [unit + row * units.per_row for row in range(below) for unit in range(first, last)]
    for i, unit in enumerate(touched):
        begin, end = units.bounds(unit)
        for u in range(units.length):
            element = begin + u
            held = element < end and element in elements
            assert buffer[i * units.length + u] == (element if held else None)


@given(worlds(), st.integers(0, 6), st.sampled_from(["haar", "db2"]))
def test_completed_cut_units_equal_the_original_ones(world, level, wavelet) -> None:
    _, ranks = world

    def units(shape):
        return units_of(shape, level, wavelet)

    tensors = join(ranks)
    plans = [plan_exchange(tensors, fragments, units) for fragments in ranks]
    assert len({plan.length for plan in plans}) == 1
    base = {t.fqn: 1000 * i for i, t in enumerate(tensors)}
    buffer: list[int | None] = [None] * plans[0].length
    for fragments, plan in zip(ranks, plans, strict=True):
        local = {}
        for f in fragments:
            elements = [e for start, stop in f.intervals for e in range(start, stop)]
            local |= {f.offset + i: base[f.fqn] + element for i, element in enumerate(elements)}
        for send in plan.sends:
            for i in range(send.length):
                assert buffer[send.slot + i] is None, "an element was sent twice"
                buffer[send.slot + i] = local[send.source + i]
    assert None not in buffer, "an element was not sent"
    for fragments, plan in zip(ranks, plans, strict=True):
        received = {(r.fragment, r.unit): r for r in plan.receives}
        for number, f in enumerate(fragments):
            u = units(f.shape)
            first, last = u.touched(f)
            kept = [unit + row * u.per_row for row in range(f.rows) for unit in range(first, last)]
            elements = {e for start, stop in f.intervals for e in range(start, stop)}
            for place, unit in enumerate(kept):
                start, stop = u.bounds(unit)
                cut = not elements.issuperset(range(start, stop))
                assert cut == ((number, place) in received)
                if cut:
                    r = received[number, place]
                    assert buffer[r.slot : r.slot + r.length] == [base[f.fqn] + e for e in range(start, stop)]


@given(worlds())
def test_join_finds_every_cut_and_nothing_else(world) -> None:
    shapes, ranks = world
    for tensor in join(ranks):
        held = [f for fragments in ranks for f in fragments if f.fqn == tensor.fqn]
        starts = {start for f in held for start, _ in f.intervals}
        assert tensor == Whole(tensor.fqn, shapes[tensor.fqn], tuple(sorted(starts - {0})))


def test_join_names_what_is_held_by_nobody_or_twice() -> None:
    def held(*intervals: tuple[int, int]) -> list[list[Fragment]]:
        return [[Fragment("mlp.weight", (2, 5), *interval)] for interval in intervals]

    with pytest.raises(LayoutError, match=r"elements 4\.\.6 of tensor 'mlp.weight'.* held by no rank"):
        join(held((0, 4), (6, 10)))
    with pytest.raises(LayoutError, match=r"elements 8\.\.10 of tensor 'mlp.weight'.* held by no rank"):
        join(held((0, 8)))
    with pytest.raises(LayoutError, match=r"elements 3\.\.4 of tensor 'mlp.weight'.* by rank 1 and another"):
        join(held((0, 4), (3, 10)))
    with pytest.raises(LayoutError, match=r"shape \(5, 2\) on rank 1 and \(2, 5\)"):
        join([[Fragment("w", (2, 5), 0, 10)], [Fragment("w", (5, 2), 0, 0)]])


def test_a_fragment_outside_its_tensor_is_refused() -> None:
    with pytest.raises(
        LayoutError, match=r"3\.\.11 \(1 rows\) at offset 0 does not lie in tensor 'w' of shape \(2, 5\)"
    ):
        Fragment("w", (2, 5), 3, 11)
    with pytest.raises(LayoutError, match=r"3\.\.6 \(2 rows\)"):
        Fragment("w", (4, 5), 3, 6, rows=2)


def run(world, level: int, recipe: str, wavelet: str, dtype: torch.dtype) -> tuple[dict, dict, Sharded, list]:
    """Three steps of the same gradients, whole and sharded: both weights, and both optimizers."""
    shapes, ranks = world
    generator = torch.Generator().manual_seed(prod(sum(shapes.values(), (1,))) + level)

    def random(size: float) -> dict[str, torch.Tensor]:
        return {f: size * torch.randn(s, generator=generator, dtype=dtype) for f, s in shapes.items()}

    start = random(1.0)
    options = dict(lr=0.01, level=level, recipe=recipe, wavelet=wavelet, weight_decay=0.1)
    sharded = Sharded(start, ranks, **options)
    whole = {fqn: torch.nn.Parameter(tensor.clone()) for fqn, tensor in start.items()}
    optimizer = GWTAdamW(whole.values(), **options)  # type: ignore[arg-type]
    for size in (1.0, 0.1, 3.0):
        gradients = random(size)
        for fqn, parameter in whole.items():
            parameter.grad = gradients[fqn].clone()
        optimizer.step()
        sharded.step(gradients)
    return {f: p.detach() for f, p in whole.items()}, sharded.gather(shapes), sharded, [optimizer, whole]


@settings(max_examples=150)
@given(
    worlds(),
    st.integers(0, 6),
    st.sampled_from(["haar", "haar", "db2"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_sharded_energy_step_is_the_whole_step_bit_for_bit(world, level, wavelet, dtype) -> None:
    whole, sharded, ranks, _ = run(world, level, "energy", wavelet, dtype)
    for fqn in whole:
        assert torch.equal(whole[fqn], sharded[fqn]), fqn
    # Nothing but cut units is exchanged, and nothing at all if no unit is cut.
    cut = plan_exchange(join(ranks.ranks), (), lambda shape: units_of(shape, level, wavelet)).length
    assert ranks.group.calls == ([cut] * 3 if cut else [])


@settings(max_examples=150)
@given(worlds(), st.integers(0, 6), st.sampled_from(["haar", "haar", "db2"]))
def test_the_sharded_paper_step_is_the_whole_step_but_for_the_order_of_its_norm(world, level, wavelet) -> None:
    whole, sharded, ranks, (optimizer, parameters) = run(world, level, "paper", wavelet, torch.float64)
    for fqn in whole:
        size = max(1.0, float(whole[fqn].abs().max()))
        assert float((whole[fqn] - sharded[fqn]).abs().max()) <= 1e-14 * size, fqn
    for fragments, flat, one in zip(ranks.ranks, ranks.flats, ranks.optimizers, strict=True):
        # The limiter of each tensor is the same on all ranks, those that hold nothing of it included.
        for i, fqn in enumerate(parameters):
            expected = float(optimizer.state[parameters[fqn]]["limited_norm"])
            assert abs(float(one.state[flat]["limited_norm"][i]) - expected) <= 1e-13 * max(1, expected)
        # Moments are those of the whole tensor, at the place that the layout says.
        place = 0
        for f in fragments:
            moments = units_of(f.shape, level, wavelet).moments(f)
            for key in ("exp_avg", "exp_avg_sq"):
                every = optimizer.state[parameters[f.fqn]][key].view(-1)
                expected_part = torch.cat([every[:0], *(every[a:b] for a, b in moments.intervals)])
                assert torch.equal(one.state[flat][key][place : place + moments.numel], expected_part)
            place += moments.numel
        assert place == one.state[flat]["exp_avg"].numel()


def test_vectors_alone_need_no_norm() -> None:
    """A group of level 2 that holds 1-D tensors is AdamW: with "paper" too there is nothing to sum."""
    ranks = [[Fragment("bias", (10,), 0, 3)], [Fragment("bias", (10,), 3, 10)]]
    sharded = Sharded({"bias": torch.ones(10)}, ranks, lr=0.01, level=2, recipe="paper")
    sharded.step({"bias": torch.ones(10)})
    assert sharded.group.calls == []
    assert float(sharded.gather({"bias": (10,)})["bias"].max()) < 1.0
