"""Learning-rate schedules of a checkpoint, and those that are here to take their states: found, compared, then filled.

A checkpoint has the schedule that was given to `save`, that which a DeepSpeed engine steps by itself, or both. One goes
to the one that is here, whichever of the two it was and is; two go to where they came from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gwt_dist.checkpoint.format import CheckpointError, Index, Schedule
from gwt_dist.checkpoint.holdings import Run
from gwt_dist.engines.attach import unwrapped
from gwt_dist.engines.weights import schedule_of

_NAMES = {"scheduler": "the scheduler given to load", "engine": "the engine's lr_scheduler"}
_LEAVE = "scheduler=False leaves the schedules of the checkpoint and those that are here as they are"


@dataclass(frozen=True, slots=True)
class Taker:
    """A schedule that is here, and the state that it is to go on from."""

    what: str
    schedule: Any
    state: Any


def read(model: Any, scheduler: Any) -> dict[str, Schedule]:
    """The states to save: under ``"scheduler"`` of the one given, under ``"engine"`` of the engine's own if another."""
    if scheduler is not None and not hasattr(_inner(scheduler), "state_dict"):
        raise ValueError(f"scheduler is a {type(scheduler).__name__}, which has no state_dict: pass what has one")
    return {key: Schedule(kind_of(one), _state_of(one)) for key, one in _here(model, scheduler).items()}


def _state_of(schedule: Any) -> Any:
    try:
        return schedule.state_dict()
    except Exception as error:  # of the user's own class perhaps, or of what is in it
        raise ValueError(f"the state_dict of scheduler ({kind_of(schedule)}) cannot be read: {error!r}") from error


def kind_of(schedule: Any) -> str:
    """The name of its class, with those of the schedules that it has within: `SequentialLR[LinearLR, StepLR]`."""
    inner = getattr(schedule, "_schedulers", None)
    within = f"[{', '.join(map(kind_of, inner))}]" if isinstance(inner, list | tuple) else ""
    return f"{type(schedule).__name__}{within}"


def takers(index: Index, run: Run, scheduler: Any, where: str) -> list[Taker]:
    """Who takes which state; nothing is changed.

    Raises:
        CheckpointError: For a state that nobody takes, somebody who gets none, another class, another optimizer's, or
            rates of parameter groups that are not the groups here.
    """
    if scheduler is False:
        return []
    if scheduler is not None and not hasattr(_inner(scheduler), "load_state_dict"):
        raise CheckpointError(f"scheduler is a {type(scheduler).__name__}, which has no load_state_dict")
    saved = {"scheduler": index.scheduler, "engine": index.engine_schedule}
    states, here = {key: one for key, one in saved.items() if one is not None}, _here(run.model, scheduler)
    if len(states) == len(here) == 1:
        states = dict(zip(here, states.values(), strict=True))
    if states.keys() != here.keys():
        raise CheckpointError(_unmatched(states, here, where))
    return [_checked(key, one, states[key], index, run, where) for key, one in here.items()]


def _here(model: Any, scheduler: Any) -> dict[str, Any]:
    engines, given = _inner(schedule_of(model)), _inner(scheduler)
    found = {"engine": engines} if hasattr(engines, "state_dict") else {}
    return found if given is None or given is engines else {"scheduler": given, **found}


def _inner(schedule: Any) -> Any:
    """Accelerate wraps schedules, and its wrapper has no state."""
    while any(kind.__name__ == "AcceleratedScheduler" for kind in type(schedule).__mro__):
        schedule = schedule.scheduler
    return schedule


def _unmatched(states: Mapping[str, Schedule], here: Mapping[str, Any], where: str) -> str:
    saved = [f"{state.kind or 'a schedule'} ({_SAVED[key]})" for key, state in states.items()]
    found = [f"{kind_of(one)} ({_NAMES[key]})" for key, one in here.items()]
    if not saved:
        return (
            f"{where} has no state of a scheduler, and here is {' and '.join(found)}, which would begin anew. Save "
            f"with scheduler=, or go on so: {_LEAVE}"
        )
    return (
        f"{where} has the state of {' and '.join(saved)}, and {' and '.join(found) or 'nothing'} here takes it, so "
        f"learning rates would be others. Pass the schedule that the run had (scheduler=, or the engine's "
        f"lr_scheduler), or leave it: {_LEAVE}"
    )


