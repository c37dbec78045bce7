"""Cases for `test_triton.py` that run where Triton interprets its kernels, which a process decides when it starts."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import test_layout
import test_memory_safety
from gwt_dist import GWTAdamW, programs, recipes
from gwt_dist.comm import Shard
from gwt_dist.declare import Extent, Rule
from gwt_dist.formulas import moments
from gwt_dist.kernels import Place, choice, eager, tables, triton
from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.plan import Form, Plan
from gwt_dist.schedule import Member, Schedule

SLOW = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PAPER: dict[str, Any] = {"recipe": "paper"}
ENERGY: dict[str, Any] = {"recipe": "energy"}
FOAM: dict[str, Any] = {"recipe": "foam"}
CAUTIOUS: dict[str, Any] = {"recipe": "energy", "cautious": True}
RECIPES = PAPER, ENERGY, FOAM, CAUTIOUS, {"recipe": "foam", "second_moment": "approximation", "cautious": True}


@contextmanager
def interpreter() -> Iterator[None]:
    """Triton's interpreter with two repairs: it rounds bf16 wrongly, and it has one state for all threads."""
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    assert triton_module_is_interpreted()
    convert, lock = triton_interpreter._convert_float, threading.Lock()

    def converted(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(x)).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(np.array(x)).view(torch.bfloat16).float().numpy().view(np.uint32)
        return convert(x, source, target, mode)

    def locked(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            with lock:
                function(*args)

        return run

    with ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))
        stack.enter_context(patch.object(triton_interpreter, "_convert_float", converted))
        for name in ("count", "phase", "settle", "step", "send", "keep"):
            stack.enter_context(patch.object(triton, name, locked(getattr(triton, name))))
        yield


def triton_module_is_interpreted() -> bool:
    triton.prepare()
    return triton.interpreted()


@contextmanager
def kernel(name: str, chunk: int = triton.CHUNK) -> Iterator[None]:
    with patch.dict(os.environ, {choice.VARIABLE: name}), patch.object(triton, "CHUNK", chunk):
        yield


class Whole:
    """Tensors that one process holds whole, stepped together; gradients need not have the dtype of their weight."""

    def __init__(self, name: str, weights: list[Tensor], level: int, rules: list[Rule], device: str = "cpu") -> None:
        with kernel(name):
            its_rules = [rules[i % len(rules)] for i in range(len(weights))]
            plans = [
                Plan.of(Shard.whole(f"t{i}", tuple(w.shape)), Form.of(level, "haar", its))
                for i, (w, its) in enumerate(zip(weights, its_rules, strict=True))
            ]
            self.weights = [w.to(device, copy=True) for w in weights]
            self.states = [plan.fresh_state(w) for plan, w in zip(plans, self.weights, strict=True)]
            self.rules = rules
            members = [
                Member(plan, i % len(rules), w.dtype, True, its.program, its.plain)
                for i, (plan, w, its) in enumerate(zip(plans, weights, its_rules, strict=True))
            ]
            self.schedule = Schedule(members, torch.device(device))

    def step(self, gradients: list[Tensor]) -> None:
        gradients = [g.to(self.weights[0].device) for g in gradients]
        self.schedule.run(self.weights, gradients, self.states, self.rules)

    def tensors(self, gradients: list[Tensor]) -> Tensors:
        """Of all weights under the first rule, as a kernel is given them."""
        state = {name: [its[name] for its in self.states] for name in self.rules[0].program.names()}
        steps = [its["step"] for its in self.states]
        return Tensors(self.weights, gradients, state, steps, self.rules[:1] * len(steps), torch.zeros(0))

    def equals(self, other: Whole) -> None:
        """Bit for bit, but for the sign of a zero."""
        for i, (a, b) in enumerate(zip(self.weights, other.weights, strict=True)):
            same(a, b, f"weight {i}")
        for i, (a, b) in enumerate(zip(self.states, other.states, strict=True)):
            for key in b:
                same(a[key], b[key], f"{key} {i}")


def same(a: Tensor, b: Tensor, what: str) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def rule(recipe: dict[str, Any], **numbers: Any) -> Rule:
    return recipes.rule_of({"lr": 0.01, "weight_decay": 0.1, "wavelet": "haar"} | recipe | numbers)


