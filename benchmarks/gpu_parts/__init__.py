"""The parts of `benchmarks/gpu.py`: functions of a `Setting` that yield rows, one as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu_parts import capture, engines, machine, products, slices, steps, suite, training
from gpu_parts.setting import Row, Setting


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a run."""

    name: str
    title: str
    rows: Callable[[Setting], Iterator[Row]]
    seconds: float  # at most, on a GPU
    checks: bool = False  # whether the run fails with it


# The first is there always; the others in the order of what a cut-off run should have.
PARTS = (
    Part("machine", "What is here", machine.rows, 40),
    Part("tests", "The tests that need a GPU", suite.rows, 130, checks=True),
    Part("engines", "Engines beside the fp64 update of one process on the CPU", engines.rows, 120, checks=True),
    Part("slices", "Bits of `torch.bmm` for stacks of 1 to 16 matrices", slices.rows, 30),
    Part("steps", "Time of a step", steps.rows, 150),
    Part("capture", "A whole training step in a CUDA graph, and compiled models", capture.rows, 70, checks=True),
    Part("products", "Symmetric products beside `torch.bmm`", products.rows, 30),
    Part("training", "The step within an iteration of 131,072 tokens", training.rows, 120),
)
