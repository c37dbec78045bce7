"""The mathematics that programs name: where moments come from, what details contribute, how a weight takes its change.

An entry of `FORMULAS` has the functions that the phases of its programs name. Pure functions of units in torch, which
are the reference for every compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gwt_dist.declare import Pass, Program
from gwt_dist.formulas import adalomo, low_rank, normuon, orthogonal, weights
from gwt_dist.formulas.adam import DETAILS, Adam
from gwt_dist.formulas.critical import KEPT, Critical
from gwt_dist.formulas.factored import Factored
from gwt_dist.formulas.share import Seat, Share

__all__ = ["DETAILS", "FORMULAS", "WRITES", "Seat", "Share", "check"]

_ADAM = {"adam_approximation": Adam(energy=False), "adam_energy": Adam(energy=True)}
FORMULAS: dict[str, Any] = {
    **_ADAM,
    "orthogonal": orthogonal,
    "normuon": normuon,
    "factored_approximation": Factored(energy=False, confidence=False),
    "factored_energy": Factored(energy=True, confidence=False),
    "came_approximation": Factored(energy=False, confidence=True),
    "came_energy": Factored(energy=True, confidence=True),
    "adalomo": adalomo,
    "low_rank": low_rank,
}
FORMULAS |= {f"{KEPT}_{name}": Critical(FORMULAS[name]) for name in (*_ADAM, "orthogonal", "normuon")}
# How a weight takes its change.
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {"decay": weights.decay, "cautious": weights.cautious}


def check(program: Program) -> None:
    """Raise `ValueError` for a program that names what is not here."""
    formula = FORMULAS.get(program.formula)
    names = [
        name
        for phase in program.phases
        for name in ((phase.function, phase.then) if isinstance(phase, Pass) else (phase.send, phase.work, phase.keep))
    ]
    lacks = [name for name in names if name and not hasattr(formula, name)]
    for name, known in ((program.formula, FORMULAS), (program.detail or "weighed", DETAILS), (program.write, WRITES)):
        if name not in known:
            raise ValueError(
                f"a program names {name!r}, which is none of {', '.join(known)}; register it before a step"
            )
    if lacks:
        raise ValueError(f"formula {program.formula!r} has no function {', '.join(lacks)}, which its program names")
