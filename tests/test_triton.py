"""The Triton kernels: interpreted on the CPU against the eager ones, compiled for GPUs, and on a GPU where one is."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

import triton_cases as cases
from gwt_dist import GWTAdamW
from gwt_dist.kernels import choice, choose, cpu, eager, triton
from gwt_dist.kernels.build import BuildError
from gwt_dist.layout import Fragment
from gwt_dist.piece import Piece
from gwt_dist.programs import ADAM
from ranks import RankPool
from test_memory_safety import BROKEN
from triton_cases import CAUTIOUS, ENERGY, FOAM, PAPER, rule

INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_equal_to_eager_on_random_tensors(interpreted: Callable[..., Any]) -> None:
    interpreted(cases.equal_to_eager_on_random_tensors, 40)


@pytest.mark.parametrize(
    "level", [level for level in range(9) if level in (0, 2, 5, 8) or "GWT_TEST_ALL" in os.environ]
)
def test_equal_to_eager_at_every_level(interpreted: Callable[..., Any], level: int) -> None:
    interpreted(cases.equal_to_eager_at_every_level, level)


def test_equal_to_eager_where_units_are_cut(interpreted: Callable[..., Any]) -> None:
    interpreted(cases.equal_to_eager_where_units_are_cut, 12)


def test_norms_are_added_in_one_order(interpreted: Callable[..., Any]) -> None:
    found = interpreted(cases.norms)
    np.testing.assert_allclose(found["triton"], found["eager"], rtol=1e-14)
    assert found["triton"] == found["again"]
    assert found["places"] == [0, 1, 3]  # one program each, so that no two add to the same sum
    assert found["eager"][0] > 1  # more than the 0.5 that was there


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.99, 0.99999), (0.5, 0.0)])
def test_step_sizes(interpreted: Callable[..., Any], betas: tuple[float, float], nesterov: bool) -> None:
    steps = [*range(1, 51), 1000, 123_457, 1 << 20, 1 << 24]
    found, expected = interpreted(cases.step_sizes, betas, steps, nesterov)
    # 1 - beta**t magnifies the last bit of beta**t, which is all that the two may differ in.
    at_most = [4e-16 / min(1 - betas[0] ** t, 1 - betas[1] ** t) for t in steps]
    assert (abs(np.array(found) / expected - 1) <= at_most).all()
    assert np.float32(found).tolist() == np.float32(expected).tolist()


def test_numbers_in_another_order_change_nothing() -> None:
    """In a process that has not imported the kernels yet."""
    if not INSTALLED:
        pytest.skip("triton is not installed")
    pool = RankPool(1)
    try:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            (order,) = pool.run(cases.numbers_in_another_order, timeout=120.0)
    finally:
        pool.close()
    assert order != ["lr", *ADAM] and sorted(order) == sorted(["lr", *ADAM])


def test_tables_go_to_the_device_when_they_change(interpreted: Callable[..., Any]) -> None:
    seen = interpreted(cases.uploads)
    assert seen.pop("launches") == 1
    sent = {what: count for what, (count, _) in seen.items()}
    assert sent == {"first": 5, "again": 0, "rate on the device": 0, "another gradient": 1, "another rule": 1}
    assert 1.5 < seen["rate on the device"][1] / seen["again"][1] < 2.5  # the new rate was read all the same


@pytest.mark.parametrize(
    ("recipe", "launches"),
    # Levels have a launch each. With a limiter vectors have another program than matrices, which have two phases.
    [
        ("energy", ["count", "phase", "phase"]),
        ("paper", ["count", "count", "phase", "phase", "add_partials", "phase"]),
    ],
)
def test_what_a_step_asks_of_the_gpu_does_not_grow_with_its_tensors(
    interpreted: Callable[..., Any], recipe: str, launches: list[str]
) -> None:
    few, many = interpreted(cases.of_one_step, recipe, (6, 60))
    assert few == many
    assert few[0] == launches
    rate = ["aten.select.int", "aten.slice.Tensor", "aten.view.default", "aten.copy_.default"]
    # Room for cut units, and of each program its learning rate.
    assert few[1] == ["aten.zeros.default", *rate * launches.count("count")]


def test_limiters_on_the_device_are_those_of_the_formula(interpreted: Callable[..., Any]) -> None:
    found = interpreted(cases.limited)
    assert repr(found["triton"]) == repr(found["eager"])  # to the last bit, nan among them
    rho, norms = found["triton"]
    assert len({*rho}) == 3 and norms[0] != 1.0


def test_tensors_that_are_not_what_they_were_are_refused_before_anything_is_counted(
    interpreted: Callable[..., Any],
) -> None:
    said = interpreted(cases.refusals)
    patterns = {what: match for what, (_, match) in BROKEN.items()}
    assert len(said) == 7 * (3 + 4) + 4
    for where, message in said.items():
        what = where.partition(": ")[2]
        if where == "gradient: fp64":
            expected = r"a gradient of this step is torch.float64 on cpu; .* They take dense torch.float32 or torch.bfl"
        elif where.startswith("gradient") and what == "int":
            expected = "the gradient of a parameter|the gradient of .* is torch.int32 and must be floating"
        else:
            expected = patterns.get(what, "must be dense")
        assert re.search(expected, message), (where, message)


PROGRAM = rule(ENERGY).program


def piece(level: int = 2, wavelet: str = "haar") -> Piece:
    fragment = Fragment("layer.weight", (4, 8), 0, 32)
    return Piece.of(fragment, Fragment("layer.weight", (4, 8), 0, 32), level, wavelet)


@needs_triton
@pytest.mark.parametrize(
    ("device", "dtype", "given", "message"),
    [
        ("cpu", torch.float32, piece(), "parameters on cpu .a GPU is needed"),
        ("cuda", torch.float64, piece(), "parameters of torch.float64"),
        ("cuda", torch.float32, piece(9), r"levels above 8 \(layer.weight\)"),
        ("cuda", torch.float32, piece(2, "db2"), r"wavelets other than Haar \(layer.weight\)"),
    ],
)
def test_what_triton_cannot_take_is_said(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, given: Piece, message: str
) -> None:
    monkeypatch.setenv(choice.VARIABLE, "triton")
    with pytest.raises(ValueError, match=f"GWT_DIST_KERNEL=triton cannot take {message}"):
        choose(torch.device(device), dtype, PROGRAM, [given])
    monkeypatch.delenv(choice.VARIABLE)
    if device == "cuda":
        assert choose(torch.device(device), dtype, PROGRAM, [given]) is eager


def test_without_triton_a_gpu_gets_the_eager_kernels_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    triton._kernels.cache_clear()
    choice._loaded.cache_clear()
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    device = torch.device("cuda")
    try:
        with pytest.warns(RuntimeWarning, match="(?s)need the package triton.*eager kernel") as caught:
            assert choose(device, torch.float32, PROGRAM, [piece()]) is eager
            assert choose(device, torch.float32, PROGRAM, [piece()]) is eager
        assert len(caught) == 1
        monkeypatch.setenv(choice.VARIABLE, "triton")
        with pytest.raises(BuildError, match="pip install triton"):
            choose(device, torch.float32, PROGRAM, [piece()])
    finally:
        choice._loaded.cache_clear()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "triton")
    with pytest.raises(BuildError, match="need a GPU, and triton finds none"):
        choose(torch.device("cuda"), torch.float32, PROGRAM, [piece()])


def test_the_cpu_kernels_are_not_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    with pytest.raises(ValueError, match="cannot take parameters on cuda"):
        choose(torch.device("cuda"), torch.float32, PROGRAM, [piece()])
    assert choose(torch.device("cpu"), torch.float32, PROGRAM, [piece()]) is cpu


@needs_gpu
@pytest.mark.parametrize("level", range(9))
def test_equal_to_eager_on_a_gpu(level: int) -> None:
    shapes, wide = [(7,), (5, 97), (64, 1024), (300, 1), (3, 42001)], (torch.float32, torch.bfloat16)
    tensors = [(shape, w, g, i == 1) for i, shape in enumerate(shapes) for w in wide for g in wide]
    several = [rule(ENERGY), rule(PAPER, weight_decay=0.0)], [rule(FOAM, nesterov=True), rule(CAUTIOUS)]
    for rules in ([rule(PAPER)], *several):
        cases.run_both("triton", tensors, rules, level, 1.0, triton.CHUNK, level, device="cuda")


@needs_gpu
@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e18, 1e37])
def test_equal_to_eager_on_a_gpu_for_gradients_of_any_size(size: float) -> None:
    tensors = [(shape, torch.float32, torch.float32, True) for shape in ((5, 97), (64, 256))]
    for recipe in (PAPER, ENERGY, FOAM):
        cases.run_both("triton", tensors, [rule(recipe)], 2, size, triton.CHUNK, 0, device="cuda")


class OnGpu:
    """The same parameters with each kernel; their learning rates are tensors on the GPU, gradients stay in place."""

    def __init__(self, kernel: str, recipe: str) -> None:
        self.kernel, generator = kernel, torch.Generator().manual_seed(0)
        shapes = [(64, 256), (5, 97), (33,), (16, 1000)]
        start = [torch.randn(shape, generator=generator) for shape in shapes]
        self.weights = [
            torch.nn.Parameter(w.cuda().to(torch.bfloat16 if i == 3 else w.dtype)) for i, w in enumerate(start)
        ]
        self.rate = torch.tensor(0.01, device="cuda")
        self.optimizer = GWTAdamW(self.weights, lr=self.rate, level=2, recipe=recipe, weight_decay=0.1)
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)

    def set(self, t: int) -> None:
        """Gradients and learning rate of step t, written where they lie."""
        generator = torch.Generator(device="cuda").manual_seed(t)
        self.rate.fill_(0.01 / t)
        for weight in self.weights:
            assert weight.grad is not None
            weight.grad.copy_(t * torch.randn(weight.shape, device="cuda", generator=generator))

    def step(self) -> None:
        with cases.kernel(self.kernel):
            self.optimizer.step()

    def equals(self, other: OnGpu) -> None:
        for a, b in zip(self.weights, other.weights, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            for key, value in self.optimizer.state[a].items():
                assert value.device.type == "cuda", key
                torch.testing.assert_close(value, other.optimizer.state[b][key], rtol=0, atol=0)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("rate", ["tensor", "float"])
@pytest.mark.parametrize("recipe", ["paper", "energy", "foam", "orthogonal"])
@pytest.mark.parametrize("kernel", ["triton", "eager"])
def test_a_step_never_waits_for_the_gpu(kernel: str, recipe: str, rate: str) -> None:
    model = OnGpu(kernel, recipe)
    if rate == "float":
        model.optimizer.param_groups[0]["lr"] = 0.01
    model.set(1)
    model.step()
    model.set(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.step()
        for weight in model.weights:  # other addresses: their table goes there anew
            weight.grad = torch.ones_like(weight)
        if rate == "float":
            model.optimizer.param_groups[0]["lr"] = 0.02
        model.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("recipe", ["paper", "energy", "foam"])
def test_a_captured_step_follows_gradients_rate_and_step(recipe: str) -> None:
    """Three steps, a capture, four replays and two plain steps, with other tables between, equal nine plain steps."""
    model, expected = OnGpu("triton", recipe), OnGpu("eager", recipe)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in (1, 2, 3):
            model.set(t)
            model.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    for t in range(1, 10):
        expected.set(t)
        expected.step()
        if t <= 3:
            continue
        model.set(t)
        if t in (6, 9):
            # Gradients elsewhere, and another table of addresses, which must not reach the graph.
            inside = [weight.grad for weight in model.weights]
            for weight in model.weights:
                assert weight.grad is not None
                weight.grad = weight.grad.clone()
            model.step()
            for weight, gradient in zip(model.weights, inside, strict=True):
                weight.grad = gradient
        else:
            graph.replay()
        model.equals(expected)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_a_whole_training_step_is_captured() -> None:
    """Gradients that the graph allocates itself: the table of their addresses goes to the GPU within the capture."""
    weight = torch.nn.Parameter(torch.ones(8, 64, device="cuda"))
    twin = torch.nn.Parameter(weight.detach().clone())
    optimizers = [GWTAdamW([w], lr=0.01, level=2, recipe="paper") for w in (weight, twin)]
    x = torch.zeros(8, 64, device="cuda")

    def step(w: torch.nn.Parameter, optimizer: GWTAdamW) -> None:
        optimizer.zero_grad(set_to_none=True)
        ((w * x) ** 2).sum().backward()
        optimizer.step()

    def turn(t: int) -> None:
        x.copy_(torch.randn(8, 64, generator=torch.Generator().manual_seed(t)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(3):
            turn(t)
            step(weight, optimizers[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(weight, optimizers[0])
    for t in range(8):
        turn(t)
        step(twin, optimizers[1])
        if t >= 3:
            graph.replay()
    torch.testing.assert_close(weight, twin, rtol=0, atol=0)
