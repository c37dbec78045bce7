"""Learning-rate schedules through a checkpoint: every class that torch, transformers and DeepSpeed have goes on with
equal state and equal rates, and a state that would mean something else here is refused.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as torch_schedules
from torch.optim import swa_utils

import gwt_dist
from gwt_dist import CheckpointError, GWTAdamW
from gwt_dist.checkpoint.values import decode
from test_values import same

BEFORE, AFTER = 4, 8
Build = Callable[[Any], Any]


class Halving:
    """A rate that depends on what the object remembers, as a user's own may."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, ...]] = {}

    def __call__(self, step: int) -> float:
        self.seen[step] = (step,)
        return 0.5 ** len(self.seen)


class Own:
    """A schedule of the user's, without base class."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.state = optimizer, {"steps": 0, "best": float("inf"), "done": {0}}

    def step(self) -> None:
        self.state["steps"] += 1
        self.state["done"].add(self.state["steps"])
        for group in self.optimizer.param_groups:
            rate = 0.1 * 0.5 ** self.state["steps"]
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], torch.Tensor) else rate

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


def sequential(o: Any) -> Any:
    inner = [torch_schedules.LinearLR(o, 0.1, total_iters=3), torch_schedules.MultiStepLR(o, [2, 5], 0.1)]
    return torch_schedules.SequentialLR(o, inner, milestones=[3])


def nested(o: Any) -> Any:
    inner = [torch_schedules.ConstantLR(o, 0.5, total_iters=2), torch_schedules.CosineAnnealingLR(o, 5)]
    return torch_schedules.ChainedScheduler(
        [torch_schedules.SequentialLR(o, inner, [5]), torch_schedules.StepLR(o, 3)], o
    )


S = torch_schedules
TORCH: dict[str, Build] = {
    "LambdaLR": lambda o: S.LambdaLR(o, [lambda step: 0.9**step, Halving()]),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, [lambda step: 0.9, Halving()]),
    "StepLR": lambda o: S.StepLR(o, 3),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [3, 5, 5, 7], 0.1),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, total_iters=6),
    "LinearLR": lambda o: S.LinearLR(o, 0.25, total_iters=7),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.7),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: S.PolynomialLR(o, 9, power=2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 9),
    "ChainedScheduler": nested,
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1, cooldown=1, threshold=0.01),
    "CyclicLR": lambda o: S.CyclicLR(o, [0.01, 0.02], [0.1, 0.3], 3, 4, mode="exp_range", gamma=0.9),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "OneCycleLR": lambda o: S.OneCycleLR(o, [0.1, 0.4], total_steps=15, three_phase=True),
    "SWALR": lambda o: swa_utils.SWALR(o, [0.05, 0.01], anneal_epochs=6),
}
MORE: dict[str, Build] = {
    "a custom scale": lambda o: S.CyclicLR(o, 0.01, 0.1, 3, scale_fn=Halving(), scale_mode="iterations"),
    "the largest of a metric": lambda o: S.ReduceLROnPlateau(
        o, mode="max", factor=0.8, patience=0, min_lr=[0.001, 0.01]
    ),
    "a linear average": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=9, anneal_strategy="linear"),
    "the user's own": Own,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")},
    "cosine_with_restarts": {"num_cycles": 2},
    "reduce_lr_on_plateau": {"patience": 1},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
    "greedy": {"patience": 1, "smooth": True, "min_lr": 1e-4},
}
DEEPSPEED: dict[str, dict[str, Any]] = {
    "LRRangeTest": {"lr_range_test_step_size": 2},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 3},
    "WarmupLR": {"warmup_num_steps": 6},
    "WarmupDecayLR": {"total_num_steps": 15, "warmup_num_steps": 6},
    "WarmupCosineLR": {"total_num_steps": 15, "warmup_num_steps": 6},
}


def of_torch() -> set[str]:
    """The names of all schedules that torch has."""
    found = {
        one
        for module in (torch_schedules, swa_utils)
        for one in vars(module).values()
        if inspect.isclass(one) and issubclass(one, S.LRScheduler) and one not in (S.LRScheduler, S._LRScheduler)
    }
    return {one.__name__ for one in found}


def build_of(family: str, name: str) -> Build:
    if family == "transformers":
        from transformers import get_scheduler

        return lambda o: get_scheduler(name, o, 2, 15, dict(TRANSFORMERS[name]))
    if family == "deepspeed":
        from deepspeed.runtime import lr_schedules

        return lambda o: getattr(lr_schedules, name)(o, **DEEPSPEED[name])
    return {**TORCH, **MORE}[name]


ALL = [
    *(("torch", name) for name in {**TORCH, **MORE}),
    *(("transformers", name) for name in TRANSFORMERS),
    *(("deepspeed", name) for name in DEEPSPEED),
]


class Run:
    """Two parameter groups of different rates, and a schedule over them."""

    def __init__(self, build: Build | None, tensor: bool = False, rates: tuple[float, ...] = (0.1, 0.3)) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in rates)
        groups = [
            {"params": list(part.parameters()), "lr": torch.tensor(rate) if tensor else rate}
            for part, rate in zip(self.model, rates, strict=True)
        ]
        self.optimizer = GWTAdamW(groups, level=0)
        self.schedule = None if build is None else build(self.optimizer)

    def train(self, steps: range) -> list[Any]:
        """What each step leaves in the groups: rates, momentums and what else a schedule keeps there."""
        found = []
        for step in steps:
            for parameter in self.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            self.optimizer.step()
            takes_metric = "metrics" in inspect.signature(self.schedule.step).parameters
            self.schedule.step(*([1.0 if step > 2 else 2.0 - step] if takes_metric else []))
            found.append(copy.deepcopy(self.options()))
        return found

    def options(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]

    def save(self, path: Path, step: int = BEFORE, **keywords: Any) -> Path:
        return gwt_dist.save(path, self.model, self.optimizer, step=step, **{"scheduler": self.schedule, **keywords})

    def load(self, path: Path, **keywords: Any) -> Any:
        return gwt_dist.load(path, self.model, self.optimizer, **{"scheduler": self.schedule, **keywords})


def test_every_schedule_of_torch_is_tried() -> None:
    """A class that torch adds is to be added to `TORCH`."""
    assert of_torch() == set(TORCH)


def test_every_schedule_of_others_is_tried() -> None:
    from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
    from transformers.trainer_utils import SchedulerType

    assert {one.value for one in SchedulerType} == set(TRANSFORMERS)
    assert set(VALID_LR_SCHEDULES) == set(DEEPSPEED)


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(("family", "name"), ALL)
def test_a_schedule_goes_on(tmp_path, family, name, tensor) -> None:
    build = build_of(family, name)
    through = Run(build, tensor)
    through.train(range(BEFORE))
    through.save(tmp_path)
    state = copy.deepcopy(through.schedule.state_dict())
    at_save = copy.deepcopy(through.options())
    expected = through.train(range(BEFORE, BEFORE + AFTER))
    assert len({repr([group["lr"] for group in step]) for step in expected}) > 1 or name.startswith("constant")
    again = Run(build, tensor)
    again.load(tmp_path)
    assert same(again.schedule.state_dict(), state)
    assert same(again.options(), at_save)
    assert same(again.train(range(BEFORE, BEFORE + AFTER)), expected)


def test_a_schedule_goes_on_through_accelerate(tmp_path) -> None:
    """Its wrapper has no state and no class of its own; with it and without it are the same schedule."""
    from accelerate.scheduler import AcceleratedScheduler

    for wrapped_then, wrapped_now in ((True, False), (False, True)):
        through, again = Run(TORCH["StepLR"]), Run(TORCH["StepLR"])
        through.train(range(BEFORE))
        given = AcceleratedScheduler(through.schedule, [through.optimizer])
        path = tmp_path / str(wrapped_then)
        through.save(path, scheduler=given if wrapped_then else through.schedule)
        taking = AcceleratedScheduler(again.schedule, [again.optimizer])
        again.load(path, scheduler=taking if wrapped_now else again.schedule)
        assert again.train(range(BEFORE, 9)) == through.train(range(BEFORE, 9))


@pytest.mark.parametrize("name", ["MultiStepLR", "SequentialLR"])
def test_schedules_of_version_2(tmp_path, name) -> None:
    """JSON had made text of the milestones; they are numbers again, and the rates fall where they should."""
    through, again = Run(TORCH[name]), Run(TORCH[name])
    through.train(range(BEFORE))
    index = as_version_2(through.save(tmp_path))
    assert '"milestones": {"' in json.dumps(index["scheduler"])
    again.load(tmp_path)
    assert same(again.schedule.state_dict(), through.schedule.state_dict())
    assert again.train(range(BEFORE, 9)) == through.train(range(BEFORE, 9))


def test_a_schedule_that_version_2_wrote_twice(tmp_path) -> None:
    """The engine's own, given to `save` as well, is one schedule."""
    through, again = Run(TORCH["StepLR"]), Run(TORCH["StepLR"])
    through.train(range(BEFORE))
    folder = through.save(tmp_path)
    index = as_version_2(folder)
    index["engine"] = {"counters": {"global_steps": 4}, "loss_scale": {}, "lr_scheduler": index["scheduler"]}
    rewrite(folder, json.dumps(index))
    again.load(tmp_path)
    assert again.train(range(BEFORE, 9)) == through.train(range(BEFORE, 9))


