"""Adam in a subspace of each matrix: as galore-torch and Fira have it, on any ranks, kept by one of them."""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gwt_dist import Fragment, GaLoreAdamW, GWTAdamW, param_groups
from gwt_dist.keys import PROJ_TYPES
from gwt_dist.memory import GroupSpec, plan_zero
from simulated import Sharded, unlike_one_process
from test_factored import LLAMA_7B, LLAMA_7B_TENSORS, LLAMA_7B_WEIGHTS, allocated_on_meta, gradients, stepped
from test_layout import worlds
from test_recipes import random

FP64 = torch.float64
SHAPES = (24, 40), (40, 24), (17, 17), (9, 64)
RANK, GAP = 6, 7  # 20 steps have three subspaces
OPTIONS: dict[str, Any] = {"recipe": "low-rank", "rank": RANK, "update_proj_gap": GAP, "lr": 0.01}


def low_rank(
    weight: np.ndarray, grads: list[np.ndarray], proj_type: str, residual: bool, dtype: torch.dtype
) -> np.ndarray:
    """The weights after these steps, by the formulas; rate 0.01, betas 0.85 and 0.98, scale 0.3, weight decay 0.1.

    Decomposed by torch in `dtype`, as signs of vectors may be others in another, and moments stay when vectors turn.
    """
    w, (b1, b2), scale, m, v, norm = weight.copy(), (0.85, 0.98), 0.3, 0.0, 0.0, 0.0
    tall = w.shape[0] >= w.shape[1]
    side = {"std": "right" if tall else "left", "reverse_std": "left" if tall else "right"}.get(proj_type, proj_type)
    for t, g in enumerate(grads, 1):
        if (t - 1) % GAP == 0:
            found = torch.linalg.svd(torch.from_numpy(g).to(dtype), full_matrices=False)
            u, vh = (x.double().numpy() for x in (found.U, found.Vh))
            left = u[:, :RANK] if side != "right" else np.eye(len(g))
            right = vh[:RANK] if side != "left" else np.eye(g.shape[1])
        low = left.T @ g @ right.T
        m, v = b1 * m + (1 - b1) * low, b2 * v + (1 - b2) * low**2
        n = m / (np.sqrt(v) + 1e-6)
        change = scale * left @ n @ right
        if residual:
            axis = {"right": 1, "left": 0, "full": None}[side]
            factor = np.linalg.norm(n, axis=axis, keepdims=True) / (
                np.linalg.norm(low, axis=axis, keepdims=True) + 1e-8
            )
            rest = (g - scale * left @ low @ right) * factor
            rho = max(np.linalg.norm(rest) / (norm + 1e-8), 1.01) / 1.01 if norm else 1.0
            norm = np.linalg.norm(rest) / rho
            change = change + rest / rho
        w -= 0.01 * np.sqrt(1 - b2**t) / (1 - b1**t) * change
        w *= 1 - 0.01 * 0.1
    return w


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_published_step(shape: tuple[int, int], proj_type: str, residual: bool) -> None:
    """Of "full" some elements of the first gradient in its own subspace are 0, and are only rounding in fp32."""
    start, grads = random(*shape), gradients(shape, 20)
    options = OPTIONS | {"betas": (0.85, 0.98), "scale": 0.3, "weight_decay": 0.1, "proj_type": proj_type}
    for dtype, most in ((FP64, 1e-12), (torch.float32, 1e-6)):
        if proj_type == "full" and dtype != FP64:
            continue
        expected = low_rank(start.numpy(), [g.numpy() for g in grads], proj_type, residual, dtype)
        w = stepped(start.to(dtype), grads, **options, residual=residual).double().numpy()
        assert np.linalg.norm(w - expected) <= most * np.linalg.norm(expected), dtype


def beside(theirs: Any, mine: Any, name: str, gap: int) -> list[float]:
    """How far matrices, a vector and a matrix without a rank are from another's after 20 steps in fp32, relative."""
    start = [random(*shape, seed=i).float() for i, shape in enumerate((*SHAPES, (7,), (30, 8)))]
    models = []
    for kind, key in ((theirs, name), (mine, "proj_type")):
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        projected = {"rank": RANK, "update_proj_gap": gap, "scale": 0.25, key: "std"}
        groups = [{"params": parameters[:4], **projected}, {"params": parameters[4:]}]
        models.append((parameters, kind(groups, lr=0.01, weight_decay=0.1)))
    for step in range(20):
        for parameters, optimizer in models:
            for i, parameter in enumerate(parameters):
                parameter.grad = random(*parameter.shape, seed=100 * step + i).float()
            optimizer.step()
    (a, _), (b, _) = models
    return [float((x - y).detach().norm() / x.detach().norm()) for x, y in zip(a, b, strict=True)]


