"""What compiled kernels have of a program: what there is a file for.

``<folder>/<name>.h`` is read by `cpu`, ``<folder>/<name>.py`` by `triton`; a new file is all that it takes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gwt_dist.declare import Extent, Pass, Program, Travel
from gwt_dist.programs import ADAM

HERE = Path(__file__).parent
# By the function of a phase: whether it updates the moments, whether it writes the weights.
PASSES = {"moments": (True, False), "write": (False, True), "step": (True, True)}
BETWEEN = ("", "limit")  # what may stand between phases
# Where matrices travel: the function of what is sent of units, and that of what weights lose by what came back. There
# may be a phase before, whose function sums two numbers a tensor.
NORMS, TRAVELS = "norms", ("momentum", "write")


def parts(program: Program) -> dict[str, str]:
    """The names of the files that the kernels of `program` are put together from, by folder."""
    details = {} if program.travels else {"details": program.detail}  # they take part as the formula says
    return {"formulas": program.formula, **details, "writes": program.write}


@cache
def lacking(program: Program, suffix: str) -> str:
    """What of `program` kernels whose files end in `suffix` do not have; "" if nothing."""
    for folder, name in parts(program).items():
        if not (HERE / folder / f"{name}{suffix}").is_file():
            return f"{folder} of the name {name!r}"
    unsaid = sorted(set(ADAM) - set(program.numbers))
    if unsaid:
        return f"rules without {', '.join(unsaid)}"
    if program.travels:
        return "" if _travels(*program.phases) else f"phases such as {program.phases}"
    for phase in program.phases:
        if not isinstance(phase, Pass) or phase.function not in PASSES or phase.then not in BETWEEN:
            return f"phases such as {phase}"
    return ""


def _travels(*phases: Pass | Travel) -> bool:
    *before, travel = phases
    passes = [
        (its.function, its.then, [(s.extent, s.numbers) for s in its.sums]) for its in before if isinstance(its, Pass)
    ]
    known = not before or passes == [(NORMS, "", [(Extent.TENSOR, 2)])]
    return known and isinstance(travel, Travel) and (travel.send, travel.keep) == TRAVELS
