"""Draw docs/loss-for-bytes.svg: validation loss against the optimizer state of the whole model, from recorded runs.

``python benchmarks/loss_for_bytes.py`` reads the short runs of 1.25 M weights on a CPU. A row stands at its best
settings, those with the lowest mean of their seeds, and is refused with other than three of these.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from quality_curves import FOLDER, best_runs

SEEDS = 3
OURS, THEIRS, OTHERS = "#228833", "#4477aa", "#b5b5b5"
# Rows of the recorded file with the name in the picture, and where that stands: points to the right of the mark and
# above it, and which of its ends is at this place.
NAMED: dict[str, tuple[str, str, tuple[int, int], str]] = {
    "adamw": ("AdamW", THEIRS, (0, 26), "center"),
    "adam-8bit-torchao": ("8-bit Adam", THEIRS, (-10, -15), "right"),
    "galore-2B": ("GaLore", THEIRS, (-8, 12), "right"),
    "apollo": ("APOLLO", THEIRS, (10, 6), "left"),
    "muon": ("Muon", THEIRS, (0, 22), "center"),
    "orthogonal-1": ("level 1: the default", OURS, (14, -36), "center"),
    "orthogonal-0-int8": ("level 0, int8", OURS, (0, 36), "center"),
    "orthogonal-1-int8": ("level 1, int8", OURS, (0, -40), "center"),
    "orthogonal-2-int8": ("level 2, int8", OURS, (-4, 23), "center"),
}
# Pale, without a name: other recipes, those of others' optimizers too, and keys that gained nothing.
PALE = (
    *("foam-2", "energy-2", "came-gwt-2", "came-gwt-0", "factored-2", "adalomo-0", "low-rank-residual", "whole-int8"),
    *("critical-2-energy-3", "critical-2-energy-sum-3", "critical-1-orthogonal-2"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """A row: bytes of optimizer state for each weight of the whole model, mean and standard deviation of the loss."""

    size: float
    loss: float
    spread: float


def point_of(lines: list[dict[str, Any]], row: str) -> Point:
    """The point of `row`.

    Raises:
        ValueError: it was not run with three seeds.
    """
    runs = best_runs(lines, row)
    if len({run["seed"] for run in runs}) != SEEDS:
        raise ValueError(f"row {row!r} has {len(runs)} runs at its best settings, and a point is the mean of {SEEDS}")
    losses = [run["validation_loss"] for run in runs]
    return Point(runs[0]["state_bytes"] / runs[0]["parameters"], fmean(losses), stdev(losses))


def draw(lines: list[dict[str, Any]], output: Path) -> None:
    """Write the picture of `lines` to `output`; 700 pixels are enough to read it."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gwt_dist"  # the same file for the same runs
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in PALE:
        point = point_of(lines, row)
        axes.errorbar(point.size, point.loss, point.spread, fmt="o", color=OTHERS, ms=5, elinewidth=1, alpha=0.7)
    for row, (name, colour, place, side) in NAMED.items():
        point = point_of(lines, row)
        mark = "o" if colour == OURS else "s"
        axes.errorbar(point.size, point.loss, point.spread, fmt=mark, color=colour, ms=9, elinewidth=1.8, capsize=4)
        axes.annotate(
            f"{name}\n{point.size:.2g} B" if colour == OURS else name,
            (point.size, point.loss),
            place,
            textcoords="offset points",
            ha=side,
            va="center",
            color=colour,
            fontsize=12,
            fontweight="bold",
        )
    axes.set_xscale("log", base=2)
    ticks = [0.25, 0.5, 1, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(0.25, 12)
    axes.set_ylim(1.28, 1.66)
    kinds = (("o", OURS, 9, 'GWTAdamW, recipe "orthogonal"'), ("s", THEIRS, 9, "optimizers of others"))
    for mark, colour, size, name in (*kinds, ("o", OTHERS, 5, "GWTAdamW, other recipes and keys")):
        axes.plot([], [], mark, color=colour, ms=size, label=name)
    axes.legend(loc="center left", bbox_to_anchor=(0.0, 0.5), fontsize=12, frameon=False)
    axes.tick_params(labelsize=12)
    axes.set_xlabel("optimizer state of the whole model, bytes a weight", fontsize=13)
    axes.set_ylabel("validation loss, nats a byte", fontsize=13)
    axes.grid(color="#8883")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    parameters, tokens = lines[0]["parameters"], max(line["steps"] * line["tokens"] for line in lines)
    figure.suptitle(
        f"{parameters / 1e6:.2f} M weights on a CPU, {tokens / parameters:.2f} tokens a weight; "
        f"mean and standard deviation of {SEEDS} seeds",
        fontsize=11.5,
        x=0.01,
        ha="left",
    )
    metadata = {"Date": None} if output.suffix == ".svg" else None
    figure.savefig(output, dpi=87.5, metadata=metadata)


def main() -> None:
    """Draw what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=Path, default=FOLDER / "cpu.jsonl", help="Recorded runs.")
    parser.add_argument("--output", type=Path, default=Path("docs/loss-for-bytes.svg"), help="The picture.")
    arguments = parser.parse_args()
    draw([json.loads(line) for line in arguments.lines.read_text().splitlines()], arguments.output)


if __name__ == "__main__":
    main()
