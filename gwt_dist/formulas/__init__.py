"""The mathematics that programs name: where moments come from, what details contribute, how a weight takes its change.

An entry of `FORMULAS` has the functions that the phases of its programs name. Pure functions of units in torch, which
are the reference for every compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gwt_dist.formulas import normuon, orthogonal, weights
from gwt_dist.formulas.adam import DETAILS, Adam
from gwt_dist.formulas.share import Share

__all__ = ["DETAILS", "FORMULAS", "WRITES", "Share"]

FORMULAS: dict[str, Any] = {
    "adam_approximation": Adam(energy=False),
    "adam_energy": Adam(energy=True),
    "orthogonal": orthogonal,
    "normuon": normuon,
}
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {"decay": weights.decay, "cautious": weights.cautious}
