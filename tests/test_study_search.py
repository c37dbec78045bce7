"""Which runs of a study come next, and what its results say of a row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gwt_dist.study import compare as whole
from gwt_dist.study.config import Point, Study, study_from
from gwt_dist.study.plan import FULL, SEEDS, SHORT, beside, outcome, ranked, wanted
from gwt_dist.study.table import paired
from small_study import ROWS, settings_in


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return settings_in(tmp_path)


@pytest.mark.parametrize(("last", "best"), [(1.9, 0.04), (1.7, 0.08)])
def test_rates_until_both_neighbours_are_worse_then_the_other_seeds(
    settings: dict[str, Any], last: float, best: float
) -> None:
    rows = [{"name": "a", "optimizer": "gwt", "lr": [0.01, 0.02, 0.04, 0.08]}]
    study = study_from(settings | {"rows": rows, "extend": 1}, "here")
    results: dict[str, dict[str, Any]] = {}

    def end(losses: dict[float, float]) -> list[tuple[float, int, int, int]]:
        runs = wanted(study, "shared", results)
        for run in runs:
            results[run.key] = {"status": "ok", "validation_loss": losses[run.lr]}
        return [(run.lr, run.seed, run.steps, run.stage) for run in runs]

    assert end({0.01: 3.0, 0.02: 2.0, 0.04: 4.0, 0.08: 5.0}) == [(lr, 0, 2, SHORT) for lr in (0.01, 0.02, 0.04, 0.08)]
    assert end({0.01: 2.1, 0.02: 1.9, 0.04: 1.8}) == [(lr, 0, 8, FULL) for lr in (0.01, 0.02, 0.04)]
    assert end({0.08: last}) == [(0.08, 0, 8, FULL)]  # the best was the highest: one further
    assert end({best: 1.6}) == [(best, 1, 8, SEEDS)]
    assert end({}) == []
    found = outcome(study, "shared", study.rows[0], study.batches[0], results)
    assert (found.best, found.edge) == (Point(best, best, 0.0), best == 0.08)
    assert [point.lr for point in found.points] == [0.01, 0.02, 0.04, 0.08]
    assert found.trials == 4 + 3 + 1
    assert [run["validation_loss"] for run in found.runs] == [min(last, 1.8), 1.6]


def end(study: Study, results: dict[str, dict[str, Any]], loss: Any, row: str = "") -> list[tuple[float, ...]]:
    """End all runs that are wanted, with `loss(run)`; returns their settings and steps."""
    runs = wanted(study, "shared", results, row)
    for run in runs:
        results[run.key] = {"status": "ok", "validation_loss": loss(run), "seed": run.seed}
    return [(run.lr, run.rest_lr, run.options["weight_decay"], run.steps) for run in runs]


def test_each_setting_is_searched_with_the_best_of_those_before(settings: dict[str, Any]) -> None:
    row = {"name": "a", "optimizer": "adamw", "lr": [0.01, 0.02], "rest_lr": [0.1, 0.2, 0.4], "weight_decay": [0, 0.1]}
    more = {"name": "b", "optimizer": "sgd", "like": "a"}
    study = study_from(settings | {"rows": [row, more], "extend": 1}, "here")
    results: dict[str, dict[str, Any]] = {}

    def loss(run: Any) -> float:
        return abs(run.lr - 0.02) + abs(run.rest_lr - 0.8) + run.options["weight_decay"] + 0.01 * run.seed

    assert end(study, results, loss) == [(0.01, 0.2, 0, 2), (0.02, 0.2, 0, 2)]
    assert end(study, results, loss) == [(0.04, 0.2, 0, 2)]  # the best was the highest: one further
    assert end(study, results, loss) == [(0.02, 0.1, 0, 2), (0.02, 0.4, 0, 2)]
    assert end(study, results, loss) == [(0.02, 0.8, 0, 2)]
    assert end(study, results, loss) == [(0.02, 0.8, 0.1, 2)]  # of decays there is no further one
    assert end(study, results, loss) == [(0.01, 0.8, 0, 8), (0.02, 0.8, 0, 8), (0.04, 0.8, 0, 8)]
    # The seeds, and the row that takes these settings as they are.
    assert end(study, results, loss) == [(0.02, 0.8, 0, 8), (0.02, 0.8, 0, 8)]
    assert end(study, results, loss) == [(0.02, 0.8, 0, 8)]
    assert end(study, results, loss) == []
    found = [outcome(study, "shared", one, study.batches[0], results) for one in study.rows]
    assert [(one.best, one.trials, len(one.runs)) for one in found] == [
        (Point(0.02, 0.8, 0.0), 3 + 3 + 1 + 3, 2),
        (Point(0.02, 0.8, 0.0), 1, 2),
    ]


def test_a_run_that_would_not_end_in_time_is_not_started(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(whole.time, "monotonic", lambda: now[0])
    long, other, *_ = wanted(study_from(settings | {"short": 1.0}, "here"), "shared", {})
    short = dataclasses.replace(long, steps=long.steps // 4)
    deadline = whole._Deadline(60.0)
    assert deadline.allows(long)  # nothing is known yet
    deadline.ended(short, {"status": "ok", "seconds": 10.0})
    deadline.ended(short, {"status": "diverged", "seconds": 1000.0})
    assert deadline.allows(long) and deadline.allows(other)  # 40 of 60 seconds
    now[0] = 125.0
    assert not deadline.allows(long) and deadline.allows(short) and not deadline.over
    now[0] = 160.0
    assert deadline.over and not deadline.allows(short)
    assert whole._Deadline(None).allows(long) and not whole._Deadline(None).over


def test_differences_are_of_the_same_seeds() -> None:
    runs = [{"seed": seed, "validation_loss": loss} for seed, loss in ((0, 1.0), (1, 2.0), (2, 4.0))]
    others = [{"seed": seed, "validation_loss": loss} for seed, loss in ((2, 4.5), (0, 1.1))]
    mean, error = paired(runs, others)
    assert (mean, error) == (pytest.approx(-0.3), pytest.approx(0.2))  # -0.1 and -0.5
    assert paired(runs[:1], others) == (pytest.approx(-0.1), None)
    assert paired(runs[1:2], others) is None


def test_the_order_of_rates() -> None:
    ok = [{"status": "ok", "validation_loss": loss} for loss in (3.0, 2.0, 2.0)]
    assert ranked((0.1, 0.2, 0.4), ok) == [0.2, 0.4, 0.1]
    assert ranked((0.1, 0.2), [{"status": "diverged"}, ok[0]]) == [0.2]
    assert [beside(0.2, (0.1, 0.2, 0.5), 2, towards) for towards in (-1, 1)] == [0.1, 0.5]
    assert [beside(lr, (0.1, 0.2, 0.5), 2, towards) for lr, towards in ((0.1, -1), (0.5, 1))] == [0.05, 1.0]


def test_rows_of_priority_1_come_first_and_whole(settings: dict[str, Any]) -> None:
    rows = [dict(row, priority=priority) for row, priority in zip(ROWS, (3, 1), strict=True)]
    study = study_from(settings | {"rows": rows}, "here")
    assert [run.row for run in wanted(study, "", {})] == ["adamw", "energy", "energy"]
    assert [run.row for run in wanted(study, "", {}, "energy")] == ["energy", "energy"]
