"""Momentum that is orthogonalized: the iteration, the step by hand, whole and sharded. Traffic is in test_matrices."""

from __future__ import annotations

import copy
from math import prod

import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gwt_dist import GWTAdamW, matrices, rounds
from gwt_dist.formulas.orthogonal import newton_schulz
from gwt_dist.layout import Fragment
from gwt_dist.matrices import plan_rounds
from simulated import Sharded
from test_layout import run, worlds

ZEROS, ONES = torch.zeros(8, 12, dtype=torch.float64), torch.ones(8, 12, dtype=torch.float64)


def random(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(weight: Tensor, gradients: list[Tensor], **options: object) -> tuple[GWTAdamW, Tensor]:
    parameter = torch.nn.Parameter(weight.clone())
    base = {"lr": 0.01, "scale": 0.25, "level": 2, "recipe": "orthogonal", "detail_gain": "coherence"}
    optimizer = GWTAdamW([parameter], **base | options)  # type: ignore[arg-type]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer, parameter


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (9, 9), (1, 30)])
def test_the_iteration_keeps_singular_vectors_and_makes_values_one(shape: tuple[int, int]) -> None:
    matrix = random(shape)
    left, values, right = torch.linalg.svd(newton_schulz(matrix), full_matrices=False)
    theirs = torch.linalg.svd(matrix, full_matrices=False)
    assert 0.65 < values.min() and values.max() < 1.25
    torch.testing.assert_close(left @ right, theirs[0] @ theirs[2], rtol=0, atol=1e-12)
    assert not newton_schulz(torch.zeros(shape)).any()


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize(("wavelet", "nesterov"), [("haar", False), ("haar", True), ("db2", True)])
@pytest.mark.parametrize(("shape", "level"), [((12, 40), 1), ((40, 12), 2), ((7, 13), 3), ((6, 2, 5), 2), ((5, 3), 4)])
def test_the_step_written_out_with_pywavelets(shape: tuple[int, ...], level: int, wavelet: str, nesterov: bool) -> None:
    """Steady gradients and changing ones, so that the coherence is 1, 0 and between."""
    gradients = [random(shape, i) for i in range(3)] + [random(shape, 3) + 2, random(shape, 4) + 2]
    start = random(shape, 9)
    options = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.999), "nesterov": nesterov}
    _, weight = trained(start, gradients, level=level, wavelet=wavelet, **options)
    expected, m, gains = start.clone(), None, []
    rows, columns = shape[0], prod(shape[1:])
    for t, gradient in enumerate(gradients, 1):
        padded = torch.nn.functional.pad(gradient.reshape(rows, columns), (0, -columns % 2**level)).numpy()
        a, *details = pywt.wavedec(padded, wavelet, mode="periodization", level=level, axis=-1)
        gain = 0.0
        if m is not None:
            gain = min(1.0, float((m**2).sum() / (1 - 0.8 ** (t - 1)) ** 2 / (a**2).sum()))
        gains.append(gain)
        m = 0.2 * a + (0.8 * m if m is not None else 0)
        read = (0.8 * m + 0.2 * a) / (1 - 0.8 ** (t + 1)) if nesterov else m / (1 - 0.8**t)
        u = [read, *(gain * detail for detail in details)]
        whole = torch.from_numpy(pywt.waverec(u, wavelet, mode="periodization", axis=-1)[:, :columns].copy())
        expected -= (0.02 * 0.25 * max(rows, columns) ** 0.5 * newton_schulz(whole)).view(shape)
        expected *= 1 - 0.02 * 0.1
    assert gains[0] == 0 and 0 < min(gains[1:]) < 0.9
    assert (weight.detach() - expected).abs().max() < 1e-12 * expected.abs().max()


