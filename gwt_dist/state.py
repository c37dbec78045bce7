"""Whether a state is this optimizer's, asked before anything is changed, and how it is put back."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gwt_dist import dtensor
from gwt_dist.comm import Shard
from gwt_dist.declare import Extent
from gwt_dist.extents import SHARDED
from gwt_dist.keys import KEYS, within
from gwt_dist.piece import stored_dtype
from gwt_dist.plan import Form, Plan
from gwt_dist.recipes import check_group, check_meaning, rule_of
from gwt_dist.shards import shard_of
from gwt_dist.steps import Group, Steps
from gwt_dist.units import takes

STEP = "step"
STATE_DTYPE = "state_dtype"
_TENSOR = Extent.TENSOR
_MATH = torch.float32, torch.float64
MISSED = "missed"  # the key of a state_dict that says which steps tensors of flat parameters did not take
LAYOUTS = "layouts"  # the key of a state_dict that says which elements the states of flat parameters are of
Layout = list[list[Any]]
# `FullyShardedDataParallel.optim_state_dict` and its brothers, and `get_optimizer_state_dict`.
_GATHERERS = "torch.distributed.fsdp.fully_sharded_data_parallel", "torch.distributed.checkpoint.state_dict"
_WAY_OUT = (
    "gwt_dist.save and gwt_dist.load move state between ranks and engines; torch's set_optimizer_state_dict with "
    "full_state_dict=True shards that of whole tensors for DTensors"
)


def check_writable(states: Mapping[Tensor, Group], groups: Sequence[Group], steps: Steps) -> None:
    """Raise `ValueError` for state that is no DTensor and should be: one rank's would be kept as everyone's.

    And for state of parameters that are in no group, to which torch gives no key.
    """
    held = {id(parameter) for group in groups for parameter in group["params"]}
    left = [parameter for parameter in states if id(parameter) not in held]
    if left:
        raise ValueError(
            f"{len(left)} parameters have state and are in no group of the optimizer, so a state_dict has no place for "
            f"it: ZeRO-3 takes them out between steps, or somebody did. Use gwt_dist.save, or the engine's own "
            f"save_checkpoint"
        )
    for parameter, state in states.items():
        if not isinstance(parameter, DTensor) or parameter not in steps.plans:
            continue
        plan = steps.plans[parameter]
        sharded = [f for f in plan.fields if f.extent in SHARDED or (plan.shard.is_stack and f.extent is not _TENSOR)]
        twice = [f for f in sharded if f.name in state and not isinstance(state[f.name], DTensor)]
        if twice:
            cell = plan.form.cell
            what = "cell" if cell > 1 and twice[0].extent is not Extent.ROW else twice[0].extent.value
            what = what if twice[0].extent in SHARDED else "matrix"
            way_out = "Shard columns in multiples of 2**level or lower the level (a row: shard rows alone)"
            if what == "cell":
                way_out = (
                    f"Put it into a parameter group of its own with state_dtype='fp32' (which costs little for "
                    f"vectors), shard columns in multiples of {cell} * 2**level"
                )
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} with placements {parameter.placements} is cut within a "
                f"{what}, so ranks keep {twice[0].name} of the same {what} and it cannot be written as a DTensor. "
                f"{way_out}, or use gwt_dist.save, which takes every layout"
            )


def refuse_gathering(shards: Iterable[Shard], states: Mapping[Tensor, Group]) -> None:
    """Raise `ValueError` if a function of torch is asking that gathers the state of flat parameters.

    It cuts moments by the sizes of the weights, and fails on some of the ranks while others wait. Likewise if one asks
    that makes whole tensors of DTensors for rank 0, and state is on some ranks alone: it would be lost. That they are
    asking can be seen from the stack alone, and what they do cannot be hooked into.
    """
    flat = any(shard.local_shape is None for shard in shards)
    its = ((name, value, parameter) for parameter, state in states.items() for name, value in state.items())
    some = next((name for name, value, parameter in its if dtensor.is_of_some(value, parameter)), None)
    if not flat and some is None:
        return
    frame = inspect.currentframe()
    while frame is not None:
        is_torch = frame.f_globals.get("__name__") in _GATHERERS
        if is_torch and flat:
            raise ValueError(
                f"{frame.f_code.co_name} of torch gathers the state of flat parameters and takes it to be as large as "
                f"the weights, and moments of GWTAdamW are smaller. Use gwt_dist.save and gwt_dist.load (or torch.save "
                f"of state_dict() on each rank, for the same engine and number of ranks); gwt_dist.full_state returns "
                f"the state of one tensor"
            )
        asked = (frame.f_locals.get(name) for name in ("info", "options"))
        if is_torch and any(getattr(one, "full_state_dict", False) for one in asked):
            raise ValueError(
                f"{frame.f_code.co_name} of torch asks for whole tensors on rank 0, or has them from there, and {some} "
                f"is kept by some ranks alone, so it would be lost. Leave full_state_dict out: "
                f"torch.distributed.checkpoint needs no whole tensors. Or use gwt_dist.save and gwt_dist.load"
            )
        frame = frame.f_back


def check_loadable(state_dict: Group, groups: Sequence[Group], steps: Steps) -> dict[Any, Tensor]:
    """The parameters of a state to load, by its keys.

    Raises `ValueError` if levels, wavelets, recipes or fields of state differ from this optimizer's, a value is out of
    range, or a state tensor is not the one that this rank keeps in this layout.
    """
    by_id: dict[Any, Tensor] = {}
    tags = state_dict.get(LAYOUTS, {})
    for i, (mine, theirs) in enumerate(zip(groups, state_dict["param_groups"], strict=False)):
        # Which were fp32, and no stacks, before there was a choice.
        saved = {**mine, STATE_DTYPE: None, "stacked": False, **theirs}
        for key in ("level", "wavelet", "stacked"):
            if saved[key] != mine[key]:
                raise ValueError(
                    f"{key} of parameter group {i} is {saved[key]!r} in the state to load and {mine[key]!r} in "
                    f"this optimizer; its moments would mean something else. Build the optimizer with "
                    f"{key}={saved[key]!r}"
                )
        check_group(saved, f"parameter group {i} of the state to load")
        then, now = (rule_of(group).of(mine["level"]) for group in (saved, mine))
        if then.fields != now.fields and saved[STATE_DTYPE] != mine[STATE_DTYPE]:
            before, here = (group[STATE_DTYPE] or KEYS[STATE_DTYPE].default for group in (saved, mine))
            raise ValueError(
                f"parameter group {i} has {STATE_DTYPE}={before!r} in the state to load and "
                f"{here!r} in this optimizer: its moments are stored in another format. Build the "
                f"optimizer with the state_dtype of then. What gwt_dist.save wrote can be converted: "
                f"gwt_dist.load(..., convert_state=True)"
            )
        if then.fields != now.fields:
            raise ValueError(
                f"parameter group {i} has the state {', '.join(map(str, then.fields))} in what is to be loaded (recipe "
                f"{theirs.get('recipe')!r}) and {', '.join(map(str, now.fields))} in this optimizer (recipe "
                f"{mine['recipe']!r}); its moments would mean something else. Build the optimizer as it was"
            )
        if any(_is_taken(parameter, mine, steps) for parameter in mine["params"]):
            check_meaning(saved, mine, f"parameter group {i}", "the state to load")
        for key, parameter in zip(theirs["params"], mine["params"], strict=False):
            by_id[key] = parameter
            _check_state(state_dict["state"].get(key, {}), tags.get(key), parameter, mine, i, steps)
    return by_id


def layouts(groups: Sequence[Group], steps: Steps) -> dict[int, Layout]:
    """Which elements the state of each flat parameter is of, by the keys that torch gives the states."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return {i: layout_of(steps.shards[p]) for i, p in enumerate(parameters) if p in steps.shards}


