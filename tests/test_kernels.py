"""The C++ kernels against the eager reference: the same bits, on everything that they take."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gwt_dist import Fragment, GWTAdamW
from gwt_dist.comm import Shard, alone
from gwt_dist.declare import Extent, Program
from gwt_dist.exchange import Whole
from gwt_dist.kernels import Item, Part, Place, Work, build, choice, cpu
from gwt_dist.piece import Piece
from gwt_dist.plan import Form, Plan
from gwt_dist.recipes import program_of, rule_of
from gwt_dist.schedule import Member, Schedule
from simulated import Sharded

# Divided and not by the unit, rows shorter than a unit, longer than a chunk, empty, of no and of three dimensions.
SHAPES = ((66, 97), (3, 5461), (1, 29), (9, 3), (64, 64), (128,), (5,), (), (3, 2, 5), (0, 4), (2, 70_000), (300, 256))
RECIPES = ("paper", "energy", "foam")
# Each of these needs a library of its own, and no test needs another.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper"},
    "energy": {"recipe": "energy"},
    "foam": {"recipe": "foam"},
    "cautious": {"recipe": "energy", "cautious": True},
    "paper, energy of units": {"recipe": "paper", "second_moment": "energy"},
}
NUMBERS = st.fixed_dictionaries(
    {
        "nesterov": st.booleans(),
        "correct_bias": st.booleans(),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.99, 0.0)]),
        "eps": st.sampled_from([1e-6, 1e-30, 0.1]),
        "scale": st.sampled_from([0.25, 1.0]),
        "weight_decay": st.sampled_from([0.1, 0.0]),
    }
)


def program(**options: Any) -> Program:
    """Of tensors with level > 0 in a group that says no more than `options`."""
    return program_of({"wavelet": "haar", "recipe": "energy"} | options, level=2)


PIECES = [Piece.of(Fragment("a", (4, 8), 0, 32), Fragment("a", (4, 2), 0, 8), 2, "haar")]


def train(
    kernel: str,
    shapes: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    exponents: Sequence[float] = (0, 0, 0),
    seed: int = 0,
    **options: object,
) -> list[Tensor]:
    """Weights and state after one step for each of `exponents`, the gradients being of size ``10**exponent``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, kernel)
        random = torch.Generator().manual_seed(seed)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=random).to(dtype)) for shape in shapes]
        optimizer = GWTAdamW(parameters, **{"lr": 0.01, "weight_decay": 0.1, "level": 2, "recipe": "paper"} | options)  # type: ignore[arg-type]
        for exponent in exponents:
            for parameter in parameters:
                parameter.grad = (torch.randn(parameter.shape, generator=random) * 10**exponent).to(dtype)
                if parameter.numel() > 100:  # units that stand still
                    parameter.grad.view(-1)[:20] = 0
            optimizer.step()
        return results(optimizer)