def as_version_2(folder: Path) -> dict[str, Any]:
    """Write the index of a checkpoint anew, as it was before values had types."""
    index = json.loads((folder / "index.json").read_text())
    state = plain(decode(index["scheduler"]["state"], "state"))
    index |= {"version": 2, "scheduler": state}
    for key in ("engine_schedule", "excluded", "tied"):
        del index[key]
    for entry in index["tensors"].values():
        entry["fields"] = {name: {"extent": field["extent"]} for name, field in entry["fields"].items()}
    rewrite(folder, json.dumps(index))
    return index


def plain(value: Any) -> Any:
    """What JSON makes of a value by itself."""
    return json.loads(json.dumps(value))


def rewrite(folder: Path, text: str) -> None:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    (folder / "index.json").write_text(text)
    (folder / "index.json.sha256").write_text(f"{sha256}  index.json\n")
    (folder.parent / "latest").write_text(f"{sha256}  {folder.name}/index.json\n")


# ---- what does not fit


def another_optimizer(run: Run) -> Any:
    return TORCH["StepLR"](GWTAdamW(run.model.parameters(), lr=0.1, level=0))


MISFITS: dict[str, tuple[Build | None, Callable[[Run], Any], str]] = {
    "nobody": (
        TORCH["StepLR"],
        lambda run: None,
        r"has the state of StepLR \(given to save\), and nothing here takes it",
    ),
    "nothing": (
        None,
        lambda run: run.schedule,
        r"has no state of a scheduler, and here is StepLR \(the scheduler given",
    ),
    "another class": (
        TORCH["CosineAnnealingLR"],
        lambda run: run.schedule,
        "has the state of a CosineAnnealingLR, and the scheduler given to load is a StepLR, to which it would mean",
    ),
    "others within": (
        TORCH["SequentialLR"],
        lambda run: S.SequentialLR(run.optimizer, [S.StepLR(run.optimizer, 3), S.StepLR(run.optimizer, 2)], [3]),
        r"has the state of a SequentialLR\[LinearLR, MultiStepLR\], and .* is a SequentialLR\[StepLR, StepLR\]",
    ),
    "fewer within": (
        TORCH["ChainedScheduler"],
        lambda run: S.ChainedScheduler([run.schedule]),
        r"a ChainedScheduler\[SequentialLR\[ConstantLR, CosineAnnealingLR\], StepLR\], and .*\[StepLR\]",
    ),
    "another optimizer": (TORCH["StepLR"], another_optimizer, "sets the rates of another optimizer than the one that"),
    "no schedule": (TORCH["StepLR"], lambda run: True, "scheduler is a bool, which has no load_state_dict"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_schedule_that_does_not_fit_is_refused(tmp_path, case) -> None:
    build, given, message = MISFITS[case]
    Run(build).save(tmp_path)
    run = Run(TORCH["StepLR"])
    run.train(range(2))
    schedule, before = given(run), copy.deepcopy([run.options(), list(run.model.parameters())])
    state = copy.deepcopy(schedule.state_dict()) if hasattr(schedule, "state_dict") else None
    with pytest.raises(CheckpointError, match=message):
        run.load(tmp_path, scheduler=schedule)
    assert same([run.options(), list(run.model.parameters())], before)
    assert state is None or same(schedule.state_dict(), state)


class Slotted:
    """A rate of which torch cannot read what it remembers."""

    __slots__ = ()

    def __call__(self, step: int) -> float:
        return 0.9**step


def test_a_state_that_cannot_be_read_names_its_schedule(tmp_path) -> None:
    model = nn.Linear(4, 4)
    optimizer = GWTAdamW(model.parameters(), level=1)
    schedule = torch_schedules.LambdaLR(optimizer, Slotted())
    with pytest.raises(CheckpointError, match=r"state_dict of scheduler \(LambdaLR\) cannot be read: AttributeError"):
        gwt_dist.save(tmp_path, model, optimizer, step=0, scheduler=schedule)
    assert not list(tmp_path.iterdir())


def test_false_leaves_schedules_as_they_are(tmp_path) -> None:
    through, again = Run(TORCH["ExponentialLR"]), Run(TORCH["StepLR"])
    through.train(range(BEFORE))
    through.save(tmp_path)
    before = copy.deepcopy(again.schedule.state_dict())
    again.load(tmp_path, scheduler=False)
    assert same(again.schedule.state_dict(), before)
    assert [g["lr"] for g in again.options()] == [g["lr"] for g in through.options()]


def test_nothing_changes_if_a_schedule_does_not_take_its_state(tmp_path) -> None:
    """One that sets rates where it loads, and then raises."""

    class Hasty(Own):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.optimizer.param_groups[0]["lr"] = 7.0
            super().load_state_dict(state)
            if state["steps"] == BEFORE:
                raise KeyError("last_epoch")

    through, again = Run(Hasty), Run(Hasty)
    through.train(range(BEFORE))
    through.save(tmp_path)
    again.train(range(1))
    before = copy.deepcopy([again.options(), again.schedule.state_dict(), list(again.model.parameters())])
    with pytest.raises(CheckpointError, match=r"given to load does not take the state in the checkpoint: KeyError"):
        again.load(tmp_path)
    assert same([again.options(), again.schedule.state_dict(), list(again.model.parameters())], before)


def regrouped(run: Run, order: list[list[int]], build: Build, rates: list[float]) -> Run:
    """The same tensors in other parameter groups."""
    parts = [list(part.parameters()) for part in run.model]
    run.optimizer = GWTAdamW([{"params": [p for i in one for p in parts[i]]} for one in order], level=0)
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    run.schedule = build(run.optimizer)
    return run


GROUPS: dict[str, tuple[list[float], list[list[int]], list[float]]] = {
    "three into two": ([0.1, 0.2, 0.3], [[0, 1], [2]], [0.1, 0.3]),
    "another order": ([0.1, 0.2], [[1], [0]], [0.2, 0.1]),
    "one into two": ([0.1, 0.2], [[0, 1]], [0.1]),
}


@pytest.mark.parametrize("name", ["ExponentialLR", "LambdaLR", "OneCycleLR"])
@pytest.mark.parametrize("case", GROUPS)
def test_rates_of_other_groups_are_refused(tmp_path, case, name) -> None:
    rates, order, now = GROUPS[case]
    builds = {
        "ExponentialLR": TORCH["ExponentialLR"],
        "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
        "OneCycleLR": lambda o: S.OneCycleLR(o, [group["lr"] for group in o.param_groups], total_steps=15),
    }
    through = Run(builds[name], rates=tuple(rates))
    through.train(range(BEFORE))
    through.save(tmp_path)
    again = regrouped(Run(None, rates=tuple(rates)), order, builds[name], now)
    before = copy.deepcopy([again.options(), again.schedule.state_dict()])
    message = "has values for . parameter groups, and the . here are not these|had .*lr.* of their own in"
    with pytest.raises(CheckpointError, match=message):
        again.load(tmp_path)
    assert same([again.options(), again.schedule.state_dict()], before)


@pytest.mark.parametrize("order", [[[0, 1], [2]], [[0], [1], [2]], [[2, 1, 0]], [[2], [1], [0]]])
def test_equal_rates_go_to_any_groups(tmp_path, order) -> None:
    """Three groups of one rate: as many values as there are groups here, and the first step writes the right rates."""
    for name in ("ExponentialLR", "SequentialLR", "CosineAnnealingLR"):
        through = Run(TORCH[name], rates=(0.1, 0.1, 0.1))
        through.train(range(BEFORE))
        through.save(tmp_path / name)
        again = regrouped(Run(None, rates=(0.1, 0.1, 0.1)), order, TORCH[name], [0.1] * len(order))
        again.load(tmp_path / name)
        expected = [group[0]["lr"] for group in through.train(range(BEFORE, 9))]
        assert [{g["lr"] for g in step} for step in again.train(range(BEFORE, 9))] == [{rate} for rate in expected]


def test_milestones_are_not_rates(tmp_path) -> None:
    """As many as there are groups, and these in another order: they stay."""

    def build(o: Any) -> Any:
        return S.SequentialLR(o, [S.ExponentialLR(o, factor) for factor in (0.9, 0.8, 0.7)], [2, 6])

    through = Run(build, rates=(0.1, 0.1))
    through.train(range(BEFORE))
    through.save(tmp_path)
    again = regrouped(Run(None, rates=(0.1, 0.1)), [[1], [0]], build, [0.1, 0.1])
    again.load(tmp_path)
    assert same(again.schedule.state_dict(), through.schedule.state_dict())
