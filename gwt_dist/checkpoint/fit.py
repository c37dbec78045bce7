"""Does a checkpoint fit this model and optimizer? All of it is answered before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gwt_dist.checkpoint.convert import Conversion, conversions
from gwt_dist.checkpoint.format import WEIGHT, CheckpointError, Index
from gwt_dist.checkpoint.holdings import Run, Stepped
from gwt_dist.declare import Extent, Field
from gwt_dist.formats import FP32
from gwt_dist.keys import KEYS, check_keys
from gwt_dist.plan import Form
from gwt_dist.recipes import check_group, check_meaning, rule_of

_AS_IT_WAS = "Build the optimizer as it was, or start from the weights alone (weights_only=True)"
_CONVERT = (
    "Build the optimizer with state_dtype={!r}, or convert what was saved: gwt_dist.load(..., convert_state=True), or "
    "portable(trainer, convert_state=True)"
)


@dataclass(frozen=True, slots=True)
class State:
    """The state of one optimizer parameter that is to be filled."""

    tensors: dict[str, Tensor]
    step: int
    missed: dict[str, int]  # by name, how many of the steps a tensor did not take that is frozen


@dataclass(frozen=True, slots=True)
class Fit:
    """What is to be put in place besides the elements of the weights."""

    states: list[tuple[Stepped, State | None]]  # None: no step was taken yet
    options: list[dict[str, Any]]  # of each parameter group
    conversions: list[Conversion]  # of fields that were saved in another format


def check(index: Index, run: Run, where: str, convert: bool = False) -> Fit:
    """Compare a checkpoint with what is here, names and shapes being right already (`match`).

    With `convert` the formats of state may differ.

    Raises:
        CheckpointError: For other levels, wavelets, recipes or state, and states that this engine cannot hold apart.
    """
    traits = run.traits()
    for name, entry in index.tensors.items():
        about = traits.get(name)
        if about is None:
            if entry.step is not None:
                raise CheckpointError(
                    f"{where} has moments of {name!r}, which this optimizer does not step, so they would be lost. "
                    f"{_AS_IT_WAS}"
                )
        elif entry.group is not None:
            found, here = (entry.level, entry.wavelet), (about.level, about.wavelet)
            if found != here and (entry.level or about.level):
                raise CheckpointError(
                    f"{name!r} has level={found[0]}, wavelet={found[1]!r} in {where} and level={here[0]}, "
                    f"wavelet={here[1]!r} in this optimizer; its moments would mean something else. "
                    f"{_AS_IT_WAS}"
                )
            was_stacked, is_stacked = (
                groups[number].get("stacked", False)
                for groups, number in ((index.groups, entry.group), (run.optimizer.param_groups, about.group))
            )
            if entry.step is not None and len(entry.shape) == 3 and was_stacked != is_stacked:
                raise CheckpointError(
                    f"{name!r} of shape {entry.shape} was trained with stacked={was_stacked} in {where} and this "
                    f"optimizer has stacked={is_stacked}; its moments would be those of other rows. {_AS_IT_WAS}"
                )
            if entry.level or about.is_taken:
                _check_keys(index.groups[entry.group], where)
                check_meaning(index.groups[entry.group], run.optimizer.param_groups[about.group], repr(name), where)
            if entry.step is not None and _meant(entry.fields) != _meant(about.fields):
                raise CheckpointError(
                    f"{name!r} has the state {_shown(entry.fields)} in {where}, and this optimizer (recipe "
                    f"{about.recipe!r}) needs {_shown(about.fields)}. {_AS_IT_WAS}"
                )
            if entry.step is not None and set(entry.fields) != set(about.fields) and not convert:
                raise CheckpointError(
                    f"{name!r} has the state {_stored(entry.fields)} in {where}, and this optimizer keeps it as "
                    f"{_stored(about.fields)}: the same moments in another format, whose numbers would be read "
                    f"wrongly. {_CONVERT.format(_state_dtype(index.groups[entry.group]))}"
                )
    states = [(one, _state(index, run, one, where)) for one in run.stepped]
    options = list(_options(index, run, where, convert))
    needed: list[Conversion] = []
    for one, state in states if convert else ():
        if state is not None:
            rule = rule_of({**run.optimizer.param_groups[one.group], **options[one.group]})
            needed += conversions(one, index.tensors, state.tensors, int(rule["rounding_seed"]))
    return Fit(states, options, needed)


def _meant(fields: Iterable[Field]) -> set[Field]:
    """Fields as they are whatever their formats."""
    return {replace(field, format=FP32) for field in fields if field.extent is not Extent.CELL}


def _state_dtype(group: Mapping[str, Any]) -> Any:
    return group.get("state_dtype") or FP32


def _check_keys(group: Mapping[str, Any], where: str) -> None:
    """Raise `CheckpointError` for a value of a saved group that no optimizer can have."""
    try:
        check_keys(group, f"a parameter group of {where}")
    except (TypeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"the options of a parameter group in {where} make no sense: {error}") from None


def _shown(fields: Iterable[Field]) -> str:
    said = [f"{field} ({field.extent.value})" for field in fields if field.extent is not Extent.CELL]
    return ", ".join(said) or "of no field"


def _stored(fields: Iterable[Field]) -> str:
    # Scales go with formats.
    return ", ".join(f"{field.name} in {field.format}" for field in fields if field.extent is not Extent.CELL)


def _state(index: Index, run: Run, one: Stepped, where: str) -> State | None:
    """The state to fill: what is there, or fresh and not yet the optimizer's; None if no step was taken yet."""
    counts = {name: index.tensors[name].step if name in index.tensors else None for name in one.names}
    # What is frozen here may have taken fewer steps than the rest of its buffer.
    still = {name for name in one.frozen if counts[name] is not None}
    steps = {count: name for name, count in counts.items() if name not in still}
    steps = steps or {max(count or 0 for count in counts.values()): one.names[0]}
    taken = next(iter(steps))
    steps |= {counts[name]: name for name in still if taken is None or (counts[name] or 0) > taken}
    if len(steps) > 1:
        (a, first), (b, second), *_ = steps.items()
        raise CheckpointError(
            f"{first!r} has taken {a or 'no'} steps in {where} and {second!r} {b or 'no'}, and this engine keeps both "
            f"in one buffer with one count of steps. Load under an engine that keeps tensors apart (one process, DDP, "
            f"FSDP2), or give them parameter groups of their own"
        )
    if taken is None:
        return None
    missed = {one.plan.shard.source(tensor.fqn)[0]: taken - (counts[name] or 0)
              for name, tensor in zip(one.names, one.plan.shard.tensors, strict=True) if name in still}  # fmt: skip
    tensors = run.optimizer.state.get(one.parameter) or one.plan.fresh_state(one.parameter)
    return State(tensors, taken, {name: number for name, number in missed.items() if number})