def missed(groups: Sequence[Group], steps: Steps) -> dict[int, dict[str, int]]:
    """The steps that frozen tensors of each flat parameter did not take, by the keys that torch gives the states."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    return {i: dict(its) for i, p in enumerate(parameters) if (its := steps.frozen.missed(p))}


def layout_of(shard: Shard) -> Layout:
    """What this rank holds: place of the tensor, its shape, first and last element; plain lists, as files hold them."""
    places = {tensor.fqn: i for i, tensor in enumerate(shard.tensors)}
    held = [fragment for fragment in shard.fragments if fragment.numel]
    return [[places[f.fqn], list(f.shape), f.start, f.stop, f.rows] for f in held]


def completed(state_dict: Group, groups: Sequence[Group]) -> Group:
    """`state_dict` with the keys that its groups did not have yet, as they are in `groups`."""
    saved = [dict(group) for group in state_dict["param_groups"]]
    for mine, theirs in zip(groups, saved, strict=False):  # torch refuses another number of groups
        theirs.update({key: mine[key] for key in KEYS if key in mine and key not in theirs})
    return {**state_dict, "param_groups": saved}


def put_back(state: Group, values: Mapping[str, Any], parameter: Tensor, group: Group) -> None:
    """Put `values` into the state of a parameter of `group`, as they were saved.

    torch casts state to the dtype of the parameter, which neither fp32 moments of bf16 weights nor codes survive, and
    it shares the step with the state that was loaded.
    """
    rule = rule_of(group)
    fields = {field.name: field for field in (*rule.plain.fields, *rule.program.fields)}
    for name, value in values.items():
        if name == STEP:
            state[STEP] = torch.as_tensor(value).to(parameter.device, torch.float32, copy=True)
        elif isinstance(value, Tensor):
            # What was saved under another name is nobody's, and stays as it was.
            dtype = stored_dtype(fields[name], parameter.dtype) if name in fields else value.dtype
            state[name] = value.to(parameter.device, dtype, copy=True)


def fill_keys(groups: Sequence[Group]) -> None:
    """Keys that a saved group did not have yet are what they are if nothing is said."""
    for group in groups:
        for name, key in KEYS.items():
            group.setdefault(name, None if key.of_recipe else key.default)


def given_of(
    groups: Sequence[Group], states: Mapping[Tensor, Group]
) -> tuple[list[Tensor], list[tuple[Tensor, Layout]]]:
    """Of an optimizer that was pickled before it said so: parameters that a user gave, and those of an engine.

    A vector may be a flat buffer, but for one whose state is that of a whole tensor: one number of it is 0-d.
    """
    given: list[Tensor] = []
    attached: list[tuple[Tensor, Layout]] = []
    held = [parameter for group in groups for parameter in group["params"]]
    for parameter in dict.fromkeys([*held, *states]):
        numbers = [value for name, value in states.get(parameter, {}).items() if name != STEP]
        if parameter.dim() != 1 or any(value.dim() == 0 for value in numbers):
            given.append(parameter)
        elif numbers:
            attached.append((parameter, []))
    return given, attached


def _is_taken(parameter: Tensor, group: Group, steps: Steps) -> bool:
    """Whether the recipe's own program steps any tensor that a parameter stands for; a buffer not attached yet may."""
    level, least = group["level"], rule_of(group).program.least_level
    if parameter in steps.shards:
        return any(takes(tensor.shape, level, least) for tensor in steps.shards[parameter].tensors)
    if isinstance(parameter, DTensor) or parameter in steps.given:
        return takes(tuple(parameter.shape), level, least)
    return bool(level >= least)