@pytest.mark.skipif(importlib.util.find_spec("galore_torch") is None, reason="galore_torch is not installed")
def test_groups_of_galore_torch_have_its_steps() -> None:
    its = partial(importlib.import_module("galore_torch").GaLoreAdamW, no_deprecation_warning=True)
    assert max(beside(its, GaLoreAdamW, "proj_type", GAP)) <= 1e-6


@pytest.mark.skipif(importlib.util.find_spec("pytorch_optimizer") is None, reason="pytorch_optimizer is not installed")
def test_the_residual_is_fira_of_pytorch_optimizer() -> None:
    """Which counts the first subspace's steps from 0 and others' from 1: here there is one subspace."""

    def mine(groups: list[dict[str, Any]], **options: Any) -> GWTAdamW:
        return GaLoreAdamW([{**group, "residual": "rank" in group} for group in groups], **options)

    its = importlib.import_module("pytorch_optimizer").Fira
    assert max(beside(its, mine, "projection_type", 200)) <= 1e-6


@settings(max_examples=60)
@given(
    worlds(),
    st.sampled_from(PROJ_TYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 2, 3]),
)
def test_ranks_change_nothing(world, proj_type, residual, randomized, refresh_offset, gap) -> None:
    options = OPTIONS | dict(rank=3, update_proj_gap=gap, proj_type=proj_type, residual=residual, weight_decay=0.1)
    options |= dict(randomized=randomized, refresh_offset=refresh_offset)
    apart, sharded, optimizer = unlike_one_process(world, 4, **options)
    assert apart <= 1e-12
    assert not sharded.group.calls  # no sum over ranks: gradients travel, and updates come back
    kept = [o.state[flat]["projector"].numel() for o, flat in zip(sharded.optimizers, sharded.flats, strict=True)
            if "projector" in o.state[flat]]  # fmt: skip
    alone = [its["projector"].numel() for its in optimizer.state.values() if "projector" in its]
    assert sum(kept) == sum(alone)  # by one rank each


def test_what_one_rank_keeps_and_what_is_sent() -> None:
    """Two matrices, each on the rank that has most of it: their gradients' other parts go there and come back."""
    shapes = {"a": (9, 14), "b": (6, 5)}
    ranks = [
        [Fragment("a", shapes["a"], 0, 100, 0), Fragment("b", shapes["b"], 0, 3, 100)],
        [Fragment("a", shapes["a"], 100, 126, 0), Fragment("b", shapes["b"], 3, 30, 26)],
    ]
    sharded = Sharded({f: random(*s) for f, s in shapes.items()}, ranks, **OPTIONS | {"rank": 2})
    for _ in range(2):
        sharded.step({f: random(*s, seed=1) for f, s in shapes.items()})
    assert sharded.group.swaps == 2 * [[3], [26]]  # elements from the first rank, and back
    states = [optimizer.state[flat] for optimizer, flat in zip(sharded.optimizers, sharded.flats, strict=True)]
    for state, (long, short) in zip(states, ((14, 9), (6, 5)), strict=True):
        assert state["projector"].numel() == 2 * short
        assert state["exp_avg_low"].numel() == state["exp_avg_sq_low"].numel() == 2 * long


