"""The recipes: names, the keys that a parameter group may say, and the `Program` that they make. Knows no torch.

A new recipe is a file of `formulas` and an entry here. Nothing else names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gwt_dist.declare import RESERVED, Extent, Field, Program, Rule
from gwt_dist.formats import CELL, FP32
from gwt_dist.keys import COMMON, KEYS, Key, check_keys
from gwt_dist.programs import (
    Options,
    adalomo,
    adam,
    adam_numbers,
    adamw,
    came,
    factored,
    factored_numbers,
    low_rank,
    low_rank_numbers,
    orthogonal,
    orthogonal_numbers,
    residual,
)
from gwt_dist.units import check_haar, check_level, check_wavelet

# Of 60 million weights it ended lower than AdamW with a quarter of its bytes (docs/quality.md).
DEFAULT, LEVEL = "orthogonal", 1
# For where whole matrices should not be multiplied: of the recipes without products it ended lowest there.
WITHOUT_PRODUCTS = "foam"
_CELLS = (
    f"8-bit state stores {CELL} neighbouring coefficients together, and those of other wavelets need the whole row. "
    f'Write wavelet="haar", or state_dtype="bf16"'
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Programs and numbers of a resolved group, and what its keys are where they are None."""

    # Of tensors of its least level or more; raises `ValueError` for what it cannot be.
    program: Callable[[Options], Program]
    plain: Callable[[Options], Program]  # of all others
    numbers: Callable[[Options], dict[str, float]]
    keys: tuple[str, ...]  # those that it reads beside `keys.COMMON`; another that is set is refused
    defaults: Mapping[str, Any] = field(default_factory=dict)
    why: Mapping[str, str] = field(default_factory=dict)  # of keys that it does not read: why not, and what to do
    is_leveled: bool = True  # its groups may have a level; else they have level 0
    former_scale: bool = True  # it was there when `scale` was 0.25 unless it was said


_COMMON_KEYS = (
    *("scale", "nesterov", "cautious", "correct_bias", "state_dtype", "stochastic_rounding", "rounding_seed"),
)
_CRITICAL_KEYS = "critical", "critical_decay", "critical_form"
_ADAM_KEYS = "second_moment", "detail_gain", "limiter", *_CRITICAL_KEYS, *_COMMON_KEYS
_ROW_KEYS = *("clip_threshold", "decay_rate"), *(key for key in _COMMON_KEYS if key != "nesterov")
_FACTORED_KEYS = "second_moment", "detail_gain", "least_level", *_ROW_KEYS
_CLIPS = {"limiter": "clip_threshold limits every update, not the growth of updates. Remove limiter"}

