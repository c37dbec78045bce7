"""The smallest level, or number of ranks, at which the worst rank fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gwt_dist.memory.plan import MemoryPlan

# Powers of 1000 and of 1024, as their names say.
_UNITS = {"B": 1}
for _power, _letter in enumerate("KMGT", 1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}
LEVELS = tuple(range(9))  # the compiled kernels go no further
WORLDS = tuple(1 << power for power in range(17))


@dataclass(frozen=True, slots=True)
class Tried:
    """One level on one number of ranks, and what its worst rank needs on its device."""

    level: int
    world_size: int
    device: int
    fits: bool


def size(text: str) -> int:
    """Bytes of ``24GB`` (24 * 10^9), ``24GiB`` (24 * 2^30), ``24B`` or ``0``; raises `ValueError` for others."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and _UNITS.get(match[2].upper())
    if match and not match[2]:
        if not float(match[1]):
            return 0
        given = match[1]
        raise ValueError(f"{text!r} has no unit; write {given}GB (10^9 bytes), {given}GiB (2^30) or {given}B")
    if not match or not unit:
        raise ValueError(f"{text!r} is no size; write for example 24GB (10^9 bytes) or 24GiB (2^30)")
    return int(float(match[1]) * unit)


def smallest(
    make: Callable[[int, int], MemoryPlan], limit: int, levels: Sequence[int], worlds: Sequence[int]
) -> tuple[MemoryPlan | None, list[Tried]]:
    """The plan on the fewest ranks, and of the lowest level there, that fits into `limit` bytes; what was tried.

    `make` gives the plan of a level on a number of ranks. None if nothing fits.
    """
    tried = []
    for world_size in worlds:
        for level in levels:
            plan = make(level, world_size)
            device = max(plan.device)
            tried.append(Tried(level, world_size, device, device <= limit))
            if device <= limit:
                return plan, tried
    return None, tried