def test_subspaces_are_renewed_every_gap_steps_or_one_after_the_other() -> None:
    for offsets, expected in (([0, 0, 0], [{1, 5, 9}] * 3), ([0, 1, 6], [{1, 5, 9}, {1, 4, 8}, {1, 3, 7}])):
        parameters = [nn.Parameter(random(8, 12, seed=i)) for i in range(3)]
        groups = [{"params": [p], "refresh_offset": o} for p, o in zip(parameters, offsets, strict=True)]
        optimizer = GWTAdamW(groups, **OPTIONS | {"update_proj_gap": 4})
        renewed: list[set[int]] = [set(), set(), set()]
        before = [torch.zeros(RANK, 8, dtype=FP64)] * 3
        for step in range(1, 11):
            for i, parameter in enumerate(parameters):
                parameter.grad = random(8, 12, seed=10 * step + i)
            optimizer.step()
            now = [optimizer.state[parameter]["projector"].clone() for parameter in parameters]
            for i in range(3):
                if not torch.equal(now[i], before[i]):
                    renewed[i].add(step)
            before = now
        assert renewed == expected


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_a_randomized_subspace_has_almost_as_much_of_the_gradient(proj_type: str) -> None:
    """Of a gradient whose singular values fall; the same one every time, and another with another seed."""
    g = (random(96, 8) @ random(8, 64, seed=1)) + 0.1 * random(96, 64, seed=2)
    found = {}
    for name, more in (("whole", {}), ("a", {"randomized": True}), ("b", {"randomized": True, "rounding_seed": 1})):
        parameter = nn.Parameter(random(96, 64))
        optimizer = GWTAdamW([parameter], **OPTIONS | {"proj_type": proj_type}, **more)
        parameter.grad = g.clone()
        optimizer.step()
        p = found[name] = optimizer.state[parameter]["projector"]
        assert float((p @ p.mT - torch.eye(RANK, dtype=FP64)).abs().max()) < 1e-12
    with torch.device("meta"):  # numbers at random are made where they are used, whatever the default device
        parameter = nn.Parameter(torch.zeros(96, 64, dtype=FP64, device="cpu"))
        parameter.grad = 4e306 * g  # and no product of them is infinite
        optimizer = GWTAdamW([parameter], **OPTIONS | {"proj_type": proj_type}, randomized=True)
        optimizer.step()
        assert float((optimizer.state[parameter]["projector"].abs() - found["a"].abs()).abs().max()) < 1e-9
    energy = {name: float((g @ p.mT).square().sum()) for name, p in found.items()}
    assert energy["a"] > 0.999 * energy["whole"] and energy["b"] > 0.999 * energy["whole"]
    assert not torch.equal(found["a"], found["b"])


def test_a_matrix_whose_first_gradient_comes_late_and_one_with_a_gradient_that_is_none() -> None:
    """It has a subspace from its first step on; elements that are no numbers are as visible as with Adam."""
    late, other = nn.Parameter(random(8, 12)), nn.Parameter(random(8, 12, seed=1))
    optimizer = GWTAdamW([late, other], **OPTIONS)
    start = late.detach().clone()
    for step in range(3):
        other.grad = random(8, 12, seed=step)
        late.grad = random(8, 12, seed=9) if step == 2 else None
        optimizer.step()
    assert float((late.detach() - start).norm()) > 0 and optimizer.state[late]["step"] == 1
    bad = nn.Parameter(random(8, 12))
    bad.grad = random(8, 12)
    bad.grad[2, 3] = torch.inf
    GWTAdamW([bad], **OPTIONS).step()
    assert not bool(bad.isfinite().all())


def test_bytes_of_a_weight() -> None:
    """Of LLaMA-7B's matrices at rank 1024, by plan, on one rank and spread over 8, and allocated.

    GaLore's paper has 65.5 % less than Adam's 4 bytes in bf16: 1.38.
    """
    shapes, tensors, weights = LLAMA_7B, LLAMA_7B_TENSORS, LLAMA_7B_WEIGHTS
    expected = 4 * sum(1024 * (2 * max(s) + min(s)) for s in shapes) * 32 / weights
    group = GroupSpec.of({"level": 0, **OPTIONS, "rank": 1024}, tensors)
    assert plan_zero([group], stage=1, world_size=1, rank=0).total / weights == pytest.approx(expected, abs=1e-6)
    for stage in (1, 3):
        ranks = [plan_zero([group], stage=stage, world_size=8, rank=rank).total / weights for rank in range(8)]
        assert sum(ranks) == pytest.approx(expected, abs=1e-4)
        assert max(ranks) < 1.06 * expected / 8
    assert expected == pytest.approx(2.58, abs=0.01)
    in_bf16 = {"level": 0, **OPTIONS, "rank": 1024, "state_dtype": "bf16"}
    planned = plan_zero([GroupSpec.of(in_bf16, tensors)], stage=1, world_size=1, rank=0).total
    assert planned / weights == pytest.approx(1.29, abs=0.005)
    assert allocated_on_meta(in_bf16) == planned + 4 * (len(tensors) - 1)  # each its own count of steps


