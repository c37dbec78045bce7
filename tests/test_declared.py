"""What a declaration of somebody else's can get wrong: it is refused, or it is right."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, ones_like, zeros_like

from gwt_dist import GWTAdamW
from gwt_dist.declare import Extent, Field, Pass, Program
from gwt_dist.formulas import FORMULAS, Share
from gwt_dist.kernels import choice
from gwt_dist.layout import Fragment
from gwt_dist.recipes import RECIPES, rule_of
from simulated import Sharded
from test_recipes import random

ENERGY = rule_of({"lr": 0.1, "recipe": "energy"}).program
SHAPES = {"a": (9, 14), "b": (6, 5), "c": (9,)}


def stand_in(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A recipe "new": "energy", with other parts."""
    monkeypatch.setitem(RECIPES, "new", replace(RECIPES["energy"], **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"formula": "none"}, "names 'none', which is none of adam_approximation"),
        ({"write": "none"}, "names 'none', which is none of decay, cautious"),
        ({"phases": (Pass("stepp", writes=True),)}, "formula 'adam_energy' has no function stepp"),
    ],
    ids=str,
)
def test_a_name_that_is_not_there(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, program=lambda _: replace(ENERGY, **changes))
    parameter = torch.nn.Parameter(random(4, 6))
    parameter.grad = random(4, 6)
    with pytest.raises(ValueError, match=message):
        GWTAdamW([parameter], level=2, recipe="new").step()
    assert torch.equal(parameter.detach(), random(4, 6))


def test_a_field_has_one_extent_in_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, program=lambda _: replace(ENERGY, fields=(Field("exp_avg_sq", Extent.ROW),)))
    with pytest.raises(ValueError, match="tensors of level 0 keep exp_avg_sq over another extent"):
        GWTAdamW([torch.nn.Parameter(random(4, 6))], level=2, recipe="new")


def test_a_key_that_a_recipe_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, keys=("detail_gain",))
    for key, value in {
        "nesterov": True,
        "correct_bias": False,
        "limiter": 1.5,
        "second_moment": "approximation",
    }.items():
        with pytest.raises(ValueError, match=f"{key}={value!r} in the arguments .* it is read by paper, energy"):
            GWTAdamW([torch.nn.Parameter(random(4, 6))], level=2, recipe="new", **{key: value})


class Slow:
    """Two momenta, of which one is read."""

    @staticmethod
    def step(share: Share) -> Tensor:
        m_N, slow_N = share.state["exp_avg"], share.state["slow"]
        slow_N.lerp_(m_N.lerp_(share.piece.transform.approximation(share.x_NU), 0.1), 0.1)
        return share.piece.transform.synthesis(share.x_NU, m_N, ones_like(m_N), zeros_like(m_N)) * share.rule.lr


