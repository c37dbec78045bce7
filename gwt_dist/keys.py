"""The keys that a parameter group may have: what they are if nothing is said, and what is legal. Knows no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gwt_dist.formats import FP32, STATE_DTYPES

SECOND_MOMENTS = ("approximation", "energy", "none")
SEEDS = 1 << 32
CRITICAL_FORMS = ("mean", "sum")  # of a gradient and those that are kept: see `formulas.critical`
PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")  # of galore-torch: see `formulas.low_rank`
PRODUCTS = ("auto", "bf16", "fp32")  # of whole matrices: see `products.dtype_of`


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a parameter group. `None` is legal where `default` is what the recipe may say otherwise."""

    default: Any
    legal: Callable[[Any], bool]
    must: str  # what is legal, for the sentence "lr=-1 in parameter group 0 must be ..."
    of_recipe: bool = True  # None means "as the recipe says"
    meaning: bool = False  # moments of another value mean something else, so a checkpoint must have the same


def plain(value: Any) -> Any:
    """A value of a key: of a number of numpy's the same of Python's, as checkpoints and kernels take them."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def within(value: object, low: float, high: float) -> bool:
    """Whether `value` is a finite number in ``[low, high]``; a tensor of one real element is a number too."""
    number: Any = value
    if hasattr(number, "numel") and number.numel() == 1 and not number.is_complex():
        value = number.item()
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and math.isfinite(value)
    )


def _betas(value: object) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(within(b, 0, 1) and b < 1 for b in value)


def _seed(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < SEEDS


def _level(value: object) -> bool:
    return value in (0, 1) and not isinstance(value, bool)


def _whole(least: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rate(value: object) -> bool:
    return within(value, -1, 0)


def _number(value: object) -> bool:
    return within(value, 0, math.inf)


_MEANT = "or None (as the recipe)"
_NUMBER, _FLAG = "must be a finite number >= 0", f"must be True, False {_MEANT}"

KEYS: dict[str, Key] = {
    "lr": Key(1e-3, _number, _NUMBER, of_recipe=False),
    "betas": Key((0.9, 0.999), _betas, "must be two numbers in [0, 1)", of_recipe=False),
    "eps": Key(1e-6, lambda v: _number(v) and v > 0, "must be a finite number > 0", of_recipe=False),
    "weight_decay": Key(0.0, _number, _NUMBER, of_recipe=False),
    "stacked": Key(False, lambda v: isinstance(v, bool), "must be True or False", of_recipe=False, meaning=True),
    "scale": Key(1.0, _number, f"{_NUMBER} {_MEANT}"),
    "second_moment": Key(
        "energy", lambda v: v in SECOND_MOMENTS, f"must be one of {SECOND_MOMENTS} {_MEANT}", meaning=True
    ),
    "detail_gain": Key(
        "coherence",
        lambda v: v == "coherence" or within(v, 0, 1),
        f"must be in [0, 1], 'coherence' {_MEANT}",
        meaning=True,
    ),
    "limiter": Key(
        0.0, lambda v: v == 0 or within(v, 1, math.inf), f"must be 0 (none), at least 1, {_MEANT}", meaning=True
    ),
    "nesterov": Key(False, lambda v: isinstance(v, bool), _FLAG),
    "cautious": Key(False, lambda v: isinstance(v, bool), _FLAG),
    "correct_bias": Key(True, lambda v: isinstance(v, bool), _FLAG),
    "nor": Key(0.0, lambda v: within(v, 0, 1) and v < 1, f"must be in [0, 1), 0 for none, {_MEANT}"),
    "clip_threshold": Key(1.0, lambda v: _number(v) and v > 0, f"must be a finite number > 0 {_MEANT}"),
    "confidence_beta": Key(0.999, lambda v: within(v, 0, 1) and v < 1, f"must be in [0, 1) {_MEANT}"),
    "decay_rate": Key(0.0, _rate, f"must be in [-1, 0] {_MEANT}"),
    "critical": Key(0, _whole(0), f"must be a whole number >= 0, 0 for none, {_MEANT}"),
    "critical_decay": Key(0.7, lambda v: within(v, 0, 1), f"must be in [0, 1] {_MEANT}"),
    "critical_form": Key("mean", lambda v: v in CRITICAL_FORMS, f"must be one of {CRITICAL_FORMS} {_MEANT}"),
    "rank": Key(0, _whole(0), f"must be a whole number >= 0, 0 for none, {_MEANT}", meaning=True),
    "update_proj_gap": Key(200, _whole(1), f"must be a whole number >= 1 {_MEANT}"),
    "proj_type": Key("std", lambda v: v in PROJ_TYPES, f"must be one of {PROJ_TYPES} {_MEANT}", meaning=True),
    "residual": Key(False, lambda v: isinstance(v, bool), _FLAG),
    "randomized": Key(False, lambda v: isinstance(v, bool), _FLAG),
    "refresh_offset": Key(0, _whole(0), f"must be a whole number of steps >= 0 {_MEANT}"),
    "products": Key("auto", lambda v: v in PRODUCTS, f"must be one of {PRODUCTS} {_MEANT}"),
    "least_level": Key(1, _level, f"must be 0, which takes matrices of level 0 too, or 1, {_MEANT}"),
    "state_dtype": Key(FP32, lambda v: v in list(STATE_DTYPES), f"must be one of {tuple(STATE_DTYPES)} {_MEANT}"),
    "stochastic_rounding": Key(False, lambda v: isinstance(v, bool), _FLAG),
    "rounding_seed": Key(0, _seed, f"must be a whole number from 0 to {SEEDS - 1} {_MEANT}"),
}

# Arguments of `GWTAdamW` that every recipe has, beside the parameters.
COMMON = "lr", "betas", "eps", "weight_decay", "level", "wavelet", "recipe", "stacked"


def of_recipes() -> list[str]:
    """The keys that are None where the recipe decides."""
    return [name for name, key in KEYS.items() if key.of_recipe]


def refuse_unknown(names: Iterable[str], where: str, *more: str) -> None:
    """Raise `ValueError` for those of `names` that are no keys of a group, and none of `more`."""
    known = [*COMMON, *of_recipes(), *more]
    told = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            told.append(f"the unknown key {name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if told:
        raise ValueError(f"{where} has {', '.join(told)}. Known keys: {', '.join(known)}")


def refuse_misspelt(names: Iterable[str], where: str) -> None:
    """Raise `ValueError` for the first of `names` that is nearly a key of a group; others may be anybody's."""
    known = ["params", "param_names", *COMMON, *of_recipes(), *OF_TORCH, *REFUSED_OF_TORCH]
    for name in names:
        near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.85)
        if near and name not in known:
            raise ValueError(f"{where} has the unknown key {name!r}, which no optimizer would read: {near[0]!r}?")


