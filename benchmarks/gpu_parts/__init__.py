"""The parts of `benchmarks/gpu.py`: functions of a `Setting` that yield rows, one as soon as it is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gpu_parts import activations, capture, engines, machine, products, slices, steps, suite, training
from gpu_parts.setting import Row, Setting


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a run."""

    name: str
    title: str
    rows: Callable[[Setting], Iterator[Row]]
    seconds: float  # at most, on a GPU
    checks: bool = False  # whether the run fails with it
    legend: str = ""  # what the columns of its rows are


ENGINES = """Six steps under each engine. Errors are of the change of a tensor, the largest of all. `ok`: at most 1e-3
to the update in fp64 (0.2 where matrix products are in bf16), and 1e-5 to one process on the same device."""
SLICES = """`n`: matrices in a stack. The optimizer has one `n` for each shape and puts a matrix in any place: bits may
depend on `n`; where they depend on the place, they depend on the number of ranks too."""
STEPS = """`ms`: by events of the GPU; `host ms`: until `step()` returns; `ratio`: to fused AdamW in the same rounds,
median, and its quartiles; `share of copy`: bytes that a step must move in its time, beside those of a plain copy (1 is
all that memory can do); `waits`: whether `step()` waits for the GPU, which it should not; `state B/param`: bytes of
state for each weight."""
CAPTURE = "`ok`: after eight steps all weights and all state have the bits of plain steps."
PRODUCTS = "`ratio`: of the symmetric kernel to `torch.bmm` in the same rounds; it is faster below 1. Errors: to fp64."
ACTIVATIONS = """`ok`: the codes of torch's operations, bit for bit; `share of copy`: time of a copy of as many bytes,
of the time that it takes (1 is all that memory can do)."""
TRAINING = "Forward, backward and step in bf16 autocast; `step ms` is the optimizer's part, measured after a backward."

# The first is there always; the others in the order of what a cut-off run should have.
PARTS = (
    Part("machine", "What is here", machine.rows, 40),
    Part("tests", "The tests that need a GPU", suite.rows, 130, True),
    Part("engines", "Engines beside the fp64 update of one process on the CPU", engines.rows, 120, True, ENGINES),
    Part("slices", "Bits of `torch.bmm` for stacks of 1 to 16 matrices", slices.rows, 30, False, SLICES),
    Part("steps", "Time of a step", steps.rows, 150, False, STEPS),
    Part("capture", "A whole training step in a CUDA graph, and compiled models", capture.rows, 70, True, CAPTURE),
    Part("products", "Symmetric products beside `torch.bmm`", products.rows, 30, False, PRODUCTS),
    Part("activations", "Saved activations in 8 bits", activations.rows, 20, True, ACTIVATIONS),
    Part("training", "The step within an iteration of 131,072 tokens", training.rows, 120, False, TRAINING),
)