RECIPES: dict[str, Recipe] = {
    # arXiv 2501.07237: raw details, divided by a denominator that may vanish where they do not; hence the limiter.
    "paper": Recipe(
        *(adam, adamw, adam_numbers, _ADAM_KEYS),
        {"scale": 0.25, "second_moment": "approximation", "detail_gain": 1.0, "limiter": 1.01},
    ),
    # A detail contributes what one fresh gradient contributes to Adam's momentum, or more where gradients are steady,
    # over the energy of its own unit. Bounded, so it needs no norm and no collective.
    "energy": Recipe(adam, adamw, adam_numbers, _ADAM_KEYS),
    # The residual of an element is a gradient of its own beside its unit's momentum (FOAM, arXiv 2512.07112), bounded
    # by its square in the denominator, so it needs no gain.
    "foam": Recipe(
        *(residual, adamw, adam_numbers, ("second_moment", *_CRITICAL_KEYS, *_COMMON_KEYS)),
        {"detail_gain": 0.0},
        {
            "detail_gain": "a residual is bounded by its own square in the denominator and has no gain. Remove it",
            "limiter": "no update of it can grow without bound. Remove it",
        },
    ),
    # Momentum alone, orthogonalized as Muon's: half of the state, and matrices travel to a rank each and back.
    "orthogonal": Recipe(
        *(orthogonal, adamw, orthogonal_numbers),
        ("detail_gain", "nor", "products", "least_level", *_CRITICAL_KEYS, *_COMMON_KEYS),
        # With half of it the best rate was AdamW's own, of 1.25 and of 60 million weights (docs/quality.md).
        # Details that enter the iteration whole ended lower than those by coherence, more so in larger batches.
        # Nesterov's step ended 0.010 lower at level 0 and no higher at level 1 (three seeds, 20 tokens a weight).
        {"scale": 0.5, "second_moment": "none", "detail_gain": 1.0, "nesterov": True},
        {
            "limiter": "no second moment is kept: it limits the growth of a normalized momentum, and an "
            "orthogonalized update always has the same norm. Remove limiter, or write a second_moment"
        },
    ),
    # A row and a column of numbers in place of the second moment, so a momentum and little else (Adafactor, arXiv
    # 1804.04235). It keeps the root mean square of its update below a limit, which is one number a tensor.
    "factored": Recipe(factored, adamw, factored_numbers, _FACTORED_KEYS, why=_CLIPS, former_scale=False),
    # And the same of how far each update is from the momentum: it goes far where they agree (CAME, arXiv 2307.02047).
    "came": Recipe(came, adamw, factored_numbers, ("confidence_beta", *_FACTORED_KEYS), why=_CLIPS, former_scale=False),
    # Without a momentum there is nothing that a wavelet could compress, and next to nothing is kept (AdaLomo, arXiv
    # 2310.10195). It is for `fuse_backward`, which frees each gradient at once.
    "adalomo": Recipe(
        *(adalomo, adamw, factored_numbers, _ROW_KEYS),
        {"decay_rate": -0.8},
        {
            **_CLIPS,
            "least_level": "it takes matrices of every level, and keeps no more of one than of another. Remove it",
            "second_moment": "rows and columns of mean squares are all that it keeps. Remove it",
            "detail_gain": "details are normalized as all of their unit, with no momentum beside them. Remove it",
        },
        former_scale=False,
    ),
    # Adam in the subspace of the first singular vectors of each matrix (GaLore, arXiv 2403.03507). The groups of
    # galore-torch say what they say there: those without a rank are AdamW.
    "low-rank": Recipe(
        *(low_rank, adamw, low_rank_numbers),
        (
            *("rank", "update_proj_gap", "proj_type", "residual", "randomized", "refresh_offset", "scale"),
            *("cautious", "correct_bias", "state_dtype", "stochastic_rounding", "rounding_seed"),
        ),
        {"scale": 0.25},
        {
            "detail_gain": "there is no wavelet, so there are no details. Remove it",
            "nesterov": "moments are Adam's own. Remove it",
        },
        is_leveled=False,
        former_scale=False,
    ),
}


def level_of(recipe: object) -> int:
    """The level of a group of this recipe, or of the default for None, that says none."""
    its = RECIPES.get(recipe) if isinstance(recipe, str) else None  # `check_group` refuses a name that is none
    return LEVEL if its is None or its.is_leveled else 0


def readers(key: str) -> str:
    """The recipes that read a key of their own, as text."""
    return ", ".join(name for name, its in RECIPES.items() if key in its.keys)


def refuse_plain(group: Mapping[str, Any]) -> None:
    """Raise `ValueError` for keys of matrices of which the recipe takes none, as it lacks one, or has a wrong one."""
    recipe, options = resolved(group)
    if recipe.is_leveled:
        return
    check_keys(group, "the options of all groups")
    if recipe.program(options) == recipe.plain(options):
        raise ValueError(
            f"recipe={group['recipe']!r} and no {recipe.keys[0]}: what matches a target would be AdamW in silence. "
            f"Write {recipe.keys[0]}, or the recipe 'energy' with level=0, which is AdamW"
        )


def register(name: str, recipe: Recipe, keys: Mapping[str, Key] | None = None) -> None:
    """Make a recipe known, with keys of its own; its formula goes into `formulas.FORMULAS`.

    Raises `ValueError` for a name that is taken.
    """
    taken = [known for known in (name, *(keys or {})) if known in (*RECIPES, *KEYS, *COMMON, *RESERVED)]
    if taken:
        raise ValueError(f"{', '.join(taken)}: there is a recipe or a key of that name; choose another")
    RECIPES[name] = recipe
    KEYS.update(keys or {})


