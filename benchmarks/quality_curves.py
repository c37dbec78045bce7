"""The picture of docs/quality.md: validation loss against bytes of state of the whole model, and loss against tokens.

``python benchmarks/quality_curves.py`` reads the recorded runs at 20 tokens a weight and writes ``quality/curves.png``
beside them. A row stands at its best settings, those with the lowest mean of their seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FOLDER = Path(__file__).parent / "results" / "quality"
POINTS, EACH = "losses_of_25_steps", 25
# Rows of the recorded file, and their names in the picture; L1-N and L0-N are runs of prototypes.
NAMES = {
    "adamw": "AdamW",
    "muon": "Muon",
    "muon-8bit": "Muon, 8 bits",
    "foam-2": "foam, level 2",
    "energy-2": "energy, level 2",
    "orthogonal-1": "orthogonal, level 1",
    "L1-N": "orthogonal, level 1, Nesterov: the default",
    "L0-N": "orthogonal, level 0, Nesterov",
    "orthogonal-0-int8": "orthogonal, level 0, int8",
    "orthogonal-1-int8": "orthogonal, level 1, int8",
    "whole-int8": "orthogonal, level 1, int8, embeddings too",
    "orthogonal-2": "orthogonal, level 2",
    "orthogonal-2-int8": "orthogonal, level 2, int8",
}
# Bytes of state for each weight of the model, as `gwt-dist compare` counts them on a CPU: on a GPU buffers come on top.
BYTES = {
    **{"adamw": 8.0, "muon": 4.22, "muon-8bit": 1.38, "foam-2": 2.33, "energy-2": 2.33, "orthogonal-1": 2.33},
    **{"L1-N": 2.33, "L0-N": 4.22, "orthogonal-0-int8": 1.13, "orthogonal-1-int8": 0.63, "whole-int8": 0.57},
    **{"orthogonal-2": 1.39, "orthogonal-2-int8": 0.39},
}
THEIRS = "adamw", "muon", "muon-8bit"
CURVES = "adamw", "muon", "orthogonal-1", "orthogonal-0-int8", "foam-2"
Run = dict[str, Any]


def best_runs(lines: list[Run], row: str) -> list[Run]:
    """The runs of `row`, one a seed, at full length and its best settings.

    A run that two rows share, as those of a row and of it at AdamW's settings may, has been recorded under one of them.
    """
    ended = [line for line in lines if line["row"] in (row, f"{row}-kept") and line["status"] == "ok"]
    full = max(line["steps"] for line in ended)
    groups: dict[tuple[float, float], list[Run]] = {}
    for line in ended:
        if line["steps"] == full:
            groups.setdefault((line["lr"], line["rest_lr"]), []).append(line)
    most = max(len(group) for group in groups.values())
    return min((g for g in groups.values() if len(g) == most), key=lambda g: mean(run["validation_loss"] for run in g))


def draw(lines: list[Run], output: Path) -> None:
    """Write the picture of `lines` to `output`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (against_bytes, against_tokens) = pyplot.subplots(1, 2, figsize=(14, 5.5), layout="constrained")
    for row, name in NAMES.items():
        runs = best_runs(lines, row)
        losses = [run["validation_loss"] for run in runs]
        error = stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
        against_bytes.errorbar(BYTES[row], mean(losses), yerr=error, fmt="s" if row in THEIRS else "o", label=name)
        if row in CURVES:
            points = runs[0][POINTS]
            tokens = [min((i + 1) * EACH, runs[0]["steps"]) * runs[0]["tokens"] / 1e6 for i in range(len(points))]
            against_tokens.plot(tokens, points, label=name)
    against_bytes.set_xscale("log", base=2)
    against_bytes.xaxis.set_major_formatter("{x:g}")
    against_bytes.set(
        xlabel="optimizer state, bytes a weight of the whole model", ylabel="validation loss, nats a byte"
    )
    against_bytes.legend(fontsize="small", loc="center left", bbox_to_anchor=(0.0, 0.5))
    against_tokens.set(xlabel="million tokens", ylabel="training loss, means of 25 steps", ylim=(0.8, 1.8))
    against_tokens.legend()
    figure.savefig(output, dpi=80)


def main() -> None:
    """Draw what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=Path, default=FOLDER / "h200-tokens-20.jsonl")
    parser.add_argument("--output", type=Path, default=FOLDER / "curves.png")
    arguments = parser.parse_args()
    draw([json.loads(line) for line in arguments.lines.read_text().splitlines()], arguments.output)


if __name__ == "__main__":
    main()
