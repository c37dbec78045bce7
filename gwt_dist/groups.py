"""Which parameters get which level: `param_groups`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from gwt_dist.keys import KEYS, check_keys, refuse_misspelt, refuse_unknown
from gwt_dist.recipes import DEFAULT, RECIPES, check_group, level_of, own_keys, program_of, refuse_plain, spelled
from gwt_dist.targets import BLOCKS, Matrix, Targets, first_match, levels_by_pattern, unmatched

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

STACKED = "stacked"  # the key of groups of tensors [experts, rows, columns]

Group = dict[str, Any]
T = TypeVar("T")


def param_groups(
    model: nn.Module,
    level: int | None = None,
    targets: Targets = BLOCKS,
    *,
    params: Iterable[Tensor] | Iterable[Group] | None = None,
    rest: Mapping[str, Any] | None = None,
    **group_options: Any,
) -> list[Group]:
    """Parameter groups of a model: weight matrices that match a target get a level, all others level 0.

    What matches no target (embeddings, head, norms, biases, convolutions) has the same options, but for what `rest`
    says of it: ``rest={"level": 1, "recipe": "energy", "state_dtype": "int8"}``.

    ``"blocks"`` is the weight matrices of the blocks, whatever they are called, as `gwt_dist.blocks` finds them: not
    embeddings, not the head, not what is tied to an embedding; where there are no blocks, all but the output layer.
    ``"all-linear"`` is every matrix that is no embedding and not tied to one, the head too. Any other target matches
    the name of a module (such as ``model.layers.0.mlp.down_proj``), or of a parameter that is not called ``weight``
    (``model.layers.0.mlp.experts.down_proj``), if it is a part of it, or if it is a regular expression that matches all
    of it. Patterns are tried in order and the first that matches decides. Frozen parameters are left out; a weight
    shared by modules is taken once, under the name of the first of them.

    A matrix is read as it is stored: rows of `nn.Linear` are outputs, those of transformers' ``Conv1D`` inputs.

    Args:
        model: The model; under `deepspeed.zero.Init` too.
        level: Level of the weights that match; None is what `GWTAdamW` has for the recipe.
        targets: Pattern or patterns, or a mapping from pattern to level.
        params: The parameters to consider, or groups of them whose own options stay; None means all of `model`.
        rest: Keys of the group of what matches no target, ``level`` among them (0). See `keys_of_rest`.
        group_options: Further keys of every group, such as ``lr`` or ``recipe``.

    Returns:
        A group per level, those of stacked experts with ``stacked`` apart, and one for what matches no target, the
        last; each of them per given group where `params` are groups. ``level`` is set in each.

    Raises:
        ValueError: If a pattern but ``"blocks"``, which a warning tells of, matches no weight to be trained, a
            parameter does not belong to `model`, a key is mistyped or its value wrong, or `rest` has a key that is
            unknown or would orthogonalize in silence.
    """
    from gwt_dist.blocks import matrices_of, shape_of

    if not hasattr(model, "named_parameters"):
        raise ValueError(
            f"param_groups was given {type(model).__name__} as the model, and needs the nn.Module, which has names for "
            f"its weights: param_groups(model, params=groups) keeps groups of your own and their options"
        )
    _check_options(group_options, rest or {})
    patterns = levels_by_pattern(targets, level_of(group_options.get("recipe")) if level is None else level)
    names, matrices = {id(p): name for name, p in model.named_parameters()}, matrices_of(model)
    groups: list[Group] = []
    trained: list[Matrix] = []
    said: list[Group] = []
    shapes: dict[str | None, list[tuple[int, ...]]] = {pattern: [] for pattern in (*patterns, None)}
    for number, given in enumerate(_given_groups(model, params)):
        parameters = given.pop("params")
        refuse_misspelt(given, f"group {number} of params")
        said.append(group_options | given)
        by_keys: Grouped[Tensor] = Grouped(said[-1], rest or {})
        for parameter in parameters:
            if id(parameter) not in names:
                raise ValueError(
                    f"a parameter of shape {shape_of(parameter)} in `params` does not belong to the model, so no "
                    f"target can match it; pass the parameters of this model"
                )
            if not parameter.requires_grad:
                continue
            matrix = matrices.get(id(parameter))
            trained += [] if matrix is None else [matrix]
            pattern = by_keys.choose(parameter, matrix, patterns)
            shapes[pattern].append(shape_of(parameter))
        groups += [{**keys, "params": its} for keys, its in by_keys.groups()]
    if trained and (told := _plain_note(patterns, said)):
        logger.warning(told)
    if told := unmatched(patterns, (pattern for pattern, its in shapes.items() if its), trained):
        logger.warning(told)
    _log_table(dict(patterns) | {None: (rest or {}).get("level", 0)}, shapes)
    return groups


def _plain_note(levels: Mapping[str, int], said: Iterable[Mapping[str, Any]]) -> str:
    """What to tell who gives level 0 and means the recipe, which takes matrices of higher levels alone; else ''."""
    for keys in said:
        recipe = keys.get("recipe") or DEFAULT
        if keys.get("least_level") is not None or recipe not in list(RECIPES):
            return ""
        if any(levels.values()) or "least_level" not in RECIPES[recipe].keys:
            return ""
    return (
        f"level=0 and no least_level: the recipe {recipe!r} takes matrices of level 1 and more, so these are stepped "
        f"as AdamW would, unless the optimizer is told more. Write least_level=0 for {recipe!r} at level 0, or "
        f"recipe='energy' if AdamW is meant"
    )


def _check_options(options: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a mistyped key or a wrong value, and for a level of `rest` of an unknown recipe."""
    refuse_misspelt(options, "param_groups")
    check_keys(options, "the options of param_groups")
    if isinstance(rest, Mapping) and rest.get("level") and "recipe" not in {**options, **rest}:
        raise ValueError(
            f"rest has level={rest['level']} and no recipe, and param_groups was told none: that of the optimizer "
            f'would step embeddings and head. Write the recipe in rest, such as "recipe": "energy"'
        )


