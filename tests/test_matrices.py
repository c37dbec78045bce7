"""Who works on which matrix, in which round, and what travels: integers, and what ranks really send."""

from __future__ import annotations

import warnings
from collections import Counter
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gwt_dist import comm, exchange, matrices, products, rounds
from gwt_dist.layout import Fragment
from gwt_dist.matrices import Matrix, plan_rounds
from gwt_dist.owners import SLACK, cost, owners
from gwt_dist.plan import Form, Plan
from gwt_dist.recipes import rule_of
from simulated import Sharded
from test_layout import worlds


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flat(shapes: dict[str, tuple[int, ...]], world_size: int) -> list[list[Fragment]]:
    """Tensors one after the other, in parts as equal as they can be, as ZeRO-1 and 2 cut them."""
    part = -(-sum(map(prod, shapes.values())) // world_size)
    ranks: list[list[Fragment]] = [[] for _ in range(world_size)]
    place = 0
    for fqn, shape in shapes.items():
        for rank, its in enumerate(ranks):
            low, high = max(place, rank * part), min(place + prod(shape), (rank + 1) * part)
            if low < high:
                its.append(Fragment(fqn, shape, low - place, high - place, low - rank * part))
        place += prod(shape)
    return ranks


def planned(
    shapes: dict[str, tuple[int, ...]],
    ranks: list[list[Fragment]],
    rank: int,
    places: int = 1,
    limit: int = matrices.ROUND,
) -> tuple[matrices.Round, ...]:
    """The rounds of one rank."""
    held = {fqn: [[f for f in fragments if f.fqn == fqn and f.numel] for fragments in ranks] for fqn in shapes}
    its = [Matrix(shape, held[fqn].__getitem__) for fqn, shape in shapes.items()]
    return plan_rounds(its, rank, len(ranks), lambda rows, columns: places, limit)


@st.composite
def holdings(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[dict[int, int]], int]:
    """Shapes, what ranks hold of each, and how many ranks there are."""
    world = draw(st.integers(1, 6))
    shapes = draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=20))
    # Of few numbers, so that ranks often hold as much as others, and work that is as dear.
    most = draw(st.sampled_from([1, 3, 2500]))
    held = [
        draw(st.dictionaries(st.integers(0, world - 1), st.integers(1, min(most, prod(s))), min_size=1)) for s in shapes
    ]
    return shapes, held, world


@given(holdings())
def test_the_work_is_even_whoever_holds_what(case: Any) -> None:
    shapes, held, world = case
    found = owners(shapes, held, world)
    busy = Counter({rank: 0 for rank in range(world)})
    least = Counter(busy)
    for shape in sorted(shapes, key=lambda shape: -cost(shape)):
        least[min(least, key=least.__getitem__)] += cost(shape)
    for shape, rank in zip(shapes, found, strict=True):
        busy[rank] += cost(shape)
    assert len(found) == len(shapes) and max(busy.values()) <= (1 + SLACK) * max(least.values())


def test_a_matrix_goes_to_the_rank_that_holds_most_of_it() -> None:
    shapes = [(4, 4)] * 4
    assert owners(shapes, [{1: 16}, {0: 6, 1: 10}, {0: 16}, {0: 15, 1: 1}], 2) == [1, 1, 0, 0]
    # All hold as much: the dearest to the rank that has least to do.
    assert owners([(4, 8), (4, 8), (4, 16)], [{0: 8, 1: 8}] * 3, 2) == [1, 1, 0]
    # One rank holds everything: work comes first.
    assert Counter(owners(shapes, [{0: 16}] * 4, 2)) == {0: 2, 1: 2}