def test_level_0_beside_fields_that_are_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a flat buffer each field of its state begins at another place, which compiled kernels do not take."""
    monkeypatch.setitem(FORMULAS, "slow", Slow)
    fields = Field("exp_avg", Extent.UNIT), Field("slow", Extent.UNIT)
    stand_in(monkeypatch, program=lambda _: Program("slow", fields, (Pass("step", writes=True),)))
    places = {"a": 0, "b": 200, "c": 300}
    ranks = [[Fragment(name, SHAPES[name], 0, prod(SHAPES[name]), place) for name, place in places.items()]]
    found = []
    for kernel in ("", "eager"):
        monkeypatch.setenv(choice.VARIABLE, kernel)
        sharded = Sharded(
            {n: random(*shape).float() for n, shape in SHAPES.items()}, ranks, lr=0.02, level=2, recipe="new"
        )
        for seed in range(3):
            sharded.step({name: random(*shape, seed=seed).float() for name, shape in SHAPES.items()})
        state = sharded.optimizers[0].state[sharded.flats[0]]
        assert state["exp_avg_sq"].shape == (9,) and state["exp_avg_sq"].all()
        found.append([*sharded.gather(SHAPES).values(), *state.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_level_0_may_travel_too(monkeypatch: pytest.MonkeyPatch) -> None:
    orthogonal = RECIPES["orthogonal"]
    monkeypatch.setitem(RECIPES, "new", replace(orthogonal, plain=orthogonal.program))
    parameters = [torch.nn.Parameter(random(4, 6)) for _ in range(2)]
    kinds = (("new", 0), ("orthogonal", 1))
    groups = [
        {"params": [p], "recipe": recipe, "level": level} for p, (recipe, level) in zip(parameters, kinds, strict=True)
    ]
    optimizer = GWTAdamW(groups, lr=0.1, detail_gain=1.0, betas=(0.0, 0.9))
    for parameter in parameters:
        parameter.grad = random(4, 6, seed=1)
    optimizer.step()
    # Without a past, and with all details, the gradient is what is orthogonalized at every level.
    torch.testing.assert_close(parameters[0].detach(), parameters[1].detach(), rtol=0, atol=1e-12)
    assert (parameters[0] - random(4, 6)).detach().abs().max() > 0.01


def test_keys_that_a_loaded_state_does_not_have_yet_stay_as_they_are() -> None:
    def built(**options: Any) -> GWTAdamW:
        parameter = torch.nn.Parameter(random(4, 6))
        parameter.grad = random(4, 6, seed=1)
        optimizer = GWTAdamW([parameter], **{"level": 2, "recipe": "energy", **options})
        optimizer.step()
        return optimizer

    saved, new = built().state_dict(), built(cautious=True)
    for key in ("cautious", "nesterov", "correct_bias", "nor", "products"):
        del saved["param_groups"][0][key]
    new.load_state_dict(saved)
    assert new.param_groups[0]["cautious"] is True and new.param_groups[0]["nesterov"] is None
    assert "cautious" not in saved["param_groups"][0], "what was given is left alone"
    for recipe in ("paper", "orthogonal"):  # what its state would not follow
        new.param_groups[0]["recipe"] = recipe
        with pytest.raises(ValueError, match="its state cannot follow"):
            new.step()


def test_updating_a_parameter_twice_or_outside_of_its_group() -> None:
    parameters = [torch.nn.Parameter(random(4, 6)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = random(4, 6, seed=1)
    optimizer = GWTAdamW(parameters, level=2, recipe="energy")
    optimizer.update([parameters[0], parameters[0], parameters[1]])
    assert [optimizer.state[p]["step"].item() for p in parameters[:2]] == [1, 1]
    optimizer.param_groups[0]["params"] = parameters[1:]
    optimizer.update(parameters)
    assert [optimizer.state[p]["step"].item() for p in parameters] == [1, 2, 1]


def test_a_field_has_one_format_in_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices in 8 bits and vectors in fp32 would lie in one tensor of state."""
    energy = RECIPES["energy"]
    stand_in(monkeypatch, program=lambda options: energy.program({**options, "state_dtype": "int8"}))
    with pytest.raises(ValueError, match="keep exp_avg, exp_avg_sq over another extent or in another format"):
        GWTAdamW([torch.nn.Parameter(random(4, 6))], level=2, recipe="new")


def test_cells_are_of_haar_whoever_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = RECIPES["energy"]
    stand_in(
        monkeypatch,
        program=lambda options: energy.program({**options, "wavelet": "haar", "state_dtype": "int8"}),
        plain=lambda options: energy.plain({**options, "state_dtype": "int8"}),
    )
    with pytest.raises(ValueError, match="wavelet='db2' must be 'haar': 8-bit state stores 64"):
        GWTAdamW([torch.nn.Parameter(random(4, 6))], level=2, recipe="new", wavelet="db2")


def test_a_change_of_codes_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgets(type(FORMULAS["adam_energy"])):  # type: ignore[misc]
        def step(self, share: Share) -> Tensor:
            share.state["exp_avg"].mul_(0.5)
            return self.write(share)

    monkeypatch.setitem(FORMULAS, "forgets", Forgets(energy=True))
    stand_in(monkeypatch, program=lambda options: replace(RECIPES["energy"].program(options), formula="forgets"))
    for state_dtype in ("fp32", "int8"):
        parameter = torch.nn.Parameter(random(4, 6).float())
        parameter.grad = random(4, 6).float()
        optimizer = GWTAdamW([parameter], level=2, recipe="new", state_dtype=state_dtype)
        if state_dtype == "fp32":
            optimizer.step()  # the state itself was changed
            continue
        with pytest.raises(ValueError, match=r"'step' of formula 'forgets' changed exp_avg and did not keep it"):
            optimizer.step()
