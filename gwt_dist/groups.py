"""Which parameters get which level: `param_groups`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Group = dict[str, Any]


def param_groups(
    model: nn.Module,
    level: int = 2,
    targets: str | Sequence[str] | Mapping[str, int] = ("attn", "mlp"),
    *,
    params: Iterable[Tensor] | Iterable[Group] | None = None,
    **group_options: Any,
) -> list[Group]:
    """Parameter groups of a model: Linear weights that match a target get a level, all others level 0 (AdamW).

    A target matches the name of an `nn.Linear` module (such as ``model.layers.0.mlp.down_proj``) if it is a part of
    it, or if it is a regular expression that matches all of it. ``"all-linear"`` matches every one. Patterns are
    tried in order and the first that matches decides. Frozen parameters are left out; a weight shared by modules is
    taken once, under the name that `named_parameters` gives it.

    Args:
        model: The model; under `deepspeed.zero.Init` too.
        level: Level of the weights that match.
        targets: Pattern or patterns, or a mapping from pattern to level.
        params: The parameters to consider, or groups of them whose own options stay; None means all of `model`.
        group_options: Further keys of every group, such as ``lr`` or ``recipe``.

    Returns:
        A group per level, and per given group where `params` are groups; with ``level`` set in each.

    Raises:
        ValueError: If a pattern matches no Linear weight to be trained, or a parameter does not belong to `model`.
    """
    from torch import nn

    patterns = levels_by_pattern(targets, level)
    names = {id(p): name for name, p in model.named_parameters()}
    linear = {
        id(module.weight): name
        for name, module in reversed(list(model.named_modules()))
        if isinstance(module, nn.Linear)
    }
    groups: list[Group] = []
    matched: dict[str, list[Tensor]] = {pattern: [] for pattern in patterns}
    rest: list[Tensor] = []
    for given in _given_groups(model, params):
        by_level: dict[int, list[Tensor]] = {}
        for parameter in given.pop("params"):
            if id(parameter) not in names:
                raise ValueError(
                    f"a parameter of shape {_shape(parameter)} in `params` does not belong to the model, so no target "
                    f"can match it; pass the parameters of this model"
                )
            if not parameter.requires_grad:
                continue
            pattern = first_match(patterns, linear.get(id(parameter)))
            (rest if pattern is None else matched[pattern]).append(parameter)
            by_level.setdefault(0 if pattern is None else patterns[pattern], []).append(parameter)
        groups += [
            {**group_options, **given, "params": by_level[lv], "level": lv} for lv in sorted(by_level, reverse=True)
        ]
    for pattern, parameters in matched.items():
        if not parameters:
            raise no_match(pattern, linear.values())
    _log_table(patterns, matched, rest)
    return groups


def levels_by_pattern(targets: str | Sequence[str] | Mapping[str, int], level: int) -> dict[str, int]:
    """The patterns of `targets` in order, each with its level; raises `ValueError` for what is no pattern."""
    if isinstance(targets, Mapping):
        patterns = dict(targets)
    else:
        patterns = dict.fromkeys([targets] if isinstance(targets, str) else targets, level)
    if not patterns:
        raise ValueError("targets is empty, so every weight would be AdamW; name modules, or use torch.optim.AdamW")
    for pattern in patterns:
        checked_pattern(pattern, "target", "module name")
    return patterns


def checked_pattern(pattern: object, what: str, whose: str) -> str:
    """A pattern that `matches` takes; raises `ValueError`, in which it is a `what` for a `whose`, for anything else."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"{what} {pattern!r} must be a part of a {whose} or a regular expression")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what} {pattern!r} is not a regular expression: {error}") from error
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is a part of a name, or a regular expression that matches all of it."""
    return pattern in name or re.fullmatch(pattern, name) is not None


def _given_groups(model: nn.Module, params: Iterable[Tensor] | Iterable[Group] | None) -> list[Group]:
    given = list(model.parameters() if params is None else params)
    if given and isinstance(given[0], dict):
        return [{**group, "params": list(group["params"])} for group in given if isinstance(group, dict)]
    return [{"params": given}]


def first_match(patterns: Iterable[str], name: str | None) -> str | None:
    """The first pattern that matches the name of a Linear module; None for no match, or for what is no Linear."""
    if name is None:
        return None
    for pattern in patterns:
        if pattern == "all-linear" or matches(pattern, name):
            return pattern
    return None


def _shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole tensor; `deepspeed.zero.Init` leaves an empty one behind."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def no_match(pattern: str, linear: Iterable[str]) -> ValueError:
    """The error for a target that matches none of the Linear modules of these names."""
    return ValueError(
        f"target {pattern!r} matches no Linear weight to be trained, so it would be AdamW in silence. Names that can "
        f"match: {_examples(linear)}"
    )


def _examples(linear: Iterable[str]) -> str:
    names = sorted(linear)
    shown = ", ".join(names[:4]) or "none, the model has no nn.Linear"
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _log_table(patterns: Mapping[str, int], matched: Mapping[str, list[Tensor]], rest: list[Tensor]) -> None:
    rows = [(pattern, patterns[pattern], matched[pattern]) for pattern in patterns] + [("all others", 0, rest)]
    lines = [
        f"  {pattern:<20} level {level:<2} {len(tensors):>5} tensors {sum(prod(_shape(t)) for t in tensors):>15,} "
        f"elements"
        for pattern, level, tensors in rows
    ]
    logger.info("levels by name, first match wins:\n%s", "\n".join(lines))
