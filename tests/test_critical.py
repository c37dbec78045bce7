"""Gradients of large norm that stay: by the published formulas on coefficients, on any ranks, in one more sum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_dist import Fragment, GWTAdamW
from simulated import Sharded, unlike_one_process
from test_factored import FP64, gradients, stepped
from test_layout import worlds
from test_recipes import random

OPTIONS: dict[str, Any] = {"lr": 0.01, "level": 2, "recipe": "energy", "critical": 3}


def critical_adam(
    grads: list[np.ndarray], places: int, decay: float, form: str, nesterov: bool
) -> tuple[np.ndarray, list[int]]:
    """What Adam's weights lose in these steps at a rate of 1, eps 1e-6, and how often each place was filled."""
    heap: list[tuple[float, np.ndarray]] = []
    m = v = change = np.zeros_like(grads[0])
    filled, b1, b2 = 0, 0.85, 0.98
    for t, g in enumerate(grads, 1):
        kept = [k for _, k in heap]
        joined = (g + sum(kept)) / (len(kept) + 1) if form == "mean" else g + (sum(kept) / len(kept) if kept else 0)
        norm = float(np.linalg.norm(g))
        if len(heap) < places:
            heap.append((norm, g))
            filled += 1
        elif norm > (least := min(range(places), key=lambda i: heap[i][0]), heap[least][0])[1]:
            heap[least] = norm, g
            filled += 1
        heap = [(p * decay, k) for p, k in heap]
        m, v = b1 * m + (1 - b1) * joined, b2 * v + (1 - b2) * joined**2
        n = b1 * m + (1 - b1) * joined if nesterov else m
        change = change + np.sqrt(1 - b2**t) / (1 - b1 ** (t + nesterov)) * n / (np.sqrt(v) + 1e-6)
    return change, [filled]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("form", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(66, 97), (16, 341), (5, 1)])
def test_it_is_the_published_step_of_the_coefficients(shape: tuple[int, int], form: str, nesterov: bool) -> None:
    """What moves is the mean of each unit: its coefficient, halved and halved again on its way back."""
    grads, unit = gradients(shape, 20), 4
    padded = [np.pad(g.numpy(), ((0, 0), (0, -shape[1] % unit))) for g in grads]
    coefficients = [g.reshape(shape[0], -1, unit).sum(-1) / np.sqrt(unit) for g in padded]
    if shape[1] < unit:  # a row shorter than a unit has no padding, and is one
        coefficients = [g.numpy().sum(-1, keepdims=True) / np.sqrt(unit) for g in grads]
    change, (filled,) = critical_adam(coefficients, 3, 0.6, form, nesterov)
    assert 6 < filled < 20
    expected = -0.01 * np.repeat(change, unit, 1)[:, : shape[1]] / np.sqrt(unit)
    options = OPTIONS | {"betas": (0.85, 0.98), "second_moment": "approximation", "detail_gain": 0.0}
    options |= {"critical_decay": 0.6, "critical_form": form, "nesterov": nesterov}
    for dtype, most in ((FP64, 1e-12), (torch.float32, 2e-6)):
        moved = stepped(torch.zeros(shape, dtype=dtype), grads, **options).double().numpy()
        assert np.linalg.norm(moved - expected) <= most * np.linalg.norm(expected), dtype


@pytest.mark.parametrize(
    "options", [{"recipe": "foam"}, {"recipe": "orthogonal", "nor": 0.9}, {"recipe": "paper"}], ids=str
)
def test_the_step_is_that_of_a_gradient_that_is_joined(options: dict[str, Any]) -> None:
    """Of gradients whose units are even, so that they are their coefficients; the others are what was kept."""
    grads = [g.repeat_interleave(4, 1) for g in gradients((6, 8), 12)]
    kept: list[tuple[float, torch.Tensor]] = []
    joined = []
    for g in grads:
        joined.append((g + sum(k for _, k in kept)) / (len(kept) + 1))
        kept = sorted([*kept, (float(g.norm()), g)], key=lambda one: one[0])[-3:] if len(kept) < 3 else kept
        if len(joined) > 3 and float(g.norm()) > min(p for p, _ in kept):
            kept = [*sorted(kept, key=lambda one: one[0])[1:], (float(g.norm()), g)]
        kept = [(p * 0.5, k) for p, k in kept]
    its = {"lr": 0.01, "level": 2, **options}
    expected = stepped(random(6, 32), joined, **its)
    moved = stepped(random(6, 32), grads, **its, critical=3, critical_decay=0.5)
    assert float((moved - expected).norm()) <= 1e-12 * float((expected - random(6, 32)).norm())


@settings(max_examples=40)
@given(
    worlds(),
    st.integers(1, 4),
    st.sampled_from(["haar", "haar", "db2"]),
    st.sampled_from(["energy", "orthogonal", "foam", "paper"]),
    st.sampled_from(["mean", "sum"]),
)
def test_ranks_change_nothing(world, level, wavelet, recipe, form) -> None:
    wavelet = "haar" if recipe == "foam" else wavelet
    options = OPTIONS | dict(level=level, recipe=recipe, wavelet=wavelet, critical=2, critical_form=form)
    assert unlike_one_process(world, 4, **options)[0] <= 1e-12


def test_it_costs_one_number_a_tensor_in_the_sums_of_a_step() -> None:
    shapes = {"a": (9, 14), "b": (6, 5)}
    ranks = [
        [Fragment("a", shapes["a"], 0, 56, 0)],
        [Fragment("a", shapes["a"], 56, 126, 0), Fragment("b", (6, 5), 0, 30, 70)],
    ]
    for recipe, expected in (("energy", [2]), ("paper", [2, 2])):
        sharded = Sharded({f: random(*s) for f, s in shapes.items()}, ranks, **OPTIONS | {"recipe": recipe})
        sharded.step({f: random(*s, seed=1) for f, s in shapes.items()})
        assert sharded.group.calls == expected
        assert [float(o.state[f]["priority_0"][0]) for o, f in zip(sharded.optimizers, sharded.flats, strict=True)] == [
            pytest.approx(0.7 * float(sum_of(random(9, 14, seed=1)).norm()), rel=1e-6)
        ] * 2


def sum_of(g: torch.Tensor) -> torch.Tensor:
    """Coefficients of level 2."""
    return torch.nn.functional.pad(g, (0, -g.shape[1] % 4)).unflatten(1, (-1, 4)).sum(-1) / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"critical": -1}, "critical=-1 in .* must be a whole number >= 0"),
        ({"critical_decay": 1.5}, r"critical_decay=1.5 in .* must be in \[0, 1\]"),
        ({"critical_form": "mid"}, "critical_form='mid' in .* must be one of"),
        ({"recipe": "came"}, "critical=3 in .* 'came': it is read by paper, energy, foam, orthogonal alone"),
    ],
    ids=str,
)
def test_keys_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GWTAdamW([torch.nn.Parameter(random(4, 6))], **OPTIONS | options)