def results(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [t for p in parameters for t in (p.detach(), *optimizer.state[p].values())]


def same(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Equal bit for bit (NaN equal to NaN)."""
    assert len(mine) == len(theirs)
    for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"tensor {i}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("level", range(9))
def test_weights_moments_and_norms_have_the_bits_of_the_reference(level: int, recipe: str, dtype: torch.dtype) -> None:
    options = {"level": level, "recipe": recipe, "dtype": dtype}
    same(train("cpu", SHAPES, **options), train("eager", SHAPES, **options))  # type: ignore[arg-type]


shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4)
exponents = st.lists(st.floats(-30, 15), min_size=1, max_size=4)  # squares beyond both ends of fp32


@settings(max_examples=120, deadline=None)
@given(
    shapes=shapes,
    exponents=exponents,
    level=st.integers(0, 8),
    name=st.sampled_from(sorted(VARIANTS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    numbers=NUMBERS,
    detail_gain=st.sampled_from([None, 0.0, 0.3, 1.0, "coherence"]),
    limiter=st.sampled_from([None, 0, 1.0, 1.5]),
)
def test_any_shapes_sizes_and_options(
    shapes: list[tuple[int, ...]],
    name: str,
    numbers: Mapping[str, Any],
    detail_gain: object,
    limiter: object,
    **options: object,
) -> None:
    given = VARIANTS[name] | dict(numbers) | options
    if name != "foam":  # which has neither
        given |= {"detail_gain": detail_gain, "limiter": limiter}
    same(train("cpu", shapes, **given), train("eager", shapes, **given))


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_update(name: str, nesterov: bool, correct_bias: bool) -> None:
    """And each option changes something: a kernel that left one out would be seen."""
    options = {"nesterov": nesterov, "correct_bias": correct_bias}
    shapes, found = [(66, 97), (3, 541), (33,)], []
    for kernel in ("cpu", "eager"):
        found.append(train(kernel, shapes, **VARIANTS[name], **options))
    same(*found)
    plain = train("eager", shapes, recipe=VARIANTS[name]["recipe"])
    if len(VARIANTS[name]) > 1 or nesterov or not correct_bias:
        assert not torch.equal(found[0][0], plain[0])
    per_tensor = len(plain) // len(shapes)
    vector = slice(2 * per_tensor, 2 * per_tensor + 1)  # at level 0 Nesterov does nothing
    if name in RECIPES and correct_bias:
        same(found[0][vector], plain[vector])


@pytest.mark.parametrize("cache", [1, 5000, 1 << 20])
def test_tensors_held_whole_in_batches_of_any_size(cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both phases of a batch before the next, its limiters between them: the bits of one phase after the other."""
    monkeypatch.setattr(cpu, "CHUNK", 500)
    monkeypatch.setattr(cpu, "CACHE", cache)
    shapes = [(66, 97), (5,), (16, 341), (9, 3), (64, 64), (0, 4), (1, 1)]
    same(train("cpu", shapes), train("eager", shapes))

    # The same in one flat buffer, whose tensors are not in the order of their places among the norms.
    found = []
    for kernel in ("cpu", "eager"):
        monkeypatch.setenv(choice.VARIABLE, kernel)
        random = torch.Generator().manual_seed(0)
        sizes = [rows * columns for rows, columns in ((66, 97), (20, 20), (40, 30))]
        offsets = {"a": 1605, "b": 1203, "c": 3}
        tensors = tuple(Whole(n, s, ()) for n, s in zip("abc", ((66, 97), (20, 20), (40, 30)), strict=True))
        fragments = [Fragment(t.fqn, t.shape, 0, n, offsets[t.fqn]) for t, n in zip(tensors, sizes, strict=True)]
        flat = torch.nn.Parameter(torch.randn(8007, generator=random))
        optimizer = GWTAdamW([flat], lr=0.01, recipe="paper", level=2)
        optimizer.attach({flat: Shard(tensors, tuple(reversed(fragments)), (), (), alone(fragments))})
        for size in (1.0, 100.0, 1e-4):
            flat.grad = size * torch.randn(8007, generator=random)
            optimizer.step()
        found.append(results(optimizer))
        assert optimizer.state[flat]["limited_norm"].unique().numel() == 3
    same(*found)


def test_norms_of_zero_and_of_infinity_are_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kernel in ("cpu", "eager"):
        monkeypatch.setenv(choice.VARIABLE, kernel)
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(2)]
        optimizer = GWTAdamW(parameters, betas=(0.0, 0.999), recipe="paper", level=2)
        norms = []
        for size in (1.0, 0.0, 3.0, torch.inf):
            for parameter in parameters:
                parameter.grad = size * torch.ones(8, 8)
            optimizer.step()
            norms.append([optimizer.state[p]["limited_norm"].item() for p in parameters])
        assert norms[1] == norms[0] != norms[2] == norms[3] and min(norms[0]) > 0
        found.append(norms)
    assert found[0] == found[1]


def test_no_norm_is_in_two_batches() -> None:
    pieces = [Piece.of(Fragment(n, (40, 50), 0, 2000), Fragment(n, (40, 13), 0, 520), 2, "haar") for n in "abcde"]
    places = [((Place("update", Extent.TENSOR, 1, (norm,)),), ()) for norm in (2, 0, 2, 3, 1)]
    parts = tuple(Part(i, p, (), sums) for i, (p, sums) in enumerate(zip(pieces, places, strict=True)))
    work = Work(parts, program(recipe="paper"), ((1,) * 5, (0,) * 5))
    norms = work.table(500)[:, Item._fields.index("norm")]
    assert norms.tolist() == sorted(norms.tolist())
    batches = work.batches(500, 2500)
    assert [norms[first:last].unique().tolist() for first, last, _, _ in batches.tolist()] == [[0, 1], [2], [3]]
    assert batches[:, 2:].tolist() == [[0, 2], [2, 3], [3, 4]]
    assert batches[0, 0] == 0 and batches[-1, 1] == len(norms) and torch.equal(batches[1:, 0], batches[:-1, 1])


def test_a_gradient_of_another_dtype_than_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    for weight, gradient in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        found = []
        for kernel in ("cpu", "eager"):
            monkeypatch.setenv(choice.VARIABLE, kernel)
            random = torch.Generator().manual_seed(0)
            parameter = torch.nn.Parameter(torch.randn(66, 97, generator=random).to(weight))
            parameter.grad_dtype = gradient
            parameter.grad = torch.randn(66, 97, generator=random).to(gradient)
            optimizer = GWTAdamW([parameter], lr=0.01, recipe="paper", level=2)
            optimizer.step()
            found.append(results(optimizer))
        same(*found)


def test_weights_and_gradients_that_are_not_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    weight, gradient = torch.randn(64, 30, generator=random), torch.randn(64, 30, generator=random)
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    found = []
    for view in (lambda t: t, lambda t: t.t().contiguous().t(), lambda t: torch.cat([t, t], 1)[:, :30]):
        parameter = torch.nn.Parameter(view(weight.clone()))
        parameter.grad = view(gradient)
        optimizer = GWTAdamW([parameter], lr=0.01, recipe="paper", level=2)
        optimizer.step()
        found.append([t.contiguous() for t in results(optimizer)])
    same(found[1], found[0])
    same(found[2], found[0])


WORLDS = {
    "cut units": [[(0, 1001), (0, 130)], [(1001, 1003), (130, 131)], [(1003, 6402), (131, 400)]],
    "a rank without anything": [[(0, 6402), (0, 399)], [], [(0, 0), (399, 400)]],
    "a rank within one unit": [[(0, 2), (0, 8)], [(2, 3), (8, 8)], [(3, 6402), (8, 400)]],
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("level", [1, 2, 3, 8])
def test_cut_units(level: int, recipe: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.randn(66, 97), "b": torch.randn(20, 20)}
    ranks = []
    for intervals in WORLDS[world]:
        offset, fragments = 5, []
        for fqn, (start, stop) in zip(weights, intervals, strict=False):
            fragments.append(Fragment(fqn, tuple(weights[fqn].shape), start, stop, offset))
            offset += stop - start + 3  # gaps, as padding of an engine
        ranks.append(fragments)
    gradients = [{fqn: torch.randn(w.shape) for fqn, w in weights.items()} for _ in range(3)]
    found = []
    for kernel in ("cpu", "eager"):
        monkeypatch.setenv(choice.VARIABLE, kernel)
        sharded = Sharded(weights, ranks, lr=0.01, level=level, recipe=recipe)
        for gradient in gradients:
            sharded.step(gradient)
        found.append([t for optimizer in sharded.optimizers for t in results(optimizer)])
    same(*found)


def test_columns_cut_within_units_on_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"a": torch.randn(31, 23)}
    cuts = (0, 6, 7, 19, 23)
    ranks = [[Fragment("a", (31, 23), start, stop, 2, rows=31)] for start, stop in itertools.pairwise(cuts)]
    gradients = {"a": torch.randn(31, 23)}
    found = []
    for kernel in ("cpu", "eager"):
        monkeypatch.setenv(choice.VARIABLE, kernel)
        sharded = Sharded(weights, ranks, lr=0.01, level=2, recipe="energy")
        sharded.step(gradients)
        sharded.step(gradients)
        found.append([t for optimizer in sharded.optimizers for t in results(optimizer)])
    same(*found)


def test_bits_do_not_depend_on_the_number_of_threads_or_on_the_run() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            found.append(train("cpu", ((700, 1024), (16, 5461), (300, 301), (90_000,)), recipe="paper"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        same(other, found[0])


def compare_all() -> None:
    for name, dtype, level in itertools.product(VARIANTS, (torch.float32, torch.bfloat16), (0, 2, 5)):
        options = VARIANTS[name] | {"level": level, "dtype": dtype, "nesterov": level == 5}
        for state_dtype in ("fp32", "bf16", "int8") if name == "energy" else ("fp32",):
            its = options | {"state_dtype": state_dtype}
            same(train("cpu", SHAPES, **its), train("eager", SHAPES, **its))


@pytest.mark.matrix
@pytest.mark.skipif("GWT_TEST_ALL" not in os.environ, reason="builds two libraries: make support has time for it")
def test_every_instruction_set_has_the_bits_of_the_reference() -> None:
    """Both below the one that this machine has, at once: most of the time a compiler works."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    lower = order[: order.index(build.capability())]
    if not lower:
        pytest.skip(f"this machine has {build.capability()} alone, of which the other tests are")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "import test_kernels as t; t.compare_all(); print(t.build.capability())"],
            env={**os.environ, "ATEN_CPU_CAPABILITY": name.lower(), "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in lower
    ]
    try:
        for name, process in zip(lower, processes, strict=True):
            found, errors = process.communicate(timeout=280)
            assert found.split() == [name], errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


class Allocations(TorchDispatchMode):
    """Counts tensors whose memory none of an operation's arguments brought."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        brought: set[int] = set()
        torch.utils._pytree.tree_map_only(Tensor, lambda t: brought.add(t.untyped_storage()._cdata), (args, kwargs))
        found = func(*args, **(kwargs or {}))

        def note(tensor: Tensor) -> None:
            if tensor.untyped_storage()._cdata not in brought:
                self.bytes.append(tensor.untyped_storage().nbytes())

        torch.utils._pytree.tree_map_only(Tensor, note, found)
        return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_steady_step_allocates_nothing_for_each_parameter(recipe: str) -> None:
    counts = []
    for numbers in (3, 30):
        parameters = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(numbers)]
        optimizer = GWTAdamW(parameters, recipe=recipe, level=2)
        for parameter in parameters:
            parameter.grad = torch.randn(64, 64)
        optimizer.step()
        with Allocations() as allocations:
            optimizer.step()
        counts.append(len(allocations.bytes))
        assert sum(allocations.bytes) <= 200
    assert counts[0] == counts[1] <= 24


@pytest.mark.parametrize("kernel", ["eager", "cpu"])
def test_a_buffer_that_two_programs_step_or_none_counts_one_step(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix with a limiter and a vector in one flat buffer, and a buffer of which this rank holds nothing."""
    monkeypatch.setenv(choice.VARIABLE, kernel)
    its = rule_of({"lr": 0.1, "recipe": "paper", "wavelet": "haar"})
    shapes = {"matrix": (4, 8), "vector": (6,)}
    held = Fragment("matrix", (4, 8), 0, 32, offset=0), Fragment("vector", (6,), 0, 6, offset=32)
    nothing = Fragment("matrix", (4, 8), 0, 0), Fragment("vector", (6,), 0, 0)
    tensors = tuple(Whole(name, shape, ()) for name, shape in shapes.items())
    members, weights, states = [], [], []
    for fragments, length in ((held, 38), (nothing, 0)):
        plan = Plan.of(Shard(tensors, fragments, (), (), alone(fragments)), Form.of(2, "haar", its))
        weights.append(torch.randn(length))
        states.append(plan.fresh_state(weights[-1]))
        members.append(Member(plan, 0, torch.float32, True, its.program, its.plain))
    schedule = Schedule(members, torch.device("cpu"))
    assert len(schedule.local) == 2
    for t in (1, 2):
        schedule.run(weights, [torch.ones_like(weight) for weight in weights], states, [its])
        assert [state["step"].item() for state in states] == [t, t]