def test_with_all_details_and_without_a_past_it_is_muon() -> None:
    """Torch runs the iteration in bf16; ``0.2 * sqrt(max(R, C))`` is its factor that matches AdamW's."""
    gradient = random((24, 64), dtype=torch.float32)
    _, weight = trained(torch.zeros(24, 64), [gradient], lr=0.1, scale=0.2, detail_gain=1.0, betas=(0.0, 0.999))
    reference = torch.nn.Parameter(torch.zeros(24, 64))
    reference.grad = gradient.clone()
    torch.optim.Muon([reference], 0.1, 0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw").step()
    assert (weight - reference).norm() < 0.02 * reference.norm()


def test_a_weight_loses_lr_times_scale_in_the_root_mean_square() -> None:
    for shape in ((64, 64), (32, 128), (128, 32)):
        _, weight = trained(torch.zeros(shape), [random(shape, dtype=torch.float32)], level=1, lr=0.1, detail_gain=1.0)
        assert 0.7 < weight.detach().square().mean().sqrt() / (0.1 * 0.25) < 1.2


def test_state_is_the_momentum_alone_and_level_0_is_adamw() -> None:
    gradients = [random((16, 24), i, torch.float32) for i in range(3)]
    optimizer, weight = trained(torch.zeros(16, 24), gradients, level=2)
    state = optimizer.state[weight]
    assert sorted(state) == ["exp_avg", "limited_norm", "step"] and state["exp_avg"].shape == (16, 6)
    for shape, level in (((16, 24), 0), ((24,), 2)):
        start, gradients = random(shape, 9, torch.float32), [random(shape, i, torch.float32) for i in range(3)]
        (mine, w), (theirs, v) = (
            trained(start, gradients, level=level, recipe=recipe) for recipe in ("orthogonal", "energy")
        )
        assert torch.equal(w, v)
        assert sorted(mine.state[w]) == sorted(theirs.state[v]) and "exp_avg_sq" in mine.state[w]


def test_a_step_of_zeros_on_a_fresh_optimizer_changes_nothing() -> None:
    """Engines and torch's `get_optimizer_state_dict` make one; the real step after it is the one without it."""
    optimizer, weight = trained(ONES, [ZEROS])
    assert torch.equal(weight, ONES) and not optimizer.state[weight]["exp_avg"].any()
    (_, after), (_, alone) = (trained(ONES, [*before, random((8, 12))]) for before in ([ZEROS], []))
    assert (after - alone).abs().max() < 1e-6 * (alone - ONES).abs().max()


@settings(max_examples=100)
@given(worlds(), st.integers(0, 6), st.sampled_from(["haar", "haar", "db2"]))
def test_the_sharded_step_is_the_whole_step_but_for_the_order_of_its_norms(world, level, wavelet) -> None:
    whole, sharded, ranks, (optimizer, parameters) = run(world, level, "orthogonal", wavelet, torch.float64)
    for fqn in whole:
        size = max(1.0, float(whole[fqn].abs().max()))
        assert float((whole[fqn] - sharded[fqn]).abs().max()) <= 1e-12 * size, fqn
    for fragments, flat, one in zip(ranks.ranks, ranks.flats, ranks.optimizers, strict=True):
        kept = {f.fqn for f in fragments if "exp_avg_sq" not in optimizer.state[parameters[f.fqn]]}
        plan = one.plan_of(flat, 0)
        for piece in plan.pieces:
            for key in ("exp_avg", "exp_avg_sq"):
                if key == "exp_avg_sq" and piece.fragment.fqn in kept:
                    continue
                every = optimizer.state[parameters[piece.fragment.fqn]][key].view(-1)
                expected = torch.cat([every[:0], *(every[a:b] for a, b in piece.moments.intervals)])
                mine = one.state[flat][key][piece.moments.offset : piece.moments.offset + piece.moments.numel]
                assert torch.equal(mine, expected)
        held = sum(p.moments.numel for p in plan.pieces if p.fragment.fqn not in kept)
        assert one.state[flat].get("exp_avg_sq", torch.empty(0)).numel() == held


def test_rounds_of_a_matrix_each_have_the_bits_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a": (8, 12), "b": (20, 6), "c": (5, 5), "d": (12,), "e": (8, 12)}
    start = {fqn: random(shape, 1, torch.float32) for fqn, shape in shapes.items()}
    gradients = [{f: random(s, 2 + i, torch.float32) for f, s in shapes.items()} for i in range(2)]
    thirds = [[(0, 31), (0, 120), (0, 0), (0, 4), (0, 50)], [(31, 96), (120, 120), (0, 25), (4, 9), (50, 50)]]
    thirds.append([(96, 96), (120, 120), (25, 25), (9, 12), (50, 96)])
    ranks = []
    for intervals in thirds:
        offset, fragments = 0, []
        for (fqn, shape), (low, high) in zip(shapes.items(), intervals, strict=True):
            fragments.append(Fragment(fqn, shape, low, high, offset))
            offset += high - low
        ranks.append(fragments)
    found = []
    for limit in (matrices.ROUND, 1):
        planner = lambda m, rank, world, size, limit=limit: plan_rounds(m, rank, world, size, limit)  # noqa: E731
        monkeypatch.setattr(rounds, "plan_rounds", planner)
        sharded = Sharded(start, ranks, lr=0.01, scale=0.25, level=2, recipe="orthogonal", detail_gain="coherence")
        for gradient in gradients:
            sharded.step(gradient)
        found.append(sharded.gather(shapes))
        # Four matrices on three ranks, two of a shape in one stack: one round, or two; there and back in every step.
        assert len(sharded.group.swaps) == 2 * 2 * (1 if limit > 1 else 2)
    assert all(torch.equal(found[0][fqn], found[1][fqn]) for fqn in shapes)


def test_a_rank_that_holds_a_matrix_in_two_parts() -> None:
    start = {"a": random((8, 12), 1, torch.float32)}
    gradients = [{"a": random((8, 12), 2 + i, torch.float32)} for i in range(2)]
    ranks = [
        [Fragment("a", (8, 12), 60, 96, 1), Fragment("a", (8, 12), 0, 24, 40)],
        [Fragment("a", (8, 12), 24, 60, 2)],
    ]
    sharded = Sharded(start, ranks, lr=0.01, scale=0.25, level=2, recipe="orthogonal", detail_gain="coherence")
    for gradient in gradients:
        sharded.step(gradient)
    _, whole = trained(start["a"], [gradient["a"] for gradient in gradients], level=2)
    assert (sharded.gather({"a": (8, 12)})["a"] - whole).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (5, 1), (3, 2, 5), (2, 70_000)])