@given(holdings())
def test_quickly_found_owners_are_those_of_the_plain_search(case: Any) -> None:
    """Ranks that hold as much of a matrix are kept in order; here all of them are looked at for each matrix."""
    shapes, held, world = case
    order = sorted(range(len(shapes)), key=lambda i: (-cost(shapes[i]), i))
    even, busy = [0] * world, [0] * world
    expected, alone = {}, {}
    for i in order:
        alone[i] = min(range(world), key=lambda rank: (even[rank], rank))
        even[alone[i]] += cost(shapes[i])
    for i in order:
        fits = [rank for rank in range(world) if busy[rank] + cost(shapes[i]) <= max(even) * (1 + SLACK)]
        if not fits:
            expected = alone
            break
        expected[i] = min(fits, key=lambda rank: (-held[i].get(rank, 0), busy[rank], rank))
        busy[expected[i]] += cost(shapes[i])
    assert owners(shapes, held, world) == [expected[i] for i in range(len(shapes))]


LLAMA_60M = {
    f"{layer}.{name}": shape
    for layer in range(8)
    for name, shape in (
        *[(name, (512, 512)) for name in "qkvo"],
        *[("gate", (1376, 512)), ("up", (1376, 512)), ("down", (512, 1376))],
    )
}


@pytest.mark.parametrize(("world_size", "share"), [(3, 0.02), (5, 0.03), (7, 0.04), (8, 0.0), (12, 0.10), (16, 0.06)])
def test_only_matrices_that_a_boundary_cuts_travel(world_size: int, share: float) -> None:
    """LLaMA-60M, flat and cut into equal parts. By work alone 85 % of the elements would travel on 8 ranks."""
    ranks = flat(LLAMA_60M, world_size)
    whole = sum(map(prod, LLAMA_60M.values()))
    sent = sum(sum(its.elements.sends) for rank in range(world_size) for its in planned(LLAMA_60M, ranks, rank))
    assert sent / whole <= share
    if world_size != 8:  # where each rank holds one layer
        assert sent > 0


@given(worlds(), st.integers(1, 3), st.sampled_from([1, 300, 2000]))
def test_what_one_rank_sends_another_expects(world: Any, places: int, limit: int) -> None:
    shapes, ranks = world
    shapes = {fqn: shape for fqn, shape in shapes.items() if len(shape) > 1 and prod(shape)}
    plans = [planned(shapes, ranks, rank, places, limit) for rank in range(len(ranks))]
    seen: list[int] = []
    for its in zip(*plans, strict=True):
        for a, mine in enumerate(its):
            for kind in ("elements", "rows"):
                route = getattr(mine, kind)
                assert [getattr(theirs, kind).receives[a] for theirs in its] == list(route.sends)
                assert len(route.slots) == len(mine.parts)
            size = sum(stack.places * stack.rows * stack.columns for stack in mine.stacks)
            assert len(mine.stacks) <= 1 or size <= limit
            seen += [number for stack in mine.stacks for number in stack.matrices]
    assert sorted(seen) == list(range(len(shapes)))


@given(worlds(), st.integers(1, 3))
def test_every_element_gets_into_its_place_and_back(world: Any, places: int) -> None:
    """Numbers that say where they belong, moved as the routes say."""
    shapes, ranks = world
    shapes = {fqn: shape for fqn, shape in shapes.items() if len(shape) > 1 and prod(shape)}
    first = dict(zip(shapes, range(1, 1 << 40, 1 << 20), strict=False))
    plans = [planned(shapes, ranks, rank, places) for rank in range(len(ranks))]
    for its in zip(*plans, strict=True):
        landings = [torch.zeros(one.elements.size, dtype=torch.int64) for one in its]
        for one, landing, fragments in zip(its, landings, ranks, strict=True):
            for (number, part), slot in zip(one.parts, one.elements.slots, strict=True):
                fqn = list(shapes)[number]
                fragment = [f for f in fragments if f.fqn == fqn and f.numel][part]
                elements = torch.cat([torch.arange(a, b) for a, b in fragment.intervals])
                landing[slot : slot + fragment.numel] = elements + first[fqn]
        before = [landing.clone() for landing in landings]
        letters = []
        for a in range(len(its)):
            mine = [
                landing[sum(other.elements.sends[:a]) : sum(other.elements.sends[: a + 1])]
                for other, landing in zip(its, landings, strict=True)
            ]
            letters.append(torch.cat(mine))
        for one, landing, letter in zip(its, landings, letters, strict=True):
            way = rounds._Way(one.elements, landing, letter)
            way.copy()
            for i, stack in enumerate(one.stacks):
                found = way.stack(i, stack.places, stack.rows * stack.columns)
                for place, number in enumerate(stack.matrices):
                    fqn = list(shapes)[number]
                    assert torch.equal(found[place], torch.arange(prod(shapes[fqn])) + first[fqn])
                assert not found[len(stack.matrices) :].any()
            returned = torch.zeros_like(letter)
            rounds._Way(one.elements, landing, returned).copy(back=True)
            assert torch.equal(returned, letter)
        assert all(torch.equal(a[: sum(one.elements.sends)], b[: sum(one.elements.sends)])
                   for one, a, b in zip(its, landings, before, strict=True))  # fmt: skip


