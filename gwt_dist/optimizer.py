"""`GWTAdamW`: Adam with moments in wavelet space, for whole tensors and for the fragments of a sharding engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from gwt_dist import dtensor
from gwt_dist.comm import Shard
from gwt_dist.plan import Plan, state_dtype
from gwt_dist.recipes import check_group, keeps_second_moment, rule_of
from gwt_dist.schedule import Member, Schedule
from gwt_dist.update import Rule

Group = dict[str, Any]
_NO_STATE: Group = {}
_SCHEDULES = 1024  # kept at once; a fused backward pass has one for each group of parameters


class GWTAdamW(torch.optim.Optimizer):
    r"""Adam whose moments live on the wavelet approximation of the gradient, ``2**level`` times smaller than AdamW's.

    Drop-in for `torch.optim.AdamW`. Tensors of two or more dimensions are read as ``[shape[0], rest]`` and transformed
    along their rows; scalars and 1-D tensors are level 0, which is AdamW. See `param_groups` for the usual choice of
    levels by module name.

    DTensor parameters (FSDP2, HSDP, tensor parallelism) are recognised at the first step. Under an engine that hides
    the layout of the weights behind flat buffers (DeepSpeed ZeRO, FSDP1), call `gwt_dist.attach(optimizer, engine)`
    once, or use `gwt_dist.initialize`. A step on such a buffer that was never attached raises; it never becomes another
    optimizer.

    Every keyword is also a key of a parameter group. State of a parameter: ``step`` (0-d fp32), ``exp_avg`` and
    ``exp_avg_sq`` (``[R, ceil(C / 2**level)]``, one packed vector for a flat buffer; fp32, or fp64 for fp64
    parameters) and ``limited_norm`` (one number a tensor). Without a second moment ``exp_avg_sq`` has what is level 0
    alone, and is not there where nothing is.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; a float or a 0-d tensor.
        betas: Decay rates of the first and second moment.
        eps: Added to the uncorrected ``sqrt(exp_avg_sq)``, as in the published code.
        weight_decay: Decoupled, multiplied by ``lr``.
        level: 0 (AdamW) to 16; moments shrink by ``2**level``.
        scale: Factor on the update of tensors with level > 0.
        wavelet: A discrete wavelet of PyWavelets, ``"haar"`` being the fast closed form.
        recipe: ``"energy"`` (second moment of the unit's energy, details weighted by their coherence, no limiter, no
            collective), ``"paper"`` (moment of the approximation, full details, norm-growth limiter 1.01) or
            ``"orthogonal"`` (momentum alone, half of the state; the update of the whole matrix is orthogonalized as
            Muon's, on one rank each, see `orthogonal`). Tensors of level 0 are AdamW under all of them.
        second_moment: ``"approximation"``, ``"energy"`` or ``"none"``, which orthogonalizes; None as the recipe says.
        detail_gain: Factor on the details, 0 to 1, or ``"coherence"``: at least ``1 - beta1``, and more for units
            whose gradients are steady, see `update.coherence`; None as the recipe says.
        limiter: Largest growth of the update's norm in one step, at least 1, or 0 for none; None as the recipe says.

    Raises:
        ValueError: For a value out of range, an unknown wavelet or recipe, or complex or sparse tensors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        level: int = 2,
        scale: float = 0.25,
        wavelet: str = "haar",
        recipe: str = "energy",
        second_moment: str | None = None,
        detail_gain: float | str | None = None,
        limiter: float | None = None,
    ) -> None:
        self._forget_layout()
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            level=level,
            scale=scale,
            wavelet=wavelet,
            recipe=recipe,
            second_moment=second_moment,
            detail_gain=detail_gain,
            limiter=limiter,
        )
        check_group(defaults, "the arguments of GWTAdamW")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`; raises `ValueError` for values out of range."""
        super().add_param_group(param_group)
        check_group(self.param_groups[-1], f"parameter group {len(self.param_groups) - 1}")
        for parameter in self.param_groups[-1]["params"]:
            self._given[parameter] = True

    def attach(self, shards: Mapping[Tensor, Shard]) -> None:
        """Take the layout of flat parameters as an engine adapter read it: parameter to what this rank holds of it.

        Users call `gwt_dist.attach`, which reads and checks the layout first. Raises `ValueError` if a parameter
        already has state in another layout.
        """
        for parameter, shard in shards.items():
            if self.state.get(parameter):
                raise ValueError(
                    f"the parameter that holds {shard.tensors[0].fqn!r} already has optimizer state; attach before the "
                    f"first step and before loading a checkpoint, or its moments would belong to other elements"
                )
            self._shards[parameter] = shard
            self._plans.pop(parameter, None)
        self._schedules.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        A parameter that ranks share joins its collectives whatever its gradient, so that all make the same calls.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned.

        Raises:
            ValueError: For a flat parameter of a sharding engine that was never attached, a sparse gradient, or a
                level or wavelet that was changed after the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._fused and getattr(self, "grad_scale", None) is not None:
            raise ValueError(
                "a GradScaler drives an optimizer whose update was fused into the backward pass: the update has taken "
                "the scaled gradient already. Train in bfloat16 without a scaler, or without fuse_backward"
            )
        fused = {id(parameter) for parameter in self._fused}
        self.update([p for group in self.param_groups for p in group["params"] if id(p) not in fused])
        return loss

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """One step of `parameters` alone; ranks that share them pass the same ones in the same order of calls."""
        chosen = {id(parameter) for parameter in parameters}
        members = [
            (number, parameter)
            for number, group in enumerate(self.param_groups)
            for parameter in group["params"]
            if id(parameter) in chosen
        ]
        rules = [rule_of(group) for group in self.param_groups]
        for schedule, numbers in self._scheduled(members, rules):
            self._run(schedule, [members[i][1] for i in numbers], rules)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Within it, backward passes only add to the gradients of parameters whose update is fused into them.

        For all micro-batches of a step but the last; without `fuse_backward` it changes nothing.
        """
        self._accumulating, before = True, self._accumulating
        try:
            yield
        finally:
            self._accumulating = before

    def fuse(self, parameters: Iterable[Tensor]) -> None:
        """Leave `parameters` out of `step`: `gwt_dist.fuse_backward` calls `update` for them in the backward pass."""
        for parameter in parameters:
            self._fused[parameter] = True
        # A GradScaler then calls `step` with its scale instead of unscaling gradients that are gone.
        self._step_supports_amp_scaling = True

    def state_dict(self) -> Group:
        """State as torch has it; tensors and plain numbers only, DTensors where the parameters are DTensors.

        Raises `ValueError` for parameters whose columns are cut within a unit: their moments are no DTensor, and a
        checkpoint would keep one rank's as if they were everyone's.
        """
        for parameter, state in self.state.items():
            if isinstance(parameter, DTensor) and not isinstance(state.get("exp_avg", parameter), DTensor):
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} with placements {parameter.placements} is cut "
                    f"within a unit, so ranks keep moments of the same unit and its state cannot be written as a "
                    f"DTensor. Shard its columns in multiples of 2**level, or lower its level"
                )
        return super().state_dict()

    def load_state_dict(self, state_dict: Group) -> None:
        """Load what `state_dict` returned; moments keep their own precision whatever the dtype of the parameter.

        Raises `ValueError`, before anything is changed, if levels or wavelets differ from this optimizer's or a moment
        does not have the size that this layout needs.
        """
        saved = state_dict["param_groups"]
        by_id: dict[Any, Tensor] = {}
        for i, (mine, theirs) in enumerate(zip(self.param_groups, saved, strict=False)):
            for key in ("level", "wavelet"):
                if theirs.get(key, mine[key]) != mine[key]:
                    raise ValueError(
                        f"{key} of parameter group {i} is {theirs[key]!r} in the state to load and {mine[key]!r} in "
                        f"this optimizer; its moments would mean something else. Build the optimizer with "
                        f"{key}={theirs[key]!r}"
                    )
            then, now = keeps_second_moment({**mine, **theirs}), keeps_second_moment(mine)
            if then != now and mine["level"]:
                raise ValueError(
                    f"parameter group {i} has {'a' if then else 'no'} second moment in the state to load (recipe "
                    f"{theirs.get('recipe')!r}) and {'one' if now else 'none'} in this optimizer (recipe "
                    f"{mine['recipe']!r}); its moments would mean something else. Build the optimizer as it was"
                )
            for key, parameter in zip(theirs["params"], mine["params"], strict=False):
                by_id[key] = parameter
                self._check_moments(state_dict["state"].get(key, {}), parameter, mine, i)
        super().load_state_dict(state_dict)
        # torch casts floating state to the dtype of the parameter, which bf16 moments do not survive, and it shares the
        # step with the state that was loaded.
        for key, values in state_dict["state"].items():
            parameter = by_id.get(key)
            if parameter is None:
                continue
            state = self.state[parameter]
            for name in ("exp_avg", "exp_avg_sq", "limited_norm"):
                if name in values:
                    state[name] = values[name].to(parameter.device, state_dtype(parameter.dtype), copy=True)
            if "step" in values:
                state["step"] = torch.as_tensor(values["step"]).to(parameter.device, torch.float32, copy=True)

    def __setstate__(self, state: Group) -> None:
        super().__setstate__(state)
        if "_given" not in self.__dict__:  # unpickled or deep-copied, rather than loading a state_dict
            self._forget_layout()
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._given[parameter] = True

    def _forget_layout(self) -> None:
        self._shards: WeakIdKeyDictionary = WeakIdKeyDictionary()  # attached parameter -> Shard
        self._plans: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> Plan
        self._given: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters that the user passed -> True
        self._fused: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters updated in the backward pass -> True
        # What is in a step -> its parameters and its schedules
        self._schedules: dict[Any, tuple[list[Any], list[tuple[Schedule, list[int]]]]] = {}
        self._accumulating = False

    def _scheduled(
        self, members: Sequence[tuple[int, Tensor]], rules: Sequence[Rule]
    ) -> list[tuple[Schedule, list[int]]]:
        """The schedules of a step, one a device, with the numbers of their members; kept from step to step."""
        key = (
            tuple(_form(group) for group in self.param_groups),
            tuple(rule.limiter > 0 for rule in rules),
            tuple((id(p), p.grad is None, p.dtype, p.device) for _, p in members),
        )
        known = self._schedules.get(key)
        if known is not None and all(reference() is p for reference, (_, p) in zip(known[0], members, strict=True)):
            return known[1]
        by_device: dict[torch.device, list[tuple[int, Member]]] = {}
        dry_run = False
        for i, (number, parameter) in enumerate(members):
            plan = self._plan(parameter, number)
            if plan is None:
                dry_run = True
            else:
                moves, limited = parameter.grad is not None, rules[number].limiter > 0
                member = Member(plan, number, parameter.dtype, moves, limited, rules[number].orthogonal)
                by_device.setdefault(dtensor.local(parameter.detach()).device, []).append((i, member))
        schedules = [
            (Schedule([member for _, member in found], device), [i for i, _ in found])
            for device, found in by_device.items()
        ]
        if not dry_run:  # which is known by the values of the gradients, and these may change
            if len(self._schedules) >= _SCHEDULES:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[key] = [weakref.ref(p) for _, p in members], schedules
        return schedules

    def _run(self, schedule: Schedule, parameters: Sequence[Tensor], rules: Sequence[Rule]) -> None:
        """One step of the members of a schedule."""
        states = []
        weights, gradients = [], []
        for member, parameter in zip(schedule.members, parameters, strict=True):
            if parameter.grad is None:
                states.append(_NO_STATE)
                weights.append(parameter)
                gradients.append(parameter)
                continue
            state = self.state[parameter]
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

    def _plan(self, parameter: Tensor, number: int) -> Plan | None:
        """The plan of a parameter, whatever its gradient: ranks that share it must make the same calls.

        None for the buffers of an engine's dry run.
        """
        plan: Plan | None = self._plans.get(parameter)
        group = self.param_groups[number]
        # What an engine took out of its group (ZeRO-3 keeps one buffer at a time there) has no number.
        place = next((f" {j}" for j, p in enumerate(group["params"]) if p is parameter), "")
        where = f"parameter{place} of group {number}"
        if plan is None:
            shard = self._shard(parameter, where)
            if shard is None:
                return None
            plan = self._plans[parameter] = Plan.of(shard, *_form(group))
        if (plan.level, plan.wavelet, plan.second_moment) != _form(group):
            raise ValueError(
                f"level={group['level']}, wavelet={group['wavelet']!r}{_with_second(keeps_second_moment(group))} of "
                f"{where} differ from level={plan.level}, wavelet={plan.wavelet!r}{_with_second(plan.second_moment)} "
                f"at its first step; its moments cannot follow. Build a new optimizer"
            )
        return plan

    def _shard(self, parameter: Tensor, where: str) -> Shard | None:
        """What this rank holds of a parameter: as attached, as its DTensor says, or the whole of it.

        None for the zero-gradient dry run that engines make on buffers of their own; raises on their first real step.
        """
        if parameter in self._shards:
            shard: Shard = self._shards[parameter]
            return shard
        if parameter.is_complex() or (parameter.grad is not None and parameter.grad.is_sparse):
            raise ValueError(f"{where} is complex or has a sparse gradient; GWTAdamW takes real, dense tensors")
        if isinstance(parameter, DTensor):
            return dtensor.shard_of(parameter, where)
        if hasattr(parameter, "_fsdp_flattened"):
            raise ValueError(
                f"{where} is a part of a flat parameter of FSDP1, and the rows of its tensors are unknown. Without "
                f"them this step would be another optimizer. Add gwt_dist.attach(optimizer, model) after both are built"
            )
        if getattr(parameter, "_is_sharded", False) or hasattr(parameter, "_param_shapes"):
            raise ValueError(
                f"{where} is a flat parameter of fairscale's FullyShardedDataParallel, {parameter.numel()} elements of "
                f"tensors whose rows are unknown here. Without them this step would be another optimizer. Add "
                f"gwt_dist.attach(optimizer, model) after the model is wrapped (FlattenParamsWrapper alone is not read)"
            )
        if parameter in self._given:
            return Shard.whole(where, tuple(parameter.shape))
        if parameter.grad is None or not parameter.grad.any():
            return None
        if parameter.dim() >= 2:
            return Shard.whole(where, tuple(parameter.shape))
        raise ValueError(
            f"{where} is a flat buffer of {parameter.numel()} elements that was not among the parameters given to "
            f"GWTAdamW: a sharding engine made it, and the rows of its tensors are unknown. Without them this step "
            f"would be another optimizer. Add gwt_dist.attach(optimizer, engine) after the engine is built, or build "
            f"it with gwt_dist.initialize"
        )

    def _check_moments(self, state: Mapping[str, Any], parameter: Tensor, group: Group, i: int) -> None:
        if parameter in self._shards:
            shard = self._shards[parameter]
        elif parameter in self._given and not isinstance(parameter, DTensor):
            shard = Shard.whole("", tuple(parameter.shape))
        else:
            return
        plan = Plan.of(shard, *_form(group))
        for name, expected in (("exp_avg", plan.moments_shape), ("exp_avg_sq", plan.second_shape)):
            if name in state and tuple(state[name].shape) != expected:
                raise ValueError(
                    f"{name} of a parameter in group {i} has shape {tuple(state[name].shape)} in the state to load and "
                    f"needs {expected} here; it was saved with another level, model, world size or engine"
                )


def _form(group: Mapping[str, Any]) -> tuple[int, str, bool]:
    """What decides which moments a group has."""
    return group["level"], group["wavelet"], keeps_second_moment(group)


def _with_second(kept: bool) -> str:
    return "" if kept else " without a second moment"
