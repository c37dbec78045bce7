"""Whether a state is this optimizer's, asked before anything is changed, and how it is put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gwt_dist.comm import Shard
from gwt_dist.extents import SHARDED
from gwt_dist.keys import KEYS
from gwt_dist.piece import math_dtype
from gwt_dist.plan import Form, Plan
from gwt_dist.recipes import rule_of
from gwt_dist.steps import Group, Steps

STEP = "step"


def check_writable(states: Mapping[Tensor, Group], steps: Steps) -> None:
    """Raise `ValueError` for state that is no DTensor and should be: one rank's would be kept as everyone's."""
    for parameter, state in states.items():
        if not isinstance(parameter, DTensor) or parameter not in steps.plans:
            continue
        fields = [f for f in steps.plans[parameter].fields if f.extent in SHARDED and f.name in state]
        twice = [f for f in fields if not isinstance(state[f.name], DTensor)]
        if twice:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} with placements {parameter.placements} is cut within a "
                f"{twice[0].extent.value}, so ranks keep {twice[0].name} of the same {twice[0].extent.value} and it "
                f"cannot be written as a DTensor. Shard columns in multiples of 2**level or lower the level (a row: "
                f"shard rows alone), or use gwt_dist.save, which takes every layout"
            )


def check_loadable(state_dict: Group, groups: Sequence[Group], steps: Steps) -> dict[Any, Tensor]:
    """The parameters of a state to load, by its keys.

    Raises `ValueError` if levels, wavelets or fields of state differ from this optimizer's, or a state tensor has not
    the size that this layout needs.
    """
    by_id: dict[Any, Tensor] = {}
    for i, (mine, theirs) in enumerate(zip(groups, state_dict["param_groups"], strict=False)):
        for key in ("level", "wavelet"):
            if theirs.get(key, mine[key]) != mine[key]:
                raise ValueError(
                    f"{key} of parameter group {i} is {theirs[key]!r} in the state to load and {mine[key]!r} in "
                    f"this optimizer; its moments would mean something else. Build the optimizer with "
                    f"{key}={theirs[key]!r}"
                )
        then, now = (rule_of({**mine, **theirs}).of(mine["level"]), rule_of(mine).of(mine["level"]))
        if then.fields != now.fields:
            raise ValueError(
                f"parameter group {i} has the state {', '.join(then.names())} in what is to be loaded (recipe "
                f"{theirs.get('recipe')!r}) and {', '.join(now.names())} in this optimizer (recipe "
                f"{mine['recipe']!r}); its moments would mean something else. Build the optimizer as it was"
            )
        for key, parameter in zip(theirs["params"], mine["params"], strict=False):
            by_id[key] = parameter
            _check_sizes(state_dict["state"].get(key, {}), parameter, mine, i, steps)
    return by_id


def completed(state_dict: Group, groups: Sequence[Group]) -> Group:
    """`state_dict` with the keys that its groups did not have yet, as they are in `groups`."""
    saved = [dict(group) for group in state_dict["param_groups"]]
    for mine, theirs in zip(groups, saved, strict=False):  # torch refuses another number of groups
        theirs.update({key: mine[key] for key in KEYS if key in mine and key not in theirs})
    return {**state_dict, "param_groups": saved}


def put_back(state: Group, values: Mapping[str, Any], parameter: Tensor) -> None:
    """Put `values` into a state as they were saved.

    torch casts floating state to the dtype of the parameter, which bf16 moments do not survive, and it shares the step
    with the state that was loaded.
    """
    for name, value in values.items():
        if name == STEP:
            state[STEP] = torch.as_tensor(value).to(parameter.device, torch.float32, copy=True)
        elif isinstance(value, Tensor):
            state[name] = value.to(parameter.device, math_dtype(parameter.dtype), copy=True)


def fill_keys(groups: Sequence[Group]) -> None:
    """Keys that a saved group did not have yet are what they are if nothing is said."""
    for group in groups:
        for name, key in KEYS.items():
            group.setdefault(name, None if key.of_recipe else key.default)


def _check_sizes(state: Mapping[str, Any], parameter: Tensor, group: Group, i: int, steps: Steps) -> None:
    if parameter in steps.shards:
        shard = steps.shards[parameter]
    elif parameter in steps.given and not isinstance(parameter, DTensor):
        shard = Shard.whole("", tuple(parameter.shape))
    else:
        return
    plan = Plan.of(shard, Form.of(group["level"], group["wavelet"], rule_of(group)))
    if state and state.keys() != {STEP, *plan.shapes}:
        raise ValueError(
            f"a parameter in group {i} has {', '.join(state)} in the state to load and needs {STEP}, "
            f"{', '.join(plan.shapes)} here; it was saved by another optimizer or recipe. Build the optimizer as it was"
        )
    for name, expected in plan.shapes.items():
        if name in state and tuple(state[name].shape) != expected:
            raise ValueError(
                f"{name} of a parameter in group {i} has shape {tuple(state[name].shape)} in the state to load and "
                f"needs {expected} here; it was saved with another level, model, world size or engine"
            )
