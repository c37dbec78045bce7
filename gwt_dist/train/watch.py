"""What the loop sees of the optimizer that DeepSpeed hides: levels, gradients, limiter norms; and where time goes."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from gwt_dist import GWTAdamW
from gwt_dist.declare import Extent, Pass, Rule
from gwt_dist.programs import LIMITED_NORM
from gwt_dist.recipes import rule_of
from gwt_dist.train.metrics import PHASES

# A limiter that acts leaves exactly its factor of growth, which fp32 rounds: closer to it than this is the same.
_ROUNDING = 1e-6


class Clock:
    """Seconds by phase; each moment from the start on is in exactly one.

    Args:
        synchronize: Whether to wait for the accelerator at the end of each phase, without which the time of a kernel
            would be counted where the host first waits for it.
    """

    def __init__(self, *, synchronize: bool) -> None:
        self._synchronize = synchronize
        self._since: dict[str, float] = defaultdict(float)  # the last `take`
        self._total: dict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the lap before was spent in `phase`."""
        if self._synchronize:
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self._since[phase] += now - self._last
        self._last = now

    def merge(self, phase: str) -> None:
        """All since the last `take` was of `phase`."""
        together = sum(self._since.values())
        self._since.clear()
        self._since[phase] = together

    def take(self) -> dict[str, float]:
        """Seconds since the last `take`, by phase, in the order of `PHASES`; to the microsecond."""
        taken = {phase: self._since[phase] for phase in PHASES if phase in self._since}
        self._since.clear()
        for phase, seconds in taken.items():
            self._total[phase] += seconds
        return {phase: round(seconds, 6) for phase, seconds in taken.items()}

    def total(self, phase: str) -> float:
        """Seconds in `phase` from the start on."""
        return self._total.get(phase, 0.0) + self._since.get(phase, 0.0)


class OptimizerWatch:
    """Times the inner optimizer and sees what it is given, by torch's own step hooks.

    DeepSpeed hides which flat buffer belongs to which parameter group outside of a step (ZeRO-3
    even empties the groups), so the level of each buffer is taken down during the steps.

    Args:
        engine: DeepSpeed engine.
    """

    def __init__(self, engine: Any) -> None:
        self.optimizer: torch.optim.Optimizer = engine.basic_optimizer or engine.optimizer
        self.levels: dict[Tensor, int] = {}
        self.gradient_bytes: dict[Tensor, int] = {}
        rules = [rule_of(g) for g in self.optimizer.param_groups] if isinstance(self.optimizer, GWTAdamW) else []
        programs = [program for rule in rules for program in (rule.program, rule.plain)]
        # Names of state that there is one number of a tensor.
        self.scalars = {"step", *(name for program in programs for name in program.names(Extent.TENSOR))}
        self.clock = Clock(synchronize=engine.device.type != "cpu")
        self._limiters: dict[Tensor, float] = {}
        self._norms_before: dict[Tensor, Tensor] = {}
        self.optimizer.register_step_pre_hook(self._before)
        self.optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self.levels:
                    self.levels[parameter] = int(group.get("level", 0))
                    self._limiters[parameter] = _limiter(rule_of(group)) if isinstance(optimizer, GWTAdamW) else 0.0
                    gradient = parameter.grad
                    held = 0 if gradient is None else gradient.numel() * gradient.element_size()
                    self.gradient_bytes[parameter] = held
        self.clock.lap("engine")

    def _after(self, *_: Any) -> None:
        self.clock.lap("optimizer")

    def remember_norms(self) -> None:
        """Before a step after which `limited_norms` is asked for."""
        self._norms_before = {parameter: norm.clone() for parameter, norm in self._norms()}

    def limited_norms(self) -> dict[str, float | None]:
        """Of the tensors that have a limiter, after the step since `remember_norms`.

        The state of every rank holds the norms of all its tensors, those of which it has no element too, so nothing is
        sent. One wait for the device.

        Returns:
            ``limited_norm_mean`` and ``limited_norm_max`` of the norms that the state holds, and ``limited_share``: how
            many of the tensors were held back in this step. None where no tensor has a limiter.
        """
        found = []
        for parameter, norm in self._norms():
            limiter = self._limiters.get(parameter, 0.0)
            if limiter:
                after = norm.double().view(-1)
                before = self._norms_before.get(parameter, torch.zeros_like(norm)).double().view(-1)
                held_back = (before > 0) & (after >= limiter * (before + 1e-8) * (1 - _ROUNDING))
                found.append(torch.stack((after, held_back.double())))
        self._norms_before = {}
        names = ("limited_norm_mean", "limited_norm_max", "limited_share")
        if not found:
            return dict.fromkeys(names)
        after, held_back = torch.cat(found, dim=1)
        have = (after > 0).double()  # not those that no limiter acts on: level 0, and before the first gradient
        count = have.sum()
        sums = torch.stack((after.sum() / count, after.max(), (held_back * have).sum() / count)).tolist()
        return dict(zip(names, sums, strict=True)) if sums[1] > 0 else dict.fromkeys(names)

    def _norms(self) -> list[tuple[Tensor, Tensor]]:
        states = self.optimizer.state.items()
        name = LIMITED_NORM.name
        return [(parameter, state[name]) for parameter, state in states if name in state]


def _limiter(rule: Rule) -> float:
    """The largest growth of an update's norm where the program of a rule settles it; 0 where none does."""
    settles = any(isinstance(phase, Pass) and phase.then for phase in rule.program.phases)
    return rule["limiter"] if settles and LIMITED_NORM in rule.program.fields else 0.0