def test_state_in_bf16() -> None:
    """Half of the bytes, near the step in fp32, rounded alike on any ranks, and without a drift."""
    start = {"a": random(24, 40).float(), "b": random(40, 24, seed=1).float()}
    grads = [
        {f: random(24, 40, seed=7 * i + (f == "a")).float().view(w.shape) for f, w in start.items()} for i in range(9)
    ]
    ends = {}
    for name, cuts in (("one", [0, 960]), ("three", [0, 313, 700, 960])):
        ranks = [[Fragment("a", (24, 40), *i, 0), Fragment("b", (40, 24), *i, i[1] - i[0])] for i in pairwise(cuts)]
        sharded = Sharded(start, ranks, **OPTIONS | {"update_proj_gap": 4}, state_dtype="bf16")
        for grad in grads:
            sharded.step(grad)
        ends[name] = sharded.gather({f: tuple(w.shape) for f, w in start.items()})
        sizes = [
            its[k].nbytes
            for o in sharded.optimizers
            for its in o.state.values()
            for k in its
            if "_low" in k or k == "projector"
        ]
        assert sum(sizes) == 2 * 2 * RANK * (2 * 40 + 24)
    exact = stepped(start["a"], [g["a"] for g in grads], **OPTIONS | {"update_proj_gap": 4})
    assert all(torch.equal(ends["one"][f], ends["three"][f]) for f in start)
    moved = float((exact - start["a"]).norm())
    assert 0 < float((ends["one"]["a"] - exact).norm()) < 0.02 * moved
    # A second moment that changes by less in a step than a bf16 can say still decays.
    parameter = nn.Parameter(random(24, 40).float())
    optimizer = GWTAdamW([parameter], **OPTIONS, betas=(0.9, 0.999), state_dtype="bf16")
    for i in range(400):
        parameter.grad = (random(24, 40) * (i == 0)).float()
        optimizer.step()
        if i == 0:
            first = float(optimizer.state[parameter]["exp_avg_sq_low"].double().sum())
    last = float(optimizer.state[parameter]["exp_avg_sq_low"].double().sum())
    assert last / first == pytest.approx(0.999**399, rel=0.02)


def test_groups_by_names() -> None:
    """What matches a target is projected; embeddings, head and norms are AdamW."""
    model = nn.ModuleDict({"embed": nn.Embedding(40, 16), "attn": nn.Linear(16, 16), "norm": nn.LayerNorm(16)})
    groups = param_groups(model, targets=["attn"], recipe="low-rank", rank=4)
    assert [(len(group["params"]), group["level"], group["rank"]) for group in groups] == [(1, 0, 4), (4, 0, None)]
    optimizer = GWTAdamW(groups, recipe="low-rank", rank=4)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert "projector" in optimizer.state[model["attn"].weight]  # type: ignore[index]
    with pytest.raises(ValueError, match="'low-rank' and no rank: what matches a target would be AdamW in silence"):
        param_groups(model, targets=["attn"], recipe="low-rank")
    with pytest.raises(ValueError, match="proj_type='up' in the options of param_groups must be one of"):
        param_groups(model, targets=["attn"], recipe="low-rank", rank=4, proj_type="up")
    for parameter in (*model["embed"].parameters(), *model["norm"].parameters(), model["attn"].bias):
        assert optimizer.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq", "limited_norm"}  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1}, "level=1 in .* 'low-rank': nothing of it is in wavelet space"),
        ({"rank": -1}, "rank=-1 in .* must be a whole number >= 0"),
        ({"rank": 2.5}, "rank=2.5 in .* must be a whole number"),
        ({"update_proj_gap": 0}, "update_proj_gap=0 in .* must be a whole number >= 1"),
        ({"proj_type": "random"}, "proj_type='random' in .* must be one of .*reverse_std"),
        ({"state_dtype": "int8"}, "state_dtype='int8' has a scale for cells .* write state_dtype='bf16'"),
        ({"recipe": "energy"}, "rank=6 in .* 'energy': it is read by low-rank alone. Remove it, or write recipe='low-"),
        ({"proj": "svd"}, "proj in .* keys of another optimizer"),
    ],
    ids=str,
)
def test_keys_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GWTAdamW([{"params": [nn.Parameter(random(4, 6))], **OPTIONS, **options}], recipe="low-rank")


def test_state_of_another_rank_is_refused() -> None:
    parameter = nn.Parameter(random(8, 12))
    parameter.grad = random(8, 12)
    saved = GWTAdamW([parameter], **OPTIONS)
    saved.step()
    other = GWTAdamW([parameter], **OPTIONS | {"rank": 5})
    with pytest.raises(ValueError, match=r"of rank 6 in what .* of rank 5 in this optimizer"):
        other.load_state_dict(saved.state_dict())