def _options(index: Index, run: Run, where: str, convert: bool) -> Iterable[dict[str, Any]]:
    """The saved options of each group that is here, whatever groups the saved run had.

    Without those that say what the moments mean, which stay as the optimizer was built and must be what they were; nor,
    with `convert`, the format that they get.
    """
    meaning = {"level", "wavelet", "recipe", *(key for key, about in KEYS.items() if about.meaning)}
    meaning |= {"state_dtype"} if convert else set()
    for i, group in enumerate(run.optimizer.param_groups):
        its = [one for one in run.stepped if one.group == i]
        names = [name for one in its for name in one.names]
        stay = meaning if _both_in_bf16(index, its) else meaning | {"stochastic_rounding"}
        chosen: dict[str, Any] | None = None
        first = ""
        for name in names:
            number = index.tensors[name].group if name in index.tensors else None  # else it was left out
            if number is None:
                continue
            options = {key: value for key, value in index.groups[number].items() if key not in stay}
            if chosen is not None and options != chosen:
                differ = sorted(k for k in options.keys() | chosen.keys() if options.get(k) != chosen.get(k))
                raise CheckpointError(
                    f"{first!r} and {name!r} had {', '.join(differ)} of their own in {where}, and here they are in one "
                    f"parameter group ({i}). Build the groups as they were"
                )
            chosen, first = options, first or name
        options = {
            k: tuple(v) if isinstance(v, list) and isinstance(group.get(k), tuple) else v
            for k, v in (chosen or {}).items()
        }
        if "params" in options:
            raise CheckpointError(f"the options of a parameter group in {where} hold params")
        try:
            loaded = {**group, **options}
            check_group(loaded, f"a parameter group of {where}")
            then, now = (Form.of(one["level"], one["wavelet"], rule_of(one), one["stacked"]) for one in (loaded, group))
            if then != now:
                then_as, now_as = _state_dtype(loaded), _state_dtype(group)
                raise CheckpointError(
                    f"with the options of a parameter group in {where} this optimizer ({now}) would have other state "
                    f"({then}). {_AS_IT_WAS if then_as == now_as else _CONVERT.format(then_as)}"
                )
            for key, value in options.items():
                if isinstance(group.get(key), Tensor):
                    group[key].detach().clone().fill_(value)
        except (TypeError, OverflowError, RuntimeError) as error:
            raise CheckpointError(f"the options of a parameter group in {where} make no sense: {error}") from None
        yield options


def _both_in_bf16(index: Index, its: Iterable[Stepped]) -> bool:
    """Whether weights are bf16 in the checkpoint and here, without masters.

    How they are rounded is an option of such a run alone: masters are refused it, and a run that has none and was built
    with it does not lose it by weights of one that had masters.
    """
    return all(
        one.parameter.dtype == torch.bfloat16
        and all(index.tensors[name].parts[WEIGHT].dtype == "BF16" for name in one.names if name in index.tensors)
        for one in its
    )
