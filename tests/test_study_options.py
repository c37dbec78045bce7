"""What a study and its rows may say, and the optimizers that are built of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gwt_dist import recipes
from gwt_dist.cli.app import main
from gwt_dist.study.config import Study, read_study, study_from
from gwt_dist.study.optimizers import ENTRIES, build, options_of, split
from small_study import ROWS, settings_in


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return settings_in(tmp_path)


def test_every_entry_is_built_over_all_parameters_or_says_what_it_lacks() -> None:
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 4)})
    assert [sorted(part) for part in split(model)] == [["attn.weight"], ["attn.bias", "head.bias", "head.weight"]]
    for name in ("gwt", "adamw", "sgd", "muon", "adafactor"):
        optimizers = build(name, model, 0.01, 0.02, options_of(name, {}, "a row"))
        rates = {id(p): g["lr"] for one in optimizers for g in one.param_groups for p in g["params"]}
        assert [float(rates[id(p)]) for p in model.parameters()] == [0.01, 0.02, 0.02, 0.02], name
    with pytest.raises(ValueError, match="did you mean 'galore'"):
        options_of("galor", {}, "a row")
    with pytest.raises(ValueError, match="did you mean 'rank'"):
        options_of("galore", {"rnk": 3}, "a row")
    assert all(entry.package for entry in ENTRIES.values())


def test_the_key_of_a_run_follows_what_a_recipe_means(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"recipe": "energy", "detail_gain": 0.5}
    options = options_of("gwt", given, "a row")
    assert {key: options[key] for key in ("second_moment", "detail_gain", "limiter")} == {
        "second_moment": "energy",
        "detail_gain": 0.5,
        "limiter": 0.0,
    }
    meant = {"second_moment": "approximation", "detail_gain": 0.2, "limiter": 1.5}
    monkeypatch.setitem(recipes.RECIPES, "energy", dataclasses.replace(recipes.RECIPES["energy"], defaults=meant))
    assert options_of("gwt", given, "a row") == options | {"second_moment": "approximation", "limiter": 1.5}
    with pytest.raises(ValueError, match="did you mean 'energy'"):
        options_of("gwt", {"recipe": "enery"}, "a row")


def test_the_options_of_recorded_runs() -> None:
    """Results are found by all options of their run: these are those of runs that were recorded."""
    meant = {
        "paper": (0.25, "approximation", 1.0, 1.01, False),
        "energy": (1.0, "energy", "coherence", 0.0, False),
        "orthogonal": (0.5, "none", 1.0, 0.0, True),
    }
    common = {"level": 1, "weight_decay": 0.0}
    for recipe, values in meant.items():
        implied = dict(zip(("scale", "second_moment", "detail_gain", "limiter", "nesterov"), values, strict=True))
        options = options_of("gwt", {"recipe": recipe}, "a row")
        assert json.dumps(options, sort_keys=True) == json.dumps(
            {**common, "recipe": recipe, **implied}, sort_keys=True
        )
    options = options_of("gwt", {"recipe": "orthogonal", "nor": 0.95, "nesterov": False}, "a row")
    assert (options["nor"], options["nesterov"], "cautious" in options) == (0.95, False, False)


def test_another_default_of_a_recipe_makes_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the key: that of a recipe which had none of its own too."""
    before = options_of("gwt", {"recipe": "foam"}, "a row")
    foam = recipes.RECIPES["foam"]
    monkeypatch.setitem(
        recipes.RECIPES, "foam", dataclasses.replace(foam, defaults={**foam.defaults, "cautious": True})
    )
    assert options_of("gwt", {"recipe": "foam"}, "a row") == before | {"cautious": True}


def test_rows_of_ours_say_keys_of_the_rest() -> None:
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 4)})
    given = {"recipe": "orthogonal", "level": 0, "least_level": 0, "state_dtype": "int8"}
    for rest, expected in (({}, ("orthogonal", 0, None)), ({"recipe": "energy", "level": 1}, ("energy", 1, None))):
        (optimizer,) = build("gwt", model, 0.01, 0.02, options_of("gwt", given | {"rest": rest}, "a row"))
        matrices, others = optimizer.param_groups
        assert [matrices[key] for key in given] == list(given.values()) and matrices["lr"] == 0.01
        assert tuple(others[key] for key in ("recipe", "level", "least_level")) == expected
        assert (others["lr"], others["state_dtype"]) == (0.02, "int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rowz": []}, "did you mean 'rows'"),
        ({"rows": []}, "no rows"),
        ({"rows": [{"name": "a", "optimizer": "gwt", "lr": [0.2, 0.1]}]}, "larger than the one before"),
        ({"rows": [{"name": "a", "optimizer": "gwt", "lr": [0.1], "prio": 1}]}, "did you mean 'priority'"),
        ({"rows": [*ROWS, ROWS[0]]}, "two rows of here are called 'energy'"),
        ({"batches": [{"tokens": 65, "steps": 8}]}, "no multiple of sequence_length=16"),
        ({"seeds": [0, 0]}, "different numbers"),
        ({"warmup": 1.5}, "outside 0 to 1"),
        ({"rows": [{"name": "a", "optimizer": "gwt"}]}, "must have lr, or like .*it has neither"),
        ({"rows": [*ROWS, {"name": "a", "optimizer": "gwt", "like": "adamv"}]}, "is like 'adamv', which is no row"),
        ({"rows": [{**ROWS[0], "options": {"weight_decay": 0.1}}]}, "write it beside lr"),
        ({"reference": "none"}, "reference='none' in here is none of its rows"),
        ({"compile": 1}, "compile=1 in here: expected true or false"),
        ({"precision": "fp16"}, "precision='fp16' in here must be one of fp32, bf16"),
        ({"device": "gpu"}, "device='gpu' in here must be one of cpu, cuda, auto"),
    ],
)
def test_mistakes_are_told(settings: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_from(settings | change, "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": "fp8"}, "state_dtype='fp8'"),
        ({"rest": {"levle": 1}}, "rest has the unknown key 'levle' (did you mean 'level'?)"),
        ({"rest": {"state_dtype": "fp8"}}, "state_dtype='fp8' in rest"),
    ],
)
def test_wrong_options_of_a_row_end_a_study_before_it_begins(
    options: dict[str, Any],
    message: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "small.json", tmp_path / "out"
    wrong = {"name": "ours", "optimizer": "gwt", "lr": [0.01], "options": options, "priority": 3}
    file.write_text(json.dumps(settings | {"rows": [ROWS[1], wrong]}))
    assert main(["compare", str(file), "--jobs", "0", "--output", str(out)]) == 2
    told = capsys.readouterr().err
    assert "row 'ours'" in told and message in told and not out.exists()


@pytest.mark.parametrize("path", sorted(Path("configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_studies_of_the_tree(path: Path) -> None:
    study = read_study(path.stem)
    for row in study.rows:
        options_of(row.optimizer, row.options, row.name)
    assert isinstance(study, Study) and dataclasses.asdict(study)["name"] == path.stem
