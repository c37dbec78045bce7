"""The table of a study: each row at its own best rate, mean and spread over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gwt_dist.study.config import Batch, Study
from gwt_dist.study.plan import Outcome, Results, make_run, outcome

COLUMNS = (
    "row",
    "validation loss",
    "spread",
    "bits/byte",
    "seeds",
    "lr",
    "state B/param",
    "in matrices",
    "step ms",
    "notes",
)


@dataclass(frozen=True, slots=True)
class Line:
    """One row at one batch size; numbers are None as long as no run at full length ended well.

    `loss` and `bits` are means over the seeds, `spread` the standard deviation of the loss (None for one seed),
    `state` bytes of optimizer state for a parameter, `matrix_state` those for an element of attention and MLP,
    `step_ms` CPU milliseconds of the optimizer alone.
    """

    row: str
    tokens: int
    loss: float | None
    spread: float | None
    bits: float | None
    seeds: int
    lr: float | None
    state: float | None
    matrix_state: float | None
    step_ms: float | None
    notes: str
    found: Outcome


def lines_of(study: Study, shared: str, results: Results, batch: Batch) -> list[Line]:
    """The lines of one batch size, best loss first; rows without one come last."""
    lines = []
    for row in study.rows:
        if batch in study.batches_of(row):
            found = outcome(study, shared, row, batch, results)
            lines.append(_line(study, shared, row.name, batch, found, results))
    return sorted(lines, key=lambda line: (line.loss is None, line.loss or 0.0))


def _line(study: Study, shared: str, name: str, batch: Batch, found: Outcome, results: Results) -> Line:
    notes = []
    if found.edge:
        notes.append("best rate is the last one tried")
    if found.wanted:
        notes.append(f"{len(found.wanted)} runs to come")
    notes += sorted(set(found.reasons))[:2]
    if not found.runs:
        return Line(name, batch.tokens, None, None, None, 0, found.best, None, None, None, "; ".join(notes), found)
    runs = found.runs

    def mean(key: str) -> float:
        return statistics.fmean(run[key] for run in runs)

    one = runs[0]
    return Line(
        row=name,
        tokens=batch.tokens,
        loss=mean("validation_loss"),
        spread=statistics.stdev(run["validation_loss"] for run in runs) if len(runs) > 1 else None,
        bits=mean("bits_per_byte"),
        seeds=len(runs),
        lr=found.best,
        state=one["state_bytes"] / one["parameters"],
        matrix_state=one["matrix_state_bytes"] / one["matrix_elements"],
        step_ms=mean("optimizer_ms"),
        notes="; ".join(notes),
        found=found,
    )


def cells(line: Line) -> list[str]:
    """The texts of a line, in the order of `COLUMNS`."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        line.row,
        shown(line.loss, ".4f"),
        shown(line.spread, ".4f"),
        shown(line.bits, ".4f"),
        str(line.seeds),
        shown(line.lr, "g"),
        shown(line.state, ".2f"),
        shown(line.matrix_state, ".2f"),
        shown(line.step_ms, ".2f"),
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
        "Validation loss in nats a token, mean over the seeds at the row's own best rate; spread is their standard",
        "deviation. State: bytes that the optimizer holds for each parameter, and for each element of the matrices in",
        "attention and MLP. Step: CPU time of the optimizer alone on one thread; on a GPU what it takes to start the",
        "work, which is not to be compared with rows on CPUs.",
        "",
        "## Settings",
        "",
        "| row | optimizer | settings | rate of the rest | rates tried | source |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in study.rows:
        batch = study.batches_of(row)[0]
        run = make_run(study, shared, row, batch, row.lr[0], study.seeds[0], 1)
        settings = ", ".join(f"{key} {value}" for key, value in run.options.items())
        rest = "the same" if row.rest_factor is None else f"{row.rest_factor:g} x"
        rest = rest if row.rest_lr is None else f"{row.rest_lr:g}"
        rates = ", ".join(f"{lr:g}" for lr in row.lr)
        out.append(f"| {row.name} | {row.optimizer} | {settings} | {rest} | {rates} | {row.source} |")
    problems = unequal(results.values())
    out += ["", *(problems or ["All runs of a seed began with the same weights and saw the same text (checksums)."])]
    return "\n".join(out) + "\n"


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