def gradient(
    shape: tuple[int, ...], dtype: torch.dtype, size: float, holes: bool, generator: torch.Generator
) -> Tensor:
    """Normal numbers of a size; with zeros and smallest numbers among them."""
    g = size * torch.randn(shape, generator=generator, dtype=torch.float64)
    if holes:
        which = torch.randint(0, 6, shape, generator=generator)
        g[which == 0] = 0
        g[which == 1] = 1e-41
        g[which == 2] = -2e-45
    return g.to(dtype)


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    shape = st.one_of(
        st.tuples(st.integers(1, 70)),
        st.tuples(st.integers(1, 5), st.integers(1, 90)),
        st.tuples(st.integers(1, 3), st.sampled_from([16, 64, 128, 256, 515])),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
    )
    tensors = draw(st.lists(st.tuples(shape, DTYPES, DTYPES, st.booleans()), min_size=1, max_size=3))
    its_recipes = draw(st.lists(st.sampled_from(RECIPES), min_size=1, max_size=2))
    number = dict(
        nesterov=draw(st.booleans()),
        correct_bias=draw(st.booleans()),
        lr=draw(st.sampled_from([0.0, 1e-5, 0.01, 1.0])),
        betas=draw(st.sampled_from([(0.9, 0.999), (0.0, 0.99), (0.95, 0.0), (0.8, 0.9999)])),
        eps=draw(st.sampled_from([1e-30, 1e-8, 1e-6, 0.1])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        scale=draw(st.sampled_from([0.25, 1.0])),
    )
    return dict(
        tensors=tensors,
        rules=[rule(recipe, **number) for recipe in its_recipes],
        level=draw(st.integers(0, 8)),
        size=10.0 ** draw(st.sampled_from([-42, -30, -20, -3, 0, 0, 3, 18, 37])),
        chunk=draw(st.sampled_from([64, 512, 4096])),
        seed=draw(st.integers(0, 99)),
    )


def equal_to_eager_on_random_tensors(examples: int) -> None:
    with interpreter():
        settings(SLOW, max_examples=examples)(given(worlds())(_equal_to_eager))()


def _equal_to_eager(world: dict[str, Any]) -> None:
    run_both("triton", **world)


def run_both(
    name: str, tensors: Any, rules: list[Rule], level: int, size: float, chunk: int, seed: int, device: str = "cpu"
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype, _, _ in tensors]
    found = Whole(name, weights, level, rules, device)
    expected = Whole("eager", weights, level, rules, device)
    for grow in (1.0, 3.0):
        gradients = [gradient(shape, dtype, grow * size, holes, generator) for shape, _, dtype, holes in tensors]
        with kernel(name, chunk):
            found.step(gradients)
        expected.step(gradients)
    found.equals(expected)


def equal_to_eager_at_every_level(level: int) -> None:
    """All combinations of dtypes, whole units and ragged rows, many tensors and two groups at once."""
    shapes = [(7,), (5, 97), (2, 1024), (3, 1), (2, 1100), (1, (16 << level) - 1)]
    wide = (torch.float32, torch.bfloat16)
    tensors = [(s, w, g, False) for i, s in enumerate(shapes) for w in wide for g in wide[: 1 + (i < 4)]]
    with interpreter():
        for size, chunk in ((1.0, 4096), (1e-20, 512)):
            rules = [rule(PAPER), rule(ENERGY, weight_decay=0.0), rule(FOAM, nesterov=True)]
            run_both("triton", tensors, rules, level, size, chunk, level)


def equal_to_eager_where_units_are_cut(examples: int) -> None:
    """Random fragments of random tensors on up to nine ranks, some of them empty, rectangles among them."""

    @settings(SLOW, max_examples=examples)
    @given(test_layout.worlds(), st.integers(0, 6), st.sampled_from(["energy", "paper", "foam"]))
    def check(world: Any, level: int, recipe: str) -> None:
        found = {}
        for name in ("eager", "triton"):
            with kernel(name, 64):
                found[name] = test_layout.run(world, level, recipe, "haar", torch.float32)
        (_, expected, reference, _), (whole, sharded, optimizer, _) = found["eager"], found["triton"]
        for fqn, weight in expected.items():
            same(sharded[fqn], weight, fqn)
            if recipe != "paper":
                same(sharded[fqn], whole[fqn], f"{fqn} sharded and whole")
        for a, b in zip(optimizer.optimizers, reference.optimizers, strict=True):
            for one, other in zip(a.state.values(), b.state.values(), strict=True):
                for key in one:
                    same(one[key], other[key], key)

    with interpreter():
        check()


def norms() -> dict[str, list[float]]:
    """Squared norms by both kernels on top of what is there, twice by Triton; some 40 items of two launches."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=generator) for s in ((3, 130), (4, 256), (2, 64), (6, 33))]
    gradients = [torch.randn(w.shape, generator=generator) for w in weights]
    found = {}
    with interpreter():
        for name in ("eager", "triton", "again"):
            module = eager if name == "eager" else triton
            start = Whole("eager", weights, 2, [rule(PAPER)])
            (run,) = start.schedule.local
            for state in start.states:
                state["step"] += 1
            # Two fragments of one tensor, not next to each other, and an order of norms that is not that of items.
            parts = [
                replace(part, sums=((Place("update", Extent.TENSOR, 1, (norm,)),), ()))
                for part, norm in zip(run.work.parts, (3, 0, 3, 1), strict=True)
            ]
            work = Work(tuple(parts), run.work.program, run.work.lengths)
            squared_norms = torch.tensor([0.5, 0.0, 3.0, 0.0], dtype=torch.float64)
            with patch.object(triton, "CHUNK", 64):
                module.phase(0, work, start.tensors(gradients), [squared_norms])
            found[name] = squared_norms.tolist()
            if module is triton:
                found["places"] = triton._kept[work].made["programs"][1].norms[:, 0].tolist()
    return found


def step_sizes(betas: tuple[float, float], steps: list[int], nesterov: bool) -> tuple[list[float], list[float]]:
    """``lr * sqrt(1-b2**t)/(1-b1**t)`` above level 0 as the kernel has it and as `moments.step_size` has it."""
    numbers = rule(PAPER, betas=betas, lr=0.3, nesterov=nesterov)
    first = torch.tensor([float(i % 2) for i in range(len(steps))])
    counts = [torch.tensor(t - first[i].item()) for i, t in enumerate(steps)]
    parameters = torch.tensor([[0, 0, 0, 0, t.data_ptr(), 0, 0, 0] for t in counts])
    rules = torch.tensor([tables.row(numbers, torch.device("cpu"))], dtype=torch.float64)
    kernels, of_detail = triton._kernels(), triton._functions(numbers.program)["details"].sizes
    found = torch.zeros((len(steps), kernels.SIZES.value), dtype=torch.float64)
    with interpreter():
        programs = (-(-len(steps) // 32),)
        kernels.count[programs](parameters, first, rules, found, len(steps), OF_DETAIL=of_detail, BLOCK=32)
    assert [t.item() for t in counts] == steps
    return found[:, 3].tolist(), [moments.step_size(t, numbers, 1).item() for t in counts]


def numbers_in_another_order() -> list[str]:
    """One step of every recipe where the tuple that all tables follow is shuffled before the kernels are imported."""
    assert "gwt_dist.kernels.triton_kernels" not in sys.modules, "the order is read when they are imported"
    shuffled = *programs.ADAM[3:], *programs.ADAM[:3]
    with patch.object(programs, "ADAM", shuffled):
        interpreted_now = triton_module_is_interpreted()
    assert interpreted_now
    tensors = [((5, 97), torch.float32, torch.float32, False)]
    with interpreter():
        for recipe in RECIPES:
            numbers = dict(nesterov=True, eps=0.1, scale=0.5, betas=(0.8, 0.95))
            run_both("triton", tensors, [rule(recipe, **numbers)], 2, 1.0, 4096, 0)
    return list(triton._kernels().NUMBERS)


def uploads() -> dict[str, Any]:
    """How often tables go to the device, and in how many launches, with 20 tensors and three ways to change."""
    weights = [torch.nn.Parameter(torch.randn(4, 16)) for _ in range(20)]
    rate = torch.tensor(0.01)
    seen: dict[str, Any] = {}
    with interpreter(), kernel("triton"), patch.object(triton.Kept, "upload", autospec=True) as upload:
        upload.side_effect = lambda kept, values, dtype: torch.as_tensor(values, dtype=dtype).clone()
        optimizer = GWTAdamW(weights, lr=rate, level=2, recipe="energy")
        for weight in weights:
            weight.grad = torch.randn_like(weight)

        def count(what: str) -> None:
            upload.reset_mock()
            before = weights[0].detach().clone()
            optimizer.step()
            seen[what] = upload.call_count, float((weights[0] - before).detach().abs().max())

        count("first")
        count("again")
        rate.fill_(0.02)
        count("rate on the device")
        before, weights[7].grad = weights[7].grad, torch.randn_like(weights[7])  # both alive: they have two addresses
        count("another gradient")
        optimizer.param_groups[0]["weight_decay"] = 0.5
        count("another rule")
    ((schedule, *_),) = next(iter(optimizer._steps._schedules.values()))[1]
    (run,) = schedule.local
    seen["launches"] = len(triton._kept[run.work].made["programs"][1].groups)
    assert before is not None
    return seen


class Launches:
    """In the place of the kernels: which were launched, one name a launch."""

    def __init__(self, module: Any, kernels: Sequence[str]) -> None:
        self.names: list[str] = []
        self.module, self.kernels = module, kernels

    @contextmanager
    def instead(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in self.kernels:
                launch = {"__getitem__": lambda _, grid, name=name: lambda *args, **kwargs: self.names.append(name)}
                stack.enter_context(patch.object(self.module, name, type("Launch", (), launch)()))
            yield


class Operations(TorchDispatchMode):
    """Which operations torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "aten":  # others are the profiler's
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def of_one_step(recipe: str, numbers: tuple[int, ...]) -> list[tuple[list[str], list[str]]]:
    """Launches and operations of torch in a later step of so many matrices, vectors among them."""
    found = []
    for number in numbers:
        weights = [torch.nn.Parameter(torch.randn(8, 16) if i % 3 else torch.randn(5)) for i in range(number)]
        rate = torch.tensor(0.01)  # read on the device
        with interpreter(), kernel("triton"):
            optimizer = GWTAdamW(weights, lr=rate, recipe=recipe, level=1)
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
            launches = Launches(triton._kernels(), ("count", "phase", "add_partials", "limit"))
            with launches.instead(), Operations() as operations:
                optimizer.step()
        found.append((launches.names, operations.names))
    return found


def limited() -> dict[str, Any]:
    """`settle` beside `limiter.limit`: norms of parameters of one, three and no tensors, two rules."""
    rules = [rule(PAPER), rule(PAPER, limiter=1.5)]
    inf, nan = float("inf"), float("nan")
    counts, each = (1, 3, 0, 4), [rules[0], rules[1], rules[0], rules[1]]
    before = [[1.0], [2.0, 0.0, 0.5], [], [3.0, 0.25, 7.0, -1.0]]
    sums = torch.tensor([1.1, 16.0, 9.0, inf, 9.1, 0.0, nan, 2.0], dtype=torch.float64)
    found = {}
    for name in ("eager", "triton"):
        state = {"limited_norm": [torch.tensor(its) for its in before]}
        work = Work((), rules[0].program, (counts, (0, 0, 0, 0)))
        tensors = Tensors([], [], state, [], each, sums)
        rho = sums.clone()
        if name == "eager":
            eager.settle(0, work, tensors, rho)
        else:
            with interpreter():
                triton.settle(0, work, tensors, rho)
        found[name] = rho.tolist(), [limited.tolist() for limited in state["limited_norm"]]
    return found


def refusals() -> dict[str, str]:
    """What is said of tensors that are not what they were, and nothing of the step was done."""
    said: dict[str, str] = {}
    with interpreter(), kernel("triton"):
        _refusals(said)
    return said


def _refusals(said: dict[str, str]) -> None:
    for recipe in ("energy", "paper"):
        for what, (change, _) in test_memory_safety.BROKEN.items():
            for name in ("exp_avg", "exp_avg_sq", "step", *(["limited_norm"] if recipe == "paper" else [])):
                parameters, optimizer = test_memory_safety.built(recipe)
                state = optimizer.state[parameters[1]]
                state[name] = change(state[name])
                said[f"{recipe}, {name}: {what}"] = _refusal(parameters, optimizer)
    for what in ("short", "fp64", "int"):
        parameters, optimizer = test_memory_safety.built()
        gradient = parameters[1].grad
        assert gradient is not None
        gradient.data = test_memory_safety.BROKEN[what][0](gradient.data)
        said[f"gradient: {what}"] = _refusal(parameters, optimizer)
    parameters, optimizer = test_memory_safety.built()
    state = optimizer.state[parameters[0]]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    said["strides"] = _refusal(parameters, optimizer)


def _refusal(parameters: list[torch.nn.Parameter], optimizer: GWTAdamW) -> str:
    before = test_memory_safety.everything(parameters, optimizer)
    try:
        optimizer.step()
    except ValueError as error:
        after = test_memory_safety.everything(parameters, optimizer)
        same_as_before = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        return str(error) if same_as_before else "changed"
    return "stepped"
