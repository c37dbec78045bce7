"""Which kernel works on a parameter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from gwt_dist.declare import Extent, Program
from gwt_dist.kernels import cpu, eager, triton
from gwt_dist.kernels.build import BuildError
from gwt_dist.kernels.variant import lacking
from gwt_dist.kernels.work import Tensors, Work
from gwt_dist.piece import Piece
from gwt_dist.wavelet import HaarTransform

VARIABLE = "GWT_DIST_KERNEL"
MAX_LEVEL = 8  # of the compiled kernels: 256 elements a unit, one instance of the code for each level


class Kernel(Protocol):
    """The functions of a module of kernels."""

    def check(self, work: Work, tensors: Tensors) -> None:
        """See `eager.check`."""

    def count(self, work: Work, tensors: Tensors, first: Sequence[bool]) -> None:
        """See `eager.count`."""

    def phase(self, number: int, work: Work, tensors: Tensors, sums: list[Tensor]) -> None:
        """See `eager.phase`."""

    def settle(self, number: int, work: Work, tensors: Tensors, sums: Tensor) -> None:
        """See `eager.settle`."""

    def step(self, work: Work, tensors: Tensors) -> None:
        """See `eager.step`."""

    def send(self, number: int, work: Work, tensors: Tensors, sums: list[Tensor], landing: Tensor) -> None:
        """See `eager.send`."""

    def keep(self, number: int, work: Work, tensors: Tensors, landing: Tensor) -> None:
        """See `eager.keep`."""


class Compiled(Kernel, Protocol):
    """One that has to be built, of files that end in `SUFFIX`."""

    SUFFIX: str
    STORES: Sequence[str]  # formats of state, and ways to round weights, that it has

    def prepare(self, program: Program) -> None:
        """Be ready for `program`; raises `BuildError` if that cannot be."""


_COMPILED: dict[str, Compiled] = {"cpu": cpu, "triton": triton}
_MODULES: dict[str, Kernel] = {"eager": eager, **_COMPILED}
NAMES = tuple(_MODULES)


def choose(device: torch.device, dtype: torch.dtype, program: Program, pieces: Sequence[Piece]) -> Kernel:
    """The kernel for the `pieces` of a parameter of `dtype` on `device` that `program` steps.

    Raises `ValueError` if ``GWT_DIST_KERNEL`` names a kernel that cannot take them, `BuildError` if it names one that
    cannot be built.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", *NAMES):
        raise ValueError(f"{VARIABLE}={forced!r} must be one of {NAMES}, or unset for the fastest that fits")
    name = forced or {"cpu": "cpu", "cuda": "triton"}.get(device.type, "eager")
    if name == "eager":
        return eager
    missing = missing_of(name, device, dtype, program, pieces)
    if not missing:
        return _forced(name, program) if forced else _loaded(name, program)
    if forced:
        raise ValueError(
            f"{VARIABLE}={forced} cannot take {missing}; unset it, and these parameters get the eager kernel"
        )
    return eager


def missing_of(name: str, device: torch.device, dtype: torch.dtype, program: Program, pieces: Sequence[Piece]) -> str:
    """What of a parameter the compiled kernels called `name` cannot take."""
    if name == "cpu" and device.type != "cpu":
        return f"parameters on {device}"
    if name == "triton" and not triton.takes(device):
        return f"parameters on {device} (a GPU is needed, or, for tests on a CPU alone, TRITON_INTERPRET=1)"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"parameters of {dtype}"
    lacks = lacking(program, _COMPILED[name].SUFFIX)
    if lacks:
        return lacks
    its = {f"state in {field.format}": field.format for field in program.fields}
    by_chance = program.rounding == "stochastic"
    its |= {f"weights rounded {'by chance (stochastic_rounding)' if by_chance else 'to nearest'}": program.rounding}
    lacks = next((what for what, one in its.items() if one not in _COMPILED[name].STORES), "")
    if lacks:
        return lacks
    for piece in pieces:
        if len({place.offset for name, place in piece.places.items() if name in program.names(Extent.UNIT)}) > 1:
            return f"state at another place for each field ({piece.fragment.fqn})"
        if not isinstance(piece.transform, HaarTransform):
            return f"wavelets other than Haar ({piece.fragment.fqn})"
        if piece.level > MAX_LEVEL:
            return f"levels above {MAX_LEVEL} ({piece.fragment.fqn})"
    return ""


def _forced(name: str, program: Program) -> Kernel:
    _COMPILED[name].prepare(program)
    return _COMPILED[name]


@cache
def _loaded(name: str, program: Program) -> Kernel:
    """The kernel called `name`; the reference, with a warning, where it cannot be built for `program`."""
    try:
        return _forced(name, program)
    except BuildError as error:
        warnings.warn(f"{error}\nGWTAdamW goes on with its eager kernel.", RuntimeWarning, stacklevel=2)
        return eager
