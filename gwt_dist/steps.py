"""The layouts of an optimizer's parameters and the schedules of its steps, made once and kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from numbers import Real
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gwt_dist import dtensor, owners, replaced
from gwt_dist.comm import Shard
from gwt_dist.declare import Rule
from gwt_dist.formats import FP32
from gwt_dist.frozen import Frozen
from gwt_dist.keys import COMMON
from gwt_dist.plan import Form, Plan
from gwt_dist.recipes import check_group, rule_of
from gwt_dist.schedule import Member, Schedule
from gwt_dist.shards import shard_of

Group = dict[str, Any]
Numbered = tuple[int, Tensor]  # a parameter and the number of its group
# Of one device; which of all are its members, and which of these move.
Scheduled = tuple[Schedule, list[int], list[int]]
_SHAPE = attrgetter("shape")
_KEPT = 1024  # schedules at once; a fused backward pass has one for each group of parameters


class Steps:
    """What is known of the parameters of one optimizer, for as long as their layouts last."""

    def __init__(self) -> None:
        # No weak references: torch exchanges no tensor that has any, as `to_empty` and `to(dtype)` under FSDP2 do
        self.shards: dict[Tensor, Shard] = {}  # attached parameters
        self.given: dict[Tensor, bool] = {}  # parameters that the user passed
        # Of a copy: parameters that were attached where it was made, and what this rank held there
        self.copied: dict[Tensor, list[list[Any]]] = {}
        self._placed: set[Tensor] = set()  # parameters without a gradient that were found in a module
        self.plans: dict[Tensor, Plan] = {}
        self.frozen = Frozen()
        self._shapes: dict[Tensor, tuple[int, ...]] = {}  # of local parts, when planned
        # What is in a step -> its parameters and its schedules
        self._schedules: dict[Any, tuple[list[Tensor], list[Scheduled]]] = {}
        self._rules: dict[int, tuple[list[Any], Rule]] = {}  # of each group: its options but lr, and what they say
        self._turns: dict[Tensor, int] = {}  # of DTensors, for as long as they live
        self._places: dict[int, tuple[int, int]] = {}  # id of a parameter -> group and place, when last looked at

    def attach(self, parameter: Tensor, shard: Shard) -> None:
        """Take the layout of a parameter."""
        self.shards[parameter] = shard
        self.copied.pop(parameter, None)
        self._shapes[parameter] = tuple(parameter.shape)
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
        rules = [self._rule(number, group) for number, group in enumerate(groups)]
        frozen = self.frozen.among([parameter for _, parameter in members], self.shards)
        gradients = [parameter.grad for _, parameter in members]
        for schedule, numbers, moving in self._scheduled(members, gradients, groups, rules, frozen, states):
            _run(schedule, [members[i][1] for i in moving], [gradients[i] for i in moving], states, rules)
            for member, i in zip(schedule.members, numbers, strict=True) if frozen else ():
                if member.moves and member.frozen:
                    self.frozen.pass_by(members[i][1], frozen[id(members[i][1])])

    def _rule(self, number: int, group: Group) -> Rule:
        """The rule of a group, whose options may change from step to step, and are checked when they do.

        Raises `ValueError` for options that make no sense.
        """
        lr = group.get("lr")
        # Copies of lists, which may change in place.
        said = [tuple(v) if isinstance(v, list) else v for key, v in group.items() if key not in ("params", "lr")]
        known = self._rules.get(number)
        is_number = lr.numel() == 1 if isinstance(lr, Tensor) else isinstance(lr, (float, Real))
        if known is None or known[0] != said or not is_number:
            lacks = [key for key in COMMON if key not in group]
            if lacks:
                raise ValueError(f"parameter group {number} has no {', '.join(lacks)}; put back what was taken out")
            check_group(group, f"parameter group {number}")
            known = self._rules[number] = said, rule_of(group)
        rule = known[1]
        # 0-d: of one dimension its dtype would decide that of the mathematics.
        rate = lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr
        return Rule(rule.program, rule.plain, rate, rule.numbers)

    def _scheduled(
        self,
        members: Sequence[Numbered],
        gradients: Sequence[Tensor | None],
        groups: Sequence[Group],
        rules: Sequence[Rule],
        frozen: Mapping[int, frozenset[str]],  # id of a parameter -> the tensors in it that are not trained
        states: Mapping[Tensor, Group],
    ) -> list[Scheduled]:
        key = (
            tuple(frozen.items()),
            tuple(
                (g["level"], g["wavelet"], g["stacked"], r.program, r.plain) for g, r in zip(groups, rules, strict=True)
            ),
            tuple([(id(p), g is None, p.dtype, p.device) for (_, p), g in zip(members, gradients, strict=True)]),
        )
        known = self._schedules.get(key)
        if known is not None:  # which keeps its parameters, so that no other has the id of one
            return known[1]
        if len({id(p) for _, p in members}) < len(members):
            raise ValueError(
                "a parameter is in the parameter groups twice, so a step would change it twice, in an order that "
                "nothing decides. Take it out of one of them"
            )
        replaced.refuse([parameter for _, parameter in members], groups, states, self.given, self.shards, self._placed)
        by_device: dict[torch.device, list[tuple[int, Member]]] = {}
        dry_run = False
        for i, (number, parameter) in enumerate(members):
            plan = self.plan_of(parameter, number, groups, rules[number])
            if plan is None:
                dry_run = True
            else:
                rule, names = rules[number], frozen.get(id(parameter), frozenset())
                still = frozenset(t.fqn for t in plan.shard.tensors if plan.shard.source(t.fqn)[0] in names)
                member = Member(
                    plan,
                    number,
                    parameter.dtype,
                    parameter.grad is not None and len(still) < len(plan.shard.tensors),
                    rule.program,
                    rule.plain,
                    self._shapes[parameter],
                    isinstance(parameter, DTensor),
                    still,
                )
                by_device.setdefault(dtensor.local(parameter.detach()).device, []).append((i, member))
        schedules = []
        for device, found in by_device.items():
            schedule, numbers = Schedule([member for _, member in found], device), [i for i, _ in found]
            schedules.append((schedule, numbers, [numbers[i] for i in schedule.moving]))
        # A dry run is known by the values of the gradients, and a parameter that was replaced by gradients elsewhere:
        # both may look otherwise the next time.
        if not dry_run and any(gradient is not None for gradient in gradients):
            if len(self._schedules) >= _KEPT:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = [p for _, p in members], schedules
        return schedules

    def plan_of(self, parameter: Tensor, number: int, groups: Sequence[Group], rule: Rule | None = None) -> Plan | None:
        """The plan of a parameter of group `number`, whatever its gradient: ranks that share it make the same calls.

        None for the buffers of an engine's dry run. Raises `ValueError` if its group has another form now.
        """
        plan, group = self.plans.get(parameter), groups[number]
        rule = rule or rule_of(group)
        form = Form.of(group["level"], group["wavelet"], rule, group["stacked"])
        if plan is None:
            where = self._where(parameter, number, groups)
            shard = shard_of(parameter, self.shards, self.given, where, form.stacked)
            if shard is None:
                return None
            plan = self.plans[parameter] = Plan.of(shard, form, self.turn(parameter, shard))
            self._shapes.setdefault(parameter, tuple(dtensor.local(parameter.detach()).shape))
        self._check_dtype(parameter, rule, number, groups)
        if plan.form != form:
            raise ValueError(
                f"{form} of {self._where(parameter, number, groups)} differ from {plan.form} at its first step; its "
                f"state cannot follow. Build a new optimizer"
            )
        return plan

    def turn(self, parameter: Tensor, shard: Shard) -> int:
        """The turn of a parameter that is one tensor, see `owners.turns`; 0 of flat ones, whose tensors take turns.

        Counted over what the user passed of the same ranks and is trained, so that all of these count alike, whatever
        else they have.
        """
        if parameter not in self._turns:
            its: dict[tuple[int, ...], list[Tensor]] = {}
            for one in self.given:
                if isinstance(one, DTensor) and one.requires_grad and one not in self.shards:
                    its.setdefault(tuple(one.device_mesh.mesh.flatten().tolist()), []).append(one)
            for alike in its.values():
                turns = owners.turns([one.shape for one in alike])
                self._turns |= {p: turn for p, turn in zip(alike, turns, strict=True) if p not in self._turns}
        return self._turns.setdefault(parameter, 0) if shard.local_shape is not None else 0

    def refuse_dtypes(self, parameters: Iterable[Tensor], groups: Sequence[Group]) -> None:
        """Raise `ValueError` for the first of `parameters` whose dtype cannot have what its group says."""
        rules = [rule_of(group) for group in groups]
        for number, parameter in self.numbered(parameters, groups):
            self._check_dtype(parameter, rules[number], number, groups)

    def _check_dtype(self, parameter: Tensor, rule: Rule, number: int, groups: Sequence[Group]) -> None:
        """Raise `ValueError` for a parameter that is trained and of a dtype that cannot have what its rule says."""
        if parameter.is_meta or not (parameter.requires_grad or parameter.grad is not None):
            return  # a plan without weights, whose dtype nobody has said yet; or a weight that stays as it is
        stored = {field.format for field in (*rule.program.fields, *rule.plain.fields)} - {FP32}
        if not stored and rule.program.rounding == "nearest":
            return
        where = self._where(parameter, number, groups)
        if stored and parameter.dtype == torch.float64:
            raise ValueError(
                f"{where} is float64, and its group has state_dtype={groups[number].get('state_dtype')!r}, a rounding "
                f"of fp32: double precision would be lost in silence. Leave state_dtype out of the group, or train in "
                f"fp32"
            )
        if rule.program.rounding == "stochastic" and parameter.dtype != torch.bfloat16:
            raise ValueError(
                f"{where} is {parameter.dtype} and its group says stochastic_rounding=True, which is for bfloat16 "
                f"parameters: with fp32 weights, or masters that an engine keeps, no change of a weight is lost. Leave "
                f"stochastic_rounding out of the group, or put these parameters into a group without it"
            )

    def _where(self, parameter: Tensor, number: int, groups: Sequence[Group]) -> str:
        """For messages; what an engine took out of its group, as ZeRO-3 does, has no number."""
        place = self._place(parameter, groups)
        return f"parameter{f' {place[1]}' if place else ''} of group {number}"


def _run(
    schedule: Schedule,
    parameters: Sequence[Tensor],  # those that move
    gradients: Sequence[Any],
    known: MutableMapping[Tensor, Group],
    rules: Sequence[Rule],
) -> None:
    """One step of the members of a schedule."""
    weights, given = parameters, gradients
    if schedule.has_dtensors:
        weights = [dtensor.local(parameter) for parameter in parameters]
        given = [dtensor.local(gradient, like=its) for gradient, its in zip(gradients, parameters, strict=True)]
    # One call of C a tensor and list, here and in kernels: with a thousand small tensors each counts.
    if list(map(_SHAPE, weights)) != schedule.shapes or list(map(_SHAPE, given)) != schedule.shapes:
        _refuse_shapes(schedule, weights, given)
    states = [known[parameter] for parameter in parameters]
    if not all(states):
        for i, parameter, state in zip(schedule.moving, parameters, states, strict=True):
            if not state:
                state.update(schedule.members[i].plan.fresh_state(parameter))
    dense = list(map(Tensor.contiguous, weights))
    copies = [(weight, copy) for weight, copy in zip(weights, dense, strict=True) if copy is not weight]
    for weight, _ in copies:
        if any(n > 1 and not by for n, by in zip(weight.shape, weight.stride(), strict=True)):
            raise ValueError(
                f"a parameter of shape {tuple(weight.shape)} has the strides {weight.stride()}, so that elements of it "
                f"share memory and cannot be changed one by one; give it memory of its own (p.data = p.data.clone())"
            )
    given = list(map(Tensor.contiguous, given))
    if any(map(Tensor.is_neg, given)):  # torch would negate them when it reads them; a kernel reads memory
        given = [gradient.resolve_neg() for gradient in given]
    schedule.run(schedule.spread(dense), schedule.spread(given), schedule.spread(states), rules)
    for weight, copy in copies:
        weight.copy_(copy)


def _refuse_shapes(schedule: Schedule, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Raise `ValueError` for a parameter of another shape than its plan's, or a gradient of another than it."""
    for i, weight, gradient in zip(schedule.moving, weights, gradients, strict=True):
        member = schedule.members[i]
        if weight.shape != member.shape:
            raise _changed_shape(member, weight)
        if gradient.shape != member.shape:
            raise ValueError(
                f"a gradient of {gradient.numel()} elements for the {weight.numel()} that this rank holds of the "
                f"parameter of {member.plan.shard.tensors[0].fqn!r}, of shape {tuple(gradient.shape)} and not "
                f"{tuple(weight.shape)}: the step would use those of other elements. Put back what backward() made; "
                f"under FSDP1 run the last backward pass before step() outside of no_sync()"
            )


def _changed_shape(member: Member, weight: Tensor) -> ValueError:
    """For a parameter of another shape than its plan's."""
    return ValueError(
        f"the parameter of {member.plan.shard.tensors[0].fqn!r} has the shape {tuple(weight.shape)} here and had "
        f"{member.shape} when its layout was read: its state belongs to the tensor as it was, and a step would read "
        f"past its end. Build a new optimizer for the parameters as they are now"
    )
