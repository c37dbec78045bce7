"""Which parameters get which level: `param_groups`."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gwt_dist.keys import COMMON, KEYS, of_recipes, refuse_unknown
from gwt_dist.recipes import DEFAULT, RECIPES, check_group, level_of, own_keys, program_of, refuse_plain, spelled

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Group = dict[str, Any]
T = TypeVar("T")


def param_groups(
    model: nn.Module,
    level: int | None = None,
    targets: str | Sequence[str] | Mapping[str, int] = ("attn", "mlp"),
    *,
    params: Iterable[Tensor] | Iterable[Group] | None = None,
    rest: Mapping[str, Any] | None = None,
    **group_options: Any,
) -> list[Group]:
    """Parameter groups of a model: Linear weights that match a target get a level, all others level 0.

    What matches no target (embeddings, head, norms, biases) has the same options, but for what `rest` says of it:
    ``rest={"level": 1, "recipe": "energy", "state_dtype": "int8"}``.

    A target matches the name of an `nn.Linear` module (such as ``model.layers.0.mlp.down_proj``) if it is a part of
    it, or if it is a regular expression that matches all of it. ``"all-linear"`` matches every one. Patterns are
    tried in order and the first that matches decides. Frozen parameters are left out; a weight shared by modules is
    taken once, under the name that `named_parameters` gives it.

    Args:
        model: The model; under `deepspeed.zero.Init` too.
        level: Level of the weights that match; None is what `GWTAdamW` has for the recipe.
        targets: Pattern or patterns, or a mapping from pattern to level.
        params: The parameters to consider, or groups of them whose own options stay; None means all of `model`.
        rest: Keys of the group of what matches no target, ``level`` among them (0). See `keys_of_rest`.
        group_options: Further keys of every group, such as ``lr`` or ``recipe``.

    Returns:
        A group per level, and one for what matches no target, the last; each of them per given group where `params`
        are groups. ``level`` is set in each.

    Raises:
        ValueError: If a pattern matches no Linear weight to be trained, a parameter does not belong to `model`, or
            a key is mistyped, or `rest` has one that is unknown or would orthogonalize in silence.
    """
    from torch import nn

    _check_options(group_options, rest or {})
    patterns = levels_by_pattern(targets, level_of(group_options.get("recipe")) if level is None else level)
    names = {id(p): name for name, p in model.named_parameters()}
    linear = {
        id(module.weight): name
        for name, module in reversed(list(model.named_modules()))
        if isinstance(module, nn.Linear)
    }
    groups: list[Group] = []
    matched: dict[str, list[Tensor]] = {pattern: [] for pattern in patterns}
    others: list[Tensor] = []
    for given in _given_groups(model, params):
        parameters = given.pop("params")
        by_keys: Grouped[Tensor] = Grouped(group_options | given, rest or {})
        for parameter in parameters:
            if id(parameter) not in names:
                raise ValueError(
                    f"a parameter of shape {_shape(parameter)} in `params` does not belong to the model, so no target "
                    f"can match it; pass the parameters of this model"
                )
            if not parameter.requires_grad:
                continue
            pattern = first_match(patterns, linear.get(id(parameter)))
            (others if pattern is None else matched[pattern]).append(parameter)
            by_keys.add(parameter, None if pattern is None else patterns[pattern])
        groups += [{**keys, "params": its} for keys, its in by_keys.groups()]
    for pattern, its in matched.items():
        if not its:
            raise no_match(pattern, linear.values())
    _log_table(patterns, matched, others, (rest or {}).get("level", 0))
    return groups


def _check_options(options: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a mistyped key, and for a level of `rest` whose recipe nobody here knows."""
    for name in options:  # others may be a schedule's
        near = difflib.get_close_matches(name, [*COMMON, *of_recipes()], n=1, cutoff=0.85)
        if near and near[0] != name:
            raise ValueError(f"param_groups has the unknown key {name!r}, which no optimizer would read: {near[0]!r}?")
    if isinstance(rest, Mapping) and rest.get("level") and "recipe" not in {**options, **rest}:
        raise ValueError(
            f"rest has level={rest['level']} and no recipe, and param_groups was told none: that of the optimizer "
            f'would step embeddings and head. Write the recipe in rest, such as "recipe": "energy"'
        )


