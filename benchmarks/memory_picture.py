"""Draw docs/memory.svg: where the bytes of a training step are, by ``gwt-dist plan``, for AdamW and for what is here.

python benchmarks/memory_picture.py 7b --engine fsdp2 --world 8 --weights bf16 --sequence 4096
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from gwt_dist.cli.plan_show import bars_of, title
from gwt_dist.report.pages import COLOURS

SHOWN = (
    ("AdamW, as they are", "AdamW"),
    ("AdamW, recomputed", "... activations recomputed"),
    ("GWTAdamW, as they are", "GWTAdamW"),
    ("GWTAdamW, in 8 bits", "... activations in 8 bits"),
    ("GWTAdamW, recomputed", "... recomputed"),
    ("GWTAdamW, recomputed, in 8 bits", "... recomputed, in 8 bits"),
)


def planned(arguments: list[str]) -> dict[str, Any]:
    """What the command says in JSON."""
    command = [sys.executable, "-m", "gwt_dist", "plan", *arguments, "--activations", "bf16", "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def draw(content: dict[str, Any], file: Path) -> None:
    """A bar for each of `SHOWN`, in GiB."""
    bars = dict(bars_of(content))
    parts = {name: colour for its in bars.values() for (name, _), colour in zip(its, cycle(COLOURS), strict=False)}
    figure, axes = plt.subplots(figsize=(9, 3))
    for row, (name, _) in enumerate(SHOWN):
        left = 0.0
        for part, nbytes in bars[name]:
            axes.barh(row, nbytes / 2**30, left=left, color=parts[part])
            left += nbytes / 2**30
        axes.text(left, row, f" {left:.1f}", va="center")
    large = [name for name in parts if any(value > 2**24 for its in bars.values() for n, value in its if n == name)]
    handles = [plt.Rectangle((0, 0), 1, 1, color=parts[name]) for name in large]
    axes.legend(handles, large, ncols=len(large), frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.15))
    axes.set_yticks(range(len(SHOWN)), [label for _, label in SHOWN])
    axes.invert_yaxis()
    axes.set_title(f"{title(content)}: GiB of a rank", loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw where the bytes of a training step are.")
    parser.add_argument("--output", type=Path, default=Path("docs/memory.svg"), help="The picture.")
    options, rest = parser.parse_known_args()
    draw(planned(rest), options.output)