_SAVED = {"scheduler": "given to save", "engine": "stepped by the engine"}


def _checked(key: str, schedule: Any, saved: Schedule, index: Index, run: Run, where: str) -> Taker:
    what, kind = _NAMES[key], kind_of(schedule)
    if saved.kind and saved.kind != kind:
        raise CheckpointError(
            f"{where} has the state of a {saved.kind}, and {what} is a {kind}, to which it would mean something else. "
            f"Build the schedule as it was, or leave it: {_LEAVE}"
        )
    holder = getattr(schedule, "optimizer", None)
    if holder is not None and not any(one is run.optimizer for one in unwrapped(holder)):
        raise CheckpointError(
            f"{what} ({kind}) sets the rates of another optimizer than the one that is loaded, so its steps would "
            f"change nothing. Build it with the optimizer that is given to load"
        )
    state, before = saved.state, schedule.state_dict()
    sources = _sources(index, run)
    if len(index.groups) != len(sources) or any(numbers - {i} for i, numbers in enumerate(sources)):
        state = _fitted(state, before, len(index.groups), len(sources), f"the state of {kind} in {where}")
    return Taker(what, schedule, state)


def _sources(index: Index, run: Run) -> list[set[int]]:
    """By parameter group that is here, the numbers of those that its tensors were in."""
    found: list[set[int]] = [set() for _ in run.optimizer.param_groups]
    for one in run.stepped:
        numbers = {index.tensors[name].group for name in one.names}
        found[one.group] |= {number for number in numbers if number is not None}
    return found


def _fitted(state: Any, here: Any, saved: int, now: int, path: str) -> Any:
    """A state of other parameter groups, where lists have an element for each: rates, lambdas, momentums."""
    if isinstance(state, dict) and isinstance(here, dict):
        return {key: _fitted(one, here.get(key), saved, now, f"{path}[{key!r}]") for key, one in state.items()}
    if not isinstance(state, list) or not isinstance(here, list):
        return state
    if path.endswith("['_schedulers']"):  # of schedules, not of groups
        return [_fitted(one, other, saved, now, path) for one, other in zip(state, here, strict=False)]
    if len(state) != saved or len(here) != now or _same(state, here):
        return state
    if not all(_same(one, state[0]) for one in state):
        raise CheckpointError(
            f"{path} has values for {saved} parameter groups, and the {now} here are not these groups, in this order: "
            f"they would go to other tensors. Build the groups as they were"
        )
    return [copy.deepcopy(state[0]) for _ in here]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def attempt(found: Sequence[Taker], optimizers: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Have each taker load its state, and then what it had: only it knows what it takes. Raises `CheckpointError`.

    `optimizers` are the parameter groups of the optimizer and of what wraps it.
    """
    options = [(group, dict(group), _tensors(group)) for groups in optimizers for group in groups]
    before = [copy.deepcopy(one.schedule.state_dict()) for one in found]
    try:
        for one in found:
            try:
                one.schedule.load_state_dict(copy.deepcopy(one.state))
            except Exception as error:
                raise CheckpointError(f"{one.what} does not take the state in the checkpoint: {error!r}") from error
    finally:
        for one, old in zip(found, before, strict=True):
            one.schedule.load_state_dict(old)
        for group, same, values in options:  # some schedules set rates where they load
            group.clear()
            group.update(same)
            for key, value in values.items():
                group[key].copy_(value)


def _tensors(group: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}


def restore(found: Sequence[Taker]) -> None:
    """Let each taker go on from its state."""
    for one in found:
        one.schedule.load_state_dict(copy.deepcopy(one.state))
