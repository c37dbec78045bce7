"""Recipes with a second moment of rows and columns: by the published formulas, on any ranks, in how many sums."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gwt_dist import Fragment, GWTAdamW
from gwt_dist.memory import GroupSpec, plan_zero
from simulated import Sharded, unlike_one_process
from test_layout import worlds
from test_recipes import random

FP64 = torch.float64
# As came_pytorch has them: eps is 1e-30 beside a square.
PUBLISHED = {"lr": 1e-3, "level": 0, "least_level": 0, "eps": 1e-15, "correct_bias": False}


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Signal and noise of sizes that differ from step to step, with outliers."""
    signal, found = random(*shape, seed=1), []
    for i in range(steps):
        outliers = 1 + 9 * (random(*shape, seed=500 + i) > 2.3).double()
        found.append(10.0 ** (i % 4 - 2) * (random(*shape, seed=10 + i) * outliers + 0.7 * signal))
    return found


def stepped(weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    """What the weights have become."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = GWTAdamW([parameter], **options)
    for grad in grads:
        parameter.grad = grad.to(weight)
        optimizer.step()
    return parameter.detach()


def published(grads: list[np.ndarray], beta3: float, clip: float, betas: tuple[float, float]) -> list[np.ndarray]:
    """The updates of CAME, or with ``beta3=0`` of Adafactor with momentum, of ``[R, K]``: as in the papers."""

    def root(row: np.ndarray, col: np.ndarray) -> np.ndarray:
        return 1 / np.sqrt((row / row.mean())[:, None] * col[None])

    m, found = np.zeros_like(grads[0]), []
    (rows, cols), (b1, b2) = m.shape, betas
    r, c, sr, sc = np.zeros(rows), np.zeros(cols), np.zeros(rows), np.zeros(cols)
    for g in grads:
        q = g * g + 1e-30
        r, c = b2 * r + (1 - b2) * q.mean(1), b2 * c + (1 - b2) * q.mean(0)
        u = g * root(r, c)
        u = u / max(1, np.sqrt((u * u).mean()) / clip)
        m = b1 * m + (1 - b1) * u
        s = (u - m) ** 2 + 1e-16
        sr, sc = beta3 * sr + (1 - beta3) * s.mean(1), beta3 * sc + (1 - beta3) * s.mean(0)
        found.append(m * root(sr, sc) if beta3 else m)
    return found


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize(("recipe", "beta3"), [("came", 0.97), ("factored", 0.0)])
@pytest.mark.parametrize("shape", [(66, 97), (16, 341), (3, 7), (1, 29), (5, 1)])
def test_it_is_the_published_step_of_the_coefficients(
    shape: tuple[int, int], recipe: str, beta3: float, level: int
) -> None:
    """Of level 2 what moves is the mean of each unit: its coefficient, halved and halved again on its way back."""
    grads, unit = gradients(shape, 20), 1 << level
    padded = [np.pad(g.numpy(), ((0, 0), (0, -shape[1] % unit))) for g in grads]
    coefficients = [g.reshape(shape[0], -1, unit).sum(-1) / np.sqrt(unit) for g in padded]
    updates = published(coefficients, beta3, 0.8, (0.85, 0.98))
    expected = -1e-3 * np.repeat(sum(updates), unit, 1)[:, : shape[1]] / np.sqrt(unit)
    options = PUBLISHED | {"recipe": recipe, "betas": (0.85, 0.98), "clip_threshold": 0.8, "level": level}
    options |= {"second_moment": "approximation", "detail_gain": 0.0}
    if recipe == "came":
        options["confidence_beta"] = beta3
    for dtype, most in ((FP64, 1e-12), (torch.float32, 1e-6)):
        moved = stepped(torch.zeros(shape, dtype=dtype), grads, **options).double().numpy()
        assert np.linalg.norm(moved - expected) <= most * np.linalg.norm(expected), dtype


@pytest.mark.parametrize(("recipe", "beta3"), [("came", 0.97), ("factored", 0.0)])
@pytest.mark.parametrize("gain", ["coherence", 0.3])
def test_it_is_the_step_of_its_docstring(recipe: str, beta3: float, gain: str | float) -> None:
    """With bias corrected and details, whose rows have padding; gradients steady enough that some coherence is 1."""
    (b1, b2), lr, (rows, columns), unit = (0.85, 0.98), 1e-3, (9, 27), 4
    grads = [
        (g + (1.5 * random(rows, columns, seed=1) if i > 8 else 0)).numpy()
        for i, g in enumerate(gradients((rows, columns), 16))
    ]
    real = np.pad(np.ones((rows, columns)), ((0, 0), (0, 1))).reshape(rows, -1, unit).sum(-1)
    m = np.zeros_like(real)
    r, c, sr, sc = (np.zeros(n) for n in (*real.shape, *real.shape))
    weight, steady_most = np.zeros((rows, columns)), 0.0
    for t, g in enumerate(grads, 1):
        units = np.pad(g, ((0, 0), (0, 1))).reshape(rows, -1, unit)
        a, e = units.sum(-1) / 2, (units**2).sum(-1) / real + 1e-12
        r, c = b2 * r + (1 - b2) * e.mean(1), b2 * c + (1 - b2) * e.mean(0)
        inverse = 1 / np.sqrt(np.outer(r, c) / r.mean() / (1 - b2**t))
        inverse /= max(1, np.sqrt(((a * inverse) ** 2).mean()) / 0.8)
        weigh = (1 - b1 if gain == "coherence" else gain) / (1 - b1**t)
        if gain == "coherence" and t > 1:
            steady = np.minimum((m / (1 - b1 ** (t - 1))) ** 2, 1)
            weigh, steady_most = np.maximum(weigh, steady), max(steady_most, steady.max())
        u = a * inverse
        m = b1 * m + (1 - b1) * u
        s = (u - m) ** 2 + 1e-16
        sr, sc = beta3 * sr + (1 - beta3) * s.mean(1), beta3 * sc + (1 - beta3) * s.mean(0)
        sure = 1 / np.sqrt(np.outer(sr, sc) / sr.mean() / (1 - beta3**t)) if beta3 else np.ones_like(m)
        mean, detail = m / (1 - b1**t) / 2, units - (a / 2)[..., None]
        change = (sure * mean)[..., None] + (weigh * inverse)[..., None] * detail
        weight -= lr * 0.7 * change.reshape(rows, -1)[:, :columns]
    options = {"lr": lr, "scale": 0.7, "recipe": recipe, "betas": (b1, b2), "clip_threshold": 0.8, "level": 2}
    options |= {"detail_gain": gain} | ({"confidence_beta": beta3} if beta3 else {})
    moved = stepped(torch.zeros(rows, columns, dtype=FP64), [torch.from_numpy(g) for g in grads], **options).numpy()
    assert np.linalg.norm(moved - weight) <= 1e-12 * np.linalg.norm(weight)
    assert (gain != "coherence") or 0.5 < steady_most <= 1


def adalomo(weight: np.ndarray, grads: list[np.ndarray], lr: float, unit: int, clip: float) -> np.ndarray:
    """The weights after AdaLomo's steps, as in its paper, but that a column is one of units of `unit` elements."""
    w, (rows, columns) = weight.copy(), weight.shape
    r, c = np.zeros(rows), np.zeros(-(-columns // unit))
    real = np.pad(np.ones_like(w), ((0, 0), (0, -columns % unit))).reshape(rows, -1, unit).sum(-1)
    for t, g in enumerate(grads, 1):
        squares = np.pad(g * g, ((0, 0), (0, -columns % unit))).reshape(rows, -1, unit).sum(-1)
        q, beta = squares / real + 1e-30, 1 - t**-0.8
        r, c = beta * r + (1 - beta) * q.mean(1), beta * c + (1 - beta) * q.mean(0)
        v = (r / r.mean())[:, None] * c[None]
        u = g / np.sqrt(np.repeat(v, unit, 1)[:, :columns])
        u = u / max(1, np.sqrt((u * u).mean()) / clip)
        w -= lr * max(1e-3, np.sqrt((w * w).mean())) * u
    return w


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("shape", [(66, 97), (16, 341), (3, 7), (1, 29), (5, 1)])
@pytest.mark.parametrize("size", [0.02, 0.0])  # weights of zeros move by the least rate
def test_it_is_the_published_step_of_adalomo(shape: tuple[int, int], level: int, size: float) -> None:
    start, grads = size * random(*shape), gradients(shape, 20)
    expected = adalomo(start.numpy(), [g.numpy() for g in grads], 0.1, 1 << level, 0.8)
    options = {"lr": 0.1, "recipe": "adalomo", "level": level, "eps": 1e-15, "clip_threshold": 0.8}
    for dtype, most in ((FP64, 1e-12), (torch.float32, 1e-6)):
        moved = stepped(start.to(dtype), grads, **options).double().numpy() - start.numpy()
        assert np.linalg.norm(moved - expected + start.numpy()) <= most * np.linalg.norm(expected - start.numpy())


@pytest.mark.skipif(importlib.util.find_spec("pytorch_optimizer") is None, reason="pytorch_optimizer is not installed")
def test_it_is_adalomo_of_pytorch_optimizer() -> None:
    other = importlib.import_module("pytorch_optimizer").AdaLOMO
    for shape in ((66, 97), (16, 341), (3, 7)):
        start, grads = 0.02 * random(*shape).float(), gradients(shape, 20)
        model = torch.nn.Linear(shape[1], shape[0], bias=False)
        model.weight.data.copy_(start)
        optimizer = other(model, lr=0.1, loss_scale=0)
        for grad in grads:
            optimizer.fused_backward((model.weight * grad.float()).sum(), lr=0.1)
        mine = stepped(start, grads, recipe="adalomo", lr=0.1, level=0, eps=1e-15)
        its = model.weight.detach()
        assert float((mine - its).norm()) <= 1e-6 * float((its - start).norm())


@pytest.mark.parametrize("package", ["came_pytorch", "pytorch_optimizer"])
@pytest.mark.parametrize(("dtype", "most"), [(FP64, 1e-12), (torch.float32, 1e-6)])
def test_it_is_came_of_others(package: str, dtype: torch.dtype, most: float) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    came = importlib.import_module(package).CAME
    more = {"lr": 1e-3} | ({"foreach": False} if package == "pytorch_optimizer" else {})
    for shape in ((66, 97), (16, 341), (3, 7)):
        start, grads = random(*shape).to(dtype), gradients(shape, 20)
        other = torch.nn.Parameter(start.clone())
        optimizer = came([other], **more)
        for grad in grads:
            other.grad = grad.to(dtype)
            optimizer.step()
        mine = stepped(start, grads, recipe="came", confidence_beta=0.9999, **PUBLISHED)
        assert float((mine - other.detach()).norm()) <= most * float((other.detach() - start).norm())


@settings(max_examples=60)
@given(
    worlds(),
    st.integers(0, 4),
    st.sampled_from(["haar", "haar", "db2"]),
    st.sampled_from(["came", "factored", "adalomo"]),
    st.sampled_from([0, 1]),
    st.sampled_from([None, "approximation"]),
)
def test_ranks_change_nothing(world, level, wavelet, recipe, least_level, second_moment) -> None:
    options = dict(lr=0.01, level=level, recipe=recipe, wavelet=wavelet, weight_decay=0.1, least_level=least_level)
    if recipe == "adalomo":  # which reads neither
        options["least_level"] = second_moment = None
    if second_moment:
        options |= {"second_moment": second_moment, "detail_gain": 0.0}
    assert unlike_one_process(world, 3, **options)[0] <= 1e-12


def test_a_step_has_two_sums_whatever_the_number_of_tensors() -> None:
    """Numbers of columns, and of the rows that a cut divides; then, of CAME, three of each."""
    shapes = {"a": (9, 14), "b": (6, 5)}  # 4 and 2 coefficients a row
    middle = {"rows": (56, 15), "units": (60, 15)}  # ends of rows, and a cut in the fifth row of "a" between two units
    for cut, (a, b) in middle.items():
        ranks = [
            [Fragment("a", shapes["a"], *i, 0), Fragment("b", shapes["b"], *j, i[1] - i[0])]
            for i, j in (((0, a), (0, b)), ((a, 126), (b, 30)))
        ]
        for recipe, more, numbers in (("came", 0, 3), ("factored", 0, 0), ("adalomo", 2, 0)):
            sharded = Sharded({f: random(*s) for f, s in shapes.items()}, ranks, lr=0.02, level=2, recipe=recipe)
            for _ in range(2):
                sharded.step({f: random(*s, seed=1) for f, s in shapes.items()})
            columns, rows = 4 + 2, int(cut == "units")
            assert sharded.group.calls == 2 * [columns + rows + more, numbers * (columns + rows) or 2]


@pytest.mark.parametrize("recipe", ["came", "factored"])
def test_its_first_steps_are_as_long_as_adams(recipe: str) -> None:
    """Bias is corrected: published CAME moves 10 times as far at its first step, and as far again as b3 is nearer 1."""
    grads = [random(48, 64, seed=i) for i in range(40)]
    options = {"lr": 1.0, "recipe": recipe, "level": 0, "least_level": 0}
    for steps, low, high in ((1, 0.9, 1.3), (40, 0.15, 0.5)):
        before, after = (stepped(torch.zeros(48, 64, dtype=FP64), grads[:n], **options) for n in (steps - 1, steps))
        assert low < float((after - before).square().mean().sqrt()) < high, steps


@pytest.mark.parametrize("recipe", ["came", "factored", "adalomo"])
def test_gradients_that_vanish_or_explode(recipe: str) -> None:
    """Rows that have had no gradient stay; an infinite one is as visible as with Adam."""
    grad = random(6, 16)
    grad[2] = 0.0
    grad[:, 8:12] = 0.0
    for size in (1e-30, 1e-6, 1.0, 1e6):
        moved = stepped(torch.zeros(6, 16), [size * grad] * 3, lr=1e-3, level=2, recipe=recipe, eps=1e-25)
        assert bool(moved.isfinite().all()) and not moved[2].any() and not moved[:, 8:12].any()
    bad = grad.clone()
    bad[0, 0] = torch.inf
    assert not bool(stepped(torch.zeros(6, 16), [bad], lr=1e-3, level=2, recipe=recipe).isfinite().all())


@pytest.mark.parametrize("recipe", ["came", "factored", "adalomo"])
def test_details_stay_bounded(recipe: str) -> None:
    """Where means vanish and details do not (features x and -x side by side), and where units are short or padded."""
    generator = torch.Generator().manual_seed(0)
    for (rows, columns), level, mean in (((8, 32), 1, 0.0), ((8, 32), 1, 0.01), ((64, 2), 2, 1.0), ((64, 65), 6, 1.0)):
        grads = []
        for _ in range(20):
            grad = torch.randn(rows, columns, generator=generator)
            if mean < 1:
                grad[:, 1::2] = -grad[:, ::2] + mean * grad[:, 1::2]
            grads.append(grad)
        weights = [
            stepped(torch.zeros(rows, columns), grads[:n], lr=1.0, recipe=recipe, level=level) for n in range(21)
        ]
        lr = 1e-3 if recipe == "adalomo" else 1.0  # of weights that begin at 0
        most = max(float((after - before).abs().max()) for before, after in pairwise(weights[: 2 if lr < 1 else 21]))
        assert most < 8 * lr, (rows, columns, level, mean)


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_momentum_in_fewer_bits(state_dtype: str) -> None:
    grads = gradients((48, 256), 15)
    options = {"lr": 1e-3, "level": 1, "recipe": "came"}
    exact, coded = (
        stepped(torch.zeros(48, 256), grads, **options, state_dtype=dtype) for dtype in ("fp32", state_dtype)
    )
    assert 0 < float((exact - coded).norm()) < 0.05 * float(exact.norm())


LLAMA_7B = [*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)]  # the matrices of a block, of which there are 32
LLAMA_7B_TENSORS = tuple((f"{i}.{j}", shape) for i in range(32) for j, shape in enumerate(LLAMA_7B))
LLAMA_7B_WEIGHTS = sum(prod(shape) for _, shape in LLAMA_7B_TENSORS)


def allocated_on_meta(options: dict[str, Any]) -> int:
    """Bytes of the state of LLaMA-7B's matrices as one process allocates it, but on the meta device."""
    parameters = [torch.nn.Parameter(torch.empty(shape, device="meta")) for _, shape in LLAMA_7B_TENSORS]
    optimizer = GWTAdamW(parameters, **options)
    plans = [(optimizer.plan_of(parameter, 0), parameter) for parameter in parameters]
    return sum(value.nbytes for plan, its in plans if plan for value in plan.fresh_state(its).values())


def test_bytes_of_a_weight() -> None:
    """Of LLaMA-7B's matrices, which are 6.48 G weights: one momentum a unit, and vectors that are next to nothing."""
    tensors, weights = LLAMA_7B_TENSORS, LLAMA_7B_WEIGHTS
    for level, recipe, expected in (
        (2, "came", 1.0020),
        (2, "factored", 1.0010),
        (0, "came", 4.0031),
        (0, "adalomo", 0.0015),
        (2, "adalomo", 0.0010),
    ):
        least = {} if recipe == "adalomo" else {"least_level": 0}
        options = {"level": level, "recipe": recipe, **least}
        planned = plan_zero([GroupSpec.of(options, tensors)], stage=1, world_size=1, rank=0).total
        assert planned / weights == pytest.approx(expected, abs=5e-5)
        assert allocated_on_meta(options) == planned + 4 * (len(tensors) - 1)  # each its own count of steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_moment": "none"}, "leaves nothing to factor"),
        ({"second_moment": "approximation"}, "detail_gain='coherence': details of a unit whose"),
        ({"limiter": 1.01}, "clip_threshold limits every update, not"),
        ({"nesterov": True}, "nesterov=True in .* read by"),
        ({"clip_threshold": 0.0}, "clip_threshold=0.0 in .* must be a finite number > 0"),
        ({"confidence_beta": 1.0}, r"confidence_beta=1.0 in .* must be in \[0, 1\)"),
        ({"decay_rate": 0.8}, r"decay_rate=0.8 in .* must be in \[-1, 0\]"),
        ({"recipe": "adalomo", "least_level": 0}, "least_level=0 in .* it takes matrices of every level"),
        ({"recipe": "adalomo", "detail_gain": 0.1}, "detail_gain=0.1 in .* 'adalomo': details are normalized"),
        ({"recipe": "factored", "confidence_beta": 0.9}, "confidence_beta=0.9 in .* 'factored': it is read by came"),
    ],
    ids=str,
)
def test_keys_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GWTAdamW([torch.nn.Parameter(random(4, 6))], **{"recipe": "came", **options})