def _check_state(
    state: Mapping[str, Any], tag: Layout | None, parameter: Tensor, group: Group, i: int, steps: Steps
) -> None:
    where = f"a parameter of shape {tuple(parameter.shape)} in group {i}"
    shard = shard_of(parameter, steps.shards, steps.given, where, group["stacked"]) if state else None
    if shard is None:  # nothing to load, or a buffer of an engine that is attached later
        return
    form = Form.of(group["level"], group["wavelet"], rule_of(group), group["stacked"])
    plan = Plan.of(shard, form, steps.turn(parameter, shard))
    if state.keys() != {STEP, *plan.shapes}:
        raise ValueError(
            f"a parameter in group {i} has {', '.join(state)} in the state to load and needs {STEP}, "
            f"{', '.join(plan.shapes)} here; it was saved by another optimizer or recipe. Build the optimizer as it was"
        )
    # What is written is the layout of what the engine holds, whose stacks are one tensor each.
    if tag is not None and tag != layout_of(steps.shards.get(parameter, shard)):
        raise ValueError(
            f"the state to load is of other elements than this rank holds of {where} ({shard.tensors[0].fqn!r} and "
            f"{len(shard.tensors) - 1} more tensors): it was saved by another rank, or under another engine or number "
            f"of ranks. {_WAY_OUT}"
        )
    for name, needed in plan.fresh_state(parameter, "meta").items():
        if name == STEP:
            if not within(state[STEP], 0, math.inf):
                raise ValueError(
                    f"{STEP} of a parameter in group {i} is {state[STEP]!r} in the state to load: no count"
                )
        else:
            _check_tensor(name, state[name], needed, f"a parameter in group {i}")


def _check_tensor(name: str, found: Any, needed: Tensor, where: str) -> None:
    if not isinstance(found, Tensor) or found.shape != needed.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name} of {where} has shape {shape} in the state to load and needs {tuple(needed.shape)} here; it was "
            f"saved with another level, model, world size or engine. {_WAY_OUT}"
        )
    if found.dtype != needed.dtype and not (found.is_floating_point() and needed.dtype in _MATH):
        raise ValueError(
            f"{name} of {where} is {found.dtype} in the state to load and needs to be {needed.dtype} here: what is "
            f"stored in one format means nothing in another. Build the optimizer with the state_dtype of then"
        )
    # The shape of a DTensor is that of the whole tensor, so it says nothing of what this rank has of it.
    if _placed(found) != _placed(needed) or dtensor.local(found).shape != dtensor.local(needed).shape:
        raise ValueError(
            f"{name} of {where} is {_told(found)} in the state to load and needs to be {_told(needed)} here: ranks "
            f"would take each other's elements. {_WAY_OUT}"
        )


def _placed(tensor: Tensor) -> Any:
    """Ranks and placements of a DTensor, and which part it is: that of the rank that pickled it, if one did."""
    if not isinstance(tensor, DTensor):
        return None
    mesh = tensor.device_mesh
    return mesh.mesh.tolist(), tensor.placements, tuple(mesh.get_coordinate() or ())


def _told(tensor: Tensor) -> str:
    if not isinstance(tensor, DTensor):
        return f"a tensor of its own on each rank, of shape {tuple(tensor.shape)}"
    ranks, placements, part = _placed(tensor)
    return f"a DTensor with placements {placements} on the ranks {ranks}, the part at {part}"
