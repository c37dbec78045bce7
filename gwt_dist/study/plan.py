"""Which runs come next: rates at part of the length, the best and its neighbours, the other seeds. Pure functions."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gwt_dist.study.config import Batch, Row, Study
from gwt_dist.study.optimizers import options_of

SHORT, FULL, SEEDS = 0, 1, 2  # stages
STAGES = ("rates at part of the length", "rates at full length", "other seeds")
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

    `rates` are those tried at any length, `best` the one that the seeds are for (None: no run at full length has ended
    well yet), `runs` those at full length and the best rate that ended well, `edge` whether the best rate is the first
    or the last of those tried at full length, `wanted` what is still to be run.
    """

    rates: tuple[float, ...]
    best: float | None
    runs: tuple[Mapping[str, Any], ...]
    edge: bool
    wanted: tuple[Run, ...]
    reasons: tuple[str, ...]


def make_run(study: Study, shared: str, row: Row, batch: Batch, lr: float, seed: int, stage: int) -> Run:
    """The run of `row` at a rate and a seed; `shared` identifies what all runs share (text, model)."""
    steps = short_steps(study, batch) if stage == SHORT else batch.steps
    options = options_of(row.optimizer, row.options, f"row {row.name!r}")
    values: dict[str, Any] = {
        "optimizer": row.optimizer,
        "options": options,
        "lr": lr,
        "rest_lr": row.rest_rate(lr),
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
    """Steps of the runs that compare rates."""
    return max(1, round(study.short * batch.steps))


def outcome(study: Study, shared: str, row: Row, batch: Batch, results: Results) -> Outcome:
    """Where a row stands at a batch size, and which of its runs can be started now."""
    first, others = study.seeds[0], study.seeds[1:]

    def run(lr: float, seed: int, stage: int) -> Run:
        return make_run(study, shared, row, batch, lr, seed, stage)

    def reasons(runs: list[Run]) -> tuple[str, ...]:
        return tuple(f"{r.lr:g}: {results[r.key]['reason']}" for r in runs if "reason" in results.get(r.key, {}))

    short = [run(lr, first, SHORT) for lr in row.lr] if len(row.lr) > 1 else []
    missing = tuple(r for r in short if r.key not in results)
    if missing or (short and _cannot(short, results)):
        return Outcome(row.lr, None, (), False, missing, reasons(short))
    begin = next(iter(ranked(row.lr, [results[r.key] for r in short])), row.lr[0]) if short else row.lr[0]
    chosen: tuple[float, ...] = (begin,)
    if short:
        chosen = (beside(begin, row.lr, study.factor, -1), begin, beside(begin, row.lr, study.factor, 1))
    further = study.extend
    while True:
        rates = tuple(sorted({*row.lr, *chosen}))
        full = [run(lr, first, FULL) for lr in chosen]
        missing = tuple(r for r in full if r.key not in results)
        if missing:
            return Outcome(rates, None, (), False, missing, reasons(short + full))
        best = next(iter(ranked(chosen, [results[r.key] for r in full])), None)
        edge = bool(short) and best in (None, chosen[0], chosen[-1])
        if not edge or not further or _cannot(full, results):
            break
        towards = 1 if best == chosen[-1] else -1
        chosen = tuple(sorted((*chosen, beside(chosen[-1 if towards > 0 else 0], row.lr, study.factor, towards))))
        further -= 1
    if best is None:
        return Outcome(rates, None, (), edge, (), reasons(short + full))
    seeds = [run(best, seed, SEEDS) for seed in others]
    ended = tuple(
        results[r.key] for r in (run(best, first, FULL), *seeds) if results.get(r.key, {}).get("status") == "ok"
    )
    missing = tuple(r for r in seeds if r.key not in results)
    return Outcome(rates, best, ended, edge, missing, reasons(short + full + seeds))


def _cannot(tried: list[Run], results: Results) -> bool:
    """Whether no rate can help: nothing diverged and nothing ended well."""
    return all(results[r.key]["status"] in ("failed", "unavailable") for r in tried)


def ranked(rates: tuple[float, ...] | list[float], results: list[Mapping[str, Any]]) -> list[float]:
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
    """All runs that can be started now, in the order of work: priority, order of rows, order of batches.

    A row is thus finished as far as it can be before the next begins, and a study that is cut short has whole rows.
    """
    runs: dict[str, Run] = {}
    for row, batch in _pairs(study, only):
        for run in outcome(study, shared, row, batch, results).wanted:
            runs.setdefault(run.key, run)
    return sorted(runs.values(), key=lambda run: run.priority)


def tokens_to_go(study: Study, shared: str, results: Results, only: str = "") -> int:
    """Tokens of the runs that are still to come, as far as can be known: without rates that may be added."""
    total = 0
    for row, batch in _pairs(study, only):
        now = outcome(study, shared, row, batch, results)
        total += sum(run.cost for run in now.wanted)
        if not now.wanted:
            continue
        stage = now.wanted[0].stage
        later = (len(study.seeds) - 1) * (stage < SEEDS)
        later += (3 if len(row.lr) > 1 else 1) * (stage < FULL)
        total += later * batch.tokens * batch.steps
    return total


def _pairs(study: Study, only: str) -> Iterator[tuple[Row, Batch]]:
    for row in study.rows:
        if not only or row.name == only:
            for batch in study.batches_of(row):
                yield row, batch


def line_of(run: Run) -> dict[str, Any]:
    """The run's own values in its line of the results."""
    return asdict(run)
