"""What a part is told, and how it measures: on a GPU by its own events, elsewhere by the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]  # "case" names it; "ok" is of a check, "error" of what did not run, "note" of all else
NO_TIME = "not measured: no time left"


@dataclass(frozen=True, slots=True)
class Setting:
    """Where, how large, how long."""

    device: torch.device
    smoke: bool  # tiny shapes and few rounds
    deadline: float  # of `time.monotonic`, when the part is to end
    engines: tuple[str, ...] = ()  # names of those to run; none: all, and in a smoke all that start within seconds

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds of a call on the device, and until it returns on the host."""
        self.synchronize()
        if not self.on_gpu:
            begin = time.perf_counter()
            call()
            passed = (time.perf_counter() - begin) * 1e3
            return passed, passed
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin = time.perf_counter()
        first.record()
        call()
        last.record()
        passed = (time.perf_counter() - begin) * 1e3
        last.synchronize()
        return first.elapsed_time(last), passed

    def peak(self, call: Callable[[], object]) -> int | None:
        """Most bytes that a call holds beyond what was held before; None without a GPU, which alone counts them."""
        if not self.on_gpu:
            call()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def waits(self, call: Callable[[], object]) -> str:
        """Whether a call waits for the GPU: "no", or where."""
        if not self.on_gpu:
            return "needs a GPU"
        self.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchron" not in str(error):
                raise
            return summary(error)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return "no"

    def free(self) -> None:
        """Give back what the allocator keeps."""
        if self.on_gpu:
            torch.cuda.empty_cache()


def summary(error: BaseException) -> str:
    """One line of an error, for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else repr(error)}"[:240]


def attempt(case: Row, call: Callable[[], Row]) -> Row:
    """The row that `call` measures; where it fails, the error in its place."""
    try:
        return case | call()
    except Exception as error:  # a row of the table, not the end of the run
        return case | {"error": summary(error)}
