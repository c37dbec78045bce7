"""How long the optimizer and a whole iteration take, without waiting for a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WARM_UP_STEPS = 3  # the first ones allocate, and compile


class Clock:
    """Times of each step.

    On a GPU between events of its stream. On a CPU the optimizer's own is CPU time, which other work on the machine
    does not lengthen, and that of an iteration is on the wall.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._parts: list[tuple[torch.cuda.Event, torch.cuda.Event] | float] = []
        self._ends: list[torch.cuda.Event | float] = []

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def optimizer(self) -> Iterator[None]:
        """Around the step of the optimizer."""
        begun = self._event() if self._events else time.process_time()
        yield
        if isinstance(begun, float):
            self._parts.append(time.process_time() - begun)
        else:
            self._parts.append((begun, self._event()))

    def iteration(self) -> None:
        """At the end of one."""
        self._ends.append(self._event() if self._events else time.perf_counter())

    def read(self) -> dict[str, float]:
        """`optimizer_ms` and `iteration_ms`, medians; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
        parts = [1e3 * one if isinstance(one, float) else one[0].elapsed_time(one[1]) for one in self._parts]
        whole = [_between(one, other) for one, other in zip(self._ends, self._ends[1:], strict=False)]
        found = {"optimizer_ms": _median(parts), "iteration_ms": _median(whole)}
        return {name: value for name, value in found.items() if value is not None}


def _between(one: torch.cuda.Event | float, other: torch.cuda.Event | float) -> float:
    if isinstance(one, float) or isinstance(other, float):
        assert isinstance(one, float) and isinstance(other, float)
        return 1e3 * (other - one)
    return float(one.elapsed_time(other))


def _median(values: list[float]) -> float | None:
    kept = values[WARM_UP_STEPS:] or values
    return round(statistics.median(kept), 4) if kept else None
