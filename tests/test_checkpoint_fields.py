"""Checkpoints of state by its fields: of any extent, on any ranks, of recipes that are known here or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gwt_dist
from checkpoint_cases import Trained
from checkpoint_field_cases import EVERY, EVERY_EXTENT, fill, filled_case, wrong
from export_cases import llama
from gwt_dist import CheckpointError, GWTAdamW
from gwt_dist.checkpoint import read_index
from gwt_dist.checkpoint.holdings import Run
from gwt_dist.cli.app import main
from gwt_dist.recipes import RECIPES

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

FLAT = ("fsdp1 flat", "zero2")  # rows are cut anywhere, and one buffer has many tensors


@pytest.mark.support(
    "checkpoints", "fields of a coefficient, a row, a column and a tensor: 3 ranks to 2 to one process"
)
@pytest.mark.parametrize(
    ("recipe", "kinds"), [("normuon", (*FLAT, "columns")), (EVERY, ("fsdp1 flat", "fsdp2", "columns"))]
)
def test_every_number_is_where_it_was(ranks, tmp_path, monkeypatch, recipe, kinds) -> None:
    """Bit for bit, whichever ranks keep it, those that own none of it included."""
    folder = str(tmp_path)
    assert ranks(3, filled_case, folder, kinds, recipe, True, timeout=120) == [[], [], []]
    assert ranks(2, filled_case, folder, kinds[:2], recipe, False, timeout=120) == [[], []]
    monkeypatch.setitem(RECIPES, EVERY, EVERY_EXTENT)
    assert filled_case(folder, ("one",), recipe, False) == []
    for path in tmp_path.iterdir():
        entry = read_index(path / "step-00000003").tensors["mlp_down.weight"]
        assert entry.recipe == ("orthogonal" if recipe == "normuon" else EVERY)
        shapes = {name: part.shape for name, part in entry.parts.items()}
        if recipe == "normuon":
            assert shapes == {"weight": (16, 5461), "exp_avg": (16, 1366), "exp_avg_sq_row": (16, 1)}
            assert entry.numbers.keys() == {"limited_norm"}
        else:
            fields = {"unit": (16, 1366), "row": (16, 1), "column": (1, 1366)}
            fields |= {"more": (16, 1366), "more_scale": (16, 22)}
            assert shapes == {"weight": (16, 5461), **fields}
            assert entry.numbers.keys() == {"tensor"}


def test_a_damaged_fill_is_seen() -> None:
    """What compares can tell."""
    trained = Trained("one", recipe="normuon")
    run = Run(trained.model, trained.optimizer)
    fill(run)
    assert wrong(run) == []
    trained.optimizer.state[trained.module.attn_q.weight]["exp_avg_sq_row"][65] += 1
    (told,) = wrong(run)
    assert told.startswith("exp_avg_sq_row of Fragment(fqn='attn_q.weight'")


def saved_with(folder: Path, stepped: bool, **keys: Any) -> tuple[torch.nn.Module, GWTAdamW]:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    optimizer = GWTAdamW(model.parameters(), level=2, recipe="orthogonal", **keys)
    if stepped:
        model(torch.ones(6)).sum().backward()
        optimizer.step()
    gwt_dist.save(folder, model, optimizer, step=int(stepped))
    return model, optimizer


@pytest.mark.parametrize("stepped", [True, False])
def test_other_state_is_refused(tmp_path, stepped) -> None:
    """Rows that are normalized have state of their own, which the saved options must not ask for."""
    saved_with(tmp_path / "with", stepped, nor=0.95)
    model, optimizer = saved_with(tmp_path / "without", stepped)
    message = (
        r"'weight' has the state exp_avg \(unit\), exp_avg_sq_row \(row\), limited_norm \(tensor\) in .*, and this "
        r"optimizer \(recipe 'orthogonal'\) needs exp_avg \(unit\), limited_norm \(tensor\)"
    )
    other = r"would have other state \(level=2, wavelet='haar' with exp_avg, exp_avg_sq_row, limited_norm by normuon\)"
    with pytest.raises(CheckpointError, match=message if stepped else other):
        gwt_dist.load(tmp_path / "with", model, optimizer)
    assert optimizer.param_groups[0]["nor"] is None
    model, optimizer = saved_with(tmp_path / "another", stepped, nor=0.5)
    gwt_dist.load(tmp_path / "with", model, optimizer)  # a rate alone is an option
    assert optimizer.param_groups[0]["nor"] == 0.95


def test_a_recipe_that_is_not_known_here(tmp_path, capsys, monkeypatch) -> None:
    """It can be looked at and handed on; going on from it takes the recipe."""
    monkeypatch.setitem(RECIPES, EVERY, EVERY_EXTENT)
    model = llama()
    run = Run(model, GWTAdamW(model.parameters(), recipe=EVERY, level=2))
    fill(run)
    gwt_dist.save(tmp_path / "run", model, run.optimizer, step=3, extra={"model_config": model.config.to_dict()})
    monkeypatch.undo()
    assert main(["inspect", "--json", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out)
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        for name in ("unit", "row", "column", "more", "more_scale"):
            value = run.optimizer.state[parameter].get(name)
            sizes[name] = sizes.get(name, 0) + (0 if value is None else value.nbytes)
    assert told["state_bytes"] == sizes
    assert told["totals"]["moment_bytes"] == sum(sizes.values())
    assert {one["recipe"] for one in told["tensors"]} == {EVERY}  # whose tensors of level 0 are not AdamW either
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"row in fp32 {sizes['row']:,} bytes" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    weights = {
        name: tensor for path in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    with pytest.raises(CheckpointError, match=f"was trained with the recipe '{EVERY}' in .*, which is none of paper"):
        gwt_dist.load(tmp_path / "run", model, GWTAdamW(model.parameters(), level=2, recipe="energy"))