class Grouped(Generic[T]):
    """Tensors by the keys of their group: those of a level, and those that match no target."""

    def __init__(self, options: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        self._options, self._rest = options, keys_of_rest(options, rest)
        if options.get("recipe") in list(RECIPES):  # what is none is refused with the groups
            refuse_plain(options)
        self._by_level: dict[int, list[T]] = {}
        self._others: list[T] = []

    def add(self, tensor: T, level: int | None) -> None:
        """Add a tensor of this level; None for one that matches no target."""
        (self._others if level is None else self._by_level.setdefault(level, [])).append(tensor)

    def groups(self) -> list[tuple[Group, list[T]]]:
        """Keys and tensors of each group that has any, high levels first, what matches no target last."""
        levels = sorted(self._by_level, reverse=True)
        found: list[tuple[Group, list[T]]] = [({**self._options, "level": lv}, self._by_level[lv]) for lv in levels]
        return found + ([(self._rest, self._others)] if self._others else [])


def keys_of_rest(options: Mapping[str, Any], rest: Mapping[str, Any]) -> Group:
    """Keys of the group of what matches no target, where the others have `options`.

    They are `options` with level 0, and then what `rest` says. `least_level` and `rank` are not taken over: what takes
    matrices of level 0 is not for embeddings. Where `rest` names another recipe, keys that this one does not read are
    not taken over either, nor those of `recipes.own_keys`. Such keys are None, as the recipe says, so that defaults of
    the optimizer do not act in their place.

    Raises:
        ValueError: For a key that is unknown or wrong, or a level of `rest` with which a recipe that orthogonalizes
            would be taken over.
    """
    if not isinstance(rest, Mapping):
        raise ValueError(f'rest={rest!r} must be a mapping of keys, such as {{"level": 1, "recipe": "energy"}}')
    refuse_unknown(rest, "rest")
    dropped = {"least_level", "rank"}
    if "recipe" in rest:
        read = RECIPES[rest["recipe"]].keys if rest["recipe"] in list(RECIPES) else ()
        own = own_keys()
        other = {key for key, about in KEYS.items() if about.of_recipe and (key in own or key not in read)}
        if "recipe" not in options:  # it may be said to the optimizer, which has defaults then
            other -= options.keys()
        dropped |= other if rest["recipe"] != options.get("recipe") or spelled(options)[0] != rest["recipe"] else set()
    keys = {**options, **dict.fromkeys(sorted(dropped)), "level": 0, **rest}
    if rest:
        whole = {"wavelet": "haar", "recipe": DEFAULT, **keys}
        check_group(whole, "rest")
        if "recipe" not in rest and keys["level"] and program_of(whole, keys["level"]).travels:
            raise ValueError(
                f"rest has level={keys['level']} and no recipe, so embeddings and head would be orthogonalized as "
                f'matrices are. Write the recipe in rest, such as "recipe": "energy"'
            )
    return keys


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


def _log_table(
    patterns: Mapping[str, int], matched: Mapping[str, list[Tensor]], others: list[Tensor], level: int
) -> None:
    rows = [(pattern, patterns[pattern], matched[pattern]) for pattern in patterns] + [("all others", level, others)]
    lines = [
        f"  {pattern:<20} level {level:<2} {len(tensors):>5} tensors {sum(prod(_shape(t)) for t in tensors):>15,} "
        f"elements"
        for pattern, level, tensors in rows
    ]
    logger.info("levels by name, first match wins:\n%s", "\n".join(lines))
