"""Which runs come next: settings at part of the length, the best and its neighbours, other seeds. Pure functions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gwt_dist.study.config import Batch, Point, Row, Study
from gwt_dist.study.optimizers import options_of

SHORT, FULL, SEEDS = 0, 1, 2  # stages
STAGES = ("settings at part of the length", "rates at full length", "other seeds")
Results = Mapping[str, Mapping[str, Any]]  # by `Run.key`
FINISHED = ("ok", "diverged", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run. `key` names all that determines its result."""

    row: str
    optimizer: str
    options: dict[str, Any]
    lr: float
    rest_lr: float
    seed: int
    tokens: int
    steps: int
    key: str
    stage: int = field(compare=False)
    priority: int = field(compare=False)

    @property
    def cost(self) -> int:
        """Tokens that the run trains on."""
        return self.tokens * self.steps


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of one row at one batch size.

    `points` are those tried at any length, `best` the one that the seeds are for (None: no run at full length has ended
    well yet), `runs` those at full length and the best point that ended well, `edge` whether the best rate is the first
    or the last of those tried at full length, `wanted` what is still to be run, `trials` the runs that chose.
    """

    points: tuple[Point, ...] = ()
    best: Point | None = None
    runs: tuple[Mapping[str, Any], ...] = ()
    edge: bool = False
    wanted: tuple[Run, ...] = ()
    reasons: tuple[str, ...] = ()
    trials: int = 0


def make_run(study: Study, shared: str, row: Row, batch: Batch, point: Point, seed: int, stage: int) -> Run:
    """The run of `row` at a point and a seed; `shared` identifies what all runs share (text, model)."""
    steps = short_steps(study, batch) if stage == SHORT else batch.steps
    given = row.options | {"weight_decay": point.weight_decay}
    options = options_of(row.optimizer, given, f"row {row.name!r}")
    values: dict[str, Any] = {
        "optimizer": row.optimizer,
        "options": options,
        "lr": point.lr,
        "rest_lr": point.rest_lr,
        "seed": seed,
        "tokens": batch.tokens,
        "steps": steps,
    }
    text = json.dumps([shared, values], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Run(row=row.name, **values, key=key, stage=stage, priority=row.priority)


def shared_by_all(study: Study, corpus_sha256: str, shapes: Mapping[str, Any], device: str = "cpu") -> str:
    """What all runs of a study have in common, as text that changes when any of it does."""
    keys = (
        *("precision", "compile", "attention", "tokenizer", "sequence_length", "micro_batch", "eval_tokens"),
        *("warmup", "min_lr_ratio", "clipping"),
    )
    values = {key: getattr(study, key) for key in keys}
    if device != "cpu":  # losses of one kind of device are not those of another
        values["device"] = device
    return json.dumps([values, corpus_sha256, dict(shapes)], sort_keys=True)


def short_steps(study: Study, batch: Batch) -> int:
    """Steps of the runs that choose."""
    return max(1, round((study.short if batch.short is None else batch.short) * batch.steps))


def outcome(study: Study, shared: str, row: Row, batch: Batch, results: Results) -> Outcome:
    """Where a row stands at a batch size, and which of its runs can be started now."""
    if row.like:
        other = next(one for one in study.rows if one.name == row.like)
        found = outcome(study, shared, other, batch, results)
        if found.best is None or (found.wanted and found.wanted[0].stage < SEEDS):
            return Outcome(reasons=(f"waits for {row.like}",))
        point = found.best
        row = replace(row, lr=(point.lr,), rest_lr=(point.rest_lr,), weight_decay=(point.weight_decay,))
    search = _Search(study, shared, row, batch, results)
    return search.outcome()


class _Search:
    """The search of one row at one batch size, as far as `results` reach."""

    def __init__(self, study: Study, shared: str, row: Row, batch: Batch, results: Results) -> None:
        self._study, self._shared, self._row, self._batch, self._results = study, shared, row, batch, results
        self._tried: dict[str, tuple[Run, Point]] = {}

    def outcome(self) -> Outcome:
        row, point = self._row, self._row.start
        axes: dict[str, tuple[float, ...]] = {"lr": row.lr, "rest_lr": row.rest_lr, "weight_decay": row.weight_decay}
        for axis, values in axes.items():
            if len(values) > 1:
                best, _, missing = self._bracket(point, axis, values, values, SHORT)
                if best is None:
                    return self._now(missing)
                point = best
        first: tuple[float, ...] = (point.lr,)
        if len(row.lr) > 1:
            first = (self._beside(point.lr, row.lr, -1), point.lr, self._beside(point.lr, row.lr, 1))
        best, edge, missing = self._bracket(point, "lr", first, row.lr, FULL)
        if best is None:
            return self._now(missing, edge=edge)
        trials = len(self._tried)
        runs = [self._run(best, seed, SEEDS if i else FULL) for i, seed in enumerate(self._study.seeds)]
        ended = tuple(line for line in map(self._ended, runs) if line and line["status"] == "ok")
        return self._now(tuple(run for run in runs if self._ended(run) is None), best, ended, edge, trials)

    def _now(
        self,
        missing: tuple[Run, ...],
        best: Point | None = None,
        runs: tuple[Mapping[str, Any], ...] = (),
        edge: bool = False,
        trials: int = 0,
    ) -> Outcome:
        points = {point: None for _, point in self._tried.values()}
        lines = [(run, self._results.get(run.key, {})) for run, _ in self._tried.values()]
        reasons = tuple(f"{run.lr:g}: {line['reason']}" for run, line in lines if "reason" in line)
        return Outcome(tuple(sorted(points, key=lambda p: p.lr)), best, runs, edge, missing, reasons, trials)

    def _run(self, point: Point, seed: int, stage: int) -> Run:
        run = make_run(self._study, self._shared, self._row, self._batch, point, seed, stage)
        self._tried.setdefault(run.key, (run, point))
        return run

    def _ended(self, run: Run) -> Mapping[str, Any] | None:
        return self._results.get(run.key)

    def _beside(self, value: float, values: tuple[float, ...], towards: int) -> float:
        return beside(value, values, self._study.factor, towards)

    def _bracket(
        self, point: Point, axis: str, first: tuple[float, ...], known: tuple[float, ...], stage: int
    ) -> tuple[Point | None, bool, tuple[Run, ...]]:
        """The best of `point` with the values `first` on `axis`, and with those beyond them as long as they are better.

        Returns:
            The best point (None: none ended well), whether its rate is the first or the last that was tried, and runs
            that are missing to tell.
        """
        chosen = first
        goes_on = axis != "weight_decay" and len(first) > 1
        further = self._study.extend if goes_on else 0
        while True:
            points = [self._row.moved(point, axis, value) for value in chosen]
            runs = [self._run(one, self._study.seeds[0], stage) for one in points]
            missing = tuple(run for run in runs if self._ended(run) is None)
            if missing:
                return None, False, missing
            lines = [self._results[run.key] for run in runs]
            best = next(iter(ranked(chosen, lines)), None)
            edge = goes_on and best in (None, chosen[0], chosen[-1])
            hopeless = all(line["status"] in ("failed", "unavailable") for line in lines)
            if not edge or not further or hopeless:
                return (None if best is None else self._row.moved(point, axis, best)), edge, ()
            towards = 1 if best == chosen[-1] else -1
            chosen = tuple(sorted((*chosen, self._beside(chosen[-1 if towards > 0 else 0], known, towards))))
            further -= 1


def ranked(rates: Sequence[float], results: Sequence[Mapping[str, Any]]) -> list[float]:
    """The rates whose runs ended well, best validation loss first; of equals the lower rate."""
    losses = [(r["validation_loss"], lr) for lr, r in zip(rates, results, strict=True) if r["status"] == "ok"]
    return [lr for _, lr in sorted(losses)]


def beside(rate: float, rates: tuple[float, ...], factor: float, towards: int) -> float:
    """The next of `rates` above (`towards=1`) or below (-1) a rate, beyond them that rate times or over `factor`."""
    further = [lr for lr in rates if (lr - rate) * towards > 0]
    if further:
        return min(further) if towards > 0 else max(further)
    return _rounded(rate * factor**towards)


def _rounded(rate: float) -> float:
    return round(rate, 6 - math.floor(math.log10(rate)))


def wanted(study: Study, shared: str, results: Results, only: str = "") -> list[Run]:
    """All runs that can be started now, in the order of work: priority, first seeds, order of rows, order of batches.

    So a study that is cut short has one seed of all rows that matter, before it has others of any.
    """
    runs: dict[str, Run] = {}
    for row, batch in _pairs(study, only):
        for run in outcome(study, shared, row, batch, results).wanted:
            runs.setdefault(run.key, run)
    return sorted(runs.values(), key=lambda run: (run.priority, run.stage == SEEDS))


def tokens_to_go(study: Study, shared: str, results: Results, only: str = "") -> int:
    """Tokens of the runs that are still to come, as far as can be known: without rates that may be added."""
    total = 0
    for row, batch in _pairs(study, only):
        now = outcome(study, shared, row, batch, results)
        total += sum(run.cost for run in now.wanted)
        if now.wanted:
            stage = now.wanted[0].stage
            later = (len(study.seeds) - 1) * (stage < SEEDS) + (3 if len(row.lr) > 1 else 1) * (stage < FULL)
            total += later * batch.tokens * batch.steps
        elif now.best is None and not now.points:  # waits for another row
            total += len(study.seeds) * batch.tokens * batch.steps
    return total


def _pairs(study: Study, only: str) -> Iterator[tuple[Row, Batch]]:
    for row in study.rows:
        if not only or row.name == only:
            for batch in study.batches_of(row):
                yield row, batch


def line_of(run: Run) -> dict[str, Any]:
    """The run's own values in its line of the results."""
    return asdict(run)
