"""What to tell whose parameter group is legal and may not be what was meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gwt_dist.recipes import DEFAULT, program_of, resolved, rule_of

Group = Mapping[str, Any]  # every key of it there
HIGH_RATE = 5e-3  # AdamW's are seldom above it
_FORMER_SCALE = 0.25  # of all recipes
TALL = 8  # rows for each column from which a matrix is likely to be an embedding or an output head


def notes_of(group: Group, shapes: Sequence[Sequence[int]], where: str, *, unnamed: bool, bare: bool) -> Iterator[str]:
    """All that there is to tell of a group with tensors of `shapes`.

    `unnamed`: nobody named its recipe, nor chose its tensors, as who gives a group its level does; `bare`: nobody said
    a level at all, nor was told of it.
    """
    its = rate_note(group, where), unnamed and tall_note(group, shapes, where), bare and bare_note(group, shapes, where)
    return (note for note in its if note)


def rate_note(group: Group, where: str) -> str:
    """What to tell whose rate is one of the time when `scale` was 0.25 unless it was said; '' for others."""
    recipe, options = resolved(group)
    lr, scale = group["lr"], options["scale"]
    unchanged = not recipe.former_scale or group.get("scale") is not None or scale == _FORMER_SCALE
    scaled = group["level"] or group.get("least_level") == 0
    if unchanged or not scaled or not isinstance(lr, float) or lr < HIGH_RATE:
        return ""
    return (
        f"lr={lr:g} in {where}: lr is AdamW's rate for matrices too, which is seldom above {HIGH_RATE:g} except in "
        f"runs of a few minutes. If the rate is from a version in which scale was 0.25 (it is {scale:g} with the "
        f"recipe {group['recipe']!r}), write scale=0.25 for what it did there, or the rate of your AdamW"
    )


def tall_note(group: Group, shapes: Iterable[Sequence[int]], where: str) -> str:
    """What to tell who named no recipe, of a group with tensors of `shapes`; '' where none looks like an embedding."""
    if not program_of(group, group["level"]).travels:
        return ""
    tall = [tuple(shape) for shape in shapes if len(shape) == 2 and shape[0] > TALL * shape[1] > 0]
    if not tall:
        return ""
    return (
        f"{where} has {len(tall)} tensors with over {TALL} times as many rows as columns, the first of shape "
        f"{tall[0]}, as embeddings and output heads have, and no recipe was named: the default, {DEFAULT!r}, "
        f"orthogonalizes their updates as those of any matrix. gwt_dist.param_groups(model) leaves embeddings and head "
        f"to AdamW; if this is meant, write recipe={DEFAULT!r}"
    )


def bare_note(group: Group, shapes: Iterable[Sequence[int]], where: str) -> str:
    """What to tell who said no level, of a group with tensors of `shapes`; '' where the recipe needs none of them."""
    recipe, _ = resolved(group)
    matrices = sum(len(shape) >= 2 for shape in shapes)
    if not matrices or not recipe.is_leveled or rule_of(group).program.least_level <= group["level"]:
        return ""
    return (
        f"{where} says no level, so its {matrices} matrices are AdamW's and keep whole moments. "
        f"GWTAdamW(gwt_dist.param_groups(model)) gives the matrices of the blocks a level; level=0 says that this is "
        f"meant, and another level acts on embeddings and head too"
    )