# Arguments of `torch.optim.AdamW` that say how it computes and not what: a step here is fused, and can be captured.
OF_TORCH = "foreach", "fused", "capturable"
# Those that say what: None and False are what is done here.
REFUSED_OF_TORCH = {
    "amsgrad": "no largest second moment is kept. Remove it",
    "maximize": "it would minimize all the same. Negate the loss",
    "differentiable": "no gradient flows through a step. Remove it",
}

# Group keys of apollo-torch and the published GWT: what to write here in their place.
FOREIGN_KEYS = {
    "proj": 'nothing, or wavelet="haar": there is no projection to draw or to decompose; remove it',
    "scale_type": "nothing: the update of each element has the denominator of its own unit; remove it",
    "scale_front": "nothing: the limiter always acts before scale; remove it",
    "disable_nl": "limiter: 0 for disable_nl=True, 1.01 for False, or remove it (as the recipe)",
    "wave_type": "wavelet, by its PyWavelets name",
    "boundary": "nothing: the last unit of a row is padded with zeros; remove it",
}


def check_keys(group: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` naming the key, its value and the legal range, for the first key of `group` that is wrong."""
    foreign = [key for key in FOREIGN_KEYS if key in group]
    if foreign:
        instead = "; ".join(f"{key}={group[key]!r} -> {FOREIGN_KEYS[key]}" for key in foreign)
        raise ValueError(
            f"{', '.join(foreign)} in {where}: keys of another optimizer (galore-torch, apollo-torch or the published "
            f"GWT), which GWTAdamW would ignore in silence. Here: {instead}"
        )
    for name, why in REFUSED_OF_TORCH.items():
        if group.get(name):
            raise ValueError(f"{name}={group[name]!r} in {where}, which GWTAdamW has not: {why}")
    for name, key in KEYS.items():
        value = group.get(name, key.default)
        if not (value is None and key.of_recipe) and not key.legal(value):
            raise ValueError(f"{name}={value!r} in {where} {key.must}")
