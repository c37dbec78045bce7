"""The plots of a study: loss against tokens and time, against rate, and best loss against the size of the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gwt_dist.study.config import Batch, Study
from gwt_dist.study.plan import FULL, SHORT, Results, make_run
from gwt_dist.study.table import Line, lines_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN_POINTS = 60  # of a loss curve, each a mean


def write_plots(folder: Path, study: Study, shared: str, results: Results) -> list[Path]:
    """One picture for each batch size, `plots-TOKENS.png`, of the rows that have a loss; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for batch in study.batches:
        lines = [line for line in lines_of(study, shared, results, batch) if line.loss is not None]
        figure, axes = pyplot.subplots(2, 2, figsize=(16, 13), layout="constrained")
        colors = [pyplot.get_cmap("turbo")((i + 0.5) / len(lines)) for i in range(len(lines))]
        (tokens, time), (state, rate) = axes
        curves(tokens, lines, colors)
        curves(time, lines, colors, timed=True)
        against_state(state, lines, colors, study.reference)
        against_rate(rate, study, shared, lines, colors, batch, results)
        figure.suptitle(f"{study.name}: {batch.tokens:,} tokens a step, {batch.steps} steps")
        figure.legend(*state.get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize="small")
        path = folder / f"plots-{batch.tokens}.png"
        figure.savefig(path, dpi=80)
        pyplot.close(figure)
        paths.append(path)
    return paths


def curves(axes: Axes, lines: list[Line], colors: list[Any], timed: bool = False) -> None:
    """Training loss of the first seed at the best settings, smoothed into `SHOWN_POINTS` means, against tokens.

    `timed`: against seconds, which are steps times the median of an iteration: no start, no validation.
    """
    low = []
    for line, color in zip(lines, colors, strict=True):
        losses = line.found.runs[0]["losses"]
        width = max(1, len(losses) // SHOWN_POINTS)
        means = [sum(part) / len(part) for part in (losses[i : i + width] for i in range(0, len(losses), width))]
        each = (line.iteration_ms or 0.0) / 1e3 if timed else line.tokens
        axes.plot([min(len(losses), (i + 1) * width) * each for i in range(len(means))], means, color=color)
        low.append(means[-1])
    if low:
        axes.set_ylim(min(low) - 0.1, min(low) + 2.0)
    axes.set(xlabel="seconds of training" if timed else "tokens", ylabel="training loss, nats a token")


def against_state(axes: Axes, lines: list[Line], colors: list[Any], reference: str) -> None:
    """Best validation loss against bytes of state for a weight of the whole model, with the deviation of the seeds.

    Dotted: the best with so many bytes or fewer. Rows on this line and `reference` have their names, others are pale.
    """
    steps = front([(line.state, line.loss) for line in lines])
    offset = 14  # points
    for line, color in sorted(zip(lines, colors, strict=True), key=lambda pair: pair[0].state or 0.0):
        if line.loss is None or line.state is None:
            continue
        named = line.row == reference or (line.state, line.loss) in steps
        alpha, size = (1.0, 9) if named else (0.4, 6)
        error = line.spread or 0.0
        axes.errorbar(line.state, line.loss, error, fmt="o", color=color, label=line.row, alpha=alpha, markersize=size)
        if named:
            axes.annotate(
                line.row,
                (line.state, line.loss),
                xytext=(0, offset),
                textcoords="offset points",
                ha="center",
                va="bottom" if offset > 0 else "top",
                fontsize="large",
            )
            offset = -offset  # neighbours have nearly the same loss
    axes.step([size for size, _ in steps], [loss for _, loss in steps], where="post", color="grey", linestyle=":")
    axes.set_xscale("symlog", base=2, linthresh=0.0625)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="optimizer state of the whole model, bytes a weight", ylabel="validation loss at the best rate")


def front(points: Sequence[tuple[float | None, float | None]]) -> list[tuple[float, float]]:
    """The points, ``(bytes, loss)``, that have a lower loss than all with as many bytes or fewer, by bytes."""
    found: list[tuple[float, float]] = []
    for size, loss in sorted((size, loss) for size, loss in points if size is not None and loss is not None):
        if not found or loss < found[-1][1]:
            found.append((size, loss))
    return found


def against_rate(
    axes: Axes, study: Study, shared: str, lines: list[Line], colors: list[Any], batch: Batch, results: Results
) -> None:
    """Validation loss against the rate: dashed at part of the length, full marks at full length; first seed."""
    rows = {row.name: row for row in study.rows}
    for line, color in zip(lines, colors, strict=True):
        for stage, style in ((SHORT, "--"), (FULL, "o-")):
            runs = [
                make_run(study, shared, rows[line.row], batch, point, study.seeds[0], stage)
                for point in line.found.points
                if line.best and replace(point, lr=line.best.lr) == line.best
            ]
            ended = [results[run.key] for run in runs if results.get(run.key, {}).get("status") == "ok"]
            axes.plot([run["lr"] for run in ended], [run["validation_loss"] for run in ended], style, color=color)
    axes.set_xscale("log")
    axes.set(xlabel="learning rate of the matrices", ylabel="validation loss (dashed: part of the length)")
