"""The host's time of a GPU step, on a machine without a GPU: all that is done before the launches, and these up to the
driver, on CPU tensors.

Triton's functions are what they are on a GPU, but for the driver's call, which does nothing here. Beside them
`torch.optim.AdamW(fused=True)` on the same tensors, and on as many of one element, which is its host's time with almost
no arithmetic. Steps of all take turns; each checkout has a process of its own. Prints a Markdown table of medians::

    python benchmarks/host_time.py . ../before
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from two_trees import ask, start

SHAPES = {"1 x 4096x4096": [[4096, 4096]], "16 x 256x256": [[256, 256]] * 16, "1,000 x 64x64": [[64, 64]] * 1000}
CASES = [(recipe, tensors) for tensors in SHAPES for recipe in ("energy", "paper")]
ROUNDS = {"1 x 4096x4096": 401, "16 x 256x256": 401, "1,000 x 64x64": 101}


class Launches:
    """The driver and the compiler of Triton, which do nothing; `count` is the number of launches."""

    def __init__(self) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.jit import JITFunction

        self.count = 0
        self.function = self.packed_metadata = None
        self._target = GPUTarget("cuda", 90, 32)
        triton.runtime.driver.set_active(self)
        JITFunction._do_compile = self._compiled  # type: ignore[method-assign]

    def get_current_device(self) -> int:
        """As a driver of Triton."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """As a driver of Triton."""
        return 0

    def get_current_target(self) -> Any:
        """As a driver of Triton: an H100."""
        return self._target

    def launch_metadata(self, *_: object) -> None:
        """As a compiled kernel."""

    def run(self, *_: object) -> None:
        """As a compiled kernel."""
        self.count += 1

    def _compiled(self, key: object, signature: object, device: int, *_: object) -> Launches:
        """In place of a method of JITFunction, as which it is not bound."""
        return self


def child() -> None:
    pass
