"""What the recipe sees of its optimizer: which tensors the limiter held back, and where the time went."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gwt_dist import GWTAdamW, param_groups
from gwt_dist.memory import plan_zero, specs
from gwt_dist.train.metrics import PHASES
from gwt_dist.train.summary import Summary, measure
from gwt_dist.train.watch import Clock, OptimizerWatch


def watched(optimizer: torch.optim.Optimizer) -> OptimizerWatch:
    return OptimizerWatch(SimpleNamespace(basic_optimizer=optimizer, device=torch.device("cpu")))


def stepped(optimizer: Any, watch: OptimizerWatch, factors: list[float]) -> dict[str, float | None]:
    """One step with the same gradients times a factor each; what is logged of it."""
    torch.manual_seed(0)
    for group in optimizer.param_groups:
        for parameter, factor in zip(group["params"], factors, strict=True):
            parameter.grad = factor * torch.randn_like(parameter)
    watch.remember_norms()
    optimizer.step()
    return watch.limited_norms()


@pytest.mark.parametrize("limiter", [1.01, 1.5])
def test_just_the_tensors_that_the_limiter_held_back_are_counted(limiter: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(6, 9)) for _ in range(4)]
    optimizer = GWTAdamW(parameters, level=2, recipe="paper", limiter=limiter, betas=(0.0, 0.99))
    watch = watched(optimizer)
    assert stepped(optimizer, watch, [1, 1, 1, 1])["limited_share"] == 0  # nothing to compare with yet
    for _ in range(3):  # the denominator grows
        assert stepped(optimizer, watch, [1, 1, 1, 1])["limited_share"] == 0
    before = [float(optimizer.state[p]["limited_norm"]) for p in parameters]
    # The first two grow, the third shrinks, and the last has no gradient, whose norm nothing remembers.
    found = stepped(optimizer, watch, [10, 10, 0.1, 0])
    after = [float(optimizer.state[p]["limited_norm"]) for p in parameters]
    assert after[:2] == pytest.approx([limiter * norm for norm in before[:2]], rel=1e-6)
    assert after[2] < before[2] and after[3] == before[3]
    assert found == {
        "limited_norm_mean": pytest.approx(sum(after) / 4, rel=1e-12),
        "limited_norm_max": max(after),
        "limited_share": 0.5,
    }


def test_tensors_without_a_limiter_do_not_count() -> None:
    matrix, vector, free = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 8), (8,), (4, 8)))
    groups = [{"params": [matrix]}, {"params": [vector], "level": 0}, {"params": [free], "limiter": 0}]
    optimizer = GWTAdamW(groups, level=1, recipe="paper")
    watch = watched(optimizer)
    stepped(optimizer, watch, [1.0])
    found = stepped(optimizer, watch, [3.0])
    assert found["limited_norm_mean"] == found["limited_norm_max"] == float(optimizer.state[matrix]["limited_norm"])
    assert found["limited_share"] == 1


def test_the_plan_and_the_run_count_by_the_level_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias in a group of level 1 is of a group with a level in both."""
    model = torch.nn.ModuleDict({"attn": torch.nn.Linear(8, 4), "norm": torch.nn.LayerNorm(8)})
    model["emb"] = torch.nn.Embedding(6, 8)
    for rest in ({}, {"level": 1, "recipe": "energy"}):
        groups = param_groups(model, 2, "attn", rest=rest, recipe="energy")
        planned = plan_zero(specs(model.named_parameters(), groups), stage=1, world_size=1, rank=0)
        optimizer = GWTAdamW(groups)
        watch = watched(optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
        found = measure(list(model.parameters()), watch)
        assert (found.wavelet_moments, found.wavelet_adamw) == (planned.wavelet, planned.wavelet_adamw)
        assert (found.plain_moments, found.plain_adamw) == (planned.rest, planned.rest_adamw)
        assert (planned.rest == 0) == bool(rest)
        end = Summary(1, 0.0, 0.0, 0.0, 0.0, {}, "GWTAdamW", 1, (found,), (planned,))
        assert set(end.as_dict()["state_a_weight"]) == {"model", "leveled"}
        assert "moments, groups with a level" in end.table()


@pytest.mark.parametrize("kind", ["energy", "AdamW"])
def test_there_is_nothing_to_say_where_nothing_is_limited(kind: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 8))
    energy = kind == "energy"
    optimizer = GWTAdamW([parameter], recipe="energy", level=2) if energy else torch.optim.AdamW([parameter])
    watch = watched(optimizer)
    for _ in range(2):
        found = stepped(optimizer, watch, [1.0])
    assert list(found.values()) == [None] * 3


def test_each_moment_is_in_one_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock(synchronize=False)
    for phase, seconds in (("other", 1.0), ("forward", 2.0), ("optimizer", 4.0)):
        now += seconds
        clock.lap(phase)
    clock.merge("first step")
    assert clock.total("optimizer") == 0
    for phase, seconds in (("optimizer", 0.5), ("data", 8.0), ("optimizer", 0.25)):
        now += seconds
        clock.lap(phase)
    taken = clock.take()
    assert taken == {"first step": 7.0, "data": 8.0, "optimizer": 0.75}
    assert list(taken) == [phase for phase in PHASES if phase in taken]
    assert clock.take() == {}
    now += 16
    clock.lap("optimizer")
    assert clock.total("optimizer") == 16.75 and clock.take() == {"optimizer": 16.0}