def resolved(group: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a checked parameter group, and its keys with those that are None or missing as the recipe says."""
    name, said = spelled(group)
    recipe = RECIPES[name]
    found = {"wavelet": "haar", **{key: recipe.defaults.get(key, about.default) for key, about in KEYS.items()}}
    return recipe, found | _said(said)


def spelled(group: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Recipe and keys of a group, where `second_moment` says that it is another recipe than its name.

    Before there were programs, ``second_moment="none"`` made any recipe "orthogonal" and another value made that one
    "energy"; what else they say is unchanged.
    """
    name, second = str(group.get("recipe", DEFAULT)), group.get("second_moment")
    if second == "none" and RECIPES[name].program is adam:
        its = {"nesterov": False, **RECIPES[name].defaults}
        return "orthogonal", {key: its.get(key) for key in ("detail_gain", "nesterov")} | _said(group)
    if second not in (None, "none") and name == "orthogonal":
        return "energy", group
    return name, group


def _said(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if value is not None}


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The programs and numbers of a checked parameter group."""
    recipe, options = resolved(group)
    return Rule(recipe.program(options), recipe.plain(options), options["lr"], recipe.numbers(options))


def program_of(group: Mapping[str, Any], level: int) -> Program:
    """The program of a matrix of this level in a parameter group, which may lack keys."""
    recipe, options = resolved(group)
    program = recipe.program(options)
    return program if level >= program.least_level else recipe.plain(options)


def meaning(group: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved keys, of those that the recipe reads or decides, without which moments mean something else."""
    recipe, options = resolved(group)
    its = (*recipe.keys, *recipe.defaults)
    return {key: options[key] for key, about in KEYS.items() if about.meaning and key in its}


def own_keys() -> set[str]:
    """Keys whose value suits one recipe: those that say what moments mean, or have a default of a recipe's own."""
    return {key for key, about in KEYS.items() if about.meaning}.union(*(its.defaults for its in RECIPES.values()))


def check_meaning(saved: Mapping[str, Any], mine: Mapping[str, Any], what: str, where: str) -> None:
    """Raise `ValueError` if moments of tensors that a recipe takes mean something else in group `mine` than in `saved`.

    `what` was trained in `saved`, which was found in `where`. Every road on which state comes back asks this.
    """
    recipe = saved.get("recipe")
    if recipe not in list(RECIPES):
        raise ValueError(
            f"{what} was trained with the recipe {recipe!r} in {where}, which is none of {', '.join(RECIPES)}; "
            f"import what registers it before loading"
        )
    now, read = meaning(mine), resolved(mine)[0].keys
    differ = {key: (then, now[key]) for key, then in meaning(saved).items() if key in read and then != now[key]}
    before, after = program_of(saved, 1), program_of(mine, 1)
    same = _meant(before.fields) == _meant(after.fields)
    if same and (before.formula, before.detail) != (after.formula, after.detail):
        # The same state of another meaning.
        differ.setdefault("formula", (f"{before.formula}, {before.detail}", f"{after.formula}, {after.detail}"))
    for key, (then, here) in differ.items():
        raise ValueError(
            f"{what} was trained with {key}={then!r} (recipe {recipe!r}) in {where} and this optimizer has "
            f"{key}={here!r} (recipe {mine['recipe']!r}); its moments would mean something else. Build the "
            f"optimizer as it was"
        )


def _meant(fields: Iterable[Field]) -> list[Field]:
    """Fields as they are whatever their formats."""
    return [replace(field, format=FP32) for field in fields if field.extent is not Extent.CELL]


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` naming the key, its value and the legal range, for the first key of `group` that is wrong."""
    check_keys(group, where)
    check_level(group["level"])
    check_wavelet(group["wavelet"])
    if not isinstance(group["recipe"], str) or group["recipe"] not in RECIPES:
        raise ValueError(f"recipe={group['recipe']!r} in {where} must be one of {sorted(RECIPES)}")
    name, said = spelled(group)
    recipe = RECIPES[name]
    if group["level"] and not recipe.is_leveled:
        raise ValueError(
            f"level={group['level']} in {where}, where the recipe is {name!r}: nothing of it is in wavelet space, and "
            f"its state would not shrink by 2**level. Write level=0"
        )
    for key, about in KEYS.items():
        value = said.get(key)
        unread = about.of_recipe and key not in recipe.keys
        if unread and value is not None and value != recipe.defaults.get(key, about.default):
            readers = [other for other, its in RECIPES.items() if key in its.keys]
            others = " or ".join(f"recipe={other!r}" for other in readers)
            why = recipe.why.get(key, f"it is read by {', '.join(readers)} alone. Remove it, or write {others}")
            raise ValueError(f"{key}={value!r} in {where}, where the recipe is {name!r}: {why}")
    try:
        rule = rule_of(group)
        kept = {f.name: f for f in rule.program.fields}
        other = [f.name for f in rule.plain.fields if kept.get(f.name, f) != f]
        if other:  # they would lie in one buffer
            raise ValueError(
                f"tensors of level 0 keep {', '.join(other)} over another extent or in another format; give it "
                f"another name"
            )
        if max(rule.program.cell, rule.plain.cell) > 1:
            check_haar(group["wavelet"], _CELLS)
    except ValueError as error:
        raise ValueError(f"recipe={name!r} in {where}: {error}") from None
