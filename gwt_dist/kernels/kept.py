"""Tables on a device that stay there from step to step, and that CUDA graphs may read when they are replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Kept:
    """What stays on one device for a work from call to call."""

    device: torch.device
    made: dict[str, tuple[object, Any]] = field(default_factory=dict)  # name -> what it was made from, itself
    captured: list[Any] = field(default_factory=list)  # what CUDA graphs read when they are replayed
    spare: dict[Hashable, Tensor] = field(default_factory=dict)  # pinned memory for an upload while a graph is captured

    def get(self, name: str, source: object, make: Callable[[], Any]) -> Any:
        """``make()``, or what it made the last time if that was from an equal `source`."""
        known = self.made.get(name)
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if known is None or known[0] != source:
            known = source, make()
            if not capturing:  # else it comes into being when the graph is replayed, and not before
                self.made[name] = known
        if capturing:
            self.captured.append(known[1])
        return known[1]

    def upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        """A tensor of `values` in new memory, without a wait."""
        host = torch.as_tensor(values, dtype=dtype)
        if self.device.type != "cuda" or not host.numel():
            return host.to(self.device, copy=True)
        key = dtype, host.shape
        if torch.cuda.is_current_stream_capturing():
            # Pinned memory must not be allocated now. What was uploaded last has long arrived: who captures a graph
            # synchronises first.
            spare = self.spare.pop(key, None)
            pinned = host.pin_memory() if spare is None else spare.copy_(host)
            self.captured.append(pinned)
        else:
            pinned = self.spare[key] = host.pin_memory()
        return pinned.to(self.device, non_blocking=True)
