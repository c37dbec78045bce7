"""The recipes, and the check of what a parameter group says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gwt_dist.update import Rule
from gwt_dist.wavelet import transform


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the keys `second_moment`, `detail_gain` and `limiter` are where they are None."""

    second_moment: str
    detail_gain: float | str
    limiter: float


RECIPES = {
    # arXiv 2501.07237: raw details, divided by a denominator that may vanish where they do not; hence the limiter.
    "paper": Recipe(second_moment="approximation", detail_gain=1.0, limiter=1.01),
    # A detail contributes what one fresh gradient contributes to Adam's momentum, or more where gradients are steady,
    # over the energy of its own unit. Bounded, so it needs no norm and no collective.
    "energy": Recipe(second_moment="energy", detail_gain="coherence", limiter=0.0),
    # Momentum alone, orthogonalized as Muon's: half of the state, and matrices travel to a rank each and back.
    "orthogonal": Recipe(second_moment="none", detail_gain="coherence", limiter=0.0),
}
SECOND_MOMENTS = ("approximation", "energy", "none")

# Group keys of galore-torch, apollo-torch and the published GWT: what to write here in their place.
FOREIGN_KEYS = {
    "rank": "level: moments shrink 2**level-fold whatever the shape, so level=2 keeps a quarter of AdamW's state",
    "update_proj_gap": "nothing: there is no projection to renew; remove it",
    "proj_type": "nothing: rows are transformed, whatever the shape; remove it",
    "proj": 'nothing, or wavelet="haar": there is no projection to draw or to decompose; remove it',
    "scale_type": "nothing: the update of each element has the denominator of its own unit; remove it",
    "scale_front": "nothing: the limiter always acts before scale; remove it",
    "disable_nl": "limiter: 0 for disable_nl=True, 1.01 for False, or remove it (as the recipe)",
    "wave_type": "wavelet, by its PyWavelets name",
    "boundary": "nothing: the last unit of a row is padded with zeros; remove it",
}


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The numbers of a checked parameter group, its recipe resolved."""
    recipe = RECIPES[group["recipe"]]
    second_moment = group["second_moment"] or recipe.second_moment
    detail_gain = recipe.detail_gain if group["detail_gain"] is None else group["detail_gain"]
    orthogonal = second_moment == "none"
    # What a fresh gradient contributes to Adam's momentum; details that are orthogonalized need no least part.
    least = 0.0 if orthogonal else 1 - group["betas"][0]
    limiter = recipe.limiter if group["limiter"] is None else group["limiter"]
    return Rule(
        lr=group["lr"],
        betas=tuple(group["betas"]),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        scale=group["scale"],
        energy=second_moment == "energy",
        detail_gain=least if isinstance(detail_gain, str) else detail_gain,
        coherent=isinstance(detail_gain, str),
        limiter=0.0 if orthogonal else limiter,  # it is for a normalized momentum
        orthogonal=orthogonal,
    )


def keeps_second_moment(group: Mapping[str, Any]) -> bool:
    """Whether tensors with level > 0 in `group` have an ``exp_avg_sq``; its key `recipe` must be there."""
    second_moment: str = group.get("second_moment") or RECIPES[group["recipe"]].second_moment
    return second_moment != "none"


def check_group(group: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` naming the key, its value and the legal range, for the first key of `group` that is wrong."""
    foreign = [key for key in FOREIGN_KEYS if key in group]
    if foreign:
        instead = "; ".join(f"{key}={group[key]!r} -> {FOREIGN_KEYS[key]}" for key in foreign)
        raise ValueError(
            f"{', '.join(foreign)} in {where}: keys of another optimizer (galore-torch, apollo-torch or the published "
            f"GWT), which GWTAdamW would ignore in silence. Here: {instead}"
        )
    transform(group["wavelet"], group["level"])
    if group["recipe"] not in RECIPES:
        raise ValueError(f"recipe={group['recipe']!r} in {where} must be one of {sorted(RECIPES)}")
    if group["second_moment"] not in (None, *SECOND_MOMENTS):
        raise ValueError(
            f"second_moment={group['second_moment']!r} in {where} must be one of {SECOND_MOMENTS} or None (as the "
            f"recipe)"
        )
    betas = group["betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2 and all(_within(b, 0, 1) and b < 1 for b in betas)):
        raise ValueError(f"betas={betas!r} in {where} must be two numbers in [0, 1)")
    for key in ("lr", "weight_decay", "scale"):
        if not _within(group[key], 0, math.inf):
            raise ValueError(f"{key}={group[key]!r} in {where} must be a finite number >= 0")
    if not (_within(group["eps"], 0, math.inf) and group["eps"] > 0):
        raise ValueError(f"eps={group['eps']!r} in {where} must be a finite number > 0")
    if group["detail_gain"] not in (None, "coherence") and not _within(group["detail_gain"], 0, 1):
        raise ValueError(
            f"detail_gain={group['detail_gain']!r} in {where} must be in [0, 1], 'coherence' or None (as the recipe)"
        )
    limiter = group["limiter"]
    if limiter not in (None, 0) and not _within(limiter, 1, math.inf):
        raise ValueError(f"limiter={limiter!r} in {where} must be 0 (none), at least 1, or None (as the recipe)")
    if limiter and not keeps_second_moment(group):
        raise ValueError(
            f"limiter={limiter!r} in {where} where no second moment is kept: it limits the growth of a normalized "
            f"momentum, and an orthogonalized update always has the same norm. Remove limiter, or write a second_moment"
        )


def _within(value: object, low: float, high: float) -> bool:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and math.isfinite(value)
    )
