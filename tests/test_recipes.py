"""Recipes as declarations: what groups mean, the formulas by hand, what is refused, and who may name a recipe."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import toy_recipe  # noqa: F401
from gwt_dist import GWTAdamW, keys
from gwt_dist.declare import Extent, Field, Pass, Program, Rule, Sum, Travel
from gwt_dist.layout import Fragment
from gwt_dist.recipes import RECIPES, Recipe, meaning, register, rule_of
from simulated import Sharded
from simulated import normal as random

PACKAGE = Path(__file__).parents[1] / "gwt_dist"
FP64 = torch.float64
SHAPES = {"a": (9, 14), "b": (6, 5)}


def test_old_groups_mean_what_they_meant() -> None:
    def formula(**group: Any) -> tuple[str, str, int, float]:
        rule = rule_of({"lr": 0.1, "wavelet": "haar", **group})
        return rule.program.formula, rule.plain.formula, len(rule.program.phases), rule["detail_gain"]

    table = {
        ("paper",): ("adam_approximation", "adam_approximation", 2, 1.0),
        ("paper", "energy"): ("adam_energy", "adam_energy", 2, 1.0),
        ("paper", "none"): ("orthogonal", "adam_energy", 1, 1.0),  # its details have the gain that paper's have
        ("energy",): ("adam_energy", "adam_energy", 1, pytest.approx(0.1)),
        ("energy", "approximation"): ("adam_approximation", "adam_approximation", 1, pytest.approx(0.1)),
        ("energy", "none"): ("orthogonal", "adam_energy", 1, 1.0),
        ("orthogonal",): ("orthogonal", "adam_energy", 1, 1.0),
        ("orthogonal", "energy"): ("adam_energy", "adam_energy", 1, pytest.approx(0.1)),
        ("orthogonal", "approximation"): ("adam_approximation", "adam_approximation", 1, pytest.approx(0.1)),
    }
    for (recipe, *second), expected in table.items():
        assert formula(recipe=recipe, second_moment=second[0] if second else None) == expected, (recipe, second)
    assert formula(recipe="paper", limiter=0)[2] == 1 and formula(recipe="energy", limiter=1.5)[2] == 2


def test_nesterov_is_a_default_of_orthogonal_alone() -> None:
    """What was called "none" of another recipe stays as it was."""
    groups = {"orthogonal": 1, "energy": 0, "paper none": 0, "energy none": 0}
    for words, expected in groups.items():
        recipe, *second = words.split()
        group = {"recipe": recipe, "second_moment": second[0] if second else None}
        assert rule_of(group)["nesterov"] == expected, group
        assert rule_of(group | {"nesterov": not expected})["nesterov"] == 1 - expected


def test_what_moments_of_a_group_mean() -> None:
    assert meaning({"recipe": "paper"}) == {"second_moment": "approximation", "detail_gain": 1.0, "limiter": 1.01}
    assert meaning({"recipe": "energy"}) == {"second_moment": "energy", "detail_gain": "coherence", "limiter": 0.0}
    assert meaning({"recipe": "orthogonal"}) == {"second_moment": "none", "detail_gain": 1.0}
    assert meaning({"recipe": "low-rank", "rank": 3}) == {"rank": 3, "proj_type": "std"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": "energy", "nor": 0.9},
            r"nor=0.9 in the arguments .* 'energy': it is read by orthogonal alone",
        ),
        ({"recipe": "foam", "limiter": 1.01}, r"limiter=1.01 .* 'foam': no update of it can grow"),
        ({"recipe": "foam", "detail_gain": 0.1}, r"detail_gain=0.1 .* 'foam': a residual is bounded"),
        ({"recipe": "foam", "wavelet": "db2"}, r"wavelet='db2' must be 'haar': the denominator of an element"),
        ({"recipe": "foam", "second_moment": "none"}, r'write recipe="orthogonal"'),
        (
            {"recipe": "foma"},
            r"recipe='foma' in the arguments of GWTAdamW must be one of \['adalomo', 'came',",
        ),
        ({"recipe": "orthogonal", "nor": 1.0}, r"nor=1.0 in .* must be in \[0, 1\)"),
        ({"nesterov": 1}, r"nesterov=1 in .* must be True, False or None"),
    ],
    ids=str,
)
def test_keys_that_a_recipe_cannot_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GWTAdamW([torch.nn.Parameter(random(7, 13))], **options)


def test_every_key_is_an_argument_and_is_documented() -> None:
    import inspect

    arguments = list(inspect.signature(GWTAdamW.__init__).parameters)[2:]
    shipped = [name for name in keys.of_recipes() if name not in ("toy",)]
    assert arguments == [*keys.COMMON, *shipped, *keys.OF_TORCH, *keys.REFUSED_OF_TORCH]
    documented = ", ".join(re.findall(r"^        (\w[\w, ]*): ", GWTAdamW.__doc__ or "", re.M)).split(", ")
    assert documented[1:-1] == arguments, "params first, ValueError last"


def test_a_declaration_that_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match="has sums, which nothing would read"):
        Pass("step", (Sum("g2"),), writes=True)
    with pytest.raises(ValueError, match="one sum of one number a tensor"):
        Pass("step", (Sum("rows", Extent.ROW),), then="limit")
    with pytest.raises(ValueError, match="energy: there is a recipe or a key of that name"):
        register("energy", RECIPES["paper"])
    with pytest.raises(ValueError, match="level: there is a recipe or a key of that name"):
        register("new", RECIPES["paper"], {"level": keys.KEYS["lr"]})
    step, unit = Pass("step", writes=True), Field("m", Extent.UNIT)
    for fields, phases, message in (
        ((unit, unit), (step,), "m, m stand twice"),
        ((Field("step", Extent.UNIT),), (step,), "a field cannot be called step"),
        ((unit,), (), "its last phase, and no other, must write"),
        ((unit,), (Pass("look"),), "its last phase, and no other, must write"),
        ((unit,), (step, step), "its last phase, and no other, must write"),
        ((unit,), (Travel("send", "work", "keep", ("m",)),), "m travel along and are no fields over rows"),
    ):
        with pytest.raises(ValueError, match=message):
            Program("new", fields, phases)


def test_programs_of_one_kind_are_one() -> None:
    """What is stepped in one call is found by equality, and a step makes no new program."""
    one, other = (rule_of({"lr": lr, "recipe": "paper", "wavelet": "haar"}) for lr in (0.1, 0.2))
    assert one.program is other.program and one.plain is other.plain
    assert isinstance(one, Rule) and isinstance(one.program, Program) and isinstance(RECIPES["paper"], Recipe)


def test_layouts_without_sums_send_nothing_and_with_sums_once_a_phase() -> None:
    weights = {name: random(*shape) for name, shape in SHAPES.items()}
    ranks = [
        [Fragment("a", SHAPES["a"], *a, 0), Fragment("b", SHAPES["b"], *b, a[1] - a[0])]
        for a, b in (((0, 56), (0, 15)), ((56, 126), (15, 30)))
    ]
    expected = {
        ("foam", None): [],
        ("energy", None): [],
        ("paper", None): [2],
        ("orthogonal", None): [],
        ("orthogonal", "coherence"): [4],
        ("factored", None): [4 + 2, 2],
        ("came", None): [4 + 2, 3 * (4 + 2)],
        ("adalomo", None): [2 + 4 + 2, 2],
        ("toy", None): [2 + 2 * (4 + 2)],
    }
    assert prod(SHAPES["b"]) % 15 == 0, "rows are cut nowhere, and units neither"
    for (recipe, gain), lengths in expected.items():
        sharded = Sharded(weights, ranks, lr=0.02, level=2, recipe=recipe, detail_gain=gain)
        sharded.step({name: torch.ones_like(weight) for name, weight in weights.items()})
        assert sharded.group.calls == lengths, (recipe, gain)


DERIVED = (
    *(
        "declare",
        "extents",
        "plan",
        "sums",
        "seats",
        "rounds",
        "stages",
        "schedule",
        "steps",
        "state",
        "shards",
        "piece",
    ),
    *("memory", "checkpoint", "kernels", "engines"),
)


def test_nothing_that_is_derived_names_a_recipe() -> None:
    """Names stand in `recipes`, in the files of the formulas, and in documentation."""
    names = [name for name in RECIPES if name != "toy"]
    assert names == ["paper", "energy", "foam", "orthogonal", "factored", "came", "adalomo", "low-rank"]
    # Quoted anywhere, or as a word; "paper" and "came" have other meanings too.
    named = re.compile("|".join([rf"""["'`]+({name})["'`]+|\b(?!paper|came){name}\w*""" for name in names]))
    found = []
    for part in DERIVED:
        module = PACKAGE / f"{part}.py"
        for path in [module] if module.exists() else sorted((PACKAGE / part).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and path.parent.name != "formulas":  # of kernels: one has its own
                # What a module is for may be shown by examples, in its docstring.
                code = re.sub(r'^"""(.*?)"""', "", path.read_text(), count=1, flags=re.S)
                found += [f"{path.name}: {match[0]}" for match in named.finditer(code)]
    assert not found
    assert len((PACKAGE / "schedule.py").read_text().splitlines()) < 200
    optimizer, docstring = (PACKAGE / "optimizer.py").read_text(), GWTAdamW.__doc__ or ""
    assert named.search(docstring) and not named.search(optimizer.replace(docstring, ""))


class Counted(list):  # type: ignore[type-arg]
    """A group's parameters; counts how often somebody walks over them."""

    walks = 0

    def __iter__(self) -> Any:
        type(self).walks += 1
        return super().__iter__()


@pytest.mark.parametrize("recipe", ["paper", "orthogonal"])
def test_no_work_is_quadratic_in_the_number_of_parameters(recipe: str) -> None:
    """Groups are walked a few times in a step, the making of plans included, and once for updates of single layers."""
    walks = []
    for number in (4, 40):
        parameters = [torch.nn.Parameter(random(3, 5)) for _ in range(number)]
        optimizer = GWTAdamW(parameters, recipe=recipe, level=1)
        optimizer.param_groups[0]["params"] = Counted(parameters)
        for parameter in parameters:
            parameter.grad = random(3, 5)
        Counted.walks = 0
        optimizer.step()
        optimizer.step()
        for parameter in parameters:
            optimizer.update([parameter])
        walks.append(Counted.walks)
    assert walks[0] == walks[1] <= 4