def test_shapes_without_elements_of_one_and_long_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A learning rate that is a tensor, too: the step is that of the number."""
    gradients = [random(shape, i).to(dtype) for i in range(2)]
    found = [trained(random(shape, 9).to(dtype), gradients, lr=lr)[1] for lr in (0.01, torch.tensor(0.01))]
    assert found[0].isfinite().all() and torch.equal(found[0], found[1])
    assert not torch.equal(found[0], random(shape, 9).to(dtype)) or not found[0].numel()


def test_a_state_of_another_recipe_is_refused() -> None:
    gradients = [random((8, 12))]
    (mine, _), (theirs, _) = (trained(ZEROS, gradients, recipe=r) for r in ("orthogonal", "paper"))
    for one, other, message in (
        (
            mine,
            theirs,
            r"group 0 has the state exp_avg, exp_avg_sq, limited_norm in .*'paper'\) and exp_avg, limited_norm in this",
        ),
        (
            theirs,
            mine,
            r"group 0 has the state exp_avg, limited_norm in .*'orthogonal'\) and exp_avg, exp_avg_sq, limited_norm",
        ),
    ):
        before = copy.deepcopy(one.state_dict())
        with pytest.raises(ValueError, match=message):
            one.load_state_dict(other.state_dict())
        assert str(one.state_dict()) == str(before)
    again, weight = trained(ZEROS, [])
    again.load_state_dict(mine.state_dict())
    assert torch.equal(again.state[weight]["exp_avg"], next(iter(mine.state.values()))["exp_avg"])


def test_what_an_orthogonalized_update_cannot_have() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"limiter=1.5 in .* the recipe is 'orthogonal': no second moment is kept"):
        GWTAdamW([weight], recipe="orthogonal", limiter=1.5, level=2)
    optimizer, weight = trained(ZEROS, [random((8, 12))])
    optimizer.param_groups[0]["recipe"] = "energy"
    with pytest.raises(
        ValueError, match=r"differ from level=2, wavelet='haar' with exp_avg, limited_norm by orthogonal at"
    ):
        optimizer.step()