SHAPES: dict[str, tuple[int, ...]] = {
    **{"a": (40, 24), "b": (24, 40), "c": (24, 40), "d": (17, 13)},
    **{"e": (64, 8), "f": (40, 24), "g": (24, 40), "v": (9,)},
}


def trained(world_size: int, steps: int = 3, **options: Any) -> dict[str, Tensor]:
    """Weights after some steps on so many ranks, flat, cut within rows and units."""
    ranks = flat(SHAPES, world_size)
    start = {fqn: random(shape, 1) for fqn, shape in SHAPES.items()}
    sharded = Sharded(start, ranks, lr=0.01, level=2, recipe="orthogonal", **options)
    for step in range(steps):
        sharded.step({fqn: random(shape, 10 * step + i) + step for i, (fqn, shape) in enumerate(SHAPES.items())})
    return sharded.gather(SHAPES)


@pytest.mark.parametrize("options", [{}, {"nor": 0.9}, {"nesterov": True}], ids=str)
@pytest.mark.parametrize("how", ["fp32", "bf16"])
def test_the_bits_are_those_of_one_rank(how: str, options: dict[str, Any]) -> None:
    one, *more = [trained(world_size, products=how, **options) for world_size in (1, 2, 3, 4, 7)]
    for found in more:
        for fqn in SHAPES:
            assert torch.equal(found[fqn].view(torch.int32), one[fqn].view(torch.int32)), fqn


