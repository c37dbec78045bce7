"""What compiled kernels have of a program: what there is a file for.

``<folder>/<name>.h`` is read by `cpu`, ``<folder>/<name>.py`` by `triton`; a new file is all that it takes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gwt_dist.declare import Pass, Program
from gwt_dist.recipes import ADAM

HERE = Path(__file__).parent
# By the function of a phase: whether it updates the moments, whether it writes the weights.
PASSES = {"moments": (True, False), "write": (False, True), "step": (True, True)}
BETWEEN = ("", "limit")  # what may stand between phases


def parts(program: Program) -> dict[str, str]:
    """The names of the files that the kernels of `program` are put together from, by folder."""
    return {"formulas": program.formula, "details": program.detail, "writes": program.write}


@cache
def lacking(program: Program, suffix: str) -> str:
    """What of `program` kernels whose files end in `suffix` do not have; "" if nothing."""
    for folder, name in parts(program).items():
        if not (HERE / folder / f"{name}{suffix}").is_file():
            return f"{folder} of the name {name!r}"
    unsaid = sorted(set(ADAM) - set(program.numbers))
    if unsaid:
        return f"rules without {', '.join(unsaid)}"
    for phase in program.phases:
        if not isinstance(phase, Pass) or phase.function not in PASSES or phase.then not in BETWEEN:
            return f"phases such as {phase}"
    return ""