class Grouped(Generic[T]):
    """Tensors by the keys of their group: those of a level, stacked ones apart, and those that match no target."""

    def __init__(self, options: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
        self._options, self._rest = options, keys_of_rest(options, rest)
        if options.get("recipe") in list(RECIPES):  # what is none is refused with the groups
            refuse_plain(options)
        self._by_level: dict[tuple[int, bool], list[T]] = {}
        self._others: list[T] = []

    def choose(self, tensor: T, matrix: Matrix | None, patterns: Mapping[str, int]) -> str | None:
        """Add a tensor, of which `matrix` is known if it is one; returns the pattern that matches it, or None."""
        pattern = first_match(patterns, matrix)
        if pattern is None or matrix is None:
            self._others.append(tensor)
        else:
            self._by_level.setdefault((patterns[pattern], matrix.is_stacked), []).append(tensor)
        return pattern

    def groups(self) -> list[tuple[Group, list[T]]]:
        """Keys and tensors of each group that has any, high levels first, what matches no target last."""
        found: list[tuple[Group, list[T]]] = []
        for (level, stacked), its in sorted(self._by_level.items(), key=lambda item: (-item[0][0], item[0][1])):
            found.append(({**self._options, "level": level, **({STACKED: True} if stacked else {})}, its))
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


def _given_groups(model: nn.Module, params: Iterable[Tensor] | Iterable[Group] | None) -> list[Group]:
    given = list(model.parameters() if params is None else params)
    if given and isinstance(given[0], dict):
        return [{**group, "params": list(group["params"])} for group in given if isinstance(group, dict)]
    return [{"params": given}]


def _log_table(levels: Mapping[Any, int], shapes: Mapping[str | None, list[tuple[int, ...]]]) -> None:
    """Log what each pattern matched; None is what none did."""
    numbers = {pattern: sum(map(prod, its)) for pattern, its in shapes.items()}
    total = max(1, sum(numbers.values()))
    lines = [
        f"  {pattern or 'all others':<20} level {levels[pattern]:<2} {len(shapes[pattern]):>5} tensors "
        f"{number:>15,} elements {number / total:>7.2%}"
        for pattern, number in numbers.items()
    ]
    logger.info("levels by name, first match wins:\n%s", "\n".join(lines))
