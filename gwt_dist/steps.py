"""The layouts of an optimizer's parameters and the schedules of its steps, made once and kept."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gwt_dist import dtensor, replaced
from gwt_dist.comm import Shard
from gwt_dist.declare import Rule
from gwt_dist.plan import Form, Plan
from gwt_dist.recipes import rule_of
from gwt_dist.schedule import Member, Schedule
from gwt_dist.shards import shard_of

Group = dict[str, Any]
Numbered = tuple[int, Tensor]  # a parameter and the number of its group
_NO_STATE: Group = {}
_KEPT = 1024  # schedules at once; a fused backward pass has one for each group of parameters


class Steps:
    """What is known of the parameters of one optimizer, for as long as their layouts last."""

    def __init__(self) -> None:
        self.shards: MutableMapping[Tensor, Shard] = WeakIdKeyDictionary()  # attached parameters
        self.given: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()  # parameters that the user passed
        # Of a copy: parameters that were attached where it was made, and what this rank held there
        self.copied: dict[Tensor, list[list[Any]]] = {}
        self.plans: MutableMapping[Tensor, Plan] = WeakIdKeyDictionary()
        # What is in a step -> its parameters and its schedules, one a device, with the numbers of their members
        self._schedules: dict[Any, tuple[list[Any], list[tuple[Schedule, list[int]]]]] = {}
        self._places: dict[int, tuple[int, int]] = {}  # id of a parameter -> group and place, when last looked at

    def attach(self, parameter: Tensor, shard: Shard) -> None:
        """Take the layout of a parameter."""
        self.shards[parameter] = shard
        self.copied.pop(parameter, None)
        self.plans.pop(parameter, None)
        self._schedules.clear()

    def numbered(self, parameters: Iterable[Tensor], groups: Sequence[Group]) -> list[Numbered]:
        """Parameters with the numbers of their groups, in the order in which the groups have them."""
        once = {id(parameter): parameter for parameter in parameters}
        places = [(self._place(parameter, groups), parameter) for parameter in once.values()]
        return [(place[0], parameter) for place, parameter in sorted(places, key=lambda one: one[0]) if place]

    def _place(self, parameter: Tensor, groups: Sequence[Group]) -> tuple[int, ...]:
        """Number of its group and place in it; nothing for what an engine took out of its group."""
        group, place = self._places.get(id(parameter), (len(groups), 0))
        if group < len(groups) and place < len(its := groups[group]["params"]) and its[place] is parameter:
            return group, place
        self._places = {id(p): (i, j) for i, one in enumerate(groups) for j, p in enumerate(one["params"])}
        return self._places.get(id(parameter), ())

    def take(self, members: Sequence[Numbered], groups: Sequence[Group], states: MutableMapping[Tensor, Group]) -> None:
        """One step of `members`; state that is not there yet is made."""
        rules = [rule_of(group) for group in groups]
        for schedule, numbers in self._scheduled(members, groups, rules, states):
            _run(schedule, [members[i][1] for i in numbers], states, rules)

    def _scheduled(
        self,
        members: Sequence[Numbered],
        groups: Sequence[Group],
        rules: Sequence[Rule],
        states: Mapping[Tensor, Group],
    ) -> list[tuple[Schedule, list[int]]]:
        key = (
            tuple((g["level"], g["wavelet"], r.program, r.plain) for g, r in zip(groups, rules, strict=True)),
            tuple((id(p), p.grad is None, p.dtype, p.device) for _, p in members),
        )
        known = self._schedules.get(key)
        if known is not None and all(reference() is p for reference, (_, p) in zip(known[0], members, strict=True)):
            return known[1]
        replaced.refuse([parameter for _, parameter in members], groups, states, self.given, self.shards)
        by_device: dict[torch.device, list[tuple[int, Member]]] = {}
        dry_run = False
        for i, (number, parameter) in enumerate(members):
            plan = self.plan_of(parameter, number, groups, rules[number])
            if plan is None:
                dry_run = True
            else:
                rule = rules[number]
                member = Member(plan, number, parameter.dtype, parameter.grad is not None, rule.program, rule.plain)
                by_device.setdefault(dtensor.local(parameter.detach()).device, []).append((i, member))
        schedules = [
            (Schedule([member for _, member in found], device), [i for i, _ in found])
            for device, found in by_device.items()
        ]
        if not dry_run:  # which is known by the values of the gradients, and these may change
            if len(self._schedules) >= _KEPT:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = [weakref.ref(p) for _, p in members], schedules
        return schedules

    def plan_of(self, parameter: Tensor, number: int, groups: Sequence[Group], rule: Rule | None = None) -> Plan | None:
        """The plan of a parameter of group `number`, whatever its gradient: ranks that share it make the same calls.

        None for the buffers of an engine's dry run. Raises `ValueError` if its group has another form now.
        """
        plan, group = self.plans.get(parameter), groups[number]
        form = Form.of(group["level"], group["wavelet"], rule or rule_of(group))
        if plan is None:
            shard = shard_of(parameter, self.shards, self.given, self._where(parameter, number, groups))
            if shard is None:
                return None
            plan = self.plans[parameter] = Plan.of(shard, form)
        if plan.form != form:
            raise ValueError(
                f"{form} of {self._where(parameter, number, groups)} differ from {plan.form} at its first step; its "
                f"state cannot follow. Build a new optimizer"
            )
        return plan

    def _where(self, parameter: Tensor, number: int, groups: Sequence[Group]) -> str:
        """For messages; what an engine took out of its group, as ZeRO-3 does, has no number."""
        place = self._place(parameter, groups)
        return f"parameter{f' {place[1]}' if place else ''} of group {number}"


def _run(
    schedule: Schedule,
    parameters: Sequence[Tensor],
    known: MutableMapping[Tensor, Group],
    rules: Sequence[Rule],
) -> None:
    """One step of the members of a schedule."""
    states: list[Mapping[str, Any]] = []
    weights, gradients = [], []
    for member, parameter in zip(schedule.members, parameters, strict=True):
        if parameter.grad is None:
            states.append(_NO_STATE)
            weights.append(parameter)
            gradients.append(parameter)
            continue
        state = known[parameter]
        if not state:
            state.update(member.plan.fresh_state(parameter))
        states.append(state)
        weight = dtensor.local(parameter)
        gradient = dtensor.local(parameter.grad, like=parameter)
        if gradient.numel() != weight.numel():
            raise ValueError(
                f"a gradient of {gradient.numel()} elements for the {weight.numel()} that this rank holds of the "
                f"parameter of {member.plan.shard.tensors[0].fqn!r}: the step would use those of other elements. "
                f"It was not reduced; run the last backward pass before step() outside of no_sync()"
            )
        weights.append(weight)
        gradients.append(gradient)
    dense = [weight.contiguous() for weight in weights]
    schedule.run(dense, [gradient.contiguous() for gradient in gradients], states, rules)
    for weight, copy in zip(weights, dense, strict=True):
        if copy is not weight:
            weight.copy_(copy)
