"""Parameters that an engine replaced: an optimizer that holds the old ones steps, and the model stays as it is."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

CARRY = (
    "To carry the state of a run into another engine or process, save it with gwt_dist.save and load it with "
    "gwt_dist.load into an optimizer that was built for it"
)


def copied(number: int) -> str:
    """What to tell of a copy of an attached optimizer that has so many flat parameters."""
    return (
        f"this optimizer was copied or unpickled from one that was attached to a sharding engine, and {number} flat "
        f"parameters of the copy have rows that are unknown here. Without them a step would be another optimizer. Call "
        f"gwt_dist.attach(optimizer, engine) with the engine that holds these very parameters. {CARRY}"
    )


def refuse(
    parameters: Sequence[Tensor],
    groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Any],
    given: Container[Tensor],
    attached: Collection[Tensor],
    placed: set[Tensor],
) -> None:
    """Raise `ValueError` if any of `parameters`, which are to be stepped, is none that its model computes with.

    Asked when a set of parameters with gradients is stepped for the first time. `given` are those that the user passed
    to the optimizer, `attached` those of engines, `placed` those that were found in a module before; more are added.
    """
    originals = [p for p in parameters if hasattr(p, "_fsdp_orig_uid")]  # torch gives it what fully_shard replaces
    if originals:
        raise ValueError(
            f"{len(originals)} of {len(parameters)} parameters of the optimizer, the first of shape "
            f"{tuple(originals[0].shape)}, were replaced by fully_shard after the optimizer was built: the model would "
            f"not move. Call fully_shard first and build the optimizer with the parameters that the model has then. "
            f"{CARRY}"
        )
    idle = [p for p in parameters if p.grad is None and p not in attached]
    empty = [p for p in idle if p.is_meta and p.requires_grad]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(parameters)} parameters of the optimizer, the first of shape "
            f"{tuple(empty[0].shape)}, are on the meta device, have no values and never get gradients: to_empty puts "
            f"others in their place. Build the optimizer after the model has memory"
        )
    gathered = {id(p) for p in _gathered()} if idle else set()
    whole = [p for p in idle if id(p) in gathered]
    if whole:
        raise ValueError(
            f"{len(whole)} of {len(parameters)} parameters of the optimizer, the first of shape "
            f"{tuple(whole[0].shape)}, are whole tensors that FSDP2 gathered for a forward pass and never has the "
            f"gradients of: the weights that they are copies of would not move. After a forward pass without a "
            f"backward pass the root stays gathered. Build the optimizer right after fully_shard, or call "
            f"model.reshard() before"
        )
    unplaced = [p for p in idle if p not in placed and not isinstance(p, DTensor)]
    if unplaced and dist.is_initialized():
        _refuse_flattened(unplaced, placed)
    if any(p not in given and p not in attached for p in parameters):
        refuse_left_state(states, [*(p for group in groups for p in group["params"]), *attached])


def _refuse_flattened(idle: Sequence[Tensor], placed: set[Tensor]) -> None:
    """Raise `ValueError` if FSDP1 or fairscale took the place of any of these parameters, which have no gradients.

    They leave no mark on what they flatten, so all objects of the process are looked through: for parameters that no
    module has, and flat ones with gradients whose tensors have their shapes.
    """
    things = gc.get_objects()
    modules = [thing for thing in things if issubclass(type(thing), nn.Module)]
    its = {id(p) for module in modules for p in vars(module).get("_parameters", {}).values()}
    placed.update(p for p in idle if id(p) in its)
    lost = Counter(tuple(p.shape) for p in idle if id(p) not in its)
    for flat in things if lost else ():
        if issubclass(type(flat), nn.Parameter) and (hasattr(flat, "_is_flat_param") or hasattr(flat, "_param_shapes")):
            shapes = getattr(flat, "_shapes", None) or getattr(flat, "_param_shapes", None)
            if flat.grad is not None and shapes and Counter(map(tuple, shapes)) <= lost:
                raise ValueError(
                    f"{sum(lost.values())} parameters of the optimizer have no gradient and are in no module any more, "
                    f"and a flat parameter of FSDP1 or fairscale holds tensors of their shapes: the model was wrapped "
                    f"after the optimizer was built, and would not move. Build the optimizer after the model is "
                    f"wrapped, and call gwt_dist.attach(optimizer, model)"
                )


def refuse_left_state(states: Mapping[Tensor, Any], held: Iterable[Tensor]) -> None:
    """Raise `ValueError` if there is state of parameters that are not in `held`, whose place others have taken."""
    here = {id(parameter) for parameter in held}
    left = [parameter for parameter, state in states.items() if state and id(parameter) not in here]
    if left:
        raise ValueError(
            f"the optimizer has state of {len(left)} parameters that it does not hold any more, the first of shape "
            f"{tuple(left[0].shape)}: an engine put others in their place, which would begin with moments of zero. "
            f"Give an engine an optimizer that has not stepped. {CARRY}"
        )


def refuse_stepped(states: Mapping[Tensor, Any]) -> None:
    """Raise `ValueError` for an optimizer that has state already, before an engine takes its parameters."""
    if any(states.values()):
        raise ValueError(
            f"the optimizer has state already, {len(states)} parameters of it, and the engine puts flat buffers in "
            f"their place, which would begin with moments of zero. Give an engine an optimizer that has not stepped. "
            f"{CARRY}"
        )


def _gathered() -> Iterator[Tensor]:
    """The whole tensors of all FSDP2 modules of this process; none where torch keeps them elsewhere."""
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        return
    for reference in list(_module_state_mapping.values()):
        state: Any = reference() if callable(reference) else reference
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # one a module, before torch 2.13
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None:
                    yield whole
