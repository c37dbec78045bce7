"""Foam, NorMuon's rows and the keys of any recipe, by hand and on ranks that cut rows and units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

import toy_recipe  # noqa: F401
from gwt_dist import GWTAdamW
from gwt_dist.formulas.orthogonal import newton_schulz
from gwt_dist.layout import Fragment
from simulated import Sharded

FP64 = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


def trained(start: Tensor, gradients: list[Tensor], **options: Any) -> Tensor:
    parameter = torch.nn.Parameter(start.clone())
    optimizer = GWTAdamW(
        [parameter], **{"lr": 0.02, "scale": 0.25, "level": 2, "recipe": "energy", "betas": (0.8, 0.95)} | options
    )
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


GRADIENTS = [random(7, 13, seed=i) * 3.0 ** (i % 3) + i / 2 for i in range(1, 6)]
START = random(7, 13)


def units(x_RC: Tensor, level: int) -> Tensor:
    """``[R, K, U]``, rows padded with zeros."""
    return pad(x_RC, (0, -x_RC.shape[1] % 2**level)).unflatten(1, (-1, 2**level))


def by_hand(level: int, update: Any, *, nesterov: bool = False, correct: bool = True, cautious: bool = False) -> Tensor:
    """Weights after all gradients; `update` makes of units, hatted n and hatted v what weights lose, ``[R, K, U]``."""
    weight, lr, (b1, b2), decay = START.clone(), 0.02, (0.8, 0.95), 0.1
    m = v = torch.zeros(())
    real = units(torch.ones(7, 13, dtype=FP64), level).sum(-1)
    for t, gradient in enumerate(GRADIENTS, 1):
        x = units(gradient, level)
        a = x.mean(-1)  # in the scale of the elements; the moment is 2**(level/2) times that
        m, v = b1 * m + (1 - b1) * a, b2 * v + (1 - b2) * x.square().sum(-1) / real
        n = b1 * m + (1 - b1) * a if nesterov else m
        first = 1 - b1 ** (t + nesterov) if correct else 1.0
        second = 1 - b2**t if correct else 1.0
        change = 0.25 * lr * update(x - a[..., None], n / first, v / second, second).flatten(1)[:, :13]
        kept = torch.full_like(weight, 1 - lr * decay)
        if cautious:
            kept = torch.where(change * weight >= 0, kept, 1.0)
        weight = (weight - change) * kept
    return weight


def foam(r: Tensor, n: Tensor, v: Tensor, second: float) -> Tensor:
    return (n[..., None] + r) / ((v[..., None] + r.square()).sqrt() + 1e-6)


def without_details(r: Tensor, n: Tensor, v: Tensor, second: float) -> Tensor:
    # eps stands beside the uncorrected root
    return (n / (v.sqrt() + 1e-6 / second**0.5))[..., None].expand_as(r)


@pytest.mark.parametrize("level", [1, 2, 3, 5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("correct", [True, False])
def test_foam_nesterov_and_bias_by_hand(level: int, nesterov: bool, correct: bool) -> None:
    options: dict[str, Any] = {"level": level, "nesterov": nesterov, "correct_bias": correct, "weight_decay": 0.1}
    expected = {"nesterov": nesterov, "correct": correct}
    close(trained(START, GRADIENTS, recipe="foam", **options), by_hand(level, foam, **expected))
    energy = trained(START, GRADIENTS, recipe="energy", detail_gain=0, **options)
    close(energy, by_hand(level, without_details, **expected))


def test_cautious_decay_by_hand() -> None:
    for recipe, update, more in (("foam", foam, {}), ("energy", without_details, {"detail_gain": 0})):
        found = trained(START, GRADIENTS, recipe=recipe, level=2, cautious=True, weight_decay=0.1, **more)
        close(found, by_hand(2, update, cautious=True))
        assert not torch.allclose(found, by_hand(2, update), rtol=0, atol=1e-5)


def test_vectors_under_foam_are_adamw_and_take_no_nesterov() -> None:
    gradients, start = [g[0] for g in GRADIENTS], START[0]
    expected = trained(start, gradients, recipe="energy")
    assert torch.equal(trained(start, gradients, recipe="foam", nesterov=True), expected)


def orthogonal_by_hand(nor: float, nesterov: bool, detail_gain: float) -> tuple[Tensor, Tensor]:
    weight, b1 = START.clone(), 0.8
    m, w = torch.zeros(()), torch.zeros(7, dtype=FP64)
    for t, gradient in enumerate(GRADIENTS, 1):
        x = units(gradient, 2)
        a = x.mean(-1)
        m = b1 * m + (1 - b1) * a
        n = (b1 * m + (1 - b1) * a if nesterov else m) / (1 - b1 ** (t + nesterov))
        u = (n[..., None] + detail_gain * (x - a[..., None])).flatten(1)[:, :13]
        o = newton_schulz(u)
        w = nor * w + (1 - nor) * o.square().mean(1)
        if nor:
            even = o / (w.sqrt() + 1e-8)[:, None]
            o = even * o.norm() / even.norm()
        weight = weight - 0.02 * 0.25 * 13**0.5 * o
    return weight, w


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("nor", [0.0, 0.9])
def test_rows_of_an_orthogonalized_matrix_by_hand(nor: float, nesterov: bool) -> None:
    parameter = torch.nn.Parameter(START.clone())
    options: dict[str, Any] = {"recipe": "orthogonal", "nor": nor, "nesterov": nesterov, "detail_gain": 0.3}
    optimizer = GWTAdamW([parameter], lr=0.02, scale=0.25, betas=(0.8, 0.95), level=2, **options)
    for gradient in GRADIENTS:
        parameter.grad = gradient.clone()
        optimizer.step()
    weight, rows = orthogonal_by_hand(nor, nesterov, 0.3)
    close(parameter.detach(), weight)
    if nor:
        close(optimizer.state[parameter]["exp_avg_sq_row"], rows[:, None])
    else:
        assert "exp_avg_sq_row" not in optimizer.state[parameter]


SHAPES = {"a": (9, 14), "b": (6, 5), "c": (11,)}
CUTS = [[(0, 31), (0, 7), (0, 4)], [(31, 33), (7, 8), (4, 4)], [], [(33, 126), (8, 30), (4, 11)]]


@pytest.mark.parametrize(
    "options", [{"recipe": "foam"}, {"recipe": "orthogonal", "nor": 0.95}, {"recipe": "toy"}], ids=str
)
def test_ranks_that_cut_rows_and_units_have_the_update_of_one(options: dict[str, Any]) -> None:
    weights = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    ranks = []
    for intervals in CUTS:
        offset, fragments = 2, []
        for name, (start, stop) in zip(SHAPES, intervals, strict=False):
            fragments.append(Fragment(name, SHAPES[name], start, stop, offset))
            offset += stop - start
        ranks.append(fragments)
    sharded = Sharded(weights, ranks, lr=0.02, level=2, **options)
    whole = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    single = GWTAdamW(whole.values(), lr=0.02, level=2, **options)
    for step in range(4):
        gradients = {name: random(*shape, seed=10 * step + i) for i, (name, shape) in enumerate(SHAPES.items())}
        sharded.step(gradients)
        for name, parameter in whole.items():
            parameter.grad = gradients[name]
        single.step()
    for name, found in sharded.gather(SHAPES).items():
        torch.testing.assert_close(found, whole[name].detach(), rtol=1e-12, atol=1e-12)
    # A row that ranks share is kept by both, alike.
    for field in ("exp_avg_sq_row", "row_sq"):
        if field in single.state[whole["a"]]:
            kept = single.state[whole["a"]][field]
            for optimizer, flat in zip(sharded.optimizers, sharded.flats, strict=True):
                plan = optimizer.plan_of(flat, 0)
                for piece in plan.pieces:
                    if piece.fragment.fqn == "a" and piece.rows:
                        place = piece.places[field]
                        mine = optimizer.state[flat][field][place.offset : place.offset + place.numel]
                        torch.testing.assert_close(mine, kept[place.start : place.stop, 0], rtol=1e-12, atol=0)