def test_bf16_products_are_those_of_fp32_but_for_their_rounding() -> None:
    fp32, bf16, auto = (trained(1, 1, products=how) for how in ("fp32", "bf16", "auto"))
    for fqn, shape in SHAPES.items():
        start = random(shape, 1)
        change, other = fp32[fqn] - start, bf16[fqn] - start
        assert torch.equal(fp32[fqn], auto[fqn])  # without a GPU
        assert (change - other).norm() < 0.02 * change.norm()
        assert len(shape) == 1 or not torch.equal(change, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_matrix_has_the_same_bits_in_every_place_of_a_stack(dtype: torch.dtype) -> None:
    """Which is why a stack's size is fixed: that it is the same for another size nobody promises."""
    for rows, columns in ((12, 40), (40, 12), (33, 17)):
        matrix, noise = random((rows, columns), 1, dtype), random((5, rows, columns), 2, dtype)
        found = []
        for place in range(5):
            stack = noise.clone() if place % 2 else torch.zeros_like(noise)
            stack[place] = matrix
            found.append(rounds.FORMULAS["orthogonal"].newton_schulz(stack)[place])
        assert all(torch.equal(one, found[0]) for one in found)


def test_messages_are_under_way_while_a_rank_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round k+1 departs before round k is worked on, whose messages go back before those of round k-1 are awaited."""
    events: list[str] = []
    limited = lambda m, rank, world, size: plan_rounds(m, rank, world, size, 1)  # noqa: E731  a stack a round
    monkeypatch.setattr(rounds, "plan_rounds", limited)
    monkeypatch.setattr(products, "stack_size", lambda rows, columns, device: 1)
    begin, works = comm.begin, []

    def noted(outgoing: Any, incoming: Any, peers: comm.Peers) -> Any:
        wait = begin(outgoing, incoming, peers)
        if peers.here:
            return wait
        number = len(works)
        works.append(number)
        events.append(f"begin {number}")
        return lambda: (events.append(f"wait {number}"), wait())[1]

    monkeypatch.setattr(rounds, "begin", noted)
    shapes = {fqn: (8, 8) for fqn in "abcdef"}
    sharded = Sharded(
        {fqn: random((8, 8), 1) for fqn in shapes}, flat(shapes, 2), lr=0.01, recipe="orthogonal", level=2
    )
    sharded.step({fqn: random((8, 8), 2) for fqn in shapes})
    # Three rounds: 0, 1 and 3 go, 2, 4 and 5 are the ways back.
    assert events == [
        *("begin 0", "begin 1", "wait 0", "begin 2", "begin 3", "wait 1", "begin 4", "wait 2"),
        *("wait 3", "begin 5", "wait 4", "wait 5"),
    ]


def test_what_ranks_hold_is_read_once_however_many_matrices_there_are() -> None:
    """Read for each matrix again, the plan of 4,000 experts in a flat buffer took 17 s, and of 40,000 half an hour."""
    shapes = {str(i): (4, 4) for i in range(12)}
    ranks, read = flat(shapes, 3), []
    group: Any = object()
    peers = comm.Peers((0, 1, 2), 0, group, lambda place: (read.append(place), ranks[place])[1])
    shard = comm.Shard(tuple(exchange.join(ranks)), tuple(ranks[0]), (), (), peers)
    rule = rule_of({"lr": 0.1, "wavelet": "haar", "recipe": "orthogonal"})
    holder = rounds.Holder(Plan.of(shard, Form.of(2, "haar", rule)), (), torch.float32, 0, frozenset({True}))
    rounds.Rounds(0, rule.program, [holder], [], torch.device("cpu"))
    assert sorted(read) == [0, 1, 2]


def test_messages_over_gloo_from_a_gpu_go_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = object()
    peers = comm.Peers((0, 1), 0, group, lambda _: ())
    config = "cpu:gloo,cuda:gloo"
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda found: config if found is group else "")
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert comm.needs_host(gpu, peers) and not comm.needs_host(cpu, peers)
    assert not comm.needs_host(gpu, comm.alone(()))
    config = "cpu:gloo,cuda:nccl"
    assert not comm.needs_host(gpu, peers)
    # The same bits on that road, said once when the schedule is made.
    monkeypatch.setattr(rounds, "needs_host", lambda device, peers: True)
    with pytest.warns(RuntimeWarning, match="gloo sends no message from the memory of cpu"):
        trained(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.undo()
        trained(2, 1)


def test_peers_without_a_group_get_one_that_has_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the same ranks: over NCCL a group must not begin with messages in which some ranks take no part."""

    class Group:
        pass

    made, group, calls = Group(), Group(), []
    stand_in = SimpleNamespace(
        group=SimpleNamespace(WORLD=Group()),
        new_group=lambda ranks, **options: calls.append((ranks, options)) or made,
        all_reduce=lambda buffer, group: calls.append((buffer.numel(), group)),
    )
    monkeypatch.setattr(comm, "dist", stand_in)
    without, cpu = comm.Peers((4, 1, 5), 1, None, lambda _: ()), torch.device("cpu")
    assert [comm.connected(without, cpu).group for _ in range(2)] == [made, made]
    assert calls == [([4, 1, 5], {"use_local_synchronization": True}), (1, made)]
    calls.clear()
    for peers in (comm.Peers((0, 1), 0, group, lambda _: ()), comm.alone(())):
        assert comm.connected(peers, cpu) is peers
    assert not calls


@settings(max_examples=20)
@given(worlds(), st.integers(1, 4))
def test_any_layout_has_the_bits_of_whole_matrices(world: Any, level: int) -> None:
    from test_layout import run

    whole, sharded, *_ = run(world, level, "orthogonal", "haar", torch.float32)
    for fqn in whole:
        assert torch.equal(whole[fqn], sharded[fqn]), fqn
