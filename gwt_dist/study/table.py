"""The table of a study: each row at its own best rate, mean and spread over the seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gwt_dist.study.config import Batch, Point, Study
from gwt_dist.study.optimizers import options_of
from gwt_dist.study.plan import Outcome, Results, outcome

COLUMNS = (
    "row",
    "validation loss",
    "spread",
    "bits/byte",
    "seeds",
    "to reference",
    "lr",
    "of the rest",
    "decay",
    "trials",
    "state B/param",
    "in matrices",
    "update RMS",
    "optimizer ms",
    "iteration ms",
    "notes",
)


@dataclass(frozen=True, slots=True)
class Line:
    """One row at one batch size; numbers are None as long as no run at full length ended well.

    `loss` and `bits` are means over the seeds, `spread` the standard deviation of the loss (None for one seed),
    `difference` the mean difference of the loss to that of the study's reference on the same seeds and its standard
    error (None for one seed), `state` bytes of optimizer state for a parameter, `matrix_state` those for an element of
    attention and MLP, `update_rms` root mean square of an update over the rate, `optimizer_ms` and `iteration_ms` of a
    step.
    """

    row: str
    tokens: int
    found: Outcome
    notes: str
    loss: float | None = None
    spread: float | None = None
    bits: float | None = None
    seeds: int = 0
    difference: tuple[float, float | None] | None = None
    state: float | None = None
    matrix_state: float | None = None
    update_rms: float | None = None
    optimizer_ms: float | None = None
    iteration_ms: float | None = None

    @property
    def best(self) -> Point | None:
        """The settings that it was run with."""
        return self.found.best


def lines_of(study: Study, shared: str, results: Results, batch: Batch) -> list[Line]:
    """The lines of one batch size, best loss first; rows without one come last."""
    found = {
        row.name: outcome(study, shared, row, batch, results) for row in study.rows if batch in study.batches_of(row)
    }
    reference = found[study.reference].runs if study.reference in found else ()
    lines = [_line(name, batch, one, reference) for name, one in found.items()]
    return sorted(lines, key=lambda line: (line.loss is None, line.loss or 0.0))


def paired(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> tuple[float, float | None] | None:
    """Mean difference of the losses of `runs` to those of `others` on the seeds that both have, and its standard error.

    None for the error of one seed; None where there is no seed that both have.
    """
    theirs = {run["seed"]: run["validation_loss"] for run in others}
    differences = [run["validation_loss"] - theirs[run["seed"]] for run in runs if run["seed"] in theirs]
    if not differences:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return statistics.fmean(differences), error


def _line(name: str, batch: Batch, found: Outcome, reference: Sequence[Mapping[str, Any]]) -> Line:
    notes = []
    if found.edge:
        notes.append("best rate is the last one tried")
    if found.wanted:
        notes.append(f"{len(found.wanted)} runs to come")
    notes += sorted(set(found.reasons))[:2]
    runs = found.runs
    if not runs:
        return Line(name, batch.tokens, found, "; ".join(notes))

    def mean(key: str) -> float | None:
        values = [run[key] for run in runs if run.get(key) is not None]
        return statistics.fmean(values) if values else None

    one = runs[0]
    return Line(
        row=name,
        tokens=batch.tokens,
        found=found,
        notes="; ".join(notes),
        loss=mean("validation_loss"),
        spread=statistics.stdev(run["validation_loss"] for run in runs) if len(runs) > 1 else None,
        bits=mean("bits_per_byte"),
        seeds=len(runs),
        difference=paired(runs, reference),
        state=one["state_bytes"] / one["parameters"],
        matrix_state=one["matrix_state_bytes"] / one["matrix_elements"],
        **{key: mean(key) for key in ("update_rms", "optimizer_ms", "iteration_ms")},
    )


def cells(line: Line) -> list[str]:
    """The texts of a line, in the order of `COLUMNS`."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    difference, best = "-", line.best
    if line.difference is not None:
        mean, error = line.difference
        difference = f"{mean:+.4f}" + ("" if error is None else f" +- {error:.4f}")
    return [
        line.row,
        shown(line.loss, ".4f"),
        shown(line.spread, ".4f"),
        shown(line.bits, ".4f"),
        str(line.seeds),
        difference,
        *(shown(getattr(best, axis, None), "g") for axis in ("lr", "rest_lr", "weight_decay")),
        str(line.found.trials),
        shown(line.state, ".2f"),
        shown(line.matrix_state, ".2f"),
        shown(line.update_rms, ".3f"),
        shown(line.optimizer_ms, ".2f"),
        shown(line.iteration_ms, ".1f"),
        line.notes,
    ]


def markdown(study: Study, shared: str, results: Results) -> str:
    """The tables of all batch sizes, with what was held equal and the settings of the rows."""
    out = [f"# Study {study.name}", ""]
    for batch in study.batches:
        out += [f"## {batch.tokens:,} tokens a step, {batch.steps} steps", ""]
        out += ["| " + " | ".join(COLUMNS) + " |", "| --- " + "| ---: " * (len(COLUMNS) - 2) + "| --- |"]
        lines = lines_of(study, shared, results, batch)
        waiting = [line.row for line in lines if line.loss is None and not line.found.reasons]
        for line in lines:
            if line.row not in waiting:
                out.append("| " + " | ".join(text.replace("|", "\\|") for text in cells(line)) + " |")
        out += ["", f"No result yet: {', '.join(waiting)}.", ""] if waiting else [""]
    out += [
        "Validation loss in nats a token, mean over the seeds at the row's own best settings; spread is their standard",
        f"deviation. To reference: mean difference to {study.reference or 'no row'} on the same seeds, with its",
        "standard error. Trials: runs that chose the settings. State: bytes that the optimizer holds for each",
        "parameter, and for each element of the matrices in attention and MLP. Update RMS: of an update of these over",
        "the rate, in the second half of a run. Optimizer: CPU time of its step on one thread, or time of the GPU.",
        "",
        "## Settings",
        "",
        "| row | optimizer | settings | rates | of the rest | weight decay | source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in study.rows:
        settings = options_of(row.optimizer, row.options, f"row {row.name!r}")
        shown = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "weight_decay")
        rates = f"as {row.like}" if row.like else _listed(row.lr)
        rest = _listed(row.rest_lr) if row.rest_lr else "the same" if row.rest_factor == 1 else f"{row.rest_factor:g} x"
        found = [row.name, row.optimizer, shown, rates, "" if row.like else rest]
        out.append("| " + " | ".join([*found, "" if row.like else _listed(row.weight_decay), row.source]) + " |")
    problems = unequal(results.values())
    out += ["", *(problems or ["All runs of a seed began with the same weights and saw the same text (checksums)."])]
    return "\n".join(out) + "\n"


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def unequal(lines: Any) -> list[str]:
    """What differs and must not: weights of a seed at the start, and the text of a seed and batch size."""
    seen: dict[tuple[Any, ...], tuple[Any, str]] = {}
    problems = []
    for line in lines:
        if line["status"] != "ok":
            continue
        for what, where in (("weights_checksum", ()), ("data_checksum", (line["tokens"], line["steps"]))):
            key = (what, line["seed"], *where)
            value, row = seen.setdefault(key, (line[what], line["row"]))
            if value != line[what]:
                problems.append(f"**{what} of seed {line['seed']} differs between {row} and {line['row']}**")
    return sorted(set(problems))


def write_table(path: Path, study: Study, shared: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """`table.md`, complete before it takes the place of an older one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(markdown(study, shared, results), encoding="utf-8")
    fresh.replace(path)
