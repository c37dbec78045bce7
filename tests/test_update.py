"""The step itself: against the published implementation's trajectories and against PyWavelets in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gwt_dist import GWTAdamW
from gwt_dist.formulas.limiter import limit_growth
from oracle import Oracle

# PyWavelets, as the oracle, warns when filters are longer than the row, which is what these tests are after.
pytestmark = pytest.mark.filterwarnings("ignore:Level value of .* is too high:UserWarning")

GOLDEN = np.load(Path(__file__).parent / "data" / "haar_adamw.npz")
CASES = json.loads(bytes(GOLDEN["meta"]))
RECIPES: dict[str, dict[str, Any]] = {
    "paper": dict(energy=False, detail_gain=1.0, limiter=1.01),
    "energy": dict(energy=True, detail_gain="coherence", limiter=0.0),
    "foam": dict(energy=True, residual=True, limiter=0.0),
}


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[np.ndarray]:
    """Normal gradients whose norm grows, with a spike, so that the limiter acts on some steps and not on others."""
    rng = np.random.default_rng(seed)
    sizes = [0.01 * 1.3**t * (50 if t == 4 else 1) for t in range(steps)]
    return [size * rng.standard_normal(shape) for size in sizes]


def run(optimizer: GWTAdamW, weight: torch.nn.Parameter, grads: list[np.ndarray]) -> np.ndarray:
    for gradient in grads:
        weight.grad = torch.from_numpy(gradient.copy()).to(weight.dtype)
        optimizer.step()
    return weight.detach().double().numpy()


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equals_the_published_trajectories(case: int) -> None:
    settings, name = CASES[case], f"{case:02d}"
    weight = torch.nn.Parameter(torch.from_numpy(GOLDEN[f"{name}.param0"].copy()))
    optimizer = GWTAdamW(
        [weight],
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["wd"],
        level=settings["level"],
        scale=settings["scale"],
        recipe="paper",
    )
    for gradient, expected in zip(GOLDEN[f"{name}.grads"], GOLDEN[f"{name}.params"], strict=True):
        found = run(optimizer, weight, [gradient])
        assert np.abs(found - expected).max() < 1e-12
    state = optimizer.state[weight]
    for key in ("exp_avg", "exp_avg_sq", "limited_norm"):
        np.testing.assert_allclose(state[key].numpy(), GOLDEN[f"{name}.{key}"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("level", range(17))
@pytest.mark.parametrize("shape", [(3, 97), (5, 64), (4, 1), (1, 33)])
def test_haar_equals_pywavelets_at_every_level(shape: tuple[int, int], level: int, recipe: str) -> None:
    start = np.random.default_rng(1).standard_normal(shape)
    oracle = Oracle(start, level, weight_decay=0.1, **RECIPES[recipe])
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = GWTAdamW([weight], lr=0.01, scale=0.25, weight_decay=0.1, level=level, recipe=recipe)
    grads = gradients(shape, 7)
    for gradient in grads:
        oracle.step(gradient)
    change = np.abs(oracle.weight - start).max()
    assert np.abs(run(optimizer, weight, grads) - oracle.weight).max() < 1e-12 * change
    assert optimizer.state[weight]["exp_avg"].numel() == shape[0] * math.ceil(shape[1] / 2**level)


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("level", [0, 2, 3])
def test_variants_of_the_update(level: int, recipe: str, cautious: bool, nesterov: bool, correct_bias: bool) -> None:
    """Each of them against the oracle, and each changes something: but Nesterov at level 0 nothing."""
    options = dict(cautious=cautious, nesterov=nesterov, correct_bias=correct_bias)
    start = np.random.default_rng(1).standard_normal((3, 29))
    grads = gradients((3, 29), 7)
    oracle, plain = (
        Oracle(start, level, weight_decay=0.1, betas=(0.8, 0.99), **RECIPES[recipe], **its) for its in (options, {})
    )
    for gradient in grads:
        oracle.step(gradient)
        plain.step(gradient)
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = GWTAdamW(
        [weight], lr=0.01, scale=0.25, weight_decay=0.1, betas=(0.8, 0.99), level=level, recipe=recipe, **options
    )
    change = np.abs(oracle.weight - start).max()
    assert np.abs(run(optimizer, weight, grads) - oracle.weight).max() < 1e-12 * change
    if cautious or not correct_bias or (nesterov and level):
        assert np.abs(oracle.weight - plain.weight).max() > 1e-5 * change


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "foam"])  # which is Haar's alone
@pytest.mark.parametrize("level", [0, 1, 2, 4])
@pytest.mark.parametrize("wavelet", ["db1", "db2", "sym4", "bior2.2", "rbio3.1", "coif2", "dmey"])
def test_any_wavelet_equals_pywavelets(wavelet: str, level: int, recipe: str) -> None:
    shape = (3, 41)
    start = np.random.default_rng(2).standard_normal(shape)
    oracle = Oracle(start, level, wavelet, **RECIPES[recipe])
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = GWTAdamW([weight], lr=0.01, scale=0.25, level=level, wavelet=wavelet, recipe=recipe)
    grads = gradients(shape, 7)
    for gradient in grads:
        oracle.step(gradient)
    change = np.abs(oracle.weight - start).max()
    assert np.abs(run(optimizer, weight, grads) - oracle.weight).max() < 1e-11 * change


def test_the_limiter_acts_in_these_tests() -> None:
    oracle = Oracle(np.zeros((3, 97)), 2, **RECIPES["paper"])
    for gradient in gradients((3, 97), 7):
        oracle.step(gradient)
    assert 0 < sum(rho > 1 for rho in oracle.rhos) < 7


def test_level_0_is_adamw_with_eps_beside_the_uncorrected_root() -> None:
    start = np.random.default_rng(3).standard_normal((4, 9))
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = GWTAdamW([weight], lr=0.01, level=0, eps=1e-6)
    grads = gradients((4, 9), 5)
    m = v = np.zeros((4, 9))
    expected = start
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected = expected - 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-6)
    assert np.abs(run(optimizer, weight, grads) - expected).max() < 1e-14


def test_the_first_energy_step_is_adam_with_a_second_moment_per_unit() -> None:
    """W -= lr * scale * x / rms(unit), exactly but for eps."""
    gradient = np.random.default_rng(4).standard_normal((2, 8))
    weight = torch.nn.Parameter(torch.zeros(2, 8, dtype=torch.float64))
    found = run(GWTAdamW([weight], lr=1.0, scale=0.25, level=2, eps=1e-30, recipe="energy"), weight, [gradient])
    rms = np.sqrt((gradient.reshape(2, 2, 4) ** 2).mean(-1, keepdims=True))
    assert np.abs(found + 0.25 * (gradient.reshape(2, 2, 4) / rms).reshape(2, 8)).max() < 1e-12


def test_details_weigh_as_much_as_the_gradient_has_been_steady() -> None:
    """``M**2 / V`` where the gradient never changes; where approximations alternate ``1 - beta1``, which is what Adam's
    momentum takes from one gradient. An outlier in a unit that was still does not call itself steady.
    """
    steps, beta1, beta2 = 400, 0.9, 0.999
    x = np.array([[1.0, -0.5, 1.0, 2.0, 1e-3, 2e-3]])  # three units of two: steady, alternating, an outlier at the end
    weight = torch.nn.Parameter(torch.zeros(1, 6, dtype=torch.float64))
    optimizer = GWTAdamW([weight], lr=1.0, level=1, scale=1.0, eps=1e-30, recipe="energy")
    for t in range(1, steps + 1):
        signs = np.repeat([1.0, (-1.0) ** t, (-1.0) ** t * (1e6 if t == steps else 1.0)], 2)
        before = weight.detach().numpy().copy()
        run(optimizer, weight, [x * signs])
    step = (before - weight.detach().numpy()).reshape(3, 2)
    denominators = np.sqrt(optimizer.state[weight]["exp_avg_sq"].numpy()[0])
    size = np.sqrt(1 - beta2**steps) / (1 - beta1**steps)
    gains = np.diff(step)[:, 0] / (np.diff((x * signs).reshape(3, 2))[:, 0] / denominators * size)
    assert gains[0] == pytest.approx(0.2 * (1 - beta1**steps), rel=1e-9)  # M**2 / V = (0.5**2 / 2) / (1.25 / 2)
    assert gains[1:] == pytest.approx([1 - beta1] * 2, rel=1e-9)


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 5), (0, 4), (3, 0)])
def test_every_shape_is_a_matrix(shape: tuple[int, ...]) -> None:
    """1-D and 0-d tensors are AdamW whatever their group says; higher dimensions are rows of the rest."""
    start = np.random.default_rng(5).standard_normal(shape)
    matrix = start.reshape(shape[0], -1) if len(shape) > 1 and start.size else start.reshape(1, -1)
    oracle = Oracle(matrix, 2 if len(shape) > 1 else 0, **RECIPES["paper"])
    weight = torch.nn.Parameter(torch.from_numpy(np.array(start)))
    grads = gradients(shape, 5)
    if start.size:
        for gradient in grads:
            oracle.step(np.asarray(gradient).reshape(matrix.shape))
    found = run(GWTAdamW([weight], lr=0.01, level=2, recipe="paper"), weight, [np.array(g) for g in grads])
    assert np.abs(found.reshape(matrix.shape) - oracle.weight).max(initial=0.0) < 1e-12


def test_bf16_weights_take_fp32_mathematics() -> None:
    """A bf16 weight moves as an fp32 one does, rounded once a step; its moments are fp32."""
    torch.manual_seed(0)
    low = torch.nn.Parameter(torch.randn(6, 20).bfloat16())
    high = torch.nn.Parameter(low.detach().float())
    optimizers = [GWTAdamW([p], lr=0.01, level=2, recipe="paper") for p in (low, high)]
    gradient = torch.randn(6, 20).bfloat16()
    low.grad, high.grad = gradient, gradient.float()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(low.detach(), high.detach().bfloat16())
    assert optimizers[0].state[low]["exp_avg_sq"].dtype == torch.float32
    assert torch.equal(optimizers[0].state[low]["exp_avg"], optimizers[1].state[high]["exp_avg"])


def test_a_zero_gradient_step_does_not_freeze_the_limiter() -> None:
    """PyTorch runs such a step on a fresh optimizer; storing its norm 0 would hold updates near zero for ages."""
    grads = gradients((4, 16), 4)
    clean, zero_first = (torch.nn.Parameter(torch.zeros(4, 16, dtype=torch.float64)) for _ in range(2))
    run(GWTAdamW([clean], lr=0.01, recipe="paper", level=2), clean, grads)
    poisoned = GWTAdamW([zero_first], lr=0.01, recipe="paper", level=2)
    run(poisoned, zero_first, [np.zeros((4, 16))])
    assert float(poisoned.state[zero_first]["limited_norm"]) == 0.0
    before = zero_first.detach().clone()
    run(poisoned, zero_first, grads)
    ratio = float((zero_first.detach() - before).norm() / clean.detach().norm())
    assert 0.5 < ratio < 2.0


def test_a_norm_that_is_not_finite_is_not_remembered() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 8, dtype=torch.float64))
    optimizer = GWTAdamW([weight], lr=0.01, recipe="paper", level=2)
    run(optimizer, weight, [np.ones((2, 8))])
    before = optimizer.state[weight]["limited_norm"].clone()
    run(optimizer, weight, [np.full((2, 8), np.inf)])
    assert torch.equal(optimizer.state[weight]["limited_norm"], before)


def test_limit_growth_divides_what_grows_too_fast_and_remembers_only_sound_norms() -> None:
    nan, inf = float("nan"), float("inf")
    norms = torch.tensor([4.0, 2.0, 0.0, inf, nan, 3.0, 0.0], dtype=torch.float64)
    previous = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    rho, remembered = limit_growth(norms.square(), previous, limiter=1.01)
    expected_rho = [4 / (2 + 1e-8) / 1.01, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(rho, torch.tensor(expected_rho).double(), rtol=1e-7, atol=0)
    expected = torch.tensor([2.02, 2.0, 2.0, 2.0, 2.0, 3.0, 0.0]).double()
    torch.testing.assert_close(remembered, expected, rtol=1e-7, atol=0)


def test_groups_have_limiters_of_their_own() -> None:
    """Three groups in one optimizer move as three optimizers."""
    starts = [np.random.default_rng(i).standard_normal((3, 8)) for i in range(3)]
    limiters = [1.01, 2.0, 0.0]
    grads = gradients((3, 8), 7)

    def parameters() -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.from_numpy(start.copy())) for start in starts]

    alone = parameters()
    for parameter, limiter in zip(alone, limiters, strict=True):
        run(GWTAdamW([parameter], lr=0.01, recipe="paper", limiter=limiter, level=2), parameter, grads)
    together = parameters()
    optimizer = GWTAdamW(
        [{"params": [p], "limiter": limiter} for p, limiter in zip(together, limiters, strict=True)],
        lr=0.01,
        recipe="paper",
        level=2,
    )
    for gradient in grads:
        for parameter in together:
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(alone[0] - torch.from_numpy(starts[0]), alone[1] - torch.from_numpy(starts[1]))
